"""Scaling laws: what a run computes, the fit and its interval on known laws, budgets, repeated text, footprints."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmcourse import scaling as sc
from llmcourse.model import GPT, GPTConfig
from llmcourse.settings import BadInput
from llmcourse.training import TrainConfig, causal_lm_loss, train, training_flops

TRUE = sc.Law(1.0, 12.0, 60.0, 0.28, 0.33)
SIZES, LENGTHS = (1e4, 3e4, 1e5, 3e5), (1e5, 2e5, 4e5, 8e5, 1.6e6)
N, D = (np.repeat(SIZES, len(LENGTHS)), np.tile(LENGTHS, len(SIZES)))


def noisy(seed: int, noise: float = 0.006) -> np.ndarray:
    return TRUE.loss(N, D) * np.exp(noise * np.random.default_rng(seed).normal(size=len(N)))


def text(rows: int = 40, length: int = 16) -> torch.Tensor:
    return torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(0))


class TestCounting:
    @pytest.mark.parametrize(
        "config",
        [
            sc.byte_gpt(32, 2, length=16),
            GPTConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, context=16, tied=False),
            GPTConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=1, context=16, position="learned", ffn="relu"),
        ],
        ids=["bytes", "grouped, untied, swiglu", "table of positions"],
    )
    def test_the_formula_is_what_a_counter_sees(self, config):
        ids = torch.randint(config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            causal_lm_loss(GPT(config), ids).mean().backward()
        parts = sc.flops_by_part(config, 16)
        assert sum(parts.values()) * 48 == counter.get_total_flops() == training_flops(config, 16) * 48

    def test_parameters_outside_embedding_and_head(self):
        config = sc.byte_gpt(32, 2)
        model = GPT(config)
        assert sc.non_embedding(config) == sum(p.numel() for p in model.parameters()) - 256 * 32
        untied = GPTConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=2, context=64, norm="layer", ffn="gelu",
                           tied=False)  # fmt: skip
        assert sc.non_embedding(untied) == sc.non_embedding(config)

    def test_rows_share_their_borders_and_lose_at_most_one_row(self):
        rows = sc.byte_rows(["abcdefgh", "xy"], 3)  # 11 bytes with the line break
        assert [bytes(r.tolist()) for r in rows] == [b"abcd", b"defg", b"gh\nx"]
        assert len(sc.byte_rows(["abcd"], 3)) == 1
        with pytest.raises(BadInput, match="bytes of the texts is 3; allowed: at least 4"):
            sc.byte_rows(["abc"], 3)

    @pytest.mark.parametrize("width", [0, 8, 40, 16.0])
    def test_widths(self, width):
        with pytest.raises(BadInput, match="width"):
            sc.byte_gpt(width, 1)

    def test_experts_and_rows_that_are_too_long_are_refused(self):
        moe = GPTConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=1, n_experts=2)
        with pytest.raises(BadInput, match="n_experts is 2; allowed: 0"):
            sc.flops_by_part(moe, 4)
        with pytest.raises(BadInput, match="from 1 to 64"):
            sc.flops_by_part(sc.byte_gpt(16, 1), 65)


class TestRuns:
    PLAN = sc.Plan(length=16, batch_size=4)

    def go(self, **more):
        how = dict(tokens=640, lr=3e-3, seed=1, plan=self.PLAN) | more
        return sc.train_one(sc.byte_gpt(16, 1, length=16), text(), text(9), **how)

    def test_it_is_the_trainer_of_the_course(self):
        """The bare loop gives the same last loss as `train` with the same plan, order and first weights."""
        run = self.go()
        torch.manual_seed(1)
        model = GPT(sc.byte_gpt(16, 1, length=16))
        cfg = TrainConfig(steps=10, batch_size=4, seq_len=16, lr=3e-3, warmup=1, seed=1, weight_decay=0.1,
                          optimizer_options={"betas": (0.9, 0.95)})  # fmt: skip
        result = train(model, (list(text()), None), cfg)
        assert run.last == pytest.approx(result.losses[-1], abs=1e-4)
        assert run.loss == pytest.approx(sc.held_out_loss(model, text(9)), abs=1e-4)

    def test_same_seed_same_run_other_seed_other_run(self):
        assert self.go().loss == self.go().loss != self.go(seed=2).loss

    def test_looks_on_the_way_change_nothing(self):
        run = self.go(marks=(64, 640))
        assert list(run.on_the_way) == [64, 640]
        assert run.loss == self.go().loss == run.on_the_way[640]

    def test_held_out_loss_is_a_mean_over_targets_however_it_is_cut(self):
        model = GPT(sc.byte_gpt(16, 1, length=16))
        want = float(causal_lm_loss(model, text(9)).mean().detach())
        for size in (1, 2, 64):
            assert sc.held_out_loss(model, text(9), batch_size=size) == pytest.approx(want, abs=1e-6)
        assert model.training and not model.eval().training
        sc.held_out_loss(model, text(9))
        assert not model.training

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"tokens": 65}, "tokens is 65; allowed: a multiple of 64"),
            ({"tokens": 0}, "tokens is 0"),
            ({"lr": 0.0}, "lr is 0.0"),
            ({"marks": (1,)}, "tokens is 1; allowed: a multiple of 64"),
            ({"plan": sc.Plan(length=8)}, r"shape of train is \(40, 17\); allowed: \(rows, 9\)"),
        ],
    )
    def test_refused(self, more, message):
        with pytest.raises(BadInput, match=message):
            self.go(**more)

    @pytest.mark.parametrize(
        "field", [{"warmup": 1.0}, {"schedule": "cosin"}, {"clip": 0}, {"length": 0}, {"batch_size": 1.5}]
    )
    def test_plans(self, field):
        with pytest.raises(BadInput, match=next(iter(field))):
            sc.Plan(**field)


class TestFit:
    def test_a_law_without_noise_is_found_again(self):
        fit = sc.fit_law(N, D, TRUE.loss(N, D), starts=sc.STARTS[2:4], tolerance=1e-9)
        assert fit.law == pytest.approx(TRUE, rel=0.01) and fit.objective < 1e-9
        assert len(fit.ends) == 2 and min(fit.ends) == fit.objective

    @pytest.mark.parametrize("delta", [1e-3, 1e-2])
    def test_many_at_once_find_what_lbfgs_finds(self, delta):
        loss = noisy(0)
        one = sc.fit_law(N, D, loss, delta=delta, starts=sc.STARTS[1:4])
        many, value = sc.fit_many(N, D, np.stack([loss, noisy(1)]), TRUE, delta=delta)
        assert value[0] == pytest.approx(one.objective, rel=1e-4)
        assert [float(v[0]) for v in many] == pytest.approx(list(one.law), rel=5e-3)
        alone, _ = sc.fit_many(N, D, noisy(1), TRUE, delta=delta)
        assert many.alpha[1] == pytest.approx(alone.alpha[0], rel=1e-3)

    def test_weights_are_repetitions(self):
        loss, weights = noisy(2), np.random.default_rng(0).integers(0, 3, len(N))
        weighted, _ = sc.fit_many(N, D, loss, TRUE, weights=weights[None], delta=0.01)
        again = [np.repeat(v, weights) for v in (N, D, loss)]
        plain, _ = sc.fit_many(*again, TRUE, delta=0.01)
        assert [float(v[0]) for v in weighted] == pytest.approx([float(v[0]) for v in plain], rel=1e-3)

    def test_a_held_floor_stays_and_costs(self):
        loss = noisy(3)
        _, free = sc.fit_many(N, D, loss, TRUE, delta=0.01)
        law, value = sc.fit_many(N, D, loss, TRUE, floor=np.array([0.2, 1.0, 1.5]), delta=0.01)
        assert np.allclose(law.E, [0.2, 1.0, 1.5]) and (value >= free * (1 - 1e-9)).all()
        assert value[2] > 2 * free and value[1] < 1.1 * free

    def test_an_average_stops_earlier_than_a_sum(self):
        """The error that Besiroglu et al. (2024) describe: the tolerance meets a gradient made small by the mean."""
        loss, how = noisy(0), dict(starts=sc.STARTS[3:4])
        right = sc.fit_law(N, D, loss, tolerance=1e-5, **how)
        early = sc.fit_law(N, D, loss, reduce="mean", tolerance=1e-5, **how)
        late = sc.fit_law(N, D, loss, reduce="mean", tolerance=1e-9, **how)
        assert early.objective > 2 * right.objective and early.iterations < right.iterations
        assert late.objective < 1.02 * right.objective  # a smaller tolerance mends it
        best = sc.fit_law(N, D, loss, tolerance=1e-9, **how)
        assert late.objective == pytest.approx(best.objective, rel=0.02)

    def test_one_wild_run_moves_it_little(self):
        loss = TRUE.loss(N, D)
        loss[7] *= 1.5
        law = sc.Law(*(float(v[0]) for v in sc.fit_many(N, D, loss, TRUE)[0]))
        assert law.exponent == pytest.approx(TRUE.exponent, abs=0.01)
        square = sc.Law(*(float(v[0]) for v in sc.fit_many(N, D, loss, TRUE, delta=10.0)[0]))
        assert abs(square.exponent - TRUE.exponent) > 5 * abs(law.exponent - TRUE.exponent)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((np.full(9, 1e4), np.repeat(LENGTHS[:3], 3), np.ones(9)), "different n is 1; allowed: at least 3"),
            ((np.tile(SIZES[:2], 5), np.repeat(LENGTHS, 2), np.ones(10)), "different n is 2"),
            ((np.repeat(SIZES, 3), np.full(12, 1e5), np.ones(12)), "different tokens is 1"),
            ((N[:5], D[:5], np.ones(5)), "runs is 5; allowed: at least 6"),
            ((N, D, np.zeros(len(N))), "loss is 0.0"),
            ((N, D, np.full(len(N), np.nan)), "loss is nan"),
            ((N / 1e9, D, np.ones(len(N))), "plain count"),
            ((N, D, np.ones(len(N) - 1)), "shapes"),
        ],
    )
    def test_refused(self, args, message):
        with pytest.raises(BadInput, match=message):
            sc.fit_law(*args)
        with pytest.raises(BadInput, match=message):
            sc.bootstrap_laws(*args, TRUE)

    @pytest.mark.parametrize("more", [{"delta": 0}, {"reduce": "max"}, {"starts": []}])
    def test_refused_settings(self, more):
        with pytest.raises(BadInput, match=next(iter(more))):
            sc.fit_law(N, D, TRUE.loss(N, D), **more)


class TestIntervals:
    def test_draws_keep_runs_of_a_unit_together(self):
        weights = sc.draw_weights(["b", "a", "b", "c"], 50, seed=0)
        assert weights.shape == (50, 4) and (weights[:, 0] == weights[:, 2]).all()
        assert (weights[:, [0, 1, 3]].sum(1) == 3).all() and len(np.unique(weights, axis=0)) > 5
        assert (weights == sc.draw_weights(["b", "a", "b", "c"], 50, seed=0)).all()

    def test_the_unit_is_the_cell(self):
        """Each run twice says nothing new: the interval stays."""
        loss = noisy(4)
        once = sc.bootstrap_laws(N, D, loss, TRUE, repeats=40, delta=0.01)
        twice = sc.bootstrap_laws(*(np.tile(v, 2) for v in (N, D, loss)), TRUE, repeats=40, delta=0.01)
        assert np.asarray(twice.exponent) == pytest.approx(np.asarray(once.exponent), abs=2e-3)

    def test_intervals_hold_a_known_law(self):
        """60 worlds: an interval for 95 % holds at least 80 %, one of the four draws nearest the middle does not."""
        worlds, draws = 60, 40
        loss = np.stack([noisy(100 + w) for w in range(worlds)])
        weights = np.concatenate([sc.draw_weights(range(len(N)), draws, w) for w in range(worlds)])
        found, _ = sc.fit_many(N, D, np.repeat(loss, draws, 0), TRUE, weights=weights, delta=0.01, steps=80)
        table = np.sort(found.exponent.reshape(worlds, draws), 1)
        held = lambda low, high: np.mean((low <= TRUE.exponent) & (TRUE.exponent <= high))
        assert held(table[:, 0], table[:, -1]) >= 0.8
        assert held(table[:, 18], table[:, 21]) <= 0.4

    def test_middle_part(self):
        values = np.arange(1001.0)
        assert sc.middle_part(values) == (25, 975) and sc.middle_part(values, 0.5) == (250, 750)
        assert sc.middle_part([1.0, 2.0, math.inf], 0.9) == (1.0, math.inf)
        with pytest.raises(BadInput, match="level"):
            sc.middle_part(values, 1.0)


class TestBudgets:
    @pytest.mark.parametrize("C", [1e12, 1e18, 5.76e23])
    def test_the_closed_form_is_the_minimum(self, C):
        at = TRUE.optimum(C)
        assert 6 * at.n * at.tokens == pytest.approx(C)
        n = np.geomspace(at.n / 30, at.n * 30, 20_001)
        losses = TRUE.loss(n, C / 6 / n)
        assert n[np.argmin(losses)] == pytest.approx(at.n, rel=1e-3)

    def test_many_laws_at_once(self):
        both = sc.Law(*(np.array([v, w]) for v, w in zip(TRUE, (1.69, 406.4, 410.7, 0.34, 0.28), strict=True)))
        assert both.optimum(1e18).n[0] == pytest.approx(TRUE.optimum(1e18).n)
        assert both.exponent[1] == pytest.approx(0.28 / 0.62)

    def test_published_constants_give_the_published_optimum(self):
        """Chinchilla's budget, 5.76e23 FLOPs: approach 3 asks for some 40B parameters, the refit for about 70B."""
        chinchilla = sc.Law(1.69, 406.4, 410.7, 0.34, 0.28).optimum(5.76e23)
        again = sc.Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658).optimum(5.76e23)
        assert 3.0e10 < chinchilla.n < 4.5e10 and 15 < again.ratio < 30 < chinchilla.ratio

    @pytest.mark.parametrize("served", [0.0, 1e9, 1e12])
    def test_the_cheapest_reaches_the_loss_and_nothing_is_cheaper(self, served):
        loss = float(TRUE.loss(1e6, 1e8))
        at = sc.cheapest(TRUE, loss, served)
        assert TRUE.loss(at.n, at.tokens) == pytest.approx(loss, rel=1e-9)
        cost = lambda n, tokens: 6 * n * tokens + 2 * n * served
        for factor in (0.5, 0.9, 1.1, 2.0):
            gap = loss - TRUE.E - TRUE.A / (at.n * factor) ** TRUE.alpha
            if gap > 0:
                assert cost(at.n * factor, (TRUE.B / gap) ** (1 / TRUE.beta)) > cost(*at)

    def test_use_asks_for_smaller_models_and_more_tokens(self):
        loss = float(TRUE.loss(1e6, 1e8))
        sizes = [sc.cheapest(TRUE, loss, served) for served in (0, 1e8, 1e10, 1e12)]
        assert all(a.n > b.n and a.tokens < b.tokens for a, b in itertools.pairwise(sizes))
        best = TRUE.optimum(6 * sizes[0].n * sizes[0].tokens)
        assert sizes[0].n == pytest.approx(float(best.n), rel=2e-3)

    @pytest.mark.parametrize("loss", [0.5, 1.0])
    def test_a_loss_at_or_below_the_floor(self, loss):
        with pytest.raises(BadInput, match=f"loss is {loss}; allowed: a finite number above 1.0"):
            sc.cheapest(TRUE, loss)

    def test_repeated_text(self):
        assert sc.effective_tokens(1e6, 1e6) == 1e6  # once is fresh
        assert sc.effective_tokens(1e6, 2e6, half=1.0) == pytest.approx(1e6 * (2 - math.exp(-1)))
        assert sc.effective_tokens(1e6, 1e12) == pytest.approx(1e6 * 16.4)  # U (1 + R*) at most
        assert 3.7e6 < sc.effective_tokens(1e6, 4e6) < 4e6  # four epochs are nearly fresh
        for given in ((1e6, 0.99e6), (0, 1e6)):
            with pytest.raises(BadInput):
                sc.effective_tokens(*given)


class TestFootprint:
    ONE = dict(peak=1e15, mfu=0.5, watts=500.0, pue=1.2, grams_per_kwh=400.0)

    def test_by_hand(self):
        f = sc.training_footprint(3.6e18, **self.ONE, price_per_hour=3.0)
        assert [v.value for v in f] == pytest.approx([2.0, 1.2, 0.48, 6.0])
        assert all(v.low == v.high == v.value for v in f)
        assert sc.training_footprint(3.6e18, **self.ONE).price is None

    def test_ranges_go_through(self):
        f = sc.training_footprint(3.6e18, **self.ONE | {"grams_per_kwh": (100.0, 400.0)})
        assert f.kwh.low == f.kwh.high == pytest.approx(1.2)
        ends = np.array([100, 400]) ** np.array([[0.975, 0.025], [0.025, 0.975]])  # even on a logarithmic scale
        assert [f.kg_co2e.low, f.kg_co2e.high] == pytest.approx(1.2e-3 * ends.prod(1), rel=0.01)
        assert f.kg_co2e.value == pytest.approx(0.24, rel=0.01)

    def test_independent_ranges_widen_less_than_their_corners(self):
        f = sc.training_footprint(3.6e18, **self.ONE | {"grams_per_kwh": (100.0, 400.0), "mfu": (0.25, 1.0)})
        assert 4 < f.kg_co2e.high / f.kg_co2e.low < 16 * 0.95
        assert f == sc.training_footprint(3.6e18, **self.ONE | {"grams_per_kwh": (100.0, 400.0), "mfu": (0.25, 1.0)})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"mfu": 40.0}, {"mfu": 0.0}, {"mfu": (0.5, 0.3)}, {"pue": 0.99}, {"watts": -1.0},
            {"peak": (1e14, math.inf)}, {"grams_per_kwh": (1.0, 2.0, 3.0)}, {"price_per_hour": 0.0}, {"draws": 10},
        ],
    )  # fmt: skip
    def test_refused(self, wrong):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            sc.training_footprint(1e18, **self.ONE | wrong)

    def test_break_even(self):
        assert sc.break_even(10.0, 2.0, 1.5) == 20 and sc.break_even(0.0, 2.0, 1.0) == 0
        assert sc.break_even(1.0, 1.0, 1.0) == sc.break_even(1.0, 1.0, 2.0) == math.inf
        for wrong in ((-1.0, 2.0, 1.0), (1.0, math.nan, 1.0), (1.0, 2.0, -1.0)):
            with pytest.raises(BadInput):
                sc.break_even(*wrong)


class TestEnergy:
    def test_the_processor(self, tmp_path):
        package = tmp_path / "intel-rapl:0"
        package.mkdir()
        (package / "energy_uj").write_text("1000000")
        (package / "max_energy_range_uj").write_text("9999999")
        meter = sc.Energy(root=str(tmp_path))
        meter.start()
        (package / "energy_uj").write_text("3500000")
        assert meter.joules() == pytest.approx(2.5) and not meter.why_not

    def test_no_counter_is_no_number(self, tmp_path):
        meter = sc.Energy(root=str(tmp_path))
        meter.start()
        assert meter.joules() is None and "no energy counter" in meter.why_not

    def test_a_gpu(self, monkeypatch):
        spent = iter([5000, 5000, 7500])
        fake = types.SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByIndex=lambda i: i,
            nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(spent),
        )
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        meter = sc.Energy("cuda")
        meter.start()
        assert meter.joules() == 2.5
        monkeypatch.setitem(sys.modules, "pynvml", None)  # the import fails
        gone = sc.Energy("cuda")
        gone.start()
        assert gone.joules() is None and "GPU" in gone.why_not
        with pytest.raises(BadInput, match="device is 'tpu'"):
            sc.Energy("tpu")


class TestStoredRuns:
    """nbs/_results/scaling.json is what benchmarks/scaling.py writes, whole, by its own rule."""

    @pytest.fixture(scope="class")
    def stored(self):
        return json.loads((ROOT / "nbs" / "_results" / "scaling.json").read_text(encoding="utf8"))

    def test_every_run_is_there_once(self, stored):
        how, most = stored["how"], stored["how"]["largest"]
        want = {
            (size, t, seed) for size in stored["sizes"] for t in how["tokens"] for seed in stored["seeds"]
            if t <= most.get(size, max(how["tokens"]))
        }  # fmt: skip
        found = [(r["size"], r["tokens"], r["seed"]) for r in stored["rows"]["grid"]]
        assert len(found) == len(set(found)) and set(found) == want
        repeats = [(r["different"], r["seed"]) for r in stored["rows"]["repeats"]]
        assert sorted(repeats) == sorted((d, s) for d in how["different"] for s in stored["seeds"])
        assert stored["plan"] == {k: getattr(sc.Plan(), k) for k in stored["plan"]}

    def test_rates_follow_the_rule_on_other_seeds(self, stored):
        assert not set(stored["seeds"]) & set(stored["rate_seeds"])
        for size in stored["sizes"]:
            runs = [r for r in stored["rows"]["rates"]
                    if r["size"] == size and r["tokens"] == stored["how"]["rate_tokens"]]  # fmt: skip
            assert len(runs) == len(stored["how"]["rates"]) * len(stored["rate_seeds"])
            mean = {lr: np.mean([r["loss"] for r in runs if r["lr"] == lr]) for lr in stored["how"]["rates"]}
            assert {r["lr"] for r in stored["rows"]["grid"] if r["size"] == size} == {min(mean, key=mean.get)}

    def test_sizes_are_those_of_the_code(self, stored):
        for run in stored["rows"]["grid"]:
            assert run["n"] == sc.non_embedding(sc.byte_gpt(*stored["sizes"][run["size"]]))

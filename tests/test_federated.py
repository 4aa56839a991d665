"""Federated averaging against loops and formulas, compressors and their bytes, masks, and what an accountant proves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from llmcourse import federated as fd
from llmcourse.settings import BadInput


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_data(sizes=(3, 9, 18), *, inputs: int = 4, classes: int = 3):
    n = sum(sizes)
    x = torch.randn(n, inputs, generator=dice(1), dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=dice(2))
    return fd.Clients(x, y, list(torch.arange(n).split(list(sizes))))


NET = fd.Layers(4, 6, 3)
START = NET.start(0).double()


def gradient(theta, x, y, losses=NET.losses):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(losses(theta, x, y).mean(), theta)[0]


class TestModels:
    def test_layers_are_linear_layers_of_torch(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        before = [p.detach().clone() for p in model.parameters()]
        theta, losses = fd.of_module(model)
        data = some_data()
        at = torch.stack([part[:3] for part in data.parts])
        rows = torch.stack([theta, 2 * theta, theta - 1])
        assert theta.numel() == NET.n == 4 * 6 + 6 + 6 * 3 + 3
        assert torch.allclose(NET.logits(theta, data.x), model(data.x))
        ours, theirs = (f(rows, data.x[at], data.y[at]) for f in (NET.losses, losses))
        assert ours.shape == (3, 3) and torch.allclose(ours, theirs, atol=1e-12)
        assert all(torch.equal(a, p) for a, p in zip(before, model.parameters()))

    def test_first_weights_come_from_the_seed_and_have_the_spread_of_linear_layers(self):
        wide = fd.Layers(100, 400, 8)
        assert torch.equal(wide.start(3), wide.start(3)) and not torch.equal(wide.start(3), wide.start(4))
        first, last = wide.start(0)[:40_000], wide.start(0)[40_400:]
        assert float(first.abs().max()) <= 0.1 and float(last.abs().max()) <= 0.05
        assert abs(float(first.std()) - 0.1 / 3**0.5) < 1e-3

    def test_frozen_weights_stay_out_of_the_vector(self):
        model = nn.Linear(4, 3)
        model.bias.requires_grad_(False)
        assert fd.of_module(model)[0].numel() == 12
        model.weight.requires_grad_(False)
        with pytest.raises(BadInput, match="trained weights is 0"):
            fd.of_module(model)


class TestAveraging:
    def test_one_step_on_all_data_is_one_step_of_gradient_descent(self):
        data = some_data()
        arrived = torch.stack([START - 0.5 * gradient(START, data.x[p], data.y[p]) for p in data.parts])
        pooled = START - 0.5 * gradient(START, data.x, data.y)
        assert torch.allclose(fd.weighted_mean(arrived, data.counts), pooled, atol=1e-12)
        assert not torch.allclose(arrived.mean(0), pooled, atol=1e-4)

    def test_clients_with_one_example_make_it_exact_through_the_whole_path(self):
        """A batch with replacement from one example is all data of the client, so `federated` is exact, too."""
        data = some_data((1,) * 12)
        end = fd.federated(NET.losses, START, data, fd.Rounds(rounds=4, steps=1, lr=0.3, batch_size=2))
        theta = START
        for _ in range(4):
            theta = theta - 0.3 * gradient(theta, data.x, data.y)
        assert torch.allclose(end, theta, atol=1e-12)

    @pytest.mark.parametrize("prox", [0.0, 0.7])
    def test_side_by_side_is_one_after_the_other(self, prox):
        data, before = some_data(), START.clone()
        picks = data.draw(5, 4, dice())
        assert picks.shape == (3, 5, 4)
        assert all(set(picks[i].flatten().tolist()) <= set(p.tolist()) for i, p in enumerate(data.parts))
        arrived = fd.local_sgd(NET.losses, START, data, picks, 0.4, prox=prox)
        for i in range(3):
            theta = START
            for at in picks[i]:
                whole = lambda t, x, y: NET.losses(t, x, y) + prox / 2 * (t - START).square().sum()
                theta = theta - 0.4 * gradient(theta, data.x[at], data.y[at], whole)
            assert torch.allclose(arrived[i], theta, atol=1e-12)
        assert torch.equal(START, before) and not START.requires_grad

    def test_the_fixed_points_of_two_bowls(self):
        bowl = lambda theta, x, y: x[..., 0] / 2 * (theta - x[..., 1]) ** 2
        bowls = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
        data = fd.Clients(bowls, torch.zeros(2, dtype=torch.long), [torch.tensor([0]), torch.tensor([1])])

        def end(**how):
            cfg = fd.Rounds(**{"rounds": 60, "steps": 8, "lr": 0.25, "batch_size": 1} | how)
            return float(fd.federated(bowl, torch.zeros(1, dtype=torch.float64), data, cfg))

        weight = 1 - torch.tensor([0.75, 0.25]).double() ** 8
        biased = float((weight * bowls[:, 1]).sum() / weight.sum())
        assert end() == pytest.approx(biased, abs=1e-9) and biased < 2.2
        assert end(steps=1) == pytest.approx(3, abs=1e-9)
        assert end(control=True) == pytest.approx(3, abs=1e-6)
        assert biased + 0.1 < end(prox=1.0) < 3

    def test_unequal_clients_count_by_their_examples(self):
        data = some_data((2, 28))
        rows = torch.tensor([[1.0], [0.0]])
        assert float(fd.weighted_mean(rows, data.counts)) == pytest.approx(2 / 30)

    def test_only_some_clients_take_part_and_the_seed_decides_which(self):
        data, seen = some_data((5,) * 6), []
        cfg = fd.Rounds(rounds=5, steps=2, lr=0.1, clients=2, seed=3)
        watch = lambda r, theta, updates: seen.append(len(updates))
        one = fd.federated(NET.losses, START, data, cfg, watch=watch)
        assert seen == [2] * 5 and torch.equal(one, fd.federated(NET.losses, START, data, cfg))

    def test_what_the_watcher_says_ends_the_training(self):
        rounds = []
        watch = lambda r, *_: rounds.append(r) or (True if r == 1 else None)
        fd.federated(NET.losses, START, some_data(), fd.Rounds(rounds=9, steps=1, lr=0.1), watch=watch)
        assert rounds == [0, 1]

    def test_agreement(self):
        assert fd.agreement(torch.tensor([[1.0, 0], [0, 3], [-2, 0]])) == pytest.approx(-1 / 3)
        rows = torch.randn(5, 9, generator=dice())
        pairs = itertools.combinations(rows, 2)
        naive = np.mean([float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs])
        assert fd.agreement(rows) == pytest.approx(naive, abs=1e-6)


class TestSplits:
    labels = torch.arange(5).repeat(80)

    @pytest.mark.parametrize("alpha", [0.05, 1.0, 1000.0])
    def test_every_example_is_dealt_out_once(self, alpha):
        parts = fd.dirichlet_split(self.labels, 6, alpha, seed=1, least=2)
        assert torch.cat(parts).sort().values.tolist() == list(range(400))
        assert min(map(len, parts)) >= 2
        again = fd.dealt_anew(parts, seed=0)
        assert [len(p) for p in again] == [len(p) for p in parts]
        assert torch.cat(again).sort().values.tolist() == list(range(400))

    def test_the_concentration_is_the_knob(self):
        """Share of the most frequent class of a client, in the mean over clients and draws."""

        def peak(alpha):
            found = []
            for seed in range(8):
                for p in fd.dirichlet_split(self.labels, 6, alpha, seed=seed):
                    found.append(float(self.labels[p].bincount().max()) / len(p))
            return np.mean(found)

        assert peak(1000.0) < 0.25 < peak(1.0) < peak(0.05) and peak(0.05) > 0.7

    def test_least_that_cannot_be(self):
        with pytest.raises(BadInput, match="n_clients is 6; allowed: at most 5"):
            fd.dirichlet_split(self.labels, 6, 1.0, seed=0, least=80)
        with pytest.raises(BadInput, match="no draw had so many"):
            fd.dirichlet_split(self.labels, 4, 0.01, seed=0, least=100)


BOTH = {"dense": fd.Dense(), "top": fd.TopK(5), "random": fd.RandomK(5), "random, bare": fd.RandomK(5, False),
        "sign": fd.Sign(), "8 bits": fd.Stochastic(8, 16), "2 bits": fd.Stochastic(2, 16)}  # fmt: skip


class TestCompressors:
    v = torch.randn(50, generator=dice(5))

    @pytest.mark.parametrize(
        ("name", "size"),
        [("dense", 200), ("top", 40), ("random", 28), ("random, bare", 28), ("sign", 7 + 4), ("8 bits", 50 + 16),
         ("2 bits", 13 + 16)],
    )  # fmt: skip
    def test_bytes_with_places_seeds_and_scales(self, name, size):
        assert fd.wire_bytes(BOTH[name].encode(self.v, dice())) == size

    def test_the_message_alone_is_enough(self):
        for c in BOTH.values():
            before = self.v.clone()
            message = tuple(t.clone() for t in c.encode(self.v, dice()))
            first, second = c.decode(message, 50), c.decode(message, 50)
            assert torch.equal(first, second) and first.shape == (50,) and torch.equal(self.v, before)

    def test_top_k_is_the_best_choice_of_k_numbers(self):
        v = torch.tensor([3.0, -5.0, 1.0, 4.0])
        assert fd.TopK(2).decode(fd.TopK(2).encode(v, dice()), 4).tolist() == [0, -5, 0, 4]

    def test_signs_and_their_size(self):
        v = torch.tensor([1.0, -2.0, 0.5, -0.5, 0.0, 1.0, 1.0, -1.0, 2.0])
        got = fd.Sign().decode(fd.Sign().encode(v, dice()), 9)
        assert torch.allclose(got, torch.where(v >= 0, 1.0, -1.0) * v.abs().mean())

    @pytest.mark.parametrize("name", ["random", "8 bits", "2 bits"])
    def test_unbiased(self, name):
        g, c, k, v = dice(), BOTH[name], 2000, self.v.double()
        got = torch.stack([c.decode(c.encode(v, g), 50) for _ in range(k)])
        error = got.mean(0) - v
        deviation = got.std(0) / k**0.5  # 0 where a number lies on the grid
        assert bool((error.abs() < 5 * deviation + 1e-6).all())  # five standard errors, 50 numbers
        assert float(got.std(0).max()) > 0.003

    @pytest.mark.parametrize("name", ["top", "random, bare", "sign"])
    def test_biased(self, name):
        g, c = dice(), BOTH[name]
        mean = torch.stack([c.decode(c.encode(self.v, g), 50) for _ in range(1000)]).mean(0)
        assert float((mean - self.v).norm() / self.v.norm()) > 0.3

    def test_a_step_of_the_grid_is_the_largest_error(self):
        for bits in range(2, 9):
            c = fd.Stochastic(bits, 16)
            rows = torch.nn.functional.pad(self.v, (0, 14)).view(-1, 16)
            step = (rows.abs().amax(1) / c.levels).repeat_interleave(16)[:50]
            got = c.decode(c.encode(self.v, dice()), 50)
            assert bool(((got - self.v).abs() <= step * 1.0001).all())
        assert not fd.Stochastic(4, 16).decode(fd.Stochastic(4, 16).encode(torch.zeros(20), dice()), 20).any()

    def test_low_rank_finds_a_matrix_of_that_rank_and_sends_the_rest_as_it_is(self):
        shapes = [(12, 9), (12,), (2, 2)]
        exact = torch.randn(12, 2, generator=dice()) @ torch.randn(2, 9, generator=dice(1))
        v = torch.cat([exact.flatten(), torch.randn(16, generator=dice(2))])
        c = fd.LowRank(shapes, 2)
        message = c.encode(v, dice())
        assert torch.allclose(c.decode(message, v.numel()), v, atol=1e-5)
        assert fd.wire_bytes(message) == 4 * (2 * (12 + 9) + 12 + 4)

    def test_low_rank_gets_better_as_it_goes_on(self):
        G = torch.randn(20, 20, generator=dice())
        best = float(torch.linalg.svdvals(G)[1:].square().sum().sqrt())
        c, errors = fd.LowRank([(20, 20)], 1), []
        for _ in range(300):
            errors.append(float((c.decode(c.encode(G.flatten(), dice()), 400).view(20, 20) - G).norm()))
        assert errors[0] > errors[-1] and errors[-1] == pytest.approx(best, rel=1e-3)

    @pytest.mark.parametrize("name", ["top", "random, bare", "sign", "2 bits"])
    def test_with_feedback_all_is_sent_but_one_remainder(self, name):
        sender, g = fd.Sender(BOTH[name]), dice()
        vectors = torch.randn(30, 50, generator=dice(7), dtype=torch.float64)
        got = torch.stack([sender.send(v, g) for v in vectors]).sum(0)
        assert torch.allclose(got + sender.rest, vectors.sum(0), atol=1e-9)
        assert float(sender.rest.norm()) > 0

    def test_without_feedback_two_workers_can_stand_still(self):
        for feedback, moved in ((True, True), (False, False)):
            senders = [fd.Sender(fd.TopK(1), feedback=feedback) for _ in range(2)]
            rows = torch.tensor([[10.0, 1], [-10.0, 1]])
            total = sum(s.send(v, dice()) for _ in range(30) for s, v in zip(senders, rows))
            assert bool(total[1] > 0) == moved

    def test_a_sender_has_a_compressor_of_its_own(self):
        shared = fd.LowRank([(6, 6)], 1)
        before = shared.q[0].clone()
        fd.Sender(shared).send(torch.randn(36, generator=dice()), dice())
        assert torch.equal(shared.q[0], before)

    def test_dense_compressed_training_is_training(self):
        data = some_data((10, 10))
        theta, sent = fd.compressed_sgd(
            NET.losses, START, data, fd.Dense(), steps=5, lr=0.3, batch_size=4, feedback=False, seed=2
        )
        picks, expected = data.draw(5, 4, dice(2)), START
        for step in range(5):
            at = picks[:, step].flatten()
            expected = expected - 0.3 * gradient(expected, data.x[at], data.y[at])
        assert torch.allclose(theta, expected, atol=1e-12) and sent == 5 * 8 * NET.n


class TestSecureAggregation:
    def parts(self, m=4, n=20_000):
        point = fd.FixedPoint(m)
        v = torch.randn(m, n, generator=dice(), dtype=torch.float64)
        codes = torch.stack([point.encode(row) for row in v])
        seeds = {pair: 100 + k for k, pair in enumerate(itertools.combinations(range(m), 2))}
        return point, v, codes, torch.stack([fd.masked(codes[i], i, seeds) for i in range(m)]), seeds

    def test_the_sum_of_the_codes_is_exact(self):
        point, v, codes, messages, _ = self.parts()
        assert torch.equal(messages.sum(0) % fd.MODULUS, codes.sum(0) % fd.MODULUS)
        error = (point.decode(messages.sum(0) % fd.MODULUS) - v.sum(0)).abs().max()
        assert float(error) <= 4 * 0.5 / 2**16

    def test_a_message_is_uniform_and_says_nothing_about_the_update(self):
        _, v, codes, messages, _ = self.parts()

        def chi(codes):
            four = torch.stack([codes >> s & 255 for s in (0, 8, 16, 24)]).flatten()
            counts = torch.bincount(four, minlength=256).double()
            return float((counts - counts.mean()).square().sum() / counts.mean())

        # 255 degrees of freedom: mean 255, deviation 22.6; five deviations
        assert all(abs(chi(message) - 255) < 5 * math.sqrt(2 * 255) for message in messages)
        assert chi(codes[0]) > 10_000
        both = torch.stack([messages[0].double(), v[0]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / 20_000**0.5
        assert not torch.equal(messages[0] >= 2**31, codes[0] >= 2**31)

    @pytest.mark.parametrize("gone", range(4))
    def test_a_client_that_drops_out(self, gone):
        point, v, _, messages, seeds = self.parts(n=50)
        rest = [i for i in range(4) if i != gone]
        total, truth = messages[rest].sum(0) % fd.MODULUS, v[rest].sum(0)
        assert float((point.decode(total) - truth).abs().max()) > 100
        mended = fd.without(total, gone, {p: s for p, s in seeds.items() if gone in p})
        assert float((point.decode(mended) - truth).abs().max()) <= 2 / 2**16
        with pytest.raises(BadInput, match=f"pairs with client {gone} only"):
            fd.without(total, gone, seeds)

    def test_the_largest_sum_fits_and_one_code_more_is_refused(self):
        point = fd.FixedPoint(3, fraction=8)
        top = torch.tensor([point.largest, -point.largest], dtype=torch.float64)
        total = sum(point.encode(top) for _ in range(3)) % fd.MODULUS
        assert torch.allclose(point.decode(total), 3 * top)
        with pytest.raises(BadInput, match="sums run over"):
            point.encode(top + 1 / 2**8)
        with pytest.raises(BadInput, match="sums run over"):
            point.encode(torch.tensor([math.nan]))


class TestPrivacy:
    def test_one_row_moves_the_sum_by_the_clip_at_most(self):
        rows = torch.randn(8, 30, generator=dice()) * torch.logspace(-4, 3, 8)[:, None]
        without = [fd.private_sum(rows[torch.arange(8) != i], 0.7, 0.0, dice()) for i in range(8)]
        moved = [float((fd.private_sum(rows, 0.7, 0.0, dice()) - w).norm()) for w in without]
        assert max(moved) == pytest.approx(0.7, rel=1e-4) and moved[0] < 0.01
        short = rows[:1]
        assert torch.equal(fd.clipped(short, 100.0), short) and not fd.clipped(torch.zeros(2, 3), 1.0).any()

    def test_the_noise_is_there_with_the_deviation_that_is_promised(self):
        noise = fd.private_sum(torch.zeros(0, 40_000), 0.5, 3.0, dice())
        assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
        assert abs(float(noise.mean())) < 5 * 1.5 / 200

    def test_gradients_of_examples_add_up(self):
        data = some_data()
        rows = fd.example_gradients(NET.losses, START, data.x, data.y)
        assert rows.shape == (30, NET.n)
        assert torch.allclose(rows.mean(0), gradient(START, data.x, data.y), atol=1e-12)
        one = gradient(START, data.x[7:8], data.y[7:8])
        assert torch.allclose(rows[7], one, atol=1e-12)
        assert fd.example_gradients(NET.losses, START, data.x[:0], data.y[:0]).shape == (0, NET.n)

    @pytest.mark.parametrize(("q", "noise", "order"), [(0.02, 1.0, 2), (0.2, 1.5, 6), (0.3, 4.0, 40), (0.9, 2.0, 5)])
    def test_the_divergence_is_the_integral_of_its_definition(self, q, noise, order):
        z = np.linspace(-40 * noise, order + 40 * noise, 60_001)
        log0 = -(z**2) / (2 * noise**2)
        log1 = np.logaddexp(math.log1p(-q) + log0, math.log(q) - (z - 1) ** 2 / (2 * noise**2))
        width = (z[1] - z[0]) / (noise * math.sqrt(2 * math.pi))
        one, other = (
            math.log(np.exp(order * a + (1 - order) * b).sum() * width) / (order - 1)
            for a, b in ((log1, log0), (log0, log1))
        )
        assert fd.renyi(q, noise, order) == pytest.approx(one, rel=1e-6)
        assert other <= one + 1e-12

    def test_sampling_everybody_is_the_gaussian_mechanism(self):
        assert fd.renyi(1.0, 3.0, 7) == pytest.approx(7 / 18)
        assert fd.renyi(1 - 1e-9, 3.0, 7) == pytest.approx(7 / 18, rel=1e-6)

    @pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 1), (5.0, 30), (40.0, 2000)])
    @pytest.mark.parametrize("delta", [1e-3, 1e-6])
    def test_the_bound_lies_above_the_exact_value_and_near_it(self, noise, steps, delta):
        exact = fd.gaussian_epsilon(noise, delta=delta, steps=steps)
        bound = fd.epsilon(noise, steps=steps, delta=delta)
        assert exact <= bound <= 1.25 * exact
        one = noise / math.sqrt(steps)
        assert fd.gaussian_delta(exact, one) == pytest.approx(delta, rel=1e-6)

    @pytest.mark.parametrize(("q", "noise"), [(0.05, 1.0), (0.2, 2.0), (0.5, 0.8)])
    def test_the_bound_of_a_sampled_step_lies_above_its_exact_delta(self, q, noise):
        """The δ of one sampled step at ε, by integration of the definition, in both directions."""
        delta = 1e-4
        eps = fd.epsilon(noise, steps=1, delta=delta, q=q)
        z = np.linspace(-30 * noise, 1 + 30 * noise, 200_001)
        p0 = np.exp(-(z**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
        p1 = (1 - q) * p0 + q * np.exp(-((z - 1) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
        width = z[1] - z[0]
        for a, b in ((p1, p0), (p0, p1)):
            assert np.clip(a - math.exp(eps) * b, 0, None).sum() * width <= delta
        low = np.clip(p1 - math.exp(eps / 3) * p0, 0, None).sum() * width
        assert low > delta  # a third of it would be an untrue promise

    @pytest.mark.parametrize(
        ("q", "noise", "steps", "delta", "theirs", "tighter"),
        [
            (0.1, 0.838, 60, 1e-4, 7.994619794396784, 6.613261400346454),
            (0.1, 2.994, 60, 1e-4, 0.9995595830530384, 0.882655835375151),
            (0.01, 1.1, 1000, 1e-5, 1.7252908180449444, 1.5153702482034066),
            (1.0, 4.0, 10, 1e-5, 3.6278518728252274, 3.3414094718592047),
        ],
    )
    def test_another_accountant_comes_to_the_same(self, q, noise, steps, delta, theirs, tighter):
        """dp-accounting 0.6.0: `RdpAccountant` with orders 2 to 256; `PLDAccountant`, which is nearly exact."""
        found = fd.epsilon(noise, steps=steps, delta=delta, q=q)
        assert found == pytest.approx(theirs, rel=1e-10)
        assert tighter < found < 1.25 * tighter

    def test_more_noise_fewer_steps_and_a_smaller_share_are_more_private(self):
        base = fd.epsilon(1.0, steps=100, delta=1e-5, q=0.05)
        assert fd.epsilon(1.5, steps=100, delta=1e-5, q=0.05) < base
        assert fd.epsilon(1.0, steps=50, delta=1e-5, q=0.05) < base < fd.epsilon(1.0, steps=100, delta=1e-7, q=0.05)
        assert base < fd.epsilon(1.0, steps=100, delta=1e-5, q=0.1) < fd.epsilon(1.0, steps=100, delta=1e-5)

    def test_the_noise_for_a_target_is_enough_and_hardly_more(self):
        how = dict(steps=200, delta=1e-5, q=0.05)
        sigma = fd.noise_for(3.0, **how)
        assert fd.epsilon(sigma, **how) <= 3.0 < fd.epsilon(sigma / 1.002, **how)

    def test_private_training_without_noise_or_clipping_is_training(self):
        data = some_data()
        theta = fd.private_sgd(NET.losses, START, data.x, data.y, steps=3, lr=0.4, q=1.0, clip=None)
        wide = fd.private_sgd(NET.losses, START, data.x, data.y, steps=3, lr=0.4, q=1.0, clip=1e6)
        expected = START
        for _ in range(3):
            expected = expected - 0.4 * gradient(expected, data.x, data.y)
        assert torch.allclose(theta, expected, atol=1e-12) and torch.allclose(wide, expected, atol=1e-9)

    def test_noise_and_clipping_do_something_and_the_seed_decides(self):
        data = some_data()
        run = lambda **how: fd.private_sgd(NET.losses, START, data.x, data.y, steps=3, lr=0.4, q=0.5, **how)
        assert torch.equal(run(clip=0.1, noise=1.0, seed=1), run(clip=0.1, noise=1.0, seed=1))
        assert not torch.allclose(run(clip=0.1, noise=1.0), run(clip=0.1))
        assert not torch.allclose(run(clip=0.1), run(clip=None))
        assert float((run(clip=0.1) - START).norm()) <= 3 * 0.4 * 0.1 * 30 / 15 + 1e-9


DATA = some_data()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: fd.federated(NET.losses, START, DATA._replace(parts=[torch.arange(2), torch.arange(0)]),
                              fd.Rounds(rounds=1, steps=1, lr=0.1)), "examples of client 1 is 0"),
        (lambda: fd.compressed_sgd(NET.losses, START, DATA._replace(parts=[]), fd.Dense(), steps=1, lr=0.1),
         "clients is 0"),
        (lambda: DATA._replace(parts=[torch.tensor([30])]).checked(), "0 to 29"),
        (lambda: DATA._replace(parts=[torch.tensor([-1])]).checked(), "0 to 29"),
        (lambda: DATA._replace(y=DATA.y[:3]).checked(), "labels is 3"),
        (lambda: fd.weighted_mean(torch.ones(2, 3), torch.tensor([0.0, 1.0])), "above 0"),
        (lambda: fd.weighted_mean(torch.ones(2, 3), torch.ones(3)), "counts"),
        (lambda: fd.weighted_mean(torch.ones(3), torch.ones(3)), "shape of rows"),
        (lambda: fd.agreement(torch.ones(1, 3)), "at least 2 clients"),
        (lambda: fd.Rounds(rounds=0, steps=1, lr=0.1), "rounds is 0"),
        (lambda: fd.Rounds(rounds=1, steps=1, lr=0.0), "lr is 0.0"),
        (lambda: fd.Rounds(rounds=1, steps=1, lr=0.1, prox=-1.0), "prox is -1.0"),
        (lambda: fd.federated(NET.losses, START, DATA, fd.Rounds(rounds=1, steps=1, lr=0.1, clients=4)),
         "clients is 4"),
        (lambda: fd.dirichlet_split(DATA.y, 3, 0.0, seed=0), "alpha is 0.0"),
        (lambda: fd.dirichlet_split(DATA.y, 31, 1.0, seed=0), "n_clients is 31"),
        (lambda: fd.TopK(6).encode(torch.ones(5), dice()), "k is 6"),
        (lambda: fd.TopK(0).encode(torch.ones(5), dice()), "k is 0"),
        (lambda: fd.RandomK(6).encode(torch.ones(5), dice()), "k is 6"),
        (lambda: fd.Stochastic(9).encode(torch.ones(5), dice()), "bits is 9"),
        (lambda: fd.LowRank([(4, 4)], 1).encode(torch.ones(5), dice()), "numbers of the vector is 5"),
        (lambda: fd.FixedPoint(1), "clients is 1"),
        (lambda: fd.FixedPoint(2, fraction=31), "fraction is 31"),
        (lambda: fd.masked(torch.zeros(3, dtype=torch.long), 2, {(0, 1): 5}), "pairs of client 2 is 0"),
        (lambda: fd.clipped(torch.ones(2, 2), 0.0), "clip is 0.0"),
        (lambda: fd.private_sum(torch.ones(2, 2), 1.0, -1.0, dice()), "noise is -1.0"),
        (lambda: fd.renyi(0.0, 1.0, 2), "q is 0.0"),
        (lambda: fd.renyi(0.5, 1.0, 1), "order is 1"),
        (lambda: fd.epsilon(0.0, steps=1, delta=1e-5), "noise is 0.0"),
        (lambda: fd.epsilon(1.0, steps=1, delta=1.0), "delta is 1.0"),
        (lambda: fd.noise_for(0.0, steps=1, delta=1e-5), "target is 0.0"),
        (lambda: fd.noise_for(1e-6, steps=1, delta=1e-5), "target is 1e-06"),
        (lambda: fd.gaussian_epsilon(1.0, delta=0.0), "delta is 0.0"),
        (lambda: fd.private_sgd(NET.losses, START, DATA.x, DATA.y, steps=1, lr=1.0, q=0.5, clip=None, noise=1.0),
         "0 without clipping"),
        (lambda: fd.private_sgd(NET.losses, START, DATA.x[:0], DATA.y[:0], steps=1, lr=1.0, q=0.5, clip=1.0),
         "examples is 0"),
        (lambda: fd.Layers(3), "sizes is"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_sentence(attempt, words):
    with pytest.raises(BadInput) as caught:
        attempt()
    assert words in str(caught.value) and str(caught.value).endswith(".")

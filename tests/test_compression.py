"""The compression interface on small models: statistics, the walk, what is written back or refused, the passport."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.adapters import adapter_for
from llmcourse.compression import (
    AbsMax,
    ActQuant,
    FakeQuant,
    Hessian,
    LayerPass,
    LayerUpdate,
    Mask,
    Noise,
    Pass,
    QParams,
    Report,
    RootMeanSquare,
    RoundingNoise,
    SiteUpdate,
    compress,
    count_parameters,
    disk_bytes,
    flops_per_token,
    layer_error,
    mask_of,
    passport,
    qparams_of,
    write_back,
)
from llmcourse.data import TokenData, load_model
from llmcourse.evaluator import weight_bytes
from llmcourse.packed import load_student, save_student
from llmcourse.quantization import RTN, choose_qparams
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput

RT = Runtime(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_model(tiny_model, rt=RT).model


@pytest.fixture(scope="module")
def data():
    ids = torch.randint(0, 300, (512,), generator=torch.Generator().manual_seed(0))
    none = torch.empty(0, dtype=torch.long)
    return TokenData(train=none, val=none, test=ids, calib=ids, bytes={}, name="random", tokenizer="none", separator=0)


@dataclass(frozen=True, kw_only=True)
class Watch(LayerPass):
    """Multiplies the weights by `factor` and remembers what it was shown, by layer."""

    stats = (Hessian,)
    factor: float = 1.0
    seen: dict = None

    def solve_site(self, site, weights, stats, masks):
        for name, W in weights.items():
            self.seen[name] = W.clone(), stats[Hessian].value.clone(), stats[Hessian].n, masks[name]
        return SiteUpdate({name: LayerUpdate(W * self.factor) for name, W in weights.items()})


@dataclass(frozen=True, kw_only=True)
class Magnitude(LayerPass):
    """Keeps the half of each row that is largest."""

    def solve(self, W, stats, mask):
        keep = W.abs() >= W.abs().median(1, keepdim=True).values
        return LayerUpdate(W * keep, keep)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_a_statistic_does_not_depend_on_how_the_inputs_were_cut(cuts, width, seed):
    x = torch.randn(sum(cuts), width, generator=torch.Generator().manual_seed(seed))
    for cls in (AbsMax, RootMeanSquare, Hessian):
        whole, parts = cls(), cls()
        whole.add(x)
        for part in x.split(cuts):
            parts.add(part)
        assert parts.n == whole.n == len(x)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_layer_error_is_the_mean_square_of_the_output(outputs, inputs, seed):
    g = torch.Generator().manual_seed(seed)
    x, delta, H = torch.randn(30, inputs, generator=g), torch.randn(outputs, inputs, generator=g), Hessian()
    H.add(x)
    assert layer_error(delta, H.value) == pytest.approx(float((x @ delta.T).square().sum(1).mean()), rel=1e-4, abs=1e-6)


def test_a_statistic_that_saw_nothing_says_so():
    with pytest.raises(BadInput, match="Hessian has seen no input"):
        _ = Hessian().value


@given(st.integers(2, 8), st.sampled_from([1, 2, 4, 8]), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_a_grid_snaps_to_the_nearest_value_and_keeps_zero(bits, groups, seed):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(3, 8, generator=g)
    scale = torch.rand(3, groups, generator=g) + 0.05
    zero = torch.randint(0, 2**bits, (3, groups), generator=g).float()
    qparams = QParams(scale, zero, bits, 8 // groups, False)
    snapped = qparams.fake_quantize(W)
    levels = torch.arange(2**bits).float()
    every = (levels - zero.repeat_interleave(8 // groups, 1)[..., None]) * scale.repeat_interleave(8 // groups, 1)[
        ..., None
    ]
    assert torch.all((snapped - W).abs() <= (every - W[..., None]).abs().min(-1).values + 1e-6)
    assert torch.equal(qparams.fake_quantize(snapped), snapped) and torch.all(
        qparams.fake_quantize(torch.zeros(3, 8)) == 0
    )


@pytest.mark.parametrize("bits", [0, 1, 9, 1.5, True])
def test_a_grid_refuses_other_widths(bits):
    with pytest.raises(BadInput, match="bits is"):
        QParams(torch.ones(1, 1), torch.zeros(1, 1), bits, 1, True)


def hessian_of(model, layer, sequences):
    found = Hessian()
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda m, a: found.add(a[0].reshape(-1, a[0].shape[-1]))
    )
    with torch.no_grad():
        model(sequences)
    handle.remove()
    return found


@pytest.mark.parametrize("sequential", [False, True])
def test_the_walk_shows_each_block_the_input_that_it_really_gets(tiny, data, sequential):
    """The statistic of a layer equals one recorded while the model runs in which everything before it is changed."""
    seen: dict = {}
    watch = Watch(factor=0.5, seen=seen, n_calib=3, seq_len=32, true_sequential=sequential)
    student, (report,) = compress(tiny, [watch], data, RT)
    names = [layer.name for layer in report.layers]
    assert len(names) == 14 == len(seen)
    sequences = data.calib_batch(3, 32, 0)
    sites = [s for i in range(2) for s in adapter_for(student).sites(i)]
    half = copy.deepcopy(tiny)
    for k, site in enumerate(sites):
        if sequential or k % 4 == 0:  # every site, or all sites of a block at once
            for earlier in sites[:k]:
                for name in earlier.layers:
                    half.get_submodule(name).weight.data.copy_(student.get_submodule(name).weight)
        for name in site.layers:
            recorded = hessian_of(half, name, sequences)
            torch.testing.assert_close(seen[name][1], recorded.value, rtol=1e-4, atol=1e-5)
            assert seen[name][2] == 3 * 32 == recorded.n
    last = names[-1]
    dense = hessian_of(tiny, last, sequences).value  # and that is not what the dense model shows
    assert not torch.allclose(dense, seen[last][1], rtol=1e-2)


def test_the_output_error_is_measured_for_every_pass_on_the_same_inputs(tiny, data):
    """One that keeps statistics and one that keeps none report the same error for the same change."""
    options = dict(seq_len=32, layers="*.0.mlp.up_proj")
    with_stats = compress(tiny, [Watch(factor=0.9, seen={}, n_calib=1, **options)], data, RT)[1][0].layers[0]

    @dataclass(frozen=True, kw_only=True)
    class Shrink(LayerPass):
        def solve(self, W, stats, mask):
            return LayerUpdate(0.9 * W)

    without = compress(tiny, [Shrink(**options)], data, RT)[1][0].layers[0]
    assert with_stats.output_error == pytest.approx(0.01, rel=1e-3) == without.output_error
    assert with_stats.tokens == 32 == without.tokens
    no_text = compress(tiny, [Shrink(**options)], None, None)[1][0].layers[0]
    assert no_text.output_error is None and no_text.weight_error == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_an_interrupted_pass_goes_on_to_the_same_bits(tiny, data, tmp_path, stop_after):
    @dataclass(frozen=True, kw_only=True)
    class Fit(LayerPass):
        """Depends on the inputs, so that a wrong continuation would be seen; stops after some sites."""

        stats = (Hessian,)
        left: list = None

        def solve_site(self, site, weights, stats, masks):
            if self.left:
                self.left.pop()
                if not self.left:
                    raise KeyboardInterrupt
            d = stats[Hessian].value.diagonal().sqrt()
            scale = (1 + d) if site.prev is not None else None
            keep = {n: W.abs() * d >= (W.abs() * d).median() for n, W in weights.items()}
            updates = {
                n: LayerUpdate(W * (1 if scale is None else scale) * keep[n], keep[n]) for n, W in weights.items()
            }
            return SiteUpdate(updates, scale)

        @property
        def config(self):
            return {}

    passes = lambda left=None: [Magnitude(layers="*.1.*"), Fit(n_calib=2, seq_len=16, left=left)]
    whole, reports = compress(tiny, passes(), data, RT)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny, passes([0] * stop_after), data, RT, checkpoint=tmp_path)
    blocks = len(list(tmp_path.rglob("1-*/block-*.safetensors")))
    assert blocks == (stop_after - 1) // 4 and not list(tmp_path.rglob("*.partial"))
    calls = [0] * 100
    resumed, again = compress(tiny, passes(calls), data, RT, checkpoint=tmp_path)
    assert 100 - len(calls) == 8 - 4 * blocks  # finished blocks are not solved again
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    strip = lambda r: [dataclasses.replace(layer, seconds=0) for layer in r.layers]
    assert [strip(r) for r in reports] == [strip(r) for r in again]
    other = copy.deepcopy(tiny)
    other.model.norm.weight.data.add_(1)
    before = len(calls)
    compress(other, passes(calls), data, RT, checkpoint=tmp_path)
    assert before - len(calls) == 8  # another model begins anew


def test_a_scale_goes_into_the_module_before(tiny, data):
    @dataclass(frozen=True, kw_only=True)
    class Scale(LayerPass):
        stats = (AbsMax,)

        def solve_site(self, site, weights, stats, masks):
            if site.prev is None:
                return super().solve_site(site, weights, stats, masks)
            scale = stats[AbsMax].value.clamp_min(0.1)
            return SiteUpdate({n: LayerUpdate(W * scale) for n, W in weights.items()}, scale)

        def solve(self, W, stats, mask):
            return LayerUpdate(W)

    student, (report,) = compress(tiny, [Scale(n_calib=2, seq_len=16)], data, RT)
    x = data.test[None, :16]
    torch.testing.assert_close(student(x).logits, tiny(x).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, tiny.model.layers[0].mlp.up_proj.weight)
    assert (
        max(layer.output_error for layer in report.layers) < 1e-9 > max(layer.weight_error for layer in report.layers)
    )
    half = Scale(n_calib=2, seq_len=16, layers="*.gate_proj")  # up_proj reads the same tensor and is not treated
    left, _ = compress(tiny, [half], data, RT)
    assert torch.equal(left.model.layers[0].mlp.gate_proj.weight, tiny.model.layers[0].mlp.gate_proj.weight)


def test_a_rounded_input_is_part_of_the_layer(tiny, data):
    @dataclass(frozen=True, kw_only=True)
    class RoundInputs(LayerPass):
        def solve(self, W, stats, mask):
            return LayerUpdate(W, act=ActQuant(4))

    student, (report,) = compress(tiny, [RoundInputs(layers="*.mlp.*")], data, RT)
    assert all(layer.weight_error == 0 and 0 < layer.output_error < 0.1 for layer in report.layers)
    layer, x = student.model.layers[0].mlp.up_proj, torch.randn(3, 64)
    step = x.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(layer(x), nn.functional.linear((x / step).round() * step, layer.weight))
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 64))  # straight through


def test_an_input_that_is_divided_twice_and_rounded_once(tiny, data, tmp_path):
    """Where no module before can take a scale, the layer divides; passes after it build on that."""

    @dataclass(frozen=True, kw_only=True)
    class Divide(LayerPass):
        by: float
        bits: int | None = None

        def solve(self, W, stats, mask):
            scale = torch.linspace(1, self.by, W.shape[1])
            return LayerUpdate(W * scale, act=ActQuant(self.bits, divide=scale))

    x, options = data.test[None, :16], dict(n_calib=2, seq_len=16)
    once, (report,) = compress(tiny, [Divide(by=3, **options)], data, RT)
    assert max(max(layer.weight_error, layer.output_error) for layer in report.layers) < 1e-9
    twice, (_, second) = compress(tiny, [Divide(by=3, **options), Divide(by=5, **options)], data, RT)
    assert max(max(layer.weight_error, layer.output_error) for layer in second.layers) < 1e-9
    for student in (once, twice):
        torch.testing.assert_close(student(x).logits, tiny(x).logits, rtol=1e-4, atol=1e-5)
    rounded, (_, last) = compress(tiny, [Divide(by=3, **options), Divide(by=1, bits=8, **options)], data, RT)
    inside = rounded.model.layers[0].mlp.up_proj.input_quant
    assert inside.bits == 8 and torch.equal(inside.divide, torch.linspace(1, 3, 64))
    assert 1e-6 < last.layers[0].output_error < 1e-2
    save_student(twice, None, tmp_path / "twice", rest_dtype=torch.float32)
    back = load_student(tmp_path / "twice").model
    torch.testing.assert_close(back(x).logits, twice(x).logits)


def test_compress_leaves_the_given_model_alone_and_keeps_tied_weights_tied(tiny, data):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    student, reports = compress(tiny, [Noise(energy=0.1)], data, RT)
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(layer.weight_error == pytest.approx(0.1, rel=1e-3) for layer in reports[0].layers)
    assert any(not torch.equal(before[k], v) for k, v in student.state_dict().items())


@pytest.mark.parametrize("method", [Noise, RoundingNoise])
def test_another_seed_gives_other_noise_and_the_same_seed_the_same(method):
    # a generator on a CPU looks at 32 bits of its seed only: what is beyond them changes nothing
    W = torch.randn(4, 64)
    solve = lambda W, seed: method(seed=seed).solve(W, {}, None).weight - W
    assert torch.equal(solve(W, 1), solve(W, 1))
    noises = [solve(W, seed) for seed in (0, 1, 2, 2**32 - 1)]
    for i, one in enumerate(noises):
        assert all(not torch.equal(one, other) for other in noises[:i])
    assert not torch.equal(solve(W, 0), solve(W + 1, 0))  # nor do two layers get the same


def test_no_passes_give_an_equal_copy(tiny, data):
    student, reports = compress(tiny, [], data, RT)
    assert reports == [] and student is not tiny
    with torch.no_grad():
        assert torch.equal(student(data.test[None, :8]).logits, tiny(data.test[None, :8]).logits)


def test_a_mask_survives_a_pass_that_does_not_speak_of_it(tiny, data):
    seen: dict = {}
    student, _ = compress(tiny, [Magnitude(), Watch(seen=seen, n_calib=2, seq_len=16), Noise(energy=0.1)], data, RT)
    assert all(mask is not None and not W[~mask].any() for W, _, _, mask in seen.values())
    layer = student.model.layers[0].self_attn.q_proj
    mask = mask_of(layer)
    assert mask is not None and qparams_of(layer) is None
    assert not layer.weight[~mask].any() and not layer.parametrizations.weight.original[~mask].any()


def test_leaving_the_grid_is_refused():
    layer = nn.Linear(4, 2, bias=False)
    qparams = QParams(torch.ones(2, 1), torch.full((2, 1), 8.0), 4, 4, True)
    write_back(layer, LayerUpdate(layer.weight.detach(), None, qparams))
    assert qparams_of(layer) is not None and torch.equal(layer.weight, layer.weight.round())
    with pytest.raises(BadInput, match="prune first, quantize last"):
        write_back(layer, LayerUpdate(layer.weight.detach()))


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_weights_are_named_before_anything_changes(tiny, data, poison, block):
    broken = copy.deepcopy(tiny)
    broken.model.layers[block].mlp.up_proj.weight.data[0, 0] = poison
    first = broken.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(BadInput, match=rf"model\.layers\.{block}\.mlp\.up_proj.*NaN or infinite"):
        compress(broken, [Noise(energy=0.1)], data, RT)
    assert torch.equal(first, broken.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda m, d: compress(nn.Linear(2, 2), [Noise()], d, RT), "has no config"),
        (lambda m, d: compress(m, [Noise(layers="*.experts.*")], d, RT), "layers is '*.experts.*'"),
        (lambda m, d: compress(m, [Watch(n_calib=10_000)], d, RT), "tokens of data.calib is 512"),
        (lambda m, d: compress(m, [Watch(n_calib=1)], None, RT), "tokens of data.calib is 0"),
        (lambda m, d: compress(m, [Watch(n_calib=1, seq_len=300)], d, RT), "seq_len is 300; allowed: at most 256"),
        (lambda m, d: compress(m, [print], d, RT), "passes is 'builtin_function_or_method'"),
        (lambda m, d: Noise(energy=-1), "energy is -1"),
        (lambda m, d: Noise(layers=""), "layers is ''"),
        (lambda m, d: Noise(n_calib=2.5), "n_calib is 2.5"),
        (lambda m, d: Noise(n_calib="16"), "n_calib is '16'"),
        (lambda m, d: Noise(n_calib=0), "n_calib is 0"),
        (lambda m, d: Noise(seed=-1), "seed is -1"),
        (lambda m, d: Noise(true_sequential="no"), "true_sequential is 'no'"),
        (lambda m, d: RoundingNoise(bits=9), "bits is 9"),
        (lambda m, d: compress(m, [RoundingNoise(group_size=7)], d, RT), "group_size is 7"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(tiny, data, attempt, sentence):
    with pytest.raises(BadInput) as caught:
        attempt(tiny, data)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("group_size", ["tensor", "channel", 8, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_fast_rounding_is_the_plain_one(group_size, dtype):
    for bits in range(2, 9):
        for symmetric in (False, True):
            W = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits)).to(dtype)
            q = choose_qparams(W, bits=bits, group_size=group_size, symmetric=symmetric)
            for weight in (W, 3 * W):  # inside the grid, and beyond its ends
                before = weight.clone()
                plain = q.dequantize(q.quantize(weight.to(q.scale.dtype))).to(dtype)
                assert torch.equal(q.fake_quantize(weight), plain) and torch.equal(weight, before)


def test_passes_are_found_by_the_name_of_their_class():
    import llmcourse

    found = llmcourse.passes()
    assert {"noise", "rounding-noise", "rtn", "gptq", "rtn-embedding"} <= found.keys()
    assert found["noise"] is Noise and all(cls.name == name for name, cls in found.items())
    assert Magnitude not in found.values()  # it has no name


def test_a_pass_may_return_another_model(tiny, data):
    @dataclass(frozen=True)
    class DropLast(Pass):
        reshapes = True

        def run(self, model, ctx):
            smaller = copy.deepcopy(model)
            smaller.model.layers = smaller.model.layers[:-1]
            smaller.config.num_hidden_layers -= 1
            return smaller, Report("drop", self.config, (), 0.0)

    student, reports = compress(tiny, [DropLast(), Noise(layers="*.layers.0.*")], data, RT)
    assert len(student.model.layers) == 1 and len(tiny.model.layers) == 2 and len(reports[1].layers) == 7
    with pytest.raises(BadInput, match=r"layers is '\*\.layers\.1\.\*'"):  # checked on the model that it sees
        compress(tiny, [DropLast(), Noise(layers="*.layers.1.*")], data, RT)


@pytest.mark.parametrize("second", [Magnitude(), RTN(bits=4, group_size=16), Noise()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("first", [Magnitude(), RTN(bits=8, group_size=16)], ids=lambda p: type(p).__name__)
def test_a_student_stays_what_it_is_when_another_is_made_of_it(first, second, tiny, data):
    """Copies of a parametrized layer share a class: what is taken off one must not be missing in the other."""
    ids = data.test[None, :16]
    student, _ = compress(tiny, [first], data, RT)
    before, again = student(ids).logits, copy.deepcopy(student)
    if isinstance(first, RTN) and not isinstance(second, Magnitude):
        with pytest.raises(BadInput, match=r"quantize last|one rounding for each layer"):
            compress(student, [second], data, RT)
    elif isinstance(first, RTN):  # a pass that does not say what it spoils: found out when it has begun
        with pytest.raises(BadInput, match="quantize last"):
            compress(student, [second], data, RT)
    else:
        next_one, _ = compress(student, [second], data, RT)
        assert not torch.equal(next_one(ids).logits, before) or type(first) is type(second)
    assert torch.equal(student(ids).logits, before) and torch.equal(again(ids).logits, before)


def test_rounding_noise_has_the_size_of_a_rounding_error(tiny, data):
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    W[:, :32] *= 10
    delta = (RoundingNoise(bits=3, group_size=32).solve(W, {}, None).weight - W).unflatten(1, (2, 32))
    groups = W.unflatten(1, (2, 32))
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 7
    assert (delta.abs() <= step[..., None] / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close((delta / step[..., None]).square().mean().item(), 1 / 12, rtol=0.05, atol=0)


@given(st.integers(0, 100))
@settings(deadline=None, max_examples=10)
def test_a_mask_survives_any_update_of_the_raw_weight(seed):
    torch.manual_seed(seed)
    layer = nn.Linear(5, 3)
    mask = torch.rand(3, 5) < 0.5
    parametrize.register_parametrization(layer, "weight", Mask(mask))
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert torch.all(layer.weight[~mask] == 0)


def test_fake_quant_lets_the_gradient_through_except_where_it_clips():
    W = torch.tensor([[0.31, -5.0], [0.0, 0.74]])
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(W)
    qparams = QParams(torch.full((2, 1), 0.1), torch.full((2, 1), 8.0), 4, 2, True)  # values -0.8 to 0.7
    parametrize.register_parametrization(layer, "weight", FakeQuant(qparams))
    x = torch.randn(3, 2)
    out = layer(x)
    out.sum().backward()
    reaches = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # -5 is beyond the range; 0.74 rounds to its end
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, x.sum(0).expand(2, 2) * reaches)
    with torch.no_grad():  # the very numbers of the evaluation
        assert torch.equal(layer(x), out) and torch.equal(layer.weight, qparams.fake_quantize(W))


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(deadline=None, max_examples=30)
def test_fake_quant_gives_the_same_numbers_with_and_without_gradient(seed, bits):
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    scale = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed)) * 0.1 + 1e-3
    fake = FakeQuant(QParams(scale, torch.full((4, 2), 2.0 ** (bits - 1)), bits, 4, True))
    assert torch.equal(fake(W), fake(W.detach())) and fake(W).requires_grad


def test_the_passport_counts(tiny):
    card = passport("tiny", tiny, RT, prefill_tokens=16, repeats=2)
    unique = {p.data_ptr(): p.numel() for p in tiny.parameters()}
    assert card.parameters == sum(unique.values()) == count_parameters(tiny)[0]
    linear = sum(m.weight.numel() for m in tiny.modules() if isinstance(m, nn.Linear))
    assert card.flops_per_token == flops_per_token(tiny) == 2 * linear
    buffers = sum(b.untyped_storage().nbytes() for b in tiny.buffers())
    assert card.bytes_memory == weight_bytes(tiny) == 4 * card.parameters + buffers
    assert card.prefill.n == 2 and card.decode.n == 6 and card.to_dict()["prefill"]["n"] == 2


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        ({"model.safetensors": 5, "packed.safetensors": 3}, 3),
        ({"model.safetensors": 5, "consolidated.safetensors": 5}, 5),
        ({"model-00001-of-00002.safetensors": 2, "model-00002-of-00002.safetensors": 2, "old.safetensors": 9}, 4),
        ({"a.safetensors": 1, "b.safetensors": 2}, 3),
    ],
)
def test_bytes_on_disk_are_those_that_a_reader_opens(tmp_path, names, counted):
    import json

    for name, size in names.items():
        (tmp_path / name).write_bytes(bytes(size))
    if "old.safetensors" in names:
        weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert disk_bytes(tmp_path) == counted


@pytest.mark.parametrize("name", ["mixtral", "ours, experts", "olmoe", "llama"])
def test_operations_count_the_experts_that_a_token_visits(name):
    from archs import build

    from llmcourse.adapters.separate import separate

    model = build(name)
    block = {"mixtral": 2, "ours, experts": 2, "olmoe": 2, "llama": 1}[name]  # experts per token
    D, F, V = 32, 48, 96
    attention = {"mixtral": 2 * D * D + 2 * D * 16, "ours, experts": 4 * D * D, "olmoe": 2 * D * D + 2 * D * 16}
    # a router of transformers is no linear layer; it is left out as norms are
    router = 4 * D if name == "ours, experts" else 0
    per_block = attention.get(name, 2 * D * D + 2 * D * 16) + block * 3 * D * F + router
    assert flops_per_token(model) == 2 * (3 * per_block + V * D)
    separate(model)
    assert flops_per_token(model) == 2 * (3 * per_block + V * D)


def test_the_decode_step_always_starts_from_the_same_length(tiny):
    """Otherwise later repetitions would time a longer cache."""
    from llmcourse.compression import latency

    lengths = []
    handle = tiny.model.layers[0].register_forward_pre_hook(
        lambda m, a, k: lengths.append(k["past_key_values"].get_seq_length() if k.get("past_key_values") else 0),
        with_kwargs=True,
    )
    latency(tiny, RT, tokens=16, repeats=2)
    handle.remove()
    assert set(lengths[-6:]) == {16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_walk_is_the_same_on_a_gpu(tiny, data):
    rt = Runtime(device=torch.device("cuda"), dtype=torch.float32)
    cpu, gpu = {}, {}
    compress(tiny, [Watch(seen=cpu, n_calib=2, seq_len=16)], data, RT)
    compress(rt.move(copy.deepcopy(tiny)), [Watch(seen=gpu, n_calib=2, seq_len=16)], data, rt)
    for name, seen in cpu.items():
        torch.testing.assert_close(seen[1], gpu[name][1].cpu(), rtol=1e-3, atol=1e-4)


def test_a_passport_is_measured_where_the_model_is(tiny_model):
    """No runtime: device and number format of the model itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    card = passport("tiny", model, prefill_tokens=4, repeats=1)
    assert "bfloat16" in card.device and card.prefill.median > 0


class Chunked(nn.Module):
    """A block that calls its second layer once, twice, or (an expert) only for some texts."""

    def __init__(self, visits):
        super().__init__()
        self.first, self.second, self.visits, self.after = nn.Linear(6, 5), nn.Linear(5, 6), visits, 0

    def forward(self, x):
        h = self.first(x)
        for part in h.chunk(self.visits(x), dim=1) if self.visits(x) else ():
            self.second(part)
        self.after += 1
        return x


@pytest.mark.parametrize(
    "visits, whole",
    [(lambda x: 1, 1), (lambda x: 2, 5), (lambda x: int(x.sum() > 0), None)],
    ids=["once", "twice", "an expert"],
)
def test_a_pass_ends_early_only_where_nothing_is_lost(visits, whole):
    """The block's last site may have read all of its input before the block is through, or not."""
    from llmcourse.adapters import Site
    from llmcourse.compression import Call, Hessian, watch

    block = Chunked(visits)
    hidden = [(-1) ** (k // 2) * torch.rand(1, 8, 6, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    sites = [Site("a", {"first": block.first}), Site("b", {"second": block.second})]
    seen = watch(block, sites, [Hessian], hidden, [Call((), {})] * 5)
    assert whole is None or block.after == whole
    reads = torch.cat([block.first(x) for x in hidden if visits(x)], 1)[0]
    assert seen["a"].n == 40 and seen["b"].n == len(reads)
    torch.testing.assert_close(seen["b"].stats[Hessian].value, 2 / len(reads) * reads.T @ reads)


def test_the_folder_of_a_pass_is_named_by_every_part_that_it_reads(tmp_path):
    """A pass that trains must not take up the blocks that it made of another training text."""
    from types import SimpleNamespace

    from llmcourse.compression import _folder_of

    model = torch.nn.Linear(2, 2)
    model.config = "small"
    ids = torch.arange(4)
    text = lambda train, val: SimpleNamespace(calib=ids, train=train, val=val)
    needs = SimpleNamespace(needs={"train": 4}, config={})
    folder = lambda data: _folder_of(tmp_path, 0, needs, model, data, None)
    assert folder(text(ids, ids)) == folder(text(ids, ids + 1)) != folder(text(ids + 1, ids))

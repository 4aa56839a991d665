"""Scales of sites and rounded inputs: identities on every family, the papers' formulas in float64, exact integers."""

from __future__ import annotations

import copy

import pytest
import torch
from archs import CAUSAL, OURS, build, ids, logits, random_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.activations import (
    AWQ,
    DynamicInt8,
    Int8Linear,
    SmoothQuant,
    awq_scale,
    clip_groups,
    quantize_tokens,
    smooth_scale,
    to_int8,
)
from llmcourse.compression import LayerUpdate, compress, mask_of, qparams_of
from llmcourse.data import TokenData
from llmcourse.packed import load_student, save_student
from llmcourse.pruning import Wanda
from llmcourse.quantization import RTN, rtn
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput

RT = Runtime.auto("cpu", "float32")
SMALL = dict(n_calib=3, seq_len=16)
FAMILIES = [n for n in [*OURS, *CAUSAL] if n not in ("falcon", "jetmoe", "llama4", "bloom", "xglm")]


@pytest.fixture(scope="module")
def data() -> TokenData:
    return random_text()


class Identity(SmoothQuant):
    """The scale, and nothing rounded."""

    def finish(self, W, stats, scale, mask):
        return LayerUpdate(W, mask)


def problem(seed: int, O: int = 12, I: int = 32, n: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (O, I), and inputs (n, I) that are correlated and of different size."""
    dice = torch.Generator().manual_seed(seed)
    mix = torch.randn(I, I, generator=dice) * torch.logspace(-1, 1, I)
    return torch.randn(O, I, generator=dice), torch.randn(n, I, generator=dice) @ mix


def seen(X: torch.Tensor) -> dict:
    stats = {kind: kind() for kind in (*AWQ.stats, *SmoothQuant.stats)}
    for stat in stats.values():
        stat.add(X)
    return stats


# ---------------------------------------------------------------- the scale alone


@pytest.mark.parametrize("name", FAMILIES)
def test_a_scale_alone_changes_no_logit(name: str, data: TokenData) -> None:
    model = build(name)
    before = logits(model, ids())
    for where in ("norms", "folded", "all"):
        student, (report,) = compress(model, [Identity(where=where, **SMALL)], data, RT)
        torch.testing.assert_close(logits(student, ids()), before, rtol=2e-3, atol=2e-4)
        assert max(r.output_error or 0 for r in report.layers) < 1e-8
        assert max(r.weight_error for r in report.layers) < 1e-9
        divided = [m for m in student.modules() if getattr(m, "input_quant", None) is not None]
        assert all(m.input_quant.bits is None for m in divided) and (where == "all" or not divided)
    changed = [
        n for (n, a), (_, b) in zip(model.named_parameters(), student.named_parameters()) if not torch.equal(a, b)
    ]
    assert changed or divided, "nothing was scaled"


def test_sites_that_are_folded_and_sites_that_divide(data: TokenData) -> None:
    for name, want in (("llama", 0), ("gpt2", 6), ("opt", 0), ("gemma", 3 * 0), ("phi3", 6)):
        student, _ = compress(build(name), [Identity(where="all", **SMALL)], data, RT)
        assert sum(hasattr(m, "input_quant") for m in student.modules()) == want, name
    part, _ = compress(build("llama"), [Identity(where="all", layers="*.q_proj", **SMALL)], data, RT)
    own = build("llama")
    assert torch.equal(part.model.layers[0].input_layernorm.weight, own.model.layers[0].input_layernorm.weight)
    assert hasattr(part.model.layers[0].self_attn.q_proj, "input_quant")
    torch.testing.assert_close(logits(part, ids()), logits(own, ids()), rtol=2e-3, atol=2e-4)


def test_masks_survive_a_scale_and_rounding(data: TokenData) -> None:
    model = build("llama")
    pruned, _ = compress(model, [Wanda(sparsity=0.5, **SMALL)], data, RT)
    scaled, _ = compress(pruned, [Identity(where="all", **SMALL)], data, RT)
    torch.testing.assert_close(logits(scaled, ids()), logits(pruned, ids()), rtol=2e-3, atol=2e-4)
    for method in (AWQ(group_size=16, **SMALL), SmoothQuant(**SMALL)):
        student, _ = compress(pruned, [method], data, RT)
        for name, a in pruned.named_modules():
            b = student.get_submodule(name) if isinstance(a, nn.Linear) else a
            if isinstance(a, nn.Linear) and mask_of(a) is not None:
                assert qparams_of(b) is not None and (b.weight[a.weight == 0] == 0).all(), name


# ---------------------------------------------------------------- AWQ


def awq_in_float64(weights, X, *, bits, group_size, symmetric, n_grid):
    """The paper's search, written down once more: its own grid, its own error, no Hessian."""

    def quantized(W):
        G = W.reshape(len(W), -1, group_size)
        top = 2**bits - 1
        if symmetric:
            zero, step = 2.0 ** (bits - 1), 2 * G.abs().amax(-1, keepdim=True) / top
        else:
            low, high = G.amin(-1, keepdim=True).clamp(max=0), G.amax(-1, keepdim=True).clamp(min=0)
            step = (high - low) / top
        half = step.half().double()
        step = torch.where(half < step, (half * (1 + 0.75 * 2**-10)).half().double(), half)  # scales are rounded up
        if not symmetric:
            zero = (-low / step).round()
        return (((G / step).round() + zero).clamp(0, top) - zero).mul(step).reshape(W.shape)

    mean, errors, scales = X.abs().mean(0), [], []
    for k in range(n_grid + 1):
        s = mean ** (k / n_grid)
        s = s / (s.max() * s.min()).sqrt()
        errors.append(sum(((quantized(W * s) / s - W) @ X.T).square().sum().item() for W in weights))
        scales.append(s)
    best = min(range(n_grid + 1), key=errors.__getitem__)
    return best, scales[best], [quantized(W * scales[best]) for W in weights], errors


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [
    dict(bits=3, group_size=16, symmetric=False), dict(bits=4, group_size=8, symmetric=True),
    dict(bits=2, group_size=32, symmetric=False),
], ids=str)  # fmt: skip
def test_awq_is_the_paper(how: dict, seed: int) -> None:
    W, X = problem(seed)
    layers = {"a": W.double(), "b": problem(seed + 100)[0].double()[:5]}
    method = AWQ(**how, n_grid=8, clip=False)
    stats = seen(X)
    ours = method.scale(layers, stats, dict.fromkeys(layers), lambda s: s)
    best, scale, weights, errors = awq_in_float64(list(layers.values()), X.double(), **how, n_grid=8)
    close = sorted(errors)[1] / min(errors) < 1 + 1e-4  # a tie that the last digits decide
    assert close or torch.allclose(ours.double(), scale, rtol=1e-4), best
    if not close:
        for (name, W), want in zip(layers.items(), weights):
            found = method.finish(W * scale, stats, scale, None).weight
            assert ((found - want).abs() < 1e-6).float().mean() > 0.99, name  # but for ties
    assert min(errors) <= errors[0]  # exponent 0 is RTN


def test_awq_never_has_a_larger_output_error_than_rtn(data: TokenData) -> None:
    for name in ("llama", "gpt2"):
        model, grid = build(name), dict(bits=3, group_size=16, **SMALL)
        _, (plain,) = compress(model, [RTN(**grid)], data, RT)
        for seed in range(2):
            _, (report,) = compress(model, [AWQ(**grid, clip=False, seed=seed)], data, RT)
            better = [a.output_error < b.output_error for a, b in zip(report.layers, plain.layers)]
            assert sum(better) > 0.6 * len(better)
    W, X = problem(3)
    H, mean = 2 / len(X) * X.T @ X, X.abs().mean(0)
    cost = lambda s: float(((((rtn(W * s, bits=3, group_size=16).weight / s) - W) @ H) ** 2).sum())
    assert cost(awq_scale(mean, 0.0)) == pytest.approx(cost(torch.ones(32)), rel=1e-6)


def test_awq_scales_have_the_stated_form() -> None:
    mean = torch.tensor([0.0, 1e-9, 0.5, 2.0, 8.0])
    for alpha in (0.0, 0.3, 1.0):
        s = awq_scale(mean, alpha)
        torch.testing.assert_close(s.max() * s.min(), torch.tensor(1.0))
        torch.testing.assert_close(s[4] / s[2], torch.tensor(16.0**alpha))
        assert s[0] == s[1] and torch.isfinite(s).all()
        torch.testing.assert_close(awq_scale(mean * 1000, alpha), s)  # a common factor changes nothing
    assert torch.equal(awq_scale(torch.zeros(3), 0.5), torch.ones(3))


@pytest.mark.parametrize("group_size", [8, 32, "channel", "tensor"])
def test_clipping_takes_the_best_share_of_each_group(group_size: int | str) -> None:
    W, X = problem(5)
    W[0, 3] = 9.0  # one weight far out
    W, X = W.double(), X.double()
    H, how = 2 / len(X) * X.T @ X, dict(bits=3, symmetric=False)
    found = rtn(clip_groups(W, H, group_size=group_size, **how), group_size=group_size, **how).weight
    width = 32 if isinstance(group_size, str) else group_size
    error = lambda Q, a: ((Q - W)[:, a : a + width] @ X[:, a : a + width].T).square().sum(1)  # (O,) of one group
    tried = []
    for k in range(11):
        low, high = (f(dim=-1, keepdim=True).values for f in (W.view(12, -1, width).min, W.view(12, -1, width).max))
        share = 1 - k / 20
        cut = W.view(12, -1, width).clamp(low.clamp(max=0) * share, high.clamp(min=0) * share).view_as(W)
        Q = rtn(cut, group_size=group_size, **how).weight
        tried.append(torch.stack([error(Q, a) for a in range(0, 32, width)], 1))
    ours = torch.stack([error(found, a) for a in range(0, 32, width)], 1)
    if group_size == "tensor":
        assert float(ours.sum()) == pytest.approx(min(float(t.sum()) for t in tried), rel=1e-9)
    else:
        torch.testing.assert_close(ours, torch.stack(tried).amin(0), rtol=1e-9, atol=0)
    assert (ours.sum() < tried[0].sum()) and torch.equal(W, problem(5)[0].double().index_put(
        (torch.tensor([0]), torch.tensor([3])), torch.tensor([9.0], dtype=torch.float64)))  # fmt: skip


# ---------------------------------------------------------------- SmoothQuant and int8


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
@settings(deadline=None, max_examples=25)
def test_smooth_scales_are_the_formula(seed: int, alpha: float) -> None:
    dice = torch.Generator().manual_seed(seed)
    x, w = (torch.rand(16, generator=dice).double() * 10 + 1e-2 for _ in range(2))
    s = smooth_scale(x, w, alpha)
    torch.testing.assert_close(s, x.pow(alpha) * w.pow(alpha - 1))
    torch.testing.assert_close(x / s, (x * w) ** (1 - alpha))  # what is left in the inputs …
    torch.testing.assert_close(w * s, (x * w) ** alpha)  # … and in the weights
    assert torch.isfinite(smooth_scale(torch.zeros(3), torch.zeros(3), alpha)).all()


def test_smoothquant_takes_the_largest_weight_of_all_layers_of_a_site(data: TokenData) -> None:
    W, X = problem(0)
    layers = {"q": W, "k": W * 3}
    found = SmoothQuant(alpha=0.5).scale(layers, seen(X), {}, lambda s: s)
    torch.testing.assert_close(found, (X.abs().amax(0) / (3 * W).abs().amax(0)).sqrt())
    static = SmoothQuant(per="tensor", act_bits=6).finish(W * found, seen(X), found, None)
    torch.testing.assert_close(static.act.scale, ((X / found).abs().max() / 31)[None])


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(deadline=None, max_examples=25)
def test_tokens_are_rounded_by_at_most_half_a_step(seed: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, 0] = 0
    codes, step = quantize_tokens(x)
    assert codes.dtype == torch.int8 and step.shape == (3, 5, 1) and (codes[0, 0] == 0).all()
    assert codes.min() >= -127 and (codes.abs().amax(-1)[x.abs().amax(-1) > 0] == 127).all()
    assert ((codes.double() * step.double() - x.double()).abs() <= step.double() * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("bias", [False, True])
def test_int8_layers_compute_what_fake_quantization_does(bias: bool) -> None:
    dice = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, 20, bias=bias)
    x = torch.randn(2, 7, 48, generator=dice)
    q = rtn(layer.weight.detach(), bits=8, symmetric=True).qparams
    codes = (q.quantize(layer.weight.detach()).int() - 128).to(torch.int8)
    integer = Int8Linear(codes, q.scale[:, 0], layer.bias.detach() if bias else None)
    a, step = quantize_tokens(x)
    exact = a.double() @ codes.double().T * step.double() * q.scale[:, 0].double()
    torch.testing.assert_close(integer(x).double(), exact + (layer.bias.double() if bias else 0), rtol=1e-5, atol=1e-6)
    assert integer(x.bfloat16()).dtype == torch.bfloat16 and integer(x[0, 0][None]).shape == (1, 20)
    largest = torch.full((2, 4096), 127, dtype=torch.int8)
    assert int(torch._int_mm(largest, largest.T)[0, 0]) == 127 * 127 * 4096


def test_a_model_of_whole_numbers(data: TokenData) -> None:
    for name in ("llama", "gpt2", "ours"):
        student, _ = compress(build(name), [DynamicInt8()], data, RT)
        before, integers = logits(student, ids()), copy.deepcopy(student)
        assert to_int8(integers) == sum(qparams_of(m) is not None for m in student.modules()) > 0
        near = (logits(integers, ids()) - before).abs().mean() / before.abs().mean()
        assert near < 0.02, name  # single codes fall to the other side
    for wrong in (build("llama"), compress(build("llama"), [RTN(bits=8, group_size=16)], data, RT)[0]):
        with pytest.raises(BadInput, match="8-bit rows and inputs"):
            to_int8(wrong)


def test_what_is_rounded_lies_on_its_grid(data: TokenData) -> None:
    """The scale of the attention's output goes into the values before these are rounded."""
    for name in ("llama", "llama, tied, one head for all", "opt"):
        for method in (AWQ(bits=3, group_size=16, **SMALL), SmoothQuant(**SMALL)):
            student, _ = compress(build(name), [method], data, RT)
            layers = [m for m in student.modules() if qparams_of(m) is not None]
            assert layers and all(torch.equal(qparams_of(m).fake_quantize(m.weight), m.weight) for m in layers)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt", "mixtral", "ours"])
def test_both_methods_on_every_family_and_back_from_a_folder(name: str, data: TokenData, tmp_path) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    dense = logits(model, ids())
    for k, method in enumerate((
        AWQ(bits=8, group_size=16, **SMALL),
        SmoothQuant(where="all", **SMALL),
        SmoothQuant(per="tensor", where="all", **SMALL),
        DynamicInt8(),
    )):  # fmt: skip
        student, (report,) = compress(model, [method], data, RT)
        assert all(torch.equal(v, before[key]) for key, v in model.state_dict().items())
        out = logits(student, ids())
        assert 0 < (out - dense).abs().mean() < (0.4 if k == 2 else 0.2) * dense.abs().mean(), method
        assert str(report).startswith(method.name)
        save_student(student, None, tmp_path / str(k), rest_dtype=torch.float32)
        back = load_student(tmp_path / str(k)).model
        torch.testing.assert_close(logits(back, ids()), out, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: AWQ(n_grid=-1), "n_grid is -1"),
    (lambda: AWQ(n_grid=2.0), "n_grid is 2.0"),
    (lambda: AWQ(clip="no"), "clip is 'no'"),
    (lambda: AWQ(where="norm"), "where is 'norm'"),
    (lambda: AWQ(true_sequential=True), "true_sequential is True"),
    (lambda: SmoothQuant(alpha=1.01), "alpha is 1.01"),
    (lambda: SmoothQuant(alpha=-0.1), "alpha is -0.1"),
    (lambda: SmoothQuant(alpha=float("nan")), "alpha is nan"),
    (lambda: SmoothQuant(per="channel"), "per is 'channel'"),
    (lambda: DynamicInt8(act_bits=9), "act_bits is 9"),
    (lambda: DynamicInt8(act_bits=1), "act_bits is 1"),
])  # fmt: skip
def test_options_are_refused(make, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        make()
    assert sentence in str(caught.value)
    assert SmoothQuant(alpha=0).alpha == 0 and SmoothQuant(alpha=1).alpha == 1 and AWQ(n_grid=0).n_grid == 0


def test_models_that_do_not_fit_are_refused_before_any_change(data: TokenData) -> None:
    model = build("llama, tied, one head for all")
    values, _ = compress(model, [RTN(bits=4, group_size=16, layers="*.v_proj")], data, RT)
    with pytest.raises(BadInput, match=r"undo the rounding of .*v_proj.*one rounding for each layer"):
        compress(values, [AWQ(layers="*.o_proj", group_size=16, **SMALL)], data, RT)
    odd = build("llama")
    with pytest.raises(BadInput, match="group_size is 5"):
        compress(odd, [AWQ(group_size=5, **SMALL)], data, RT)
    with pytest.raises(BadInput, match="tokens of data"):
        compress(odd, [AWQ(group_size=16, n_calib=1000, seq_len=16)], data, RT)

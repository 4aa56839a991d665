"""Pruning: masks of the right size, the papers' formulas in float64, exact zeros, models that shrink and load back."""

from __future__ import annotations

import copy

import pytest
import torch
from archs import build, ids, logits, random_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize

from llmcourse.activations import AWQ, DynamicInt8, SmoothQuant
from llmcourse.adapters import adapter_for
from llmcourse.compression import (
    Context,
    Hessian,
    Noise,
    RootMeanSquare,
    RoundingNoise,
    check_passes,
    compress,
    mask_of,
)
from llmcourse.data import TokenData
from llmcourse.packed import load_student, save_student
from llmcourse.pruning import (
    Depth,
    Gradient,
    Gradual,
    Magnitude,
    RandomMask,
    SparseGPT,
    Structured,
    Wanda,
    contribution,
    cubic_sparsity,
    global_masks,
    importance,
    keep_highest,
    keep_n_of_m,
    sparsegpt,
    sparsegpt_reference,
)
from llmcourse.quantization import GPTQ, RTN
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput

RT = Runtime.auto("cpu", "float32")
SMALL = dict(n_calib=3, seq_len=16)
PRUNERS = [Magnitude, RandomMask, Wanda, SparseGPT, Gradient]


@pytest.fixture(scope="module")
def data() -> TokenData:
    return random_text()


def layer(seed: int, O: int = 12, I: int = 32, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs (n, I) that are correlated and of different size."""
    dice = torch.Generator().manual_seed(seed)
    mix = torch.randn(I, I, generator=dice) * torch.logspace(-1, 1, I)[:, None]
    return torch.randn(O, I, generator=dice), torch.randn(n, I, generator=dice) @ mix


def seen(X: torch.Tensor) -> dict:
    stats = {kind: kind() for kind in (Hessian, RootMeanSquare)}
    for stat in stats.values():
        stat.add(X)
    return stats


@pytest.mark.parametrize(("sparsity", "n", "gone"), [
    (0, 10, 0), (0.05, 10, 0), (0.1, 10, 1), (0.29, 100, 29), (0.5, 7, 3), (0.57, 100, 57), (0.999, 10, 9),
    (0.5, 1, 0), (0.99, 4, 3),
])  # fmt: skip
def test_the_share_that_goes_is_never_more_than_asked(sparsity: float, n: int, gone: int) -> None:
    assert int((~keep_highest(torch.arange(float(n)), sparsity)).sum()) == gone


@given(st.integers(0, 10**6), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]))
@settings(deadline=None, max_examples=25)
def test_masks(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    score = torch.randint(0, 5, (6, 3 * m), generator=torch.Generator().manual_seed(seed)).float()  # many are equal
    keep = keep_n_of_m(score, n, m)
    assert (keep.unflatten(1, (-1, m)).sum(-1) == n).all()
    groups, kept = score.unflatten(1, (-1, m)), keep.unflatten(1, (-1, m))
    worst_kept = groups.masked_fill(~kept, torch.inf).amin(-1)
    assert (groups.masked_fill(kept, -torch.inf).amax(-1) <= worst_kept).all()
    half = keep_highest(score, 0.5)
    assert (half.sum(1) == score.shape[1] - score.shape[1] // 2).all()
    assert torch.equal(keep_highest(torch.zeros(4), 0.5), torch.tensor([False, False, True, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_those_of_the_papers(dtype: torch.dtype) -> None:
    W, X = layer(0)
    W, stats = W.to(dtype), seen(X)
    norm = X.double().square().sum(0).sqrt()  # Wanda: |W| · ‖X_j‖₂, compared within a row
    want = (W.double().abs() * norm).argsort(1)[:, :16]
    update = Wanda(sparsity=0.5).solve(W, stats, None)
    assert all(set(row.tolist()) == set((~keep).nonzero().flatten().tolist()) for row, keep in zip(want, update.mask))
    assert torch.equal(update.weight, torch.where(update.mask, W, 0))
    flat = Magnitude(sparsity=0.25, per="layer").solve(W, {}, None).mask
    assert W[flat].abs().min() >= W[~flat].abs().max() and int((~flat).sum()) == 96


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [
    dict(sparsity=0.5), dict(sparsity=0.3, block_size=8), dict(sparsity=0.9, block_size=12), dict(pattern="2:4"),
    dict(pattern="1:4"), dict(pattern="4:8", block_size=12), dict(sparsity=0), dict(sparsity=0.5, damping=0.3),
], ids=str)  # fmt: skip
def test_sparsegpt_is_the_reference(how: dict, seed: int) -> None:
    W, X = layer(seed)
    H = seen(X.double())[Hessian].value.double()
    fast, slow = sparsegpt(W.double(), H, **how), sparsegpt_reference(W.double(), H, **how)
    assert torch.equal(fast.mask, slow.mask)
    torch.testing.assert_close(fast.weight, slow.weight, rtol=1e-6, atol=1e-8)
    assert (fast.weight[~fast.mask] == 0).all()


def test_sparsegpt_refits_what_stays() -> None:
    """For its mask, the weights are better than the untouched ones and no better than least squares."""
    for seed in range(5):
        W, X = layer(seed)
        H = seen(X)[Hessian].value
        new = sparsegpt(W, H, sparsity=0.5, block_size=32)
        cost = lambda V, W=W, H=H: float((((V - W) @ H) * (V - W)).sum())
        best = torch.zeros_like(W)
        for o, keep in enumerate(new.mask):  # least squares on the weights that stay
            best[o, keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ W[o])
        assert cost(best) <= cost(new.weight) * 1.001 and cost(new.weight) < cost(torch.where(new.mask, W, 0))


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral", "ours", "opt"])
def test_every_pruner_on_every_family(pruner: type, name: str, data: TokenData) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    student, (report,) = compress(model, [pruner(sparsity=0.5, **SMALL)], data, RT)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report.layers and all(0.4 < r.zeros <= 0.5 for r in report.layers), report
    out = logits(student, ids())
    assert torch.isfinite(out).all() and not torch.equal(out, logits(model, ids()))


@pytest.mark.parametrize("pruner", PRUNERS)
def test_patterns_borders_and_masks_that_are_there(pruner: type, data: TokenData) -> None:
    model = build("llama")
    same, _ = compress(model, [pruner(sparsity=0, **SMALL)], data, RT)
    torch.testing.assert_close(logits(same, ids()), logits(model, ids()))
    student, _ = compress(model, [pruner(pattern="2:4", **SMALL)], data, RT)
    W = student.model.layers[1].mlp.down_proj.weight
    assert ((W.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
    first, _ = compress(model, [RandomMask(sparsity=0.25, seed=7)], data, RT)
    both, _ = compress(first, [pruner(sparsity=0.5, **SMALL)], data, RT)
    for (name, a), (_, b) in zip(first.named_modules(), both.named_modules()):
        if mask_of(a) is not None:
            assert not (mask_of(b) & ~mask_of(a)).any(), name  # what was gone is gone
            assert 0.45 < (b.weight == 0).float().mean() <= 0.5, name  # and counts


def test_one_threshold_for_the_whole_model(data: TokenData) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    for how, share in ((dict(per="row"), 0.5), (dict(per="layer"), 0.5), (dict(per="model"), 1.0)):
        student, _ = compress(model, [Magnitude(sparsity=0.5, **how)], data, RT)
        assert (student.model.layers[0].mlp.up_proj.weight == 0).float().mean() == share
    masks = global_masks({"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([[2.0], [9.0]])}, 0.5)
    assert masks["a"].tolist() == [[False, True]] and masks["b"].tolist() == [[False], [True]]


def test_the_gradient_score_is_the_mean_square_of_gradient_times_weight(data: TokenData) -> None:
    model = build("llama")
    name = "model.layers.1.mlp.up_proj"
    student, _ = compress(model, [Gradient(sparsity=0.5, per="layer", layers=name, **SMALL)], data, RT)
    W, total = model.get_submodule(name).weight, 0
    for row in data.calib_batch(3, 16, 0):
        loss = torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:])
        total = total + (torch.autograd.grad(loss, W)[0] * W).detach() ** 2
    keep = mask_of(student.get_submodule(name))
    assert total[keep].min() >= total[~keep].max()
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dim", ["channels", "heads"])
@pytest.mark.parametrize("choose", ["contribution", "magnitude", "random"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "ours", "gpt2", "opt", "phi3"])
def test_structured_models_shrink_and_load_back(name: str, dim: str, choose: str, data: TokenData, tmp_path) -> None:
    model = build(name)
    method = Structured(dim=dim, sparsity=0.5, choose=choose, **SMALL)
    if dim == "heads" and name in ("ours", "gpt2", "opt", "phi3"):
        with pytest.raises(BadInput, match="dim is 'heads'"):
            compress(model, [method], data, RT)
        return
    student, _ = compress(model, [method, Wanda(sparsity=0.5, **SMALL)], data, RT)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(student) < count(model) and torch.isfinite(logits(student, ids())).all()
    save_student(student, None, tmp_path / "m", rest_dtype=torch.float32)
    back, _ = load_student(tmp_path / "m")
    torch.testing.assert_close(logits(back, ids()), logits(student, ids()), rtol=1e-4, atol=1e-5)


def test_a_number_of_heads_that_the_configuration_refuses_is_refused_before_the_work(data: TokenData) -> None:
    """transformers wants the width to be a multiple of the heads: 32 is none of 3."""
    model = build("llama, tied, one head for all")
    with pytest.raises(BadInput, match=r"heads that stay is 3; allowed: as many as LlamaConfig allows \(.*32.*3"):
        compress(model, [Structured(dim="heads", sparsity=0.25, choose="random")], data, RT)
    student, _ = compress(model, [Structured(dim="heads", sparsity=0.5, choose="random")], data, RT)
    assert student.config.num_attention_heads == 2 and model.config.num_attention_heads == 4


CUTS = [(name, "channels") for name in ("llama", "gemma2", "gpt2", "phi3", "ours")]


@pytest.mark.parametrize(("name", "dim"), [*CUTS, ("llama", "heads"), ("gemma2", "heads")])
@pytest.mark.parametrize("first", [Magnitude(), SparseGPT(**SMALL)], ids=["magnitude", "sparsegpt"])
def test_what_is_cut_keeps_its_masks(name: str, first, dim: str, data: TokenData) -> None:
    """Masked and then cut is cut and then masked: the same weights, the same zeros, and they stay zero."""
    masked, _ = compress(build(name), [first], data, RT)
    student, _ = compress(masked, [Structured(dim=dim, sparsity=0.5, choose="random", seed=3)], data, RT)
    plain, _ = compress(build(name), [Noise(energy=0.0)], data, RT)  # the same modules, without masks
    with torch.no_grad():
        for path, layer in masked.named_modules():
            if mask_of(layer) is not None:
                plain.get_submodule(path).weight.copy_(layer.weight)
    want, _ = compress(plain, [Structured(dim=dim, sparsity=0.5, choose="random", seed=3)], data, RT)
    assert torch.equal(logits(student, ids()), logits(want, ids()))
    layers = [m for m in student.modules() if mask_of(m) is not None]
    assert layers and all(mask_of(m).shape == m.weight.shape for m in layers)
    assert all((m.weight.shape == (m.out_features, m.in_features)) for m in layers if hasattr(m, "out_features"))


def test_what_is_quantized_is_not_cut(data: TokenData) -> None:
    model = build("llama")
    with pytest.raises(BadInput, match=r"undo the rounding of .*; allowed: take out channels and heads first"):
        compress(model, [RTN(bits=4, group_size=16), Structured(choose="magnitude")], data, RT)
    done, _ = compress(model, [RTN(bits=4, group_size=16)], data, RT)
    with pytest.raises(BadInput, match="carries FakeQuant, whose scale is no mask; allowed: take out channels first"):
        adapter_for(done).dims(0)[-1].keep(torch.arange(8))  # without the check


ROUNDERS = [RTN, GPTQ, AWQ, SmoothQuant, DynamicInt8]
LATER = [*PRUNERS, Noise, RoundingNoise]


@pytest.fixture(scope="module")
def rounded_once():
    model = build("llama")
    return model, compress(model, [RTN(group_size=8, layers="*.mlp.*")], None, RT)[0]


@pytest.mark.parametrize("first", ROUNDERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("later", LATER, ids=lambda kind: kind.__name__)
def test_what_would_undo_a_rounding_is_refused_before_any_work(first, later, rounded_once, data, monkeypatch) -> None:
    some = {"layers": "*.mlp.*"}
    grid = {"group_size": 8} if first not in (SmoothQuant, DynamicInt8) else {}
    size = {"group_size": 8} if later is RoundingNoise else {}
    quantize, prune = first(**grid, **SMALL, **some), later(**size, **SMALL, **some)
    model, done = rounded_once
    elsewhere = later(**size, **SMALL, layers="*.self_attn.*")
    check_passes(model, [prune, quantize])
    check_passes(model, [quantize, elsewhere])
    check_passes(done, [elsewhere])
    monkeypatch.setattr("llmcourse.compression.walk", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(BadInput, match=f"{prune.name}' after '{quantize.name}'.*prune first, quantize last"):
        compress(model, [quantize, prune], data, RT)
    with pytest.raises(BadInput, match=r"earlier passes.*prune first, quantize last"):
        compress(done, [prune], data, RT)


def test_channels_that_do_nothing_go_first(data: TokenData) -> None:
    model = build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for layer, axis in ((block.mlp.gate_proj, 0), (block.mlp.up_proj, 0), (block.mlp.down_proj, 1)):
                layer.weight.index_fill_(axis, torch.arange(0, 48, 4), 0)
    student, _ = compress(model, [Structured(sparsity=0.25, choose="magnitude")], data, RT)
    assert student.config.intermediate_size == 36
    torch.testing.assert_close(logits(student, ids()), logits(model, ids()))
    dim = next(d for d in adapter_for(model).dims(0) if d.name == "channels")
    assert (importance(dim)[::4] == 0).all() and (importance(dim)[1::4] > 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "ours"])
def test_the_contribution_is_the_mean_square_of_what_a_channel_adds(name: str, data: TokenData) -> None:
    model = build(name)
    adapter = adapter_for(model)
    adapter.prepare()
    dims = [next(d for d in adapter.dims(i) if d.name == "channels") for i in range(len(adapter.blocks()))]
    batch, inputs = data.calib_batch(3, 16, 0), []
    reader = dims[1].parts[-1].module
    hook = reader.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for row in batch:
        adapter.logits(row[None])
    hook.remove()
    h = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])  # (N, channels)
    added = h[:, :, None] * reader.weight.detach().T[None]  # (N, channels, D)
    want = added.square().sum(-1).mean(0)
    torch.testing.assert_close(contribution(dims, Context(adapter, data, RT), batch)[1], want, rtol=1e-4, atol=1e-8)


def test_large_weights_that_read_nothing_go_first(data: TokenData) -> None:
    model = build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::4] = 0
            block.mlp.down_proj.weight[:, ::4] *= 100
    student, _ = compress(model, [Structured(sparsity=0.25, **SMALL)], data, RT)
    torch.testing.assert_close(logits(student, ids()), logits(model, ids()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma2", "ours"])
def test_what_is_left_of_a_shorter_model(name: str, data: TokenData, tmp_path) -> None:
    """Leaving a block out is passing its input on; with the cache and after loading it is the same."""
    model, x = build(name), ids()
    student, (report,) = compress(model, [Depth(blocks=1, choose="random", seed=0)], data, RT)
    blocks = adapter_for(model).blocks()
    (gone,) = set(range(len(blocks))) - set(report.config["kept"])
    first = lambda args, kwargs: args[0] if args else kwargs["hidden_states"]
    skip = lambda m, args, kwargs, out: (
        (first(args, kwargs), *out[1:]) if isinstance(out, tuple) else first(args, kwargs)
    )
    hook = blocks[gone][1].register_forward_hook(skip, with_kwargs=True)
    want, full = logits(model, x), logits(student, x)
    hook.remove()
    torch.testing.assert_close(full, want)
    with torch.no_grad():
        begun = student(x[:, :16], use_cache=True)
        rest = student(x[:, 16:], past_key_values=begun.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, full[:, 16:], rtol=1e-4, atol=1e-4)
    save_student(student, None, tmp_path / "m", rest_dtype=torch.float32)
    torch.testing.assert_close(logits(load_student(tmp_path / "m").model, x), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how", [dict(ramp=0), dict(ramp=4), dict(by="movement", ramp=4), dict(by="random", ramp=0)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "ours"])
def test_pruning_while_training(name: str, how: dict, data: TokenData) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    method = Gradual(sparsity=0.75, per="layer", steps=6, every=2, batch_size=2, seq_len=16, **how)
    student, _ = compress(model, [method], data, RT)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    masked = [m for m in student.modules() if mask_of(m) is not None]
    assert masked and all((m.weight == 0).float().mean() == 0.75 for m in masked)
    assert torch.isfinite(logits(student, ids())).all()


def test_movement_is_the_sum_of_minus_weight_times_gradient(data: TokenData, monkeypatch) -> None:
    """Against a plain loop of AdamW; and a weight that is gone goes on collecting, so that it may return."""
    model, name, seen = build("llama"), "model.layers.1.mlp.up_proj", []
    how = dict(by="movement", layers=name, per="layer", steps=4, ramp=3, every=1, batch_size=2, seq_len=16, lr=1e-2)
    scores_now = Gradual.scores_now

    def record(self, raw, moved):
        seen.append(moved[name].clone())
        return scores_now(self, raw, moved)

    monkeypatch.setattr(Gradual, "scores_now", record)
    method = Gradual(sparsity=0.0, **how)
    compress(model, [method], data, RT)
    plain, want = copy.deepcopy(model), 0
    layer, optimizer = plain.get_submodule(name), torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in list(method.batches(Context(adapter_for(model), data, RT)))[:3]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        want = want - layer.weight.detach() * layer.weight.grad
        optimizer.step()
    torch.testing.assert_close(seen[3], want, rtol=1e-3, atol=1e-7)
    seen.clear()
    compress(model, [Gradual(sparsity=0.75, **how)], data, RT)
    gone = ~keep_highest(seen[2].flatten(), cubic_sparsity(2, 0, 3, 0.0, 0.75)).view_as(seen[2])
    assert (seen[3][gone] != seen[2][gone]).float().mean() > 0.9


def test_the_cubic_schedule() -> None:
    shares = [cubic_sparsity(t, 4, 12, 0.125, 0.625) for t in range(20)]
    assert shares[:5] == [0.125] * 5 and shares[12:] == [0.625] * 8
    assert shares[8] == 0.625 - 0.5 / 8 and shares == sorted(shares)
    assert [cubic_sparsity(t, 3, 3, 0.0, 0.5) for t in (2, 3)] == [0.0, 0.5]


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Depth(blocks=-1), "blocks is -1"),
    (lambda: Gradual(ramp=100), "ramp is 100"),
    (lambda: Gradual(by="movement", ramp=0), "ramp is 0"),
    (lambda: Magnitude(sparsity=1), "sparsity is 1"),
    (lambda: Magnitude(sparsity=-0.1), "sparsity is -0.1"),
    (lambda: Wanda(sparsity=float("nan")), "sparsity is nan"),
    (lambda: Magnitude(per="column"), "per is 'column'; allowed: row, layer, model"),
    (lambda: Wanda(per="model"), "per is 'model'; allowed: row, layer"),
    (lambda: SparseGPT(block_size=0), "block_size is 0"),
    (lambda: SparseGPT(damping=-1), "damping is -1"),
    (lambda: SparseGPT(per="row"), "per is 'row'; allowed: block"),
    (lambda: Magnitude(pattern="2:4", sparsity=0.5), "sparsity is 0.5; allowed: None beside the pattern '2:4'"),
    (lambda: Magnitude(pattern="2:4", per="model"), "per is 'model'; allowed: None beside the pattern '2:4'"),
    (lambda: sparsegpt(torch.ones(2, 4), torch.eye(4), pattern="2:4", sparsity=0.25), "sparsity is 0.25"),
    (lambda: sparsegpt(torch.ones(2, 4), torch.eye(4), sparsity=1), "sparsity is 1"),
    (lambda: Structured(dim="layers"), "dim is 'layers'"),
    (lambda: Structured(sparsity=1.0), "sparsity is 1.0"),
    (lambda: Structured(choose="best"), "choose is 'best'"),
    (lambda: Structured(n_calib=0), "n_calib is 0"),
    *((lambda p=p: Magnitude(pattern=p), f"pattern is {p!r}") for p in ("4:2", "4:4", "0:4", "2/4", "", 24)),
])  # fmt: skip
def test_bad_arguments(make, says: str) -> None:
    with pytest.raises(BadInput) as e:
        make()
    assert str(e.value).startswith(says) and "allowed" in str(e.value)


@pytest.mark.parametrize(("method", "says"), [
    (Magnitude(pattern="3:5"), "m that divides 32 columns"),
    (SparseGPT(n_calib=99, seq_len=16), "tokens of data.calib is 400"),
    (Gradient(n_calib=99, seq_len=16), "tokens of data.calib is 400"),
    (Gradient(n_calib=1, seq_len=65), "seq_len is 65"),
    (Gradient(n_calib=1, seq_len=1), "seq_len is 1"),
    (Structured(n_calib=1, seq_len=65), "seq_len is 65"),
    (Structured(n_calib=99, seq_len=16), "tokens of data.calib is 400"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_work(method, says: str, data: TokenData) -> None:
    model = build("llama")
    with pytest.raises(BadInput, match=says):
        compress(model, [method], data, RT)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


@pytest.mark.parametrize(("W", "H", "says"), [
    (torch.ones(3), torch.eye(3), "W is"),
    (torch.full((2, 3), torch.nan), torch.eye(3), "W is"),
    (torch.ones(2, 3), torch.eye(4), "H is"),
    (torch.ones(2, 3), torch.full((3, 3), torch.inf), "H is"),
])  # fmt: skip
def test_sparsegpt_refuses(W: torch.Tensor, H: torch.Tensor, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        sparsegpt(W, H)
    with pytest.raises(BadInput, match="not positive definite"):
        sparsegpt(torch.ones(2, 3), -torch.eye(3))

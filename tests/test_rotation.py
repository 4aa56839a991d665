"""Rotations that change no logit, the families where that is not so, and a cache that keeps keys in few bits."""

from __future__ import annotations

import copy
import json

import pytest
import scipy.linalg
import torch
from archs import CAUSAL, OURS, build, ids, logits, random_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.activations import AWQ, DynamicInt8
from llmcourse.adapters import adapter_for
from llmcourse.compression import Pass, compress
from llmcourse.lowbit import NF4
from llmcourse.model import GPT, GPTConfig, KVCache
from llmcourse.packed import load_student, pack_model, save_student, stored_bytes
from llmcourse.pruning import Magnitude, Wanda
from llmcourse.quantization import RTN
from llmcourse.rotation import (
    CacheFormat,
    Rotate,
    RotateInputs,
    Rotation,
    Store,
    dequantize_groups,
    fast_hadamard,
    find_stream,
    hadamard,
    length_of,
    quantize_groups,
    quantized_cache,
    untie,
)
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.store import write_manifest

RT = Runtime.auto("cpu", "float32")
ACCEPTED = {
    "ours", "llama", "llama, tied, one head for all", "llama, biases", "mistral, window", "qwen2", "qwen3", "granite",
    "smollm3", "gemma", "phi3",
}  # fmt: skip


class ExactNorm(nn.Module):
    """The RMS norm in float64; transformers and our model compute it in float32 whatever they get."""

    def __init__(self, norm: nn.Module, offset: float):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + self.offset)


def exact(name: str) -> nn.Module:
    """A tiny model in float64, norms included, whose norms have weights that are far from 1."""
    model = build(name).double()
    adapter = adapter_for(model)
    dice = torch.Generator().manual_seed(7)
    for norm, _ in find_stream(adapter).readers:
        with torch.no_grad():
            norm.weight.add_(torch.randn(norm.weight.shape, generator=dice, dtype=torch.float64))
    for path, module in list(model.named_modules()):
        if "norm" in path.rpartition(".")[2] and getattr(module, "weight", None) is not None:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, ExactNorm(module, adapter.norm_offset))
    return model


# ---------------------------------------------------------------- Hadamard matrices


@pytest.mark.parametrize("n", [1, 2, 8, 64, 512])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    ours = hadamard(n) * n**0.5
    torch.testing.assert_close(ours, torch.from_numpy(scipy.linalg.hadamard(n)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 24, 64, 144, 192, 576, 768, 1536])
def test_the_fast_transform_is_the_matrix(n: int) -> None:
    H = hadamard(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(H.abs(), torch.full_like(H, n**-0.5), rtol=1e-12, atol=0)  # all of one size
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fast_hadamard(x), x @ H, rtol=0, atol=1e-12)
    assert fast_hadamard(x.float()).dtype == torch.float32


@pytest.mark.parametrize("n", [3, 6, 36, 100, 1000])
def test_other_orders_are_refused(n: int) -> None:
    with pytest.raises(BadInput, match=f"is {n}; allowed: a product of 2s and 12s"):
        hadamard(n)
    with pytest.raises(BadInput, match="orthogonal"):
        Rotation(n)
    Rotation(n, kind="orthogonal")


@given(st.sampled_from(["hadamard", "orthogonal", "permutation", "none"]), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_a_rotation_keeps_every_length_and_angle(kind: str, seed: int) -> None:
    turn = Rotation(24, kind=kind, seed=seed)
    Q = turn(torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(Q @ Q.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(turn(x), x @ Q, rtol=0, atol=1e-12)
    again = Rotation(24, kind=kind, seed=seed)(x)
    assert torch.equal(turn(x), again)
    if kind == "permutation":  # the control moves outliers and makes none smaller
        torch.testing.assert_close(turn(x).abs().sort().values, x.abs().sort().values)


# ---------------------------------------------------------------- the stream


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "permutation", "none"])
@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_a_turned_stream_gives_the_same_logits(name: str, kind: str) -> None:
    model = exact(name)
    before, old = logits(model, ids()), copy.deepcopy(model.state_dict())
    turned, (report,) = compress(model, [Rotate(kind=kind, seed=3)], None, None)
    torch.testing.assert_close(logits(turned, ids()), before, rtol=1e-10, atol=1e-10)
    assert report.name == "rotate" and all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    weights = [norm.weight + adapter_for(turned).norm_offset for norm, _ in find_stream(adapter_for(turned)).readers]
    assert all((w == 1).all() for w in weights)  # folded
    if kind != "none":
        stream = find_stream(adapter_for(turned))
        twins = zip(stream.writers, find_stream(adapter_for(model)).writers, strict=True)
        assert not any(torch.allclose(a.weight, b.weight) for a, b in twins)


@pytest.mark.parametrize("name", sorted({*OURS, *CAUSAL} - ACCEPTED))
def test_where_it_would_not_be_exact_it_is_refused(name: str) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput) as caught:
        compress(model, [Rotate()], None, None)
    text = str(caught.value)
    assert text.count("allowed:") == 1 and "\n" not in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_refusal_names_what_is_in_the_way() -> None:
    for name, words in (
        ("opt", "LayerNorm with a bias"),
        ("gemma2", "post_attention_layernorm"),
        ("ours, experts", "sites"),
    ):
        with pytest.raises(BadInput, match=words):
            Rotate().check(build(name), adapter_for(build(name)))


def test_a_parameter_that_meets_the_stream_elsewhere_is_not_overlooked() -> None:
    model = build("llama")
    model.model.layers[1].scale = nn.Parameter(torch.ones(32))
    with pytest.raises(BadInput, match=r"layers\.1\.scale"):
        compress(model, [Rotate()], None, None)


def test_learned_positions_turn_with_the_stream() -> None:
    torch.manual_seed(0)
    c = GPTConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, context=64, position="learned", init_std=0.3)
    model = GPT(c).eval()
    turned, _ = compress(model, [Rotate()], None, None)
    torch.testing.assert_close(logits(turned, ids()), logits(model, ids()), rtol=1e-3, atol=1e-3)


def test_untying_costs_one_matrix_and_happens_once() -> None:
    for name in ("ours", "llama, tied, one head for all", "llama"):
        model = build(name)
        table, tied = model.get_input_embeddings().weight, name != "llama"
        assert untie(model) == (table.nbytes if tied else 0) and untie(model) == 0
        turned, _ = compress(build(name), [Rotate()], None, None)
        assert getattr(turned.config, "tied", None) in (None, False)
        assert not getattr(turned.config, "tie_word_embeddings", False)


@pytest.mark.parametrize("name", ["ours", "llama, tied, one head for all", "qwen3"])
def test_a_turned_model_is_an_ordinary_one_and_comes_back_from_a_folder(name: str, tmp_path) -> None:
    turned, _ = compress(build(name), [Rotate(), RTN(bits=4, group_size=16)], None, None)
    save_student(turned, None, tmp_path / "x", rest_dtype=torch.float32)
    back = load_student(tmp_path / "x").model
    torch.testing.assert_close(logits(back, ids()), logits(turned, ids()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("name", [n for n in [*OURS, *CAUSAL] if n not in ("deepseek-v3", "jetmoe")])
def test_inputs_turn_in_every_family(name: str) -> None:
    model = build(name)
    turned, _ = compress(model, [RotateInputs(kind="orthogonal", seed=1)], None, None)
    torch.testing.assert_close(logits(turned, ids()), logits(model, ids()), rtol=2e-3, atol=2e-3)
    moved = [m for m in turned.modules() if isinstance(m, nn.Linear) and hasattr(m, "input_rotation")]
    assert moved and not any(hasattr(m, "input_rotation") for m in model.modules())


def test_what_comes_after_sees_the_turned_input() -> None:
    data = random_text()
    turned, _ = compress(
        build("llama"), [RotateInputs(kind="orthogonal", layers="*.down_proj"), DynamicInt8()], data, RT
    )
    layer, seen = turned.model.layers[0].mlp.down_proj, []
    x = torch.zeros(1, layer.in_features)
    x[0, 3] = 1.0
    layer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    layer(x)
    assert (seen[0] != 0).sum() > 20  # one input is spread over all, and only then rounded


INSIDE = {"ours": "*.attn.o,*.ffn.down", "gpt2": "*.attn.c_proj,*.mlp.c_proj"}


@pytest.mark.parametrize("name", ["llama", "ours", "gpt2", "llama, biases"])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "permutation", "none"])
@pytest.mark.parametrize("then", ["", "rtn", "int8", "nf4", "mask"])
def test_a_folder_turns_what_its_layers_read(name: str, kind: str, then: str, tmp_path) -> None:
    after = {"rtn": RTN(bits=4, group_size=8), "int8": DynamicInt8(), "nf4": NF4(group_size=8),
             "mask": Magnitude(sparsity=0.5)}  # fmt: skip
    inside = INSIDE.get(name, "*.o_proj,*.down_proj")
    passes = [RotateInputs(kind=kind, seed=3, layers=inside), *([after[then]] if then else [])]
    student, _ = compress(build(name), passes, None, None)
    expected, sizes = logits(student, ids()), save_student(student, None, tmp_path / "x", rest_dtype=torch.float32)
    back = load_student(tmp_path / "x").model
    assert torch.equal(logits(back, ids()), expected)
    assert torch.equal(logits(load_student(tmp_path / "x", dequantize=True).model, ids()), expected)
    assert sizes == stored_bytes(student if then in ("", "mask") else pack_model(student), torch.float32)
    turned = [m for m in back.modules() if hasattr(m, "input_rotation")]
    assert len(turned) == 6 and all(m.input_rotation.kind == kind for m in turned)
    if kind == "hadamard":  # a bit for each input
        from safetensors.torch import load_file

        kept = {n: t for n, t in load_file(tmp_path / "x" / "packed.safetensors").items() if "input_rotation" in n}
        assert sorted(t.nbytes for t in kept.values()) == sorted(-(-m.in_features // 8) for m in turned)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.update({next(iter(t)): "fourier"}), "kind is 'fourier'; allowed: "),
    (lambda t: t.update({"model.layers.7.mlp.down_proj": "hadamard"}), "allowed: the name of a linear layer"),
    (lambda t: t.pop(next(iter(t))), "has no partner"),
    (lambda t: t.update({next(iter(t)): "orthogonal"}), "has no partner"),
])  # fmt: skip
def test_a_turn_that_is_unknown_or_damaged_is_one_sentence(change, words: str, tmp_path) -> None:
    student, _ = compress(build("llama"), [RotateInputs(layers="*.o_proj,*.down_proj")], None, None)
    save_student(student, None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf8"))
    change(config["quantization_config"]["turned"])
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf8")
    write_manifest(tmp_path)
    with pytest.raises(BadInput) as caught:
        load_student(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_scale_is_not_folded_through_a_turn() -> None:
    """AWQ's scale is for the turned input: dividing what the module before puts out would be another column."""
    data, dense = random_text(), build("llama")
    turned, _ = compress(dense, [RotateInputs(kind="orthogonal", layers="*.down_proj")], data, RT)
    fine = AWQ(bits=8, group_size=8, n_calib=2, seq_len=16, clip=False)
    student, _ = compress(turned, [fine], data, RT)
    assert student.model.layers[0].mlp.down_proj.input_quant.divide is not None
    reference, _ = compress(dense, [fine], data, RT)
    gap = lambda m: float((logits(m, ids()) - logits(dense, ids())).norm() / logits(dense, ids()).norm())
    assert gap(student) < 3 * gap(reference) < 0.2


def test_passes_that_do_not_fit_together_are_refused_before_any_work() -> None:
    data, dense = random_text(), build("llama")
    for first in (RTN(bits=4, group_size=16), Wanda(sparsity=0.5, n_calib=2, seq_len=16)):
        done, _ = compress(dense, [first], data, RT)
        for second in (Rotate(), RotateInputs(kind="orthogonal")):
            with pytest.raises(BadInput, match=r"rotate first|quantize last"):
                compress(done, [second], data, RT)
            with pytest.raises(BadInput, match="rotate first"):
                compress(dense, [first, second], data, RT)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Rotate(kind="fourier"), "kind is 'fourier'"),
    (lambda: Rotate(seed=-1), "seed is -1"),
    (lambda: Rotate(seed=1.5), "seed is 1.5"),
    (lambda: RotateInputs(kind="x"), "kind is 'x'"),
    (lambda: CacheFormat(key_bits=1), "key_bits is 1"),
    (lambda: CacheFormat(value_bits=9), "value_bits is 9"),
    (lambda: CacheFormat(keys="head"), "keys is 'head'"),
    (lambda: CacheFormat(group_size=0), "group_size is 0"),
    (lambda: CacheFormat(residual=-1), "residual is -1"),
    (lambda: CacheFormat(rotate="yes"), "rotate is 'yes'"),
])  # fmt: skip
def test_options_are_refused(make, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        make()
    assert words in str(caught.value)
    assert CacheFormat(key_bits=2, value_bits=8, residual=0).key_bits == 2


# ---------------------------------------------------------------- groups and stores


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 4, 8, 12]))
@settings(deadline=None, max_examples=40)
def test_groups_are_off_by_at_most_half_a_step(seed: int, bits: int, group: int) -> None:
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(seed)) * 5 + 1
    x[0, 0] = 2.5  # all equal
    q = quantize_groups(x, bits=bits, group_size=group)
    back = dequantize_groups(q, bits=bits, group_size=group)
    step = q.scale.float().expand(2, 3, -1, group).flatten(-2)
    # two float16 numbers stand for the ends of a group
    assert ((back - x).abs() <= step / 2 + 2e-3 * x.abs().max()).all()
    assert q.codes.shape[-1] == -(-group * bits // 8) and torch.equal(back[0, 0], torch.full((24,), 2.5))


def grown(store: Store, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    for part in x.split(pieces, 2):
        seen = store.append(part)
    return seen


@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=6),
       st.sampled_from(["channel", "token"]), st.booleans(), st.integers(0, 5))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_store_keeps_the_latest_tokens_as_they_are(seed, pieces, axis, rotate, residual) -> None:
    x = torch.randn(2, 3, sum(pieces), 8, generator=torch.Generator().manual_seed(seed))
    store = Store(bits=8, axis=axis, group_size=4, residual=residual, rotate=rotate)
    seen = grown(store, x, pieces)
    assert seen.shape == x.shape and length_of(store) == x.shape[2]
    dense = store.new.shape[2]
    assert min(residual, x.shape[2]) <= dense < residual + 4 + (residual == 0)
    assert torch.equal(store.all()[:, :, -dense:] if dense else x[:, :, :0], x[:, :, x.shape[2] - dense :])
    assert torch.equal(seen[:, :, -pieces[-1] :], x[:, :, -pieces[-1] :])  # what was just read is never rounded
    assert (store.all() - x).abs().max() < 0.05
    one = Store(bits=8, axis=axis, group_size=4, residual=residual, rotate=rotate)
    one.append(x)
    torch.testing.assert_close(one.all(), store.all())  # the pieces do not matter


def test_channels_and_tokens_share_what_they_say() -> None:
    x = torch.ones(1, 1, 8, 8)
    x[..., 3] = 1000.0  # a channel that sticks out at every token
    error = {}
    for axis in ("channel", "token"):
        store = Store(bits=2, axis=axis, group_size=8, residual=0, rotate=False)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        store.append(x + noise)
        error[axis] = (store.all() - x - noise)[..., [0, 1, 2, 4, 5, 6, 7]].abs().mean()
    assert error["channel"] < 0.2 and error["token"] > 2 * error["channel"]


# ---------------------------------------------------------------- the cache of a model

CACHED = ["ours", "llama", "qwen3", "gpt2", "gpt-neox", "mixtral"]


def read(model: nn.Module, tokens: torch.Tensor, cache, pieces: list[int]) -> torch.Tensor:
    with torch.no_grad():
        parts = [model(p, past_key_values=cache, use_cache=True).logits for p in tokens.split(pieces, 1)]
    return torch.cat(parts, 1)


def plain(model: nn.Module):
    from transformers import DynamicCache

    return KVCache(model.config.n_layers) if isinstance(model, GPT) else DynamicCache()


@pytest.mark.parametrize("name", CACHED)
def test_with_16_bits_it_is_the_plain_cache(name: str) -> None:
    model, pieces = build(name), [5, 1, 7, 11]
    off = quantized_cache(model, CacheFormat(key_bits=16, value_bits=16, group_size=4, residual=0))
    assert torch.equal(read(model, ids(), off, pieces), read(model, ids(), plain(model), pieces))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("how", [dict(), dict(keys="token"), dict(values="channel"), dict(rotate=True)], ids=str)
def test_more_bits_are_closer_and_the_window_is_exact(name: str, how: dict) -> None:
    model = build(name)
    want, gaps = logits(model, ids()), {}
    for bits in (2, 4, 8):
        form = CacheFormat(key_bits=bits, value_bits=bits, group_size=4, residual=4, **how)
        got = read(model, ids(), quantized_cache(model, form), [6] * 4)
        torch.testing.assert_close(got[:, :6], want[:, :6], rtol=1e-3, atol=1e-3)
        gaps[bits] = (got - want)[:, 6:].norm() / want[:, 6:].norm()
    assert gaps[8] < 0.03 and 2 * gaps[8] < gaps[4] < gaps[2]


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_a_cropped_cache_goes_on_as_one_that_never_knew(name: str) -> None:
    model, form = build(name), CacheFormat(key_bits=8, value_bits=8, group_size=4, residual=4)
    tokens = ids(length=20)
    for kept in (18, 14, 8, 6, 0):
        cache, fresh = (quantized_cache(model, form) for _ in range(2))
        read(model, tokens, cache, [20])
        cache.crop(kept - 20)
        length = cache.length if name == "ours" else cache.get_seq_length()
        assert length == kept
        if kept:
            read(model, tokens[:, :kept], fresh, [kept])
        a, b = (read(model, tokens[:, kept:], c, [20 - kept]) if kept < 20 else None for c in (cache, fresh))
        assert (a - b).norm() < 0.05 * b.norm(), kept  # a group that is cut was rounded, a fresh one is not


def test_rows_of_a_batch_do_not_meet_and_beams_can_change_places() -> None:
    model, form = build("llama"), CacheFormat(key_bits=2, value_bits=2, group_size=4, residual=4)
    tokens = ids(n=3)
    together = read(model, tokens, quantized_cache(model, form), [12, 12])
    for row in range(3):
        alone = read(model, tokens[row : row + 1], quantized_cache(model, form), [12, 12])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-3)
    cache, order = quantized_cache(model, form), torch.tensor([2, 0, 1])
    read(model, tokens[:, :12], cache, [12])
    cache.reorder_cache(order)
    torch.testing.assert_close(read(model, tokens[order, 12:], cache, [12]), together[order, 12:])
    cache.reset()
    torch.testing.assert_close(read(model, tokens, cache, [12, 12]), together)


def test_generate_of_transformers_takes_it() -> None:
    model = build("llama")
    off = quantized_cache(model, CacheFormat(key_bits=16, value_bits=16, group_size=4))
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(ids(), past_key_values=off, **how), model.generate(ids(), **how))
    two = quantized_cache(model, CacheFormat(key_bits=2, value_bits=2, group_size=4, residual=0))
    assert model.generate(ids(), past_key_values=two, **how).shape == (2, 32)


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_bytes_are_counted_and_computed(name: str) -> None:
    model = build(name)
    width, heads, layers = 8, 4 if name == "ours" else 2, 3
    for form in (
        CacheFormat(key_bits=2, value_bits=4, group_size=8, residual=0),
        CacheFormat(key_bits=4, value_bits=2, keys="token", values="channel", group_size=8, residual=0),
        CacheFormat(key_bits=16, value_bits=16, group_size=8),
    ):
        cache = quantized_cache(model, form)
        read(model, ids(n=1), cache, [24])
        assert cache.bytes == 24 * layers * form.bytes_per_token(width, heads, dense=4)


def test_models_that_do_not_fit_are_refused() -> None:
    for name, form, words in (
        ("gemma2", CacheFormat(group_size=4), "sliding window"),
        ("mistral, window", CacheFormat(group_size=4), "sliding window"),
        ("llama", CacheFormat(group_size=5), "group_size is 5"),
        ("ours", CacheFormat(group_size=16), "group_size is 16"),
    ):
        with pytest.raises(BadInput, match=words):
            quantized_cache(build(name), form)
    quantized_cache(build("llama"), CacheFormat(group_size=5, values="channel"))  # tokens in groups: any number


def test_both_passes_are_found_by_their_names() -> None:
    assert Pass.registry["rotate"] is Rotate and Pass.registry["rotate-inputs"] is RotateInputs


def test_rounding_in_bfloat16_is_not_taken_for_another_norm() -> None:
    for name in ("llama", "gemma", "ours"):
        model = build(name).bfloat16()
        turned, _ = compress(model, [Rotate()], None, None)
        before, after = (logits(m, ids()).float() for m in (model, turned))
        assert (after - before).norm() < 0.1 * before.norm()

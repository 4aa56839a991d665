"""The chapter on deployment: kernels behind packed layers, what they may not change, and the arithmetic of a step."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from llmcourse import deployment
from llmcourse.compression import ActQuant, compress, count_parameters, round_input, weight_bytes
from llmcourse.data import load_model
from llmcourse.deployment import (
    FastHead,
    FastLinear,
    FastRMSNorm,
    Kernel,
    Machine,
    cache_bytes,
    crossover,
    faster,
    faster_,
    greedy_agreement,
    kernel_grid,
    kernel_refusal,
    lay_out,
    measure_machine,
    shared_inputs,
    step_cost,
)
from llmcourse.model import GPT, GPTConfig, KVCache, generate
from llmcourse.packed import (
    PackedLinear,
    dequantize_model,
    load_student,
    pack_model,
    save_student,
    stored_bytes,
    without_kernels,
)
from llmcourse.pruning import Magnitude
from llmcourse.quantization import RTN, EmbeddingRTN, rtn
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput, load_settings

RT = Runtime.auto("cpu", "float32")
HERE = kernel_refusal(64, 64, bits=4, group_size=64)
needs_kernel = pytest.mark.skipif(HERE is not None, reason=str(HERE))
INT4 = {"kernels": "int4", "most": 10**6}


def gpt(**more) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, context=64)
    return GPT(GPTConfig(**(shape | more))).eval()


def llama(kind: str = "Llama", **more) -> nn.Module:
    torch.manual_seed(0)
    shape = dict(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(shape | more))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.ndim == 1:  # biases and norms that are not 0 and 1
            p.data += 0.1 * torch.randn_like(p)
    return model


def pack_up(
    model: nn.Module, *before, bits: int = 4, group_size: int | str = 32, head: bool = True, **grid
) -> nn.Module:
    passes = [*before, RTN(bits=bits, group_size=group_size, **grid)] + ([EmbeddingRTN()] if head else [])
    return pack_model(compress(model, passes, None, RT)[0])


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return getattr(out := model(ids), "logits", out)


def some_ids(rows: int = 2, n: int = 12) -> torch.Tensor:
    return torch.randint(3, 96, (rows, n), generator=torch.Generator().manual_seed(1))


def packed_layer(
    bits: int, rows: int = 32, columns: int = 128, group_size: int = 32, symmetric: bool = False, bias=None
):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    solved = rtn(W, bits=bits, group_size=group_size, symmetric=symmetric)
    return PackedLinear.from_weight(solved.weight, solved.qparams, bias)


# ------------------------------------------------------------------------------------------------ the guard


@pytest.mark.parametrize(
    ("rows", "columns", "group", "cpu", "piece"),
    [
        (576, 576, 64, "AVX2", None),
        (576, 576, 64, "AVX512", None),
        (16, 32, 32, "AVX512", None),
        (576, 1536, 128, "AVX2", None),
        (576, 1536, 256, "AVX2", None),
        (49152, 576, 576, "AVX2", None),  # a whole row: nine groups of 64 with one scale
        (64, 96, 96, "AVX2", None),
        (576, 576, 64, "DEFAULT", "DEFAULT"),
        (576, 576, 64, "NO AVX", "NO AVX"),
        (576, 576, 64, "SVE256", "SVE256"),
        (576, 576, 64, "CUDA 9.0", None),
        (576, 576, 64, "cuda, or one that is too old", "too old"),
        (15, 64, 64, "AVX2", "15 outputs"),
        (17, 64, 64, "AVX2", "17 outputs"),
        (24, 64, 64, "AVX512", "24 outputs"),
        (64, 64, 16, "AVX2", "groups of 16"),
        (64, 80, 40, "AVX2", "groups of 40"),
        (64, 50, 50, "AVX2", "groups of 50"),
    ],
)
def test_the_guard(rows, columns, group, cpu, piece):
    why = kernel_refusal(rows, columns, bits=4, group_size=group, cpu=cpu)
    assert why is None if piece is None else piece in why


def test_the_guard_asks_this_processor(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "DEFAULT" in kernel_refusal(64, 64, bits=4, group_size=64)
    packed = pack_up(gpt())
    quick, report = faster(packed, kernels="int4")
    assert not any(isinstance(m, (FastLinear, FastHead)) for m in quick.modules())
    assert "DEFAULT" in str(report) and torch.allclose(logits(quick, some_ids()), logits(packed, some_ids()), atol=1e-5)


# ------------------------------------------------------------------------------------------------ one layer


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("columns", "group"), [(128, 32), (192, 96), (256, 256), (576, 576)])
def test_the_grid_says_the_same_weights(bits, symmetric, columns, group):
    layer = packed_layer(bits, 32, columns, group, symmetric)
    grid = kernel_grid(layer)
    assert grid.codes.max() < 16 and grid.group in (32, 64, 128, 256)
    w = (grid.codes.double().unflatten(1, (-1, grid.group)) - 8) * grid.scale.double()[..., None]
    w = (w + grid.offset.double()[..., None]).flatten(1)
    w = w if bits <= 4 else w[:, :columns] + w[:, columns:]
    exact = layer.dequantized().double()
    s = layer.scale.double().expand(32, -1).repeat_interleave(group, 1)
    # two roundings to 8 bits: of the scale, times at most 2^bits steps, and of the offset
    assert ((w - exact).abs() <= 2.0**-8 * s * 2**bits).all()
    if bits not in (4, 8) or symmetric:  # nothing is added: only the scale is rounded
        assert ((w - exact).abs() <= 2.0**-8 * exact.abs() + 1e-9).all()


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.0), (3, 0.0), (4, 2**-5)])
def test_a_pruned_weight_stays_near_zero(bits, bound):
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    solved = rtn(W * mask, bits=bits, group_size=32, mask=mask)
    layer = PackedLinear.from_weight(solved.weight, solved.qparams)
    grid = kernel_grid(layer)
    w = (grid.codes.float().unflatten(1, (-1, 32)) - 8) * grid.scale.float()[..., None]
    w = (w + grid.offset.float()[..., None]).flatten(1)
    assert (layer.dequantized()[~mask] == 0).all() and w[~mask].abs().max() <= bound * solved.qparams.scale.max()


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_product_is_within_the_rounding_of_bfloat16(bits, group, rows):
    layer = packed_layer(bits, 48, 256, group)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(7))
    got = Kernel([layer], most=64).product(x).double()
    W, s = layer.dequantized().double(), layer.scale.double().repeat_interleave(group, 1)
    exact = x.double() @ W.T
    bound = 2.0**-8 * (x.abs().double() @ (W.abs() + s * 2**bits).T + exact.abs())
    assert ((got - exact).abs() <= bound).all()
    assert (got - exact).abs().max() > 0  # it is not the portable path that was measured


@needs_kernel
def test_one_product_for_three_layers_gives_the_numbers_of_three():
    layers = [packed_layer(4, rows, 128) for rows in (32, 16, 64)]
    x = torch.randn(1, 3, 128)
    together = Kernel(layers, most=64)
    for place, layer in enumerate(layers):
        alone = Kernel([layer], most=64)
        assert torch.equal(together.output(place, x), alone.output(0, x))


@needs_kernel
def test_outputs_are_handed_out_once_and_only_for_their_own_input():
    layers = [packed_layer(4, 32, 128), packed_layer(4, 16, 128)]
    kernel, x, y = Kernel(layers, most=64), torch.randn(1, 128), torch.randn(1, 128)
    want = {k: [Kernel([layer], most=64).product(v) for layer in layers] for k, v in (("x", x), ("y", y))}
    assert torch.equal(kernel.output(1, x), want["x"][1])  # any order
    assert torch.equal(kernel.output(0, y), want["y"][0])  # another input in between
    assert torch.equal(kernel.output(1, y), want["y"][1])
    assert kernel._kept is None  # nothing of an input stays
    assert torch.equal(kernel.output(0, x), want["x"][0])
    x.copy_(y)  # the same tensor with other numbers, in the next forward pass
    assert torch.equal(kernel.output(0, x), want["y"][0])


MODES = {"plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@needs_kernel
@pytest.mark.parametrize("mode", MODES)
def test_an_input_that_was_written_to_is_another_one(mode):
    """Between two layers that read it: in inference mode a tensor does not count its changes."""
    layers = [packed_layer(4, 32, 128), packed_layer(4, 16, 128)]
    kernel = Kernel(layers, most=64)
    first, second = (deployment._with_kernel(layer, kernel, i) for i, layer in enumerate(layers))
    with MODES[mode]():
        x = torch.randn(3, 128)
        first(x)
        x.mul_(-2)
        assert torch.equal(second(x), Kernel(layers[1:], most=64).product(x))
        second(x)  # the other's part waits, ...
        x[0, 0] += 50
        assert torch.equal(first(x), Kernel(layers[:1], most=64).product(x))  # ... and is of no use now


@needs_kernel
@pytest.mark.parametrize("mode", MODES)
def test_a_hook_that_comes_later_and_changes_the_input_in_place(mode):
    packed = pack_up(gpt())
    quick, _ = faster(packed, **INT4)
    for model in (packed, quick):
        model.blocks[0].attn.k.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
        model.blocks[1].attn.v.register_forward_pre_hook(lambda layer, args: (args[0].mul_(3),))
    with MODES[mode]():
        ids = some_ids()
        assert torch.allclose(quick(ids), packed(ids), atol=0.05)


INPUTS = {
    "no rows": lambda x: x[:0],
    "no texts of three tokens": lambda x: x[:0].view(0, 3, 128),
    "texts of no tokens": lambda x: x[:0].view(2, 0, 128),
    "one dimension": lambda x: x[0],
    "columns first in memory": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(4, -1),
    "four dimensions": lambda x: x.view(2, 1, 3, 128),
}


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_form(name, bits, dtype):
    layers = [packed_layer(bits, 32, 128), packed_layer(bits, 16, 128)]
    kernel = Kernel(layers, most=64)
    x = INPUTS[name](torch.randn(6, 128, generator=torch.Generator().manual_seed(2)).to(dtype))
    for place, layer in enumerate(layers):
        got, want = deployment._with_kernel(layer, kernel, place)(x), layer(x)
        assert got.shape == want.shape and got.dtype == want.dtype == dtype
        assert torch.allclose(got, want, rtol=0.02, atol=0.6)  # sums of 128 products of about 1


@needs_kernel
def test_a_gradient_with_respect_to_an_input_is_that_of_the_packed_model():
    packed = pack_up(gpt())
    quick, _ = faster(packed, **INT4)
    found = []
    for model in (packed, quick):
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        turns = torch.ones(5, 8), torch.zeros(5, 8)
        model.blocks[0](x, rotation=turns, mask=None, cache=None).square().sum().backward()
        found.append(x.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4) and found[0].abs().max() > 0.1
    # and a call that wants none uses the kernel, also where nobody has switched gradients off
    ids = some_ids()
    out = quick(ids)
    assert not out.requires_grad and torch.equal(out, logits(quick, ids)) and not torch.equal(out, packed(ids))


@needs_kernel
@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_that_are_loaded_are_the_ones_that_count(assign):
    quick, _ = faster(pack_up(gpt()), **INT4)
    torch.manual_seed(7)
    other = pack_up(GPT(gpt().config).eval())
    ids, exact = some_ids(), logits(other, some_ids())
    before = logits(quick, ids)
    norms = {n: t for n, t in quick.state_dict().items() if "norm" in n}
    quick.load_state_dict(norms, strict=False)
    assert torch.equal(logits(quick, ids), before)  # no packed weight was among them: the kernels stay
    quick.load_state_dict(other.state_dict(), assign=assign)
    assert torch.allclose(logits(quick, ids), exact, atol=1e-5)
    for copied in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert torch.allclose(logits(copied, ids), exact, atol=1e-5)
    again, _ = faster(quick, **INT4)
    assert torch.equal(logits(again, ids), logits(faster(other, **INT4)[0], ids))


@needs_kernel
def test_copies_keep_their_kernels(monkeypatch):
    quick, _ = faster(pack_up(gpt()), **INT4)
    ids, before = some_ids(), logits(quick, some_ids())
    quick.blocks[0].attn.q(torch.randn(1, 64))  # outputs that wait for k and v
    file = io.BytesIO()
    torch.save(quick, file)
    file.seek(0)
    for copied in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick)), torch.load(file, weights_only=False)):
        assert torch.equal(logits(copied, ids), before)
        q, k, v = (getattr(copied.blocks[0].attn, n) for n in "qkv")
        assert q.kernel is k.kernel is v.kernel is not quick.blocks[0].attn.q.kernel and q.kernel._kept is None
        assert q.kernel_codes is q.kernel.codes and weight_bytes(copied) == weight_bytes(quick)
    # on a processor with other instructions the codes would lie in another order
    packed = pickle.dumps(quick)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert torch.allclose(logits(pickle.loads(packed), ids), logits(without_kernels(copy.deepcopy(quick)), ids))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_number_format_leaves_the_kernels_as_they_are(dtype):
    packed = pack_up(gpt())
    quick = faster(packed, **INT4)[0].to(dtype)
    for m in quick.modules():
        if isinstance(m, (FastLinear, FastHead)):
            assert m.kernel_scales is m.kernel.scales and m.kernel_scales.dtype == torch.bfloat16
    got, want = logits(quick, some_ids()), logits(copy.deepcopy(packed).to(dtype), some_ids())
    assert got.dtype == want.dtype and torch.allclose(got, want, rtol=0.02, atol=0.05)


@needs_kernel
def test_two_threads_share_a_model():
    quick, _ = faster(pack_up(gpt()), **INT4)
    texts = [some_ids()[:1, :n] for n in range(2, 10)] * 4
    alone = [logits(quick, ids) for ids in texts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda ids: logits(quick, ids), texts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
@pytest.mark.parametrize("name", ["norm", "blocks.1.ffn_norm", "blocks.0.attn.o"])
def test_whoever_listens_to_a_module_goes_on_to_hear_it(name, kind):
    packed, heard = pack_up(gpt()), []
    listen = getattr(packed.get_submodule(name), f"register_{kind}_hook")
    listen(lambda *args: heard.append(1) and None)
    quick, report = faster(packed, **INT4)
    assert type(quick.get_submodule(name)) is type(packed.get_submodule(name))
    assert report.norms == (5 if "attn" in name else 4)
    heard.clear()
    x = torch.randn(1, 3, 64).requires_grad_()
    quick.get_submodule(name)(x).sum().backward()
    assert heard


@needs_kernel
def test_the_border_between_kernel_and_unpacking():
    layer = packed_layer(4, 32, 128, bias=torch.randn(32))
    fast = deployment._with_kernel(layer, Kernel([layer], most=6), 0)
    x = torch.randn(2, 3, 128)
    exact = layer(x)
    assert not torch.equal(fast(x), exact) and torch.allclose(fast(x), exact, atol=0.2)
    more = torch.randn(7, 128)
    assert torch.equal(fast(more), layer(more))  # one row more: the layer itself


@pytest.mark.parametrize(
    ("kernel", "unpack", "dense", "want"),
    [(3.0, 10.0, 1.0, 5), (3.0, 11.9, 1.0, 5), (1.0, 9.0, 1.0, 4096), (1.0, 9.0, 2.0, 4096), (2.0, 0.0, 1.0, 1),
     (1.001, 1e6, 1.0, 4096)],
)  # fmt: skip
def test_where_kernel_and_unpacking_meet(kernel, unpack, dense, want):
    assert crossover(kernel, unpack, dense) == want


# ------------------------------------------------------------------------------------------------ whole models

MODELS = {
    "ours": lambda: pack_up(gpt()),
    "ours, untied, 3 bits": lambda: pack_up(gpt(tied=False), bits=3, head=False),
    "ours, 2 bits": lambda: pack_up(gpt(), bits=2),
    "ours, 8 bits": lambda: pack_up(gpt(), bits=8, group_size=64),
    "ours, half of the weights pruned": lambda: pack_up(gpt(), Magnitude(sparsity=0.5)),
    "ours, 2:4": lambda: pack_up(gpt(), Magnitude(pattern="2:4")),
    "llama": lambda: pack_up(llama()),
    "llama, symmetric": lambda: pack_up(llama(), symmetric=True),
    "llama, biases": lambda: pack_up(llama(attention_bias=True, mlp_bias=True)),
    "llama, tied": lambda: pack_up(llama(tie_word_embeddings=True)),
    "qwen2": lambda: pack_up(llama("Qwen2")),
    "gemma": lambda: pack_up(llama("Gemma", head_dim=16), head=False),
}


@needs_kernel
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_kernels_is_as_near_as_bfloat16(name):
    packed = MODELS[name]()
    kinds = [type(m) for m in packed.modules()]
    quick, report = faster(packed, **INT4)
    n = sum(isinstance(m, (FastLinear, FastHead)) for m in quick.modules())
    assert n == sum(isinstance(m, PackedLinear) or type(m).__name__ == "PackedHead" for m in packed.modules())
    assert [type(m) for m in packed.modules()] == kinds  # the one that was given is as it was
    ids, dense = some_ids(), dequantize_model(packed)
    exact, got = logits(dense, ids), logits(quick, ids)
    rounded = logits(copy.deepcopy(dense).bfloat16(), ids).float()
    spread = exact.std()
    error, allowed = (got - exact).pow(2).mean().sqrt(), (rounded - exact).pow(2).mean().sqrt()
    assert 0 < error <= 2 * allowed + 1e-4 * spread, (name, error / spread, allowed / spread)
    assert str(report).startswith(f"{n} layers in ")


@needs_kernel
@pytest.mark.parametrize("name", ["ours", "llama"])
def test_greedy_text_differs_only_where_two_tokens_are_nearly_equal(name):
    packed = MODELS[name]()
    quick, _ = faster(packed, **INT4)
    found = greedy_agreement(packed, quick, some_ids(3, 6), new_tokens=24)
    assert found.tokens == 3 * 24 and 0 < found.error < 0.1
    assert all(margin <= 2 * found.error for margin in found.margins)
    assert found.same == found.tokens - len(found.margins)
    wrong = copy.deepcopy(quick)
    layer = next(m for m in wrong.modules() if isinstance(m, FastLinear))
    layer.kernel.scales = layer.kernel.scales * 8
    assert greedy_agreement(packed, wrong, some_ids(3, 6), new_tokens=24).error > 5 * found.error


@needs_kernel
def test_generate_with_padding_and_a_cache():
    packed = MODELS["ours"]()
    quick, _ = faster(packed, **INT4)
    prompts = [some_ids(1, 9)[0].tolist(), some_ids(1, 4)[0].tolist()]
    with_cache = generate(quick, prompts, max_new_tokens=8, stop=[])
    assert with_cache == generate(quick, prompts, max_new_tokens=8, stop=[], use_cache=False)
    assert [generate(quick, [p], max_new_tokens=8, stop=[])[0] for p in prompts] == with_cache
    theirs, _ = faster(MODELS["llama"](), **INT4)
    out = theirs.generate(input_ids=some_ids(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 16)


@needs_kernel
def test_layers_that_read_one_tensor_share_a_product():
    _, report = faster(MODELS["llama"](), **INT4)
    groups = sorted({tuple(n.rpartition(".")[2] for n in c.names) for c in report.layers})
    assert groups == [
        ("down_proj",), ("gate_proj", "up_proj"), ("lm_head",), ("o_proj",), ("q_proj", "k_proj", "v_proj"),
    ]  # fmt: skip
    _, apart = faster(MODELS["llama"](), fuse=False, **INT4)
    assert all(len(c.names) == 1 for c in apart.layers) and len(apart.layers) == 15


def test_shared_inputs_are_seen_in_a_run():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.a, self.b, self.c, self.twice, self.never = (nn.Linear(8, 8) for _ in range(5))

        def get_input_embeddings(self):
            return self.embed

        def forward(self, ids, use_cache=False):
            x = self.embed(ids)
            return self.a(x) + self.b(x) + self.c(x.clone()) + self.twice(x) + self.twice(x + 1)

    model = Odd()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert shared_inputs(model, layers) == [["a", "b"], ["c"], ["twice"], ["never"]]
    assert not any(m._forward_pre_hooks for m in model.modules())


@needs_kernel
def test_what_the_kernel_does_not_take_stays_and_is_said():
    packed = pack_up(gpt(vocab_size=97))  # 97 rows of the head are no multiple of 16
    quick, report = faster(packed, **INT4)
    assert type(quick.head).__name__ == "PackedHead" and "97 outputs" in str(report)
    small = pack_up(gpt(), group_size=16, head=False)
    quick, report = faster(small, **INT4)
    assert "groups of 16" in str(report) and torch.equal(logits(quick, some_ids()), logits(small, some_ids()))
    rounding = pack_up(gpt(), head=False)
    round_input(rounding.blocks[0].attn.k, ActQuant(8))
    quick, report = faster(rounding, **INT4)
    attention = quick.blocks[0].attn
    assert type(attention.k) is PackedLinear and isinstance(attention.q, FastLinear)
    assert "rounds its input" in str(report)


@needs_kernel
def test_mixed_bits_share_only_with_their_like():
    model = compress(
        gpt(), [RTN(bits=4, group_size=32, layers="*.q, *.k"), RTN(bits=8, group_size=32, layers="*.v")], None, RT
    )[0]
    packed = pack_model(model)
    quick, report = faster(packed, **INT4)
    first = [tuple(n.rpartition(".")[2] for n in c.names) for c in report.layers if "blocks.0" in c.names[0]]
    assert first[:2] == [("q", "k"), ("v",)]
    exact, got = logits(packed, some_ids()), logits(quick, some_ids())
    assert 0 < (got - exact).abs().max() < 0.05 * exact.std()


@needs_kernel
def test_a_measurement_decides(monkeypatch):
    packed = MODELS["ours"]()
    slow = {"seconds": 2.0, "before": 1.0, "most": 9}
    monkeypatch.setattr(deployment, "_measure_kernel", lambda *a: slow)
    quick, report = faster(packed)
    assert not any(isinstance(m, FastLinear) for m in quick.modules()) and "faster here" in str(report)
    monkeypatch.setattr(deployment, "_measure_kernel", lambda *a: slow | {"seconds": 0.5})
    quick, report = faster(packed)
    kernels = [m.kernel for m in quick.modules() if isinstance(m, FastLinear)]
    assert kernels and all(k.most == 9 for k in kernels) and {c.most for c in report.layers} == {9}
    quick, _ = faster(packed, most=3)
    assert all(m.kernel.most == 3 for m in quick.modules() if isinstance(m, FastLinear))


def test_a_real_measurement_runs():
    quick, report = faster(MODELS["ours"]())
    measured = [c for c in report.layers if c.seconds is not None]
    assert HERE is not None or (measured and all(c.seconds > 0 and c.before > 0 and c.most >= 1 for c in measured))
    assert logits(quick, some_ids()).isfinite().all()


def test_portable_changes_nothing_and_bad_arguments_are_refused():
    packed = MODELS["llama"]()
    same, report = faster(packed, kernels="portable")
    assert report.layers == () and [type(m) for m in same.modules()] == [type(m) for m in packed.modules()]
    with pytest.raises(BadInput, match="kernels is 'int8'; allowed: auto, int4, portable"):
        faster(packed, kernels="int8")
    for prepare in (faster, faster_):
        with pytest.raises(BadInput, match="most is 0; allowed: a whole number of at least 1"):
            prepare(packed, most=0)
        with pytest.raises(BadInput, match="fuse is 'yes'"):
            prepare(packed, fuse="yes")


# ------------------------------------------------------------------------------------------------ counted and stored


@needs_kernel
@pytest.mark.parametrize("name", ["ours", "llama, biases"])
def test_counts_bytes_and_folders_are_those_of_the_packed_model(name, tmp_path):
    packed = MODELS[name]()
    quick, report = faster(packed, **INT4)
    assert count_parameters(quick) == count_parameters(packed) and stored_bytes(quick) == stored_bytes(packed)
    assert report.extra_bytes == weight_bytes(quick) - weight_bytes(packed) > 0
    dense = dequantize_model(quick)
    assert torch.allclose(logits(dense, some_ids()), logits(packed, some_ids()), atol=1e-5)
    back = without_kernels(copy.deepcopy(quick))
    assert not any(isinstance(m, (FastLinear, FastHead)) for m in back.modules())
    assert torch.allclose(logits(back, some_ids()), logits(packed, some_ids()), atol=1e-5)
    save_student(quick, None, tmp_path / "quick", rest_dtype=torch.float32)
    save_student(packed, None, tmp_path / "packed", rest_dtype=torch.float32)
    files = [(tmp_path / n / "packed.safetensors").read_bytes() for n in ("quick", "packed")]
    assert files[0] == files[1]
    assert any(isinstance(m, FastLinear) for m in quick.modules())  # saving has not touched it


@needs_kernel
def test_loading_a_folder(tmp_path):
    save_student(MODELS["ours"](), None, tmp_path / "m", rest_dtype=torch.float32)
    slow = load_student(tmp_path / "m").model
    assert not any(isinstance(m, FastLinear) for m in slow.modules())
    quick = load_student(tmp_path / "m", kernels="int4").model
    assert isinstance(quick.blocks[0].attn.q, FastLinear) and "int4 kernel" in str(quick.speed)
    dense = load_student(tmp_path / "m", kernels="int4", dequantize=True).model
    assert not any(isinstance(m, FastLinear) for m in dense.modules())
    with pytest.raises(BadInput, match="kernels"):
        load_student(tmp_path / "m", kernels="fast")
    settings = load_settings()
    for kernels, kind in (("int4", FastLinear), ("portable", PackedLinear)):
        model = load_model(tmp_path / "m", settings=replace(settings, kernels=kernels, device="cpu")).model
        assert type(model.blocks[0].attn.q) is kind


# ------------------------------------------------------------------------------------------------ dense models


@pytest.mark.parametrize("make", [gpt, llama, lambda: llama(tie_word_embeddings=True)])
def test_dense_weights_are_laid_out_and_the_numbers_stay(make, monkeypatch):
    times = iter([1.0, 2.0] * 50)
    monkeypatch.setattr(deployment, "_time", lambda fn, rt, n=5: next(times))
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    quick, report = faster(model)
    chosen = [c for c in report.layers if c.choice == "weights as (I, O)"]
    assert chosen and len(chosen) == len(report.layers)
    for name, t in quick.state_dict().items():
        assert torch.equal(t, before[name])
    linear = next(m for m in quick.modules() if type(m) is nn.Linear)
    assert linear.weight.stride() == (1, linear.out_features)
    assert torch.allclose(logits(quick, some_ids()), logits(model, some_ids()), rtol=1e-5, atol=1e-5)
    head, table = deployment._head(model).weight, model.get_input_embeddings().weight
    assert (deployment._head(quick).weight is quick.get_input_embeddings().weight) == (head is table)
    assert all(m.weight.is_contiguous() for m in model.modules() if type(m) is nn.Linear)


def test_a_layout_that_is_slower_is_not_taken(monkeypatch):
    times = iter([2.0, 1.0] * 50)
    monkeypatch.setattr(deployment, "_time", lambda fn, rt, n=5: next(times))
    quick, report = faster(gpt())
    assert {c.choice for c in report.layers} == {"as before"}
    assert all(m.weight.is_contiguous() for m in quick.modules() if type(m) is nn.Linear)


def test_lay_out():
    W = torch.randn(3, 5)
    assert torch.equal(lay_out(W), W) and lay_out(W).stride() == (1, 3) and W.is_contiguous()


def test_norms_are_replaced_where_they_compute_the_same():
    for model, want in ((gpt(), 5), (llama(), 5), (llama("Gemma", head_dim=16), 0), (gpt(norm="layer"), 0)):
        quick, report = faster(model, kernels="int4")
        assert report.norms == want == sum(isinstance(m, FastRMSNorm) for m in quick.modules())
        assert torch.allclose(logits(quick, some_ids()), logits(model, some_ids()), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ arithmetic


def test_bytes_of_the_cache_are_those_of_a_cache():
    model = gpt()
    cache = KVCache(2)
    with torch.inference_mode():
        model(some_ids(3, 7), past_key_values=cache)
    assert cache_bytes(model.config, tokens=7, batch=3) == cache.bytes == 2 * 2 * 2 * 16 * 7 * 3 * 4
    assert cache_bytes(llama().config, tokens=7, batch=3, element=2) * 2 == cache.bytes


def test_the_cache_of_a_model_without_grouped_queries_and_of_none():
    how = dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**how)).eval()
    with torch.no_grad():
        past = model(some_ids(2, 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert cache_bytes(model.config, tokens=7, batch=2) == held
    with pytest.raises(BadInput, match="config is 'SimpleNamespace'; allowed: one that says n_layers or num_hidden"):
        cache_bytes(SimpleNamespace(hidden_size=64), tokens=1)
    for wrong in (dict(tokens=-1), dict(tokens=1, batch=0), dict(tokens=1, element=0), dict(tokens=1.5)):
        with pytest.raises(BadInput, match=f"{list(wrong)[-1]} is"):
            cache_bytes(model.config, **wrong)
    for wrong in (dict(tokens=0), dict(batch=-1), dict(past=-1)):
        with pytest.raises(BadInput):
            step_cost(gpt(), **wrong)


def test_the_cost_of_a_step():
    model, matrices = gpt(), 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    one = step_cost(model)
    assert one.flops == 2 * (matrices + 96 * 64) and one.weight_bytes == 4 * (matrices + 96 * 64)
    assert one.cache_bytes == 0 and one.intensity == 0.5
    eight = step_cost(model, batch=8, past=10)
    assert eight.flops == 8 * one.flops and eight.weight_bytes == one.weight_bytes
    assert eight.cache_bytes == cache_bytes(model.config, tokens=10, batch=8)
    prompt = step_cost(model, tokens=5)
    assert prompt.flops == 2 * (5 * matrices + 96 * 64)
    packed = pack_up(model, bits=4, group_size=32)
    parts = stored_bytes(packed)
    stored = sum(parts[k] for k in ("codes", "scales", "zero points")) + 96 * 64 + 96 * 2
    assert step_cost(packed).weight_bytes == stored and step_cost(packed).flops == one.flops
    if HERE is None:
        assert step_cost(faster(packed, **INT4)[0]) == step_cost(packed)


def test_the_roofline():
    m = Machine(bandwidth=10.0, peak=80.0)
    assert m.ridge == 8 and m.seconds(80, 1) == 1 and m.seconds(1, 10) == 1 and m.seconds(80, 10) == 1
    assert m.seconds(160, 10) == 2 and m.seconds(80, 30) == 3
    found = measure_machine(RT, megabytes=1, size=64, repeats=2)
    assert found.bandwidth > 0 and found.peak > 0
    with pytest.raises(BadInput, match="megabytes is 0"):
        measure_machine(RT, megabytes=0)


def test_the_house_model_is_served_too():
    model, _, _ = load_model("course-3m", rt=RT)
    packed = pack_up(model, group_size=64)
    quick, report = faster(packed, kernels="int4", most=64)
    ids = torch.arange(5, 29)[None]
    exact, got = logits(packed, ids), logits(quick, ids)
    assert (got - exact).pow(2).mean().sqrt() < 0.02 * exact.std()
    assert HERE is not None or "int4 kernel" in str(report)


# ------------------------------------------------------------------------------------------------ on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_the_product_on_a_gpu_is_within_the_rounding_of_bfloat16(bits, group):
    first, second = (packed_layer(bits, n, 512, group).cuda() for n in (32, 24))
    W = torch.cat([layer.dequantized().double() for layer in (first, second)])
    kernel = Kernel([first, second], most=100)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).cuda().bfloat16()
        want = x.double() @ W.T
        off = (kernel.product(x).double() - want).norm() / want.norm()
        assert off < 1e-2, (bits, group, rows, float(off))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_kernels_on_a_gpu(name):
    packed = MODELS[name]().cuda()
    quick, report = faster(packed, kernels="int4", most=10**6)
    assert any(c.choice == "int4 kernel" for c in report.layers), report
    ids = some_ids().cuda()
    want, got = logits(packed, ids), logits(quick, ids)
    assert float((got - want).abs().mean()) < 0.03 * float(want.std())
    home = quick.cpu()  # the kernel's own copy stays on the GPU, and is not asked for an input of the CPU
    torch.testing.assert_close(logits(home, ids.cpu()), want.cpu(), rtol=1e-3, atol=1e-4)
    measured, report = faster(packed)
    torch.testing.assert_close(logits(measured, ids), want, rtol=0.1, atol=0.1 * float(want.std()))


@pytest.mark.gpu
@needs_gpu
def test_a_recorded_step_with_kernels():
    from llmcourse.graphs import GraphDecoder, graph_generate

    quick, _ = faster(pack_up(gpt()).cuda(), kernels="int4")
    prompts = [[5, 6, 7], [8, 9]]
    plain, recorded = (GraphDecoder(quick, batch=2, capacity=40, recorder=r) for r in ("none", "graph"))
    for _ in range(2):
        want = graph_generate(plain, prompts, max_new_tokens=20, stop=[])
        assert graph_generate(recorded, prompts, max_new_tokens=20, stop=[]) == want

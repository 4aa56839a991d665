"""The compression interface on small models: statistics, the walk, what is written back, what is refused, the passport."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.compression import (
    AbsMax,
    FakeQuant,
    Hessian,
    LayerPass,
    LayerUpdate,
    Mask,
    Noise,
    QParams,
    RootMeanSquare,
    blocks_of,
    compress,
    count_parameters,
    flops_per_token,
    layer_error,
    mask_of,
    memory_bytes,
    passport,
    qparams_of,
    write_back,
)
from llmcourse.data import TokenData, load_model
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
    """Changes nothing but remembers what it was shown."""

    stat: ClassVar[type] = Hessian
    factor: float = 1.0
    seen: list = None

    def solve(self, W, stat, mask):
        self.seen.append((W.clone(), stat.value.clone(), stat.n, mask))
        return LayerUpdate(W * self.factor, mask)


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


def test_the_walk_shows_each_layer_the_input_that_it_really_gets(tiny, data):
    """The statistic of a layer equals one that is recorded while the whole changed model runs."""
    seen: list = []
    watch = Watch(factor=0.5, seen=seen, n_calib=3, seq_len=32)
    _, (report,) = compress(tiny, [watch], data, RT)
    names = [layer.name for layer in report.layers]
    assert len(names) == 14 and len(seen) == 14
    ids = data.calib_batch(3, 32, 0)
    # what the first layer of the second block sees, once the first block is changed
    half = copy.deepcopy(tiny)
    for name in names[:7]:
        half.get_submodule(name).weight.data.mul_(0.5)
    recorded = Hessian()
    handle = half.get_submodule(names[7]).register_forward_pre_hook(
        lambda m, a: recorded.add(a[0].reshape(-1, a[0].shape[-1]))
    )
    with torch.no_grad():
        half(ids)
    handle.remove()
    torch.testing.assert_close(seen[7][1], recorded.value, rtol=1e-4, atol=1e-5)
    assert seen[7][2] == 3 * 32 == recorded.n
    dense = Hessian()
    handle = tiny.get_submodule(names[7]).register_forward_pre_hook(
        lambda m, a: dense.add(a[0].reshape(-1, a[0].shape[-1]))
    )
    with torch.no_grad():
        tiny(ids)
    handle.remove()
    assert not torch.allclose(dense.value, recorded.value, rtol=1e-2)  # and that is not what the dense model shows


def test_compress_leaves_the_given_model_alone_and_keeps_tied_weights_tied(tiny, data):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    student, reports = compress(tiny, [Noise(energy=0.1)], data, RT)
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(layer.weight_error == pytest.approx(0.1, rel=1e-3) for layer in reports[0].layers)
    assert any(not torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_no_passes_give_an_equal_copy(tiny, data):
    student, reports = compress(tiny, [], data, RT)
    assert reports == [] and student is not tiny
    with torch.no_grad():
        assert torch.equal(student(data.test[None, :8]).logits, tiny(data.test[None, :8]).logits)


def test_a_later_pass_receives_the_mask_of_an_earlier_one(tiny, data):
    @dataclass(frozen=True, kw_only=True)
    class HalfOff(LayerPass):
        def solve(self, W, stat, mask):
            keep = torch.zeros_like(W, dtype=torch.bool)
            keep[:, ::2] = True
            return LayerUpdate(W * keep, keep)

    seen: list = []
    student, _ = compress(tiny, [HalfOff(), Watch(seen=seen, n_calib=2, seq_len=16)], data, RT)
    assert all(mask is not None and mask[:, ::2].all() and not mask[:, 1::2].any() for *_, mask in seen)
    layer = student.model.layers[0].self_attn.q_proj
    assert mask_of(layer) is not None and qparams_of(layer) is None and (layer.weight[:, 1::2] == 0).all()


def test_leaving_the_grid_is_refused():
    layer = nn.Linear(4, 2, bias=False)
    qparams = QParams(torch.ones(2, 1), torch.full((2, 1), 8.0), 4, 4, True)
    write_back(layer, LayerUpdate(layer.weight.detach(), None, qparams))
    assert qparams_of(layer) is not None and torch.equal(layer.weight, layer.weight.round())
    with pytest.raises(BadInput, match="prune first, quantize last"):
        write_back(layer, LayerUpdate(layer.weight.detach()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_weights_are_named_before_anything_changes(tiny, data, poison):
    broken = copy.deepcopy(tiny)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = poison
    first = broken.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj.*NaN or infinite"):
        Noise(energy=0.1)(broken, data, RT)
    assert torch.equal(first, broken.model.layers[0].self_attn.q_proj.weight)


def test_a_layer_that_cannot_be_treated_is_an_error_and_never_skipped(data):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), Odd())])
    with pytest.raises(BadInput, match=r"layers\.0\.1.*Odd.*never skips"):
        Noise().check(model)
    with pytest.raises(BadInput, match="list of blocks"):
        blocks_of(nn.Linear(2, 2))


def test_a_model_can_say_itself_where_its_blocks_are():
    class Says(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.ModuleList([nn.Linear(50, 50)])
            self.small = nn.ModuleList([nn.Linear(2, 2)])

        def compression_blocks(self):
            return self.small

    assert blocks_of(Says())[0] == "small"


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


def test_fake_quant_passes_the_gradient_straight_through():
    layer = nn.Linear(4, 2, bias=False)
    parametrize.register_parametrization(
        layer, "weight", FakeQuant(QParams(torch.full((2, 1), 0.1), torch.full((2, 1), 8.0), 4, 4, True))
    )
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, x.sum(0).expand(2, 4))


def test_the_passport_counts(tiny):
    card = passport("tiny", tiny, RT, prefill_tokens=16, repeats=2)
    unique = {p.data_ptr(): p.numel() for p in tiny.parameters()}
    assert card.parameters == sum(unique.values()) == count_parameters(tiny)[0]
    linear = sum(m.weight.numel() for m in tiny.modules() if isinstance(m, nn.Linear))
    assert card.flops_per_token == flops_per_token(tiny) == 2 * linear
    buffers = sum(b.untyped_storage().nbytes() for b in tiny.buffers())
    assert card.bytes_memory == memory_bytes(tiny) == 4 * card.parameters + buffers
    assert card.prefill.n == 2 and card.decode.n == 6 and card.to_dict()["prefill"]["n"] == 2


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
    cpu, gpu = [], []
    compress(tiny, [Watch(seen=cpu, n_calib=2, seq_len=16)], data, RT)
    compress(rt.move(copy.deepcopy(tiny)), [Watch(seen=gpu, n_calib=2, seq_len=16)], data, rt)
    for a, b in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(a[1], b[1].cpu(), rtol=1e-3, atol=1e-4)

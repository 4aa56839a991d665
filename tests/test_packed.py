"""Students as folders: what is saved loads back as the same classes, the same numbers and the same logits."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass

import pytest
import torch
import transformers
from archs import CAUSAL, OURS, build, ids, logits
from torch import nn

from llmcourse.adapters import adapter_for
from llmcourse.compression import ActQuant, LayerPass, LayerUpdate, Noise, compress, mask_of, qparams_of
from llmcourse.data import TokenData
from llmcourse.packed import PackedLinear, load_student, pack_model, save_student, stored_bytes
from llmcourse.quantization import GPTQ, RTN, EmbeddingRTN
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput

transformers.logging.set_verbosity_error()
RT = Runtime(device=torch.device("cpu"), dtype=torch.float32)
GRID = {"bits": 4, "group_size": 8, "n_calib": 2, "seq_len": 16}


@pytest.fixture(scope="module")
def data():
    stream = ids(1, 200, seed=5)[0]
    return TokenData(
        train=stream, val=stream, test=stream, calib=stream, bytes={}, name="random", tokenizer="none", separator=0
    )


@dataclass(frozen=True, kw_only=True)
class Magnitude(LayerPass):
    """Keeps the half of each row that is largest."""

    def solve(self, W, stats, mask):
        keep = W.abs() >= W.abs().median(1, keepdim=True).values
        return LayerUpdate(W * keep, keep)


@dataclass(frozen=True, kw_only=True)
class RoundInputs(LayerPass):
    def solve(self, W, stats, mask):
        return LayerUpdate(W, act=ActQuant(8))


def round_trip(student: nn.Module, folder) -> nn.Module:
    """Save and load; the logits must be equal to the last bit, and so must every stored tensor."""
    report = save_student(student, None, folder, rest_dtype=torch.float32)
    back = load_student(folder).model
    assert torch.equal(logits(back, ids()), logits(student, ids()))
    assert type(back) is type(student) and not back.training
    header = int.from_bytes((folder / "packed.safetensors").open("rb").read(8), "little")
    assert (folder / "packed.safetensors").stat().st_size - 8 - header == report["total"]
    return back


# every subset of these, in every order
STEPS = {
    "rtn": RTN(layers="*.self_attn.*", **GRID),
    "gptq": GPTQ(layers="*.mlp.*", **GRID),
    "mask": Magnitude(layers="*.layers.0.*, *.up_proj"),
    "noise": Noise(layers="*.down_proj", energy=0.01),
}
ORDERS = [order for k in range(5) for order in itertools.permutations(STEPS, k)]


@pytest.fixture(scope="module")
def small():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("first", ["", *STEPS])
def test_every_combination_and_order_of_passes_loads_back(small, data, tmp_path, first):
    """A pass that would leave quantized weights unquantized is refused; every other order is saved and loaded."""
    refused = saved = 0
    for order in [o for o in ORDERS if (o[0] if o else "") == first]:
        dense = {"mask", "noise"}
        late = [s for i, s in enumerate(order) if s in dense and {"rtn", "gptq"} & set(order[:i])]
        overlap = {("rtn", "mask"), ("gptq", "mask"), ("gptq", "noise")}
        wrong = any((q, s) in overlap for s in late for q in order[: order.index(s)])
        passes = [STEPS[s] for s in order] + [EmbeddingRTN()] * (len(order) % 2)
        if wrong:
            with pytest.raises(BadInput, match="prune first, quantize last"):
                compress(small, passes, data, RT)
            refused += 1
            continue
        student, _ = compress(small, passes, data, RT)
        back = round_trip(student, tmp_path / "-".join(("m", *order)))
        layer, loaded = student.model.layers[0].mlp.up_proj, back.model.layers[0].mlp.up_proj
        assert isinstance(loaded, PackedLinear) == ("gptq" in order)
        if "mask" in order:
            assert mask_of(layer) is not None and not loaded.weight[~mask_of(layer)].any()
            if "gptq" not in order:
                assert torch.equal(mask_of(loaded), mask_of(layer))
        assert (qparams_of(layer) is not None) == ("gptq" in order)
        saved += 1
    assert saved and (refused or first in ("", "noise", "mask"))


@pytest.mark.parametrize("name", [*OURS, *CAUSAL])
def test_every_architecture_loads_back_quantized(name, data, tmp_path):
    student, _ = compress(build(name), [RTN(**GRID)], data, RT)
    back = round_trip(student, tmp_path / "m")
    packed = [n for n, m in back.named_modules() if isinstance(m, PackedLinear)]
    adapter = adapter_for(student)
    assert set(packed) == {n for i in range(len(adapter.blocks())) for s in adapter.sites(i) for n in s.layers}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "ours", "ours, experts", "gemma3"])
def test_students_that_are_not_packed_load_back(name, data, tmp_path):
    round_trip(build(name), tmp_path / "dense")
    masked, _ = compress(build(name), [Magnitude()], data, RT)
    back = round_trip(masked, tmp_path / "masked")
    again, _ = compress(back, [RTN(**GRID)], data, RT)  # the mask is still there and is respected
    adapter = adapter_for(again)
    for layer in adapter.sites(0)[0].layers.values():
        assert mask_of(layer) is not None and not layer.weight[~mask_of(layer)].any()


def test_rounded_inputs_are_saved_with_dense_and_packed_layers(data, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Both(RTN):
        name = ""

        def solve(self, W, stats, mask):
            found = super().solve(W, stats, mask)
            return LayerUpdate(found.weight, found.mask, found.qparams, ActQuant(8, torch.tensor([0.05])))

    model = build("llama")
    student, _ = compress(model, [Both(layers="*.mlp.*", **GRID), RoundInputs(layers="*.self_attn.*")], data, RT)
    back = round_trip(student, tmp_path / "m")
    assert back.model.layers[0].mlp.up_proj.input_quant.scale.item() == pytest.approx(0.05)
    assert back.model.layers[0].self_attn.q_proj.input_quant.scale is None
    packed = pack_model(student)
    assert torch.equal(logits(packed, ids()), logits(student, ids()))
    assert not torch.equal(logits(student, ids()), logits(compress(model, [RTN(**GRID)], data, RT)[0], ids()))


@pytest.mark.parametrize("name", [*CAUSAL, *OURS])
def test_loading_fills_no_tensor_with_numbers_that_are_thrown_away(name, data, tmp_path, monkeypatch):
    save_student(compress(build(name), [RTN(**GRID)], data, RT)[0], None, tmp_path)
    drawn = []
    for fill in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, f"_no_grad_{fill}", lambda *args, **kw: drawn.append(args))
    state = torch.random.get_rng_state()
    load_student(tmp_path)
    assert not drawn
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_smaller_student_loads_back(tmp_path):
    model = build("llama")
    keep = torch.tensor([j for j in range(48) if j % 3])
    adapter = adapter_for(model)
    for i in range(len(adapter.blocks())):
        dim = next(d for d in adapter.dims(i) if d.name == "channels")
        dim.keep(keep)
    with pytest.raises(BadInput, match="shape of"):  # the configuration still says the old size
        save_student(model, None, tmp_path / "wrong")
    assert not any((tmp_path / "wrong").iterdir())
    for field, each in dim.fields.items():
        setattr(model.config, field, getattr(model.config, field) - each * (48 - len(keep)))
    round_trip(model, tmp_path / "m")


def test_what_would_not_load_back_is_refused_before_it_is_there(tmp_path):
    class Own(transformers.LlamaForCausalLM):
        pass

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = build("llama")
    other = Own(base.config)
    swapped = copy.deepcopy(base)
    swapped.model.layers[0].mlp.up_proj = Twice(32, 48, bias=False)
    hooked = copy.deepcopy(base)
    hooked.model.layers[0].register_forward_hook(lambda m, a, out: out * 1.1)
    for model, sentence in (
        (other, "model is 'Own'"),
        (swapped, "module 'model.layers.0.mlp.up_proj' that does not load back"),
        (hooked, "computes the same after loading"),
        (nn.Sequential(nn.Linear(2, 2)), "model is 'Sequential'"),
    ):
        with pytest.raises(BadInput) as caught:
            save_student(model, None, tmp_path / "m")
        assert sentence in str(caught.value)
        assert not (tmp_path / "m").exists() or not any((tmp_path / "m").iterdir())


def test_masks_take_one_bit_for_each_weight(data, tmp_path):
    model = build("llama")
    masked, _ = compress(model, [Magnitude()], data, RT)
    sizes = save_student(masked, None, tmp_path / "m")
    weights = sum(layer.numel() for n, layer in model.named_parameters() if "layers" in n and layer.ndim == 2)
    assert sizes["masks"] == weights // 8 and sizes["dense linears"] == 2 * (weights + 96 * 32)
    assert sizes == stored_bytes(masked, torch.bfloat16)


def test_the_model_that_is_saved_is_not_changed(data, tmp_path):
    student, _ = compress(build("llama"), [Magnitude(), RTN(**GRID)], data, RT)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    save_student(student, None, tmp_path / "m")
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_second_save_replaces_the_first_and_leaves_other_files(data, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    round_trip(build("llama"), tmp_path / "m")
    round_trip(build("llama", seed=1), tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert "notes.txt" not in json.loads((tmp_path / "m" / "MANIFEST.json").read_text())["files"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]

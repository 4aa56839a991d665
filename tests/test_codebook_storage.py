"""Weights on a table of values: a layer of few bytes that computes the same, folders, old folders, damaged folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from archs import build, ids, logits, random_text
from safetensors.torch import load_file, save_file
from torch import nn

from llmcourse.adapters import adapter_for
from llmcourse.compression import Codebook, LayerUpdate, compress, disk_bytes, mask_of, passport, qparams_of, write_back
from llmcourse.evaluator import weight_bytes
from llmcourse.lowbit import NF4, Binary, Ternary, normal_float, pack_trits
from llmcourse.packed import (
    CodebookLinear,
    PackedLinear,
    dequantize_model,
    digits_per_byte,
    load_student,
    pack_digits,
    pack_model,
    save_student,
    stored_bytes,
)
from llmcourse.pruning import Magnitude
from llmcourse.quantization import RTN, pack, pack_bits
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.store import write_manifest

RT = Runtime.auto("cpu", "float32")
OLD = Path(__file__).parent / "folders" / "student_v2"
METHODS = {
    "nf4": (NF4(group_size=8), 16),
    "equal steps, by row": (NF4(values="uniform", group_size="channel"), 16),
    "binary": (Binary(), 2),
    "binary, groups": (Binary(group_size=16), 2),
    "ternary": (Ternary(), 3),
    "ternary, one scale": (Ternary(group_size="tensor"), 3),
}


def dice(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(rows: int, columns: int, levels: int, groups: int) -> int:
    """By hand: codes, a float16 for each scale, a float32 for each value of the table."""
    per_byte = {2: 8, 3: 5, 16: 2}[levels]
    return rows * math.ceil(columns / per_byte) + 2 * groups + 4 * levels


# ---------------------------------------------------------------- a layer


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 7, 16, 17, 256])
@pytest.mark.parametrize(("columns", "width"), [(48, 8), (35, 5), (7, 7), (1, 1)])
@pytest.mark.parametrize("scale_rows", [1, 6])
def test_a_packed_layer_has_the_weights_of_its_codes_to_the_last_bit(levels, columns, width, scale_rows):
    values = dice(levels, seed=levels).sort().values
    table = Codebook(dice(scale_rows, columns // width).abs().half().float(), values, width)
    W = table.fake_quantize(3 * dice(6, columns, seed=1))
    layer = CodebookLinear.from_weight(W, table, bias=dice(6))
    assert torch.equal(layer.dequantized(), W) and torch.equal(layer.weight, W)
    x = dice(2, 5, columns, seed=2)
    assert torch.equal(layer(x), nn.functional.linear(x, W, dice(6)))
    assert layer.codes.shape[1] == math.ceil(columns / digits_per_byte(levels))
    assert layer.passport_counts() == (W.numel() + 6, int(W.count_nonzero()) + 6)


def test_the_digits_of_a_byte_are_the_bits_and_the_trits_of_the_chapters():
    for levels, there in ((2, lambda c: pack_bits(c, 1)), (16, lambda c: pack(c, 4)), (256, lambda c: pack(c, 8))):
        codes = torch.randint(0, levels, (3, 21), generator=torch.Generator().manual_seed(levels), dtype=torch.uint8)
        assert torch.equal(pack_digits(codes, levels), there(codes))
    codes = torch.randint(0, 3, (4, 21), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack_digits(codes, 3), torch.stack([pack_trits(row.int() - 1) for row in codes]))
    assert [digits_per_byte(n) for n in (2, 3, 4, 6, 7, 16, 17, 256)] == [8, 5, 4, 3, 2, 2, 1, 1]


def test_a_group_of_zeros_stays_zero_with_two_values_as_well():
    W = dice(4, 16)
    W[1], W[2, :8] = 0, 0
    layer = nn.Linear(16, 4, bias=False)
    write_back(layer, Binary(group_size=8).solve(W, {}, None))
    packed = pack_model(nn.Sequential(layer))[0]
    assert torch.equal(packed.weight, layer.weight) and not packed.weight[1].any() and not packed.weight[2, :8].any()


def test_another_number_format_moves_no_weight():
    table = Codebook(dice(4, 2).abs().half().float(), normal_float(), 8)
    W = table.fake_quantize(dice(4, 16))
    layer = CodebookLinear.from_weight(W, table)
    before = layer.dequantized()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer = layer.to(dtype)
        assert torch.equal(layer.dequantized(), before) and layer.weight.dtype == dtype
        assert layer(dice(2, 16).to(dtype)).dtype == dtype


# ---------------------------------------------------------------- models and folders


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2", "llama, biases", "mixtral"])
@pytest.mark.parametrize("how", METHODS)
def test_a_student_is_small_and_loads_back_with_equal_logits(name, how, tmp_path):
    method, levels = METHODS[how]
    student, (report,) = compress(build(name), [method], None, None)
    expected = logits(student, ids())
    packed = pack_model(student)
    assert torch.equal(logits(packed, ids()), expected)
    sizes = save_student(student, None, tmp_path / "m", rest_dtype=torch.float32)
    back = load_student(tmp_path / "m").model
    assert torch.equal(logits(back, ids()), expected)
    assert torch.equal(logits(load_student(tmp_path / "m", dequantize=True).model, ids()), expected)
    layers = {n: m for n, m in back.named_modules() if isinstance(m, CodebookLinear)}
    assert set(layers) == {layer.name for layer in report.layers}
    for m in layers.values():
        assert m.nbytes - 4 * (0 if m.bias is None else m.rows) == bytes_of(m.rows, m.columns, levels, m.scale.numel())
    # the passport speaks of the packed form: on disk by the file, in memory by the tensors
    header = int.from_bytes((tmp_path / "m" / "packed.safetensors").open("rb").read(8), "little")
    card = passport(name, back, RT, folder=tmp_path / "m")
    assert card.bytes_disk == disk_bytes(tmp_path / "m") == sizes["total"] + 8 + header
    dense = passport(name, dequantize_model(back), RT)
    assert (card.parameters, card.nonzeros, card.flops_per_token) == (
        dense.parameters, dense.nonzeros, dense.flops_per_token
    )  # fmt: skip
    saved = sum(4 * m.rows * m.columns - m.nbytes + 4 * (0 if m.bias is None else m.rows) for m in layers.values())
    assert card.bytes_memory == weight_bytes(back) == dense.bytes_memory - saved
    assert stored_bytes(back, torch.float32) == sizes


@pytest.mark.parametrize("method", [NF4(group_size=8), Ternary(), Ternary(group_size=8, rule="absmean")])
def test_what_was_pruned_stays_pruned(method, tmp_path):
    student, _ = compress(build("llama"), [Magnitude(sparsity=0.5), method], None, None)
    save_student(student, None, tmp_path / "m", rest_dtype=torch.float32)
    back = load_student(tmp_path / "m").model
    for name, layer in student.named_modules():
        if (mask := mask_of(layer)) is not None:
            assert not mask.all() and not back.get_submodule(name).weight[~mask].any(), name
    assert torch.equal(logits(back, ids()), logits(student, ids()))


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_each_layer_keeps_its_own_precision(name, tmp_path):
    model = build(name)
    up, down = (f"*.{n}" for n in (("ffn.up", "ffn.down") if name == "ours" else ("mlp.up_proj", "mlp.down_proj")))
    q, k, v = (f"*.{n}" for n in (("attn.q", "attn.k", "attn.v") if name == "ours" else ("q_proj", "k_proj", "v_proj")))
    passes = [
        Magnitude(sparsity=0.5, layers=down),
        NF4(group_size=8, layers=q), RTN(bits=3, group_size=8, layers=k), Binary(layers=v), Ternary(layers=up),
    ]  # fmt: skip
    student, _ = compress(model, passes, None, None)
    save_student(student, None, tmp_path / "m", rest_dtype=torch.float32)
    back = load_student(tmp_path / "m").model
    assert torch.equal(logits(back, ids()), logits(student, ids()))
    block = dict(adapter_for(model).blocks())
    first = next(iter(block))
    kind = lambda glob: back.get_submodule(first + glob.replace("*", "", 1).replace(".q_proj", ".self_attn.q_proj")
                                           .replace(".k_proj", ".self_attn.k_proj")
                                           .replace(".v_proj", ".self_attn.v_proj"))  # fmt: skip
    assert [getattr(kind(g), "levels", None) for g in (q, v, up)] == [16, 2, 3]
    assert isinstance(kind(k), PackedLinear) and kind(k).bits == 3
    assert isinstance(kind(down), nn.Linear) and mask_of(kind(down)) is not None
    again = load_student(tmp_path / "m").model
    save_student(again, None, tmp_path / "again", rest_dtype=torch.float32)  # a loaded one is saved as it is
    first_file, second_file = (load_file(tmp_path / n / "packed.safetensors") for n in ("m", "again"))
    assert first_file.keys() == second_file.keys()
    assert all(torch.equal(t, second_file[n]) for n, t in first_file.items())


@pytest.mark.parametrize("how", ["nf4", "binary", "ternary", "a grid"])
def test_in_sixteen_bits_too(how, tmp_path):
    """Also with biases, which are made in the format that a folder is loaded in."""
    model = build("gpt2").to(torch.bfloat16)  # no table of angles, which `to` would round as well
    method = RTN(bits=4, group_size=8) if how == "a grid" else METHODS[how][0]
    student, _ = compress(model, [method], None, None)
    expected = logits(student, ids())
    assert torch.equal(logits(pack_model(student), ids()), expected)
    save_student(student, None, tmp_path / "m")
    assert torch.equal(logits(load_student(tmp_path / "m", dtype=torch.bfloat16).model, ids()), expected)


@pytest.mark.parametrize("how", ["nf4", "binary", "ternary, one scale"])
def test_finished_blocks_are_taken_up_again(how, tmp_path):
    model, data, method = build("llama"), random_text(), METHODS[how][0]
    whole, _ = compress(model, [method], data, RT, checkpoint=tmp_path / "a")
    for file in sorted((tmp_path / "a").rglob("block-0001*")):
        file.unlink()
    resumed, _ = compress(model, [method], data, RT, checkpoint=tmp_path / "a")
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())
    for a, b in zip(whole.modules(), resumed.modules(), strict=True):
        if (q := qparams_of(a)) is not None:
            assert torch.equal(q.values, qparams_of(b).values) and torch.equal(q.scale, qparams_of(b).scale)


def test_an_embedding_has_no_table(tmp_path):
    model = build("llama")
    table = model.get_input_embeddings()
    write_back(table, LayerUpdate(table.weight.detach().clone(), None, Codebook(torch.ones(96, 1), normal_float(), 32)))
    with pytest.raises(BadInput, match=r"quantized layer model\.embed_tokens"):
        save_student(model, None, tmp_path / "m")
    assert not (tmp_path / "m").exists() or not any((tmp_path / "m").iterdir())


@pytest.mark.parametrize(
    "values", [[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [-1.0, math.nan], [0.0, math.inf], [1.0], [[0.0, 1.0]]]
)
def test_a_table_that_does_not_ascend_is_refused(values):
    """Its codes would be found, and stand for other weights: the borders between neighbors are searched in order."""
    with pytest.raises(BadInput, match=r"values is .*; allowed: 2 to 256 ascending numbers") as caught:
        Codebook(torch.ones(4, 1), torch.tensor(values), 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_read_in_every_format(folder, dtype):
    model, exact = load_student(folder, dtype=dtype).model, load_student(folder).model
    assert logits(model, ids()).dtype == dtype
    for name, layer in exact.named_modules():
        if isinstance(layer, CodebookLinear):  # no packed weight moves
            assert torch.equal(model.get_submodule(name).dequantized(), layer.dequantized())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16", None])
def test_a_format_that_is_none_is_refused(folder, dtype):
    with pytest.raises(BadInput, match=r"dtype is .*; allowed: torch.float32"):
        load_student(folder, dtype=dtype)


def test_a_scale_that_float16_does_not_hold_is_refused():
    table = Codebook(torch.full((4, 1), 1 + 2.0**-20), normal_float(), 16)
    with pytest.raises(BadInput, match="not exact in float16"):
        CodebookLinear.from_weight(table.fake_quantize(dice(4, 16)), table)


# ---------------------------------------------------------------- old and damaged folders


def test_a_folder_of_the_version_before_loads_as_it_was():
    """Written before there were tables: two and three values are codes of 2 bits there."""
    config = json.loads((OLD / "config.json").read_text(encoding="utf8"))
    assert config["quantization_config"]["version"] == 2
    kept = load_file(OLD.parent / "student_v2_logits.safetensors")
    model = load_student(OLD).model
    assert torch.equal(logits(model, kept["ids"]), kept["logits"])
    assert isinstance(model.blocks[0].attn.q, PackedLinear) and model.blocks[0].attn.q.bits == 2


def _layer(config: dict) -> dict:
    return next(v for v in config["quantization_config"]["layers"].values() if v["kind"] == "CodebookLinear")


def _values(tensors: dict, change) -> None:
    name = next(n for n in tensors if n.endswith(".values"))
    tensors[name] = change(tensors[name].clone())


DAMAGE = {
    "a kind that is not known": (lambda c, t: _layer(c).update(kind="TableLinear"), "is 'TableLinear'; allowed: "),
    "a version that is not known": (lambda c, t: c["quantization_config"].update(version=4), "version is 4; allowed: "),
    "one value": (lambda c, t: _layer(c).update(levels=1), "levels is 1; allowed: "),
    "too many values": (lambda c, t: _layer(c).update(levels=257), "levels is 257; allowed: "),
    "no number of values": (lambda c, t: _layer(c).pop("levels"), "allowed: what save_student writes"),
    "a word for it": (lambda c, t: _layer(c).update(levels="nf4"), "levels is 'nf4'; allowed: "),
    "an entry too many": (lambda c, t: _layer(c).update(offset=3), "allowed: what save_student writes"),
    "another number of values": (lambda c, t: _layer(c).update(levels=15), "shape of "),
    "a group that does not fit": (lambda c, t: _layer(c).update(group_size=7), "group_size is 7; allowed: "),
    "values out of order": (lambda c, t: _values(t, lambda v: v.flip(0)), "16 finite numbers that ascend"),
    "a value twice": (lambda c, t: _values(t, lambda v: v.index_fill(0, torch.tensor([3]), v[2])), "that ascend"),
    "a value that is none": (lambda c, t: _values(t, lambda v: v.index_fill(0, torch.tensor([3]), math.nan)), "finite"),
    "a short table": (lambda c, t: _values(t, lambda v: v[:15]), "shape of "),
    "no table": (lambda c, t: t.pop(next(n for n in t if n.endswith(".values"))), "has no partner"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("nf4") / "m"
    save_student(compress(build("ours"), [NF4(group_size=8)], None, None)[0], None, where)
    return where


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_that_is_unknown_or_damaged_is_one_sentence(folder, tmp_path, damage):
    change, words = DAMAGE[damage]
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    tensors = load_file(folder / "packed.safetensors")
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf8")
    save_file(tensors, tmp_path / "packed.safetensors", metadata={"format": "pt"})
    write_manifest(tmp_path)  # a folder that says of itself that it is whole
    with pytest.raises(BadInput) as caught:
        load_student(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_byte_that_has_changed_is_found_by_the_digest(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = bytearray((tmp_path / "packed.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "packed.safetensors").write_bytes(bytes(raw))
    with pytest.raises(BadInput, match="so copy or make it again"):
        load_student(tmp_path)

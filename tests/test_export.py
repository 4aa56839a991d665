"""Exports: what the other program reads is what the student was, to the last bit where the format allows it."""

from __future__ import annotations

import importlib.util
import json

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from typer.testing import CliRunner

from llmcourse import export, portable
from llmcourse.cli import app
from llmcourse.compression import ActQuant, LayerPass, LayerUpdate, compress
from llmcourse.export import Grid, gguf_blocks, gguf_type, interleaved, stored_parts, unwords, words
from llmcourse.model import GPT, GPTConfig
from llmcourse.packed import PackedLinear, dequantize_model, pack_model, save_student
from llmcourse.portable import export_student, load_compressed, load_gguf
from llmcourse.pruning import Magnitude
from llmcourse.quantization import RTN, EmbeddingRTN, rtn
from llmcourse.settings import BadInput

HAS_CT = importlib.util.find_spec("compressed_tensors") is not None
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
needs_ct = pytest.mark.skipif(not HAS_CT, reason="the package compressed-tensors is missing")
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx or onnxruntime is missing")
TARGETS = ["gguf", pytest.param("compressed-tensors", marks=needs_ct), pytest.param("onnx", marks=needs_onnx)]
SYMMETRIC = RTN(bits=4, group_size=32, symmetric=True)
ZEROS = RTN(bits=4, group_size=32)


VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with a few dozen merges."""
    cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    small = tokenizers.Tokenizer(tokenizers.models.BPE())
    small.pre_tokenizer, small.decoder = cut, tokenizers.decoders.ByteLevel()
    how = dict(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=cut.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(**how, show_progress=False)
    small.train_from_iterator(["the state of the union is what the people of the state make of it"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=small, eos_token="<|endoftext|>")


def llama(tied: bool = True, **shape) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    how = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    how |= dict(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.1, bos_token_id=None)
    how |= dict(tie_word_embeddings=tied, eos_token_id=0, rope_theta=500.0) | shape
    config = transformers.LlamaConfig(**how)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():  # norms that are not all 1
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    return model


def gpt(tied: bool = True) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, context=64)
    return GPT(GPTConfig(**shape, tied=tied, init_std=0.1)).eval()


def layer_norms() -> GPT:
    return GPT(GPTConfig(vocab_size=VOCABULARY, d_model=32, n_heads=2, n_layers=1, d_ff=64, norm="layer"))


def student(model, *passes):
    return pack_model(compress(model, list(passes), None, None)[0])


def answers(model, n: int = 24):
    """Logits of one text (1, n, V)."""
    ids = torch.arange(n)[None] * 131 % VOCABULARY
    with torch.no_grad():
        return getattr(out := model(ids), "logits", out)


def loaded(folder, to: str):
    """What the other program makes of the folder."""
    if to == "onnx":
        return export.OnnxLlama(folder, level="exact")
    return load_compressed(folder) if to == "compressed-tensors" else load_gguf(folder)[0]


# ---------------------------------------------------------------------------------------------- layouts


def grid(bits: int, symmetric: bool, rows: int = 6, columns: int = 96, group: int = 32) -> Grid:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    q = rtn(W, bits=bits, group_size=group, symmetric=symmetric).qparams
    return Grid(q.quantize(W), q.scale, q.zero, bits, symmetric)


def test_a_block_by_hand():
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    block = gguf_blocks(Grid(codes, torch.tensor([[2.0]]), torch.tensor([[8.0]]), 4, True), "Q4_0")[0]
    assert block[:2].tobytes() == np.float16(2).tobytes()
    assert block[2:].tolist() == [j | j << 4 for j in range(16)]  # column j beside column j + 16
    assert words(codes[:, :8], 4).tolist() == [[0x76543210]]  # column j beside column j + 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_gguf_reads_is_the_grid(bits, symmetric):
    g = grid(bits, symmetric)
    for exact in (False, True):
        if bits == 8 and not symmetric:
            with pytest.raises(BadInput, match="codes minus zero points is"):
                gguf_type(g, exact=exact)
            continue
        kind = gguf_type(g, exact=exact)
        assert kind == ("Q8_0" if bits > 4 or (exact and not symmetric) else "Q4_0" if symmetric else "Q4_1")
        back = gguf.quants.dequantize(gguf_blocks(g, kind), gguf.GGMLQuantizationType[kind])
        gap = np.abs(back - g.weight().numpy()).max()
        assert gap == 0 if kind != "Q4_1" else (gap > 0 or bits < 4) and gap < 2e-3 * float(g.weight().abs().max())


@pytest.mark.parametrize(("bits", "n"), [(2, 48), (4, 13), (8, 7), (4, 8)])
def test_words_are_the_ones_of_compressed_tensors(bits, n):
    codes = torch.randint(0, 2**bits, (5, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(unwords(words(codes, bits), bits, n), codes)
    if HAS_CT:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        signed = (codes.short() - 2 ** (bits - 1)).to(torch.int8)
        theirs = pack_to_int32(signed, bits)
        assert words(codes, bits).shape == theirs.shape
        assert torch.equal(unwords(theirs, bits, n), codes)


def test_the_rows_of_a_head_are_interleaved():
    order = interleaved(torch.arange(16)[:, None], heads=2)[:, 0].tolist()
    assert order == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


# ---------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("model", [llama, gpt])
@pytest.mark.parametrize("tied", [True, False])
def test_the_other_program_answers_alike(tmp_path, tokenizer, to, model, tied):
    packed = student(model(tied), SYMMETRIC, EmbeddingRTN())
    before = {k: v.clone() for k, v in packed.state_dict().items()}
    found = export_student(packed, tokenizer, tmp_path / "out", to=to)
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(dequantize_model(packed))
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
    assert float(ours.std()) > 0.1  # not the agreement of two models that answer nothing
    assert all(torch.equal(v, packed.state_dict()[k]) for k, v in before.items())
    assert found.weight_error in (0, None) and found.bytes == sum(f.stat().st_size for f in found.folder.iterdir())


@pytest.mark.parametrize("to", TARGETS)
def test_zero_points(tmp_path, tokenizer, to):
    packed = student(llama(), ZEROS, EmbeddingRTN())
    found = export_student(packed, tokenizer, tmp_path / "out", to=to)
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(dequantize_model(packed))
    gap, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    if to == "gguf":
        assert 0 < found.weight_error < 1e-3 and found.forms["Q4_1"] == 14 and 0 < gap < 0.01 * largest
        assert any("rounded once more" in note for note in found.notes)
        exact = export_student(packed, tokenizer, tmp_path / "exact", to=to, exact=True)
        assert exact.weight_error == 0 and exact.forms["Q8_0"] == 15 and exact.bytes > found.bytes
        assert torch.equal(answers(load_gguf(tmp_path / "exact")[0]), ours)
    else:
        assert gap <= 1e-4 * largest


@pytest.mark.parametrize("to", TARGETS)
def test_layers_of_different_grids_and_dense_ones(tmp_path, tokenizer, to):
    """q in 8 bits and k, v in 4; gate in groups of 16·2; the second block stays as it is."""
    packed = student(
        llama(),
        RTN(bits=8, group_size="channel", symmetric=True, layers="*.0.self_attn.q_proj"),
        RTN(bits=4, group_size=32, symmetric=True, layers="*.0.self_attn.[kv]_proj"),
        RTN(bits=4, group_size=64, symmetric=True, layers="*.0.mlp.gate_proj"),
    )
    export_student(packed, tokenizer, tmp_path / "out", to=to)
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(dequantize_model(packed))
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("to", TARGETS)
def test_masks_are_baked_in(tmp_path, tokenizer, to):
    masked = compress(llama(), [Magnitude(sparsity=0.5), SYMMETRIC], None, None)[0]
    zeros = float((masked.model.layers[0].mlp.up_proj.weight == 0).float().mean())
    export_student(masked, tokenizer, tmp_path / "out", to=to)
    assert zeros >= 0.5
    parts = stored_parts(masked)
    assert float((parts["model.layers.0.mlp.up_proj.weight"].weight() == 0).float().mean()) == zeros
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(masked)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("to", TARGETS)
def test_a_layer_on_a_table_of_values_becomes_dense(tmp_path, tokenizer, to):
    class OnTable(torch.nn.Module):
        """As a layer packed on a codebook: no `weight` parameter, but values that can be computed."""

        def __init__(self, W):
            super().__init__()
            self.register_buffer("codes", (W > 0).to(torch.uint8))
            self.linear_shape = tuple(W.shape)

        def dequantized(self):
            return self.codes.float() * 0.4 - 0.2

        def forward(self, x):
            return x @ self.dequantized().T

    packed = student(llama(), RTN(bits=4, group_size=32, symmetric=True, layers="*.0.*"))
    packed.model.layers[1].mlp.down_proj = OnTable(packed.model.layers[1].mlp.down_proj.weight)
    found = export_student(packed, tokenizer, tmp_path / "out", to=to)
    assert any("1 of the matrices on a table" in note for note in found.notes)
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(packed)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_a_gguf_brings_its_tokenizer(tmp_path, tokenizer):
    packed = student(llama(), SYMMETRIC)
    export_student(packed, tokenizer, tmp_path / "out", to="gguf")
    model, theirs = load_gguf(tmp_path / "out")
    text = "In 1984 it's   not\n\n what you'd think: naïve 東京 <|endoftext|>x"
    assert theirs(text).input_ids == tokenizer(text).input_ids and theirs.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("The state of").input_ids])
    ours = dequantize_model(packed)
    how = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, **how), ours.generate(ids, **how))
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert not reader.fields["tokenizer.ggml.add_bos_token"].contents()


@needs_onnx
def test_onnx_writes_what_the_model_writes(tmp_path, tokenizer):
    packed = student(llama(), SYMMETRIC, EmbeddingRTN())
    export_student(packed, tokenizer, tmp_path / "out", to="onnx")
    ours, exact = dequantize_model(packed), export.OnnxLlama(tmp_path / "out", level="exact")
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    expected = ours.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(exact.generate(ids, 9, stop=()), expected)
    # through a cache, in pieces, as at once
    for rows, cuts in ((ids[:1], (4, 1, 2)), (ids, (5, 1, 1))):
        cache = export.OnnxCache(exact, len(rows), 7)
        pieces = torch.cat([exact(piece, cache) for piece in rows.split(cuts, 1)], 1)
        assert torch.allclose(pieces, exact(rows), rtol=0, atol=1e-4 * float(pieces.abs().max()))
    cache = export.OnnxCache(exact, 3, 7)
    exact(ids[:, :4], cache)
    with pytest.raises(BadInput, match="ids behind a cache"):
        exact(ids[:, 4:], cache)
    # the end of a text
    stop = int(expected[0, 8])
    assert exact.generate(ids[:1], 9, stop=[stop]).shape[1] <= 9
    with pytest.raises(BadInput, match="ids is"):
        exact(ids, export.OnnxCache(exact, 3, 6))


@needs_onnx
def test_the_fast_level_differs_and_the_weights_lie_in_one_file(tmp_path, tokenizer):
    packed = student(llama(), SYMMETRIC, EmbeddingRTN())
    export_student(packed, tokenizer, tmp_path / "out", to="onnx")
    ours = answers(dequantize_model(packed))
    fast = answers(export.OnnxLlama(tmp_path / "out", level="fast"))
    gap = float((fast - ours).abs().max() / ours.abs().max())
    assert 1e-4 < gap < 0.2
    # embedding and head are one matrix, stored once
    size = (tmp_path / "out" / "weights.bin").stat().st_size
    linears = sum(p.numel() for n, p in packed.named_buffers() if n.endswith("codes") and "layers" in n)
    scales = sum(4 * p.numel() for n, p in packed.named_buffers() if n.endswith("scale") and "layers" in n)
    table = VOCABULARY * 64
    assert linears + scales + table < size < linears + scales + 1.6 * table


# ---------------------------------------------------------------------------------------------- refusals


class RoundInputs(LayerPass):
    def solve(self, W, stats, mask):
        return LayerUpdate(W, act=ActQuant(8))


CANNOT = [
    ("gguf", lambda: student(llama(), RTN(bits=8, group_size=32)), "symmetric = true"),
    ("gguf", lambda: student(llama(), RTN(bits=4, group_size=16, symmetric=True)), "a multiple of 32"),
    ("compressed-tensors", lambda: student(llama(), RTN(bits=3, group_size=32, symmetric=True)), "bits is 3"),
    ("gguf", llama, "quantize it first"),
    ("compressed-tensors", llama, "quantize it first"),
    ("gguf", lambda: compress(llama(), [RoundInputs(), SYMMETRIC], None, None)[0], "rounds or turns"),
    ("gguf", lambda: student(llama(attention_bias=True), SYMMETRIC), "attention_bias"),
    ("gguf", lambda: student(layer_norms(), SYMMETRIC), "norm is 'layer'"),
]
CANNOT_ONNX = [
    ("onnx", lambda: student(llama(), RTN(bits=3, group_size=32, symmetric=True)), "2, 4 or 8, which MatMulNBits"),
    ("onnx", lambda: student(llama(), RTN(bits=4, group_size=8, symmetric=True)), "a multiple of 16"),
]


def one_sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".") and "Traceback" not in text


@pytest.mark.parametrize(("to", "make", "said"), CANNOT + [pytest.param(*row, marks=needs_onnx) for row in CANNOT_ONNX])
def test_a_grid_that_a_format_cannot_hold(tmp_path, tokenizer, to, make, said):
    with pytest.raises(BadInput, match=said) as e:
        export_student(make(), tokenizer, tmp_path / "out", to=to)
    assert one_sentence(str(e.value)) and not list(tmp_path.iterdir())


def test_gguf_wants_a_byte_level_tokenizer(tmp_path):
    with pytest.raises(BadInput, match="byte-level BPE"):
        export_student(student(llama(), SYMMETRIC), None, tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("how", ["turned", "a bit", "not a number"])
def test_what_does_not_read_back_is_not_kept(tmp_path, tokenizer, monkeypatch, how):
    right = export.gguf_blocks
    wrong = {
        "turned": lambda b: b[:, ::-1].copy(),
        "a bit": lambda b: b ^ np.uint8(4),
        "not a number": lambda b: b | 124,
    }[how]
    monkeypatch.setattr(export, "gguf_blocks", lambda grid, kind: wrong(right(grid, kind)))
    with pytest.raises(BadInput, match="difference of a weight"):
        export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_a_graph_that_computes_something_else_is_not_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(export, "onnx_block", lambda grid: 16)  # right, ...
    packed = student(llama(), SYMMETRIC)
    export_student(packed, tokenizer, tmp_path / "right", to="onnx")
    monkeypatch.setattr(export, "pack", lambda codes, bits: PackedLinear.__init__ and codes[..., ::2] * 17)  # ... wrong
    with pytest.raises(BadInput, match="difference of a logit"):
        export_student(packed, tokenizer, tmp_path / "out", to="onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["right"]


def test_what_the_other_program_says_becomes_a_sentence(tmp_path, tokenizer, monkeypatch):
    def broken(self, folder):
        raise RuntimeError("no such\n operator")

    monkeypatch.setattr(portable._GGUF, "read_back", broken)
    with pytest.raises(BadInput, match="what was written for gguf could not be loaded: no such operator") as e:
        export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="gguf")
    assert one_sentence(str(e.value)) and not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(portable.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'llmcourse\[export\]' brings onnx"):
        export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="onnx")
    found = export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="compressed-tensors")
    assert found.logit_error is None and any("not loaded with transformers" in note for note in found.notes)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("saved") / "student"
    save_student(compress(llama(), [SYMMETRIC, EmbeddingRTN()], None, None)[0], tokenizer, path)
    return path


def test_the_command(tmp_path, folder):
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    assert "14 Q4_0, 1 Q8_0" in done.output and "largest difference of a weight 0.0e+00" in done.output
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"model.gguf", "MANIFEST.json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{folder} --to awq --out {tmp}/out", "to is 'awq'; allowed: compressed-tensors, gguf, onnx"),
        ("{tmp}/nothing --to gguf --out {tmp}/out", "a folder written by save_student"),
        ("{tmp} --to gguf --out {tmp}/out", "a folder with config.json, which is missing"),
        ("smollm2-135m --to gguf --out {tmp}/out", "a folder written by save_student"),
        ("{folder} --to gguf --out {folder}", "out is "),
        ("{folder} --to gguf --out {folder}/config.json", "out is "),
    ],
)
def test_the_command_refuses(tmp_path, folder, words, said):
    before = sorted(p.name for p in folder.iterdir())
    line = words.format(folder=folder, tmp=tmp_path).split()
    done = CliRunner().invoke(app, ["export", *line])
    assert isinstance(done.exception, BadInput) and said in str(done.exception), done.exception
    assert one_sentence(str(done.exception)) and not list(tmp_path.iterdir())
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_configuration_names_what_is_dense(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(portable.importlib.util, "find_spec", lambda name: None)  # quick: not loaded
    packed = student(llama(tied=False), RTN(bits=4, group_size=32, symmetric=True, layers="*.0.*"))
    export_student(packed, tokenizer, tmp_path / "out", to="compressed-tensors")
    about = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf8"))["quantization_config"]
    left = set(about["ignore"])
    assert "lm_head" in left and "model.layers.1.mlp.up_proj" in left and not any(".0." in name for name in left)

"""Exports: what the other program reads is what the student was, to the last bit where the format allows it."""

from __future__ import annotations

import importlib.util
import itertools
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
from llmcourse.deployment import faster
from llmcourse.export import Grid, gguf_blocks, gguf_type, interleaved, stored_parts, unwords, words
from llmcourse.lowbit import NF4, Ternary
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
UNREAD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)  # the tokenizer of a GGUF
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


MLP, ATTENTION = "*.mlp.*", "*.self_attn.*"
COMPUTED = {  # layers whose weights are made anew when somebody asks for them
    "tables": [NF4(group_size=32, layers=MLP), RTN(bits=4, group_size=32, symmetric=True, layers=ATTENTION)],
    "masks without a rounding": [Magnitude(sparsity=0.5), RTN(bits=4, group_size=32, symmetric=True, layers=ATTENTION)],
    "both": [
        Magnitude(sparsity=0.5, layers=MLP),
        Ternary(steps=0, layers="*.self_attn.[qk]_proj"),
        RTN(bits=4, group_size=32, symmetric=True, layers="*.self_attn.[vo]_proj"),
    ],
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("how", COMPUTED)
def test_no_matrix_is_left_out(tmp_path, tokenizer, to, how):
    """A computed tensor is gone when the next one is made, and its place in memory, and with it its id, is free."""
    made, names = compress(llama(), COMPUTED[how], None, None)[0], set(stored_parts(student(llama(), SYMMETRIC)))
    for _ in range(3):
        assert set(stored_parts(made)) == names
    export_student(made, tokenizer, tmp_path / "out", to=to)
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(made)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("to", ["gguf", pytest.param("onnx", marks=needs_onnx)])
def test_a_part_too_few_is_refused(tmp_path, tokenizer, monkeypatch, to):
    right = export.stored_parts
    monkeypatch.setattr(export, "stored_parts", lambda m: {k: v for k, v in right(m).items() if "1.mlp.up" not in k})
    with pytest.raises(BadInput, match=r"tensors of the model is \['model.layers.1.mlp.up_proj.weight'\]"):
        export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", TARGETS)
def test_a_model_with_kernels_is_the_one_without(tmp_path, tokenizer, to):
    packed = student(llama(), SYMMETRIC, EmbeddingRTN())
    fast, _ = faster(packed, kernels="int4")
    plain = export_student(packed, tokenizer, tmp_path / "plain", to=to)
    found = export_student(fast, tokenizer, tmp_path / "fast", to=to)
    assert (found.forms, found.bytes) == (plain.forms, plain.bytes)
    assert torch.equal(answers(loaded(found.folder, to)), answers(loaded(plain.folder, to)))


@pytest.mark.parametrize("to", TARGETS)
def test_a_scale_for_each_row_with_its_zero_point(tmp_path, tokenizer, to):
    packed = student(llama(), RTN(bits=4, group_size="channel"))
    export_student(packed, tokenizer, tmp_path / "out", to=to)
    theirs, ours = answers(loaded(tmp_path / "out", to)), answers(dequantize_model(packed))
    assert torch.allclose(theirs, ours, rtol=0, atol=(0.01 if to == "gguf" else 1e-4) * float(ours.abs().max()))


@pytest.mark.parametrize("to", TARGETS)
def test_a_short_context(tmp_path, tokenizer, to):
    found = export_student(student(llama(max_position_embeddings=12), SYMMETRIC), tokenizer, tmp_path / "out", to=to)
    assert found.folder.is_dir()


TEXT = "In 1984 it's   not\n\n what you'd think: naïve 東京 12345 <|endoftext|>x"
ByteLevel, Digits = tokenizers.pre_tokenizers.ByteLevel, tokenizers.pre_tokenizers.Digits
END = [("<|endoftext|>", 0)]
TOKENIZERS = {  # the text of an error, or None where the file has to say the same tokens
    "digit by digit": (lambda t: _cut(t, Digits(individual_digits=True), ByteLevel(add_prefix_space=False)), None),
    "a beginning": (lambda t: _around(t, "<|endoftext|> $A"), None),
    "an end": (lambda t: _around(t, "$A <|endoftext|>"), None),
    "both": (lambda t: _around(t, "<|endoftext|> $A <|endoftext|>"), None),
    "something else around": (lambda t: _around(t, "<|endoftext|> <|endoftext|> $A"), "puts around 'a' is"),
    "a space before a text": (lambda t: _cut(t, ByteLevel(add_prefix_space=True)), "add_prefix_space"),
    "not cut into words": (lambda t: _cut(t, ByteLevel(add_prefix_space=False, use_regex=False)), "use_regex"),
    "whole numbers": (
        lambda t: _cut(t, Digits(individual_digits=False), ByteLevel(add_prefix_space=False)),
        "individual_digits",
    ),
    "another pattern": (
        lambda t: _cut(t, tokenizers.pre_tokenizers.Punctuation(), ByteLevel(add_prefix_space=False)),
        "'Punctuation', 'ByteLevel'",
    ),
    "a normalizer": (lambda t: setattr(t, "normalizer", tokenizers.normalizers.NFC()), "normalizes its text"),
    "words that win": (lambda t: setattr(t.model, "ignore_merges", True), "ignore_merges"),
}


def _cut(t, *steps):
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(steps))


def _around(t, single):
    t.post_processor = tokenizers.processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=END)


@pytest.mark.parametrize("how", TOKENIZERS)
def test_the_tokens_of_a_text_are_the_same_or_it_is_refused(tmp_path, tokenizer, how):
    change, said = TOKENIZERS[how]
    other = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    change(other)
    named = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=other, **named)
    if said is None:
        export_student(student(llama(), SYMMETRIC), other, tmp_path / "out", to="gguf")
        theirs = load_gguf(tmp_path / "out")[1]
        assert (theirs is None) == UNREAD and (UNREAD or theirs(TEXT).input_ids == other(TEXT).input_ids)
        return
    with pytest.raises(BadInput) as e:
        export_student(student(llama(), SYMMETRIC), other, tmp_path / "out", to="gguf")
    assert said in str(e.value) and one_sentence(str(e.value)) and not list(tmp_path.iterdir())


def test_the_flags_of_a_gguf_say_what_is_put_around_a_text(tmp_path, tokenizer):
    other = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    _around(other, "<|endoftext|> $A")
    named = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=other, **named)
    packed = student(llama(eos_token_id=[0, 7]), SYMMETRIC)
    found = export_student(packed, other, tmp_path / "out", to="gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() and not fields["tokenizer.ggml.add_eos_token"].contents()
    assert any("one end of a text, token 0, and the model [0, 7]" in note for note in found.notes)


@pytest.mark.skipif(UNREAD, reason="transformers 5.17 does not read it")
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


@needs_onnx
def test_a_text_that_has_ended_waits_for_the_others(tmp_path, tokenizer):
    export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="onnx")
    exact = export.OnnxLlama(tmp_path / "out", level="exact")
    ids = torch.randint(0, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(1))
    free = exact.generate(ids, 12, stop=())[:, 5:]
    # tokens after which some text goes on to another one
    ends = [int(a) for row in free for a, b in itertools.pairwise(row) if a != b]
    tried = 0
    for stop in dict.fromkeys(ends):
        held = exact.generate(ids, 12, stop=[stop])[:, 5:]
        for row, was in zip(held.tolist(), free.tolist(), strict=True):
            at = was.index(stop) + 1 if stop in was else len(row)
            assert row[:at] == was[: len(row)][:at] and set(row[at:]) <= {stop}
            tried += at < len(row) and was[: len(row)] != row
    assert tried > 0


REFUSED_CALLS = {
    "out of the vocabulary": (lambda m: m(torch.tensor([[VOCABULARY]])), "0 to 319"),
    "below it": (lambda m: m(torch.tensor([[3, -1]])), "0 to 319"),
    "no whole numbers": (lambda m: m(torch.tensor([[3.0]])), "whole numbers"),
    "no text": (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), r"shape of ids is \(1, 0\)"),
    "one dimension": (lambda m: m(torch.tensor([1, 2])), r"shape of ids is \(2,\)"),
    "a cache too short": (lambda m: m(torch.ones(3, 7).long(), export.OnnxCache(m, 3, 6)), "3 of at most 6 tokens"),
    "a cache of others": (lambda m: m(torch.ones(2, 3).long(), export.OnnxCache(m, 3, 6)), "3 of at most 6 tokens"),
    "beyond the context": (lambda m: m(torch.ones(1, 65).long()), "1 of at most 64 tokens"),
    "no logits": (lambda m: m(torch.ones(1, 3).long(), keep=0), "keep is 0; allowed: a whole number from 1 to 3"),
    "more than there are": (lambda m: m(torch.ones(1, 3).long(), keep=4), "keep is 4"),
    "fewer than none": (lambda m: m(torch.ones(1, 3).long(), keep=-1), "keep is -1"),
    "to write beyond the context": (lambda m: m.generate(torch.ones(1, 60).long(), 6), "tokens to read is 65"),
    "to write nothing": (lambda m: m.generate(torch.ones(1, 6).long(), 0), "max_new_tokens is 0"),
}


@needs_onnx
def test_what_the_graph_cannot_answer_is_refused_before_it_runs(tmp_path, tokenizer, monkeypatch):
    export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="onnx")
    model = export.OnnxLlama(tmp_path / "out")
    assert model.generate(torch.ones(1, 60).long(), 5, stop=()).shape == (1, 65)  # the last token is not read
    monkeypatch.setattr(export.np, "ascontiguousarray", lambda *a: pytest.fail("the graph has run"))
    for name, (call, said) in REFUSED_CALLS.items():
        with pytest.raises(BadInput, match=said) as e:
            call(model)
        assert one_sentence(str(e.value)), name


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


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


def qwen2() -> transformers.Qwen2ForCausalLM:
    how = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**how, vocab_size=VOCABULARY)).eval()


def gpt2() -> transformers.GPT2LMHeadModel:
    how = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**how)).eval()


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
    ("gguf", lambda: student(qwen2(), SYMMETRIC), "gguf is written for plain Llamas only: model_type"),
    ("gguf", lambda: student(llama(rope_parameters=SCALED), SYMMETRIC), "plain Llamas only: rope_parameters.factor"),
    ("compressed-tensors", lambda: student(gpt2(), SYMMETRIC), "taken apart .*, the layers of GPT-2"),
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


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("key", ["weight_packed", "weight_scale"])
def test_a_spoiled_tensor_is_not_kept_with_or_without_the_package(tmp_path, tokenizer, monkeypatch, package, key):
    """Where transformers cannot load the folder, nobody else would find it."""
    right, find = export.ct_matrix, importlib.util.find_spec
    spoil = {"weight_packed": lambda t: t ^ 3, "weight_scale": lambda t: t * 1.01}[key]
    monkeypatch.setattr(export, "ct_matrix", lambda g: (found := right(g)) | {key: spoil(found[key])})
    if not package:
        there = lambda name: None if name == "compressed_tensors" else find(name)
        monkeypatch.setattr(portable.importlib.util, "find_spec", there)
    with pytest.raises(BadInput, match="difference of a weight, compressed-tensors"):
        export_student(student(llama(), SYMMETRIC), tokenizer, tmp_path / "out", to="compressed-tensors")
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

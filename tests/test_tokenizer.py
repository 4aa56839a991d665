"""The tokenizer against the library `tokenizers`, on what it learns and on what it encodes; packing."""

import json
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse import data, tokenizer
from llmcourse.settings import BadInput
from llmcourse.tokenizer import BPE

# Characters that this Python's Unicode tables know. The regular expressions of the two libraries may be of different
# Unicode versions, and then disagree whether a character that came later is a letter: no text can be the same to both.
known = st.text(st.characters(exclude_categories=("Cs", "Cn")))
DOCUMENTS = [
    "The quick brown fox doesn't jump over the lazy dog; "
    "it's 1848, and 25,000 men—some of them we'll never know—went west.",
    "    def f(x):\n\t\treturn x ** 2  # naïve, but it'll do\n\n\n\nprint(f(3))   ",
    "量化 会 降低 困惑度 吗?量化会降低困惑度吗?",
    "aaaaaaaaaa aaaa aaa aa a ------------- ===== ....  !!!! 🙂🙂🙂 👩‍👩‍👧 é é <|endoftext|> <|endoftext|",
]


def library(texts, vocab_size, min_frequency=2, special=("<|endoftext|>",)):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            min_frequency=min_frequency,
        ),
    )
    return made


def written(tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


@pytest.fixture(scope="module")
def trained():
    return BPE.train(DOCUMENTS * 3, 420)


def test_by_hand():
    words = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
    bpe = BPE.train(words, 260)
    assert bpe.merges == [(b"u", b"g"), (b"u", b"n"), (b"h", b"ug")]
    assert [bpe.decode([i]) for i in bpe.encode("bugs")] == ["b", "ug", "s"]
    assert bpe.vocab[b"<|endoftext|>"] == 0 and bpe.vocab[b"!"] == 1 and bpe.vocab[b"ug"] == 257 and len(bpe) == 260


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 400, 10_000])
@pytest.mark.parametrize("min_frequency", [1, 2, 5])
def test_training_equals_the_library(vocab_size, min_frequency):
    bpe = BPE.train(DOCUMENTS * 2, vocab_size, min_frequency=min_frequency)
    assert written(bpe.to_tokenizers()) == written(library(DOCUMENTS * 2, vocab_size, min_frequency))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("aab b", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(257, 290))
def test_training_equals_the_library_on_ties_and_repeats(texts, vocab_size):
    assert written(BPE.train(texts, vocab_size).to_tokenizers()) == written(library(texts, vocab_size))


@settings(max_examples=200, deadline=None)
@given(known)
def test_encoding_equals_the_library_on_any_text(trained, text):
    ids = trained.encode(text)
    assert ids == trained.to_tokenizers().encode(text).ids
    assert trained.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 419), max_size=30))
def test_decoding_equals_the_library_on_any_ids(trained, ids):
    assert trained.decode(ids) == trained.to_tokenizers().decode(ids, skip_special_tokens=False)


def test_a_long_word_and_the_naive_way(trained):
    """The heap gives what the definition gives: the earliest merge everywhere, leftmost first."""
    rank = {pair: i for i, pair in enumerate(trained.merges)}
    for seed in range(20):
        word = "".join(random.Random(seed).choices("aotehn-=.é量", k=60))
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [p for p in pairwise(parts) if p in rank]:
            a, b = min(pairs, key=rank.__getitem__)
            i = next(i for i, p in enumerate(pairwise(parts)) if p == (a, b))
            parts[i : i + 2] = [a + b]
        assert trained.encode(word) == [trained.vocab[p] for p in parts]
    word = "".join(random.Random(0).choices("aotehn量", k=50_000))
    assert trained.encode(word) == trained.to_tokenizers().encode(word).ids


def test_another_pattern_and_special_tokens():
    special = ("<a>", "<a>b", "<|endoftext|>")
    bpe = BPE.train(DOCUMENTS, 400, pattern=r"\p{L}+|\p{N}", special_tokens=special)
    for text in [*DOCUMENTS, "x<a>b<a>c<|endoftext|>12 34", "<a><a>bb"]:
        assert bpe.encode(text) == bpe.to_tokenizers().encode(text).ids
        assert bpe.decode(bpe.encode(text)) == text
        assert (
            not {0, 1, 2} & set(bpe.encode(text, special=False)) and bpe.decode(bpe.encode(text, special=False)) == text
        )


def test_text_never_becomes_a_special_token():
    bpe = BPE.train(["the the the the"], 300, special_tokens=("the",))
    assert 0 not in bpe.encode("the", special=False) and bpe.encode("the") == [0]


def test_saved_and_loaded(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save_pretrained(tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(loaded) == len(trained) == 420 and data.separator_id(loaded) == loaded.eos_token_id == 0
    for text in DOCUMENTS:
        assert loaded(text)["input_ids"] == trained.encode(text)
        assert loaded.decode(trained.encode(text)) == text
        ids, sizes = data.encode(loaded, [text])
        assert ids.tolist() == [0, *trained.encode(text)] and int(sizes.sum()) == len(text.encode())


@pytest.mark.parametrize(
    "call",
    [
        lambda: BPE.train(["a"], 256),
        lambda: BPE.train(["a"], True),
        lambda: BPE.train("one string", 300),
        lambda: BPE.train(["a"], 300, min_frequency=0),
        lambda: BPE.train(["a"], 300, special_tokens=("é!",)),
        lambda: BPE.train(["a"], 300, special_tokens=("<a>", "<a>")),
        lambda: BPE([], pattern="("),
        lambda: BPE([], pattern=None),
        lambda: BPE.train(["a"], 300, pattern="[a"),
        lambda: BPE.train(["a"], 300.0),
        lambda: BPE([]).decode([1.5]),
        lambda: BPE([]).decode([True]),
        lambda: BPE([(b"ab", b"c")]),
        lambda: BPE([(b"a", b"b"), (b"a", b"b")]),
        lambda: BPE([]).encode("half \ud83d of it"),
        lambda: BPE([]).encode(b"bytes"),
        lambda: BPE([]).decode([257]),
        lambda: BPE([]).decode([-1]),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"allowed: .*\.$"):
        call()


# --- packing

documents = st.lists(st.lists(st.integers(1, 50), max_size=25), min_size=1, max_size=15)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 12), st.sampled_from(["chunk", "best-fit"]))
def test_packing_loses_and_repeats_nothing(docs, length, how):
    packed = tokenizer.pack_documents(docs, length, separator=0, how=how)
    assert packed.ids.shape == packed.document.shape and packed.ids.shape[1] == length
    for i, d in enumerate(docs):
        pieces = [row[owner == i].tolist() for row, owner in zip(packed.ids, packed.document) if (owner == i).any()]
        whole = [0, *d]
        tokens = [t for piece in pieces for t in piece]
        assert sorted(tokens) == sorted(whole)
        if how == "chunk":
            assert tokens == whole
    assert (packed.ids[packed.document < 0] == 0).all()
    short = [i for i, d in enumerate(docs) if len(d) + 1 <= length]
    rows = {i: sum(bool((owner == i).any()) for owner in packed.document) for i in short}
    assert packed.cut == sum(n > 1 for n in rows.values())
    if how == "best-fit":
        assert packed.cut == 0
        for i in short:  # each in one run, in order
            row, owner = next((r, o) for r, o in zip(packed.ids, packed.document) if (o == i).any())
            assert row[owner == i].tolist() == [0, *docs[i]] and (owner == i).nonzero().flatten().diff().eq(1).all()
    else:
        assert len(packed.ids) == -(-sum(len(d) + 1 for d in docs) // length)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_best_fit_equals_a_walk_over_all_rows(sizes):
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [k for k, room in enumerate(free) if room >= size]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= size
        else:
            free.append(12 - size)
    packed = tokenizer.pack_documents([[1] * (size - 1) for size in sizes], 12, separator=0, how="best-fit")
    assert sorted((packed.document < 0).sum(1).tolist()) == sorted(free)


def test_packing_by_hand():
    docs = [[1] * (n - 1) for n in (14, 7, 5, 2, 3)]
    best, chunk = (
        tokenizer.pack_documents(docs, 8, separator=0, how="best-fit"),
        tokenizer.pack_documents(docs, 8, separator=0),
    )
    assert (len(best.ids), best.cut, best.padding) == (4, 0, 1 / 32) and (len(chunk.ids), chunk.cut, chunk.padding) == (
        4,
        2,
        1 / 32,
    )
    assert chunk.document.tolist() == [
        [0] * 8,
        [0] * 6 + [1] * 2,
        [1] * 5 + [2] * 3,
        [2] * 2 + [3] * 2 + [4] * 3 + [-1],
    ]
    assert chunk.positions.tolist() == [
        [*range(8)],
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 0, 1, 0, 1, 2, 0],
    ]
    mask = chunk.mask
    assert mask.shape == (4, 1, 8, 8) and mask.dtype == torch.bool
    for q in range(8):
        for k in range(8):
            assert bool(mask[2, 0, q, k]) == (k <= q and (k < 5) == (q < 5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: tokenizer.pack_documents([], 8, separator=0),
        lambda: tokenizer.pack_documents([[1]], 1, separator=0),
        lambda: tokenizer.pack_documents([[1]], 8.0, separator=0),
        lambda: tokenizer.pack_documents([[1]], 8, separator=0, how="worst"),
    ],
)
def test_bad_input_of_packing_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"allowed: .*\.$"):
        call()

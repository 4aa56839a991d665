"""Data: the tokenizer against the library `tokenizers`, on what it learns and on what it encodes."""

import json
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse import data
from llmcourse.data import BPE
from llmcourse.settings import BadInput

# Characters that this Python's Unicode tables know. The regular expressions of the two libraries may be of different
# Unicode versions, and then disagree whether a character that came later is a letter: no text can be the same to both.
known = st.text(st.characters(exclude_categories=("Cs", "Cn")))
DOCUMENTS = [
    "The quick brown fox doesn't jump over the lazy dog; it's 1848, and 25,000 men—some of them we'll never know—went west.",
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
        assert trained._merge(word) == [trained.vocab[p] for p in parts]
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


# --- normalizing and cleaning


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.one_of(st.characters(), st.sampled_from("\r\n\t \u00a0\u200b\u0301e\u00ad\u2028\x04\ufeff\u1100\u1161"))
    ),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
)
def test_normalizing_twice_changes_nothing(text, form):
    once = data.normalize(text, form=form)
    assert data.normalize(once, form=form) == once
    once.encode()  # can be written
    assert not any(c in once for c in "\r\u200b\u00ad\ufeff\x04\u2028\u202e") and "\n\n\n" not in once


def test_normalizing_keeps_what_means_something():
    family = "👩\u200d👩\u200d👧 می\u200cخواهم"
    assert data.normalize(family) == family
    assert data.normalize("    def f():\n\treturn  1") == "    def f():\n\treturn  1"
    assert data.normalize("x² ½") == "x² ½" and data.normalize("x²", form="NFKC") == "x2"
    assert data.normalize("a &amp;lt; b", entities=True) == "a < b" and data.normalize("a &amp; b") == "a &amp; b"


GOOD = (
    "The house that stands at the end of the road has been empty for years, and nobody knows to whom it belongs. " * 2
    + " ".join(
        f"Some say that number {i} of the family went to sea with a {w} and never wrote."
        for i, w in enumerate(["brother", "cousin", "friend", "merchant", "captain"])
    )
)

BROKEN = {
    "damaged": GOOD + " caf\ufffd",
    "words": "The end of it and that.",
    "word length": "of and "
    + "pneumonoultramicroscopic " * 3
    + " ".join(f"antidisestablishmentarian{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)),
    "letters": GOOD + " 1 2 3 4 5" * 20,
    "symbols": GOOD + " #tag…" * 20,
    "bullets": "\n".join(f"- the {w} of item and {i}, which was seen with others" for i, w in enumerate("abcdefghij")),
    "ellipses": "\n".join(
        f"the {w} of item and {i}, which was seen with others that we know …" for i, w in enumerate("abcdefgh")
    ),
    "stop words": " ".join(f"le chat numéro {w} dort près du feu" for w in "abcdefghij"),
    "same lines": "\n".join(
        ["The first line of a text that has lines"] * 8 + [f"and the line with {w} in it" for w in "abcdefg"]
    ),
    "same words": GOOD + " buy it now here" * 20,
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_rule_catches_its_case(name):
    broken = {r.name: r.broken for r in data.clean([BROKEN[name]]).rules}
    assert broken[name] == 1
    assert not any(r.broken for r in data.clean([GOOD]).rules)


def test_the_report_adds_up():
    texts = [GOOD, *BROKEN.values(), "Line\r\n" + GOOD]
    cleaned = data.clean(texts)
    assert cleaned.indices == [0, len(texts) - 1] and cleaned.changed == 1 and "\r" not in cleaned.texts[1]
    assert sum(r.removed for r in cleaned.rules) + len(cleaned.texts) == len(texts)
    assert all(r.broken >= r.removed and len(r.examples) == min(3, r.removed) for r in cleaned.rules)
    assert str(len(texts)) in str(cleaned) and data.clean(texts, []).indices == list(range(len(texts)))
    assert data.clean([]).texts == [] and str(data.clean([]))


# --- near-duplicates, splits, leaks

words = st.lists(st.sampled_from(list("abcde")), max_size=12).map(" ".join)


def test_minhash_by_hand():
    assert data.jaccard({1, 2}, {2, 3}) == 1 / 3 and data.jaccard(set(), set()) == 0.0
    assert len(data.shingles("one two three four five six", 5)) == 2
    assert (
        data.shingles("One, two. THREE", 5) == data.shingles("one two three", 5)
        and len(data.shingles("one two three", 5)) == 1
    )
    assert data.shingles("") == data.shingles("…!") == set()
    assert len(data.shingles("量化会降低", 2, unit="characters")) == 4


def test_bands():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        b, r = data.lsh_bands(threshold, 128)
        assert b * r <= 128 and 1 - (1 - threshold**r) ** b >= 0.99
        assert r == 64 or 1 - (1 - threshold ** (r + 1)) ** (128 // (r + 1)) < 0.99


@settings(max_examples=40, deadline=None)
@given(st.lists(words, max_size=8), st.sampled_from([0.5, 0.8, 1.0]))
def test_no_false_pair_and_no_missed_copy(texts, threshold):
    result = data.near_duplicates(texts, threshold=threshold, shingle=2)
    sets = [data.shingles(t, 2) for t in texts]
    for i, j, similarity in result.pairs:
        assert i < j and similarity == data.jaccard(sets[i], sets[j]) >= threshold
    copies = {(i, j) for j in range(len(texts)) for i in range(j) if sets[i] and sets[i] == sets[j]}
    assert copies <= {(i, j) for i, j, _ in result.pairs}
    assert sorted(i for g in result.groups for i in g) == sorted({i for p in result.pairs for i in p[:2]})
    assert set(result.keep) | {i for g in result.groups for i in g[1:]} == set(range(len(texts))) and result.n == len(
        texts
    )


def edited(text, rng, share=0.02):
    return " ".join("edited" if rng.random() < share else w for w in text.split())


def prose(n, rng, n_words=120):
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    return [" ".join(rng.choices(vocabulary, k=n_words)) for _ in range(n)]


def test_recall_against_exact_similarity():
    rng = random.Random(0)
    originals = prose(150, rng)
    copies = [edited(t, rng, rng.choice((0.0, 0.02, 0.05))) for t in originals]
    found = {(i, j) for i, j, _ in data.near_duplicates(originals + copies, threshold=0.7).pairs}
    exact = {
        (i, i + 150) for i in range(150) if data.jaccard(data.shingles(originals[i]), data.shingles(copies[i])) >= 0.7
    }
    assert len(exact) > 80 and found <= exact and len(found) >= 0.97 * len(exact)


def test_the_same_in_every_process():
    import subprocess
    import sys

    code = "from llmcourse.data import near_duplicates, shingles; print(sorted(shingles('one two three four five six')), near_duplicates(['a b c d e f g h i j k', 'a b c d e f g h i j x'], threshold=.5, shingle=2))"
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    )
    assert first == second and "pairs=[(0, 1" in first


def test_a_group_is_not_torn():
    rng = random.Random(1)
    originals = prose(60, rng)
    both = originals + [edited(t, rng) for t in originals]
    assert any(data.split_of(a) != data.split_of(b) for a, b in zip(both, both[60:]))
    parts = data.split_together(both, data.near_duplicates(both, threshold=0.5).groups)
    assert all(a == b for a, b in zip(parts, parts[60:])) and parts[:60] == [data.split_of(t) for t in originals]


@pytest.mark.parametrize("n", [8, 13])
def test_a_planted_leak_is_found_and_shuffled_words_are_not(n):
    rng = random.Random(2)
    train, test = prose(80, rng), prose(20, rng)
    assert data.leak_test(test, train, n=n).share == 0
    planted = [
        *train,
        edited(test[3], rng),
        test[7].upper() + "!",
        "new words " + " ".join(test[11].split()[20 : 20 + n]),
    ]
    leak = data.leak_test(test, planted, n=n)
    assert leak.flagged == [3, 7, 11] and leak.share == 3 / 20 and leak.shares[7] == 1.0
    assert leak.examples[11] == " ".join(test[11].split()[20 : 20 + n])
    shuffled = [" ".join(rng.sample(t.split(), len(t.split()))) for t in test]
    assert data.leak_test(shuffled, planted, n=n).flagged == []
    short = data.leak_test(["too short"], ["too short"], n=n)
    assert short.tested == 0 and short.share != short.share


# --- packing

documents = st.lists(st.lists(st.integers(1, 50), max_size=25), min_size=1, max_size=15)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 12), st.sampled_from(["chunk", "best-fit"]))
def test_packing_loses_and_repeats_nothing(docs, length, how):
    packed = data.pack(docs, length, separator=0, how=how)
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
    packed = data.pack([[1] * (size - 1) for size in sizes], 12, separator=0, how="best-fit")
    assert sorted((packed.document < 0).sum(1).tolist()) == sorted(free)


def test_packing_by_hand():
    docs = [[1] * (n - 1) for n in (14, 7, 5, 2, 3)]
    best, chunk = data.pack(docs, 8, separator=0, how="best-fit"), data.pack(docs, 8, separator=0)
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


# --- augmentation


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(0, 5))
def test_no_rate_no_change_and_a_seed_repeats(text, seed):
    assert (
        data.perturb_characters(text, rate=0, seed=seed)
        == text
        == data.replace_words(text, data.SYNONYMS, rate=0, seed=seed)
    )
    assert data.perturb_characters(text, rate=0.3, seed=seed) == data.perturb_characters(text, rate=0.3, seed=seed)
    kept = lambda t: [c for c in t if not c.isalpha()]
    assert kept(data.perturb_characters(text, rate=1, seed=seed)) == kept(text)


def test_rates_are_rates():
    text = "abcdefghij " * 2000
    same = [data.perturb_characters("e", rate=0.2, seed=s) == "e" for s in range(2000)]
    assert abs(sum(same) / 2000 - 0.8) < 0.03
    replaced = data.replace_words("big " * 4000, {"big": ["large"]}, rate=0.3, seed=0).split().count("large")
    assert abs(replaced / 4000 - 0.3) < 0.03
    assert data.perturb_characters(text, rate=0.1, seed=0) != data.perturb_characters(text, rate=0.1, seed=1)
    assert data.replace_words("Big BIG big Bigger", {"big": ["large"]}, rate=1, seed=0) == "Large LARGE large Bigger"
    assert all(a in data.SYNONYMS[b] for a, bs in data.SYNONYMS.items() for b in bs)


def test_neighbors():
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0], [0.1, 0.9]])
    assert data.neighbor_lexicon(["a", "b", "c", "d"], vectors) == {"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"]}
    assert data.neighbor_lexicon(["a", "b", "c", "d"], vectors, k=3)["a"] == ["b", "d", "c"]


def test_back_translation():
    class Upper:
        parameters = 10

        def there(self, texts):
            return [t.upper() for t in texts]

        def back(self, texts):
            return [t.lower() + "!" for t in texts]

    class Loses(Upper):
        def back(self, texts):
            return texts[1:]

    assert data.back_translate(["One", "two"], Upper()) == ["one!", "two!"]
    with pytest.raises(BadInput, match="as many as were sent"):
        data.back_translate(["One"], Loses())
    assert data.back_translation_flops(100, 10) == 4000


@pytest.mark.parametrize(
    "call",
    [
        lambda: data.normalize("a", form="NFX"),
        lambda: data.clean("one string"),
        lambda: data.shingles("a", 0),
        lambda: data.shingles("a", 2, unit="letters"),
        lambda: data.lsh_bands(0, 128),
        lambda: data.lsh_bands(1.5, 128),
        lambda: data.lsh_bands(0.01, 16),
        lambda: data.near_duplicates("one string"),
        lambda: data.leak_test(["a"], "one string"),
        lambda: data.leak_test(["a"], ["a"], n=0),
        lambda: data.split_together(["a"], [[0, 1]]),
        lambda: data.pack([], 8, separator=0),
        lambda: data.pack([[1]], 1, separator=0),
        lambda: data.pack([[1]], 8, separator=0, how="worst"),
        lambda: data.perturb_characters("a", rate=1.5, seed=0),
        lambda: data.replace_words("a", {}, rate=float("nan"), seed=0),
        lambda: data.neighbor_lexicon(["a", "b"], torch.zeros(2, 3), k=2),
        lambda: data.neighbor_lexicon(["a"], torch.zeros(2, 3)),
    ],
)
def test_bad_input_of_the_preparation_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"allowed: .*\.$"):
        call()


def test_one_text_file_is_many_documents(tmp_path):
    """A .txt on its own is cut at blank lines, so that it has a test part and a calibration part; in a folder it is whole."""
    paragraphs = [f"paragraph {i} " + "word " * 30 for i in range(400)]
    path = tmp_path / "my.txt"
    path.write_bytes("\ufeff".encode() + "\n \n".join(paragraphs).encode())
    records = data.load_records(path)
    assert {r["split"] for r in records} == {"train", "val", "test", "calib"}
    assert sorted(p.split(" word")[0] for r in records for p in r["text"].split("\n\n")) == sorted(
        p.split(" word")[0] for p in paragraphs
    )
    assert sum(len(r["text"]) < 500 for r in records) <= 1
    assert len(data.load_records(tmp_path)) == 1

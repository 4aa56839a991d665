"""Cleaning, near-duplicates, augmentation: each on cases whose answer is known."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse import cleaning
from llmcourse.data import split_of
from llmcourse.settings import BadInput

# --- normalizing and cleaning


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.one_of(st.characters(), st.sampled_from("\r\n\t \u00a0\u200b\u0301e\u00ad\u2028\x04\ufeff\u1100\u1161"))
    ),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
)
def test_normalizing_twice_changes_nothing(text, form):
    once = cleaning.normalize(text, form=form)
    assert cleaning.normalize(once, form=form) == once
    once.encode()  # can be written
    assert not any(c in once for c in "\r\u200b\u00ad\ufeff\x04\u2028\u202e") and "\n\n\n" not in once


def test_normalizing_keeps_what_means_something():
    family = "👩\u200d👩\u200d👧 می\u200cخواهم"
    assert cleaning.normalize(family) == family
    assert cleaning.normalize("    def f():\n\treturn  1") == "    def f():\n\treturn  1"
    assert cleaning.normalize("x² ½") == "x² ½" and cleaning.normalize("x²", form="NFKC") == "x2"
    assert (
        cleaning.normalize("a &amp;lt; b", entities=True) == "a < b" and cleaning.normalize("a &amp; b") == "a &amp; b"
    )


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
    broken = {r.name: r.broken for r in cleaning.clean([BROKEN[name]]).rules}
    assert broken[name] == 1
    assert not any(r.broken for r in cleaning.clean([GOOD]).rules)


def test_the_report_adds_up():
    texts = [GOOD, *BROKEN.values(), "Line\r\n" + GOOD]
    cleaned = cleaning.clean(texts)
    assert cleaned.indices == [0, len(texts) - 1] and cleaned.changed == 1 and "\r" not in cleaned.texts[1]
    assert sum(r.removed for r in cleaned.rules) + len(cleaned.texts) == len(texts)
    assert all(r.broken >= r.removed and len(r.examples) == min(3, r.removed) for r in cleaned.rules)
    assert str(len(texts)) in str(cleaned) and cleaning.clean(texts, []).indices == list(range(len(texts)))
    assert cleaning.clean([]).texts == [] and str(cleaning.clean([]))


# --- near-duplicates, splits, leaks

words = st.lists(st.sampled_from(list("abcde")), max_size=12).map(" ".join)


def test_minhash_by_hand():
    assert cleaning.jaccard({1, 2}, {2, 3}) == 1 / 3 and cleaning.jaccard(set(), set()) == 0.0
    assert len(cleaning.shingles("one two three four five six", 5)) == 2
    assert (
        cleaning.shingles("One, two. THREE", 5) == cleaning.shingles("one two three", 5)
        and len(cleaning.shingles("one two three", 5)) == 1
    )
    assert cleaning.shingles("") == cleaning.shingles("…!") == set()
    assert len(cleaning.shingles("量化会降低", 2, unit="characters")) == 4


def test_bands():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        b, r = cleaning.lsh_bands(threshold, 128)
        assert b * r <= 128 and 1 - (1 - threshold**r) ** b >= 0.99
        assert r == 64 or 1 - (1 - threshold ** (r + 1)) ** (128 // (r + 1)) < 0.99


@settings(max_examples=40, deadline=None)
@given(st.lists(words, max_size=8), st.sampled_from([0.5, 0.8, 1.0]))
def test_no_false_pair_and_no_missed_copy(texts, threshold):
    result = cleaning.near_duplicates(texts, threshold=threshold, shingle=2)
    sets = [cleaning.shingles(t, 2) for t in texts]
    for i, j, similarity in result.pairs:
        assert i < j and similarity == cleaning.jaccard(sets[i], sets[j]) >= threshold
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
    found = {(i, j) for i, j, _ in cleaning.near_duplicates(originals + copies, threshold=0.7).pairs}
    exact = {
        (i, i + 150)
        for i in range(150)
        if cleaning.jaccard(cleaning.shingles(originals[i]), cleaning.shingles(copies[i])) >= 0.7
    }
    assert len(exact) > 80 and found <= exact and len(found) >= 0.97 * len(exact)


def test_the_same_in_every_process():
    import subprocess
    import sys

    code = (
        "from llmcourse.cleaning import near_duplicates, shingles; "
        "print(sorted(shingles('one two three four five six')), "
        "near_duplicates(['a b c d e f g h i j k', 'a b c d e f g h i j x'], threshold=.5, shingle=2))"
    )
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
    assert any(split_of(a) != split_of(b) for a, b in zip(both, both[60:]))
    parts = cleaning.split_together(both, cleaning.near_duplicates(both, threshold=0.5).groups)
    assert all(a == b for a, b in zip(parts, parts[60:])) and parts[:60] == [split_of(t) for t in originals]


# --- augmentation


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(0, 5))
def test_no_rate_no_change_and_a_seed_repeats(text, seed):
    assert (
        cleaning.perturb_characters(text, rate=0, seed=seed)
        == text
        == cleaning.replace_words(text, cleaning.SYNONYMS, rate=0, seed=seed)
    )
    assert cleaning.perturb_characters(text, rate=0.3, seed=seed) == cleaning.perturb_characters(
        text, rate=0.3, seed=seed
    )
    kept = lambda t: [c for c in t if not c.isalpha()]
    assert kept(cleaning.perturb_characters(text, rate=1, seed=seed)) == kept(text)


def test_rates_are_rates():
    text = "abcdefghij " * 2000
    same = [cleaning.perturb_characters("e", rate=0.2, seed=s) == "e" for s in range(2000)]
    assert abs(sum(same) / 2000 - 0.8) < 0.03
    replaced = cleaning.replace_words("big " * 4000, {"big": ["large"]}, rate=0.3, seed=0).split().count("large")
    assert abs(replaced / 4000 - 0.3) < 0.03
    assert cleaning.perturb_characters(text, rate=0.1, seed=0) != cleaning.perturb_characters(text, rate=0.1, seed=1)
    assert (
        cleaning.replace_words("Big BIG big Bigger", {"big": ["large"]}, rate=1, seed=0) == "Large LARGE large Bigger"
    )
    assert all(a in cleaning.SYNONYMS[b] for a, bs in cleaning.SYNONYMS.items() for b in bs)


def test_neighbors():
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0], [0.1, 0.9]])
    assert cleaning.neighbor_lexicon(["a", "b", "c", "d"], vectors) == {"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"]}
    assert cleaning.neighbor_lexicon(["a", "b", "c", "d"], vectors, k=3)["a"] == ["b", "d", "c"]


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

    assert cleaning.back_translate(["One", "two"], Upper()) == ["one!", "two!"]
    with pytest.raises(BadInput, match="as many as were sent"):
        cleaning.back_translate(["One"], Loses())
    assert cleaning.back_translation_flops(100, 10) == 4000


@pytest.mark.parametrize(
    "call",
    [
        lambda: cleaning.normalize("a", form="NFX"),
        lambda: cleaning.normalize(b"a"),
        lambda: cleaning.clean("one string"),
        lambda: cleaning.clean(["a"], examples=-1),
        lambda: cleaning.quality_rules(min_words=2.5),
        lambda: cleaning.near_duplicates(["a"], seed=-1),
        lambda: cleaning.near_duplicates(["a"], threshold=float("nan")),
        lambda: cleaning.perturb_characters("a", rate=True, seed=0),
        lambda: cleaning.shingles("a", 0),
        lambda: cleaning.shingles("a", 2, unit="letters"),
        lambda: cleaning.lsh_bands(0, 128),
        lambda: cleaning.lsh_bands(1.5, 128),
        lambda: cleaning.lsh_bands(0.01, 16),
        lambda: cleaning.near_duplicates("one string"),
        lambda: cleaning.split_together(["a"], [[0, 1]]),
        lambda: cleaning.perturb_characters("a", rate=1.5, seed=0),
        lambda: cleaning.replace_words("a", {}, rate=float("nan"), seed=0),
        lambda: cleaning.neighbor_lexicon(["a", "b"], torch.zeros(2, 3), k=2),
        lambda: cleaning.neighbor_lexicon(["a"], torch.zeros(2, 3)),
    ],
)
def test_bad_input_of_the_preparation_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"allowed: .*\.$"):
        call()


SAY_DIFFERENT_THINGS = {
    "operators": ["def f(a, b):\n    x = a - b", "def f(a, b):\n    x = a + b", "def f(a, b):\n    x = a * b"],
    "vowel marks": ["दिन", "दीन", "दान"],
    "emoji": ["what a day 🎉", "what a day 😡", "what a day"],
    "comparison": ["if a == b: return", "if a != b: return", "if a < b: return"],
    "currency": ["it costs 5 €", "it costs 5 $"],
}


@pytest.mark.parametrize("name", SAY_DIFFERENT_THINGS)
def test_what_says_different_things_is_no_copy(name, tmp_path):
    from llmcourse.data import load_records

    texts = SAY_DIFFERENT_THINGS[name]
    assert cleaning.near_duplicates(texts, threshold=0.99, shingle=2).pairs == []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf8")
    assert {r["text"] for r in load_records(tmp_path)} == set(texts)


def test_what_says_the_same_is_a_copy():
    same = ["The cat, sat.", "the  CAT sat", "“The cat” sat!"]
    assert cleaning.near_duplicates(same, threshold=1.0, shingle=2).groups == [[0, 1, 2]]
    assert cleaning.shingles("cafe\u0301 bar") == cleaning.shingles("caf\u00e9 bar")

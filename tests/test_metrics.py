"""Scores for generated text: equal to sacrebleu and rouge-score, right on the border, refused in one sentence."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, clean_env

from llmcourse import metrics
from llmcourse.metrics import (
    SMOOTHINGS,
    TOKENIZERS,
    FScore,
    chrf,
    compare_scores,
    corpus_bleu,
    exact_match,
    lcs_length,
    lcs_places,
    mean_score,
    normalized,
    resampled,
    rouge,
    score_interval,
    token_f1,
    words,
)
from llmcourse.settings import BadInput
from llmcourse.verdicts import held_level

sacrebleu = pytest.importorskip("sacrebleu", reason='pip install "llmcourse[metrics]"')
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason='pip install "llmcourse[metrics]"')

RULES = [name for name in TOKENIZERS if name != "rouge"]
PIECES = [
    "the", "the", "the", "cat", "Cat", "sat", "on", "3.5", "1,000", "-5", "2-3", "don't", "x-1", "&amp;", "&quot;",
    "&amp;lt;", "<skipped>", "...", ".", ",", "量化", "很快", "。", "“a”", "–", "→", "𠀀", "É", "é", "ﬁ", "-", "%",
    "<b>", "\n", "-\n", "\t", "\u3000", "\xa0", "🎉", "a" * 30, "İ", "ß",
]  # fmt: skip


def texts(seed: int, n: int, longest: int = 14) -> list[str]:
    """Unpleasant texts: empty, repeated, mixed alphabets, with and without spaces."""
    rng = np.random.default_rng(seed)
    few = rng.choice(PIECES, 6)
    pools = (PIECES, few)  # a pool of few pieces makes long matches
    make = lambda: str(rng.choice([" ", " ", "", "  "])).join(rng.choice(pools[rng.integers(2)], rng.integers(longest)))
    return [make() for _ in range(n)]


ADVERSARIAL = [
    ("", ""), ("", "a"), ("a", ""), ("a", "a"), (" ", "a"), ("a\n", "a"), ("the " * 7, "the cat is on the mat"),
    ("a b c", "a b c"), ("a b c d", "a b c d"), ("a b c d", "d c b a"), ("量化很快", "量化很快"), ("量化", "很快"),
    ("1,000.5", "1 , 000.5"), ("U.S. GDP-5", "U.S . GDP - 5"), ("&lt;b&gt;", "<b>"), ("élève", "eleve"),
    ("a " * 200, "a " * 100), ("ABC def", "abc DEF"), ("it's", "it 's"), ("...", "…"), ("x", "x" * 50),
]  # fmt: skip


def transposed(references):
    return [list(row) for row in itertools.zip_longest(*references)]


def bleu_options(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    smooth = list(SMOOTHINGS)[seed % len(SMOOTHINGS)]
    options = {
        "tokenize": RULES[seed // 4 % len(RULES)],
        "smooth_method": smooth,
        "lowercase": bool(rng.integers(2)),
        "use_effective_order": bool(rng.integers(2)),
    }
    if smooth in ("floor", "add-k") and rng.integers(2):
        options["smooth_value"] = float(rng.choice([0, 0.01, 0.5, 3]))
    return options


def their_bleu(found, wanted, *, use_effective_order=False, **options):
    bleu = sacrebleu.BLEU(effective_order=use_effective_order, **options)
    return bleu.corpus_score(found, transposed(wanted)), str(bleu.get_signature())


# ------------------------------------------------------------------------------ equal to the libraries


@pytest.mark.parametrize("seed", range(100))
def test_bleu_equals_sacrebleu(seed):
    """Six hundred sets: every rule with every smoothing, one to four references."""
    rng = np.random.default_rng(seed)
    options = bleu_options(seed)
    for trial in range(6):
        n = int(rng.integers(1, 5))
        found = texts(100 * seed + trial, n)
        refs = [texts(7_000 * seed + 10 * trial + i, int(rng.integers(1, 5))) for i in range(n)]
        if trial % 2:
            refs[0][0] = found[0]
        longest = int(rng.integers(1, 7)) if trial == 5 else 4
        theirs, signature = their_bleu(found, refs, max_ngram_order=longest, **options)
        ours = corpus_bleu(found, refs, max_ngram_order=longest, **options)
        assert ours.value == pytest.approx(theirs.score, abs=1e-9), (found, refs, options)
        assert ours.parts["precisions"] == pytest.approx(theirs.precisions, abs=1e-9)
        assert ours.parts["brevity_penalty"] == pytest.approx(theirs.bp, abs=1e-12)
        assert (ours.parts["words"], ours.parts["reference_words"]) == (theirs.sys_len, theirs.ref_len)
        said = lambda text: {
            k: v for k, v in (p.split(":", 1) for p in text.split("|")) if k not in ("version", "order")
        }
        assert said(ours.signature) == said(signature) and ("order:" in ours.signature) == (longest != 4)


@pytest.mark.parametrize("rule", RULES)
def test_the_adversarial_pairs(rule):
    for (found, wanted), smooth, eff in itertools.product(ADVERSARIAL, SMOOTHINGS, (False, True)):
        options = {"tokenize": rule, "smooth_method": smooth, "use_effective_order": eff}
        theirs, _ = their_bleu([found], [[wanted]], **options)
        assert corpus_bleu([found], [wanted], **options).value == pytest.approx(theirs.score, abs=1e-9), (found, wanted)


@pytest.mark.parametrize("rule", RULES)
def test_words_are_those_of_sacrebleu(rule):
    """Every character of the basic plane, and a sample beyond it, between letters, digits and signs."""
    cut = sacrebleu.BLEU(tokenize=rule).tokenizer
    plane = [chr(i) for i in range(1, 0x10000) if not 0xD800 <= i < 0xE000]
    characters = plane + [chr(i) for i in range(0x10000, 0x2FA20, 97)]
    for first, frame in itertools.product(range(0, len(characters), 100), ("a{}b", "1{}2")):
        text = " ".join(frame.format(c) for c in characters[first : first + 100])
        assert list(words(text, rule)) == cut(text).split()


@pytest.mark.parametrize("seed", range(60))
def test_chrf_equals_sacrebleu(seed):
    rng = np.random.default_rng(seed)
    for trial in range(10):
        n = int(rng.integers(1, 4))
        found = texts(300 * seed + trial, n)
        refs = [texts(9_000 * seed + 10 * trial + i, int(rng.integers(1, 4))) for i in range(n)]
        options = {
            "word_order": int(rng.integers(3)),
            "char_order": int(rng.integers(1, 8)),
            "lowercase": bool(rng.integers(2)),
            "whitespace": bool(rng.integers(2)),
            "eps_smoothing": bool(rng.integers(2)),
            "beta": int(rng.integers(1, 4)),
        }
        metric = sacrebleu.CHRF(**options)
        theirs = metric.corpus_score(found, transposed(refs)).score
        ours = chrf(found, refs, **options)
        assert ours.value == pytest.approx(theirs, abs=1e-9), (found, refs, options)
        said = lambda text: {p for p in text.split("|") if not p.startswith(("version", "beta"))}
        assert said(ours.signature) == said(str(metric.get_signature()))


class Rule:
    def __init__(self, name):
        self.tokenize = lambda text: list(words(text, name))


@pytest.mark.parametrize("rule", ["rouge", "rouge with stemmer", "intl", "zh", "char"])
def test_rouge_equals_rouge_score(rule):
    """Six hundred pairs in all, with one to three references, lines as sentences."""
    rng = np.random.default_rng(len(rule))
    kinds = ["rouge1", "rouge2", "rouge3", "rouge9", "rougeL", "rougeLsum"]
    own = {"use_stemmer": rule.endswith("stemmer")} if rule.startswith("rouge") else {"tokenizer": Rule(rule)}
    scorer = rouge_scorer.RougeScorer(kinds, **own)
    english = ["the", "cat", "cats", "running", "ran", "quickly", "relational", "a", "b", "\n", "\n\n", "x1", "É"]
    for trial in range(120):
        pool = english if trial % 2 else PIECES
        found, *wanted = (" ".join(rng.choice(pool, rng.integers(25))) for _ in range(1 + rng.integers(1, 4)))
        theirs = scorer.score_multi(wanted, found)
        name, stem = rule.removesuffix(" with stemmer"), rule.endswith("stemmer")
        ours = rouge(found, wanted, types=kinds, tokenize=name, use_stemmer=stem)
        for kind in kinds:
            assert tuple(ours[kind]) == pytest.approx(tuple(theirs[kind]), abs=1e-12), (kind, found, wanted)


def test_published_numbers_of_the_libraries():
    assert rouge("testing", "testing one two")["rouge1"] == FScore(1, 1 / 3, 1 / 2)  # rouge-score's own test
    readme = (
        ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
        [
            ["The dog bit the man.", "The dog had bit the man."],
            ["It was not unexpected.", "No one was surprised."],
            ["The man bit him first.", "The man had bitten the dog."],
        ],
    )
    for rule, value in (("13a", 48.530827), ("none", 49.1919566), ("intl", 43.91623493)):
        assert corpus_bleu(*readme, tokenize=rule).value == pytest.approx(value, abs=1e-6)


def official_squad(found: str, wanted: str) -> tuple[float, float]:
    """Exact match and F1 as the evaluation script of SQuAD 2.0 has them, written from its description."""
    import re
    import string

    def norm(s):
        s = "".join(c for c in s.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split())

    a, b = norm(found).split(), norm(wanted).split()
    same = sum((Counter(a) & Counter(b)).values())
    if not a or not b:
        return float(norm(found) == norm(wanted)), float(a == b)
    f1 = 0.0 if not same else 2 * (same / len(a)) * (same / len(b)) / (same / len(a) + same / len(b))
    return float(norm(found) == norm(wanted)), f1


def test_answers_equal_the_official_script():
    extra = ["a", "an", "the", "An", "theory", "U.S.", "\u2019", "yes", "no"]
    rng = np.random.default_rng(0)
    for _ in range(600):
        found, *refs = (" ".join(rng.choice([*PIECES, *extra], rng.integers(6))) for _ in range(3))
        expected = [official_squad(found, r) for r in refs]
        assert exact_match(found, refs) == max(e for e, _ in expected)
        assert token_f1(found, refs) == pytest.approx(max(f for _, f in expected), abs=1e-12)


# -------------------------------------------------------------------------------------- by hand


def test_bleu_by_hand():
    both = ["the cat the cat", "on a mat"], ["the cat sat", "on a mat by the door"]
    score = corpus_bleu(*both, max_ngram_order=2)
    assert score.value == pytest.approx(100 * math.exp(-2 / 7) * math.sqrt(3 / 7))
    assert score.sums.tolist() == [[4, 3, 2, 1, 4, 3], [3, 6, 3, 2, 3, 2]]
    alone = [corpus_bleu([h], [r], max_ngram_order=2).value for h, r in zip(*both)]
    assert score.items() == pytest.approx(alone)
    assert np.mean(alone) != pytest.approx(score.value, rel=0.05)


@pytest.mark.parametrize(
    ("lengths", "chosen"), [((5, 3), 3), ((3, 5), 3), ((9, 3), 3), ((5, 2), 5), ((4,), 4), ((0, 9), 0)]
)
def test_the_closest_reference_counts_and_the_shorter_of_two(lengths, chosen):
    refs = [[" ".join("x" * n) for n in lengths]]
    assert corpus_bleu(["a b c d"], refs).parts["reference_words"] == chosen


def test_an_empty_hypothesis_scores_0():
    assert corpus_bleu([""], ["x"]).value == chrf([""], ["x"]).value == token_f1("", "x") == exact_match("", "x") == 0
    assert set(rouge("", "x").values()) == {FScore(0, 0, 0)}
    assert corpus_bleu(["", "a b c d"], ["x", "a b c d"]).value > 0


def test_lcs_against_the_table():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(1 + rng.integers(6), size=rng.integers(40)).tolist() for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert lcs_length(a, b) == table[-1, -1] == len(lcs_places(a, b))
        common = iter(b)
        assert all(any(a[i] == x for x in common) for i in sorted(lcs_places(a, b))), "in this order in both"


def test_a_known_pair_of_lsum():
    """The union over the sentences of the summary, each word at most as often as it is written."""
    got = rouge("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", types=["rougeLsum"])["rougeLsum"]
    assert got.recall == 4 / 5 and got.precision == 4 / 10  # Lin (2004), section 3.2


# ------------------------------------------------------------------------------ how certain it is


def test_resampling_is_the_corpus_score_of_the_drawn_items():
    found, wanted = texts(1, 12), texts(2, 12)
    wanted[3], wanted[5] = found[3], found[5]
    for make in (corpus_bleu, chrf):
        score = make(found, wanted)
        counts = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=20)
        for value, row in zip(resampled(score, n_boot=20, seed=7), counts):
            index = np.repeat(np.arange(12), row)
            drawn = make([found[i] for i in index], [wanted[i] for i in index])
            assert value == pytest.approx(drawn.value, abs=1e-9)


def test_a_mean_has_the_interval_of_the_ordinary_bootstrap():
    values = np.random.default_rng(0).normal(3, 1, 200)
    low, high = score_interval(mean_score(values, "x"), n_boot=4000)
    half = 1.96 * values.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_p_is_that_of_all_exchanges():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 6, 9), rng.integers(0, 7, 9)
    d = b - a
    exact = np.mean([abs(np.dot(s, d)) >= abs(d.sum()) for s in itertools.product((1, -1), repeat=9)])
    got = compare_scores(mean_score(a, "x"), mean_score(b, "x"), n_boot=20_000)
    assert got.value == pytest.approx(d.mean()) and got.low <= got.value <= got.high
    assert got.p == pytest.approx(exact, abs=0.015)


def test_p_and_interval_are_those_of_sacrebleu():
    """Its draws are others, so they agree as two simulations do."""
    from sacrebleu.significance import PairedTest

    rng = np.random.default_rng(1)
    vocabulary = [f"w{i}" for i in range(30)]
    refs = [" ".join(rng.choice(vocabulary, 12)) for _ in range(60)]
    noisy = lambda rate: [
        " ".join(w if rng.random() > rate else str(rng.choice(vocabulary)) for w in r.split()) for r in refs
    ]
    a, b = noisy(0.25), noisy(0.25)
    ours = compare_scores(corpus_bleu(a, refs), corpus_bleu(b, refs), n_boot=2000)
    pair = [("a", a), ("b", b)]
    test = PairedTest(pair, {"BLEU": sacrebleu.BLEU()}, references=[refs], test_type="ar", n_samples=2000)
    theirs = test()[1]["BLEU"][1].p_value
    assert 0.02 < theirs < 0.9 and ours.p == pytest.approx(theirs, abs=0.05)
    reach = sacrebleu.BLEU().corpus_score(a, [refs], n_bootstrap=1000)._ci
    low, high = score_interval(corpus_bleu(a, refs))
    assert (high - low) / 2 == pytest.approx(reach, rel=0.1)


def test_a_system_against_itself_and_a_better_one():
    wanted = [f"sentence number {i} has some words in it" for i in range(40)]
    good, bad = corpus_bleu(wanted, wanted), corpus_bleu([w.replace("words", "x") for w in wanted], wanted)
    same = compare_scores(good, good, n_boot=200)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    worse = compare_scores(good, bad, n_boot=200)
    assert worse.high < 0 and worse.p == pytest.approx(1 / 201)
    assert compare_scores(bad, good, n_boot=200).low > 0


def test_false_alarms_keep_to_their_level():
    """A coin decides which of two systems hands in which text: 5 % of the comparisons may say otherwise."""
    rng, alarms = np.random.default_rng(0), 0
    values = rng.exponential(1, (200, 30, 2))
    for pair in values:
        a, b = (mean_score(pair[:, i], "x") for i in (0, 1))
        alarms += compare_scores(a, b, n_boot=200, seed=int(rng.integers(1000))).p < 0.05
    assert 2 <= alarms <= 19  # 10 expected; outside with probability below 1 %


# ------------------------------------------------------------------------------------- bad input

ONE = corpus_bleu(["a"], ["a"])
REFUSED = {
    "hypotheses as one text": lambda: corpus_bleu("a text", ["a"]),
    "references as one text": lambda: corpus_bleu(["a"], "a"),
    "a generator": lambda: corpus_bleu((t for t in "ab"), ["a", "b"]),
    "fewer references": lambda: corpus_bleu(["a", "b"], ["a"]),
    "more references": lambda: chrf(["a"], ["a", "b"]),
    "the layout of sacrebleu": lambda: corpus_bleu(["a", "b"], [["a", "b"]]),
    "no items": lambda: corpus_bleu([], []),
    "no references of an item": lambda: corpus_bleu(["a", "b"], ["a", []]),
    "None as a hypothesis": lambda: corpus_bleu([None], ["a"]),
    "None as a reference": lambda: corpus_bleu(["a"], [None]),
    "None among references": lambda: chrf(["a"], [["a", None]]),
    "bytes": lambda: corpus_bleu([b"a"], ["a"]),
    "words": lambda: corpus_bleu([["a", "b"]], ["a b"]),
    "unknown rule": lambda: corpus_bleu(["a"], ["a"], tokenize="mecab"),
    "the rule of ROUGE": lambda: corpus_bleu(["a"], ["a"], tokenize="rouge"),
    "unknown smoothing": lambda: corpus_bleu(["a"], ["a"], smooth_method="add-1"),
    "a value that nothing uses": lambda: corpus_bleu(["a"], ["a"], smooth_value=1.0),
    "a negative value": lambda: corpus_bleu(["a"], ["a"], smooth_method="floor", smooth_value=-0.1),
    "nan": lambda: corpus_bleu(["a"], ["a"], smooth_method="add-k", smooth_value=math.nan),
    "order 0": lambda: corpus_bleu(["a"], ["a"], max_ngram_order=0),
    "order 2.0": lambda: corpus_bleu(["a"], ["a"], max_ngram_order=2.0),
    "char_order 0": lambda: chrf(["a"], ["a"], char_order=0),
    "word_order -1": lambda: chrf(["a"], ["a"], word_order=-1),
    "beta 0": lambda: chrf(["a"], ["a"], beta=0),
    "order 101": lambda: corpus_bleu(["a"], ["a"], max_ngram_order=101),
    "lowercase in words": lambda: corpus_bleu(["a"], ["a"], lowercase="no"),
    "effective order as a number": lambda: corpus_bleu(["a"], ["a"], use_effective_order=1),
    "whitespace in words": lambda: chrf(["a"], ["a"], whitespace="false"),
    "char_order of a billion": lambda: chrf(["a"], ["a"], char_order=10**9),
    "beta beyond use": lambda: chrf(["a"], ["a"], beta=1e308),
    "beta as text": lambda: chrf(["a"], ["a"], beta="2"),
    "a stemmer by name": lambda: rouge("a", "a", use_stemmer="porter"),
    "ROUGE of a list": lambda: rouge(["a"], "a"),
    "ROUGE without reference": lambda: rouge("a", []),
    "ROUGE of None": lambda: rouge("a", None),
    "rouge0": lambda: rouge("a", "a", types=["rouge0"]),
    "rouge10": lambda: rouge("a", "a", types=["rouge10"]),
    "rougeW": lambda: rouge("a", "a", types=["rougeL", "rougeW"]),
    "types as one text": lambda: rouge("a", "a", types="rougeL"),
    "no types": lambda: rouge("a", "a", types=[]),
    "unknown rule for ROUGE": lambda: rouge("a", "a", tokenize="spacy"),
    "answers of a list": lambda: token_f1(["a"], "a"),
    "no right answer": lambda: exact_match("a", []),
    "a number as answer": lambda: exact_match("4", 4),
    "no values": lambda: mean_score([], "x"),
    "values with nan": lambda: mean_score([0.5, math.nan], "x"),
    "a table of values": lambda: mean_score(np.zeros((2, 2)), "x"),
    "level 95": lambda: score_interval(ONE, level=95),
    "no replicates": lambda: resampled(ONE, n_boot=0),
    "negative seed": lambda: resampled(ONE, seed=-1),
    "another rule": lambda: compare_scores(ONE, corpus_bleu(["a"], ["a"], tokenize="none")),
    "another score": lambda: compare_scores(ONE, chrf(["a"], ["a"])),
    "another number of items": lambda: compare_scores(ONE, corpus_bleu(["a", "a"], ["a", "a"])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name):
    with pytest.raises(BadInput) as e:
        REFUSED[name]()
    said = str(e.value)
    assert said.endswith(".") and "allowed: " in said and "\n" not in said and len(said) < 300


def test_the_module_imports_without_the_libraries():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sacrebleu", "rouge_score", "nltk", "torch"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from llmcourse.metrics import corpus_bleu, rouge
assert corpus_bleu(["a b c d"], ["a b c d"]).value > 99.9
try:
    rouge("a", "a", use_stemmer=True)
except ValueError as e:
    print(e)
"""
    result = subprocess.run([sys.executable, "-c", code], env=clean_env(), text=True, capture_output=True)
    assert "llmcourse[metrics]" in result.stdout, result.stderr[-1500:]


def test_normalized_leaves_other_alphabets_alone():
    assert normalized("The  THEORY, of an É。") == "theory of é。" and normalized("量化") == "量化"


def test_what_is_not_given_back_twice():
    """The cache of words hands out tuples: nobody can change what the next score sees."""
    assert isinstance(words("a b", "none"), tuple) and metrics.words.cache_info().maxsize == 2**16


def test_the_level_of_a_score_is_that_of_what_each_item_moves():
    rng = np.random.default_rng(0)
    values = rng.random(50)
    score = mean_score(values, "x")
    assert metrics.score_level(score) == pytest.approx(held_level(values))  # a mean: each item moves it by its value
    values[0] = 1000.0
    assert metrics.score_level(mean_score(values, "x")) is None
    words = [" ".join(rng.choice(list("abcdefgh"), 12)) for _ in range(60)]
    near = [w if i % 2 else w[:-2] + " z" for i, w in enumerate(words)]
    assert 0.9 < metrics.score_level(corpus_bleu(near, words)) < 0.95


@pytest.mark.parametrize(("size", "least"), [(16, 0.6), (100, 0.95)])
def test_a_difference_of_scores_carries_the_level_that_it_keeps(size, least):
    """Two systems on the same items, of which one is better: how often the interval holds, and what is said."""
    held, said = [], []
    for trial in range(300):
        rng = np.random.default_rng([trial, size])
        hard = rng.random(size)  # what both find hard
        a, b = (np.clip(hard + rng.normal(m, 0.2, size), 0, None) for m in (0.5, 0.7))
        found = compare_scores(mean_score(a, "x"), mean_score(b, "x"), n_boot=200, seed=trial)
        assert found.level is None or found.level == pytest.approx(held_level(b - a))
        if found.level is not None:
            held.append(found.low <= 0.2 <= found.high), said.append(found.level)
    assert len(held) >= least * 300
    noise = 3 * math.sqrt(0.09 * 0.91 / len(held))
    assert abs(np.mean(held) - np.mean(said)) < noise + 0.015


def test_quick_benchmark(tmp_path):
    """The script compares the values before it times anything; here its times mean nothing."""
    out = tmp_path / "metrics.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "metrics.py"), "--quick", "--out", str(out)]
    subprocess.run(command, env=clean_env(), check=True, capture_output=True, timeout=300)
    scores = json.loads(out.read_text())["scores"]
    assert len(scores) == 3
    for entry in scores.values():
        assert set(entry["rows"]) == {"the library", "the library again", "llmcourse"}

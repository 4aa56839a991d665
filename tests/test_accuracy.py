"""Accuracy and calibration: log-likelihoods against one pass per token, scores, intervals, tests, ECE, temperature."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmcourse import accuracy as ac
from llmcourse.settings import BadInput

KNOWN = ["Title", ":", " Carl", " S", "agan", " ", "un", "happy", "unhapp", "y", "a", "b", "c", " a", " b", " c", "\n"]


class Pieces:
    """A tokenizer that takes the longest known piece, then single bytes."""

    bos_token_id = eos_token_id = 0
    sep_token_id = None
    is_fast = True

    def __init__(self, adds_bos=False):
        self.adds_bos = adds_bos

    def get_vocab(self):
        return {"<|endoftext|>": 0}

    def __call__(self, text, add_special_tokens=True):
        ids = [0] if self.adds_bos and add_special_tokens else []
        while text:
            piece = max((k for k in KNOWN if text.startswith(k)), key=len, default=text[0])
            ids.append(1 + KNOWN.index(piece) if piece in KNOWN else 20 + ord(piece) % 40)
            text = text[len(piece) :]
        return {"input_ids": ids}


@pytest.fixture(scope="module")
def llama():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def one_pass_per_token(model, before, after):
    """Sum of ln p, and whether all are first choices, straight from the definition, in float64."""
    total, greedy, ids = 0.0, True, list(before)
    for token in after:
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(last[token] - torch.logsumexp(last, 0))
        greedy &= int(last.argmax()) == token
        ids.append(token)
    return total, greedy


PAIRS = [
    ("Title:", " Carl Sagan"), ("Title:", " a"), ("Title:", " b c"), ("Title: ", "Carl Sagan"), ("Title:\n", "a"),
    ("a b c", " a b c a b"), ("Title: Carl", " Sagan"), ("x", "y"), ("un", "happy"), ("a b c", " b"),
]  # fmt: skip


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_likelihood_is_that_of_one_pass_per_token(llama, cache, bos, batch_size):
    tokenizer = Pieces()
    got = ac.loglikelihood(llama, tokenizer, PAIRS, cache=cache, bos=bos, batch_size=batch_size)
    for pair, found in zip(PAIRS, got):
        cut = ac.encode_pair(tokenizer, *pair, front=[0] if bos else [])
        value, greedy = one_pass_per_token(llama, cut.context, cut.continuation)
        assert found.value == pytest.approx(value, abs=1e-4) and found.greedy == greedy
        assert found.tokens == len(cut.continuation) and found.clean == cut.clean


def test_a_first_choice_is_called_greedy(llama):
    ids = Pieces()("a b c")["input_ids"]
    with torch.no_grad():
        best = int(llama(torch.tensor([ids])).logits[0, -1].argmax())
    fixed = {"a b c": ids, "a b c!": [*ids, best]}
    wrapped = type("T", (), {"__call__": lambda self, text, **_: {"input_ids": fixed[text]}, "bos_token_id": None})()
    assert all(ac.loglikelihood(llama, wrapped, [("a b c", "!")], cache=c)[0].greedy for c in (False, True))


def test_one_context_shared_by_all_pairs(llama):
    pairs = [("a b c", f" {x}") for x in "abc"]
    slow = ac.loglikelihood(llama, Pieces(), pairs, cache=False)
    fast = ac.loglikelihood(llama, Pieces(), pairs, cache=True)
    assert [x.value for x in slow] == pytest.approx([x.value for x in fast], abs=1e-5)


def test_our_own_models_and_functions_are_scored_too():
    from llmcourse.model import GPT, GPTConfig

    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, context=64))
    gpt.train()
    a = ac.loglikelihood(gpt, Pieces(), PAIRS)
    assert gpt.training
    gpt.eval()
    with torch.no_grad():
        b = ac.loglikelihood(lambda ids: gpt(ids), Pieces(), PAIRS)
    assert [x.value for x in a] == pytest.approx([x.value for x in b], abs=1e-5)


def test_the_token_in_front_follows_the_tokenizer(llama):
    plain, with_bos = Pieces(), Pieces(adds_bos=True)
    value = lambda t, **o: ac.loglikelihood(llama, t, PAIRS[:3], **o)[0].value
    assert value(with_bos) == pytest.approx(value(plain, bos=True), abs=1e-6)
    assert value(with_bos, bos=False) == pytest.approx(value(plain), abs=1e-6)
    assert abs(value(plain, bos=True) - value(plain)) > 1e-3


@pytest.mark.parametrize(
    ("context", "continuation", "scored", "clean"),
    [
        ("Title:", " Carl", [" Carl"], True),
        ("Title: ", "Carl", [" Carl"], True),  # the space goes to the choice
        ("Title:  ", "Carl", [" ", " Carl"], True),
        ("un", "happy", ["y"], False),  # "unhapp" reaches over the border
    ],
)
def test_the_border(context, continuation, scored, clean):
    pair = ac.encode_pair(Pieces(), context, continuation)
    assert [KNOWN[i - 1] for i in pair.continuation] == scored and pair.clean == clean


# ------------------------------------------------------------------------------------ scores


def item(answer=0, choices=("aa", "b"), context="c"):
    return ac.Item(context=context, choices=choices, answer=answer)


def scored(items, log_p, alone=None):
    protocol = ac.ChoiceProtocol(
        model="m", n_items=len(items), items_sha256="0", shots=0, separator="", delimiter=" ", alone="", bos="",
        unclean=0, dtype="float32",
    )  # fmt: skip
    alone = None if alone is None else np.array(alone)
    return ac.Scored(items=items, log_p=np.array(log_p), alone=alone, protocol=protocol)


def test_the_four_scores_by_hand():
    found = scored([item(0, ("困", "abcd"))], [[-3.0, -4.0]], [[-5.0, -4.5]])
    assert found.scores("none").tolist() == [[-3.0, -4.0]]
    assert found.scores("characters").tolist() == [[-3.0, -1.0]]
    assert found.scores("bytes").tolist() == [[-1.0, -1.0]] and found.picks("bytes").tolist() == [0]  # the first
    assert found.scores("unconditional").tolist() == [[2.0, 0.5]]
    assert [found.accuracy(norm).value for norm in ac.NORMS] == [1, 0, 1, 1]


def test_a_model_that_knows_is_right_and_the_protocol_says_how(llama):
    items = [
        ac.Item(context=f"Title: {x}", choices=("a", "b c", "Carl Sagan"), answer=i % 3) for i, x in enumerate("abcabc")
    ]
    shots = [ac.Item(context="x", choices=("a", "b"), answer=1)]
    got = ac.score_choices(llama, Pieces(), items, shots=shots, alone="Title:", name="tiny")
    assert got.log_p.shape == got.alone.shape == (6, 3)
    first = ac.loglikelihood(llama, Pieces(), [("x b\n\nTitle: a", " b c"), ("Title:", " b c")])
    assert got.log_p[0, 1] == pytest.approx(first[0].value, abs=1e-4)
    assert got.alone[0, 1] == pytest.approx(first[1].value, abs=1e-4)
    p = got.protocol
    assert (p.shots, p.n_items, p.unclean, p.bos, p.model) == (1, 6, 0, "nothing", "tiny") and "tiny" in str(p)
    again = ac.multiple_choice(llama, Pieces(), items, shots=shots, name="tiny")
    assert again.protocol.items_sha256 == p.items_sha256 and again.hits.tolist() == got.accuracy().hits.tolist()
    assert again.interval is None and "fewer than 20" in str(again)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_items_with_different_numbers_of_choices(llama, cache, batch_size):
    choices = [("a", "b c"), ("a b c", "Carl Sagan", "a", "b"), ("困", "a", "happy"), ("b", "c"), ("un a", "b", "c a")]
    contexts = ["Title:", "Title:", "a b", "b a", "x:"]
    items = [item(i % 2, c, context) for i, (c, context) in enumerate(zip(choices, contexts))]
    got = ac.score_choices(llama, Pieces(), items, alone="Title:", cache=cache, batch_size=batch_size)
    assert got.log_p.shape == got.alone.shape == (5, 4)
    for norm in ac.NORMS:
        for i, one in enumerate(items):
            own = ac.score_choices(llama, Pieces(), [one], alone="Title:", cache=False)
            k = len(one.choices)
            assert got.scores(norm)[i, :k] == pytest.approx(own.scores(norm)[0], abs=1e-4), norm
            pick, scores = got.picks(norm)[i], own.scores(norm)[0]
            # in another batch sums are rounded in another way: of two equal choices either may be picked
            assert (got.scores(norm)[i, k:] == -math.inf).all() and pick < k
            assert scores[pick] == pytest.approx(scores.max(), abs=1e-4), norm
    chance = (1 / 2 + 1 / 4 + 1 / 3 + 1 / 2 + 1 / 3) / 5
    assert got.accuracy().chance == pytest.approx(chance) and 0 <= got.accuracy().value <= 1


def test_items_of_descriptions():
    topics = {"T": 12, "U": 3, "": 9, "Uncategorized": 9}
    records = [
        {"title": f"{t}{i}", "description": f"about {t}{i % 9}", "topic": t}
        for t, n in topics.items()
        for i in range(n)
    ]
    made = ac.description_items([r for r in records if r["topic"] == "T"], 12, seed=3)
    about = {r["title"]: r["description"] for r in records}
    for x in made:
        asked = x.context.removeprefix("Description: ").removesuffix("\nTitle:")
        assert about[x.choices[x.answer]] == asked
        assert all(about[c] != asked for i, c in enumerate(x.choices) if i != x.answer) and len(set(x.choices)) == 4
    assert len({x.choices[x.answer] for x in made}) == 12 and len({x.answer for x in made}) > 1
    assert made == ac.description_items(records[:12][::-1], 12, seed=3)  # the order of the records does not matter
    assert made != ac.description_items(records[:12], 12, seed=4)
    with pytest.raises(BadInput, match="15 described articles"):
        ac.description_items(records, 16)
    with pytest.raises(BadInput, match="articles of 'U'"):
        ac.description_items(records[12:15], 1)


# ------------------------------------------------------------------------------------ intervals and tests


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize("n", [20, 40, 160])
def test_wilsons_interval_covers_what_it_says(n):
    """Not simulated: the exact coverage, from the binomial distribution."""
    ends = [ac.wilson_interval(k, n) for k in range(n + 1)]
    truths = np.linspace(0.1, 0.9, 81)
    rates = [sum(binomial(n, k, p) for k, (low, high) in enumerate(ends) if low <= p <= high) for p in truths]
    assert 0.945 <= np.mean(rates) <= 0.965 and min(rates) > (0.93 if n == 160 else 0.925)
    assert all(0 <= low <= k / n <= high <= 1 for k, (low, high) in enumerate(ends))


def test_wilsons_interval_beside_a_published_value():
    # Newcombe (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611
    assert ac.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert ac.wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("won", "lost"), [(0.05, 0.05), (0.1, 0.04), (0.2, 0.1), (0.3, 0.05)])
def test_the_paired_interval_covers_what_it_says(won, lost):
    n, inside, truth = 160, 0.0, won - lost
    draws = np.random.default_rng(0).multinomial(n, [won, lost, 1 - won - lost], 3000)
    for w, k, _ in draws:
        low, high = ac.paired_interval(int(w), int(k), n)
        inside += low <= truth <= high
    assert 0.93 <= inside / len(draws) <= 0.97


@given(st.integers(0, 6), st.integers(0, 6))
@hypothesis_settings(max_examples=30, deadline=None)
def test_the_coin_is_counted_out(won, lost):
    n, few = won + lost, min(won, lost)
    heads = [sum(tosses) for tosses in itertools.product((0, 1), repeat=n)]
    assert ac.coin_test(won, lost) == pytest.approx(np.mean([min(h, n - h) <= few for h in heads]))


def test_mcnemar_sees_only_where_they_differ():
    a = np.array([True] * 50 + [True] * 5 + [False] * 1 + [False] * 30)
    b = np.array([True] * 50 + [False] * 5 + [True] * 1 + [False] * 30)
    assert ac.mcnemar(a, b) == ac.mcnemar(b, a) == ac.mcnemar(a[50:56], b[50:56]) == 14 / 64


def test_the_permutation_test_is_exact_on_all_signs():
    d = np.array([0.5, -1.0, 2.0, 0.25, 1.5, -0.125])
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=6)]
    exact = np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert ac.permutation_test(np.zeros(6), d, n=20000) == pytest.approx(exact, abs=0.012)


def test_tests_are_wrong_as_often_as_they_say():
    rng, wrong = np.random.default_rng(1), [0, 0]
    for trial in range(300):
        a, b = rng.random((2, 60)) < 0.7
        wrong[0] += ac.mcnemar(a, b) < 0.05
        wrong[1] += ac.permutation_test(a, b, n=199, seed=trial) <= 0.05
    assert 0 < wrong[0] / 300 <= 0.06 and wrong[1] / 300 <= 0.08


def test_better_knows_how_often_it_looks():
    """Twenty models that are all as good as the baseline: one false word at most now and then."""
    rng, false = np.random.default_rng(2), {"one by one": 0, "holm": 0}
    for _ in range(60):
        base = ac.Accuracy(hits=rng.random(200) < 0.7, chance=0.25)
        others = {str(i): ac.Accuracy(hits=rng.random(200) < 0.7, chance=0.25) for i in range(12)}
        rows = ac.compare_accuracy(base, others)
        false["one by one"] += any(r.difference.p < 0.05 for r in rows.values())
        false["holm"] += any(r.word != "undecided" for r in rows.values())
    assert false["holm"] <= 7 < false["one by one"]


def test_a_comparison_by_hand():
    hits = np.arange(100) < 60
    better, worse = hits.copy(), hits.copy()
    better[60:80] = True
    worse[:30] = False
    rows = ac.compare_accuracy(*[ac.Accuracy(hits=hits, chance=0.5)], {
        "better": ac.Accuracy(hits=better, chance=0.5), "worse": ac.Accuracy(hits=worse, chance=0.5),
        "same": ac.Accuracy(hits=hits, chance=0.5),
    })  # fmt: skip
    assert [(r.word, r.won, r.lost) for r in rows.values()] == [
        ("better", 20, 0),
        ("worse", 0, 30),
        ("undecided", 0, 0),
    ]
    d = rows["better"].difference
    assert d.value == 0.2 and d.low < 0.2 < d.high and d.p == 2 / 2**20


@pytest.mark.parametrize(("d", "u"), [(0.1, 0.2), (0.05, 0.1), (0.08, 0.3)])
def test_the_power_is_what_was_promised(d, u):
    n, rng = ac.items_needed(d, u), np.random.default_rng(0)
    draws = rng.multinomial(n, [(u + d) / 2, (u - d) / 2, 1 - u], 800)
    seen = np.mean([ac.coin_test(int(w), int(k)) < 0.05 for w, k, _ in draws])
    assert 0.7 < seen < 0.87  # the exact test is a little more careful than the formula
    assert ac.items_needed(-d, u) == n > ac.items_needed(2 * d, u) and n < ac.items_needed(d, u, power=0.9)


def test_documents_needed_by_hand():
    # (1.96 + 0.8416)² · 0.05² / ln(1.01)² = 198.2
    assert ac.documents_needed(1.01, 0.05) == 199 and ac.documents_needed(2.0, 0.0) == 2
    assert ac.documents_needed(0.99, 0.05) == 195


# ------------------------------------------------------------------------------------ calibration


def ece_reference(p, y, bins):
    edges = [np.float64(b) / bins for b in range(bins + 1)]
    total = 0.0
    for b in range(bins):
        inside = [(q, r) for q, r in zip(p, y) if (edges[b] < q <= edges[b + 1]) or (b == 0 and q == 0)]
        if inside:
            q, r = np.array(inside, dtype=np.float64).T
            total += len(inside) / len(p) * abs(q.mean() - r.mean())
    return total


confidences = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]))


@given(st.lists(st.tuples(confidences, st.booleans()), min_size=1), st.integers(1, 20))
@hypothesis_settings(max_examples=150, deadline=None)
def test_ece_is_its_definition(rows, bins):
    p, y = [r[0] for r in rows], [r[1] for r in rows]
    assert ac.reliability(p, y, bins=bins).ece == pytest.approx(ece_reference(p, y, bins), abs=1e-12)


def test_bins_of_equal_mass():
    rng = np.random.default_rng(0)
    p = rng.random(103)
    found = ac.reliability(p, rng.random(103) < p, bins=10, equal="mass")
    assert found.count.sum() == 103 and set(found.count) <= {10, 11} and (np.diff(found.confidence) > 0).all()


def test_a_calibrated_model_has_an_ece_above_zero_and_the_debiased_form_is_fair():
    rng, rows = np.random.default_rng(0), []
    for _ in range(300):
        p = rng.beta(3, 1, 160)
        r = ac.reliability(p, rng.random(160) < p)
        rows.append((r.ece, r.squared, r.debiased))
    ece, squared, fair = np.mean(rows, 0)
    assert ece > 0.06 and abs(fair) < 3 * np.std(rows, 0)[2] / math.sqrt(300) and abs(fair) < squared / 8
    # and where something is wrong, it sees how much: half of the confidence is too much by 0.2
    p = np.full(4000, 0.9)
    y = rng.random(4000) < 0.7
    assert ac.reliability(p, y).debiased == pytest.approx(0.04, abs=0.012)


def test_the_calibration_test_is_wrong_as_often_as_it_says_and_finds_a_fault():
    rng, found = np.random.default_rng(3), []
    for seed in range(120):
        p = rng.beta(3, 1, 100)
        found.append(ac.calibration_test(p, rng.random(100) < p, n=99, seed=seed).p)
    assert np.mean(np.array(found) <= 0.05) <= 0.11 and 0.35 < np.mean(found) < 0.65
    p = rng.beta(3, 1, 400)
    bad = ac.calibration_test(p, rng.random(400) < p - 0.15, n=99)
    assert bad.p == 0.01 and bad.ece > bad.high > bad.expected > 0 and "p = 0.010" in str(bad)


def test_brier_by_hand():
    assert ac.brier([[0.5, 0.5], [1.0, 0.0]], [0, 0]) == pytest.approx(0.25)
    assert ac.brier([[0.0, 1.0]], [0]) == 2.0 and ac.brier([[0.2, 0.3, 0.5]], [2]) == pytest.approx(0.38)


@pytest.mark.parametrize("classes", [2, 5, 1200])
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_minimum(true, classes):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(400, classes, generator=g, dtype=torch.float64)
    y = torch.multinomial((z / true).softmax(1), 1, generator=g)[:, 0]
    found = ac.fit_temperature(z, y)
    nll = lambda t: torch.nn.functional.cross_entropy(z / t, y).item()
    grid = [found * math.exp(x / 2000) for x in range(-40, 41)]
    assert min(grid, key=nll) == pytest.approx(found, rel=2e-3)
    assert ac.fit_temperature(z.float() + 70, y) == pytest.approx(found, rel=2e-3)  # a constant changes nothing
    assert ac.fit_temperature(z * 50, y) == pytest.approx(50 * found, rel=1e-4)  # far from where the search begins


# ------------------------------------------------------------------------------------ contamination


def test_the_order_test_finds_a_preference_and_is_uniform_without_one():
    # the smallest sum of place · value is that of falling values
    found = ac.order_test(lambda items: sum(i * x for i, x in enumerate(items)), [9, 7, 5, 3, 1], n=99)
    assert found.p == (1 + sum(found.shuffled <= found.canonical)) / 100 <= 0.06
    assert ac.order_test(lambda items: 1.0, [1, 2, 3], n=19).p == 1.0
    p = []
    for seed in range(60):
        noise = random.Random(seed)
        p.append(ac.order_test(lambda items, noise=noise: noise.random(), range(8), n=19, seed=seed).p)
    assert 0.4 < np.mean(p) < 0.6 and min(p) >= 0.05


# ------------------------------------------------------------------------------------ bad input

ok = ac.Accuracy(hits=np.ones(30, bool), chance=0.5)
BAD = [
    (lambda m: item(choices=("b", "b ")), "choices is"),
    (lambda m: item(choices=("b",)), "choices is"),
    (lambda m: item(choices="bc"), "choices is 'bc'"),
    (lambda m: item(choices=("b", "")), "choices is"),
    (lambda m: item(answer=2), "answer is 2"),
    (lambda m: item(answer=True), "answer is True"),
    (lambda m: item(context=" \n"), "context is"),
    (lambda m: ac.loglikelihood(m, Pieces(), []), "pairs is"),
    (lambda m: ac.loglikelihood(m, Pieces(), [("", "a")]), "bos=True"),
    (lambda m: ac.loglikelihood(m, Pieces(), [("a", "")]), "continuation is ''"),
    (lambda m: ac.loglikelihood(m, Pieces(), [("a " * 90, "a")]), "at most 64"),
    (lambda m: ac.loglikelihood(lambda ids: torch.zeros(*ids.shape, 64) * math.nan, Pieces(), PAIRS), "finite"),
    (lambda m: ac.loglikelihood(lambda ids: m(ids.flip(1)).logits.flip(1), Pieces(), PAIRS), "sees later tokens"),
    (lambda m: ac.score_choices(m, Pieces(), []), "items is"),
    (lambda m: ac.score_choices(m, Pieces(), [item(choices=(" a", "a")), item()]), "choices is (' a', 'a')"),
    (lambda m: ac.score_choices(m, Pieces(), [item()] * 20), "answers is 'all 0'"),
    (lambda m: ac.score_choices(m, Pieces(), [item()], shots=[item(1)]), "shots is"),
    (lambda m: ac.multiple_choice(m, Pieces(), [item()], norm="words"), "norm is 'words'"),
    (lambda m: ac.accuracy([0, 1], [item()]), "picks is"),
    (lambda m: scored([item()], [[-1.0, -2.0]]).accuracy("unconditional"), "alone is None"),
    (lambda m: ac.wilson_interval(3, 2), "hits is 3"),
    (lambda m: ac.wilson_interval(3, 20, level=95), "level is 95"),
    (lambda m: ac.paired_interval(5, 6, 10), "lost is 6"),
    (lambda m: ac.mcnemar([True, False], [True]), "shape of b"),
    (lambda m: ac.mcnemar([1, 0], [1, 1]), "dtype"),
    (lambda m: ac.permutation_test([1.0], [1.0, 2.0]), "b is"),
    (lambda m: ac.permutation_test([1.0], [math.nan]), "differences is"),
    (lambda m: ac.compare_accuracy(ok, {"a": ok}, correction="none"), "holm"),
    (lambda m: ac.compare_accuracy(ok, {"a": ac.Accuracy(hits=np.ones(31, bool), chance=0.5)}), "shape of b"),
    (lambda m: ac.compare_accuracy(ac.Accuracy(hits=np.ones(19, bool), chance=0.5), {}), "items is 19"),
    (lambda m: ac.items_needed(0.0, 0.1), "difference is 0.0"),
    (lambda m: ac.items_needed(0.2, 0.1), "disagree is 0.1"),
    (lambda m: ac.documents_needed(1.0, 0.1), "ratio is 1"),
    (lambda m: ac.documents_needed(1.1, -0.1), "deviation is -0.1"),
    (lambda m: ac.reliability([0.5, 1.1], [True, True]), "confidence is"),
    (lambda m: ac.reliability([0.5, math.nan], [True, True]), "confidence is"),
    (lambda m: ac.reliability([0.5], [True, True]), "shape of correct"),
    (lambda m: ac.reliability([0.5], [1]), "dtype of correct"),
    (lambda m: ac.reliability([0.5], [True], bins=0), "bins is 0"),
    (lambda m: ac.reliability([0.5], [True], equal="size"), "equal is"),
    (lambda m: ac.reliability([0.5], [True]).debiased, "at least two"),
    (lambda m: ac.brier([[0.5, 0.4]], [0]), "sums of the rows"),
    (lambda m: ac.brier([[1.5, -0.5]], [0]), "p is"),
    (lambda m: ac.brier([[0.5, 0.5]], [2]), "targets is"),
    (lambda m: ac.brier([[0.5, 0.5]], [0, 1]), "shape of targets"),
    (lambda m: ac.fit_temperature([[2.0, 1.0], [0.0, 1.0]], [0, 1]), "largest logit"),
    (lambda m: ac.fit_temperature([[2.0, 1.0], [0.0, 1.0]], [1, 0]), "no better than chance"),
    (lambda m: ac.fit_temperature([[2.0, 1.0]], [2]), "targets is"),
    (lambda m: ac.fit_temperature([[2.0, math.inf]], [0]), "logits is"),
    (lambda m: ac.order_test(sum, [1, 2]), "items is 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_one_sentence(call, says, llama):
    with pytest.raises(BadInput) as e:
        call(llama)
    assert says in str(e.value) and str(e.value).count("\n") == 0 and str(e.value).endswith(".")

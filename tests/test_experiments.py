"""Experiments: designs, aliases, effects against least squares, power against scipy, nested variance, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from llmcourse import experiments as ex
from llmcourse.settings import BadInput
from llmcourse.verdicts import Difference

FOUR = {"a": (1, 2), "b": (0, 1), "c": (4, 16), "d": (0.0, 0.3)}
HALF = ex.fractional_factorial(FOUR, {"d": "a*b*c"})
FULL = ex.full_factorial(FOUR)


def test_a_full_factorial_has_each_combination_once():
    found = [tuple(FULL.settings(i).values()) for i in range(len(FULL))]
    assert sorted(found) == sorted(itertools.product(*FOUR.values())) and FULL.resolution is None
    assert FULL.settings(0) == {"a": 1, "b": 0, "c": 4, "d": 0.0} and FULL.settings(1)["a"] == 2


@pytest.mark.parametrize(
    ("factors", "generators", "resolution"),
    [
        ("abc", {"c": "a*b"}, 3),
        ("abcd", {"d": "a*b*c"}, 4),
        ("abcd", {"d": "-a*b*c"}, 4),
        ("abcde", {"e": "a*b*c*d"}, 5),
        ("abcdefg", {"d": "a*b", "e": "a*c", "f": "b*c", "g": "a*b*c"}, 3),
        ("abcdef", {"e": "a*b*c", "f": "b*c*d"}, 4),
    ],
)
def test_a_fraction_is_balanced_and_its_aliases_are_its_columns(factors, generators, resolution):
    design = ex.fractional_factorial({f: (0, 1) for f in factors}, generators)
    assert len(design) == 2 ** (len(factors) - len(generators)) and design.resolution == resolution
    assert len(design.words) == 2 ** len(generators) - 1
    assert np.array_equal(design.coded.T @ design.coded, len(design) * np.eye(len(factors)))
    named = {ex.term_name(t): design.column(t) for t in design.terms(2)}
    for name, column in named.items():  # aliases by comparison of the columns, sign and all
        same = {n for n, c in named.items() if n != name and np.array_equal(c, column)}
        same |= {f"-{n}" for n, c in named.items() if np.array_equal(c, -column)}
        assert set(ex.aliases(design)[name]) == same


@pytest.mark.parametrize("design", [FULL, HALF], ids=["full", "half"])
@pytest.mark.parametrize("blocks", [True, False])
def test_effects_are_those_of_least_squares(design, blocks):
    dice = np.random.default_rng(0)
    y = dice.normal(size=(len(design), 3)) + [0.0, 3.0, -2.0] + 0.7 * design.column(("b",))[:, None]
    found = ex.effects(design, y, blocks=blocks)
    kept = [tuple(name.split("×")) for name in found.table]
    # the model of all settings, and a column for each seed
    cells = np.kron(np.eye(len(design)), np.ones((3, 1)))
    X = np.hstack([cells, np.kron(np.ones((len(design), 1)), np.eye(3))[:, 1:]]) if blocks else cells
    residual = y.ravel() - X @ np.linalg.lstsq(X, y.ravel(), rcond=None)[0]
    freedom = y.size - np.linalg.matrix_rank(X)
    assert found.freedom == freedom
    assert math.isclose(found.spread, math.sqrt(residual @ residual / freedom))
    columns = np.stack([np.ones(len(design)), *(design.column(t) for t in kept)], 1)
    slopes = np.linalg.lstsq(np.repeat(columns, 3, 0), y.ravel(), rcond=None)[0][1:]
    for name, slope in zip(found.table, slopes, strict=True):
        d, error = found.table[name], 2 * found.spread / math.sqrt(y.size)
        assert math.isclose(d.value, 2 * slope, abs_tol=1e-12)
        assert math.isclose(d.high - d.value, stats.t.ppf(0.975, freedom) * error, rel_tol=1e-6)
        assert math.isclose(d.p, 2 * stats.t.sf(abs(d.value) / error, freedom), rel_tol=1e-5, abs_tol=1e-9)
    assert found.words()["b"] == "higher" or not blocks
    assert "\nb = " not in str(found)


def test_of_confounded_effects_one_is_shown_with_the_names_of_the_others():
    found = ex.effects(HALF, np.random.default_rng(0).normal(size=(8, 2)))
    assert len(found.table) == 7 and "a×b = c×d" in str(found)


def test_lenth_by_hand_and_in_place_of_repeats():
    # sizes 1 to 6 and 100: first 1.5 · 4 = 6, so 100 is out; then 1.5 · median(1 … 6)
    assert ex.lenth([1, -2, 3, -4, 5, -6, 100]) == (5.25, 7 / 3)
    y = np.random.default_rng(0).normal(size=16) + 3 * FULL.column(("a",))
    found = ex.effects(FULL, y)
    assert found.freedom == 5 and found.words()["a"] == "higher" and len(found.table) == 10


def test_run_order_is_random_within_blocks():
    order = ex.run_order(FULL, [7, 8], order_seed=3)
    assert [s for _, s in order] == [7] * 16 + [8] * 16
    first, second = ([r for r, s in order if s == seed] for seed in (7, 8))
    assert sorted(first) == sorted(second) == list(range(16)) and first != second != sorted(second)
    assert order == ex.run_order(FULL, [7, 8], order_seed=3) != ex.run_order(FULL, [7, 8], order_seed=4)


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_a_latin_square_has_each_number_once_in_rows_and_columns(k):
    squares = [ex.latin_square(k, seed=s) for s in range(20)]
    for square in squares:
        assert all(sorted(line) == list(range(k)) for line in (*square, *square.T))
    assert len({s.tobytes() for s in squares}) > 1


def test_ablation_where_one_at_a_time_is_wrong():
    design = ex.full_factorial({"rate": (0, 1), "warmup": (0, 1)})
    y = np.array([2.0, 2.4, 2.1, 1.7])[:, None] + np.array([0.0, 0.01, 0.03])
    found = ex.ablation(design, y)
    assert [round(d.value, 9) for d in found["rate"]] == [0.4, -0.4, 0.0]
    assert [round(d.value, 9) for d in found["warmup"]] == [0.1, -0.7, -0.3]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("n", [2, 3, 5, 20, 100])
@pytest.mark.parametrize("difference", [0.0, 0.1, -0.5, 2.0])
def test_power_is_that_of_the_noncentral_t(difference, n, pairs):
    freedom = n - 1 if pairs else 2 * n - 2
    shift = difference * math.sqrt(n if pairs else n / 2)
    edge = stats.t.ppf(0.975, freedom)
    want = stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift)
    want = 1.0 if shift > 15 else want  # scipy's series fails there
    assert math.isclose(ex.power(difference, 1.0, n, pairs=pairs), want, rel_tol=2e-3, abs_tol=1e-4)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.5, 10.0])
def test_sample_size_is_the_smallest(ratio, pairs):
    n = ex.sample_size(ratio, 1.0, pairs=pairs)
    assert ex.power(ratio, 1.0, n, pairs=pairs) >= 0.8
    assert n == 2 or ex.power(ratio, 1.0, n - 1, pairs=pairs) < 0.8


def test_variance_components_by_hand_and_by_simulation():
    found = ex.variance_components([[1.0, 3.0], [5.0, 7.0]], ["text", "draw"])
    # means 2 and 6: mean squares 2 · 8 = 16 and 2, so (16 - 2) / 2 = 7 and 2
    assert math.isclose(found.parts["text"].variance, 7) and math.isclose(found.parts["draw"].variance, 2)
    assert list(found.parts) == ["text", "draw"] and found.mean.value == 4
    assert math.isclose(found.mean.high - 4, stats.t.ppf(0.975, 1) * 2, rel_tol=1e-6)
    dice, estimates, inside = np.random.default_rng(0), [], []
    for trial in range(300):
        y = dice.normal(0, 3, (6, 1, 1)) + dice.normal(0, 2, (6, 3, 1)) + dice.normal(0, 1, (6, 3, 2))
        found = ex.variance_components(y, ["a", "b", "c"], draws=300, seed=trial)
        estimates.append([p.variance for p in found.parts.values()])
        inside.append(found.mean.low <= 0 <= found.mean.high)
    assert np.allclose(np.mean(estimates, 0), [9, 4, 1], rtol=0.15) and 0.9 < np.mean(inside) < 0.99


def test_intervals_of_three_texts_two_draws_and_two_orders_hold():
    """The size at which the chapter decides: each component and the mean, 93 to 97 % up to chance."""
    scales, dice, held = {"text": 0.013, "draw": 0.0065, "order": 0.0005}, np.random.default_rng(3), []
    for trial in range(500):
        y = sum(dice.normal(0, s, (3, 2, 2)[: k + 1] + (1,) * (2 - k)) for k, s in enumerate(scales.values()))
        found = ex.variance_components(y, list(scales), draws=200, seed=trial)
        inside = [p.low <= s**2 <= p.high for p, s in zip(found.parts.values(), scales.values())]
        held.append([*inside, found.mean.low <= 0 <= found.mean.high])
    assert (np.abs(np.mean(held, 0) - 0.95) < 0.035).all(), np.mean(held, 0)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_effects_hold(seeds):
    dice, held = np.random.default_rng(seeds), []
    for _ in range(400):
        y = dice.normal(size=(8, seeds)) + dice.normal(size=seeds)
        held.append([d.low <= 0 <= d.high for d in ex.effects(HALF, y, order=1).table.values()])
    assert 0.93 < np.mean(held) < 0.97, np.mean(held)


def test_a_plan_says_its_power_where_the_spread_is_known():
    given = dict(question="q", factors=FOUR, controls="c", outcome="o", seeds=(0, 1, 2), smallest=0.03)
    unknown, known = ex.Plan(**given), ex.Plan(**given, spread=0.04)
    assert unknown.power is unknown.needed is None and "power" not in str(unknown)
    assert known.power == ex.power(0.03, 0.04, 3) and known.needed == ex.sample_size(0.03, 0.04) == 16
    assert "16 seeds" in str(known) and known.digest != unknown.digest
    enough = ex.Plan(**given | {"seeds": tuple(range(16))}, spread=0.04)
    assert enough.power >= 0.8 > ex.Plan(**given | {"seeds": tuple(range(15))}, spread=0.04).power
    with pytest.raises(BadInput, match="spread is 0"):
        ex.Plan(**given, spread=0)


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((-0.3, -0.1), "adopt"), ((-0.3, -0.0999), "undecided"), ((0.1, 0.3), "reject"), ((0.0999, 0.3), "undecided"),
        ((-0.0999, 0.0999), "equivalent"), ((-0.1, 0.05), "undecided"), ((-0.05, 0.1), "undecided"),
    ],
)  # fmt: skip
def test_the_decision_on_its_borders(interval, word):
    assert ex.decide(Difference(sum(interval) / 2, *interval, 0.5), 0.1) == word


def test_a_plan_has_another_digest_when_anything_changes():
    given = dict(question="q", factors=FOUR, controls="c", outcome="o", seeds=(0, 1), smallest=0.1)
    changes = dict(question="p", factors={"a": (1, 2)}, controls="x", outcome="x", seeds=(0, 2), smallest=0.2)
    plans = [ex.Plan(**given), *(ex.Plan(**given | {k: v}) for k, v in changes.items()), ex.Plan(**given, level=0.9)]
    assert len({p.digest for p in plans}) == len(plans) and plans[0].digest == ex.Plan(**given).digest


Y = np.zeros((8, 2))
REFUSED = {
    "no factors": lambda: ex.full_factorial({}),
    "one level": lambda: ex.full_factorial({"a": (1, 1)}),
    "three levels": lambda: ex.full_factorial({"a": (1, 2, 3)}),
    "a name with a sign": lambda: ex.full_factorial({"a*b": (1, 2)}),
    "13 factors": lambda: ex.full_factorial({f"f{i}": (0, 1) for i in range(13)}),
    "unknown generator": lambda: ex.fractional_factorial(FOUR, {"e": "a*b"}),
    "one factor": lambda: ex.fractional_factorial(FOUR, {"d": "a"}),
    "twice": lambda: ex.fractional_factorial(FOUR, {"d": "a*a"}),
    "of itself": lambda: ex.fractional_factorial(FOUR, {"d": "a*d"}),
    "two that are equal": lambda: ex.fractional_factorial(FOUR, {"c": "a*b", "d": "a*b"}),
    "no text": lambda: ex.fractional_factorial(FOUR, {"d": 3}),
    "run": lambda: FULL.settings(16),
    "runs": lambda: ex.effects(HALF, Y[:7]),
    "nan": lambda: ex.effects(HALF, Y * math.nan),
    "level": lambda: ex.effects(HALF, Y, level=1.0),
    "order": lambda: ex.effects(HALF, Y, order=0),
    "ablation of a fraction": lambda: ex.ablation(HALF, Y),
    "ablation of one seed": lambda: ex.ablation(FULL, np.zeros((16, 1))),
    "lenth of six": lambda: ex.lenth([1.0] * 6),
    "one pair": lambda: ex.power(1.0, 1.0, 1),
    "no spread": lambda: ex.power(1.0, 0.0, 5),
    "no difference": lambda: ex.sample_size(0.0, 1.0),
    "wanted": lambda: ex.sample_size(1.0, 1.0, wanted=1.0),
    "a square of one": lambda: ex.latin_square(1),
    "a seed twice": lambda: ex.run_order(HALF, [1, 1]),
    "no seed": lambda: ex.run_order(HALF, []),
    "names": lambda: ex.variance_components(np.zeros((2, 2)), ["a"]),
    "equal names": lambda: ex.variance_components(np.zeros((2, 2)), ["a", "a"]),
    "one text": lambda: ex.variance_components(np.zeros((1, 2)), ["a", "b"]),
    "level of components": lambda: ex.variance_components(np.eye(2), ["a", "b"], level=1),
    "smallest": lambda: ex.decide(Difference(0, 0, 0, 1), 0.0),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"^[^\n]+ is [^\n]+; allowed: [^\n]+\.$"):
        call()

"""Words for differences: Student's t beside tables, Holm by its definition, and how often the words are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmcourse.settings import BadInput
from llmcourse.verdicts import (
    Difference,
    benjamini_hochberg,
    held_level,
    holm,
    mean_interval,
    paired,
    student_quantile,
    student_tail,
    told_ends,
    verdicts,
    welch,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (30, 2.04227), (1000, 1.96234)]
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, rel=2e-5)
    assert student_tail(quantile, freedom) == pytest.approx(0.05, rel=2e-4)
    assert student_tail(0.0, freedom) == pytest.approx(1.0)


def test_worked_examples():
    # differences 1, 2, 3: mean 2, standard error 1/√3, t = 3.4641 with 2 degrees of freedom
    d = paired([0, 0, 0], [1, 2, 3])
    assert d.value == 2 and d.low == pytest.approx(2 - 4.30265 / 3**0.5, rel=1e-5)
    assert d.p == pytest.approx(0.07418, abs=1e-5)
    # equal spreads and sizes: 4 degrees of freedom
    w = welch([1, 2, 3], [3, 4, 5])
    assert w.value == 2 and w.high == pytest.approx(2 + 2.77645 * (2 / 3) ** 0.5, rel=1e-5)
    assert welch([1, 1], [1, 1]) == Difference(0, 0, 0, 1.0) and welch([1, 1], [2, 2]).p == 0


def test_a_mean_of_units_by_hand():
    assert mean_interval([1, 2, 3]) == paired([0, 0, 0], [1, 2, 3])
    assert mean_interval([4.0] * 8)[:3] == (4, 4, 4)
    for bad in ([1.0], [], [[1.0, 2.0]], [1.0, np.nan]):
        with pytest.raises(BadInput, match="at least two finite numbers"):
            mean_interval(bad)


def test_a_difference_names_its_level_unless_it_is_the_usual_one():
    assert str(Difference(0.1, 0.0, 0.2, 0.5)) == "+0.100 (+0.000 to +0.200)"
    assert str(Difference(0.1, 0.0, 0.2, 0.5, 0.912)) == "+0.100 (+0.000 to +0.200, 91.2 %)"
    assert str(Difference(0.1, 0.0, 0.2, 0.5, None)) == "+0.100 (no interval: few or skewed units)"
    assert told_ends(1, 2, 0.9, ".1f") == "1.0 to 2.0, 90 %"
    assert paired([1, 2], [2, 4], level=0.9).level == welch([1, 2], [2, 4], level=0.9).level == 0.9
    assert "90 %" in str(mean_interval([1, 2, 3], level=0.9))


NOISE = {  # draws (trials, n) with mean 0
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.random(shape) - 0.5,
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
}


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("kind", NOISE)
def test_how_often_students_interval_of_few_seeds_holds(kind, n):
    """Exact for normal differences, near it for flat ones; skewed ones are told in the chapter on experiments."""
    draws = NOISE[kind](np.random.default_rng([n, 2]), (1500, n))
    held = np.mean([d.low <= 0 <= d.high for d in (paired(np.zeros(n), x) for x in draws)])
    low, high = {"normal": (0.93, 0.97), "uniform": (0.9, 0.96), "exponential": (0.84, 0.92)}[kind]
    assert low <= held <= high, held


def test_few_units_are_not_drawn_with_replacement():
    """Of eight units, Student's interval holds as it says and the bootstrap less often: that is why there is one."""
    rng, student, drawn = np.random.default_rng(0), 0, 0
    for _ in range(600):
        x = rng.standard_normal(8)
        d = mean_interval(x)
        low, high = np.quantile(x[rng.integers(8, size=(300, 8))].mean(1), [0.025, 0.975])
        student, drawn = student + (d.low <= 0 <= d.high), drawn + (low <= 0 <= high)
    assert 0.93 * 600 <= student <= 0.97 * 600 and drawn < 0.92 * 600


def test_neighbors_that_are_alike_take_from_a_level():
    alternating = [1.0, -1.0] * 8  # their correlation is below 0, which counts as chance
    assert held_level(alternating, neighbors=True) == held_level(alternating)
    # by hand: (1 - 1 + 1) / 4 = 1/4, so the reach shrinks by √1.5
    four = [1.0, 1.0, -1.0, -1.0]
    z = 1.959964 * (3 / 4) ** 0.5 / 1.5**0.5
    found = held_level(four, neighbors=True)
    assert found == pytest.approx(1 - student_tail(z, 3), abs=1e-6) and found < held_level(four)


def test_wilson_is_the_same_under_both_names():
    from llmcourse import accuracy

    assert accuracy.wilson_interval is wilson_interval and wilson_interval(np.int64(3), 7) == wilson_interval(3, 7)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_holm_is_its_definition(p):
    """Reject from the smallest on while p < α / (n - rank); the corrected value is the smallest α that rejects."""
    corrected = holm({str(i): v for i, v in enumerate(p)})
    for alpha in (0.01, 0.05, 0.3):
        rejected, n = set(), len(p)
        for rank, i in enumerate(sorted(range(n), key=lambda i: p[i])):
            if p[i] * (n - rank) >= alpha:
                break
            rejected.add(str(i))
        assert {k for k, v in corrected.items() if v < alpha} == rejected


def test_benjamini_hochberg_by_hand():
    found = benjamini_hochberg({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert found == pytest.approx({"a": 0.04, "b": 0.16 / 3, "c": 0.16 / 3, "d": 0.5}) and benjamini_hochberg({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_benjamini_hochberg_is_its_definition(p):
    """Reject the k smallest, for the largest k whose k-th smallest is below α k / n."""
    corrected, n = benjamini_hochberg({str(i): v for i, v in enumerate(p)}), len(p)
    for alpha in (0.01, 0.05, 0.3):
        k = max((i for i, v in enumerate(sorted(p), 1) if n / i * v < alpha), default=0)
        assert sorted(v for name, v in enumerate(p) if corrected[str(name)] < alpha) == sorted(p)[:k]


def test_the_correction_is_a_choice():
    rows = {str(i): Difference(1, 0.1, 1.9, p) for i, p in enumerate((0.01, 0.03, 0.035))}
    assert list(verdicts(rows).values()) == ["higher", "undecided", "undecided"]
    assert list(verdicts(rows, correction="benjamini-hochberg").values()) == ["higher"] * 3
    with pytest.raises(BadInput, match="holm, benjamini-hochberg"):
        verdicts(rows, correction="bonferroni")


def test_a_word_knows_how_many_rows_there_are():
    barely = Difference(0.05, 0.001, 0.099, 0.046)
    assert verdicts({"alone": barely}) == {"alone": "higher"}
    rows = {"first": Difference(-1, -1.1, -0.9, 1e-9), "second": barely, "third": Difference(0, -1, 1, 1.0)}
    assert verdicts(rows) == {"first": "lower", "second": "undecided", "third": "undecided"}


def test_without_any_effect_some_word_is_wrong_in_one_family_of_twenty():
    rng, wrong, single, families = np.random.default_rng(0), 0, 0, 150
    for _ in range(families):
        rows = {str(i): welch(rng.normal(size=5), rng.normal(size=5)) for i in range(5)}
        wrong += set(verdicts(rows).values()) != {"undecided"}
        single += any(d.p < 0.05 for d in rows.values())
    # expected 5 % against about 20 % without the correction
    assert wrong <= 0.1 * families < 0.13 * families <= single


def test_bad_input():
    for call in (lambda: welch([1], [1, 2]), lambda: paired([1], [2]), lambda: verdicts({}, level=1.0)):
        with pytest.raises(BadInput):
            call()

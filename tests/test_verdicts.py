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
    holm,
    paired,
    student_quantile,
    student_tail,
    verdicts,
    welch,
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

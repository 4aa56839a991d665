"""Words for differences between means of few runs: intervals, how often they hold, and corrections for many looks.

Hand-written. The chapter `nbs/06_optimizers.ipynb` tells why a word for one row has to know how many rows there are,
`nbs/05_evaluation.ipynb` why an interval has to know how many units carry it, and `nbs/10_experiments.ipynb` what
Student's interval takes for granted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from llmcourse.settings import number, one_of, require, whole

__all__ = [
    "CARRYING", "CORRECTIONS", "TOO_SKEWED", "UNSEEN", "Difference", "benjamini_hochberg", "held_level", "holm",
    "mean_interval", "paired", "student_interval", "student_quantile", "student_tail", "told_ends", "verdicts",
    "welch", "wilson_interval",
]  # fmt: skip


def told_ends(low: float, high: float, level: float | None, form: str) -> str:
    """An interval and how often such ones hold, in words; or why there is none."""
    if level is None:
        return "no interval: few or skewed units"
    return f"{low:{form}} to {high:{form}}, {100 * level:.3g} %"


class Difference(NamedTuple):
    """A difference of two means with its own interval, and the probability of one as large by chance alone."""

    value: float
    low: float
    high: float
    p: float
    level: float | None = 0.95
    """about how often such an interval holds the truth; None: too few units, or too skewed ones, to say"""

    def __str__(self) -> str:
        if self.level == 0.95:  # the rule, which heads of tables name
            return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.value:+.3f} ({told_ends(self.low, self.high, self.level, '+.3f')})"


def student_tail(t: float, freedom: float) -> float:
    """Probability that Student's t is farther from 0 than `t`, by Simpson's rule.

    With t = √ν tan θ the density becomes cosᵛ⁻¹ θ on a finite interval.
    """
    inside = lambda first: np.cos(np.linspace(first, math.pi / 2, 1001)) ** (freedom - 1) * (math.pi / 2 - first)
    weights = np.array([1, *[4, 2] * 499, 4, 1])
    first = math.atan(abs(t) / math.sqrt(freedom))
    return float(weights @ inside(first) / (weights @ inside(0.0)))


@functools.lru_cache(maxsize=256)
def student_quantile(level: float, freedom: float) -> float:
    """How far from 0 Student's t is with probability `level` at most, by bisection."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - level:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - level else (low, middle)
    return high


CARRYING = 4
"""units that carry a result at least: with fewer of them, its interval says nothing"""
UNSEEN = 50
"""a sample of k units shows less skewness than what it was drawn from: its square counts 1 + UNSEEN / k times"""
TOO_SKEWED = 0.1
"""where the skewness takes more than this from a level, the sample cannot say how much it is"""


def held_level(moves: Any, level: float = 0.95, *, neighbors: bool = False) -> float | None:
    """About how often a bootstrap interval holds the truth that was made for `level`.

    Args:
        moves: (units,) by how much each unit that is drawn moves the result; a scale does not matter.
        neighbors: each unit is followed by the next one, as blocks of one text are. Where neighbors are alike, the
            spread between units drawn one by one is too small, by √(1 + 2 ρ) for a correlation ρ of neighbors.
    Returns:
        None where fewer than `CARRYING` units carry the result, or where they are too skewed. How many carry it says
        how well the spread is known; the skewness says how far the interval lies on the wrong side. The latter is the
        term of order 1/k in the Edgeworth expansion for the percentile interval of a mean (Hall, 1992), with the
        factor 1 + `UNSEEN` / k, which is fitted to simulations in `nbs/05_evaluation.ipynb`.
    """
    u = np.asarray(moves, dtype=np.float64)
    good = u.ndim == 1 and len(u) > 0 and bool(np.isfinite(u).all())
    require(good, "moves", u.shape, "finite numbers (units,)")
    z = NormalDist().inv_cdf((1 + number("level", level, above=0, below=1)) / 2)
    k, u = len(u), u - u.mean()
    u = u / max(np.abs(u).max(), 1e-300)  # its fourth power must not vanish
    if k < CARRYING or not u.any():  # equal units: nothing says how others would differ
        return None
    carry = float(np.sum(u**2) ** 2 / np.sum(u**4))
    if carry < CARRYING:
        return None
    # the variance of a variance is (kurtosis - 1) / k of its square, and 2 / ν by definition
    freedom = min(k - 1, 2 / max(1 / carry - 1 / k, 1e-12))
    skewness = float(np.mean(u**3) / np.mean(u**2) ** 1.5)
    bell = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    lost = z * bell * max(0.0, z**4 + 20 * z**2 - 27) / 36 * skewness**2 * (1 + UNSEEN / k) / k
    # below 0 it is chance, and would make an interval seem too wide
    alike = max(0.0, float(u[1:] @ u[:-1]) / float(u @ u)) if neighbors else 0.0
    reach = z * math.sqrt((k - 1) / k / (1 + 2 * alike))
    return 1 - student_tail(reach, freedom) - lost if lost <= TOO_SKEWED else None


def student_interval(value: float, error: float, freedom: float, level: float) -> Difference:
    """An estimate with its standard error as a `Difference`: Student's interval and two-sided probability."""
    if error == 0:  # all runs alike, as at a tiny scale
        return Difference(value, value, value, float(value == 0), level)
    reach = student_quantile(level, freedom) * error
    return Difference(value, value - reach, value + reach, student_tail(value / error, freedom), level)


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Difference:
    """Mean of independent units with Student's interval: exact for normal units, however few they are.

    The bootstrap of a few units is too narrow, since it draws from nothing but them; with dozens the two agree.

    Args:
        values: (units,) at least two.
    """
    v = np.asarray(values, dtype=np.float64)
    good = v.ndim == 1 and len(v) >= 2 and bool(np.isfinite(v).all())
    require(good, "values", v.shape, "at least two finite numbers (units,)")
    return student_interval(float(v.mean()), float(v.std(ddof=1)) / math.sqrt(len(v)), len(v) - 1, level)


def wilson_interval(hits: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share of `hits` in `n`; `nbs/05c_accuracy.ipynb` derives it."""
    n, level = whole("n", n, 1), number("level", level, above=0, below=1)
    p, z = whole("hits", hits, 0, n) / n, NormalDist().inv_cdf((1 + level) / 2)
    middle = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def welch(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Difference:
    """mean(b) - mean(a) of independent runs, whose spreads may differ (Welch, 1947)."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    require(min(len(a), len(b)) >= 2, "runs", (len(a), len(b)), "at least two of each")
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    total = va + vb
    freedom = total**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if total else 1.0
    return student_interval(float(b.mean() - a.mean()), math.sqrt(total), freedom, level)


def paired(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Difference:
    """mean(b - a) of runs that belong together, such as those of one seed."""
    require(len(a) == len(b) >= 2, "runs", (len(a), len(b)), "as many of both, at least two pairs")
    d = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return student_interval(float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d)), len(d) - 1, level)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Probabilities for a family of comparisons (Holm, 1979): below α for one that is no effect with probability α.

    The smallest counts n times, the next one n - 1 times, and so on; none is smaller than the one before it.
    """
    found, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        least = max(least, min(1.0, (len(p) - rank) * p[name]))
        found[name] = least
    return {name: found[name] for name in p}


def benjamini_hochberg(p: Mapping[str, float]) -> dict[str, float]:
    """Probabilities for a family of comparisons: of those below α, a share α is no effect (Benjamini, Hochberg, 1995).

    The share is an expectation, and at most α for independent tests. The i-th smallest of n counts n / i times; none
    is larger than the one after it.
    """
    found, most = {}, 1.0
    for rank, name in reversed(list(enumerate(sorted(p, key=p.get), 1))):
        most = min(most, len(p) / rank * p[name])
        found[name] = most
    return {name: found[name] for name in p}


CORRECTIONS = {"holm": holm, "benjamini-hochberg": benjamini_hochberg}


def verdicts(
    differences: Mapping[str, Difference],
    *,
    level: float = 0.95,
    words: tuple[str, str, str] = ("lower", "higher", "undecided"),
    correction: str = "holm",
) -> dict[str, str]:
    """One word for each difference of a family, corrected for the size of the family.

    Args:
        words: for a difference below zero, above zero, and one that chance explains.
        correction: "holm": one false word in the family with probability 1 - `level` at most; "benjamini-hochberg":
            of the words for a difference, a share 1 - `level` is false, on average.
    """
    number("level", level, above=0, below=1)
    corrected = CORRECTIONS[one_of("correction", correction, CORRECTIONS)](
        {name: d.p for name, d in differences.items()}
    )
    decided = {name: corrected[name] < 1 - level for name in differences}
    return {name: words[2] if not decided[name] else words[d.value > 0] for name, d in differences.items()}

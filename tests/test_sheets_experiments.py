"""Right answers of other kinds pass the sheet of chapter 10; the broken code of a statement fails by its name."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise
from statistics import fmean, mean, variance

import numpy as np
import pytest
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("experiments")


@right("effect")
def effect_numpy(signs, y, term):
    if len(signs) != len(y) or len(y) == 0:
        raise ValueError
    x, y = np.array(signs)[:, term].prod(1), np.array(y)
    if abs(x.sum()) == len(x):
        raise ValueError("constant")
    return float(y[x > 0].mean() - y[x < 0].mean())


@right("effect")
def effect_by_counting_minus_signs(signs, y, term):
    if len(signs) != len(y):
        raise ValueError
    even = [v for row, v in zip(signs, y) if [row[i] for i in term].count(-1) % 2 == 0]
    odd = [v for row, v in zip(signs, y) if [row[i] for i in term].count(-1) % 2]
    if not even or not odd:
        raise ValueError
    return fmean(even) - fmean(odd)


@right("aliases")
def aliases_by_subsets(effect, generators):
    words, found = [frozenset(g.replace("=", "")) for g in generators], []
    for size in range(1, len(words) + 1):
        for some in combinations(words, size):
            letters = Counter(effect + "".join("".join(w) for w in some))
            found.append("".join(sorted(c for c, times in letters.items() if times % 2)))
    if "" in found:
        raise ValueError
    return sorted(sorted(found), key=len)


@right("aliases")
def aliases_by_columns(effect, generators):
    """Make the runs, and compare the columns of all products."""
    made = dict(g.split("=") for g in generators)
    letters = sorted({*effect, *"".join(generators)} - {"="})
    free = [c for c in letters if c not in made]
    runs = np.array(np.meshgrid(*[[-1, 1]] * len(free))).reshape(len(free), -1)
    column = dict(zip(free, runs))
    for c, others in made.items():
        column[c] = np.prod([column[o] for o in others], 0)
    product = lambda names: np.prod([column[c] for c in names], 0)
    own = product(effect)
    if (own == own[0]).all():
        raise ValueError
    every = ["".join(n) for k in range(1, len(letters) + 1) for n in combinations(letters, k)]
    return [name for name in every if (product(name) == own).all() and name != "".join(sorted(effect))]


def _is_latin(square):
    k = len(square)
    line = set(range(k))
    return k > 2 and all(len(r) == k and set(r) == line for r in square) and all(set(c) == line for c in zip(*square))


@right("missing")
def missing_by_least_squares(square, y):
    k = len(square)
    if not _is_latin(square) or sum(v is None for row in y for v in row) != 1:
        raise ValueError
    row = lambda s, p: np.concatenate([np.eye(k)[s], np.eye(k)[p], np.eye(k)[square[s][p]]])
    runs = [(s, p) for s in range(k) for p in range(k)]
    there = [(s, p) for s, p in runs if y[s][p] is not None]
    found = np.linalg.lstsq(np.array([row(*r) for r in there]), np.array([y[s][p] for s, p in there]), rcond=None)[0]
    ((s, p),) = set(runs) - set(there)
    return float(row(s, p) @ found)


@right("missing")
def missing_by_iteration(square, y):
    """Put the fit into the empty place until it stays."""
    k, none = len(square), [(s, p) for s, row in enumerate(y) for p, v in enumerate(row) if v is None]
    if not _is_latin(square) or len(none) != 1:
        raise ValueError("square")
    (s, p), x = none[0], 0.0
    same = [(i, j) for i in range(k) for j in range(k) if square[i][j] == square[s][p]]
    for _ in range(200):
        full = [[x if v is None else v for v in row] for row in y]
        all_mean = mean(v for row in full for v in row)
        fit = mean(full[s]) + mean(r[p] for r in full) + mean(full[i][j] for i, j in same) - 2 * all_mean
        x = fit
    return x


@right("seeds_needed")
def seeds_by_critical_number(p, level, wanted):
    if not p > 0.5 or p > 1 or not 0 < level < 1 or not 0 < wanted < 1:
        raise ValueError
    for n in range(2, 1000):
        fair = [math.comb(n, w) for w in range(n + 1)]
        called = [c for c in range(n + 1) if Fraction(2 * sum(fair[c:]), 2**n) <= Fraction(level)]
        if called and sum(fair[w] * p**w * (1 - p) ** (n - w) for w in range(called[0], n + 1)) >= wanted:
            return n


@right("seeds_needed")
def seeds_numpy(p, level, wanted):
    for x, top in ((p - 0.5, 0.5), (level, 1 - 1e-15), (wanted, 1 - 1e-15)):
        if not 0 < x <= top:
            raise ValueError("no probability")
    n, fair, true = 0, np.ones(1), np.ones(1)
    while True:
        n += 1
        fair = np.convolve(fair, [0.5, 0.5])
        true = np.convolve(true, [1 - p, p])
        real = 2 * fair[::-1].cumsum()[::-1] <= level
        if true[real].sum() >= wanted:
            return n


@right("pairs_worth")
def worth_by_statistics(a, b):
    if len(a) != len(b) or len(a) <= 1:
        raise ValueError
    spread = variance([x - y for x, y in zip(a, b)])
    if spread == 0:
        raise ValueError("no spread")
    return (variance(a) + variance(b)) / spread


@right("pairs_worth")
def worth_numpy(a, b):
    if not len(a) == len(b) > 1:
        raise ValueError("lengths")
    c = np.cov(a, b)
    d = np.diff([a, b], axis=0)[0]
    if np.ptp(d) == 0:
        raise ValueError("constant")
    return float((c[0, 0] + c[1, 1]) / (c[0, 0] + c[1, 1] - 2 * c[0, 1]))


@right("called_real")
def holm_by_adjusted(p, level):
    if not (level > 0 and level < 1) or any(not (0 <= x <= 1) for x in p.values()):
        raise ValueError
    real, least = [], 0.0
    for rank, (name, x) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        least = max(least, (len(p) - rank) * x)
        real += [name] * (least <= level)
    return real


@right("called_real")
def holm_recursive(p, level):
    if not 0 < level < 1:
        raise ValueError("level")
    if [x for x in p.values() if not 0 <= x <= 1]:
        raise ValueError("probability")
    if not p:
        return []
    first = min(p, key=p.get)
    if p[first] > level / len(p):
        return []
    rest = {name: x for name, x in p.items() if name != first}
    return [first, *called_real_of_rest(rest, level)]


def called_real_of_rest(p, level):
    return holm_recursive(p, level)


@right("false_alarm")
def alarm_by_all_sequences(looks, level):
    if not looks or looks[0] < 1 or any(b <= a for a, b in pairwise(looks)) or not 0 < level < 1:
        raise ValueError
    n = looks[-1]
    won = (np.arange(2**n)[:, None] >> np.arange(n) & 1).cumsum(1)  # (sequences, seeds)
    said = np.zeros(2**n, dtype=bool)
    for k in looks:
        clear = [2 * sum(math.comb(k, i) for i in range(max(w, k - w), k + 1)) / 2**k <= level for w in range(k + 1)]
        said |= np.array(clear)[won[:, k - 1]]
    return float(said.mean())


@right("false_alarm")
def alarm_by_survivors(looks, level):
    if len(looks) == 0 or not level > 0 or not level < 1:
        raise ValueError("looks or level")
    alive, before = [1.0], 0
    for k in looks:
        if k <= before:
            raise ValueError("rising")
        for _ in range(k - before):
            alive = [(a + b) / 2 for a, b in zip([0.0, *alive], [*alive, 0.0])]
        fair = [math.comb(k, w) / 2**k for w in range(k + 1)]
        quiet = lambda w, k=k, fair=fair: min(sum(fair[: w + 1]), sum(fair[w:])) * 2 > level
        alive, before = [x if quiet(w) else 0.0 for w, x in enumerate(alive)], k
    return 1 - sum(alive)


@right("seeds_until")
def seeds_by_formula(value, spread, smallest, reach):
    if not min(spread, smallest, reach) > 0 or math.isnan(spread) or abs(value) == smallest:
        raise ValueError
    exact = (reach * spread / (abs(value) - smallest)) ** 2
    n = math.ceil(exact)
    if abs(value) < smallest and n == exact:
        n += 1
    return max(2, n)


@right("seeds_until")
def seeds_by_the_rule(value, spread, smallest, reach):
    for x in (spread, smallest, reach):
        if not x > 0:
            raise ValueError("above 0")
    if value in (smallest, -smallest):
        raise ValueError("never")
    n = 2
    while True:
        low, high = (value + side * reach * spread / n**0.5 for side in (-1, 1))
        if high <= -smallest or low >= smallest or (-smallest < low and high < smallest):
            return n
        n += 1


@right("next_error")
def error_numpy(y, texts, draws):
    if len(y) < 2 or len({*map(len, y)}) > 1 or len(y[0]) < 2 or texts < 1 or draws < 1:
        raise ValueError
    x = np.array(y)
    within = x.var(1, ddof=1).mean()
    between = max(x.mean(1).var(ddof=1) - within / x.shape[1], 0)
    return float(np.sqrt((between + within / draws) / texts))


@right("next_error")
def error_by_mean_squares(y, texts, draws):
    if texts <= 0 or draws <= 0 or len(y) <= 1 or min(map(len, y)) != max(map(len, y)) or len(y[0]) == 1:
        raise ValueError("sizes")
    k, m = len(y), len(y[0])
    overall = sum(map(sum, y)) / (k * m)
    total = sum((v - overall) ** 2 for row in y for v in row)
    outer = m * sum((sum(row) / m - overall) ** 2 for row in y)
    inner_square, outer_square = max(0.0, total - outer) / (k * (m - 1)), outer / (k - 1)
    text = (outer_square - inner_square) / m
    return (max(text, 0) / texts + inner_square / texts / draws) ** 0.5


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    sheet = checking.load_sheet("experiments")
    assert Counter(id for id, _ in RIGHT) == {e.id: 2 for e in sheet.values()}


@pytest.mark.parametrize("id, code", broken_code("experiments"), ids=[id for id, _ in broken_code("experiments")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_the_numbers_by_hand_of_the_statements():
    """What the statements say beside the one that is the first case of each exercise."""
    answer = {ex.name: ex.solution for ex in checking.load_sheet("experiments").values()}
    assert answer["aliases"]("A", ["D=AB", "E=AC"]) == ["BD", "CE", "ABCDE"]
    square, y = [[0, 1, 2], [1, 2, 0], [2, 0, 1]], [[0.0, 110.0, 220.0], [101.0, 211.0, 21.0], [202.0, 12.0, None]]
    assert answer["missing"](square, y) == pytest.approx(122) and (110 + 101) / 2 == 105.5
    assert answer["seeds_needed"](1.0, 0.05, 0.99) == 6
    assert answer["pairs_worth"]([1.0, 3.0], [2.0, 6.0]) == 5
    assert answer["false_alarm"]([2, 5], 0.5) == 0.625 and answer["false_alarm"]([5], 0.5) == 0.375
    assert [answer["seeds_until"](v, 0.5, 0.25, 2.0) for v in (-0.75, 0.75, 0.0)] == [4, 4, 17]
    assert answer["next_error"]([[1.0, 3.0], [5.0, 7.0]], 4, 1) == 1.5
    assert answer["next_error"]([[1.0, 3.0], [5.0, 7.0]], 1, 100) > 2.6

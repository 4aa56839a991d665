"""Right answers of other kinds pass the sheet of 05d; the broken code of its statement runs and fails by its name."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("report")


@right("runs_needed")
def runs_by_bisection(q, level):
    if not all(0 < x < 1 for x in (q, level)):
        raise ValueError
    held = lambda n: 1 - (q**n + (1 - q) ** n)
    high = 2
    while held(high) < level:
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if held(middle) >= level else (middle + 1, high)
    return low


@right("runs_needed")
def runs_by_products(q, level):
    if math.isnan(q) or math.isnan(level) or q <= 0 or q >= 1 or level <= 0 or level >= 1:
        raise ValueError("no probability")
    below, above, n = q * q, (1 - q) * (1 - q), 2
    while below + above > 1 - level:
        below, above, n = below * q, above * (1 - q), n + 1
    return n


@right("split_times")
def split_by_lstsq(tokens, seconds):
    if len(tokens) != len(seconds) or len(set(tokens)) < 2 or any(k < 1 for k in tokens):
        raise ValueError
    A = np.stack([np.ones(len(tokens)), np.array(tokens) - 1.0], 1)
    a, b = np.linalg.lstsq(A, np.array(seconds), rcond=None)[0]
    return float(a), float(b)


@right("split_times")
def split_by_normal_equations(tokens, seconds):
    if len(tokens) != len(seconds) or not tokens or min(tokens) == max(tokens) or min(tokens) <= 0:
        raise ValueError("no answer")
    x, n = [k - 1 for k in tokens], len(tokens)
    sx, sxx, st, sxt = sum(x), sum(k * k for k in x), sum(seconds), sum(k * t for k, t in zip(x, seconds))
    b = (n * sxt - sx * st) / (n * sxx - sx**2)
    return (st - b * sx) / n, b


@right("throughput")
def throughput_by_loop(runs, warmup):
    if warmup < 0:
        raise ValueError
    tokens = total = 0
    for i, (count, seconds) in enumerate(runs):
        if i < warmup:
            continue
        if not seconds > 0:
            raise ValueError("the clock")
        tokens, total = tokens + count, total + seconds
    if total == 0:
        raise ValueError("no runs")
    return tokens / total


@right("throughput")
def throughput_weighted_mean_of_rates(runs, warmup):
    counted = np.array(runs[max(warmup, 0) :], dtype=float).reshape(-1, 2)
    if warmup < 0 or len(counted) == 0 or not (counted[:, 1] > 0).all():
        raise ValueError
    return float(np.average(counted[:, 0] / counted[:, 1], weights=counted[:, 1]))


@right("millijoules_per_token")
def energy_by_cases(before, after, largest, tokens):
    if not before or len(before) != len(after) or len(after) != len(largest) or tokens <= 0:
        raise ValueError
    used = 0
    for old, new, end in zip(before, after, largest):
        if min(old, new) < 0 or max(old, new) > end:
            raise ValueError("no number of this counter")
        used += new - old if new >= old else end - old + 1 + new
    return used / tokens / 1e3


@right("millijoules_per_token")
def energy_numpy(before, after, largest, tokens):
    if len({len(before), len(after), len(largest)}) != 1 or len(before) == 0 or tokens < 1:
        raise ValueError("lists")
    b, a, end = (np.array(x) for x in (before, after, largest))
    if ((b < 0) | (a < 0) | (b > end) | (a > end)).any():
        raise ValueError("outside")
    return float((np.where(a < b, end + 1, 0) + a - b).sum()) * 1e-3 / tokens


@right("expected_best")
def best_by_summing_tails(times, n):
    """E[min] = smallest + Σ gap · P(min is beyond the gap)."""
    if n < 1:
        raise ValueError
    ordered = sorted(times)
    if not ordered:
        raise ValueError
    m, value = len(ordered), ordered[0]
    for i in range(1, m):
        value += (ordered[i] - ordered[i - 1]) * (1 - i / m) ** n
    return value


@right("expected_best")
def best_by_fractions(times, n):
    if not len(times) or n <= 0:
        raise ValueError("nothing")
    m = len(times)
    chance = lambda i: Fraction(m - i, m) ** n - Fraction(m - i - 1, m) ** n
    return float(sum(Fraction(t) * chance(i) for i, t in enumerate(sorted(times))))


@right("standard_error")
def error_by_groups(values, units):
    groups = defaultdict(list)
    if len(values) != len(units):
        raise ValueError
    for x, unit in zip(values, units):
        groups[unit].append(x)
    k, n = len(groups), len(values)
    if k <= 1:
        raise ValueError("one unit")
    mean = sum(values) / n
    return (k / (k - 1) * sum((sum(g) - len(g) * mean) ** 2 for g in groups.values())) ** 0.5 / n


@right("standard_error")
def error_torch(values, units):
    names = sorted(set(units))
    if len(values) != len(units) or len(names) < 2:
        raise ValueError
    x = torch.tensor(values, dtype=torch.float64)
    place = torch.tensor([names.index(u) for u in units])
    moves = torch.zeros(len(names), dtype=torch.float64).index_add(0, place, x - x.mean())
    return (moves.std() * math.sqrt(len(names)) / len(x)).item()  # their mean is 0


@pytest.mark.parametrize("id, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    assert Counter(id for id, _ in RIGHT) == {id: 2 for id in (e.id for e in checking.load_sheet("report").values())}


@pytest.mark.parametrize("id, code", broken_code("report"), ids=lambda x: x if x.startswith("report.") else "")
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)

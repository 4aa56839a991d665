"""Right answers of other kinds pass the sheet of 10b; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import pairwise
from statistics import NormalDist, mean, stdev

import numpy as np
import pytest
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("search")


@right("runs_needed")
def runs_by_products(share, certainty):
    if not 0 < share < 1 or not 0 < certainty < 1:
        raise ValueError
    bad, n = 1 - share, 1
    while bad > 1 - certainty:
        bad, n = bad * (1 - share), n + 1
    return n


@right("runs_needed")
def runs_by_logarithms(share, certainty):
    if not (share > 0 and certainty > 0 and share < 1 and certainty < 1):
        raise ValueError("between 0 and 1")
    return max(1, math.ceil(math.log(1 - certainty) / math.log(1 - share) - 1e-12))


@right("improvement")
def improvement_by_statistics(mean, deviation, best):
    if deviation < 0:
        raise ValueError
    if not deviation:
        return best - mean if mean < best else 0.0
    normal = NormalDist()
    u = (best - mean) / deviation
    return (best - mean) * normal.cdf(u) + deviation * normal.pdf(u)


@right("improvement")
def improvement_numpy(mean, deviation, best):
    if deviation < 0:
        raise ValueError("negative")
    if deviation == 0:
        return float(np.maximum(best - mean, 0))
    u = np.float64(best - mean) / deviation
    below = math.erfc(-u / 2**0.5) / 2
    return float(deviation * (u * below + np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)))


@right("halving")
def halving_numpy(losses, eta):
    if len(losses) == 0 or eta < 2:
        raise ValueError
    x = np.array(losses)
    alive = np.arange(len(x))
    for rung in range(x.shape[1]):
        alive = np.sort(alive)
        alive = alive[np.argsort(x[alive, rung], kind="stable")]
        if rung + 1 < x.shape[1]:
            alive = alive[: max(1, len(alive) // eta)]
    return int(alive[0])


@right("halving")
def halving_recursive(losses, eta):
    if not losses or eta < 2:
        raise ValueError

    def go(alive, rung):
        if rung == len(losses[0]) - 1:
            return min(alive, key=lambda c: (losses[c][rung], c))
        order = sorted(sorted(alive), key=lambda c: losses[c][rung])
        return go(order[: len(order) // eta or 1], rung + 1)

    return go(list(range(len(losses))), 0)


@right("affordable")
def affordable_downwards(budget, shares, eta):
    n = int(budget / shares[0]) + 1
    while n >= 1:
        alive, cost = n, n * shares[0]
        for before, share in pairwise(shares):
            alive = alive // eta or 1
            cost += alive * (share - before)
        if cost <= budget:
            return n
        n -= 1
    raise ValueError("too little")


@right("affordable")
def affordable_by_bisection(budget, shares, eta):
    def cost(n):
        counts = [n]
        for _ in shares[1:]:
            counts.append(max(1, counts[-1] // eta))
        return sum(c * (b - a) for c, a, b in zip(counts, [0, *shares], shares))

    if cost(1) > budget:
        raise ValueError
    low, high = 1, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


@right("curse")
def curse_numpy(losses):
    if len(losses) < 2:
        raise ValueError
    x = np.array(losses)
    n = len(x)
    won = x.argmin(1)
    own = x[np.arange(n), won]
    return float(((x[:, won].sum(0) - own) / (n - 1) - own).mean())


@right("curse")
def curse_by_dropping(losses):
    if not losses[1:]:
        raise ValueError("one seed")
    gaps = []
    for s in range(len(losses)):
        value, c = min((v, c) for c, v in enumerate(losses[s]))
        gaps.append(mean(row[c] for row in losses[:s] + losses[s + 1 :]) - value)
    return mean(gaps)


@right("seed_t")
def seed_t_by_statistics(a, b):
    if len(a) != len(b) or len(a) < 2 or not all(len(x) for x in [*a, *b]):
        raise ValueError
    d = [mean(y) - mean(x) for x, y in zip(a, b)]
    return mean(d) * math.sqrt(len(d)) / stdev(d)


@right("seed_t")
def seed_t_numpy(a, b):
    if min(len(a), len(b)) < 2 or len(a) != len(b) or min(map(len, [*a, *b])) == 0:
        raise ValueError("seeds")
    d = np.array([np.mean(y) for y in b]) - np.array([np.mean(x) for x in a])
    return float(d.mean() / (d.std(ddof=1) / np.sqrt(len(d))))


@right("whole_lines")
def lines_by_partition(content):
    whole, broken, number = [], [], 0
    while content:
        number += 1
        line, end, content = content.partition("\n")
        try:
            entry = json.loads(line) if end else None
        except json.JSONDecodeError:
            entry = None
        whole.append(entry) if isinstance(entry, dict) else broken.append(number)
    return whole, broken


@right("whole_lines")
def lines_by_regex(content):
    whole, broken = [], []
    for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+$", content), 1):
        try:
            entry = json.loads(line)
            if line[-1] != "\n" or type(entry) is not dict:
                raise ValueError
            whole += [entry]
        except ValueError:
            broken += [number]
    return whole, broken


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    assert Counter(id for id, _ in RIGHT) == {id: 2 for id in (e.id for e in checking.load_sheet("search").values())}


@pytest.mark.parametrize("id, code", broken_code("search"), ids=[id for id, _ in broken_code("search")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)

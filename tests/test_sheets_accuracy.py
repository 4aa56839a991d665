"""Right answers of other kinds pass the sheet of 05c; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("accuracy")


@right("acc_norm_bytes")
def acc_by_argmax(log_p, choices, answers, *, verbose=False):
    if len(answers) == 0:
        raise ValueError
    picks = [int(np.argmax(np.array(p) / [len(bytes(c, "utf-8")) for c in texts])) for p, texts in zip(log_p, choices)]
    return float(np.mean(np.array(picks) == np.array(answers)))


@right("acc_norm_bytes")
def acc_by_max_of_indices(log_p, choices, answers):
    right_ones = 0
    for i, answer in enumerate(answers):
        best = max(range(len(choices[i])), key=lambda c: log_p[i][c] / len(choices[i][c].encode()))
        right_ones += best == answer
    try:
        return right_ones / len(answers)
    except ZeroDivisionError:
        raise ValueError("no items") from None


@right("cut")
def cut_by_ends(encode, context, continuation):
    if continuation == "":
        raise ValueError("empty")
    whole = encode(context + continuation)
    ends = list(accumulate(map(len, whole)))
    n = sum(end <= len(context) for end in ends)
    return whole[:n], whole[n:]


@right("cut")
def cut_by_joining(encode, context, continuation):
    assert isinstance(context, str)
    if not len(continuation):
        raise ValueError
    given, scored = [], list(encode(context + continuation))
    while scored and context.startswith("".join(given) + scored[0]):
        given.append(scored.pop(0))
    return given, scored


@right("ece")
def ece_by_loop(confidence, correct, bins):
    if len(confidence) == 0 or len(confidence) != len(correct) or any(not (0 <= p <= 1) for p in confidence):
        raise ValueError
    p, y = np.array(confidence), np.array(correct, dtype=float)
    total = 0.0
    for b in range(bins):
        inside = (p > b / bins) & (p <= (b + 1) / bins) | ((p == 0) if b == 0 else False)
        if inside.any():
            total += inside.mean() * abs(y[inside].mean() - p[inside].mean())
    return float(total)


@right("ece")
def ece_torch(confidence, correct, bins):
    p, y = torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct, dtype=torch.float64)
    if p.shape != y.shape or p.numel() == 0 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("bad")
    place = torch.bucketize(p, torch.arange(1, bins, dtype=torch.float64) / bins)
    return (torch.zeros(bins, dtype=torch.float64).index_add(0, place, y - p).abs().sum() / len(p)).item()


@right("mcnemar_p")
def mcnemar_from_the_middle(table):
    (_, b), (c, _) = table
    low, high = sorted((b, c))
    tail = sum(math.comb(b + c, k) for k in range(high, b + c + 1)) * 0.5 ** (b + c)
    return 1.0 if low == high else 2 * tail


@right("mcnemar_p")
def mcnemar_by_logarithms(table):
    b, c = table[0][1], table[1][0]
    n = b + c
    term = lambda k: math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
    return min(1.0, 2 * math.fsum(term(k) for k in range(min(b, c) + 1)))


@right("wins_needed")
def wins_step_by_step(lost, alpha):
    if not (alpha > 0 and alpha < 1) or lost < 0:
        raise ValueError
    for won in range(lost + 1, 10_000):
        n = won + lost
        if min(1, 2 * sum(math.comb(n, k) for k in range(lost + 1)) / 2**n) < alpha:
            return won


@right("wins_needed")
def wins_by_bisection(lost, alpha):
    if lost < 0 or math.isnan(alpha) or alpha <= 0 or alpha >= 1:
        raise ValueError("alpha")
    p = lambda won: 2 * sum(math.comb(won + lost, k) for k in range(lost + 1)) / 2 ** (won + lost)
    low, high = lost, lost + 1
    while p(high) >= alpha:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if p(middle) >= alpha else (low, middle)
    return high


@right("temperature")
def temperature_newton(logits, targets):
    beta, z = 1.0, logits
    for _ in range(200):
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        slope = (mean - z.gather(1, targets[:, None])[:, 0]).mean()
        curve = ((p * (z - mean[:, None]) ** 2).sum(1)).mean()
        beta = float(min(max(beta - slope / curve, beta / 2), beta * 2))
    return 1 / beta


@right("temperature")
def temperature_lbfgs(logits, targets):
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=0.5, max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits / log_t.exp(), targets)
        value.backward()
        return value

    optimizer.step(loss)
    return log_t.exp().item()


@right("turned")
def turned_numpy(picks, first, k):
    p = np.array(picks)
    hits = p == (np.array(first)[:, None] + np.arange(k)) % k
    return float(hits.mean()), float(hits.all(1).mean()), int(np.bincount(p.ravel(), minlength=k).argmax())


@right("turned")
def turned_counter(picks, first, k):
    hits = complete = 0
    count = Counter()
    for row, place in zip(picks, first):
        own = 0
        for pick in row:
            count[pick] += 1
            own += pick == place
            place = 0 if place == k - 1 else place + 1
        hits, complete = hits + own, complete + (own == k)
    return hits / (k * len(picks)), complete / len(picks), min(count, key=lambda c: (-count[c], c))


@right("order_p")
def order_p_by_rank(canonical, shuffled):
    everything = [canonical, *shuffled]
    if len(everything) == 1 or any(x != x for x in everything):
        raise ValueError
    return sum(x <= canonical for x in everything) / len(everything)


@right("order_p")
def order_p_numpy(canonical, shuffled):
    x = np.asarray(shuffled, dtype=float)
    if x.size == 0 or np.isnan(x).any() or np.isnan(canonical):
        raise ValueError("nan")
    return float((np.count_nonzero(x <= canonical) + 1) / (x.size + 1))


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    assert Counter(id for id, _ in RIGHT) == {id: 2 for id in (e.id for e in checking.load_sheet("accuracy").values())}


@pytest.mark.parametrize("id, code", broken_code("accuracy"), ids=lambda x: x if x.startswith("accuracy.") else "")
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)

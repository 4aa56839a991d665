"""Sheets of the runtime and plotting chapters: right answers of another kind than the solution pass."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics

import numpy as np
import pytest
import torch
from sheet_rules import assert_passes

from llmcourse.practice import checking

# ------------------------------------------------------------------------------------------ runtime


def first_gap_finfo(dtype):
    return int(2 / torch.finfo(dtype).eps)


def first_gap_doubled(dtype):
    exponent = 0
    while torch.tensor(2.0**exponent).to(dtype) + 1 != torch.tensor(2.0**exponent).to(dtype):
        exponent += 1
    return 2**exponent


def quiet_rand_in_place(n, seed):
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.empty(n).uniform_(generator=generator)


def quiet_rand_forked(n, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.rand(n)


def timed_in_turn_rows(fns, warmup, repeats, clock):
    if repeats < 1 or warmup < 0:
        raise ValueError

    def seconds(fn):
        start = clock()
        fn()
        return clock() - start

    for fn in fns.values():
        for _ in range(warmup):
            fn()
    rows = [[seconds(fn) for fn in fns.values()] for _ in range(repeats)]
    return dict(zip(fns, map(statistics.median, zip(*rows)))) if fns else {}


def timed_in_turn_numpy(fns, warmup, repeats, clock):
    if not (repeats > 0 and warmup >= 0):
        raise ValueError("repeats, warmup")
    _ = [fn() for fn in fns.values() for _ in range(warmup)]
    times = np.zeros((repeats, len(fns)))
    for i in range(repeats):
        for j, fn in enumerate(fns.values()):
            before = clock()
            fn()
            times[i, j] = clock() - before
    return {name: float(np.median(times[:, j])) for j, name in enumerate(fns)}


def two_verdicts_small(n):
    return [0.5] * n, [100.0 * n] + [0.125] * (n - 1)


def two_verdicts_uneven(n):
    return [3.0 + 0.01 * i for i in range(n)], [1.0 + 0.001 * i for i in range(n - 1)] + [50.0 * n]


def in_evaluation_stack(model, fn):
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        return fn(model)


def in_evaluation_by_name(model, fn):
    was = {name: module.training for name, module in model.named_modules()}
    try:
        return fn(model.train(False))
    finally:
        for name, training in was.items():
            model.get_submodule(name).training = training


RUNTIME = {
    "first_gap": (first_gap_finfo, first_gap_doubled),
    "quiet_rand": (quiet_rand_in_place, quiet_rand_forked),
    "timed_in_turn": (timed_in_turn_rows, timed_in_turn_numpy),
    "two_verdicts": (two_verdicts_small, two_verdicts_uneven),
    "in_evaluation": (in_evaluation_stack, in_evaluation_by_name),
}


# ----------------------------------------------------------------------------------------- plotting


def front_strict(points):
    beaten = lambda q: any((p[0] <= q[0] and p[1] < q[1]) or (p[0] < q[0] and p[1] <= q[1]) for p in points)
    return [i for i in range(len(points)) if not beaten(points[i])]


def front_sorted(points):
    kept, best = set(), math.inf
    for size, loss in sorted(set(copy.copy(points))):  # by size, then loss: a point is kept where the loss gets lower
        if loss < best:
            kept.add((size, loss))
            best = loss
    return [i for i, p in enumerate(points) if p in kept]


def _contrast(v):
    c = v / 255
    return 1.05 / ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) + 0.05)


def lightest_gray_list(ratio):
    if ratio < 1 or not (good := [v for v in range(256) if _contrast(v) >= ratio]):
        raise ValueError(ratio)
    return good[-1]


def lightest_gray_bisected(ratio):
    if not 1 <= ratio <= _contrast(0):
        raise ValueError(ratio)
    low, high = 0, 256
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _contrast(middle) >= ratio else (low, middle)
    return low


def smoothed_weights(losses, beta):
    if not (beta >= 0 and beta < 1):
        raise ValueError(beta)
    curve = []
    for t in range(1, len(losses) + 1):
        seen = [x for x in losses[:t] if x == x]
        weights = [beta**k for k in range(len(seen))][::-1]
        curve.append(sum(w * x for w, x in zip(weights, seen)) / sum(weights) if seen else float("nan"))
    return curve


def smoothed_corrected(losses, beta):
    """Adam's way: an average that begins at zero, divided by 1 - beta^n."""
    if beta < 0 or beta >= 1:
        raise ValueError(beta)
    m, n, curve = 0.0, 0, []
    for loss in losses:
        if not math.isnan(loss):
            m, n = beta * m + (1 - beta) * loss, n + 1
        curve.append(m / (1 - beta**n) if n else math.nan)
    return curve


PLOTTING = {
    "front": (front_strict, front_sorted),
    "lightest_gray": (lightest_gray_list, lightest_gray_bisected),
    "smoothed": (smoothed_weights, smoothed_corrected),
}

SHEETS = {"runtime": RUNTIME, "plotting": PLOTTING}
TABLE = [(f"{s}.{name}", f) for s, table in SHEETS.items() for name, fs in table.items() for f in fs]


@pytest.mark.parametrize(("id", "answer"), TABLE, ids=[f"{i}-{f.__name__}" for i, f in TABLE])
def test_a_right_answer_of_another_kind_passes(id: str, answer) -> None:
    assert_passes(id, answer)


def test_every_exercise_has_two_answers_of_another_kind() -> None:
    for sheet, table in SHEETS.items():
        assert {ex.name for ex in checking.load_sheet(sheet).values()} == set(table)
        assert all(len(answers) >= 2 for answers in table.values())

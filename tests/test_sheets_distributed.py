"""Right answers of other kinds pass the sheet of 16; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("distributed")


@right("batch_gradient")
def gradient_of_the_sum(gradients, counts):
    if not any(counts):
        raise ValueError("none")
    total = torch.zeros_like(gradients[0], dtype=torch.float64)
    for g, n in zip(gradients, counts, strict=True):
        if n:
            total += n * g.double()
    return (total / sum(counts)).to(gradients[0].dtype)


@right("batch_gradient")
def gradient_by_a_running_mean(gradients, counts):
    mean, seen = torch.zeros_like(gradients[0]).double(), 0
    for g, n in zip(gradients, counts, strict=True):
        if n > 0:
            seen += n
            mean = mean + (g.double() - mean) * n / seen
    if seen == 0:
        raise ValueError("none")
    return mean.to(gradients[0].dtype)


@right("ring_sent")
def sent_by_rounds(n, R):
    if n < 0 or R < 1:
        raise ValueError("bounds")
    size = [n // R + (r < n % R) for r in range(R)]
    return [sum(size[(r - 1 - s) % R] for s in range(2 * (R - 1))) for r in range(R)]


@right("ring_sent")
def sent_by_what_stays(n, R):
    if n < 0 or R < 1:
        raise ValueError("bounds")
    stays = lambda r: n // R + (1 if r < n % R else 0)
    return [(n - stays(r)) + (n - stays(r + 1 if r + 1 < R else 0)) for r in range(R)]


@right("zero_bytes")
def bytes_by_a_table(n, R, stage, master):
    if n < 0 or R < 1:
        raise ValueError("bounds")
    shard = n // R + (n % R > 0)
    w, g, s = (2, 2, 12) if master else (4, 4, 8)
    table = {0: (w + g + s) * n, 1: (w + g) * n + s * shard, 2: w * n + (g + s) * shard, 3: (w + g + s) * shard}
    if stage not in table:
        raise ValueError("stage")
    return table[stage]


@right("zero_bytes")
def bytes_saved(n, R, stage, master):
    """From the other end: 16 bytes of each, less what is not held."""
    if n < 0 or R < 1 or not 0 <= stage <= 3:
        raise ValueError("bounds")
    away = n - (n + R - 1) // R
    sizes = [12, 2, 2] if master else [8, 4, 4]
    return 16 * n - sum(sizes[:stage]) * away


@right("enough_pieces")
def pieces_by_the_inverse(stages, idle, batch):
    a, b = idle
    if stages < 1 or batch < 1 or b < 1 or not 0 <= a <= b:
        raise ValueError("bounds")
    divisors = [m for m in range(1, batch + 1) if batch % m == 0]
    if stages == 1:
        return 1
    if a == 0:
        return None
    least = Fraction((stages - 1) * (b - a), a)
    return min((m for m in divisors if m >= least), default=None)


@right("enough_pieces")
def pieces_by_fractions(stages, idle, batch):
    if min(stages, batch, idle[1]) < 1 or not 0 <= Fraction(*idle) <= 1:
        raise ValueError("bounds")
    for m in range(1, batch + 1):
        if not batch % m and 1 - Fraction(m, m + stages - 1) <= Fraction(*idle):
            return m
    return None


@right("split_mlp")
def mlp_put_together(x, ranks):
    """One process with all rows; in float32 between the two products, so that the sum is as wide."""
    A, a, B = (torch.cat([r[i] for r in ranks], dim=d) for i, d in ((0, 0), (1, 0), (2, 1)))
    hidden = F.relu(F.linear(x, A, a))
    b = ranks[0][3]
    return F.linear(hidden.float(), B.float(), None if b is None else b.float()).to(x.dtype)


@right("split_mlp")
def mlp_by_adding_in_place(x, ranks):
    total = torch.zeros(*x.shape[:-1], len(ranks[0][2]), dtype=torch.float32)
    if ranks[0][3] is not None:
        total += ranks[0][3].float()
    for A, a, B, _ in ranks:
        total += torch.clamp(F.linear(x, A, a), min=0) @ B.T
    return total.to(x.dtype)


@right("kept_for_later")
def kept_by_python_sort(gradients, k):
    if k < 1 or k > gradients[0].numel():
        raise ValueError("k")
    left, sent = torch.zeros_like(gradients[0]), []
    for g in gradients:
        left = left + g
        top = sorted(range(len(g)), key=lambda i: (-abs(float(left[i])), i))[:k]
        mask = torch.zeros(len(g), dtype=torch.bool)
        mask[top] = True
        sent.append(left.where(mask, 0))
        left = left.where(~mask, 0)
    return sent, left


@right("kept_for_later")
def kept_one_at_a_time(gradients, k):
    if not 0 < k <= len(gradients[0]):
        raise ValueError("k")
    left, sent = torch.zeros_like(gradients[0]), []
    for g in gradients:
        left, message = left + g, torch.zeros_like(g)
        free = left.abs().double() + 1
        for _ in range(k):
            i = int((free == free.max()).nonzero()[0])
            message[i], free[i] = left[i], 0
        sent.append(message)
        left = left - message
    return sent, left


@right("private_mean")
def private_by_rows(gradients, clip, sigma, noise):
    if clip <= 0 or sigma < 0 or len(gradients) == 0:
        raise ValueError("bounds")
    total = sigma * clip * noise
    for g in gradients:
        total = total + g / max(1.0, float(g.norm()) / clip)
    return total / len(gradients)


@right("private_mean")
def private_by_clamped_norms(gradients, clip, sigma, noise):
    if not (clip > 0 and sigma >= 0 and gradients.shape[0] > 0):
        raise ValueError("bounds")
    norms = gradients.square().sum(1).sqrt()
    factors = clip / norms.clamp(min=clip)
    return (factors @ gradients + noise * (sigma * clip)) / gradients.shape[0]


@right("kilograms")
def kilograms_by_joules(n, tokens, peak, mfu, watts, pue, grams):
    if not (n > 0 and tokens > 0 and peak > 0 and 0 < mfu <= 1 and watts > 0 and pue >= 1 and grams >= 0):
        raise ValueError("bounds")
    joules = 6 * n * tokens / peak / mfu * watts * pue
    return joules / 3.6e6 * grams / 1e3


@right("kilograms")
def kilograms_by_the_chapter_formula_in_another_order(n, tokens, peak, mfu, watts, pue, grams):
    good = all(v > 0 for v in (n, tokens, peak, mfu, watts)) and mfu <= 1 <= pue and grams >= 0
    if not good:
        raise ValueError("bounds")
    return grams * pue * watts / 1e6 / 3600 * (n * 6 * tokens) / (mfu * peak)


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    expected = {id: 2 for id in (e.id for e in checking.load_sheet("distributed").values())}
    assert Counter(id for id, _ in RIGHT) == expected


@pytest.mark.parametrize("id, code", broken_code("distributed"), ids=[i for i, _ in broken_code("distributed")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_half_of_the_sheet_begins_with_broken_code():
    assert len(broken_code("distributed")) >= len(checking.load_sheet("distributed")) / 2


def test_the_exercises_agree_with_the_chapters():
    """The same quantities by the chapters' functions."""
    from llmcourse import distributed as ds
    from llmcourse import federated as fd
    from llmcourse import scaling as sc

    answer = lambda name: checking.find(f"distributed.{name}").solution
    for n, R in ((10, 4), (12, 4), (3, 5), (100, 7)):
        assert answer("ring_sent")(n, R) == ds.simulate_ring([torch.ones(n)] * R).sent
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    counts = [4, 1, 3]
    mean = fd.weighted_mean(rows, torch.tensor(counts, dtype=torch.float32))
    assert torch.allclose(answer("batch_gradient")(list(rows), counts), mean)
    clipped = fd.clipped(rows, 0.7).mean(0)
    assert torch.allclose(answer("private_mean")(rows, 0.7, 0.0, torch.zeros(5)), clipped)
    footprint = sc.training_footprint(6 * 1e9 * 2e10, peak=3e14, mfu=0.4, watts=400.0, pue=1.1, grams_per_kwh=385.0)
    assert answer("kilograms")(1e9, 2e10, 3e14, 0.4, 400.0, 1.1, 385.0) == pytest.approx(footprint.kg_co2e.value)

"""Right answers of other kinds pass the sheet of 15; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("deployment")


@right("step_seconds")
def step_by_text(model, texts, past, peak, bandwidth):
    if not texts >= 1 or not past >= 0:
        raise ValueError("texts")
    one_head = model["width"] * model["element"]
    read = model["weights"] * model["bits"] / 8
    for _ in range(texts):
        read += past * model["layers"] * (model["kv_heads"] * one_head + model["kv_heads"] * one_head)
    reading, computing = read / bandwidth, texts * model["weights"] * 2 / peak
    return computing if computing > reading else reading


@right("step_seconds")
def step_in_fractions(model, texts, past, peak, bandwidth):
    if texts <= 0 or past < 0:
        raise ValueError
    numbers = math.prod([2, model["layers"], model["kv_heads"], model["width"], past, texts])
    bits = model["weights"] * model["bits"] + 8 * model["element"] * numbers
    return float(max(Fraction(bits, 8) / Fraction(bandwidth), Fraction(2 * texts * model["weights"]) / Fraction(peak)))


@right("halves")
def halves_by_bits(codes, scale):
    O, I = codes.shape
    four = torch.empty(O, 2 * I, dtype=torch.uint8)
    four[:, :I], four[:, I:] = codes.bitwise_right_shift(4), codes.bitwise_and(15)
    wide = torch.hstack([scale * 16, scale])
    offset = torch.zeros_like(wide)
    offset[:, scale.shape[1] :] = scale * 8
    return four, wide, offset


@right("halves")
def halves_by_numpy(codes, scale):
    high, low = np.divmod(codes.numpy(), 16)
    four = torch.from_numpy(np.concatenate([high, low], 1).astype(np.uint8))
    return four, torch.cat([16 * scale, 1 * scale], -1), torch.cat([0 * scale, 8 * scale], -1)


@right("exact_type")
def type_by_blocks(codes, scale, zero):
    O, G = scale.shape
    if (codes.shape[1] // G) % 32 != 0:
        return None
    if (scale.to(torch.float16).to(torch.float32) != scale).any():
        return None
    steps = codes.view(O, G, -1).to(torch.int64) - zero.to(torch.int64)[..., None]
    for name, bits in (("Q4", 4), ("Q8", 8)):
        if not ((steps < -(2 ** (bits - 1))) | (steps >= 2 ** (bits - 1))).any():
            return name
    return None


@right("exact_type")
def type_by_loop(codes, scale, zero):
    group, fits = codes.shape[1] // scale.shape[1], {"Q4", "Q8"}
    if group < 32 or group / 32 != group // 32:
        return None
    for row, scales, zeros in zip(codes.tolist(), scale.numpy(), zero.tolist()):
        with np.errstate(over="ignore"):
            if any(float(np.float16(s)) != float(s) for s in scales):
                return None
        for i, q in enumerate(row):
            n = q - zeros[i // group]
            fits -= {name for name, end in (("Q4", 8), ("Q8", 128)) if not -end <= n < end}
    return min(fits, default=None)


@right("idle_shares")
def idle_by_heap(lengths, slots):
    if slots <= 0 or len(lengths) == 0 or any(n <= 0 for n in lengths):
        raise ValueError("lengths")
    heap, static = [0] * slots, 0
    for at in itertools.count(0, slots):
        batch = lengths[at : at + slots]
        if not batch:
            break
        static += slots * max(batch)
    for n in lengths:
        heapq.heapreplace(heap, heap[0] + n)
    places = slots * max(heap)
    return (static - sum(lengths)) / static, (places - sum(lengths)) / places


@right("idle_shares")
def idle_step_by_step(lengths, slots):
    if slots < 1 or not lengths or sorted(lengths)[0] < 1:
        raise ValueError
    shares = []
    for together in (True, False):
        waiting, running, idle, steps = list(lengths), [], 0, 0
        while waiting or running:
            if not (together and running):
                while waiting and len(running) < slots:
                    running.append(waiting.pop(0))
            steps, idle = steps + 1, idle + slots - len(running)
            running = [n - 1 for n in running if n > 1]
        shares.append(idle / (steps * slots))
    return tuple(shares)


@right("places")
def places_cut(table, length, block_size):
    if len(table) * block_size < length or any(table.count(b) > 1 for b in table):
        raise ValueError("table")
    every = [b * block_size + j for b in table for j in range(block_size)]
    return every[:length], len(every[length:])


@right("places")
def places_by_divmod(table, length, block_size):
    if len(set(table)) != len(table):
        raise ValueError
    found = []
    for i in range(length):
        block, inside = divmod(i, block_size)
        if block >= len(table):
            raise ValueError("too few")
        found.append(block_size * table[block] + inside)
    return found, block_size * len(table) - len(found)


@right("Pool")
class PoolOfHeaps:
    def __init__(self, n):
        self.n, self.empty, self.count, self.free = n, list(range(n)), {}, n

    def take(self):
        if not self.empty:
            raise MemoryError
        block = heapq.heappop(self.empty)
        self.count[block], self.free = 1, self.free - 1
        return block

    def hold(self, block):
        if block not in self.count:
            raise ValueError(block)
        self.count[block] += 1

    def drop(self, block):
        if block not in self.count:
            raise ValueError(block)
        self.count[block] -= 1
        if not self.count[block]:
            del self.count[block]
            heapq.heappush(self.empty, block)
            self.free += 1

    def write(self, block):
        if block not in self.count:
            raise ValueError(block)
        if self.count[block] == 1:
            return block
        new = self.take()
        self.drop(block)
        return new


@right("Pool")
class PoolOfSets:
    def __init__(self, blocks):
        self.unused, self.held = set(range(blocks)), Counter()

    free = property(lambda self: len(self.unused))

    def take(self):
        if self.free == 0:
            raise MemoryError("full")
        found = min(self.unused)
        self.unused -= {found}
        self.held[found] = 1
        return found

    def hold(self, block, by=1):
        if self.held.get(block, 0) < 1:
            raise ValueError("not held")
        self.held[block] += by
        if self.held[block] == 0:
            self.unused |= {block}

    def drop(self, block):
        self.hold(block, -1)

    def write(self, block):
        if self.held.get(block, 0) > 1:
            found = self.take()
            self.drop(block)
            return found
        self.hold(block, 0)
        return block


@right("shared_tokens")
def shared_by_keys(prompt, stored, block_size):
    if len(prompt) == 0 or block_size <= 0:
        raise ValueError("prompt")
    known = {tuple(text[:end]) for text in stored for end in range(block_size, len(text) + 1, block_size)}
    n = 0
    while n + block_size < len(prompt) and tuple(prompt[: n + block_size]) in known:
        n += block_size
    return n


@right("shared_tokens")
def shared_by_counting(prompt, stored, block_size):
    if not prompt or block_size < 1:
        raise ValueError
    best = 0
    for text in stored:
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt[:-1], text)))
        best = max(best, alike - alike % block_size)
    return best


@right("running_texts")
def running_by_finished(rate, tokens, step):
    if rate <= 0 or tokens <= 0 or len(step) == 0:
        raise ValueError("rate")
    finished = [(b + 1) / (tokens * step[b]) for b in range(len(step))]
    fits = [b for b, speed in enumerate(finished) if speed >= rate]
    return (fits[0] + 1, step[fits[0]] * tokens) if fits else None


@right("running_texts")
def running_by_time(rate, tokens, step):
    if not rate > 0 or not tokens > 0 or step == []:
        raise ValueError
    b = 1
    while b <= len(step):
        seconds = tokens * step[b - 1]
        if b / seconds >= rate:
            return b, seconds
        b += 1


@right("latency")
def latency_by_bisection(due, work, percent):
    if len(due) != len(work) or len(due) == 0 or percent < 1 or percent > 100:
        raise ValueError("lists")
    ends = []
    for i, at in enumerate(due):
        ends.append(work[i] + (at if i == 0 or ends[-1] < at else ends[-1]))
    waits = sorted(e - a for e, a in zip(ends, due))
    return next(t for t in waits if 100 * bisect_right(waits, t + 1e-12) >= percent * len(waits))


@right("latency")
def latency_by_numpy(due, work, percent):
    if not (0 < len(due) == len(work) and percent in range(1, 101)):
        raise ValueError
    due, done = np.array(due), np.cumsum(work)
    ends = done + np.maximum.accumulate(due - (done - np.array(work)))
    return float(np.percentile(ends - due, percent, method="inverted_cdf"))


@right("speculative_token")
def speculative_by_loop(p, q, draft, u, v):
    p, q = p.tolist(), q.tolist()
    if not q[draft]:
        raise ValueError("draft")
    if u * q[draft] < p[draft]:
        return draft, True
    rest = [max(a - b, 0.0) for a, b in zip(p, q)]
    left = v * sum(rest)
    for token, r in enumerate(rest):
        left -= r
        if left < -1e-9:
            return token, False


@right("speculative_token")
def speculative_by_search(p, q, draft, u, v):
    p, q = p.double().numpy(), q.double().numpy()
    if q[draft] == 0:
        raise ValueError
    if u < min(1.0, p[draft] / q[draft]):
        return draft, True
    rest = np.maximum(p, q) - q
    return int(np.searchsorted(np.cumsum(rest) / rest.sum(), v + 1e-9, side="right")), False


@right("draft_length")
def longest_by_formula(alpha, cost, most):
    if alpha < 0 or alpha > 1 or cost < 0 or most < 0:
        raise ValueError("alpha")
    tokens = lambda k: k + 1.0 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    speeds = [tokens(k) / (k * cost + 1) for k in range(most + 1)]
    best = next(k for k, s in enumerate(speeds) if s >= max(speeds) - 1e-12)
    return best, speeds[best]


@right("draft_length")
def longest_by_marginal(alpha, cost, most):
    """One draft more pays as long as it brings more tokens for its time than the round has so far."""
    if not (0 <= alpha <= 1 and cost >= 0 and most >= 0):
        raise ValueError
    k, tokens, time = 0, 1.0, 1.0
    while k < most and alpha ** (k + 1) * time > tokens * cost + 1e-12:
        k, tokens, time = k + 1, tokens + alpha ** (k + 1), time + cost
    return k, tokens / time


@right("allowed")
def allowed_by_beginnings(written, texts, vocabulary, end):
    if end not in range(len(vocabulary)):
        raise ValueError("end")
    beginnings = {text[:n] for text in texts for n in range(len(text) + 1)}
    mask = torch.zeros(len(vocabulary), dtype=torch.bool)
    for i, token in enumerate(vocabulary):
        mask[i] = written in texts if i == end else len(token) > 0 and written + token in beginnings
    return mask


@right("allowed")
def allowed_by_order(written, texts, vocabulary, end):
    """In a sorted list all texts with one beginning stand together."""
    if end < 0 or end >= len(vocabulary):
        raise ValueError
    ordered = sorted(texts)

    def begins(start):
        at = bisect_left(ordered, start)
        return at < len(ordered) and ordered[at][: len(start)] == start

    mask = [bool(t) and begins(written + t) for t in vocabulary]
    mask[end] = any(written == text for text in texts)
    return torch.tensor(mask, dtype=torch.bool)


@right("supported")
def supported_in_another_order():
    return [8, 7, 5, 1]


@right("supported")
def supported_by_arithmetic():
    reading, computing = 0.27 / 20, 2 * 0.5e9 / 400e9
    holds = {
        1: 0.61 < 0.95, 2: 0.59 < 0.53, 3: False, 4: reading > 0.9 * 0.034, 5: reading > 0.010,
        6: 20 / 0.5 <= 0.01 * 1000, 7: 4 * computing <= 1.0 / 20, 8: reading + computing < 0.034 / 2,
    }  # fmt: skip
    return [n for n, follows in holds.items() if follows]


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    expected = {id: 2 for id in (e.id for e in checking.load_sheet("deployment").values())}
    assert Counter(id for id, _ in RIGHT) == expected


@pytest.mark.parametrize("id, code", broken_code("deployment"), ids=[id for id, _ in broken_code("deployment")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_half_of_the_sheet_begins_with_broken_code():
    assert len(broken_code("deployment")) >= len(checking.load_sheet("deployment")) / 2


# --- what the statements say, checked with arithmetic that is not that of the sheet


def test_accepting_and_drawing_again_gives_the_large_models_distribution():
    """Sum over all drafts, and over all parts of the unit square in which u and v decide alike."""
    speculative_token = checking.find("deployment.speculative_token").solution
    p, q = torch.tensor([0.2, 0.5, 0.3, 0.0]), torch.tensor([0.4, 0.25, 0.1, 0.25])
    grid = [(i + 0.5) / 40 for i in range(40)]
    came = torch.zeros(4, dtype=torch.float64)
    for draft, u, v in itertools.product(range(4), grid, grid):
        came[speculative_token(p, q, draft, u, v)[0]] += q[draft].item() / len(grid) ** 2
    assert (came - p.double()).abs().max() < 0.015
    resampled = checking.find("deployment.speculative_token").wrong_answers["drawn_from_p"][1]
    wrong = torch.zeros(4, dtype=torch.float64)
    for draft, u, v in itertools.product(range(4), grid[::2], grid[::2]):
        wrong[resampled(p, q, draft, u, v)[0]] += q[draft].item() / len(grid[::2]) ** 2
    assert (wrong - p.double()).abs().max() > 3e-2


def test_the_halves_of_a_code_stand_for_its_weight():
    halves = checking.find("deployment.halves").solution
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    scale = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).double()
    four, wide, offset = halves(codes, scale)
    w = (four.double() - 8) * wide.repeat_interleave(8, 1) + offset.repeat_interleave(8, 1)
    assert four.max() < 16
    torch.testing.assert_close(w[:, :32] + w[:, 32:], (codes.double() - 128) * scale.repeat_interleave(8, 1))


def test_what_the_judgment_says_of_its_numbers():
    """The figures in the sentences of the last exercise, from those of its statement."""
    rng, waits, free = np.random.default_rng(0), [], 0.0
    for i in range(1000):  # a request every 0.5 s; one of them meets a standstill of 20 s
        at = 0.5 * i
        free = max(free, at) + (20.0 if i == 300 else rng.uniform(0.1, 0.35))
        waits.append(free - at)
    assert np.percentile(waits, 99) > 0.4 and sum(w > 0.4 for w in waits) >= 40

"""Right answers of other kinds pass the sheet of 14c; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("lowbit")


@right("train_raw")
def trained_by_autograd(w, X, wanted, step, bits, rates):
    low, top = -step * 2 ** (bits - 1), step * (2 ** (bits - 1) - 1)
    raw = w.clone().requires_grad_()
    for rate in rates:
        near = step * torch.round(raw / step)
        shown = raw + (near.clamp(low, top) - raw).detach()
        loss = (X @ shown - wanted).square().mean()
        (slope,) = torch.autograd.grad(loss, raw)
        free = near.eq(near.clamp(low, top)).to(w)
        raw = (raw - rate * slope * free).detach().requires_grad_()
    raw = raw.detach()
    return raw, (step * torch.round(raw / step)).clamp(low, top)


@right("train_raw")
def trained_weight_by_weight(w, X, wanted, step, bits, rates):
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    raw, rows, y = w.tolist(), X.tolist(), wanted.tolist()
    near = lambda v: round(v / step)
    show = lambda: [step * min(max(near(v), codes[0]), codes[-1]) for v in raw]
    for rate in rates:
        shown = show()
        miss = [sum(a * b for a, b in zip(row, shown)) - t for row, t in zip(rows, y)]
        for i, v in enumerate(raw):
            if near(v) in codes:
                raw[i] = v - rate * 2 * statistics.fmean(m * row[i] for m, row in zip(miss, rows))
    return torch.tensor(raw, dtype=w.dtype), torch.tensor(show(), dtype=w.dtype)


@right("table_codes")
def codes_by_distance(w, values):
    largest = w.float().abs().max(dim=1).values
    if (largest.half() == math.inf).any():
        raise ValueError("scale")
    scale = largest.half()
    scale[scale == 0] = 1
    distance = (w.float()[..., None] / scale.float()[:, None, None] - values).abs()  # (G, n, K)
    return distance.argmin(-1).to(torch.uint8), scale  # the first of the nearest


@right("table_codes")
def codes_by_numpy(w, values):
    numbers = w.float().numpy()
    with np.errstate(over="ignore"):
        scale = np.abs(numbers).max(1).astype(np.float16)
    if not np.isfinite(scale).all():
        raise ValueError
    scale = np.where(scale == 0, np.float16(1), scale)
    table = values.numpy()
    at = np.searchsorted((table[:-1] + table[1:]) / 2, numbers / scale[:, None].astype(np.float32), side="left")
    return torch.from_numpy(at.astype(np.uint8)), torch.from_numpy(scale)


@right("keep_some")
def kept_by_fixed_points(w, h):
    """Try every threshold: the number of candidates is that of the magnitudes."""
    if not bool((h > 0).all()):
        raise ValueError("h")
    a, h = w.double().abs().tolist(), h.double().tolist()
    found = (0.0, 0, 0.0)
    for border in sorted(set(a), reverse=True):
        kept = [(x, i) for x, i in zip(a, h) if x >= border]
        total, weight = sum(x * i for x, i in kept), sum(i for _, i in kept)
        if total**2 / weight > found[0] * (1 + 1e-13):
            found = (total**2 / weight, border, total / weight)
    if found[0] == 0:
        return torch.zeros_like(w), 0.0
    levels = [math.copysign(1, v) if abs(v) >= found[1] else 0 for v in w.double().tolist()]
    return torch.tensor(levels, dtype=w.dtype), found[2]


@right("keep_some")
def kept_by_numpy(w, h):
    a, weight = np.abs(w.double().numpy()), h.double().numpy()
    if not np.all(weight > 0):
        raise ValueError
    order = np.argsort(-a, kind="stable")
    T, H = np.cumsum((weight * a)[order]), np.cumsum(weight[order])
    k = int(np.argmax(T * T / H))
    levels = np.zeros(len(a))
    levels[order[: k + 1]] = 1
    return torch.from_numpy(levels).to(w.dtype) * w.sign(), float(T[k] / H[k])


@right("spend")
def spent_recursively(shapes, errors, budget, group):
    bytes_of = lambda n, b: shapes[n][0] * (shapes[n][1] * b / 8 + shapes[n][1] / group * 2)
    chosen = {n: sorted(e)[0] for n, e in enumerate(errors)}

    def buy(chosen):
        spent = sum(bytes_of(n, b) for n, b in chosen.items())
        if spent > budget:
            raise ValueError("budget")
        best, pay = None, 0
        for n, e in enumerate(errors):
            for b in sorted(e):
                more = bytes_of(n, b) - bytes_of(n, chosen[n])
                if more > 0 and spent + more <= budget and (e[chosen[n]] - e[b]) / more > pay:
                    best, pay = (n, b), (e[chosen[n]] - e[b]) / more
        return buy(chosen | {best[0]: best[1]}) if best else chosen

    return list(buy(chosen).values())


@right("spend")
def spent_with_bits(shapes, errors, budget, group):
    """All in bits, with `max` and its first best."""
    scales = [rows * columns // group * 16 for rows, columns in shapes]
    weights = [rows * columns for rows, columns in shapes]
    now = list(map(min, errors))
    left = 8 * budget - sum(scales) - sum(w * b for w, b in zip(weights, now))
    if left < 0:
        raise ValueError
    while True:
        ways = [
            (n, b)
            for n, e in enumerate(errors)
            for b in e
            if b > now[n] and weights[n] * (b - now[n]) <= left and e[b] < e[now[n]]
        ]
        if not ways:
            return now
        n, b = max(
            ways, key=lambda x: (errors[x[0]][now[x[0]]] - errors[x[0]][x[1]]) / (weights[x[0]] * (x[1] - now[x[0]]))
        )
        left -= weights[n] * (b - now[n])
        now[n] = b


@right("what_was_won")
def won_by_logarithms(arms):
    if len(set(map(len, arms.values()))) != 1 or len(arms["rtn"]) <= 2:
        raise ValueError("seeds")
    logs = {name: [math.log(v) for v in values] for name, values in arms.items()}
    change = lambda a, b: math.exp(statistics.fmean(logs[a]) - statistics.fmean(logs[b]))
    worse = [q >= t for q, t in zip(arms["qat"], arms["trained_rtn"])]
    return dict(
        shown=not any(worse),
        price=change("qat", "trained"),
        knowing=change("qat", "trained_rtn"),
        training=change("trained_rtn", "rtn"),
    )


@right("what_was_won")
def won_by_geometric_means(arms):
    n = len(arms["trained"])
    if n < 3 or {len(v) for v in arms.values()} != {n}:
        raise ValueError
    middle = {name: statistics.geometric_mean(v) for name, v in arms.items()}
    return {
        "training": middle["trained_rtn"] / middle["rtn"],
        "knowing": middle["qat"] / middle["trained_rtn"],
        "price": middle["qat"] / middle["trained"],
        "shown": max(q - t for q, t in zip(arms["qat"], arms["trained_rtn"])) < 0,
    }


@right("spread")
def spread_by_sums(x, signs):
    n, half = x.shape[-1], 1
    if n.bit_count() != 1:
        raise ValueError("width")
    y = x.to(torch.promote_types(x.dtype, torch.float32)) * signs
    while half < n:
        for a in range(0, n, 2 * half):
            for j in range(a, a + half):
                p, q = y[..., j].clone(), y[..., j + half].clone()
                y[..., j], y[..., j + half] = p + q, p - q
        half *= 2
    return (y / math.sqrt(n)).to(x.dtype)


@right("spread")
def spread_by_scipy(x, signs):
    from scipy.linalg import hadamard

    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError
    R = torch.from_numpy(hadamard(n)).double() * signs.double()[:, None]
    return (x.double() @ R).div(n**0.5).to(x.dtype)


@right("turn_block")
def turned_by_einsum(table, g, reader, writer, bias, R):
    R = R.double()
    if not torch.allclose(R @ R.mT, torch.eye(len(R), dtype=torch.float64), rtol=0, atol=1e-3):
        raise ValueError("R")
    new = torch.einsum("vd,de->ve", table.double(), R), torch.einsum("od,d,de->oe", reader.double(), g.double(), R)
    added = None if bias is None else torch.einsum("d,de->e", bias.double(), R).to(bias)
    return new[0].to(table), new[1].to(reader), torch.einsum("de,di->ei", R, writer.double()).to(writer), added


@right("turn_block")
def turned_by_inverse(table, g, reader, writer, bias, R):
    R = R.to(torch.float64)
    if ((R.T @ R).sub(torch.eye(R.shape[0])).abs() > 1e-3).any():
        raise ValueError
    fold = reader.double() @ torch.diag(g.double())
    back = lambda t, like: t.to(like.dtype)
    b = bias if bias is None else back(R.T @ bias.double(), bias)
    return back(table.double() @ R, table), back(fold @ R, reader), back((writer.double().T @ R).T, writer), b


@right("read_back")
def read_by_loops(x, axis, bits, group, residual):
    if axis == "channel":
        old = max(0, (len(x) - residual) // group) * group
        blocks = [(slice(a, a + group), slice(c, c + 1)) for a in range(0, old, group) for c in range(x.shape[1])]
    elif axis == "token":
        old = max(0, (len(x) - residual) // group) * group
        blocks = [(slice(t, t + 1), slice(c, c + group)) for t in range(old) for c in range(0, x.shape[1], group)]
    else:
        raise ValueError(axis)
    out = x.clone()
    for block in blocks:
        part = x[block].to(torch.float32)
        low = part.min().to(torch.float16).to(torch.float32)
        step = ((part.max() - low) / (2**bits - 1)).to(torch.float16).to(torch.float32)
        step = step if step != 0 else torch.tensor(1.0)
        out[block] = (((part - low) / step).round().clamp(0, 2**bits - 1) * step + low).to(x.dtype)
    return out


@right("read_back")
def read_by_view(x, axis, bits, group, residual):
    if axis not in {"channel", "token"}:
        raise ValueError
    T, d = x.shape
    whole_groups = max(T - residual, 0) // group
    n, dim = whole_groups * group, 1 if axis == "channel" else 2
    if n == 0:
        return x.clone()
    y = x[:n].float().reshape((whole_groups, group, d) if axis == "channel" else (n, d // group, group))
    low = y.amin(dim, keepdim=True).to(torch.float16).float()
    step = ((y.amax(dim, keepdim=True) - low) / (2**bits - 1)).to(torch.float16).float()
    step = step.masked_fill(step == 0, 1)
    codes = torch.clip(torch.round((y - low) / step), 0, 2**bits - 1)
    return torch.vstack([(codes * step + low).reshape(n, d).to(x.dtype), x[n:]])


@right("times_smaller")
def smaller_in_bits(tokens, width, key_bits, value_bits, group, residual):
    if tokens <= 0 or any(b != 16 and b not in range(2, 9) for b in (key_bits, value_bits)):
        raise ValueError("bits")
    groups = max(tokens - residual, 0) // group  # of tokens, for each channel
    late = tokens - groups * group
    total = 0
    for bits in (key_bits, value_bits):
        each = 16 * group if bits == 16 else 32 + 8 * -(-group * bits // 8)
        total += width * (groups * each + 16 * late)
    return 32 * tokens * width / total


@right("times_smaller")
def smaller_by_packing(tokens, width, key_bits, value_bits, group, residual):
    if not tokens > 0 or not {key_bits, value_bits}.issubset([*range(2, 9), 16]):
        raise ValueError
    old = next(n for n in itertools.count(tokens, -1) if n == 0 or (n % group == 0 and n <= tokens - residual))
    share = []
    for bits in (key_bits, value_bits):
        if bits == 16:
            share.append(2.0)
            continue
        packed = len(np.packbits(np.zeros(group * bits, bool))) + 2 * np.zeros(1, np.float16).nbytes
        share.append((old * packed / group + 2 * (tokens - old)) / tokens)
    return 4 / sum(share)


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    expected = {id: 2 for id in (e.id for e in checking.load_sheet("lowbit").values())}
    assert Counter(id for id, _ in RIGHT) == expected


@pytest.mark.parametrize("id, code", broken_code("lowbit"), ids=[id for id, _ in broken_code("lowbit")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_half_of_the_sheet_begins_with_broken_code():
    assert len(broken_code("lowbit")) >= len(checking.load_sheet("lowbit")) / 2


def test_the_best_levels_are_those_of_all_levels():
    """The statement's claim, by trying everything: the order of |w| alone finds the optimum for any importances."""
    keep = checking.find("lowbit.keep_some").solution
    dice = torch.Generator().manual_seed(0)
    for _ in range(20):
        w = torch.randn(6, generator=dice, dtype=torch.float64)
        h = torch.rand(6, generator=dice, dtype=torch.float64) ** 3 + 1e-3
        levels, scale = keep(w, h)
        tried = [torch.tensor(t, dtype=torch.float64) for t in itertools.product((-1, 0, 1), repeat=6)]
        best = [(h * (w - (h * w * t).sum() / (h * t * t).sum().clamp_min(1e-9) * t) ** 2).sum() for t in tried]
        assert (h * (w - scale * levels) ** 2).sum() == pytest.approx(min(best).item(), rel=1e-9)


def test_a_turned_block_cannot_be_told_from_outside():
    """What the statement promises: the same product behind the norm, after the embedding and after the writer."""
    turn = checking.find("lowbit.turn_block").solution
    dice = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=dice, dtype=torch.float64)
    R, _ = torch.linalg.qr(draw(6, 6))
    table, g, reader, writer, bias, a = draw(5, 6), draw(6), draw(3, 6), draw(6, 4), draw(6), draw(5, 4)
    new = turn(table, g, reader, writer, bias, R)
    rms = lambda x: x.square().mean(-1, keepdim=True).sqrt()
    old = table + a @ writer.T + bias  # (5, 6)
    turned = new[0] + a @ new[2].T + new[3]
    assert torch.allclose((old / rms(old) * g) @ reader.T, (turned / rms(turned)) @ new[1].T)
    assert not torch.allclose(old, turned)

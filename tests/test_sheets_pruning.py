"""Right answers of other kinds pass the sheet of 12; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("pruning")


@right("magnitude_mask")
def magnitude_by_loop(W, sparsity):
    if not (sparsity >= 0 and sparsity < 1):
        raise ValueError
    rows, columns = W.shape
    order = sorted((abs(float(W[i, j])), i, j) for i in range(rows) for j in range(columns))
    mask = torch.full(W.shape, True)
    for _, i, j in order[: math.floor(sparsity * rows * columns)]:
        mask[i, j] = False
    return mask


@right("magnitude_mask")
def magnitude_numpy(W, sparsity):
    if math.isnan(sparsity) or sparsity < 0 or sparsity >= 1:
        raise ValueError("share")
    flat = np.abs(W.double().numpy()).reshape(-1)
    rank = np.empty(flat.size, dtype=int)
    rank[np.argsort(flat, kind="stable")] = np.arange(flat.size)
    return torch.from_numpy(rank >= int(sparsity * flat.size)).reshape(W.shape)


@right("zeros_by_layer")
def zeros_by_masking(weights, sparsity, per):
    """Really prune, then count."""
    if per not in {"row", "layer", "model"}:
        raise ValueError(per)
    pruned = [W.float().clone() for W in weights]
    pools = {
        "row": [row for W in pruned for row in W],
        "layer": pruned,
        "model": [torch.cat([W.view(-1) for W in pruned])],
    }
    for pool in pools[per]:
        flat = pool.view(-1)
        flat[flat.abs().argsort()[: int(sparsity * flat.numel())]] = 0
    if per == "model":
        pruned = pools["model"][0].split([W.numel() for W in weights])
    return [float((W == 0).double().mean()) for W in pruned]


@right("zeros_by_layer")
def zeros_by_owner(weights, sparsity, per):
    if per == "model":
        entries = sorted((abs(x), k) for k, W in enumerate(weights) for x in W.flatten().tolist())
        owners = Counter(k for _, k in entries[: math.floor(sparsity * len(entries))])
        return [owners[k] / W.numel() for k, W in enumerate(weights)]
    if per not in ("row", "layer"):
        raise ValueError
    n = lambda W: W.shape[-1] if per == "row" else W.shape[0] * W.shape[1]
    return [sparsity * n(W) // 1 / n(W) for W in weights]


@right("n_of_m_mask")
def pattern_by_topk(score, n, m):
    if n < 1 or n >= m or score.shape[1] % m:
        raise ValueError
    groups = score.unflatten(1, (-1, m)).flip(-1)  # topk takes the first of equal ones, the last ones are to stay
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flip(-1).flatten(1)


@right("n_of_m_mask")
def pattern_by_loop(score, n, m):
    if not (0 < n < m) or score.size(1) % m != 0:
        raise ValueError("n:m")
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for a in range(0, len(row), m):
            for j in sorted(range(a, a + m), key=lambda j: (row[j], j))[m - n :]:
                mask[i, j] = True
    return mask


@right("wanda_mask")
def wanda_squares(W, X, sparsity):
    """Squares have the order of their roots."""
    I = W.shape[1]
    if X.size(-1) != I:
        raise ValueError
    cost = W.double() ** 2 * X.double().square().sum((0, 1))
    border = cost.sort(1).values[:, int(sparsity * I)]
    return cost >= border[:, None]


@right("wanda_mask")
def wanda_numpy(W, X, sparsity):
    x = X.float().numpy().reshape(-1, X.shape[-1])
    if x.shape[1] != W.shape[1]:
        raise ValueError("inputs")
    score = np.abs(W.float().numpy()) * np.sqrt((x.astype(np.float64) ** 2).mean(0))  # a constant factor does no harm
    mask = np.ones(score.shape, bool)
    for keep, row in zip(mask, score):
        keep[np.argsort(row)[: math.floor(sparsity * len(row))]] = False
    return torch.tensor(mask)


@right("obs_prune")
def obs_by_least_squares(w, H, n):
    """With these weights gone, the best others solve a linear system: no update is needed."""
    if n < 0 or n > len(w):
        raise ValueError

    def best(left):
        new = torch.zeros_like(w)
        if left:
            new[left] = torch.linalg.solve(H[left][:, left], H[left] @ w)
        delta = new - w
        return float(delta @ H @ delta), new

    left, new = list(range(len(w))), w.clone()
    for _ in range(n):
        without = [left[:i] + left[i + 1 :] for i in range(len(left))]
        left = min(without, key=lambda part: best(part)[0])
        new = best(left)[1]
    return new


@right("obs_prune")
def obs_by_downdates(w, H, n):
    """The inverse of the smaller problem from that of the larger one, by a step of Gaussian elimination."""
    if not 0 <= n <= w.numel():
        raise ValueError("n")
    w, P, gone = w.clone(), torch.linalg.inv(H), torch.zeros(len(w), dtype=torch.bool)
    for _ in range(n):
        cost = (w * w / P.diagonal()).masked_fill(gone, math.inf)
        k = int(cost.argmin())
        w = w - P[:, k] * (w[k] / P[k, k])
        P = P - torch.outer(P[:, k], P[k]) / P[k, k]
        P[k, k] = 1.0
        gone[k] = True
        w[gone] = 0.0
    return w


@right("cut_channels")
def channels_by_concatenation(gate, up, down, n):
    if n < 1 or n > gate.shape[0]:
        raise ValueError
    every = torch.cat([gate, up, down.T], 1).double()  # (F, 3 D)
    keep = torch.zeros(len(every), dtype=torch.bool)
    keep[every.norm(dim=1).argsort()[-n:]] = True
    return gate[keep], up[keep], down[:, keep]


@right("cut_channels")
def channels_by_sorting(gate, up, down, n):
    F = len(up)
    if n not in range(1, F + 1):
        raise ValueError("n")
    score = [sum(float(x) ** 2 for x in (*gate[c], *up[c], *down[:, c])) for c in range(F)]
    keep = sorted(sorted(range(F), key=score.__getitem__, reverse=True)[:n])
    return tuple(W.index_select(axis, torch.tensor(keep)) for W, axis in ((gate, 0), (up, 0), (down, 1)))


@right("cut_group")
def group_by_index(q, k, v, o, n_kv, drop):
    if n_kv == 1 or drop not in range(n_kv):
        raise ValueError
    d = k.shape[0] // n_kv
    group = q.shape[0] // d // n_kv
    head = torch.arange(q.shape[0]) // d
    stays, kv = head // group != drop, torch.arange(k.shape[0]) // d != drop
    return q[stays], k[kv], v[kv], o[:, stays]


@right("cut_group")
def group_by_slices(q, k, v, o, n_kv, drop):
    if not 0 <= drop <= n_kv - 1 or n_kv == 1:
        raise ValueError("drop")
    wide, narrow = len(q) // n_kv, len(k) // n_kv
    rows = lambda W, width: torch.cat((W[: drop * width], W[(drop + 1) * width :]))
    return rows(q, wide), rows(k, narrow), rows(v, narrow), rows(o.T, wide).T


@right("count_zeros")
def zeros_by_loop(before, after, pruned, tied):
    if len(pruned) == 0:
        raise ValueError
    zeros = new = size = everything = gone = 0
    for name, W in after.items():
        z = W.eq(0)
        if name not in tied:
            gone, everything = gone + z.sum().item(), everything + W.numel()
        if name in pruned:
            zeros, size = zeros + z.sum().item(), size + W.numel()
            new += (z & before[name].ne(0)).sum().item()
    return {"layers": zeros / size, "model": gone / everything, "new": new / size}


@right("count_zeros")
def zeros_by_concatenation(before, after, pruned, tied):
    if not pruned:
        raise ValueError("nothing")
    join = lambda d, names: torch.cat([d[n].double().flatten() for n in names])
    old, now, model = join(before, pruned), join(after, pruned), join(after, sorted(set(after) - set(tied)))
    return {
        "layers": 1 - now.count_nonzero().item() / len(now),
        "model": 1 - model.count_nonzero().item() / len(model),
        "new": float(((now == 0) & (old != 0)).double().mean()),
    }


@right("step_reaching")
def step_by_bisection(target, start, end, initial, final):
    if not (start < end and 0 <= initial <= final < 1 and target <= final):
        raise ValueError

    def sparsity(t):
        t = min(max(t, start), end)
        return final + (initial - final) * (1 - (t - start) / (end - start)) ** 3

    low, high = 0, max(end, 0)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sparsity(middle) >= target else (middle + 1, high)
    return low


@right("step_reaching")
def step_by_counting(target, start, end, initial, final):
    if end <= start or initial < 0 or final < initial or final >= 1 or final < target:
        raise ValueError("schedule")
    for t in range(max(end, 0) + 1):
        left = 1.0 if t <= start else 0.0 if t >= end else (end - t) / (end - start)
        if final - (final - initial) * left**3 >= target:
            return t


@right("masked_step")
def step_by_fill(w, grad, velocity, mask, lr, beta):
    v = (velocity * beta + grad).masked_fill(~mask, 0.0)
    return (w - lr * v).masked_fill(~mask, 0.0), v


@right("masked_step")
def step_by_scatter(w, grad, velocity, mask, lr, beta):
    new, v = torch.zeros_like(w), torch.zeros_like(velocity)
    v[mask] = beta * velocity[mask] + grad[mask]
    new[mask] = w[mask] - lr * v[mask]
    return new, v


@right("movement_mask")
def movement_by_loop(weights, grads, sparsity):
    if len(weights) != len(grads) or len(grads) == 0:
        raise ValueError
    score = torch.zeros(weights[0].shape)
    for w, g in zip(weights, grads):
        score -= w.float() * g.float()
    flat = score.flatten()
    border = flat.sort().values[int(sparsity * len(flat))]
    return score >= border


@right("movement_mask")
def movement_stacked(weights, grads, sparsity):
    if not len(weights) == len(grads) > 0:
        raise ValueError("pairs")
    towards_zero = torch.einsum("sij,sij->ij", torch.stack(weights).double(), torch.stack(grads).double())
    rank = towards_zero.flatten().argsort(descending=True).argsort()
    return (rank >= math.floor(sparsity * rank.numel())).view(towards_zero.shape)


@pytest.mark.parametrize("id, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    assert Counter(id for id, _ in RIGHT) == {id: 2 for id in (e.id for e in checking.load_sheet("pruning").values())}


@pytest.mark.parametrize("id, code", broken_code("pruning"), ids=[id for id, _ in broken_code("pruning")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_an_own_answer_with_one_of_the_mistakes_is_not_called_the_code_of_the_statement():
    def magnitude_mask(W, sparsity):  # ties at the threshold go, and that is all
        return W.abs() > W.abs().flatten().float().quantile(sparsity)

    ex = checking.find("pruning.magnitude_mask")
    said = checking.judge(ex, checking._run_here(ex, magnitude_mask)).sentence
    assert (
        said.startswith("In ") and "your answer gives what the code as it was gives. About that code: Weights" in said
    )
    assert "This is the code as it was" not in said

"""Right answers of other kinds pass the sheet of 09; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections import Counter
from fractions import Fraction
from itertools import accumulate, chain, takewhile

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers
from torch.nn.functional import linear, one_hot

from llmcourse.practice import checking

RIGHT, right = right_answers("finetuning")


@right("lora_forward")
def beside_by_einsum(x, W, b, A, B, alpha):
    low = torch.einsum("...i,ri->...r", x.float(), A)
    more = torch.einsum("...r,or->...o", low * alpha / A.size(0), B)
    y = x @ W.mT
    y = y if b is None else y + b
    return (y.float() + more).to(y.dtype)


@right("lora_forward")
def beside_flat(x, W, b, A, B, alpha):
    flat = x.reshape(-1, x.shape[-1])
    low = linear(flat.to(torch.float32), A)
    out = linear(flat, W) + linear(low, B).mul(alpha / B.shape[1]).to(x.dtype)
    out = out if b is None else out + b
    return out.reshape(*x.shape[:-1], W.shape[0])


@right("largest_rank")
def rank_by_trying(layers, budget, head):
    found = None
    for rank in range(1, 10**6):
        numbers = 0 if head is None else head[0] * head[1] + head[0]
        for outputs, inputs, copies in layers:
            numbers += copies * (rank * inputs + outputs * rank)
        if numbers > budget or any(rank * o + rank * i >= o * i for o, i, _ in layers):
            break
        found = rank, numbers
    if found is None:
        raise ValueError("rank")
    return found


@right("largest_rank")
def rank_by_fractions(layers, budget, head):
    left = budget
    if head is not None:
        classes, width = head
        left -= classes * width + classes
    cost = sum((o + i) * n for o, i, n in layers)
    bounds = [math.ceil(Fraction(o * i, o + i)) - 1 for o, i, _ in layers]
    rank = min(min(bounds), math.floor(Fraction(left, cost)))
    if rank <= 0:
        raise ValueError
    return rank, budget - left + cost * rank


@right("lora_steps")
def steps_by_autograd(X, Y, W, A, alpha, rates):
    A, B = A.clone(), torch.zeros(W.shape[0], A.shape[0], dtype=W.dtype)
    for rate in rates:
        A.requires_grad_(), B.requires_grad_()
        out = X @ W.T + alpha / A.shape[0] * (X @ A.T @ B.T)
        loss = (out - Y).square().sum(1).mean() / 2
        a, b = torch.autograd.grad(loss, (A, B))
        A, B = (A - rate * a).detach(), (B - rate * b).detach()
    return A, B


@right("lora_steps")
def steps_by_vectors(X, Y, W, A, alpha, rates):
    s, B = alpha / A.shape[0], torch.zeros_like(W[:, : A.shape[0]])
    for rate in rates:
        to_a, to_b = torch.zeros_like(A), torch.zeros_like(B)
        for x, y in zip(X, Y):
            low = A @ x
            error = W @ x + s * (B @ low) - y
            to_b += s * torch.outer(error, low) / X.shape[0]
            to_a += s * torch.outer(B.T @ error, x) / X.shape[0]
        A, B = A - rate * to_a, B - rate * to_b
    return A, B


@right("as_adapter")
def adapter_by_numpy(before, after, share, alpha):
    if share <= 0 or share > 1 or math.isnan(share):
        raise ValueError("share")
    change = after.double().numpy() - before.double().numpy()
    u, s, vt = np.linalg.svd(change)
    total, r, kept = float((s**2).sum()), 1, float(s[0] ** 2)
    while kept < (share - 1e-6) * total and r < len(s):
        kept, r = kept + float(s[r] ** 2), r + 1
    root = np.sqrt(s[:r] * r / alpha)
    single = lambda m: torch.from_numpy(np.ascontiguousarray(m)).float()
    return single(root[:, None] * vt[:r]), single(u[:, :r] * root)


@right("as_adapter")
def adapter_by_eigenvectors(before, after, share, alpha):
    """Δ V Vᵀ, with the eigenvectors V of ΔᵀΔ."""
    if not (share > 0 and share <= 1):
        raise ValueError
    change = after.to(torch.float64) - before.to(torch.float64)
    squares, vectors = torch.linalg.eigh(change.T @ change)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    border = (share - 1e-6) * squares.sum()
    r = min(1 + sum(float(k) < border for k in squares.cumsum(0)), len(squares))
    A = vectors[:, :r].T
    return A.float(), (change @ A.T * r / alpha).float()


@right("merge_and_back")
def merged_and_back_wide(W, A, B, alpha, layout):
    if layout not in {"linear", "conv1d"}:
        raise ValueError(layout)
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    added = (B @ A).mul(alpha / A.shape[0])
    if layout == "conv1d":
        added = added.mT
    merged = torch.add(W.to(wide), added.to(wide)).to(W.dtype)
    back = torch.sub(merged.to(wide), added.to(wide)).to(W.dtype)
    return merged, back, torch.count_nonzero(back.ne(W)).item()


@right("merge_and_back")
def merged_as_linear(W, A, B, alpha, layout):
    """Everything as (O, I), and turned at the end."""
    turn = {"linear": lambda t: t, "conv1d": lambda t: t.T}.get(layout)
    if turn is None:
        raise ValueError("layout")
    own, added = turn(W).clone(), torch.einsum("or,ri->oi", B, A) * (alpha / B.shape[1])
    merged = (own + added).to(W.dtype)
    back = (merged + -added).to(W.dtype)
    lost = sum(a != b for a, b in zip(back.flatten().tolist(), own.flatten().tolist()))
    return turn(merged), turn(back), lost


@right("fingerprint")
def print_of_lines(weights, without):
    lines = []
    for name, tensor in weights.items():
        parts = name.split(".")
        if "lora_A" in parts or "lora_B" in parts or any(name[: len(m) + 1] == m + "." for m in without):
            continue
        flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        data = bytes(flat.view(torch.uint8).tolist())
        about = f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0{len(data)}\0"
        lines.append(hashlib.sha256(about.encode() + data).hexdigest())
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@right("fingerprint")
def print_by_numpy(weights, without):
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items(), key=lambda pair: pair[0]):
        if any(part in ("lora_A", "lora_B") for part in name.split(".")):
            continue
        if any(name.startswith(m + ".") for m in without):
            continue
        numbers = tensor.detach().view(whole[tensor.element_size()]).numpy()
        for piece in (name, str(tensor.dtype), str(tuple(tensor.shape))):
            total.update(f"{len(piece)}:{piece}".encode())
        total.update(numbers.tobytes())  # in the order of the axes, however they lie
    return total.hexdigest()


@right("read_out")
def read_by_rows(hidden, mask, how):
    out = []
    for h, m in zip(hidden.float(), mask):
        real = torch.nonzero(m).flatten()
        if how not in ("last", "mean") or not len(real):
            raise ValueError("how or mask")
        out.append(h[real[-1]] if how == "last" else h[real].mean(0))
    return torch.stack(out)


@right("read_out")
def read_by_where(hidden, mask, how):
    real = mask.bool()
    if how == "last":
        T = mask.shape[1]
        last = T - 1 - real.flip(1).int().argmax(1)
        chosen = one_hot(last, T).bool()
    elif how == "mean":
        chosen = real
    else:
        raise ValueError(how)
    if (real.sum(1) == 0).any():
        raise ValueError("a row of padding")
    kept = torch.where(chosen[..., None], hidden.float(), torch.zeros(()))
    return kept.sum(1) / chosen.sum(1)[:, None]


@right("fair_share")
def fair_by_loops(train, val, test, shrinks):
    if len(shrinks) == 0:
        raise ValueError("shrinks")
    rows, labels = train[0].tolist(), train[1]
    columns = list(zip(*rows))
    mean = [statistics.fmean(c) for c in columns]
    std = [statistics.pstdev(c) or 1 for c in columns]
    scaled = lambda row: [(v - m) / s for v, m, s in zip(row, mean, std)]
    centers = {}
    for c in sorted(set(labels)):
        own = [scaled(row) for row, label in zip(rows, labels) if label == c]
        centers[c] = [statistics.fmean(column) for column in zip(*own)]

    def share(part, s):
        right = 0
        for row, c in zip(part[0].tolist(), part[1]):
            here = scaled(row)
            away = {k: math.fsum((v - (1 - s) * m) ** 2 for v, m in zip(here, own)) for k, own in centers.items()}
            right += min(away, key=away.get) == c
        return right / len(part[1])

    best, setting = -1.0, None
    for s in sorted(shrinks):
        if share(val, s) > best:
            best, setting = share(val, s), s
    return setting, share(test, setting)


@right("fair_share")
def fair_by_cdist(train, val, test, shrinks):
    """With the other deviation: the nearest center is the same one."""
    if not list(shrinks):
        raise ValueError
    x, classes = train[0].double(), np.array(train[1])
    mean, std = x.mean(0), x.std(0) if len(x) > 1 else torch.zeros(x.shape[1])
    std[std == 0] = 1
    kinds = np.unique(classes)
    centers = torch.stack([((x - mean) / std)[torch.from_numpy(classes == k)].mean(0) for k in kinds])

    def right(part, s):
        own = (part[0].double() - mean) / std
        away = torch.cdist(own, (1 - s) * centers, compute_mode="donot_use_mm_for_euclid_dist")
        return float(np.mean(kinds[away.argmin(1).numpy()] == np.array(part[1])))

    best = sorted(shrinks, key=lambda s: (-right(val, s), s))[0]
    return best, right(test, best)


@right("nested_draws")
def drawn_by_random(classes, sizes, seed):
    counts, dice, order = Counter(classes), random.Random(seed), {}
    if min(sizes) < 1 or max(sizes) > min(counts.values()):
        raise ValueError("sizes")
    for c in sorted(counts):
        order[c] = [i for i, other in enumerate(classes) if other == c]
        dice.shuffle(order[c])
    return {k: list(chain.from_iterable(order[c][:k] for c in order)) for k in sizes}


@right("nested_draws")
def drawn_by_numpy(classes, sizes, seed):
    """Every text gets a number; a draw has those with the smallest numbers of each class."""
    labels = np.array(classes)
    number = np.random.default_rng(seed).random(len(labels))
    draws = {}
    for size in sizes:
        draws[size] = []
        for c in np.unique(labels):
            own = np.flatnonzero(labels == c)
            if size <= 0 or size > len(own):
                raise ValueError
            draws[size] += own[np.argsort(number[own])][:size].tolist()
    return draws


@right("supported")
def supported_by_sums(arms, claims, level):
    """Half of the choices are enough: the others are their mirror images."""
    values = []
    for a, b in claims:
        d = [x - y for x, y in zip(arms[a], arms[b], strict=True)]
        if not d:
            raise ValueError("seeds")
        sums = [d[0]]
        for v in d[1:]:
            sums = [s + sign * v for s in sums for sign in (1, -1)]
        values.append(sum(abs(s) > abs(sum(d)) - 1e-9 for s in sums) / len(sums))
    order = sorted(range(len(values)), key=values.__getitem__)
    fits = [values[i] <= level / (len(values) - k) for k, i in enumerate(order)]
    held = {i for i, _ in takewhile(lambda pair: pair[1], zip(order, fits))}
    return [(p, i in held and sum(arms[a]) > sum(arms[b])) for i, (p, (a, b)) in enumerate(zip(values, claims))]


@right("supported")
def supported_by_adjusted_values(arms, claims, level):
    """Holm's adjusted p: the largest of (m - k + 1) p up to its place."""
    m, values = len(claims), []
    for pair in claims:
        a, b = (np.array(arms[name], dtype=float) for name in pair)
        if a.shape != b.shape or a.size == 0:
            raise ValueError
        d = a - b
        bits = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
        values.append(float(np.mean(np.abs((2 * bits - 1) @ d) >= abs(d.sum()) - 1e-9)))
    order = np.argsort(values, kind="stable")
    adjusted = accumulate(((m - k) * values[i] for k, i in enumerate(order)), max)
    holds = dict(zip(order.tolist(), (bool(v <= level) for v in adjusted)))
    mean = lambda name: statistics.fmean(arms[name])
    return [(values[i], holds[i] and mean(a) > mean(b)) for i, (a, b) in enumerate(claims)]


@right("fit_prompt")
def prompt_by_lengths(rounds, question, names, limit):
    flat = [list(chain(*one)) for one in rounds]
    room = limit - len(question) - (max(len(name) for name in names) - 1)
    if room < 0:
        raise ValueError("limit")
    k = sum(total <= room for total in accumulate(map(len, flat)))
    return [*chain(*flat[:k]), *question]


@right("fit_prompt")
def prompt_by_trying(rounds, question, names, limit):
    for k in range(len(rounds), -1, -1):
        prompt = [token for one in rounds[:k] for shot in one for token in shot] + question
        if all(len(prompt + name[:-1]) <= limit for name in names):
            return prompt
    raise ValueError("nothing fits")


@right("training_bytes")
def bytes_row_by_row(layers, other, head, kind, rank, group):
    if kind == "full":
        numbers = sum(o * i for o, i in layers) + other + head
        return {"frozen": 0, "trained": 4 * numbers, "gradients": 4 * numbers, "optimizer": 8 * numbers}
    if kind not in {"lora", "qlora"}:
        raise ValueError(kind)
    numbers, frozen = head, 2 * other
    for o, i in layers:
        numbers += rank * i + o * rank
        for _ in range(o):
            groups = len(range(0, i, group))
            frozen += 2 * i if kind == "lora" else math.ceil(i / 2) + 2 * groups + math.ceil(groups / 2)
    return {"optimizer": 8 * numbers, "gradients": 4 * numbers, "trained": 4 * numbers, "frozen": frozen}


@right("training_bytes")
def bytes_of_tensors(layers, other, head, kind, rank, group):
    """Counted on what would be there."""
    make = lambda dtype, *shape: torch.empty(*shape, dtype=dtype, device="meta")
    single, half, byte = torch.float32, torch.float16, torch.uint8
    base, new = [make(half, other)], [make(single, head)]
    if kind == "full":
        base, new = [], [make(single, other), *(make(single, o, i) for o, i in layers), *new]
    elif kind in ("lora", "qlora"):
        new += [make(single, *shape) for o, i in layers for shape in ((rank, i), (o, rank))]
        for o, i in layers:
            g = (i + group - 1) // group
            packed = [make(byte, o, (i + 1) // 2), make(half, o, g), make(byte, o, (g + 1) // 2)]
            base += [make(half, o, i)] if kind == "lora" else packed
    else:
        raise ValueError("kind")
    size = lambda tensors: sum(t.nbytes for t in tensors)
    return dict(frozen=size(base), trained=size(new), gradients=size(new), optimizer=2 * size(new))


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    expected = {id: 2 for id in (e.id for e in checking.load_sheet("finetuning").values())}
    assert Counter(id for id, _ in RIGHT) == expected


@pytest.mark.parametrize("id, code", broken_code("finetuning"), ids=[id for id, _ in broken_code("finetuning")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_half_of_the_sheet_begins_with_broken_code():
    assert len(broken_code("finetuning")) >= len(checking.load_sheet("finetuning")) / 2


def test_steps_of_the_sheet_are_those_of_the_chapter():
    """The derivatives written out, and the chapter's layer under torch's own gradient descent."""
    from torch import nn

    from llmcourse.finetuning import LoRALinear

    dice = torch.Generator().manual_seed(0)
    X, Y = torch.randn(9, 5, generator=dice), torch.randn(9, 4, generator=dice)
    layer = LoRALinear(nn.Linear(5, 4, bias=False), rank=2, alpha=6.0)
    first, rates = layer.lora_A.weight.detach().clone(), [0.1, 0.05, 0.02]
    for rate in rates:
        layer.zero_grad()
        ((layer(X) - Y).square().sum(1).mean() / 2).backward()
        torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=rate).step()
    A, B = checking.find("finetuning.lora_steps").solution(X, Y, layer.base.weight.detach(), first, 6.0, rates)
    assert torch.allclose(A, layer.lora_A.weight, atol=1e-6) and torch.allclose(B, layer.lora_B.weight, atol=1e-6)
    assert not torch.allclose(A, first, atol=1e-4)


def test_no_smaller_adapter_keeps_as_much():
    """What the statement says about singular values, against adapters that were searched for by descent."""
    dice = torch.Generator().manual_seed(1)
    change = torch.randn(6, 5, generator=dice, dtype=torch.float64)
    A, B = checking.find("finetuning.as_adapter").solution(torch.zeros(6, 5), change, 0.8, 4.0)
    left = lambda adds: float((change - adds).square().sum() / change.square().sum())
    assert left(4 / len(A) * B.double() @ A.double()) <= 0.2 + 1e-5
    best = 1.0
    for _ in range(5):  # alternating least squares of one rank less
        a = torch.randn(len(A) - 1, 5, generator=dice, dtype=torch.float64)
        for _ in range(200):
            b = torch.linalg.lstsq(a.T, change.T).solution.T
            a = torch.linalg.lstsq(b, change).solution
        best = min(best, left(b @ a))
    assert best > 0.2


@pytest.mark.parametrize("shape, group", [((6, 128), 64), ((5, 192), 64), ((4, 7), 7), ((3, 64), 8)])
def test_packed_bytes_of_the_sheet_are_those_of_the_chapter(shape, group):
    """The arithmetic of the sheet, against what a packed layer keeps."""
    from llmcourse.packed import PackedLinear

    packed = PackedLinear(*shape, bits=4, symmetric=False, group_size=group, scale_rows=shape[0])
    counted = checking.find("finetuning.training_bytes").solution([shape], 0, 1, "qlora", 1, group)
    assert counted["frozen"] == sum(t.nbytes for t in packed.buffers() if t.numel())


def test_three_seeds_never_support_a_claim_at_five_percent():
    """What the title says, and the first number of seeds that can."""
    judge = checking.find("finetuning.supported").solution
    for n, can in ((3, False), (5, False), (6, True)):
        arms = {"a": [1.0 + i for i in range(n)], "b": [0.0] * n}
        assert judge(arms, [("a", "b")], 0.05) == [(2 / 2**n, can)]

"""Right answers of other kinds pass the sheet of 11; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("compression")


@right("streamed_hessian")
def hessian_at_once(batches):
    if not any(bool(real.any()) for _, real in batches):
        raise ValueError
    x = torch.cat([x.flatten(0, 1)[real.flatten()].to(torch.float32) for x, real in batches])
    return torch.einsum("ni,nj->ij", x, x) * (2 / x.shape[0])


@right("streamed_hessian")
def hessian_running_mean(batches):
    """The mean so far, moved towards that of each batch by the batch's share of the tokens."""
    mean, n = None, 0
    for x, real in batches:
        rows = (x.float() * 1.0)[real]
        if len(rows):
            n += len(rows)
            new = 2 * rows.T @ rows / len(rows)
            mean = new if mean is None else mean + (new - mean) * (len(rows) / n)
    if mean is None:
        raise ValueError("tokens")
    return mean


@right("error_to_dense")
def error_as_one_layer(W, W_hat, H, C, H_hat):
    """One layer (−W, Ŵ) that reads (x, x̂)."""
    both = torch.cat([torch.cat([H, C], 1), torch.cat([C.T, H_hat], 1)])
    delta = torch.cat([-W, W_hat], 1)
    return 0.5 * torch.trace(delta @ both @ delta.T).item()


@right("error_to_dense")
def error_numpy(W, W_hat, H, C, H_hat):
    W, V, H, C, K = (t.numpy() for t in (W, W_hat, H, C, H_hat))
    total = sum(v @ K @ v - 2 * w @ C @ v + w @ H @ w for w, v in zip(W, V))
    return float(total / 2)


@right("refit_columns")
def refit_by_correction(W, H, stay):
    """The columns that stay, and on top what they can do of the others' work."""
    I = W.shape[1]
    if any(j < 0 or j >= I for j in stay) or len(stay) != len(set(stay)):
        raise ValueError
    gone = sorted(set(range(I)) - set(stay))
    new = torch.zeros(W.shape, dtype=W.dtype)
    inverse = torch.linalg.inv(H[stay, :][:, stay])
    new[:, stay] = W[:, stay] + W[:, gone] @ H[gone, :][:, stay] @ inverse
    return new


@right("refit_columns")
def refit_by_the_inverse(W, H, stay):
    """The optimal-brain-surgeon form: the inverse of H, and that of its part for the columns that go."""
    if sorted(set(stay)) != sorted(stay) or not all(j in range(W.shape[1]) for j in stay):
        raise ValueError("columns")
    gone = [j for j in range(W.shape[1]) if j not in stay]
    inverse = torch.linalg.inv(H)
    new = W.clone()
    if gone:
        new -= W[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
        new[:, gone] = 0
    return new


def _on_grids(W, H):
    step = 0.5 / (1 + H.diagonal()).sqrt()
    return (W / step).round() * step


@right("walk_layers")
def walk_again_from_the_start(sites, x):
    """The plainest walk: for every site all compressed ones before it are run again."""
    if x.shape[0] < 1:
        raise ValueError
    done = []
    for site in sites:
        y = x
        for new in done:
            first = torch.clamp(y @ new[0].T, min=0)
            y = first if len(new) == 1 else first * (y @ new[1].T)
        H = 2 * (y.T @ y) / y.shape[0]
        done.append([_on_grids(W, H) for W in site])
    return done


@right("walk_layers")
def walk_recursively(sites, x):
    if not len(x):
        raise ValueError("inputs")
    if not sites:
        return []
    H = torch.einsum("ni,nj->ij", x, x) * (2 / len(x))
    new = [_on_grids(W, H) for W in sites[0]]
    y = torch.relu(torch.nn.functional.linear(x, new[0]))
    if len(new) > 1:
        y = y * torch.nn.functional.linear(x, new[1])
    return [new, *walk_recursively(sites[1:], y)]


@right("round_pruned")
def round_by_rows(W, mask, bits):
    if bits < 2 or bits > 8:
        raise ValueError
    out = torch.zeros(W.shape, dtype=torch.float32)
    top = 2**bits - 1
    for i in range(W.shape[0]):
        kept = W[i][mask[i]].float()
        if kept.numel() == 0 or not bool((kept != 0).any()):
            continue
        low, high = min(0.0, kept.min()), max(0.0, kept.max())
        s = (high - low) / top
        z = torch.round(-low / s)
        out[i, mask[i]] = ((torch.round(kept / s) + z).clamp(0, top) - z) * s
    return out.to(W.dtype)


@right("round_pruned")
def round_by_torch(W, mask, bits):
    if bits not in range(2, 9):
        raise ValueError("bits")
    kept = W.float().masked_fill(~mask, 0.0)
    zero_too = torch.cat([kept, kept.new_zeros(len(kept), 1)], 1)  # the range holds 0
    low, high = zero_too.aminmax(dim=1)
    step = (high - low) / (2**bits - 1)
    step[step == 0] = 1.0
    z = torch.round(-low / step).int()
    return torch.fake_quantize_per_channel_affine(kept, step, z, 0, 0, 2**bits - 1).to(W.dtype)


@right("apply_updates")
def updates_backwards(W, updates):
    grid = [rounded for _, _, rounded in updates]
    if grid != sorted(grid):  # False before True
        raise ValueError
    mask = next((m for _, m, _ in reversed(updates) if m is not None), None)
    last = updates[-1][0] if updates else W
    return (last, None) if mask is None else (last.masked_fill(~mask, 0.0), mask)


@right("apply_updates")
def updates_step_by_step(W, updates):
    state = {"W": W.clone(), "mask": None, "rounded": False}
    for weight, mask, rounded in updates:
        if state["rounded"] and rounded is False:
            raise ValueError("order")
        if mask is not None:
            state["mask"] = mask.clone()
        state["W"] = weight.clone()
        if state["mask"] is not None:
            state["W"][~state["mask"]] = 0
        state["rounded"] = rounded
    return state["W"], state["mask"]


@right("matched_noise")
def noise_by_loop(W, W_hat, dice, group_size):
    if group_size <= 0 or W.size(1) % group_size:
        raise ValueError
    new = W.to(torch.float32).clone()
    for start in range(0, W.size(1), group_size):
        part = slice(start, start + group_size)
        error = (W_hat[:, part].float() - W[:, part].float()).square().sum(1, keepdim=True)
        luck = dice[:, part].float()
        new[:, part] += (error / luck.square().sum(1, keepdim=True)).sqrt() * luck
    return new.to(W.dtype)


@right("matched_noise")
def noise_unflattened(W, W_hat, dice, group_size):
    if group_size < 1 or W.shape[1] / group_size != W.shape[1] // group_size:
        raise ValueError("groups")
    w, hat, luck = (t.float().unflatten(1, (-1, group_size)) for t in (W, W_hat, dice))
    unit = torch.nn.functional.normalize(luck, dim=-1)
    return (w + unit * torch.linalg.vector_norm(hat - w, dim=-1, keepdim=True)).flatten(1).to(W.dtype)


@right("against_null")
def null_by_loop(method, noise, tokens, draws):
    if noise.shape[1] != method.shape[0]:
        raise ValueError

    def ratio(documents):
        n = sum(float(tokens[d]) for d in documents)
        ours = math.exp(sum(float(method[d]) for d in documents) / n)
        logs = [sum(float(row[d]) for d in documents) / n for row in noise]
        return ours / math.exp(sum(logs) / len(logs))

    drawn = sorted(ratio(d) for d in draws.tolist())
    return ratio(range(len(tokens))), drawn[1], drawn[-2]


@right("against_null")
def null_by_counts(method, noise, tokens, draws):
    """How often each document was drawn: then everything is two matrix products."""
    D = len(tokens)
    if method.shape != (D,) or noise.shape[1] != D:
        raise ValueError("documents")
    counts = torch.cat([torch.ones(1, D), torch.nn.functional.one_hot(draws, D).sum(1)]).double()
    logs = (counts @ method - (counts @ noise.T).mean(1)) / (counts @ tokens.double())
    low, high = logs[1:].quantile(torch.tensor([1 / 40, 39 / 40], dtype=logs.dtype))
    return logs[0].exp().item(), low.exp().item(), high.exp().item()


@right("file_sizes")
def sizes_by_rows(layers, embedding, tied, others, bits, group_size):
    size, numbers = 0, others
    for O, I in layers:
        if I % group_size != 0:
            raise ValueError
        numbers += O * I
        for _ in range(O):
            size += math.ceil(I * bits / 8) + I // group_size * (2 + 1)
    for _ in ["embedding"] if tied else ["embedding", "head"]:
        size += embedding[0] * embedding[1] + embedding[0] * 2
        numbers += embedding[0] * embedding[1]
    size += others * 2
    return size, 2 * numbers / size


@right("file_sizes")
def sizes_in_bits(layers, embedding, tied, others, bits, group_size):
    if not all(I % group_size == 0 for _, I in layers):
        raise ValueError("group_size")
    O, I = np.array(layers, dtype=np.int64).reshape(-1, 2).T
    V, D = embedding
    tables = 2 - int(bool(tied))
    codes = (I * bits + 7) // 8 * O
    small = int((codes + 3 * O * (I // group_size)).sum()) + tables * (V * D + 2 * V) + 2 * others
    return small, 2 * (int((O * I).sum()) + tables * V * D + others) / small


@right("count_model")
def count_by_table(parts, k):
    stored, used = Counter(), Counter()
    for kind, shape in parts:
        match kind, shape:
            case "linear", (O, I):
                stored[kind] += O * I
                used[kind] += O * I
            case "embedding", (V, D):
                stored[kind] += V * D
            case "tied head", (V, D):
                used[kind] += V * D
            case "vector", (D,):
                stored[kind] += D
            case "experts", (E, O, I) if k in range(1, E + 1):
                stored[kind] += E * O * I
                used[kind] += k * O * I
            case _:
                raise ValueError(kind)
    return stored.total(), 2 * used.total()


@right("count_model")
def count_numpy(parts, k):
    stored = {"linear": 1, "embedding": 1, "tied head": 0, "vector": 1, "experts": 1}
    if any(kind not in stored or (kind == "experts" and (k < 1 or shape[0] < k)) for kind, shape in parts):
        raise ValueError("parts")
    size = lambda shape: int(np.prod(shape, dtype=np.int64))
    parameters = sum(size(shape) for kind, shape in parts if stored[kind])
    products = sum(size(shape) for kind, shape in parts if kind in ("linear", "tied head"))
    products += sum(k * size(shape[1:]) for kind, shape in parts if kind == "experts")
    return parameters, 2 * products


@right("blocks_done")
def blocks_by_split(files, job, n):
    done = 0
    while done < n:
        text = files.get("block-" + str(done).zfill(4) + ".txt")
        parts = [] if text is None else text.split("\n", 2)
        if len(parts) != 3 or parts[0] != job or hashlib.sha256(parts[2].encode("utf8")).hexdigest() != parts[1]:
            break
        done += 1
    return done


@right("blocks_done")
def blocks_by_pattern(files, job, n):
    """What a good file looks like is known from its body."""
    good = set()
    for name, text in files.items():
        found = re.fullmatch(r"block-(\d{4})\.txt", name)
        body = text.split("\n", 2)[-1]
        if found and text == f"{job}\n{hashlib.sha256(body.encode()).hexdigest()}\n{body}":
            good.add(int(found[1]))
    return next((i for i in range(n) if i not in good), n)


@pytest.mark.parametrize("id, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    known = (e.id for e in checking.load_sheet("compression").values())
    assert Counter(id for id, _ in RIGHT) == {id: 2 for id in known}


@pytest.mark.parametrize("id, code", broken_code("compression"), ids=[id for id, _ in broken_code("compression")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)

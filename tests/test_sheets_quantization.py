"""Right answers of other kinds pass the sheet of 14; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("quantization")


@right("affine_grid")
def grid_by_cases(low, high, bits):
    if bits < 2 or bits > 8 or not low <= high or math.isinf(low) or math.isinf(high):
        raise ValueError("range")
    top = 2**bits - 1
    if low == high == 0:
        return 1.0, 0
    if low > 0:
        return high / top, 0
    if high < 0:
        return -low / top, top
    return (high - low) / top, int(np.rint(-low / ((high - low) / top)))


@right("affine_grid")
def grid_by_decimal(low, high, bits):
    if math.isnan(low + high) or math.isinf(low) or math.isinf(high) or low > high or bits not in range(2, 9):
        raise ValueError
    ends = sorted([low, high, 0.0])
    scale = (ends[-1] - ends[0]) / (2**bits - 1)
    return (scale, round(abs(ends[0]) / scale)) if scale else (1.0, 0)


@right("symmetric_codes")
def codes_row_by_row(W, bits):
    if bits not in (2, 3, 4, 5, 6, 7, 8):
        raise ValueError
    scales = [float(row.float().abs().max()) / (2 ** (bits - 1) - 1) or 1.0 for row in W]
    scale = torch.tensor(scales)[:, None]
    return torch.round(W.to(torch.float32).div(scale)).to(torch.int8), scale


@right("symmetric_codes")
def codes_numpy(W, bits):
    if bits < 2 or bits > 8:
        raise ValueError("bits")
    top = (1 << (bits - 1)) - 1
    values = W.float().numpy()
    scale = np.maximum(values.max(1, keepdims=True), -values.min(1, keepdims=True)) / np.float32(top)
    scale[scale == 0] = 1
    return torch.from_numpy(np.rint(values / scale).astype(np.int8)), torch.from_numpy(scale)


@right("group_round")
def groups_padded(W, bits, group_size):
    if group_size <= 0:
        raise ValueError("group")
    more = -W.shape[1] % group_size
    padded = torch.nn.functional.pad(W.float(), (0, more)).unflatten(1, (-1, group_size))
    scale = (padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
    return ((padded / scale).round() * scale).flatten(1)[:, : W.shape[1]].to(W.dtype)


@right("group_round")
def groups_by_loop(W, bits, group_size):
    if group_size < 1:
        raise ValueError
    out = W.float().clone()
    for row in out:
        for a in range(0, len(row), group_size):
            part = row[a : a + group_size]
            largest = part.abs().max()
            if largest > 0:
                scale = largest / (2 ** (bits - 1) - 1)
                part.copy_(torch.round(part / scale) * scale)
    return out.to(W.dtype)


@right("bits_per_weight")
def weighed_in_whole_numbers(columns, bits, group_size, symmetric):
    groups = (columns + group_size - 1) // group_size
    parts = [columns * bits, 16 * groups, 0 if symmetric else groups * bits]
    return sum((n + 7) // 8 * 8 for n in parts) / columns


@right("bits_per_weight")
def weighed_by_packing(columns, bits, group_size, symmetric):
    groups = len(range(0, columns, group_size))
    size = len(np.packbits(np.zeros(columns * bits, bool))) + np.zeros(groups, np.float16).nbytes
    size += 0 if symmetric else len(np.packbits(np.zeros(groups * bits, bool)))
    return float(8 * size / columns)


@right("unpack_nibbles")
def nibbles_by_places(packed, n):
    if packed.shape[-1] != -(-n // 2):
        raise ValueError
    codes = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8)
    codes[..., 0::2] = (packed % 16).to(torch.int8)
    codes[..., 1::2] = torch.div(packed, 16, rounding_mode="floor").to(torch.int8)
    return ((codes + 8) % 16 - 8)[..., :n]


@right("unpack_nibbles")
def nibbles_by_shifts(packed, n):
    if 2 * packed.shape[-1] not in (n, n + 1):
        raise ValueError("bytes")
    signed = packed.view(torch.int8)
    low, high = (signed << 4) >> 4, signed >> 4  # an arithmetic shift keeps the sign
    return torch.stack((low, high), -1).reshape(*packed.shape[:-1], -1)[..., :n]


@right("gptq_row")
def gptq_by_parts(w, H, step, order):
    """Solve for the columns that are left, again in every round."""
    H, w = H.clone(), w.clone()
    for j in range(len(w)):
        if H[j, j] == 0:
            H[j, j] = 1
    left = list(order)
    while left:
        j, left = left[0], left[1:]
        change = step * torch.round(w[j] / step) - w[j]
        if left:
            w[left] -= torch.linalg.solve(H[left][:, left], H[left, j]) * change
        w[j] += change
    return w


@right("gptq_row")
def gptq_by_cholesky(w, H, step, order):
    w, H = w[order].clone(), H[order][:, order].clone()
    H.diagonal().masked_fill_(H.diagonal() == 0, 1.0)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for j in range(len(w)):
        error = (w[j] - step * torch.round(w[j] / step)) / U[j, j]
        w[j:] -= error * U[j, j:]
    out = torch.empty_like(w)
    out[order] = w
    return out


@right("fake_quant")
def straight_through_function(w, step, bits):
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            top = 2 ** (bits - 1) - 1
            code = torch.round(w / step)
            ctx.save_for_backward(code.abs() <= top)
            return code.clamp(-top, top) * step

        @staticmethod
        def backward(ctx, grad):
            (inside,) = ctx.saved_tensors
            return grad * inside

    return Round.apply(w)


@right("fake_quant")
def straight_through_mask(w, step, bits):
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        code = (w / step).round()
        inside = ((code >= -top) & (code <= top)).to(w.dtype)
        value = code.clamp(-top, top) * step
    return value + inside * (w - w.detach())


@right("int8_product")
def product_numpy(X, W):
    def codes(M):
        M = M.numpy()
        step = np.abs(M).max(1, keepdims=True) / np.float32(127)
        step[step == 0] = 1
        return np.rint(M / step).astype(np.int64), step

    (x, sx), (w, sw) = codes(X), codes(W)
    return torch.from_numpy((x @ w.T).astype(np.float32) * sx * sw.T)


@right("int8_product")
def product_in_double(X, W):
    step = lambda M: M.abs().max(1).values.div(127).masked_fill(M.abs().max(1).values == 0, 1.0)[:, None]
    x, w = (X / step(X)).round().double(), (W / step(W)).round().double()
    return (torch.einsum("ti,oi->to", x, w) * step(X) * step(W).T).float()


@right("smooth")
def smooth_in_logarithms(norm, weights, largest, alpha):
    columns = torch.stack([W.abs().max(0).values for W in weights]).max(0).values
    s = torch.exp(alpha * largest.log() - (1 - alpha) * columns.log())
    return norm.div(s), [W @ torch.diag(s) for W in weights]


@right("smooth")
def smooth_by_loop(norm, weights, largest, alpha):
    new, out = norm.clone(), [W.clone() for W in weights]
    for j in range(len(norm)):
        s = largest[j] ** alpha / max(W[:, j].abs().max() for W in weights) ** (1 - alpha)
        new[j] /= s
        for W in out:
            W[:, j] *= s
    return new, out


right("codes_used")((1, 9, 255))
right("codes_used")([2 * round(k) + 1 for k in (2.5 / 20, 0.5 / (math.sqrt(2540 * 0.1) / 127), 127)])


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    expected = {id: 2 for id in (e.id for e in checking.load_sheet("quantization").values())}
    assert Counter(id for id, _ in RIGHT) == expected


@pytest.mark.parametrize("id, code", broken_code("quantization"), ids=[id for id, _ in broken_code("quantization")])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_half_of_the_sheet_begins_with_broken_code():
    assert len(broken_code("quantization")) >= len(checking.load_sheet("quantization")) / 2

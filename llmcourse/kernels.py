"""Triton kernels that multiply by packed weights without ever writing the unpacked matrix to memory.

Hand-written. `PackedLinear` and `PackedHead` use them on a GPU where Triton is installed (extra `triton`) and `fits`
says yes; everywhere else the weights are unpacked by PyTorch, as `packed_reference` does it. There are two, because the
work is of two kinds: with a few rows of x (decoding) all that matters is that many programs read codes at the same
time; with more, each code must serve all rows while it is there. On a machine without a GPU the same kernels run in
Triton's interpreter (`TRITON_INTERPRET=1`), slowly and to the same numbers: that is how the tests see them.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.quantization import unpack
from llmcourse.settings import one_of, require

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = [
    "FEW_ROWS", "INTERPRETED", "MOST_ROWS", "few_rows", "fits", "packed_reference", "plan", "product",
    "w4a16", "w4a16_reference",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""whether kernels run in Triton's interpreter, on tensors of the CPU"""
MOST_ROWS = 64
"""rows of x in one block: up to there each weight is unpacked once"""
FEW_ROWS = 1
"""rows of x up to which `few_rows` is the faster of the two kernels, as measured on an H200"""


def packed_reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    group_size: int,
    bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b with W unpacked in float32 and rounded to the format of x: what the kernels are tested against.

    Args:
        x: (…, I).
        codes: (O, I · bits / 8) uint8; with 4 bits two codes in a byte, the first in the lower four.
        scale: (O, G) or (1, G) float16, G = I / group_size.
        zero: zero points as packed codes, (O, ⌈G · bits / 8⌉) or one row of them; None: 2^(bits − 1) everywhere.
        bits: 4 or 8.
        bias: (O,).
    Returns:
        (…, O), in the format of x.
    """
    points = 2.0 ** (bits - 1) if zero is None else unpack(zero, bits, scale.shape[1]).float()[..., None]  # (S, G, 1)
    groups = unpack(codes, bits, x.shape[-1]).unflatten(1, (-1, group_size)).float()  # (O, G, group_size)
    W = ((groups - points) * scale.float()[..., None]).flatten(1)  # (O, I)
    return F.linear(x, W.to(x.dtype), bias)


def w4a16_reference(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """`packed_reference` with 4 bits, as `w4a16` has its arguments."""
    return packed_reference(x, codes, scale, zero, group_size=group_size, bias=bias)


def fits(x: Tensor, group_size: int, bias: Tensor | None = None, *, bits: int = 4) -> bool:
    """Whether a kernel can take this x (…, I), and has something to gain from it.

    None has a backward pass, neither for x nor for the bias. With more rows than one block holds, every weight would be
    unpacked again for each block, and unpacking once for a plain product is the better plan.
    """
    if triton is None or not (x.is_cuda or INTERPRETED):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    rows, shapes = x.numel() // max(1, x.shape[-1]), group_size % 32 == 0 and x.shape[-1] % group_size == 0
    oldest = {torch.float16: (7, 0), torch.float32: (7, 0), torch.bfloat16: (8, 0)}.get(x.dtype)
    if oldest is None or not shapes or not 0 < rows <= (MOST_ROWS if bits == 4 else FEW_ROWS):
        return False
    return INTERPRETED or torch.cuda.get_device_capability(x.device) >= oldest


if triton is not None:

    @triton.jit
    def _w4a16(
        x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, M, O, I, scale_row, zero_row,
        GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_M rows of x times BLOCK_O rows of W. BLOCK_I divides GROUP: one scale a row and step."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        j = tl.arange(0, BLOCK_I // 2)  # bytes of this step
        in_m, in_o = m < M, o < O
        x_rows = x_ptr + m[:, None].to(tl.int64) * I
        code_rows = codes_ptr + o[None, :].to(tl.int64) * (I // 2)
        total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
        for start in range(0, I, BLOCK_I):
            g = start // GROUP
            s = tl.load(scale_ptr + o * scale_row + g, mask=in_o, other=0.0).to(tl.float32)  # (BLOCK_O,)
            if SYMMETRIC:
                z = tl.full((BLOCK_O,), 8.0, dtype=tl.float32)
            else:
                pair = tl.load(zero_ptr + o * zero_row + g // 2, mask=in_o, other=0).to(tl.int32)
                z = ((pair >> (4 * (g % 2))) & 15).to(tl.float32)
            # (BLOCK_I / 2, BLOCK_O): a byte holds the weights of an even and of an odd column
            byte = tl.load(code_rows + start // 2 + j[:, None], mask=in_o[None, :], other=0).to(tl.int32)
            even = tl.load(x_rows + start + 2 * j[None, :], mask=in_m[:, None], other=0.0)
            odd = tl.load(x_rows + start + 2 * j[None, :] + 1, mask=in_m[:, None], other=0.0)
            low = (((byte & 15).to(tl.float32) - z[None, :]) * s[None, :]).to(even.dtype)
            high = (((byte >> 4).to(tl.float32) - z[None, :]) * s[None, :]).to(even.dtype)
            total = tl.dot(even, low, total, input_precision="ieee")
            total = tl.dot(odd, high, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        inside = in_m[:, None] & in_o[None, :]
        tl.store(y_ptr + m[:, None].to(tl.int64) * O + o[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _few_rows(
        x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, O, I, scale_row, zero_row,
        BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_O: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    ):  # fmt: skip
        """One program: one row of x times BLOCK_O rows of W, PIECES times PIECE columns a step. PIECE divides GROUP."""
        BYTES: tl.constexpr = PIECE * BITS // 8  # of a piece
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        row, in_o = tl.program_id(0).to(tl.int64), o < O
        p, j = tl.arange(0, PIECES), tl.arange(0, BYTES)
        code_rows = codes_ptr + o.to(tl.int64) * (I * BITS // 8)  # (BLOCK_O,)
        total = tl.zeros((BLOCK_O, PIECES), dtype=tl.float32)
        for start in range(0, I // PIECE, PIECES):
            piece = start + p
            in_i = piece < I // PIECE
            both = in_o[:, None] & in_i[None, :]  # (BLOCK_O, PIECES)
            at = piece[:, None] * BYTES + j[None, :]  # (PIECES, BYTES)
            byte = tl.load(code_rows[:, None, None] + at[None, :, :], mask=both[:, :, None], other=0)
            x_at = x_ptr + row * I + at * (8 // BITS)
            if BITS == 4:
                even = tl.load(x_at, mask=in_i[:, None], other=0.0).to(tl.float32)
                odd = tl.load(x_at + 1, mask=in_i[:, None], other=0.0).to(tl.float32)
                low, high = (byte & 15).to(tl.float32), (byte >> 4).to(tl.float32)
                part = tl.sum(low * even[None, :, :] + high * odd[None, :, :], axis=2)  # (BLOCK_O, PIECES)
                x_sum = tl.sum(even + odd, axis=1)  # (PIECES,)
            else:
                own = tl.load(x_at, mask=in_i[:, None], other=0.0).to(tl.float32)
                part = tl.sum(byte.to(tl.float32) * own[None, :, :], axis=2)
                x_sum = tl.sum(own, axis=1)
            g = piece // (GROUP // PIECE)
            s = tl.load(scale_ptr + o[:, None] * scale_row + g[None, :], mask=both, other=0.0).to(tl.float32)
            if SYMMETRIC:
                part -= x_sum[None, :] * (1 << (BITS - 1))
            else:  # Σ (c − z) x = Σ c x − z Σ x: the zero point meets a group once, not each weight
                in_byte = zero_ptr + o[:, None] * zero_row + (g * BITS // 8)[None, :]
                z = tl.load(in_byte, mask=both, other=0).to(tl.int32)
                if BITS == 4:
                    z = (z >> (4 * (g % 2))[None, :]) & 15
                part -= x_sum[None, :] * z.to(tl.float32)
            total += s * part
        y = tl.sum(total, axis=1)  # (BLOCK_O,)
        if HAS_BIAS:
            y += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * O + o, y.to(y_ptr.dtype.element_ty), mask=in_o)


def _prepared(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[int, int]]:
    """x as rows (M, I), room for y (M, O), and in the order of the kernels' arguments: codes, scales, zero points and
    bias, and how far the next row of scales and of zero points is."""
    require(triton is not None, "triton", "not installed", "the extra: pip install 'llmcourse[triton]'")
    I, in_a_row = x.shape[-1], codes.shape[1] * 8 // one_of("bits", bits, (4, 8))
    require(in_a_row == I, "columns of x", I, f"{in_a_row}, as many as codes in a row")
    whole_groups = group_size % 32 == 0 and I % group_size == 0
    require(whole_groups, "group_size", group_size, f"a multiple of 32 that divides the {I} columns")
    rows = x.reshape(-1, I).contiguous()  # (…, I) -> (M, I)
    y = torch.empty(len(rows), len(codes), dtype=x.dtype, device=x.device)
    # a pointer that is never followed, where there is nothing
    weights = tuple((codes if t is None else t).contiguous() for t in (codes, scale, zero, bias))
    one = scale.shape[0] == 1
    return rows, y, weights, (0 if one else scale.shape[1], 0 if one or zero is None else zero.shape[1])


def w4a16(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """The same as `w4a16_reference`, in one kernel that reads half a byte for each weight.

    Sums are kept in float32. Any number of rows; groups of a multiple of 32 columns.

    Raises:
        BadInput: Triton is not installed, x and the codes differ in columns, or groups that a step of the kernel
            does not divide.
    """
    rows, y, weights, steps = _prepared(x, codes, scale, zero, bias, bits=4, group_size=group_size)
    (M, I), O = rows.shape, y.shape[1]
    if M == 0:
        return y.view(*x.shape[:-1], O)
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(M)))  # tl.dot asks for 16
    # a step's tiles lie in the shared memory of a GPU, where numbers of 32 bits take twice the room
    sizes = (128, 64, 32) if x.element_size() == 2 else (32,)
    block_i = next(size for size in sizes if group_size % size == 0)
    # fewer rows of W in a program where there would be too few programs to keep a GPU busy
    block_o = next(size for size in (64, 32, 16) if size == 16 or 256 * size <= O)
    _w4a16[triton.cdiv(M, block_m), triton.cdiv(O, block_o)](
        rows, *weights, y, M, O, I, *steps,
        GROUP=group_size, SYMMETRIC=zero is None, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_I=block_i,
    )  # fmt: skip
    return y.view(*x.shape[:-1], O)


def few_rows(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    group_size: int,
    bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    """The same as `packed_reference`, for the one row of x that decoding a text has; more rows read all codes each.

    Weights are not rounded to the format of x: products and sums are in float32.
    """  # fmt: skip
    rows, y, weights, steps = _prepared(x, codes, scale, zero, bias, bits=bits, group_size=group_size)
    (M, I), O = rows.shape, y.shape[1]
    if M == 0:
        return y.view(*x.shape[:-1], O)
    block_o, piece_bytes, warps = plan(bits, O)
    piece = next(size for size in (128, 64, 32) if group_size % size == 0)
    pieces = max(1, min(piece_bytes * 8 // bits // piece, triton.next_power_of_2(I // piece)))
    _few_rows[M, triton.cdiv(O, block_o)](
        rows, *weights, y, O, I, *steps,
        BITS=bits, GROUP=group_size, SYMMETRIC=zero is None, HAS_BIAS=bias is not None,
        BLOCK_O=block_o, PIECES=pieces, PIECE=piece, num_warps=warps,
    )  # fmt: skip
    return y.view(*x.shape[:-1], O)


def plan(bits: int, O: int) -> tuple[int, int, int]:
    """Rows of W of a program of `few_rows`, bytes of codes that it reads of each in a step, and its warps.

    The best of those that were tried on an H200 (`sweep` in nbs/_results/gpu.json). They change the speed alone.
    """
    return (8, 512, 1) if bits == 8 else (16 if O >= 8192 else 8, 256, 4)


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    group_size: int,
    bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor | None:
    """y = x Wᵀ + b by the kernel that serves so many rows of x; None where none does (`fits`)."""  # fmt: skip
    if not fits(x, group_size, bias, bits=bits):
        return None
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return few_rows(x, codes, scale, zero, group_size=group_size, bits=bits, bias=bias)
    return w4a16(x, codes, scale, zero, group_size=group_size, bias=bias)

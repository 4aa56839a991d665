"""A Triton kernel that multiplies by packed 4-bit weights without ever writing the unpacked matrix to memory.

Hand-written. `PackedLinear` uses it on a GPU where Triton is installed (extra `triton`) and `fits` says yes; everywhere
else the weights are unpacked by PyTorch, as `w4a16_reference` does it. The name says it: weights of 4 bits, activations
of 16. On a machine without a GPU the same kernel runs in Triton's interpreter (`TRITON_INTERPRET=1`), slowly and to the
same numbers: that is how the tests see it.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.quantization import unpack
from llmcourse.settings import require

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["INTERPRETED", "MOST_ROWS", "fits", "w4a16", "w4a16_reference"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""whether kernels run in Triton's interpreter, on tensors of the CPU"""
MOST_ROWS = 64
"""rows of x in one block: up to there each weight is unpacked once"""


def w4a16_reference(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b with W unpacked in float32 and rounded to the format of x: what the kernel is tested against.

    Args:
        x: (…, I).
        codes: (O, I / 2) uint8, two codes in a byte, the first in the lower four bits.
        scale: (O, G) or (1, G) float16, G = I / group_size.
        zero: zero points as codes of 4 bits, (O, ⌈G / 2⌉) or (1, ⌈G / 2⌉) uint8; None: 8 everywhere.
        bias: (O,).
    Returns:
        (…, O), in the format of x.
    """
    points = 8.0 if zero is None else unpack(zero, 4, scale.shape[1]).float()[..., None]  # (S, G, 1)
    groups = unpack(codes, 4, x.shape[-1]).unflatten(1, (-1, group_size)).float()  # (O, G, group_size)
    W = ((groups - points) * scale.float()[..., None]).flatten(1)  # (O, I)
    return F.linear(x, W.to(x.dtype), bias)


def fits(x: Tensor, group_size: int, bias: Tensor | None = None) -> bool:
    """Whether the kernel can take this x (…, I), and has something to gain from it.

    It has no backward pass, neither for x nor for the bias. With more rows than one block holds, every weight would be
    unpacked again for each block, and unpacking once for a plain product is the better plan.
    """
    if triton is None or not (x.is_cuda or INTERPRETED):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    rows, shapes = x.numel() // max(1, x.shape[-1]), group_size % 32 == 0 and x.shape[-1] % group_size == 0
    oldest = {torch.float16: (7, 0), torch.float32: (7, 0), torch.bfloat16: (8, 0)}.get(x.dtype)
    if oldest is None or not shapes or not 0 < rows <= MOST_ROWS:
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


def w4a16(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """The same as `w4a16_reference`, in one kernel that reads half a byte for each weight.

    Sums are kept in float32. Any number of rows; groups of a multiple of 32 columns.

    Raises:
        BadInput: Triton is not installed, x and the codes differ in columns, or groups that a step of the kernel
            does not divide.
    """
    require(triton is not None, "triton", "not installed", "the extra: pip install 'llmcourse[triton]'")
    I, O = x.shape[-1], codes.shape[0]
    require(2 * codes.shape[1] == I, "columns of x", I, f"{2 * codes.shape[1]}, as many as codes in a row")
    whole_groups = group_size % 32 == 0 and I % group_size == 0
    require(whole_groups, "group_size", group_size, f"a multiple of 32 that divides the {I} columns")
    rows = x.reshape(-1, I).contiguous()  # (…, I) -> (M, I)
    y = torch.empty(len(rows), O, dtype=x.dtype, device=x.device)
    if len(rows) == 0:
        return y.view(*x.shape[:-1], O)
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(len(rows))))  # tl.dot asks for 16
    # a step's tiles lie in the shared memory of a GPU, where numbers of 32 bits take twice the room
    sizes = (128, 64, 32) if x.element_size() == 2 else (32,)
    block_i = next(size for size in sizes if group_size % size == 0)
    one_row = scale.shape[0] == 1
    grid = (triton.cdiv(len(rows), block_m), triton.cdiv(O, 64))
    unused = codes  # a pointer that is never followed
    _w4a16[grid](
        rows, codes.contiguous(), scale.contiguous(), unused if zero is None else zero.contiguous(),
        unused if bias is None else bias.contiguous(), y, len(rows), O, I,
        0 if one_row else scale.shape[1], 0 if one_row or zero is None else zero.shape[1],
        GROUP=group_size, SYMMETRIC=zero is None, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_O=64, BLOCK_I=block_i,
    )  # fmt: skip
    return y.view(*x.shape[:-1], O)

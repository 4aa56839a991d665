"""What we and torchao define in the same way is the same, on the same layer: grids, codes, values, rounded inputs."""

from __future__ import annotations

import pytest
import torch

from llmcourse.activations import quantize_tokens
from llmcourse.compression import QParams
from llmcourse.quantization import choose_qparams

ao = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is not installed")


def layer(seed: int, shift: float = 0.0) -> torch.Tensor:
    return 0.05 * torch.randn(24, 128, generator=torch.Generator().manual_seed(seed)) + shift


def same_codes(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal, but where the exact quotient lies within rounding of the middle between two codes: we divide by the
    step, torchao multiplies by its inverse."""
    other = ours != theirs
    fraction = exact.double() - exact.double().floor()
    assert ((fraction[other] - 0.5).abs() < 1e-4).all()
    assert (ours[other] - theirs[other]).abs().max() <= 1 if other.any() else True
    assert other.float().mean() < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, "channel", "tensor"])
@pytest.mark.parametrize("shift", [0.0, 0.03, 1.0])
def test_affine_grids_codes_and_values(bits, group_size, shift):
    W = layer(bits, shift)
    block = {"channel": (1, 128), "tensor": (24, 128)}.get(group_size, (1, group_size))
    how = {"target_dtype": torch.uint8, "quant_min": 0, "quant_max": 2**bits - 1}
    scale, zero = ao.choose_qparams_affine(W, ao.MappingType.ASYMMETRIC, block, eps=0.0, **how)
    q = choose_qparams(W, bits=bits, group_size=group_size, scale_dtype=torch.float32)
    torch.testing.assert_close(q.scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(q.zero.flatten(), zero.flatten().to(q.zero.dtype))
    # from here on their parameters, so that only the rounding is compared
    theirs = ao.quantize_affine(W, block, scale, zero, torch.uint8, 0, 2**bits - 1)
    mine = QParams(scale.view_as(q.scale), zero.view_as(q.zero).to(q.zero.dtype), bits, q.group_size, False)
    step = torch.repeat_interleave(mine.scale, mine.group_size, 1) if group_size != "tensor" else mine.scale.view(1, 1)
    same_codes(mine.quantize(W).int(), theirs.int(), W / step)
    back = ao.dequantize_affine(theirs, block, scale, zero, torch.uint8, 0, 2**bits - 1)
    torch.testing.assert_close(mine.dequantize(theirs.to(mine.quantize(W).dtype)), back, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 32), (1, 1)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_inputs_with_a_step_per_token(shape, size):
    x = size * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    block = (*[1] * (len(shape) - 1), shape[-1])
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    how = {"quant_min": -127, "quant_max": 127, "eps": 0.0}
    scale, _ = ao.choose_qparams_affine_with_min_max(
        low, high, ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR, block, torch.int8, **how
    )
    codes, step = quantize_tokens(x)
    torch.testing.assert_close(step.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    theirs = ao.quantize_affine(x, block, step, torch.zeros_like(step, dtype=torch.int32), torch.int8, -127, 127)
    same_codes(codes.int(), theirs.int(), x / step)

"""The Triton kernel for 4-bit weights against plain PyTorch: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from llmcourse import kernels
from llmcourse.packed import PackedEmbedding, PackedHead, PackedLinear
from llmcourse.quantization import rtn
from llmcourse.settings import BadInput

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# rows of x; outputs, which no block divides; inputs and the columns that share a scale
ROWS = (1, 3, 17)
SHAPES = ((40, 128, 32), (72, 192, 64), (64, 256, 128), (5, 96, 96))
GRIDS = ("asymmetric", "symmetric", "one scale")


def rounded(O, I, bits, **how):
    """Weights that differ from row to row, on a grid, and the grid."""
    W = torch.randn(O, I, generator=torch.Generator().manual_seed(O + I))
    update = rtn(W * torch.logspace(-1, 0, O)[:, None] + 0.05, bits=bits, **how)
    return update.weight, update.qparams


def layer_of(O, I, group, grid, dtype, bias=False, device="cpu", bits=4):
    """A packed layer."""
    how = dict(group_size="tensor" if grid == "one scale" else group, symmetric=grid == "symmetric")
    b = torch.randn(O, generator=torch.Generator().manual_seed(O)).to(dtype) if bias else None
    return PackedLinear.from_weight(*rounded(O, I, bits, **how), b).to(device).to(dtype)


def inputs(rows, I, dtype, device="cpu"):
    return torch.randn(rows, I, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def compare(rows, O, I, group, grid, dtype, bias=False, device="cpu"):
    """The kernel, its reference and the portable path of the layer, on the same numbers."""
    layer, x = layer_of(O, I, group, grid, dtype, bias, device), inputs(rows, I, dtype, device)
    how = dict(group_size=layer.group_size, bias=layer.bias)
    ours = kernels.w4a16(x, layer.codes, layer.scale, layer.zero, **how)
    theirs = kernels.w4a16_reference(x, layer.codes, layer.scale, layer.zero, **how)
    portable = super(PackedLinear, layer).forward(x)
    assert torch.equal(theirs, portable), "the reference is the portable path"
    # sums of I products, kept in float32, in another order; in 16 bits one rounding at the end on top
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(ours, theirs, **close)
    assert ours.shape == (rows, O) and ours.dtype == dtype and float(theirs.abs().max()) > 0.1
    return layer, x, ours


def compare_few(bits, rows, O, I, group, grid, dtype, bias=False, device="cpu"):
    """The kernel for few rows against the same sums in float64."""
    layer, x = layer_of(O, I, group, grid, dtype, bias, device, bits), inputs(rows, I, dtype, device)
    how = dict(group_size=layer.group_size, bits=bits)
    ours = kernels.few_rows(x, layer.codes, layer.scale, layer.zero, bias=layer.bias, **how)
    b = None if layer.bias is None else layer.bias.double()
    want = kernels.packed_reference(x.double(), layer.codes, layer.scale, layer.zero, bias=b, **how)
    assert ours.shape == (rows, O) and ours.dtype == dtype
    off = float((ours.double() - want).norm() / want.norm())
    assert off < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype], (bits, rows, O, I, grid, off)
    return layer, x, ours


FEW = [(bits, rows, shape, grid) for bits in (4, 8) for rows in (1, 3) for grid in GRIDS
       for shape in (*SHAPES, (7, 576, 64), (9, 576, 576), (3, 2112, 64))]  # fmt: skip


def few_rows_in_the_interpreter() -> None:
    """As `in_the_interpreter`, for the kernel for few rows, which multiplies no matrices."""
    torch.set_num_threads(1)
    assert kernels.INTERPRETED
    for tried, (bits, rows, shape, grid) in enumerate(FEW):
        compare_few(bits, rows, *shape, grid, (torch.float32, torch.float16)[tried % 2], bias=tried % 3 == 0)
    called, kernel = [], kernels.few_rows
    kernels.few_rows = lambda *args, **how: called.append(1) or kernel(*args, **how)
    for bits in (4, 8):  # the layers ask for it, also the output layer of a model with tied tables
        called.clear()
        layer, x, ours = compare_few(bits, 1, 40, 128, 32, "asymmetric", torch.float32)
        with torch.no_grad():
            assert torch.equal(layer(x), ours)
            table = PackedEmbedding.from_weight(*rounded(40, 128, bits, group_size=32))
            x = inputs(1, 128, torch.float32)
            torch.testing.assert_close(PackedHead(table)(x), x @ table.weight.T, rtol=1e-5, atol=1e-5)
            assert len(called) == 3  # by name, by the layer, by the head
            PackedHead(table)(inputs(kernels.MOST_ROWS + 1, 128, torch.float32))
            assert len(called) == 3
    print(len(FEW), "cases")


def in_the_interpreter() -> None:
    """All cases; run in a process of its own, because Triton decides when it is imported."""
    torch.set_num_threads(1)
    assert kernels.INTERPRETED
    tried = 0
    for rows, (O, I, group), grid in itertools.product(ROWS, SHAPES, GRIDS):
        dtype = (torch.float32, torch.float16)[tried % 2]
        compare(rows, O, I, group, grid, dtype, bias=tried % 3 == 0)
        tried += 1
    compare(70, 40, 64, 32, "asymmetric", torch.float32)  # more rows than one block
    for dtype in (torch.float32, torch.float16):  # all three groups in both formats
        for O, I, group in SHAPES[:3]:
            compare(3, O, I, group, "asymmetric", dtype)
    # the layer takes the kernel where it fits, and only there
    layer, x, ours = compare(9, 40, 128, 32, "asymmetric", torch.float32)
    calls, kernel = [], kernels.w4a16
    kernels.w4a16 = lambda *args, **how: calls.append(1) or kernel(*args, **how)
    with torch.no_grad():
        assert torch.equal(layer(x), ours) and torch.equal(layer(x.view(9, 1, 128)), ours.view(9, 1, 40))
        assert len(calls) == 2
        layer(inputs(kernels.MOST_ROWS + 1, 128, torch.float32))  # many rows
        layer_of(40, 120, 24, "asymmetric", torch.float32)(inputs(9, 120, torch.float32))  # groups of 24
        layer(torch.empty(0, 128))
    learning = inputs(9, 128, torch.float32).requires_grad_()
    layer(learning).sum().backward()  # no backward pass in the kernel
    assert len(calls) == 2 and learning.grad is not None
    layer.bias = torch.nn.Parameter(torch.zeros(40))
    layer(x).sum().backward()  # nor for the bias
    assert len(calls) == 2 and torch.equal(layer.bias.grad, torch.full((40,), 9.0))
    for columns in (64, 96, 256):  # of another layer: it would read the wrong codes, or beyond the last one
        odd = inputs(3, columns, torch.float32)
        with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(odd)
        with pytest.raises(BadInput, match=f"columns of x is {columns}; allowed: 128"):
            kernel(odd, layer.codes, layer.scale, layer.zero, group_size=32)
    assert len(calls) == 2
    assert kernel(torch.empty(0, 128), layer.codes, layer.scale, layer.zero, group_size=32).shape == (0, 40)
    print(tried, "cases")


def interpreted(name):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *sys.path)))
    code = f"import test_kernels; test_kernels.{name}()"
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_few_rows_computes_what_its_reference_does():
    assert f"{len(FEW)} cases" in interpreted("few_rows_in_the_interpreter")


@needs_triton
def test_the_kernel_computes_what_its_reference_does():
    if tuple(map(int, kernels.triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 does not multiply matrices with numpy 2.4")
    assert f"{len(ROWS) * len(SHAPES) * len(GRIDS)} cases" in interpreted("in_the_interpreter")


@needs_triton
@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("kind", "symmetric"), [("fp16", False), ("bf16", True)])
def test_it_compiles_for_a_gpu_that_is_not_here(kind, symmetric, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does: that it computes the right numbers is not enough."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = dict(GROUP=64, SYMMETRIC=symmetric, HAS_BIAS=not symmetric, BLOCK_M=16, BLOCK_O=64, BLOCK_I=64)
    pointers = {"x_ptr": kind, "codes_ptr": "u8"}
    compile_for_a_gpu(kernels._w4a16, pointers, fixed, ("M", "O", "I", "scale_row", "zero_row"))


@needs_triton
@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("bits", "O"), itertools.product((4, 8), (64, 8192)))
def test_few_rows_compiles_for_a_gpu_that_is_not_here(bits, O, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block_o, piece_bytes, _ = kernels.plan(bits, O)
    fixed = dict(BITS=bits, GROUP=64, SYMMETRIC=bits == 8, HAS_BIAS=bits == 4, BLOCK_O=block_o)
    fixed |= dict(PIECES=piece_bytes * 8 // bits // 64, PIECE=64)
    pointers = {"x_ptr": "bf16", "codes_ptr": "u8"}
    compile_for_a_gpu(kernels._few_rows, pointers, fixed, ("O", "I", "scale_row", "zero_row"))


def compile_for_a_gpu(kernel, pointers, fixed, numbers):
    """Compile for compute capability 8.0; a kernel that needs more shared memory than every GPU has is a failure."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = pointers["x_ptr"]
    pointers = pointers | {"scale_ptr": "fp16", "zero_ptr": "u8", "bias_ptr": kind, "y_ptr": kind}
    signature = {name: f"*{form}" for name, form in pointers.items()}
    signature |= dict.fromkeys(numbers, "i32") | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    made = kernels.triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert len(made.asm["cubin"]) > 1000 and made.metadata.shared <= 48 * 1024


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_on_a_gpu(dtype):
    for rows, (O, I, group), grid in itertools.product((*ROWS, 70), SHAPES, GRIDS):
        if dtype != torch.bfloat16:
            compare(rows, O, I, group, grid, dtype, bias=rows == 3, device="cuda")
        elif rows == 17:
            layer, x = layer_of(O, I, group, grid, dtype, device="cuda"), inputs(rows, I, dtype, "cuda")
            how = dict(group_size=layer.group_size)
            ours, theirs = (f(x, layer.codes, layer.scale, layer.zero, **how)
                            for f in (kernels.w4a16, kernels.w4a16_reference))  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for tried, (bits, rows, shape, grid) in enumerate(FEW):
        compare_few(bits, rows, *shape, grid, dtype, bias=tried % 3 == 0, device="cuda")
    layer, x, ours = compare(9, 40, 128, 32, "asymmetric", torch.float32, device="cuda")
    with torch.no_grad():
        assert kernels.fits(x, 32) and torch.equal(layer(x), ours)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_is_the_portable_path_everywhere(grid, dtype):
    for rows, (O, I, group) in itertools.product(ROWS, SHAPES):
        layer, x = layer_of(O, I, group, grid, dtype, bias=True), inputs(rows, I, dtype)
        found = kernels.w4a16_reference(x, layer.codes, layer.scale, layer.zero,
                                        group_size=layer.group_size, bias=layer.bias)  # fmt: skip
        assert torch.equal(found, layer(x))


def test_on_a_processor_nothing_changes():
    layer, x = layer_of(40, 128, 32, "asymmetric", torch.float32), inputs(3, 128, torch.float32)
    assert not kernels.fits(x, 32)
    assert torch.equal(layer(x), super(PackedLinear, layer).forward(x))


def test_what_the_kernel_cannot_do_is_one_sentence(monkeypatch):
    layer, x = layer_of(40, 120, 24, "asymmetric", torch.float32), inputs(3, 120, torch.float32)
    with pytest.raises(BadInput) as caught:
        kernels.w4a16(x, layer.codes, layer.scale, layer.zero, group_size=24)
    words = "group_size is 24; allowed: a multiple of 32" if kernels.triton else "triton is 'not installed'; allowed: "
    assert words in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(BadInput, match="triton is 'not installed'; allowed: the extra"):
        kernels.w4a16(x, layer.codes, layer.scale, layer.zero, group_size=24)

"""How a training run meets the machine: processes, number format, compiler, recomputation. Plumbing of the trainer.

Hand-written: nothing here is about learning. The chapter `nbs/07_training.ipynb` uses it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput, require

__all__ = ["accelerator", "check_machine", "has_compiler", "is_sharded", "recomputing"]

# Runtime's dtype -> accelerate's word for it
_MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "cl"))


def check_machine(cfg: Any, rt: Runtime) -> None:
    """What can be known of a `TrainConfig` and this machine before anything is done.

    Raises:
        BadInput: a number format or a compiler that this machine does not have.
    """
    name = str(rt.dtype).removeprefix("torch.")
    require(rt.dtype in _MIXED, "dtype of the runtime", name, "float32, bfloat16, or float16 on a GPU")
    on_gpu = rt.dtype != torch.float16 or rt.device.type == "cuda"
    require(
        on_gpu, "dtype of the runtime", name, f"float32 or bfloat16 on {rt.device.type}: float16 training needs a GPU"
    )
    if cfg.compile:
        require(has_compiler(rt.device), "compile", True, "False on this machine: torch.compile finds no compiler")


def accelerator(cfg: Any, rt: Runtime) -> Any:
    """accelerate's view of this process, after comparing it with what the configuration expects."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    # it remembers device and format of an earlier run in the same process; a process group has to stay
    AcceleratorState._reset_state(not torch.distributed.is_initialized())
    found = Accelerator(
        cpu=rt.device.type == "cpu",
        mixed_precision=_MIXED[rt.dtype],
        device_placement=False,
        # an environment variable could set another divisor
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # a loss may leave parts of the model out
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    n, kind = found.num_processes, str(found.distributed_type).rsplit(".", 1)[-1]
    known = kind not in ("DEEPSPEED", "MEGATRON_LM")
    known = known and (kind != "FSDP" or found.state.fsdp_plugin.fsdp_version == 2)
    require(known, "the launcher's strategy", kind, "one process, data parallel, or FSDP with fsdp_version 2")
    if cfg.world_size not in (None, n):
        # `accelerate launch --cpu --num_processes 2` starts one process and says nothing
        by_accelerate = "ACCELERATE_USE_CPU" in os.environ
        hint = " (accelerate launch --cpu starts only one; use torchrun --nproc-per-node)" if by_accelerate else ""
        take = "1 process takes" if n == 1 else f"{n} processes take"
        raise BadInput(f"world_size is {cfg.world_size}, but {take} part{hint}; allowed: {n}, or None.")
    require(cfg.batch_size >= n, "batch_size", cfg.batch_size, f"at least {n}, one sequence for each process")
    return found


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds only a part of each weight."""
    return any(hasattr(p, "device_mesh") for p in module.parameters())


@contextlib.contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Inside the context, each block keeps its input only and computes the rest again in the backward pass."""
    blocks = list(model.compression_blocks()) if on and hasattr(model, "compression_blocks") else []
    own = [vars(block).get("forward") for block in blocks]  # a wrapper that somebody else put there
    # transformers 5.23 renamed gradient_checkpointing_* to activation_checkpointing_*
    names = [n for n in ("activation", "gradient") if hasattr(model, f"{n}_checkpointing_enable")]
    if on and not blocks:
        known = f"False for a {type(model).__name__}, which does not say where its blocks are"
        require(bool(names), "recompute", True, known)
        getattr(model, f"{names[0]}_checkpointing_enable")({"use_reentrant": False})
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            del block.forward  # the class's own is there again
            if forward is not None:
                block.forward = forward
        if on and not blocks:
            getattr(model, f"{names[0]}_checkpointing_disable")()

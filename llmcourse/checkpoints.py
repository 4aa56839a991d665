"""Checkpoints of a training run: what they hold, how they are written, and when one is whole.

Hand-written: plumbing of the trainer in `nbs/07_training.ipynb`, which tells what a checkpoint must be able to do.

A checkpoint is a folder `step-00000500` with

    model.safetensors   weights, each tensor once; shards are joined
    best.safetensors    the best weights so far (only with patience)
    state.pt            the optimizer's moments, and the scaler of float16
    train.json          what happened so far, and the identity of the run
    MANIFEST.json       size and SHA-256 of the other files

It is written under another name and renamed when it is on the disk. It is *whole* if every file of its manifest is
there with its digest. A run goes on from the newest whole one, and says which others it found damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import random
import re
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmcourse.launch import is_sharded
from llmcourse.settings import BadInput
from llmcourse.store import MANIFEST, atomic_folder, manifest_faults, write_manifest

__all__ = [
    "checkpoints",
    "describe",
    "differences",
    "digest",
    "joined_weights",
    "load_checkpoint",
    "load_optimizer",
    "load_weights",
    "newest_checkpoint",
    "own_random_numbers",
    "save_checkpoint",
    "seed_step",
    "set_aside",
    "state_of",
]


# ---------------------------------------------------------------------------------------------- what a run is


def digest(value: Any) -> str:
    """A short number that changes when the content does: of tensors, modules, data sets, and what is made of them."""
    found = hashlib.sha256()
    _update(found, value)
    return found.hexdigest()[:16]


def _update(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        _update(found, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, nn.Module):
        _update(found, dict(joined_weights(value)))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(f"{key!r}:".encode())
            _update(found, value[key])
    elif isinstance(value, (type(None), bool, int, float, str, bytes)):
        found.update(f"{value!r},".encode())
    elif isinstance(getattr(value, "stream", None), Tensor):  # faster whole than cut into examples
        _update(found, [len(value), value.stream])
    elif hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        found.update(f"{len(value)} [".encode())
        for i in range(len(value)):
            _update(found, value[i])
    else:  # its repr may hold an address, which is another one in each process
        found.update(type(value).__qualname__.encode())


def describe(value: Any) -> Any:
    """What tells one loss function (or its options) from another, as plain data.

    A `config` that the object carries; of a `functools.partial` the function and its arguments; of a function its name,
    its text, its defaults and what it closes over; of tensors and modules a digest of their content.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, functools.partial):
        return {"function": describe(value.func), "arguments": describe(list(value.args)), **describe(value.keywords)}
    if getattr(value, "config", None) is not None and not isinstance(value, type):
        config = value.config
        config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
        weights = {"sha256": digest(value)} if isinstance(value, nn.Module) else {}
        return {"name": _name(value), **weights, "config": describe(config)}
    if isinstance(value, types.FunctionType):
        more = {"source": _source(value), "defaults": describe([*(value.__defaults__ or ())])}
        more |= {"options": describe(value.__kwdefaults__ or {}), "closes over": _closed_over(value)}
        return {"name": _name(value), **{k: v for k, v in more.items() if v}}
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} {digest(value)}"
    if isinstance(value, nn.Module):
        return {"name": type(value).__qualname__, "sha256": digest(value)}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [describe(v) for v in value]
    return _name(value)


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


def _source(function: types.FunctionType) -> str | None:
    """A digest of the text of somebody's own function, where it can be had; the course's own have their name."""
    if (function.__module__ or "").split(".")[0] == __name__.split(".")[0]:
        return None
    try:
        return digest(inspect.getsource(function))
    except (OSError, TypeError):  # typed in at a prompt
        return None


def _closed_over(function: types.FunctionType) -> dict[str, Any]:
    """Names and descriptions of the variables that a function takes from the functions around it."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            found[name] = "itself" if cell.cell_contents is function else describe(cell.cell_contents)
    return found


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Fields whose values are not the same, with both values."""
    found = []
    for part in new:
        before, now = old.get(part, {}), new[part]
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                found.append(f"{key} {before.get(key)!r} (now {now.get(key)!r})")
    return found


# ---------------------------------------------------------------------------------------------- random numbers


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what dropout and masks draw from, as a function of the step: no generator to save, and processes differ."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4])
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed)


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Afterwards, every generator is where the caller had it: training must not decide what the caller draws next."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# ---------------------------------------------------------------------------------------------- weights and moments


def joined_weights(model: nn.Module, root: nn.Module | None = None) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tensor once (tied ones have one name); shards are joined.

    Args:
        root: the module around the model that was sharded. All processes must call this together.
    """
    for part in (root or model).modules():
        if hasattr(part, "reshard"):
            # FSDP keeps the outermost weights joined after a forward pass, in memory that it may take back
            part.reshard()
    state = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    state |= {k: v for k, v in model.named_buffers() if k in persistent}
    # one tensor at a time: joined, the model may not fit on the device
    whole = lambda v: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().to("cpu").contiguous()
    return {k: whole(v) for k, v in state.items()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights of `joined_weights` into the model, in place; cut into shards where the model is."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in weights.items():
        if hasattr(own[name], "device_mesh"):  # a shard
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(own[name].device), own[name].device_mesh, own[name].placements)
        own[name].copy_(value)


def state_of(accelerator: Any, wrapped: nn.Module, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights, moments and scaler. All processes call this; the first one writes the result."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        moments = get_optimizer_state_dict(wrapped, optimizer.optimizer, options=whole)
    else:
        moments = optimizer.state_dict()
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    return {"model": joined_weights(model, wrapped), "optimizer": moments, "scaler": scaler}


def load_optimizer(accelerator: Any, wrapped: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Moments and scaler of a checkpoint, cut into shards where the weights are."""
    if is_sharded(wrapped):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_optimizer_state_dict(wrapped, optimizer.optimizer, state["optimizer"], options=whole)
    else:
        optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------------------------------------- files


def _folders(out: str | Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first. A copy that somebody made beside it has another name."""
    found = [p for p in Path(out).glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _faults(folder: Path, *, content: bool) -> list[str]:
    """Why a checkpoint is not whole, in words; nothing if it is."""
    faults = manifest_faults(folder, content=content)
    if not faults:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf8"))["files"]
        needed = ("model.safetensors", "state.pt", "train.json")
        faults = [f"has no {name} in its {MANIFEST}" for name in needed if name not in listed]
    return faults


def checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, that have all their files at their full size."""
    return [p for p in _folders(out) if not _faults(p, content=False)]


def newest_checkpoint(out: str | Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint with all its digests, or None if the folder has none at all. Damaged ones are named.

    Raises:
        BadInput: there are checkpoints, but none of them is whole.
    """
    damaged = []
    for folder in reversed(_folders(out)):
        faults = _faults(folder, content=True)
        if not faults:
            for line in damaged:
                say(f"damaged: {line}; going back to {folder.name}")
            return folder
        damaged.append(f"{folder.name} {' and '.join(faults)}")
    if damaged:
        raise BadInput(
            f"out is {str(out)!r}, where no checkpoint is whole: {', '.join(damaged)}; "
            "allowed: a folder with a whole checkpoint, or an empty one to begin anew."
        )
    return None


def set_aside(out: Path, newest: Path) -> None:
    """Give damaged checkpoints that are newer than the one that is used another name, so that theirs is free."""
    for folder in _folders(out):
        if folder.name > newest.name:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file and wait until it is on the disk: a rename must not overtake it when the power fails."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def save_checkpoint(out: Path, step: int, *, keep: int, state: dict[str, Any], best: Any, about: dict) -> Path:
    """Write one checkpoint beside the others, then forget the oldest. A failure leaves those that were there.

    Args:
        state: as `state_of` gives it.
        best: the best weights so far, or None.
        about: what goes into train.json.
    """
    from safetensors.torch import save

    target, rest = out / f"step-{step:08d}", io.BytesIO()
    torch.save({k: v for k, v in state.items() if k != "model"}, rest)
    try:
        with atomic_folder(target) as partial:
            _write(partial / "model.safetensors", save(state["model"]))
            if best is not None:
                _write(partial / "best.safetensors", save(best))
            _write(partial / "state.pt", rest.getbuffer())
            _write(partial / "train.json", json.dumps(about).encode())
            write_manifest(partial, step=step)
    except OSError as e:
        left = checkpoints(out)
        kept = f"the last whole checkpoint is {left[-1]}" if left else "there is no earlier checkpoint"
        text = f"the checkpoint of step {step} could not be written ({e.strerror}); {kept}"
        raise OSError(e.errno, text, str(out)) from e
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
    """Weights, best weights (or None), and the optimizer's and scaler's state of a whole checkpoint."""
    from safetensors.torch import load_file

    best = folder / "best.safetensors"
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return load_file(folder / "model.safetensors"), load_file(best) if best.is_file() else None, state

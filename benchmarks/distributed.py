"""Seconds a step of two processes against one at the same global batch, and of our trainer against a bare DDP loop.

    python benchmarks/distributed.py             # 8 rounds of 6 timed steps: some minutes; needs two free cores
    python benchmarks/distributed.py --quick     # a smoke run: its numbers mean nothing

One model, the same batches, AdamW, clipping to 1, a cosine schedule; float32, one thread a process, gradients summed
by gloo over loopback. One process works alone while the other waits in a barrier; then both, each with half of the
batch: a loop around PyTorch's DistributedDataParallel, once more as null control, and our trainer. A step is timed
from one forward pass to the next. Candidates take turns. Before that the losses of the loop in one process and in two
are compared: the work has to be the same. Efficiency is (seconds of one) / (2 x seconds of two). Results:
benchmarks/results/distributed.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared import machine, save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train import QUICK, SHAPE, Clock, Rows, our_model, ratio

from llmcourse.runtime import Runtime
from llmcourse.training import TrainConfig, train

RESULTS = Path(__file__).resolve().parent / "results" / "distributed.json"
RATE, DECAY = 1e-3, 0.1
ONE, BARE, AGAIN, OURS = "one process, bare loop", "bare DDP", "bare DDP again (control)", "our trainer"


def bare_loop(model: nn.Module, shape: dict, batch: int, steps: int, share: slice) -> list[float]:
    """The losses of the rows in `share` of each batch; `model` may be wrapped for several processes."""
    data, losses = Rows(shape, steps * batch), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        rows = range(step * batch, (step + 1) * batch)[share]
        ids = torch.stack([data[i] for i in rows])  # (share of the batch, context + 1)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def run(name: str, shape: dict, batch: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds between the steps and the losses of one candidate, in this process."""
    rank, n, rt = dist.get_rank(), dist.get_world_size(), Runtime.auto("cpu", "float32")
    model = our_model(shape)
    if name == ONE and rank:
        return [], []
    clock = Clock(model, rt)
    if name == ONE:
        losses = bare_loop(model, shape, batch, steps, slice(None))
    elif name == OURS:
        cfg = TrainConfig(steps=steps, batch_size=batch, seq_len=shape["context"], lr=RATE, weight_decay=DECAY)
        losses = train(model, (Rows(shape, steps * batch), None), cfg, rt=rt).losses
    else:
        part = batch // n
        losses = bare_loop(DistributedDataParallel(model), shape, batch, steps, slice(rank * part, (rank + 1) * part))
    return clock.steps(skip=2), losses


def same_work(shape: dict, batch: int) -> None:
    """One process and several have the same losses with the loop. (Our trainer shuffles; its own tests compare it.)"""
    found = {name: torch.tensor(run(name, shape, batch, 3)[1] or [0.0] * 3) for name in (ONE, BARE)}
    for name, losses in found.items():
        dist.all_reduce(losses)
        found[name] = losses / (1 if name == ONE else dist.get_world_size())
    gap = float((found[ONE] - found[BARE]).abs().max())
    if gap > 1e-4:
        raise SystemExit(f"not the same work: losses of one process and of several differ by {gap:.1e}")


def worker(options: argparse.Namespace) -> None:
    """In each process; the first one writes the file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    n = dist.get_world_size()
    shape, batch, steps, rounds = (QUICK, 4, 5, 2) if options.quick else (SHAPE, 8, 9, options.rounds)
    same_work(shape, batch)
    seconds: dict[str, list[float]] = {name: [] for name in (ONE, BARE, AGAIN, OURS)}
    dice = np.random.default_rng(0)
    for round_ in range(rounds + 1):
        for name in dice.permutation(list(seconds)).tolist():
            dist.barrier()
            found, _ = run(name, shape, batch, steps)
            if round_ and found:  # the first round warms up
                seconds[name].append(float(np.median(found)))
    dist.barrier()
    if dist.get_rank() == 0:
        report_of(seconds, shape, batch, n, options)
    dist.destroy_process_group()


def report_of(seconds: dict, shape: dict, batch: int, n: int, options: argparse.Namespace) -> None:
    parameters = sum(p.numel() for p in our_model(shape).parameters())
    rounds = len(seconds[ONE])
    print(f"{parameters:,} parameters, {batch} × {shape['context']} tokens a step, {n} processes, {rounds} rounds")
    for name, own in seconds.items():
        print(f"{name:<28}{float(np.median(own)) * 1e3:>9.1f} ms a step")
    faster = ratio(seconds[BARE], seconds[ONE])
    pairs = {
        f"efficiency of {n} processes": tuple(x / n for x in faster),
        "our trainer's speed against bare DDP": ratio(seconds[OURS], seconds[BARE]),
        "control: bare DDP again against bare DDP": ratio(seconds[AGAIN], seconds[BARE]),
    }
    for what, (middle, low, high) in pairs.items():
        print(f"{what:<44}{middle:.3f} ({low:.3f} to {high:.3f})")
    report = {"shape": shape, "parameters": parameters, "batch": batch, "processes": n, "rounds": rounds}
    report |= {"quick": options.quick, "torch": torch.__version__, "machine": machine(threads=1)}
    save(report | {"seconds_per_step": seconds, "ratios": pairs}, options.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds")
    parser.add_argument("--rounds", type=int, default=8, help="how often each candidate is timed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if "RANK" in os.environ:
        worker(options)
        return 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    return subprocess.run([*launch, *sys.argv[1:]], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    raise SystemExit(main())

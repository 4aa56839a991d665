"""Attention in time and memory: our tiles and our chunked window against PyTorch's kernel and the naive form.

    python benchmarks/attention.py            lengths 256 to 4096; a few minutes on two cores
    python benchmarks/attention.py --quick    two short lengths, for the test suite: its numbers mean nothing

Causal self-attention, one text, four heads of width 64, the number format of `Runtime.auto` (float32 on a CPU, bfloat16
on a GPU that has it), forward only and forward with backward.

- Time: all four in turn within each round (llmcourse.runtime.compare); a ratio is to PyTorch's kernel at the same
  length, with a 95 % bootstrap interval; below 1 is faster.
- Memory: the peak above the level before the call (llmcourse.runtime.peak_memory). A fresh process measures one
  function at one length, because a process that reuses its memory would seem to need none; the median of three
  processes. On a CPU it is sampled, so it is a lower bound.
- The window is a different function from the other three: it looks at the last 256 tokens only. It is here because its
  cost is the point. At 256 tokens it is the same function.

The result goes to benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from llmcourse.attention import causal_mask, naive_attention, tiled_attention, windowed_attention
from llmcourse.runtime import Runtime, compare, format_bytes, peak_memory, seed_everything

HEADS, WIDTH, WINDOW = 4, 64, 256
FUNCTIONS = {
    "PyTorch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "naive": lambda q, k, v: naive_attention(q, k, v, mask=causal_mask(q.shape[2], device=q.device)),
    "tiled": lambda q, k, v: tiled_attention(q, k, v, causal=True),
    "windowed": lambda q, k, v: windowed_attention(q, k, v, window=WINDOW),
}
PASSES = ("forward", "forward and backward")


def call(name: str, which: str, T: int, rt: Runtime):
    """A function without arguments that runs one pass; its inputs are made now."""
    seed_everything(0)
    q, k, v = (rt.move(torch.randn(1, HEADS, T, WIDTH)).to(rt.dtype) for _ in range(3))
    fn = FUNCTIONS[name]
    if which == "forward":

        def forward():
            with torch.no_grad():
                return fn(q, k, v)

        return forward
    for x in (q, k, v):
        x.requires_grad_()
    return lambda: torch.autograd.grad(fn(q, k, v).sum(), (q, k, v))


def memory_here(name: str, passes: list[str], T: int, device: str) -> list[int]:
    rt = Runtime.auto(device)
    found = []
    for which in passes:
        call(name, which, 8, rt)()  # threads and libraries are loaded; eight tokens leave next to nothing behind
        found.append(peak_memory(call(name, which, T, rt), rt, every=0.0005))
    return found


def memory(name: str, passes: tuple[str, ...], T: int, device: str, processes: int) -> dict[str, list[int]]:
    """Peak bytes of each pass, once per process."""
    # glibc otherwise keeps freed blocks and hands them out again without asking the system
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = []
    for _ in range(processes):
        job = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps([name, passes, T, device])],
            env=env,
            capture_output=True,
            text=True,
        )
        if job.returncode:
            raise SystemExit(job.stderr)
        found.append(json.loads(job.stdout.splitlines()[-1]))
    return dict(zip(passes, map(list, zip(*found))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short lengths, one measurement of memory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory_here(*json.loads(args.child))))
        return
    rt = Runtime.auto(args.device)
    lengths = [32, 64] if args.quick else [256, 512, 1024, 2048, 4096]
    passes = PASSES[1:] if args.quick else PASSES
    sizes = {
        (name, T): memory(name, passes, T, args.device, 1 if args.quick else 3)
        for T in lengths
        for name in FUNCTIONS
        if not args.quick or (name, T) == ("tiled", lengths[0])
    }
    rows = []
    for which in passes:
        print(
            f"\n{which}, {HEADS} heads of width {WIDTH}, {str(rt.dtype).removeprefix('torch.')}, "
            f"{rt.device.type}, {torch.get_num_threads()} thread(s)"
        )
        print(f"{'tokens':>7} {'':<10}{'time':>10}  {'relative to PyTorch (95 % interval)':<38}{'peak memory':>12}")
        for T in lengths:
            repeats = 3 if args.quick else max(7, min(30, 16384 // T))
            times = compare(
                {name: call(name, which, T, rt) for name in FUNCTIONS},
                rt,
                baseline="PyTorch",
                warmup=2,
                repeats=repeats,
            )
            for name, t in times.items():
                size = sizes.get((name, T), {}).get(which, [])
                middle = statistics.median(size) if size else None
                rows.append({
                    "pass": which, "tokens": T, "name": name,
                    "seconds": t.timing.median, "quartiles": t.timing.quartiles, "n": t.timing.n,
                    "ratio": t.ratio, "low": t.low, "high": t.high,
                    "bytes": middle, "bytes_range": [min(size), max(size)] if size else None,
                })  # fmt: skip
                ratio = f"{t.ratio:.2f}  ({t.low:.2f} to {t.high:.2f})"
                print(
                    f"{T:>7} {name:<10}{t.timing.median * 1e3:>7.2f} ms  {ratio:<38}"
                    f"{format_bytes(middle) if size else '–':>12}",
                    flush=True,
                )
    machine = {
        "device": rt.device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "dtype": str(rt.dtype),
    }
    if rt.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(rt.device)
    result = {"question": "tiled and windowed attention against PyTorch's kernel and the naive form",
              "quick": args.quick, "machine": machine,
              "heads": HEADS, "width": WIDTH, "window": WINDOW, "rows": rows}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    temporary.replace(args.out)


if __name__ == "__main__":
    main()

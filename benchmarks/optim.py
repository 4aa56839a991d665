"""Time of one optimizer step: ours against torch.optim (default, foreach, fused) on about ten million parameters.

    python benchmarks/optim.py            30 rounds; about a minute
    python benchmarks/optim.py --quick    a small model and three rounds, for the test suite: its numbers mean nothing

The parameters are those of a GPT (six blocks of width 384, a tied table of 512 tokens, no biases), float32 with
gradients that stay the same. All candidates of one rule are timed in turn within each round
(llmcourse.runtime.compare). A ratio is to torch.optim as it is by default, with a 95 % bootstrap interval; below 1 is
faster. torch.optim's default is timed twice: the second one is the null control. PyTorch has no Lion; its rows are ours
against the same rule with one plain operation after the other per tensor, as most published versions have it.

The result goes to benchmarks/results/optim.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from shared import RESULTS, machine, save, show_rows
from torch import nn

from llmcourse import optim
from llmcourse.model import GPT, GPTConfig
from llmcourse.runtime import Runtime, compare, seed_everything

WHY_FUSED = (
    "torch's fused kernels read parameter, gradient and memory once, do all arithmetic in registers, and write once: "
    "for AdamW seven transfers of a number per parameter. Ours are seven calls of ready-made operations. Pieces that "
    "fit the cache keep most of their traffic away from main memory, but each call still loads from and stores to the "
    "cache, and computes less per load. Closing the rest takes a kernel of one's own (C++ or Triton)."
)


class PlainLion(torch.optim.Optimizer):
    """Lion with one operation after the other on whole tensors."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                mean = state["exp_avg"]
                p.mul_(1 - lr * decay)
                p.add_((mean * beta1 + p.grad * (1 - beta1)).sign_(), alpha=-lr)
                mean.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def parameters(quick: bool, device: torch.device, matrices_only: bool = False) -> list[nn.Parameter]:
    """Parameters with gradients, the same in every run."""
    seed_everything(0)
    width = 32 if quick else 384
    model = GPT(GPTConfig(vocab_size=512, d_model=width, n_layers=6, n_heads=4, norm="layer", ffn="gelu")).to(device)
    chosen = [p for p in (model.blocks if matrices_only else model).parameters() if p.ndim == 2 or not matrices_only]
    for p in chosen:
        p.grad = torch.randn_like(p) * 1e-3
    return chosen


# rule -> candidate -> function of the parameters; the first candidate is the one that ratios are taken to
def candidates(rule: str) -> dict:
    if rule == "Lion":
        options = {"lr": 1e-5, "weight_decay": 0.1}
        return {
            "plain operations": lambda ps: PlainLion(ps, **options),
            "plain operations again": lambda ps: PlainLion(ps, **options),
            "llmcourse": lambda ps: optim.Lion(ps, **options),
        }
    options = {"AdamW": {"lr": 1e-5, "weight_decay": 0.1}, "SGD": {"lr": 1e-5, "momentum": 0.9}, "Muon": {"lr": 1e-5}}[
        rule
    ]
    theirs, ours = getattr(torch.optim, rule), getattr(optim, rule)
    found = {"torch default": lambda ps: theirs(ps, **options), "torch default again": lambda ps: theirs(ps, **options)}
    if rule != "Muon":  # torch has neither for Muon
        found |= {
            "torch foreach": lambda ps: theirs(ps, foreach=True, **options),
            "torch fused": lambda ps: theirs(ps, fused=True, **options),
        }
    return found | {"llmcourse": lambda ps: ours(ps, **options)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and three rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "optim.json")
    args = parser.parse_args()
    rt = Runtime.auto(args.device)
    rules = ["AdamW", "SGD", "Lion", *(["Muon"] if hasattr(torch.optim, "Muon") else [])]
    about = machine(device=rt.device.type, threads=torch.get_num_threads(), torch=torch.__version__)
    if rt.device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(rt.device)
    report = {
        "question": "time of one optimizer step against torch.optim",
        "quick": args.quick,
        "machine": about,
        "dtype": "float32",
        "distance to fused": WHY_FUSED,
        "rules": {},
    }
    for rule in rules:
        # one set of parameters for all: where in memory a set lies is worth a few percent
        ps = parameters(args.quick, rt.device, matrices_only=rule == "Muon")
        steps = {name: make(ps).step for name, make in candidates(rule).items()}
        size = sum(p.numel() for p in ps)
        rounds = 3 if args.quick else args.rounds if rule != "Muon" else max(3, args.rounds * 2 // 3)
        results = compare(steps, rt, baseline=next(iter(steps)), warmup=2, repeats=rounds)
        print(
            f"\n{rule}, {size / 1e6:.2f} million parameters in {len(ps)} tensors, {rt.device.type}, "
            f"{torch.get_num_threads()} thread(s), {rounds} rounds"
        )
        rows = show_rows(results)
        report["rules"][rule] = {"parameters": size, "tensors": len(ps), "rows": rows}
        fused = rows.get("torch fused")
        if fused:
            report["rules"][rule]["ours over fused"] = rows["llmcourse"]["ms"] / fused["ms"]
            print(f"   ours takes {rows['llmcourse']['ms'] / fused['ms']:.2f} × the time of torch's fused kernel")
        save(report, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Seconds a step and peak memory of LoRA: ours, and peft with transformers.Trainer.

    python benchmarks/finetune.py                  # course-3m, 8 rounds of 6 timed steps: under two minutes
    python benchmarks/finetune.py --quick          # a smoke run: its numbers mean nothing

One model, loaded by transformers; adapters of one rank around the same layers, with the same first numbers; AdamW,
clipping to 1, a linear schedule; the same batches of random tokens. Before anything is timed, both adapted models have
to train as many numbers and to compute the same after their B were set alike. A step is timed from one forward pass to
the next, for all in the same way, so that everything in the loop counts and the set-up does not. Candidates take
turns; ours stands there twice, as null control, and our trainer also trains peft's adapter, so that trainer and
adapter can be told apart. Memory is measured in a new process each. Results: benchmarks/results/finetune.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from shared import machine, save
from torch import nn
from train import Clock, Rows, ratio

from llmcourse.data import load_model
from llmcourse.finetuning import add_lora
from llmcourse.runtime import Runtime, format_bytes, peak_memory
from llmcourse.training import TrainConfig, train

RESULTS = Path(__file__).resolve().parent / "results" / "finetune.json"
FULL = {"batch": 8, "context": 128, "steps": 9, "rank": 8}
QUICK = {"batch": 2, "context": 16, "steps": 4, "rank": 2}
ALPHA, RATE = 16.0, 1e-3
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base() -> nn.Module:
    """course-3m as transformers' Llama."""
    model = load_model("course-3m")[0]
    model.config.use_cache = False  # no keys and values for a decoding that does not follow
    return model


def ours(rank: int) -> nn.Module:
    return add_lora(base(), rank=rank, alpha=ALPHA, layers=",".join(f"*.{n}" for n in NAMES), seed=0)


def theirs(rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    how = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(NAMES), lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(base(), how)


def rows(size: dict) -> Rows:
    return Rows({"vocab_size": 4096, "context": size["context"]}, 16 * size["batch"])


def run_ours(model: nn.Module, size: dict, rt: Runtime) -> None:
    how = {"steps": size["steps"], "batch_size": size["batch"], "seq_len": size["context"], "lr": RATE}
    cfg = TrainConfig(**how, weight_decay=0.0, schedule="linear", clip=1.0)
    train(model, (rows(size), None), cfg, rt=rt)


def run_theirs(model: nn.Module, size: dict, rt: Runtime) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    collate = lambda some: {"input_ids": torch.stack(some)[:, :-1], "labels": torch.stack(some)[:, :-1]}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=size["steps"], per_device_train_batch_size=size["batch"],
            learning_rate=RATE, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="linear",
            optim="adamw_torch_fused", save_strategy="no", eval_strategy="no", logging_strategy="no",
            report_to=[], use_cpu=rt.device.type == "cpu", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows(size), data_collator=collate)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()


CANDIDATES: dict[str, tuple[Callable, Callable]] = {
    "ours": (run_ours, ours),
    "ours again (control)": (run_ours, ours),
    "our trainer, peft's adapter": (run_ours, theirs),
    "peft and transformers.Trainer": (run_theirs, theirs),
}


@torch.no_grad()
def assert_same_work(size: dict) -> int:
    """Both train as many numbers and compute the same function; returns how many are trained."""
    a, b = ours(size["rank"]), theirs(size["rank"])
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)
    for model in (a, b):
        dice = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=dice) * 0.05)
    ids = torch.stack([rows(size)[i] for i in range(2)])
    gap = (a(ids).logits - b(ids).logits).abs().max()
    if count(a) != count(b) or gap > 1e-4:
        raise SystemExit(f"not the same work: {count(a)} and {count(b)} trained numbers, logits differ by {gap:.1e}")
    return count(a)


def measure(size: dict, rounds: int, rt: Runtime) -> dict[str, list[float]]:
    """Median seconds a step of each candidate and round, taken in turn."""
    models = {name: rt.move(make(size["rank"])) for name, (_, make) in CANDIDATES.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    dice = np.random.default_rng(0)
    for round_ in range(rounds + 1):
        for name in dice.permutation(list(models)).tolist():
            clock = Clock(models[name], rt)
            CANDIDATES[name][0](models[name], size, rt)
            seconds = float(np.median(clock.steps(skip=2)))
            if round_:  # the first one warms up
                found[name].append(seconds)
    return found


def memory_of(name: str, quick: bool) -> int:
    command = [sys.executable, __file__, "--memory", name, *(["--quick"] if quick else [])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens and two rounds")
    parser.add_argument("--rounds", type=int, default=8, help="how often each candidate is timed")
    parser.add_argument("--memory", choices=CANDIDATES, help="print the peak memory of one candidate and stop")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    rt = Runtime.auto("cpu", "float32")
    size, rounds = (QUICK, 2) if options.quick else (FULL, options.rounds)

    if options.memory:
        run, make = CANDIDATES[options.memory]
        model = rt.move(make(size["rank"]))
        run(rt.move(make(2)), QUICK, rt)  # libraries are loaded
        print(peak_memory(lambda: run(model, size, rt), rt))
        return 0

    trained = assert_same_work(size)
    peers = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    print(rt.describe(), "|", ", ".join(f"{k} {v}" for k, v in peers.items()))
    print(f"{trained:,} numbers are trained, {size['batch']} × {size['context']} tokens a step, {rounds} rounds")
    seconds = measure(size, rounds, rt)
    table = {}
    for name, own in seconds.items():
        speed = ratio(own, seconds["peft and transformers.Trainer"])
        peak = memory_of(name, options.quick)
        table[name] = {"seconds_per_step": own, "relative_to_peft": speed, "peak_bytes": peak}
        print(
            f"{name:<32}{float(np.median(own)) * 1e3:>9.1f} ms a step   {speed[0]:.3f} ({speed[1]:.3f} to "
            f"{speed[2]:.3f}) of peft's speed   {format_bytes(peak)}"
        )
    control = ratio(seconds["ours again (control)"], seconds["ours"])
    print("ours again against ours: {:.3f} ({:.3f} to {:.3f})".format(*control))
    report = {"size": size, "trained": trained, "rounds": rounds, "quick": options.quick, "peers": peers}
    report |= {"machine": machine(threads=torch.get_num_threads()), "candidates": table, "null_control": control}
    save(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

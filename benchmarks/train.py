"""Tokens per second and peak memory of our trainer, a bare loop, and transformers.Trainer.

    python benchmarks/train.py                    # float32 and bfloat16, eager; 8 rounds of 6 timed steps
    python benchmarks/train.py --compiled         # also with torch.compile (some minutes more)
    python benchmarks/train.py --nanogpt nanoGPT   # also its model, from a checkout of karpathy/nanoGPT
    python benchmarks/train.py --quick            # a smoke run: its numbers mean nothing

One shape of model, the same batches of 8 × 256 tokens, AdamW, clipping to 1, a cosine schedule. Our `GPT` and
transformers' Llama compute the same function; each trainer is measured with the model that its users have, and ours
with both, so that model and trainer can be told apart. "GPT-2's parts" is our `GPT` as nanoGPT builds its model:
layer norm, GELU, a table of positions, as many parameters to 2 %; what it gains is the price of Llama's parts. A step
is timed from one forward pass to the next, for all in the same way, so set-up does not count and everything in the
loop does. Candidates take turns; one of them stands there twice as null control.
Memory is measured in a new process each. Results: benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llmcourse.launch import has_compiler
from llmcourse.model import GPT, GPTConfig
from llmcourse.runtime import Runtime, format_bytes, peak_memory
from llmcourse.settings import load_settings
from llmcourse.training import TrainConfig, train

RESULTS = Path(__file__).resolve().parent / "results" / "train.json"
SHAPE = {"vocab_size": 2048, "d_model": 192, "n_layers": 6, "n_heads": 6, "context": 256}
QUICK = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 2, "context": 32}
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}


class Rows(torch.utils.data.Dataset):
    """Random tokens: the work does not depend on which they are."""

    def __init__(self, shape: dict, n: int):
        self.rows = torch.randint(
            shape["vocab_size"], (n, shape["context"] + 1), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.rows[i]


def our_model(shape: dict) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape))


def gpt2_model(shape: dict) -> GPT:
    """Our `GPT` from the parts that nanoGPT's model has."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape, norm="layer", ffn="gelu", position="learned"))


def nanogpt_model(shape: dict):
    """nanoGPT's own model, from the checkout that `--nanogpt` names; its losses come out of its forward pass."""
    from model import GPT as Theirs
    from model import GPTConfig as TheirConfig

    torch.manual_seed(0)
    sizes = {"n_layer": shape["n_layers"], "n_head": shape["n_heads"], "n_embd": shape["d_model"]}
    with contextlib.redirect_stdout(io.StringIO()):
        return Theirs(
            TheirConfig(block_size=shape["context"], vocab_size=shape["vocab_size"], bias=False, dropout=0.0, **sizes)
        )


def their_model(shape: dict):
    """The same function as transformers' Llama, with the same initial weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        our_model(shape).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False  # no keys and values for a decoding that does not follow
    return model


class Clock:
    """The moments at which a model's forward pass began."""

    def __init__(self, model: torch.nn.Module, rt: Runtime):
        self.times: list[float] = []

        def now(*_) -> None:
            if not torch.compiler.is_compiling():
                rt.synchronize()  # otherwise a loop that does not wait for the device would look fast
                self.times.append(time.perf_counter())

        self.handle = model.register_forward_pre_hook(torch.compiler.disable(now))

    def steps(self, skip: int) -> list[float]:
        self.handle.remove()
        return np.diff(self.times).tolist()[skip:]


def run_ours(model, shape: dict, batch: int, steps: int, precision: str, compiled: bool, rt: Runtime) -> None:
    cfg = TrainConfig(steps=steps, batch_size=batch, seq_len=shape["context"], lr=1e-3, compile=compiled)
    rt = dataclasses.replace(rt, dtype=getattr(torch, precision))
    train(model, (Rows(shape, 64 * batch), None), cfg, rt=rt)


def run_bare(model, shape: dict, batch: int, steps: int, precision: str, compiled: bool, rt: Runtime) -> None:
    data, called = Rows(shape, 64 * batch), torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    model.train()
    losses = []
    for step in range(steps):
        ids = rt.move(torch.stack([data[i] for i in order[step * batch % len(data) :][:batch].tolist()]))
        with torch.autocast(rt.device.type, dtype=AUTOCAST[precision], enabled=precision != "float32"):
            if isinstance(model, GPT):
                logits = called(ids[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            else:  # nanoGPT
                loss = called(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())


def run_theirs(model, shape: dict, batch: int, steps: int, precision: str, compiled: bool, rt: Runtime) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            bf16=precision == "bfloat16",
            torch_compile=compiled,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=rt.device.type == "cpu",
            disable_tqdm=True,
            seed=0,
        )
        collate = lambda rows: {"input_ids": torch.stack(rows)[:, :-1], "labels": torch.stack(rows)[:, :-1]}
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(shape, 64 * batch), data_collator=collate)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()


CANDIDATES = {
    "bare loop, our GPT": (run_bare, our_model),
    "our trainer, our GPT": (run_ours, our_model),
    "our trainer again (control)": (run_ours, our_model),
    "transformers.Trainer, Llama": (run_theirs, their_model),
    "our trainer, Llama": (run_ours, their_model),
    "bare loop, GPT-2's parts": (run_bare, gpt2_model),
    "bare loop, nanoGPT": (run_bare, nanogpt_model),
}
NANOGPT = "bare loop, nanoGPT"


def measure(
    names: list[str], shape: dict, batch: int, rounds: int, steps: int, precision: str, compiled: bool, rt: Runtime
) -> dict:
    """Median seconds per step of each candidate and round, taken in turn."""
    models = {name: rt.move(CANDIDATES[name][1](shape)) for name in names}
    per_round: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for round_ in range(rounds + 1):
        for i in rng.permutation(len(names)):
            name = names[i]
            clock = Clock(models[name], rt)
            CANDIDATES[name][0](models[name], shape, batch, steps, precision, compiled, rt)
            found = clock.steps(skip=2)
            if round_:  # the first one warms up
                per_round[name].append(float(np.median(found)))
    return per_round


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Tokens per second of a relative to b: ratio of medians with a 95 % bootstrap interval over rounds."""
    a, b = np.array(a), np.array(b)
    draws = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    low, high = np.quantile(np.median(b[draws], 1) / np.median(a[draws], 1), [0.025, 0.975])
    return float(np.median(b) / np.median(a)), float(low), float(high)


def memory_of(name: str, precision: str, quick: bool, nanogpt: Path | None) -> int:
    command = [sys.executable, __file__, "--memory", name, "--precision", precision, *(["--quick"] if quick else [])]
    command += ["--nanogpt", str(nanogpt)] if nanogpt else []
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds")
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT: its model is timed as well")
    parser.add_argument("--rounds", type=int, default=8, help="how often each candidate is timed")
    parser.add_argument("--memory", choices=CANDIDATES, help="print the peak memory of one candidate and stop")
    parser.add_argument("--precision", choices=AUTOCAST, default="float32", help="for --memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if options.nanogpt:
        sys.path.insert(0, str(options.nanogpt))
    settings = load_settings()
    rt = Runtime.auto(settings.device, "float32")
    shape, batch, steps, rounds = (QUICK, 2, 5, 2) if options.quick else (SHAPE, 8, 9, options.rounds)

    if options.memory:
        run, make = CANDIDATES[options.memory]
        model = rt.move(make(shape))
        run(rt.move(make(QUICK)), QUICK, 2, 2, options.precision, False, rt)  # libraries are loaded
        print(peak_memory(lambda: run(model, shape, batch, 3, options.precision, False, rt), rt))
        return 0

    names = [name for name in CANDIDATES if options.nanogpt or name != NANOGPT]
    report = {
        "shape": shape,
        "parameters": sum(p.numel() for p in our_model(shape).parameters()),
        "batch": batch,
        "tokens_per_step": batch * shape["context"],
        "rounds": rounds,
        "steps_per_round": steps - 3,
        "quick": options.quick,
        "runtime": rt.describe(),
        "transformers": __import__("transformers").__version__,
        "accelerate": __import__("accelerate").__version__,
        "python": platform.python_version(),
        "runs": [],
    }
    print(
        rt.describe(),
        f"| {report['parameters']:,} parameters, {batch} × {shape['context']} tokens a step, "
        f"{rounds} rounds of {steps - 3} timed steps",
    )
    kinds = [(precision, False) for precision in AUTOCAST]
    if options.compiled:
        if has_compiler(rt.device):
            kinds += [(precision, True) for precision in AUTOCAST]
        else:
            print("torch.compile finds no compiler on this machine: eager only")
    for precision, compiled in kinds:
        seconds = measure(names, shape, batch, rounds, steps, precision, compiled, rt)
        rows = {}
        for name in names:
            base = ratio(seconds[name], seconds["bare loop, our GPT"])
            rows[name] = {
                "tokens_per_second": report["tokens_per_step"] / float(np.median(seconds[name])),
                "relative_to_bare": base,
                "seconds_per_step": seconds[name],
            }
            if not compiled:
                rows[name]["peak_bytes"] = memory_of(name, precision, options.quick, options.nanogpt)
            print(
                f"{precision:<9}{'compiled' if compiled else 'eager':<9}{name:<30}"
                f"{rows[name]['tokens_per_second']:>9,.0f} tok/s   "
                f"{base[0]:.3f} ({base[1]:.3f} to {base[2]:.3f}) of the bare loop"
                + (f"   {format_bytes(rows[name]['peak_bytes'])}" if not compiled else "")
            )
        pairs = {
            "null_control": ("our trainer again (control)", "our trainer, our GPT"),
            "ours_against_trainer": ("our trainer, our GPT", "transformers.Trainer, Llama"),
            "ours_against_trainer_same_model": ("our trainer, Llama", "transformers.Trainer, Llama"),
            "llama_parts_against_gpt2_parts": ("bare loop, our GPT", "bare loop, GPT-2's parts"),
        }
        if options.nanogpt:
            pairs["ours_against_nanogpt"] = ("bare loop, our GPT", NANOGPT)
            pairs["gpt2_parts_against_nanogpt"] = ("bare loop, GPT-2's parts", NANOGPT)
        for a, b in pairs.values():
            print(f"{'':<18}{a} against {b}: {'{:.3f} ({:.3f} to {:.3f})'.format(*ratio(seconds[a], seconds[b]))}")
        report["runs"].append(
            {
                "precision": precision,
                "compiled": compiled,
                "candidates": rows,
                **{what: ratio(seconds[a], seconds[b]) for what, (a, b) in pairs.items()},
            }
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

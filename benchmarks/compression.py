"""Time, memory and resulting perplexity of our compression methods, and of the libraries' on the same model and text.

    python benchmarks/compression.py                        # the real model, 16 × 512 calibration tokens: 20 minutes
    python benchmarks/compression.py --peer PYTHON          # also llm-compressor and torchao, which PYTHON can import
    python benchmarks/compression.py --model course-3m      # the house model: two minutes
    python benchmarks/compression.py --quick                # a smoke run: its numbers mean nothing

Every candidate has a process of its own, which loads the model, compresses it on the same calibration sequences (timed;
imports, loading and evaluation are not), and scores the same text. Perplexity is compared with ours token by token, so
the intervals of the ratios are paired; the time of a candidate is the median of its runs, and runs take turns. RTN and
GPTQ have the same bits and groups everywhere (GPTQ with activation order), pruned models lose half of each matrix.

llm-compressor pins an older transformers, so the libraries want an environment of their own (`pip install
llmcompressor torchao`); our package is taken from this checkout there, for loading and scoring. What a library cannot
do on this machine is written down with the sentence that it gave. gptqmodel is no candidate: it asks for a newer
PyTorch than this course pins.

Results: benchmarks/results/compression.json, one entry for each model.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the peer's environment does not have our package

from shared import RESULTS, machine, save  # noqa: E402

BITS, SPARSITY = 4, 0.5
METHODS = ("RTN", "GPTQ", "AWQ", "SmoothQuant", "Wanda", "SparseGPT")
# (model, data, calibration sequences, settings) -> a function that is timed and returns the compressed model
Prepare = Callable[[torch.nn.Module, Any, torch.Tensor, dict], Callable[[], torch.nn.Module]]


def ours(name: str) -> Prepare:
    def prepare(model, data, calib, how):
        from llmcourse.activations import AWQ, SmoothQuant
        from llmcourse.compression import compress
        from llmcourse.pruning import SparseGPT, Wanda
        from llmcourse.quantization import GPTQ, RTN
        from llmcourse.runtime import Runtime

        grid = {"bits": BITS, "group_size": how["group"]}
        text = {"n_calib": how["n"], "seq_len": how["length"], "seed": how["seed"]}
        methods = {
            "RTN": lambda: RTN(**grid),
            "GPTQ": lambda: GPTQ(**grid, **text, act_order=True),
            "AWQ": lambda: AWQ(**grid, **text),
            "SmoothQuant": lambda: SmoothQuant(**text),
            "Wanda": lambda: Wanda(sparsity=SPARSITY, **text),
            "SparseGPT": lambda: SparseGPT(sparsity=SPARSITY, **text),
        }
        rt = Runtime.auto("cpu", "float32")
        return lambda: compress(model, [methods[name]()], data, rt)[0]

    return prepare


def llm_compressor(name: str) -> Prepare:
    def prepare(model, data, calib, how):
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        weights = QuantizationArgs(num_bits=BITS, strategy="group", group_size=how["group"], symmetric=False)
        per_row = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
        per_token = QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True)
        head = {"ignore": ["lm_head"]}
        w4 = {"config_groups": {"w4": QuantizationScheme(targets=["Linear"], weights=weights)}, **head}
        both = QuantizationScheme(targets=["Linear"], weights=per_row, input_activations=per_token)
        pruned = {"sparsity": SPARSITY, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
        recipes = {
            "RTN": lambda: [QuantizationModifier(**w4)],
            "GPTQ": lambda: [GPTQModifier(**w4, actorder="static", dampening_frac=0.01)],
            "AWQ": lambda: [AWQModifier(), QuantizationModifier(**w4)],
            "SmoothQuant": lambda: [
                SmoothQuantModifier(smoothing_strength=0.5),
                QuantizationModifier(config_groups={"w8a8": both}, **head),
            ],
            "Wanda": lambda: [WandaPruningModifier(**pruned)],
            "SparseGPT": lambda: [SparseGPTModifier(**pruned)],
        }
        rows = {"input_ids": calib.tolist(), "attention_mask": torch.ones_like(calib).tolist()}
        size = {"max_seq_length": how["length"], "num_calibration_samples": how["n"]}
        size |= {"shuffle_calibration_samples": False, "tokenizer": how["tokenizer"]}
        return lambda: oneshot(model=model, dataset=Dataset.from_dict(rows), recipe=recipes[name](), **size)

    return prepare


def torch_ao(name: str) -> Prepare:
    def prepare(model, data, calib, how):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        config = {
            "RTN": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(how["group"])),
            "SmoothQuant": Int8DynamicActivationInt8WeightConfig,
        }[name]()
        linear = lambda module, path: isinstance(module, torch.nn.Linear) and "lm_head" not in path

        def work():
            quantize_(model, config, filter_fn=linear)
            return model

        return work

    return prepare


CANDIDATES: dict[str, tuple[str, Prepare]] = {f"llmcourse: {m}": ("llmcourse", ours(m)) for m in METHODS}
CANDIDATES |= {
    "torchao: RTN, symmetric": ("torchao", torch_ao("RTN")),
    "torchao: W8A8 per token, no scale": ("torchao", torch_ao("SmoothQuant")),
}
CANDIDATES |= {f"llm-compressor: {m}": ("llmcompressor", llm_compressor(m)) for m in METHODS}
PARTNERS = {
    "torchao: RTN, symmetric": "llmcourse: RTN",
    "torchao: W8A8 per token, no scale": "llmcourse: SmoothQuant",
} | {f"llm-compressor: {m}": f"llmcourse: {m}" for m in METHODS}


def one(name: str, how: dict, out: Path) -> None:
    """Compress and score in this process. The result goes to `out`: losses of the tokens, seconds, bytes."""
    from llmcourse.data import load_model, token_data
    from llmcourse.evaluation import perplexity
    from llmcourse.runtime import Runtime, peak_memory

    rt = Runtime.auto("cpu", "float32")
    model, tokenizer, _ = load_model(how["model"], rt=rt)
    wanted = {"test": how["tokens"], "calib": max(40_000, how["n"] * how["length"] * 2)}
    data = token_data(tokenizer, "wikipedia", limits=wanted)
    calib = data.calib_batch(how["n"], how["length"], how["seed"])
    state: dict[str, Any] = {"model": model}
    seconds = peak = 0.0
    if name != "dense":
        warm = torch.randn(64, 64)
        torch.linalg.cholesky(warm @ warm.T + 64 * torch.eye(64))  # libraries are loaded

        compress = CANDIDATES[name][1](model, data, calib, how | {"tokenizer": tokenizer})

        def work() -> None:
            began = time.perf_counter()
            state["model"] = compress()
            state["seconds"] = time.perf_counter() - began

        peak, seconds = peak_memory(work, rt), state["seconds"]
    found = perplexity(state["model"], data, context=how["context"], stride=how["stride"], rt=rt, model=name)
    np.savez(out, nll=found.nll.numpy(), seconds=seconds, peak=peak, perplexity=found.value)


def run(name: str, how: dict, peer: str | None, folder: Path) -> dict:
    """A candidate in a new process, or the last line of what went wrong there."""
    library = CANDIDATES[name][0] if name != "dense" else "llmcourse"
    python = sys.executable if library == "llmcourse" else peer
    out = folder / "one.npz"
    out.unlink(missing_ok=True)
    command = [python, __file__, "--one", name, "--how", json.dumps(how), "--out", str(out)]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode or not out.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1][:300] if lines else f"exit status {done.returncode}"}
    with np.load(out) as f:
        return {k: f[k].tolist() if f[k].ndim == 0 else f[k] for k in f.files}


def paired(a: np.ndarray, b: np.ndarray, block: int = 256) -> tuple[float, float, float]:
    """Perplexity of a relative to b with a 95 % bootstrap interval over blocks of tokens."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    means = np.array([part.mean() for part in np.array_split(difference, max(2, len(difference) // block))])
    draws = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return tuple(float(x) for x in np.exp([difference.mean(), low, high]))


def installed(python: str) -> dict[str, str]:
    """Versions of what takes part, in the environment of `python`."""
    code = "import importlib.metadata as m; print({d.name: d.version for d in m.distributions()})"
    done = subprocess.run([python, "-c", code], text=True, capture_output=True, check=True)
    found = ast.literal_eval(done.stdout)
    return {name: found[name] for name in ("torch", "transformers", "torchao", "llmcompressor") if name in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peer", help="a Python that imports llmcompressor and torchao")
    parser.add_argument("--rounds", type=int, default=1, help="how often each candidate runs")
    parser.add_argument("--quick", action="store_true", help="the house model, little text, one round")
    parser.add_argument("--methods", help="only candidates whose name contains one of these, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression.json", help="where the JSON goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    if args.one:
        one(args.one, json.loads(args.how), args.out)
        return 0

    house = args.quick or args.model == "course-3m"
    how = {"model": "course-3m" if args.quick else args.model, "seed": 0, "group": 32 if house else 64}
    how |= {"n": 2, "length": 64, "tokens": 300} if args.quick else {"n": 16, "length": 512, "tokens": 4096}
    if house and not args.quick:
        how |= {"length": 256}
    how |= {"context": 64, "stride": 48} if args.quick else {"context": how["length"], "stride": how["length"] * 3 // 4}
    names = [n for n in CANDIDATES if args.peer or CANDIDATES[n][0] == "llmcourse"]
    if args.methods:
        names = [n for n in names if any(part in n for part in args.methods.split(","))]
    print(f"{how['model']}, {how['n']} × {how['length']} calibration tokens, {torch.get_num_threads()} thread(s)")
    runs: dict[str, list[dict]] = {name: [] for name in ["dense", *names]}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(args.rounds):
            for i in np.random.default_rng(k).permutation(len(runs)):
                name = list(runs)[i]
                if k == 0 or (name != "dense" and "failed" not in runs[name][0]):
                    runs[name].append(run(name, how, args.peer, Path(folder)))
    if "failed" in runs["dense"][0]:
        print(f"the dense model cannot be scored: {runs['dense'][0]['failed']}", file=sys.stderr)
        return 1

    rows: dict[str, dict] = {}
    for name in ["dense", *names]:
        first = runs[name][0]
        if "failed" in first:
            rows[name] = first
            print(f"{name:36} {first['failed']}")
            continue
        to_dense = paired(first["nll"], runs["dense"][0]["nll"])
        seconds = [r["seconds"] for r in runs[name]]
        rows[name] = {"perplexity": first["perplexity"], "to_dense": to_dense, "seconds": seconds}
        rows[name]["peak_bytes"] = int(first["peak"])
        ratio = f"{to_dense[0]:.3f} ({to_dense[1]:.3f} to {to_dense[2]:.3f}) of dense"
        line = f"{name:36} {first['perplexity']:8.2f}   {ratio}"
        print(line + ("" if name == "dense" else f"   {np.median(seconds):6.1f} s   {first['peak'] / 1e9:5.2f} GB"))
    print("\nours relative to theirs: time, peak memory, perplexity (95 % interval)")
    pairs = {}
    for theirs, mine in PARTNERS.items():
        if theirs in rows and mine in rows and "failed" not in rows[theirs] | rows[mine]:
            apart = paired(runs[mine][0]["nll"], runs[theirs][0]["nll"])
            time_ratio = float(np.median(rows[mine]["seconds"]) / np.median(rows[theirs]["seconds"]))
            memory = rows[mine]["peak_bytes"] / max(rows[theirs]["peak_bytes"], 1)
            pairs[theirs] = {"time": time_ratio, "memory": memory, "perplexity": apart}
            print(f"{theirs:36} {time_ratio:6.2f}   {memory:5.2f}   {apart[0]:.3f} ({apart[1]:.3f} to {apart[2]:.3f})")

    report = json.loads(args.out.read_text("utf8")) if args.out.exists() else {"models": {}}
    report["question"] = "time, memory and perplexity of compression, ours and the libraries'"
    report["models"][how["model"]] = {
        "quick": args.quick,
        "machine": machine(threads=torch.get_num_threads()) | {"python": platform.python_version()},
        "versions": installed(sys.executable),
        "peer_versions": installed(args.peer) if args.peer else {},
        "how": how,
        "rows": rows,
        "pairs": pairs,
    }
    save(report, args.out)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Tokens per second from a prompt to the end of an answer: our packed and dense models, transformers, llama.cpp.

    python benchmarks/decode.py                                      # the real model, one thread
    python benchmarks/decode.py --peer PYTHON --gguf FILE            # also llama.cpp, through xllamacpp in that Python
    python benchmarks/decode.py --model course-3m --quick            # a smoke run: its numbers mean nothing

Every candidate reads a prompt of 32 tokens and writes 64 more, greedily, alone and for 8 texts at a time, with the same
weights: as they are, or rounded once to 4 bits in groups of 64 with an 8-bit head. They take turns
(`llmcourse.runtime.compare`); transformers float32 stands in the list a second time, as the null control. llama.cpp
runs in a process of its own that is asked in its turn, on its own file: other grids, so its quality is not compared.

Beside the times: the share of the measured bandwidth that reading the weights takes; perplexity of the kernel against
the same codes computed exactly, paired; and how many greedy choices stay. Results: benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, machine, save

from llmcourse.compression import compress
from llmcourse.data import load_model, token_data
from llmcourse.deployment import faster, greedy_agreement, measure_machine, step_cost
from llmcourse.evaluation import compare_perplexity, perplexity
from llmcourse.model import GPT, generate
from llmcourse.packed import dequantize_model, pack_model
from llmcourse.quantization import RTN, EmbeddingRTN
from llmcourse.runtime import Runtime, compare
from llmcourse.settings import load_settings

BASE = "transformers float32"
# what this machine was hoped to reach: candidate -> batch -> at least so many times as fast as BASE
TARGETS = {
    "int4 kernel in transformers": {1: 2.8},
    "int4 kernel, fused, our GPT": {1: 4.0, 8: 2.5},
    "our GPT float32 as (I, O)": {1: 1.25},
}

# with several texts at a time these take minutes, and what they have to say they say alone
ALONE = (
    "transformers bfloat16",
    "our GPT bfloat16",
    "our GPT float32",
    "int4 kernel in transformers",
    "int4 kernel, our GPT",
)

WORKER = """
import json, sys
import xllamacpp
how = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = how["gguf"]
params.n_ctx = how["batch"] * 128
params.n_parallel = how["batch"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = how["threads"]
params.warmup = False
server = xllamacpp.Server(params)
print("ready", flush=True)
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(how["batch"]) as pool:
    for line in sys.stdin:
        ask = lambda ids: server.handle_completions({
            "prompt": ids, "n_predict": how["new"], "temperature": 0.0, "ignore_eos": True, "cache_prompt": False})
        got = list(pool.map(ask, json.loads(line)))
        print("done", sum(g["usage"]["completion_tokens"] for g in got), flush=True)
"""


class LlamaCpp:
    """llama.cpp in a process of its own, which answers when it is asked."""

    def __init__(self, python: str, gguf: str, batch: int, new: int):
        how = {"gguf": gguf, "batch": batch, "new": new, "threads": torch.get_num_threads()}
        self.process = subprocess.Popen(
            [python, "-c", WORKER, json.dumps(how)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.expect("ready")

    def expect(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise RuntimeError(f"llama.cpp ended with status {self.process.wait()}")

    def ask(self, prompts: list[list[int]], new: int) -> None:
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        written = int(self.expect("done").split()[1])
        assert written == len(prompts) * new, f"llama.cpp wrote {written} tokens"


def by_transformers(model: Any, ids: torch.Tensor, new: int) -> list[list[int]]:
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return out[:, ids.shape[1] :].tolist()


def candidates(name: str, rt: Runtime) -> tuple[dict[str, Any], Any, dict[str, str]]:
    """Name -> model, all made of the same weights; the packed model without kernels; and what `faster` said."""
    theirs, _, _ = load_model(name, rt=rt)
    theirs.generation_config.eos_token_id = None
    ours = GPT.from_pretrained(name, rt=rt)
    passes = [RTN(bits=4, group_size=64), EmbeddingRTN()]
    packed, packed_hf = (pack_model(compress(m, passes, None, rt)[0]) for m in (ours, theirs))
    said = {}

    def made(label: str, model: Any, **how: Any) -> Any:
        quick, report = faster(model, rt, **how)
        said[label] = str(report)
        return quick

    models = {
        BASE: theirs,
        f"{BASE}, again": theirs,
        "transformers bfloat16": deepcopy(theirs).bfloat16(),
        "our GPT float32": ours,
        "our GPT float32 as (I, O)": made("our GPT float32 as (I, O)", ours),
        "our GPT bfloat16": deepcopy(ours).bfloat16(),
        "int4 kernel in transformers": made("int4 kernel in transformers", packed_hf, fuse=False),
        "int4 kernel, fused, transformers": made("int4 kernel, fused, transformers", packed_hf),
        "int4 kernel, our GPT": made("int4 kernel, our GPT", packed, fuse=False),
        "int4 kernel, fused, our GPT": made("int4 kernel, fused, our GPT", packed),
    }
    return models, packed, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="by default that of the settings")
    parser.add_argument("--peer", default="", help="a Python that can import xllamacpp")
    parser.add_argument("--gguf", default="", help="the file that llama.cpp reads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="few tokens and rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json", help="where the JSON goes")
    options = parser.parse_args()
    prompt, new, rounds = (32, 4, 2) if options.quick else (32, 64, options.rounds)
    scored = 256 if options.quick else 1024
    torch.set_num_threads(options.threads)

    settings, rt = load_settings(), Runtime.auto("cpu", "float32")
    name = options.model or settings.model
    roof = measure_machine(rt)
    models, packed, said = candidates(name, rt)
    _, tokenizer, card = load_model(name, rt=rt)
    text = token_data(tokenizer, settings.data, limits={"train": 0, "calib": 0, "test": scored}).test
    report: dict[str, Any] = {
        "model": card.name,
        "data": settings.data,
        "prompt": prompt,
        "new": new,
        "rounds": rounds,
        "quick": options.quick,
        "runtime": rt.describe(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bandwidth": roof.bandwidth,
        "peak": roof.peak,
        "machine": machine(),
        "faster": said,
        "batches": {},
    }
    print(rt.describe(), report["instructions"], f"{roof.bandwidth / 1e9:.1f} GB/s, {roof.peak / 1e9:.0f} GFLOP/s")

    for batch in (1, 8):
        ids = text[: batch * prompt].view(batch, prompt)
        runs = {}
        for label, model in models.items():
            if batch > 1 and label in ALONE:
                continue
            if type(model) is GPT:
                runs[label] = lambda m=model, ids=ids: generate(m, ids, max_new_tokens=new, stop=[])
            else:
                runs[label] = lambda m=model, ids=ids: by_transformers(m, ids, new)
        if options.peer and options.gguf:
            peer = LlamaCpp(options.peer, options.gguf, batch, new)
            runs[f"llama.cpp {Path(options.gguf).name}"] = lambda p=peer, ids=ids: p.ask(ids.tolist(), new)
        results = compare(runs, rt, baseline=BASE, warmup=1, repeats=rounds, seed=settings.seed)
        rows = {}
        print(f"\nbatch {batch}\n{'':<40}{'tokens/s':>9}{'speed':>8}   95 % interval   share of the bandwidth")
        for label, c in results.items():
            rows[label] = {
                "tokens_per_s": batch * new / c.timing.median,
                "speed": 1 / c.ratio,
                "low": 1 / c.high,
                "high": 1 / c.low,
                "seconds": list(c.timing.seconds),
            }
            row = rows[label]
            if label in models:
                nbytes = step_cost(models[label]).weight_bytes
                row |= {"weight_bytes": nbytes, "bandwidth_share": nbytes * new / c.timing.median / roof.bandwidth}
            target = None if options.quick or options.model else TARGETS.get(label, {}).get(batch)
            if target:
                row |= {"target": target, "reached": row["speed"] >= target}
            ends = f"{row['low']:.2f} to {row['high']:.2f}"
            share = f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else ""
            verdict = f"   target {target}: {'reached' if row['reached'] else 'not reached'}" if target else ""
            print(f"{label:<40}{row['tokens_per_s']:>9.1f}{row['speed']:>7.2f}×{ends:>16}{share:>12}{verdict}")
        report["batches"][str(batch)] = rows
        save(report, options.out)  # a run that is cut off keeps what it has

    exact = dequantize_model(packed)
    always, _ = faster(packed, rt, kernels="int4", most=10**9)
    how = {"context": 256, "stride": 192, "rt": rt}
    scores = {n: perplexity(m, text, model=n, **how) for n, m in (("exact", exact), ("kernel", always))}
    change = compare_perplexity(scores["exact"], scores["kernel"])
    same = greedy_agreement(exact, always, text[: 4 * prompt].view(4, prompt), new_tokens=new)
    report["quality"] = {
        "exact": scores["exact"].value,
        "kernel": scores["kernel"].value,
        "tokens": scored,
        "ratio": change.value,
        "low": change.low,
        "high": change.high,
        "within_half_a_percent": change.low > 0.995 and change.high < 1.005,
        "greedy": same._asdict(),
    }
    save(report, options.out)
    print(f"\nperplexity, kernel against exact: × {change.value:.4f} ({change.low:.4f} to {change.high:.4f})")
    print(f"{same.same} of {same.tokens} greedy choices the same")
    print(f"written to {options.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

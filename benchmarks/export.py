"""Tokens per second of an exported model: onnxruntime over our packed bytes against transformers in float32.

    python benchmarks/export.py            # prompts of 32 tokens, 64 new ones, batch 1 and 8, one thread
    python benchmarks/export.py --quick    # a smoke run: its numbers mean nothing

Read and written, end to end, greedily; the candidates are timed in turn (`llmcourse.runtime.compare`). transformers a
second time is the null control. The exact level is timed at batch 1 only: it is slow, and that is its result.
Results: benchmarks/results/export.json.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from shared import RESULTS, machine, save, show_rows

from llmcourse.compression import compress
from llmcourse.data import load_model, token_data
from llmcourse.export import OnnxLlama
from llmcourse.packed import dequantize_model, pack_model
from llmcourse.portable import export_student
from llmcourse.quantization import RTN, EmbeddingRTN
from llmcourse.runtime import Runtime, compare
from llmcourse.settings import load_settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens and rounds")
    parser.add_argument("--rounds", type=int, default=7, help="how often each candidate is timed")
    parser.add_argument("--model", help="by default the one of settings.ini")
    parser.add_argument("--out", type=Path, default=RESULTS / "export.json", help="where the JSON goes")
    options = parser.parse_args()
    prompt, new, rounds = (8, 4, 2) if options.quick else (32, 64, options.rounds)
    torch.set_num_threads(1)
    settings = load_settings()
    rt = Runtime.auto("cpu", "float32")
    model, tokenizer, card = load_model(options.model or settings.model, rt=rt)
    passes = [RTN(bits=4, group_size=64, symmetric=True), EmbeddingRTN()]
    student = pack_model(compress(model, passes, None, None)[0])
    dense = dequantize_model(student)  # the same weights in float32: the same tokens are expected
    text = token_data(tokenizer, settings.data, limits={"test": 8 * prompt}).test.view(8, prompt)
    report = {
        "model": card.name, "passes": [str(p) for p in passes], "prompt_tokens": prompt, "new_tokens": new,
        "rounds": rounds, "quick": options.quick, "threads": 1, "runtime": rt.describe(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "machine": machine(), "batches": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report["bytes"] = export_student(student, tokenizer, Path(folder) / "onnx", to="onnx").bytes
        runs = {level: OnnxLlama(Path(folder) / "onnx", level=level) for level in ("exact", "fast")}
        for batch in (1, 8):
            ids = text[:batch]

            def theirs(ids=ids):
                how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None)
                with torch.inference_mode():
                    return dense.generate(ids, attention_mask=torch.ones_like(ids), **how)

            calls = {"transformers float32": theirs, "transformers again": theirs}
            for level in ("fast", "exact") if batch == 1 else ("fast",):
                calls[f"onnxruntime {level}"] = lambda r=runs[level], ids=ids: r.generate(ids, new, stop=())
            expected = theirs()[:, prompt:]
            same = {n: float((f()[:, prompt:] == expected).float().mean()) for n, f in calls.items() if "onnx" in n}
            print(f"batch {batch}, {prompt} + {new} tokens, {rounds} rounds; tokens equal: {same}")
            rows = show_rows(compare(calls, rt, warmup=0 if options.quick else 1, repeats=rounds))
            for row in rows.values():
                row["tokens_per_second"] = batch * new / (row["ms"] / 1e3)
                row["times_as_fast"] = [1 / row[k] for k in ("ratio", "high", "low")]
            report["batches"][str(batch)] = {"rows": rows, "tokens_equal": same}
    save(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

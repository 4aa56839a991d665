"""Tokens per second: our `generate` against transformers' `generate`, same weights, same prompts, greedy.

    python benchmarks/generate.py            # batch 1 and 8, 32 new tokens, 12 rounds
    python benchmarks/generate.py --quick    # a smoke run: its numbers mean nothing

The two are timed in turn (`llmcourse.runtime.compare`), so that a machine that becomes busier disturbs both. A third
candidate, transformers timed against itself, is the null control. Results: benchmarks/results/generate.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from pathlib import Path

import torch

from llmcourse.data import load_model, token_data
from llmcourse.model import GPT, generate
from llmcourse.runtime import Runtime, compare
from llmcourse.settings import load_settings

RESULTS = Path(__file__).resolve().parent / "results" / "generate.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens and rounds")
    parser.add_argument("--rounds", type=int, default=12, help="how often each candidate is timed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    prompt_tokens, new_tokens, rounds = (16, 4, 2) if options.quick else (64, 32, options.rounds)

    settings = load_settings()
    rt = Runtime.auto(settings.device, settings.dtype)
    theirs, tokenizer, card = load_model(settings.model, rt=rt)
    ours = GPT.from_pretrained(settings.model, rt=rt)
    theirs.generation_config.eos_token_id = None  # both write the full number of tokens
    text = token_data(tokenizer, settings.data, limits={"test": 8 * prompt_tokens}).test

    report = {
        "model": card.name,
        "data": settings.data,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "quick": options.quick,
        "runtime": rt.describe(),
        "transformers": __import__("transformers").__version__,
        "python": platform.python_version(),
        "batches": {},
    }
    print(rt.describe(), f"| {card.name}, prompts of {prompt_tokens} tokens, {new_tokens} new ones, {rounds} rounds")
    for batch in (1, 8):
        ids = rt.move(text.view(8, prompt_tokens)[:batch])
        mask = torch.ones_like(ids)

        def run_theirs(ids=ids, mask=mask):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return theirs.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
                )

        def run_ours(ids=ids):
            return generate(ours, ids, max_new_tokens=new_tokens, stop=[])

        same = run_ours() == run_theirs()[:, prompt_tokens:].tolist()
        results = compare(
            {"transformers": run_theirs, "transformers again": run_theirs, "llmcourse": run_ours},
            rt,
            warmup=1,
            repeats=rounds,
            seed=settings.seed,
        )
        print(f"\nbatch {batch}: the same tokens {same}\n{'':<20}{'tokens/s':>10}{'time ratio to transformers':>30}")
        rows = {}
        for name, c in results.items():
            tokens_s = batch * new_tokens / c.timing.median
            rows[name] = {
                "tokens_per_s": tokens_s,
                "time_ratio": c.ratio,
                "low": c.low,
                "high": c.high,
                "seconds": list(c.timing.seconds),
            }
            print(f"{name:<20}{tokens_s:>10.1f}{c.ratio:>12.3f} ({c.low:.3f} to {c.high:.3f})")
        report["batches"][str(batch)] = {"same_tokens": same, "results": rows}
        verdict = results["llmcourse"]
        word = (
            "faster"
            if verdict.high < 1
            else "slower"
            if verdict.low > 1
            else "no difference that the spread allows to see"
        )
        print(f"llmcourse against transformers at batch {batch}: {word}")
        # after each batch size: a run that is cut off keeps what it has
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    print(f"\nwritten to {options.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of the log-likelihoods of multiple-choice items: ours against lm-eval on the same model.

    python benchmarks/evaluate.py                                     500 items, ten rounds; the course's small model
    python benchmarks/evaluate.py --model smollm2-135m --items 200     the real one; four minutes
    python benchmarks/evaluate.py --quick --model FOLDER              12 items and three rounds, for the test suite

An item is "which title belongs to this description?" with four choices of the same topic. Each round scores the next
items, all candidates in turn (llmcourse.runtime.compare), eight sequences at once:

* lm-eval with its own reading of transformers (HFLM), which is the baseline, and the same again as the null control;
* lm-eval with the course's adapter (llmcourse.lmeval);
* llmcourse (score_choices).

A ratio has a 95 % bootstrap interval; below 1 is faster. All log-likelihoods are then compared, to 1e-4.

The result goes to benchmarks/results/evaluate.json, one entry for each model.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from shared import RESULTS, machine, save, show_rows

from llmcourse.accuracy import Item, description_items, score_choices
from llmcourse.data import load_model, load_records
from llmcourse.lmeval import course_lm, items_task
from llmcourse.runtime import Runtime, compare

BATCH = 8


def through_lm_eval(lm: Any, items: list[Item]) -> list[list[float]]:
    """Log-likelihoods of each item's choices."""
    found = evaluate(lm, {"course_items": items_task(items)}, bootstrap_iters=0)["samples"]["course_items"]
    return [[float(r[0][0]) for r in s["resps"]] for s in sorted(found, key=lambda s: s["doc_id"])]


def in_parts(score: Callable[[list[Item]], Any], parts: list[list[Item]], kept: list) -> Callable[[], None]:
    """A function that scores the next part at each call, and keeps what it found."""
    return lambda: kept.extend(score(parts[len(kept) // len(parts[0]) % len(parts)]))


def made_up(n: int) -> list[Item]:
    """Items for the test suite, which has no prepared data."""
    words = ["kalo", "mine", "ru", "sa", "to", "vi", "qu", "zemi"]
    choices = [(words[i % 8], f"{words[i // 2 % 8]} {words[i // 3 % 8]} {words[i % 5]}") for i in range(n)]
    return [Item(context="ka lo " * (1 + i % 3) + ":", choices=c, answer=i % 2) for i, c in enumerate(choices)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="course-3m")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="made-up items and three rounds: its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluate.json")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rounds = 3 if args.quick else args.rounds
    rt = Runtime.auto("cpu", "float32")
    model, tokenizer, card = load_model(args.model, rt=rt)
    items = made_up(12) if args.quick else description_items(load_records("wikipedia"), args.items)
    each = len(items) // rounds
    parts = [items[k * each : (k + 1) * each] for k in range(rounds)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    ours = course_lm(model, tokenizer, batch_size=BATCH)
    score = {
        "lm-eval": lambda some: through_lm_eval(theirs, some),
        "lm-eval again": lambda some: through_lm_eval(theirs, some),
        "lm-eval, our adapter": lambda some: through_lm_eval(ours, some),
        "llmcourse": lambda some: score_choices(model, tokenizer, some, batch_size=BATCH).log_p.tolist(),
    }
    for fn in score.values():
        fn(parts[0][:2])  # imports, and what is allocated once
    found: dict[str, list] = {name: [] for name in score}
    fns = {name: in_parts(fn, parts, found[name]) for name, fn in score.items()}
    print(f"{card.name}, {each * rounds} items in {rounds} rounds, {torch.get_num_threads()} thread(s)")
    rows = show_rows(compare(fns, rt, warmup=0, repeats=rounds))
    apart = {name: float(np.abs(np.array(x) - np.array(found["llmcourse"])).max()) for name, x in found.items()}
    print(f"   largest difference of a log-likelihood: {max(apart.values()):.1e}")
    assert max(apart.values()) < 1e-4, apart
    report = json.loads(args.out.read_text("utf8")) if args.out.exists() else {"models": {}}
    report["question"] = "time of the log-likelihoods of multiple-choice items against lm-eval"
    report["models"][card.name] = {
        "quick": args.quick,
        "machine": machine(torch=torch.__version__, lm_eval=lm_eval.__version__, threads=torch.get_num_threads()),
        "items": each * rounds,
        "batch": BATCH,
        "largest difference": max(apart.values()),
        "rows": rows,
    }
    save(report, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of BLEU, chrF and ROUGE: ours against sacrebleu and rouge-score on ten thousand pairs.

    python benchmarks/metrics.py            10,000 pairs, five rounds; about five minutes
    python benchmarks/metrics.py --quick    60 pairs and three rounds, for the test suite: its numbers mean nothing

A pair is the beginning of a Wikipedia article (up to forty words) as the reference, and the same with every seventh
word left out and two neighbors exchanged as the hypothesis. Both programs score the same pairs in turn within each
round (llmcourse.runtime.compare), with empty caches: a text that was cut into words in the round before is cut again.
A ratio is to the library, with a 95 % bootstrap interval; below 1 is faster. The library is timed twice: the second
one is the null control. Before anything is timed, the results are compared.

The result goes to benchmarks/results/metrics.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import sacrebleu
from rouge_score import rouge_scorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from shared import RESULTS, machine, save, show_rows

from llmcourse import metrics
from llmcourse.data import load_records
from llmcourse.runtime import Runtime, compare


def pairs(quick: bool) -> tuple[list[str], list[str]]:
    """(hypotheses, references)."""
    if quick:  # needs no prepared data
        rng = np.random.default_rng(0)
        beginnings = [" ".join(f"word{i}" for i in rng.integers(50, size=30)) + "." for _ in range(60)]
    else:
        beginnings = [" ".join(r["text"].split()[:40]) for r in load_records("wikipedia")][:10_000]
    changed = []
    for text in beginnings:
        words = [w for i, w in enumerate(text.split()) if i % 7 != 6]
        words[1:3] = words[1:3][::-1]
        changed.append(" ".join(words))
    return changed, beginnings


def candidates(found: list[str], wanted: list[str]) -> dict:
    """score -> (theirs, ours), functions that give the same number."""
    scorer = rouge_scorer.RougeScorer(list(metrics.ROUGE))

    def their_rouge() -> float:
        return float(np.mean([scorer.score(w, f)["rougeLsum"].fmeasure for f, w in zip(found, wanted)]))

    def our_rouge() -> float:
        metrics.words.cache_clear()
        return float(np.mean([metrics.rouge(f, w)["rougeLsum"].f1 for f, w in zip(found, wanted)]))

    def their_bleu() -> float:
        Tokenizer13a.__call__.cache_clear(), TokenizerRegexp.__call__.cache_clear()
        return sacrebleu.corpus_bleu(found, [wanted]).score

    def our_bleu() -> float:
        metrics.words.cache_clear()
        return metrics.corpus_bleu(found, wanted).value

    return {
        "BLEU": (their_bleu, our_bleu),
        "chrF": (lambda: sacrebleu.corpus_chrf(found, [wanted]).score, lambda: metrics.chrf(found, wanted).value),
        "ROUGE-1, 2, L, Lsum": (their_rouge, our_rouge),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pairs and three rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "metrics.json")
    args = parser.parse_args()
    rt, rounds = Runtime.auto("cpu"), 3 if args.quick else args.rounds
    found, wanted = pairs(args.quick)
    report = {
        "question": "time of BLEU, chrF and ROUGE against sacrebleu and rouge-score",
        "quick": args.quick,
        "machine": machine(sacrebleu=sacrebleu.__version__),
        "pairs": len(found),
        "scores": {},
    }
    for name, (theirs, ours) in candidates(found, wanted).items():
        values = theirs(), ours()
        assert abs(values[0] - values[1]) < 1e-9, (name, values)
        fns = {"the library": theirs, "the library again": theirs, "llmcourse": ours}
        results = compare(fns, rt, baseline="the library", warmup=0, repeats=rounds)
        print(f"\n{name} {values[1]:.3f}, {len(found)} pairs, {rounds} rounds")
        report["scores"][name] = {"value": values[1], "rows": show_rows(results)}
    save(report, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

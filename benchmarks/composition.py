"""Prune, distil and quantize the real model in several orders: what each composition costs, in bytes and in quality.

    python benchmarks/composition.py              # SmolLM2, three seeds: an hour on two cores; goes on where it was
    python benchmarks/composition.py --quick      # the house model: a smoke run, whose numbers mean nothing

The chapter on composition does this with the house model in its own cells; with the real model it takes too long for
a cell, so the chapter reads the file that this script writes. A letter is a pass and a word is a recipe, from left to
right:

    P    an eighth of the feed-forward channels goes, chosen by activation
    R    any eighth (the null control)
    D    a few steps on the dense model's distributions and on the text, as many in every word
    Q4   GPTQ, groups of 64, activation order, in 4 bits
    B24  24 of the 30 blocks stay, evenly spread
    X    like P, and Q after it: calibrated on program code, while training and test text stay

After the last letter the embedding, which is also the head, is rounded to 8 bits, so that it does not hide what the
passes save. A seed draws the calibration text and the order of the training text. Perplexity is relative to the dense
model's, paired by token; bytes are those of the file that the model would be stored in, with 16 bits for the rest.

Time depends on shapes and bits and not on values, so it is measured on models of the same shapes that are rounded to
nearest: reading 128 tokens and writing one, in turn, relative to the dense model, which stands in the list twice. A
packed model is timed as it is (portable) and with the kernels that this machine has (chapter on deployment). The
machine should have nothing else to do then: `--times` measures only them, into the file that is there.

Results: nbs/_results/composition.json, and one small file a word and seed under build/composition until then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from shared import machine, save, show_rows

from llmcourse.compression import compress
from llmcourse.data import load_model, token_data
from llmcourse.deployment import faster
from llmcourse.distillation import Distill, KeepBlocks
from llmcourse.evaluation import compare_perplexity, perplexity
from llmcourse.evaluator import prefill_and_decode
from llmcourse.packed import pack_model, stored_bytes
from llmcourse.pruning import Structured
from llmcourse.quantization import GPTQ, RTN, EmbeddingRTN
from llmcourse.runtime import Runtime, compare, evaluating
from llmcourse.store import write_atomic
from llmcourse.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("", "Q4", "Q3", "P", "P Q3", "P D Q3", "P Q3 D", "D P Q3", "R D Q3", "B24 D Q4", "X Q3")
KEPT = ("ratio", "low", "high", "perplexity", "bytes", "seconds")
REAL = {"model": "smollm2-135m", "n": 8, "length": 256, "steps": 8, "batch": 4, "row": 64, "lr": 1e-4, "tokens": 2048}
REAL |= {"context": 512, "stride": 384}
QUICK = {"model": "course-3m", "n": 2, "length": 64, "steps": 1, "batch": 2, "row": 16, "lr": 1e-4, "tokens": 300}
QUICK |= {"context": 64, "stride": 48}


class Tree:
    """Models by their word. A common beginning is computed once and kept while words that begin so are left."""

    def __init__(self, how: dict, seed: int):
        self.how, self.seed, self.rt = how, seed, Runtime.auto("cpu", "float32")
        self.dense, self.tokenizer, _ = load_model(how["model"], rt=self.rt)
        limits = {"train": 200_000, "calib": 40_000, "test": how["tokens"]}
        self.data = token_data(self.tokenizer, "wikipedia", limits=limits)
        code = token_data(self.tokenizer, "python", limits={"train": 0, "test": 64, "calib": 40_000}).calib
        self.strange = replace(self.data, calib=code)
        self.kept: dict[str, torch.nn.Module] = {"": self.dense}

    def make(self, letter: str):
        how = self.how
        calib = {"n_calib": how["n"], "seq_len": how["length"], "seed": self.seed}
        if letter in "PXR":
            chosen = {"choose": "random"} if letter == "R" else {}
            return Structured(sparsity=0.125, **chosen, **calib)
        if letter == "D":
            rows = {"steps": how["steps"], "batch_size": how["batch"], "seq_len": how["row"]}
            train = TrainConfig(seed=self.seed, lr=how["lr"], warmup=how["steps"] // 4, **rows)
            return Distill(teacher=self.dense, alpha=0.5, train=train)
        if letter[0] == "B":
            return KeepBlocks(kept=min(int(letter[1:]), len(self.dense.model.layers)))
        return GPTQ(bits=int(letter[1:]), group_size=64, act_order=True, **calib)

    def built(self, word: str) -> torch.nn.Module:
        if word not in self.kept:
            before, _, last = word.rpartition(" ")
            data = self.strange if word[0] == "X" else self.data
            self.kept[word] = compress(self.built(before), [self.make(last)], data, self.rt)[0]
        return self.kept[word]

    def forget(self, left: list[str]) -> None:
        for word in [w for w in self.kept if w and not any(f"{other} ".startswith(f"{w} ") for other in left)]:
            del self.kept[word]

    def measured(self, word: str) -> dict:
        began, model = time.perf_counter(), self.built(word)
        seconds = time.perf_counter() - began
        if word:
            model = compress(model, [EmbeddingRTN(bits=8)], None, self.rt)[0]
        sizes = {"context": self.how["context"], "stride": self.how["stride"], "batch_size": 2}
        found = perplexity(model, self.data, model=word or "dense", rt=self.rt, **sizes)
        size = stored_bytes(pack_model(model) if word else model, torch.float16)
        return {"found": found, "bytes": size["total"], "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the house model and little text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "composition.json")
    parser.add_argument("--times", action="store_true", help="only measure the times again")
    args = parser.parse_args()
    how = QUICK if args.quick else REAL
    if args.times:
        report = json.loads(args.out.read_text("utf8"))
        save(report | {"times": times(how)}, args.out)
        return 0
    work = ROOT / "build" / "composition" / f"{how['model']}-{hash_of(how)}"
    rows: dict[str, list[dict]] = {word: [] for word in WORDS}
    for seed in range(args.seeds):
        files = {word: work / f"{seed}-{word.replace(' ', '-') or 'dense'}.json" for word in WORDS}
        left = [word for word in WORDS if not files[word].is_file()]
        if left:
            run_seed(how, seed, left, files)
        for word in WORDS:
            rows[word].append(json.loads(files[word].read_text("utf8")))
    report = {
        "question": "what compositions of passes cost on the real model, in bytes and in perplexity",
        "machine": machine(threads=torch.get_num_threads()),
        "how": how,
        "seeds": args.seeds,
        "protocol": rows[""][0]["protocol"],
        "rows": {word or "dense": [{k: r[k] for k in KEPT} for r in rows[word]] for word in WORDS},
        "times": times(how),
    }
    save(report, args.out)
    print(f"written to {args.out}")
    return 0


def run_seed(how: dict, seed: int, left: list[str], files: dict[str, Path]) -> None:
    """Every word of one seed that has no file yet."""
    tree = Tree(how, seed)
    dense = tree.measured("")["found"]
    for k, word in enumerate(left):
        got = tree.measured(word)
        r = compare_perplexity(dense, got["found"])
        row = {"ratio": r.value, "low": r.low, "high": r.high, "perplexity": got["found"].value}
        row |= {"bytes": got["bytes"], "seconds": got["seconds"], "protocol": str(dense.protocol)}
        files[word].parent.mkdir(parents=True, exist_ok=True)
        write_atomic(files[word], lambda path, row=row: Path(path).write_text(json.dumps(row), "utf8"))
        size = f"{got['bytes'] / 1e6:7.2f} MB"
        print(f"seed {seed}  {word or 'dense':12} {size}  {r}  {got['seconds']:.0f} s", flush=True)
        tree.forget(left[k + 1 :])


def times(how: dict) -> dict:
    """Time to read a prompt and to write a token, for each shape and number of bits."""
    rt, repeats = Runtime.auto("cpu", "float32"), 2 if how is QUICK else 15
    dense, tokenizer, _ = load_model(how["model"], rt=rt)
    data = token_data(tokenizer, "wikipedia", limits={"train": 0, "test": 64, "calib": 40_000})
    few = {"n_calib": 1, "seq_len": 32}
    shapes = {"": dense, "P": compress(dense, [Structured(sparsity=0.125, choose="random", **few)], data, rt)[0]}
    shapes["B24"] = compress(dense, [KeepBlocks(kept=min(24, len(dense.model.layers)))], None, rt)[0]
    models = {"dense": dense, "dense again": dense, "P": shapes["P"], "B24": shapes["B24"]}
    for shape, bits in (("", 4), ("", 3), ("P", 3), ("B24", 4)):
        word = f"{shape} Q{bits}".strip()
        passes = [RTN(bits=bits, group_size=64), EmbeddingRTN(bits=8)]
        packed = pack_model(compress(shapes[shape], passes, None, rt)[0])
        models[f"{word}, portable"] = packed
        models[f"{word}, kernels"] = faster(packed, rt)[0]
    with evaluating(*models.values()):
        calls = {name: prefill_and_decode(model, 128, rt) for name, model in models.items()}
        found = {}
        for i, what in enumerate(("read", "write")):
            print(f"time to {what}, relative to the dense model")
            found[what] = show_rows(compare({n: c[i] for n, c in calls.items()}, rt, warmup=2, repeats=repeats))
    return {"machine": machine(threads=torch.get_num_threads()), **found}


def hash_of(how: dict) -> str:
    """Names the folder of the pieces, so that pieces of other settings are not taken for these."""
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    raise SystemExit(main())

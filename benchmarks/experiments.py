"""The two questions of the chapter on experiments, on whole models instead of a block and a toy.

    python benchmarks/experiments.py            # both: about an hour on one thread; goes on where it was
    python benchmarks/experiments.py gptq       # does GPTQ beat RTN, whatever the calibration text?
    python benchmarks/experiments.py house      # which of rate, warm-up, batch and decay matters?
    python benchmarks/experiments.py --quick    # tiny settings: a smoke run, whose numbers mean nothing

`gptq` quantizes all blocks of SmolLM2 in groups of 64, with RTN once and with GPTQ for each of three calibration texts,
two draws of sequences from each, and two orders of a draw (the second is the first reversed: on paper the same sums).
Perplexity is that of test documents of Wikipedia.

`house` trains the shape of the house model from new weights on its own text, with as many tokens in every run: half of
the 16 combinations of four settings (the decay is high where an odd number of the others is), three seeds each, and
the settings that were best and all low once more with other seeds. The loss is that of validation documents.

Results: nbs/_results/experiments.json, and one small file a run under build/experiments until then.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from shared import keep, machine, save

from llmcourse.checkpoints import digest
from llmcourse.compression import compress
from llmcourse.data import TokenData, load_model, token_data
from llmcourse.evaluation import compare_perplexity, perplexity
from llmcourse.experiments import fractional_factorial
from llmcourse.model import GPT, GPTConfig
from llmcourse.quantization import GPTQ, RTN
from llmcourse.runtime import Runtime, evaluating
from llmcourse.settings import BadInput
from llmcourse.training import TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent
TEXTS, ORDERS = ("wikipedia", "sotu", "shakespeare"), ("as drawn", "reversed")
REAL = {"model": "smollm2-135m", "bits": [3], "group": 64, "n": 64, "length": 128, "draws": 2}
REAL |= {"target": "wikipedia", "tokens": 4096, "context": 512, "stride": 384}
HOUSE = {"model": "course-3m", "data": "sotu", "length": 128, "tokens": 65_536, "rows": 128}
FACTORS = {"rate": (1e-3, 4e-3), "warmup": (0.02, 0.2), "batch": (4, 16), "decay": (0.0, 0.3)}
SEEDS, FRESH = (0, 1, 2), (100, 101, 102, 103, 104)


class Reversed(TokenData):
    """The same calibration sequences, the last one first."""

    def calib_batch(self, n: int, length: int, seed: int) -> torch.Tensor:
        return super().calib_batch(n, length, seed).flip(0)


def gptq(rt: Runtime) -> Iterator[tuple[str, Callable[[], dict]]]:
    dense, tokenizer, _ = load_model(REAL["model"], rt=rt)
    target = token_data(tokenizer, REAL["target"], limits={"test": REAL["tokens"]})
    limits = {"calib": 2 * REAL["n"] * REAL["length"]}
    texts = {name: token_data(tokenizer, name, limits=limits) for name in TEXTS}
    how = dict(context=REAL["context"], stride=REAL["stride"], batch_size=1, rt=rt)
    before: dict[str, object] = {}

    def measured(method, text) -> dict:
        if not before:
            before["dense"] = perplexity(dense, target, model="dense", **how)
        found = perplexity(compress(dense, [method], text, rt)[0], target, model=method.name, **how)
        ratio = compare_perplexity(before["dense"], found)
        return {"perplexity": found.value, "ratio": list(ratio), "protocol": str(found.protocol)}

    for bits in REAL["bits"]:
        grid = dict(bits=bits, group_size=REAL["group"])
        yield f"rtn {bits}", lambda g=grid: measured(RTN(**g), None)
        for draw in range(REAL["draws"]):
            for name in TEXTS:
                for kind, order in zip((TokenData, Reversed), ORDERS, strict=True):
                    how_many = dict(n_calib=REAL["n"], seq_len=REAL["length"], seed=draw, act_order=True)
                    yield (
                        f"gptq {bits} {name} {draw} {order.split()[-1]}",
                        lambda g=grid, h=how_many, k=kind, t=texts[name]: measured(GPTQ(**g, **h), k(**vars(t))),
                    )


def final_loss(rt: Runtime, data: TokenData, shape: GPTConfig, rows: torch.Tensor, setting: dict, seed: int) -> dict:
    rate, warmup, batch, decay = (setting[name] for name in FACTORS)
    steps = HOUSE["tokens"] // (batch * HOUSE["length"])
    torch.manual_seed(seed)
    model, rows = rt.move(GPT(shape)), rt.move(rows)
    cfg = TrainConfig(
        steps=steps, batch_size=batch, seq_len=HOUSE["length"], lr=rate, warmup=max(1, round(warmup * steps)),
        weight_decay=decay, seed=seed,
    )  # fmt: skip
    train(model, data, cfg, rt=rt)
    with torch.no_grad(), evaluating(model):
        logits = model(rows[:, :-1])  # (rows, length, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    return {"loss": float(loss), "steps": steps, "setting": setting}


def house(rt: Runtime, kept: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    theirs, tokenizer, _ = load_model(HOUSE["model"])
    c, T = theirs.config, HOUSE["length"]
    shape = GPTConfig(
        vocab_size=c.vocab_size, d_model=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads,
        d_ff=c.intermediate_size, context=T, tied=True,
    )  # fmt: skip
    data = token_data(tokenizer, HOUSE["data"])
    rows = data.val[: HOUSE["rows"] * T + 1].unfold(0, T + 1, T)  # (rows, T + 1)
    design = fractional_factorial(FACTORS, {"decay": "rate*warmup*batch"})
    run = lambda setting, seed: lambda: final_loss(rt, data, shape, rows, setting, seed)
    means = []
    for i in range(len(design)):
        found = []
        for seed in SEEDS:
            yield f"house {i} {seed}", run(design.settings(i), seed)
            found.append(keep(kept, f"house {i} {seed}")["loss"])
        means.append(sum(found) / len(found))
    low = next(i for i in range(len(design)) if (design.coded[i] < 0).all())
    for i in dict.fromkeys((low, means.index(min(means)))):
        for seed in FRESH:
            yield f"house {i} {seed}", run(design.settings(i), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["gptq", "house"], help="gptq, house")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …; runs of one table belong on one device")
    parser.add_argument("--quick", action="store_true", help="tiny settings: a smoke run")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "experiments.json")
    args = parser.parse_args()
    if unknown := [p for p in args.parts if p not in ("gptq", "house")]:
        raise BadInput(f"part is {unknown[0]!r}; allowed: gptq, house.")
    if args.quick:
        REAL.update(model="course-3m", n=2, length=16, tokens=128, context=64, stride=48, bits=[3])
        HOUSE.update(tokens=2048, length=32, rows=8)
    rt = Runtime.auto(args.device, "float32")
    kept = ROOT / "build" / "experiments" / digest([REAL, HOUSE, FACTORS, SEEDS, FRESH, rt.device.type])
    if args.quick and args.out.parent == ROOT / "nbs" / "_results":
        args.out = kept / "all.json"
    for part in args.parts:
        for name, go in gptq(rt) if part == "gptq" else house(rt, kept):
            keep(kept, name, go)
    rows = {file.stem.replace("_", " "): keep(kept, file.stem) for file in sorted(kept.glob("*_*.json"))}
    assert all(math.isfinite(r.get("loss", r.get("perplexity"))) for r in rows.values())
    report = {"real": REAL, "house": HOUSE, "factors": FACTORS, "seeds": SEEDS, "fresh": FRESH, "rows": rows}
    save(report | {"machine": machine(where=rt.describe())}, args.out)
    print(args.out)


if __name__ == "__main__":
    main()

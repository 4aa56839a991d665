"""Fine-tuning against prompts and counted words, over the number of labels.

    python benchmarks/finetuning.py                 # all of it: about an hour on two cores; goes on where it was
    python benchmarks/finetuning.py curve transfer  # some parts: rates, curve, prompts, transfer, cases, packed, real
    python benchmarks/finetuning.py --quick         # one seed and few steps: a smoke run, whose numbers mean nothing

The task: the first twelve words of a Wikipedia article, and one of eight topics. A run is an arm, a number of labels
and a seed; the seed draws the labeled texts, the first numbers of head and adapter, and the order of training. So
arms of one seed are pairs.

    rates     learning rates, and C of the two regressions, on validation texts: where the settings come from
    curve     counted words, frozen features, LoRA, full, and the null control (LoRA, labels shuffled)
    prompts   the labels in front of the question, and nothing trained
    transfer  another task first, 512 labels of it, then 32 or 512 labels of the task
    cases     what people get wrong: first numbers, scales
    packed    LoRA on the base in 4 bits (QLoRA)
    real      SmolLM2: frozen features, prompts, LoRA
    collect   nothing new: the file is written from the runs that are there

Results: nbs/_results/finetuning.json, and one small file a run under build/finetuning until then, apart for each
choice of settings.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from shared import keep, machine, save

from llmcourse.accuracy import Item, loglikelihood, prompt, score_choices
from llmcourse.checkpoints import digest
from llmcourse.compression import compress
from llmcourse.data import load_model, load_records
from llmcourse.finetuning import (
    Classifier,
    Labeled,
    adapted,
    add_lora,
    draw_labels,
    finetune,
    frozen_features,
    logistic_regression,
    predict,
    share_right,
    standardized,
    tf_idf,
    topic_texts,
)
from llmcourse.packed import pack_model
from llmcourse.quantization import RTN
from llmcourse.settings import BadInput
from llmcourse.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CLASSES, LAYERS = 8, "model.*_proj"
BUDGETS, SEEDS = (8, 64, 512), (0, 1, 2, 3, 4)
HOW = {"steps": 40, "batch": 16, "rank": 8, "alpha": 16, "full": 3e-3, "lora": 1e-2, "C": 1.0}
HOW |= {"C_features": 0.01, "pool": "mean"}
RATES = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3, 1e-2)}
STRENGTHS = {"words": (1.0, 10.0, 100.0, 1000.0), "frozen": (0.001, 0.01, 0.1, 1.0)}  # C of the two regressions
REAL = {"steps": 30, "batch": 8, "lora": 1e-3, "test_per_topic": 25}


@functools.cache
def base(name: str):
    return load_model(name)[:2]


@functools.cache
def task():
    return topic_texts(load_records("wikipedia"))


@functools.cache
def reviews() -> list[tuple[str, int]]:
    """Sentences about movies with their sentiment: 0 negative, 1 positive; what people found neutral is left out."""
    records = [r for r in load_records("sentiment", "train") if r["source"] == "movieReviewSnippets"]
    return [(" ".join(r["text"].split()[:12]), int(r["score"] > 0)) for r in records if abs(r["score"]) > 0.5]


@functools.cache
def described() -> list[tuple[str, int]]:
    return topic_texts(load_records("wikipedia"), field="description", test_per_topic=1).train


def labeled(name: str, pairs, n_classes: int = CLASSES) -> Labeled:
    return Labeled(base(name)[1], [t for t, _ in pairs], [c for _, c in pairs], n_classes=n_classes)


def tested(name: str, per_topic: int = 50) -> Labeled:
    pairs = [p for c in range(CLASSES) for p in [q for q in task().test if q[1] == c][:per_topic]]
    return labeled(name, pairs)


def shuffled(pairs, seed: int):
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed + 1000)).tolist()
    return [(t, pairs[i][1]) for (t, _), i in zip(pairs, order)]


def config(kind: str, seed: int, n: int, how: dict, **more) -> TrainConfig:
    steps = how["steps"]
    settings = dict(steps=steps, batch_size=min(how["batch"], n), seq_len=1, lr=how[kind], weight_decay=0.0)
    settings |= dict(warmup=max(1, steps // 10), schedule="linear", final_lr=0.05, seed=seed)
    return TrainConfig(**settings | more)


def model_for(kind: str, seed: int, name: str = "course-3m", body=None, **lora) -> torch.nn.Module:
    model = Classifier(body or base(name)[0], CLASSES, pool=HOW["pool"], seed=seed)
    if kind == "full":
        return model
    how = {"rank": HOW["rank"], "alpha": HOW["alpha"]} | lora
    return add_lora(model, layers=LAYERS, also="score", seed=seed, **how)


def score(model, data: Labeled) -> float:
    return share_right(predict(model, data), data)


def run_trained(kind: str, pairs, seed: int, how: dict, name: str = "course-3m", test=None, body=None, **lora) -> float:
    model, data = model_for(kind, seed, name, body, **lora), labeled(name, pairs)
    finetune(model, data, config(kind, seed, len(data), how))
    return score(model, test or tested(name))


def run_words(pairs) -> float:
    texts, classes = zip(*pairs)
    W, b = logistic_regression(tf_idf(texts, texts), classes, n_classes=CLASSES, C=HOW["C"])
    return share_right(tf_idf(texts, [t for t, _ in task().test]) @ W.T + b, tested("course-3m"))


@functools.cache
def test_features(name: str, pool: str, per_topic: int):
    return frozen_features(Classifier(base(name)[0], CLASSES, pool=pool), tested(name, per_topic))


def run_frozen(name: str, pairs, pool: str, per_topic: int = 50) -> float:
    data = labeled(name, pairs)
    mine = frozen_features(Classifier(base(name)[0], CLASSES, pool=pool), data)
    x, z = standardized(mine, test_features(name, pool, per_topic))
    W, b = logistic_regression(x, data.classes, n_classes=CLASSES, C=HOW["C_features"])
    return share_right(z @ W.T + b, tested(name, per_topic))


def items(pairs) -> list[Item]:
    return [Item(context=f"{text}\nTopic:", choices=task().names, answer=c) for text, c in pairs]


def run_prompt(name: str, pairs, seed: int, per_topic: int = 50) -> dict:
    """Log-likelihood of the topic's name after as many solved examples as fit, in a random order of the seed."""
    model, tokenizer = base(name)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    shots = items([pairs[i] for i in order])
    asked = items([p for c in range(CLASSES) for p in [q for q in task().test if q[1] == c][:per_topic]])
    room = model.config.max_position_embeddings - 12
    length = lambda k: max(len(tokenizer(prompt(i, shots[:k]))["input_ids"]) for i in asked)
    while shots and length(len(shots)) > room:
        shots = shots[:-1]
    found = torch.tensor(score_choices(model, tokenizer, asked, shots=shots, batch_size=8).log_p)  # (n, classes)
    free = loglikelihood(model, tokenizer, [("Topic:", " " + name) for name in task().names])
    right = torch.tensor([item.answer for item in asked])
    share = lambda scores: float((scores.argmax(1) == right).double().mean())
    return {"none": share(found), "unconditional": share(found - torch.tensor([x.value for x in free])),
            "shots": len(shots)}  # fmt: skip


def curve(seeds, budgets):
    for seed in seeds:
        for n in budgets:
            pairs = draw_labels(task().train, n // CLASSES, seed)
            yield f"words {n} {seed}", functools.partial(run_words, pairs)
            yield f"frozen-mean {n} {seed}", functools.partial(run_frozen, "course-3m", pairs, "mean")
            for kind in ("full", "lora"):
                yield f"{kind} {n} {seed}", functools.partial(run_trained, kind, pairs, seed, HOW)
            if n == 512:
                null = functools.partial(run_trained, "lora", shuffled(pairs, seed), seed, HOW)
                yield f"lora-shuffled {n} {seed}", null


def prompts(seeds, budgets):
    for seed in seeds:
        pairs = draw_labels(task().train, 1, seed)
        go = functools.partial(run_prompt, "course-3m", pairs, seed, REAL["test_per_topic"])
        yield f"prompt 8 {seed}", go


@functools.cache
def body_after(source: str, seed: int):
    """The house model after full fine-tuning on another task; the head that went with it is left behind."""
    pairs = draw_labels(reviews(), 256, seed) if source == "reviews" else draw_labels(described(), 64, seed)
    pairs = shuffled(pairs, seed) if source == "shuffled" else pairs
    n = 2 if source == "reviews" else CLASSES
    model = Classifier(base("course-3m")[0], n, pool=HOW["pool"], seed=seed)
    data = labeled("course-3m", pairs, n)
    finetune(model, data, config("full", seed, len(data), HOW))
    return model.model


def transfer(seeds, budgets):
    for seed in seeds:
        for source, n in (("descriptions", 32), ("reviews", 32), ("shuffled", 32), ("descriptions", 512)):
            pairs = draw_labels(task().train, n // CLASSES, seed)
            go = lambda pairs=pairs, seed=seed, source=source: run_trained(
                "full", pairs, seed, HOW, body=body_after(source, seed)
            )
            yield f"after-{source} {n} {seed}", go


@functools.cache
def validation_pairs() -> list[tuple[str, int]]:
    """160 texts of the validation part: rates and strengths are chosen on them, for 128 labels."""
    records = [r | {"split": {"val": "test", "test": "left out"}.get(r["split"], r["split"])}
               for r in load_records("wikipedia")]  # fmt: skip
    return topic_texts(records, test_per_topic=20).test


@functools.cache
def validation() -> Labeled:
    return labeled("course-3m", validation_pairs())


def validation_texts() -> list[str]:
    return [text for text, _ in validation_pairs()]


def rates(seeds, budgets):
    for seed in seeds[:3]:
        pairs = draw_labels(task().train, 16, seed + 100)  # other texts than those of the runs below
        for kind in ("lora", "full"):
            for rate in RATES[kind]:
                go = functools.partial(run_trained, kind, pairs, seed, HOW | {kind: rate})
                yield f"rate-{kind}-{rate:g} 128 {seed}", lambda go=go: go(test=validation())
        for kind in STRENGTHS:
            for C in STRENGTHS[kind]:
                yield f"C-{kind}-{C:g} 128 {seed}", functools.partial(run_regression, kind, pairs, C)


def run_regression(kind: str, pairs, C: float) -> float:
    """Counted words or frozen features, on the validation texts."""
    texts, classes = zip(*pairs)
    if kind == "words":
        x, z = tf_idf(texts, texts), tf_idf(texts, validation_texts())
    else:
        model = Classifier(base("course-3m")[0], CLASSES, pool="mean")
        x, z = standardized(*(frozen_features(model, d) for d in (labeled("course-3m", pairs), validation())))
    W, b = logistic_regression(x, classes, n_classes=CLASSES, C=C)
    return share_right(z @ W.T + b, validation())


def cases(seeds, budgets):
    for seed in seeds[:3]:
        pairs = draw_labels(task().train, 16, seed)
        for rank in (2, 32):
            for alpha in (HOW["alpha"], HOW["alpha"] * rank // HOW["rank"]):
                go = functools.partial(run_trained, "lora", pairs, seed, HOW, rank=rank, alpha=alpha)
                yield f"rank-{rank}-alpha-{alpha:g} 128 {seed}", go
        yield f"B-not-zero 128 {seed}", functools.partial(run_noisy, pairs, seed)


def run_noisy(pairs, seed: int) -> float:
    """B starts with numbers of A's size."""
    model, data = model_for("lora", seed), labeled("course-3m", pairs)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted(model).values():
            reach = layer.lora_A.weight.abs().max()
            layer.lora_B.weight.copy_((torch.rand(layer.lora_B.weight.shape, generator=dice) * 2 - 1) * reach)
    finetune(model, data, config("lora", seed, len(data), HOW))
    return score(model, tested("course-3m"))


@functools.cache
def packed_base(bits: int):
    return pack_model(compress(base("course-3m")[0], [RTN(bits=bits, group_size=64)], None, None)[0])


def packed(seeds, budgets):
    for seed in seeds:
        pairs = draw_labels(task().train, 16, seed)
        yield f"qlora 128 {seed}", lambda p=pairs, s=seed: run_trained("lora", p, s, HOW, body=packed_base(4))


def real(seeds, budgets):
    name, few = "smollm2-135m", REAL["test_per_topic"]
    for seed in seeds[:3]:
        for n in (8, 32, 128):
            pairs = draw_labels(task().train, n // CLASSES, seed)
            for pool in ("last", "mean"):
                yield f"real-frozen-{pool} {n} {seed}", functools.partial(run_frozen, name, pairs, pool, few)
            words = functools.partial(run_words, pairs)
            yield f"real-words {n} {seed}", words
        pairs = draw_labels(task().train, 16, seed)
        go = functools.partial(run_trained, "lora", pairs, seed, HOW | REAL, name)
        yield f"real-lora 128 {seed}", lambda go=go: go(test=tested(name, few))
        for n in (8, 32):
            pairs = draw_labels(task().train, n // CLASSES, seed)
            yield f"real-prompt {n} {seed}", functools.partial(run_prompt, name, pairs, seed, few)


PARTS = {
    "rates": rates,
    "curve": curve,
    "prompts": prompts,
    "transfer": transfer,
    "cases": cases,
    "packed": packed,
    "real": real,
    "collect": lambda seeds, budgets: (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[p for p in PARTS if p != "collect"], help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="only these, in this order")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: a smoke run")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "finetuning.json")
    args = parser.parse_args()
    if unknown := [p for p in args.parts if p not in PARTS]:
        raise BadInput(f"part is {unknown[0]!r}; allowed: {', '.join(PARTS)}.")
    seeds, budgets = args.seeds, BUDGETS
    if args.quick:
        HOW["steps"], REAL["steps"] = 2, 1
        seeds, budgets = [0], (8,)
    # runs of other settings are other runs
    kept = ROOT / "build" / "finetuning" / digest([HOW, REAL, LAYERS, CLASSES])
    if args.quick and args.out.parent == ROOT / "nbs" / "_results":
        args.out = kept / "all.json"
    kept.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for name, go in PARTS[part](seeds, budgets):
            keep(kept, name, lambda go=go: found if isinstance(found := go(), dict) else {"right": found})
    rows: dict[str, dict[str, list]] = {}
    for file in sorted(kept.glob("*_*_*.json")):
        found = json.loads(file.read_text(encoding="utf8"))
        arm, n, seed = found.pop("name").split()
        rows.setdefault(arm, {}).setdefault(n, []).append({"seed": int(seed), **found})
    n_test = len(task().test)
    report = {"how": HOW, "real": REAL, "layers": LAYERS, "topics": task().names, "test": n_test, "rows": rows}
    save(report | {"machine": machine()}, args.out)
    print(args.out)


if __name__ == "__main__":
    main()

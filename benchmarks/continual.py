"""Forgetting over three tasks, transfer between tasks, and a language model that moves to another domain.

    python benchmarks/continual.py                  # all of it: about two hours on one thread; goes on where it was
    python benchmarks/continual.py settings turns   # some parts: settings, turns, transfer, rates, domain, real
    python benchmarks/continual.py --quick          # one seed and few steps: a smoke run, whose numbers mean nothing

    settings  λ of EWC, share of replay, a lower rate: on validation texts, with draws of their own
    turns     three tasks one after the other, in all six orders, each with a draw and a seed of its own
    transfer  another task first, then 32 labels of the topics
    rates     learning rates of the adaptation, on validation documents
    domain    language modeling on the banking documents, perplexity in and out of the domain
    real      the same with SmolLM2 and LoRA
    collect   nothing new: the file is written from the runs that are there

Results: nbs/_results/continual.json, and one small file a run under build/continual until then, apart for each choice
of settings. `settings` and `rates` come first: the others take from their files what was best.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from shared import keep, machine, save

from llmcourse.checkpoints import digest
from llmcourse.continual import (
    EWC,
    InTurn,
    Replay,
    Task,
    in_turn,
    joined,
    relabeled,
    summary,
    task_loss,
    task_score,
    tasks_of,
)
from llmcourse.data import load_model, load_records, token_data
from llmcourse.evaluation import Text, compare_perplexity, perplexity
from llmcourse.finetuning import Classifier, Labeled, add_lora, draw_labels, finetune, topic_texts, trainable
from llmcourse.settings import BadInput
from llmcourse.training import Sequences, TrainConfig, causal_lm_loss, train

ROOT = Path(__file__).resolve().parent.parent
HOW = {"steps": 48, "batch": 12, "full": 3e-3, "lora": 1e-2, "rank": 8, "alpha": 16, "layers": "model.*_proj"}
HOW |= {"labels": 480, "test": 240, "cut": 24, "words": 15, "buffer": 64, "fisher_texts": 96, "pool": "mean"}
GRID = {"ewc": (1e3, 1e4, 1e5), "replay": (0.25, 0.5), "slow": (1e-3, 3e-4)}
FEW = {"labels": 32, "steps": 40, "unlabeled": 1e-3}
DOMAIN = {"steps": 48, "batch": 4, "length": 256, "general": 0.1, "test": 12288}
RATES = {"full": (3e-4, 1e-3, 3e-3), "lora": (3e-3, 1e-2, 3e-2)}
REAL = {"steps": 40, "batch": 4, "length": 128, "rate": 1e-3, "test": 6144, "prompts": 3, "new": 40}
SOURCES = ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")
NAMES = ("topics", "reviews", "sources")
ORDERS = tuple(itertools.permutations(range(3)))
VALIDATION = (0, 3, 4)  # orders of the runs that choose settings: each task comes first once


@functools.cache
def base(name: str):
    return load_model(name)[:2]


@functools.cache
def records_of(name: str):
    return load_records(name)


def begin(text: str) -> str:
    return " ".join(text.split()[: HOW["words"]])


def topics(split: str, field: str = "text") -> list[tuple[str, int]]:
    """All texts of a part with one of the eight topics."""
    aside = {"train": "train", split: "test"} if split != "train" else {"train": "train", "test": "test"}
    records = [r | {"split": aside.get(r["split"], "left out")} for r in records_of("wikipedia")]
    found = topic_texts(records, field=field, test_per_topic=1 if split == "train" else 20, words=HOW["words"])
    if split == "test":
        return topic_texts(records, field=field, test_per_topic=50, words=HOW["words"]).test
    return found.train if split == "train" else found.test


def reviews(split: str) -> list[tuple[str, int]]:
    """Sentences about movies and their sentiment: 0 negative, 1 positive; what people found neutral is left out."""
    rows = [r for r in records_of("sentiment") if r["split"] == split and r["source"] == "movieReviewSnippets"]
    return [(begin(r["text"]), int(r["score"] > 0)) for r in rows if abs(r["score"]) > 0.5]


def sources(split: str) -> list[tuple[str, int]]:
    """Where a sentence was written: shop, newspaper or tweet."""
    return [
        (begin(r["text"]), SOURCES.index(r["source"]))
        for r in records_of("sentiment")
        if r["split"] == split and r["source"] in SOURCES
    ]


@functools.cache
def pairs_of(name: str, split: str) -> list[tuple[str, int]]:
    return {"topics": topics, "reviews": reviews, "sources": sources}[name](split)


def balanced(pairs, n: int, seed: int):
    """About n pairs, as many of each class."""
    classes = [c for _, c in pairs]
    fewest = min(map(classes.count, set(classes)))
    return draw_labels(pairs, min(n // len(set(classes)), fewest), seed)


def tasks(seed: int, split: str = "test") -> list[Task]:
    """The three tasks: training texts drawn with the seed, the same test texts always."""
    parts = {
        name: (balanced(pairs_of(name, "train"), HOW["labels"], seed), balanced(pairs_of(name, split), HOW["test"], 0))
        for name in NAMES
    }
    return tasks_of(base("course-3m")[1], parts, cut=HOW["cut"])


def config(seed: int, rate: float, steps: int, batch: int, **more) -> TrainConfig:
    how = dict(steps=steps, batch_size=batch, seq_len=1, lr=rate, weight_decay=0.0, schedule="linear")
    return TrainConfig(**how | dict(warmup=max(1, steps // 10), final_lr=0.05, seed=seed * 10) | more)


def fresh(some: list[Task], seed: int) -> Classifier:
    return Classifier(base("course-3m")[0], some[0].train.n_classes, pool=HOW["pool"], seed=seed)


class Noise(InTurn):
    """The later tasks with their labels in random order: as many steps, and nothing to learn."""

    def __init__(self, seed: int):
        self.seed = seed

    def data(self, task: Task, i: int) -> Labeled:
        dice = torch.Generator().manual_seed(self.seed + i)
        order = torch.randperm(len(task.train), generator=dice).tolist()
        return task.train if i == 0 else relabeled(task.train, [task.train.classes[k] for k in order])


def method(arm: str, setting: float | None, seed: int) -> InTurn:
    kind, _, more = arm.partition("-")
    if kind == "ewc":
        labels = "true" if more == "true" else "drawn"
        how = dict(texts=HOW["fisher_texts"], labels=labels, shuffled=more == "shuffled", seed=seed)
        return EWC(setting, place="last" if more == "last" else "sum", **how)
    if kind == "replay":
        return Replay(HOW["buffer"], setting, random_labels=more == "random", seed=seed)
    return Noise(seed) if kind == "noise" else InTurn()


@functools.lru_cache(maxsize=1)
def first_stage(order: int, seed: int, split: str) -> dict[str, torch.Tensor]:
    """The weights after the first task, which are the same in all arms of a run."""
    found = tasks(seed, split)
    model = fresh(found, seed)
    cfg = config(seed, HOW["full"], HOW["steps"], HOW["batch"])
    finetune(model, found[ORDERS[order][0]].train, cfg, loss_fn=task_loss(found))
    return {name: t.clone() for name, t in model.state_dict().items()}


def turns_of(arm: str, order: int, seed: int, split: str = "test", setting: float | None = None) -> dict:
    """Three tasks in one of the orders; the matrix and what it comes to, in the order of training."""
    found = tasks(seed, split)
    some = [found[k] for k in ORDERS[order]]
    cfg = config(seed, HOW["full"], HOW["steps"], HOW["batch"])
    later = config(seed, setting, HOW["steps"], HOW["batch"]) if arm == "slow" else None
    if arm in ("lora", "alone"):
        return one_by_one(arm, some, seed)
    model = fresh(found, seed)
    before = [task_score(model, t) for t in some]
    if arm != "joint":
        model.load_state_dict(first_stage(order, seed, split))
    if arm == "joint":
        every = joined(*(t.train for t in some))
        finetune(model, every, config(seed, HOW["full"], 3 * HOW["steps"], HOW["batch"]), loss_fn=task_loss(some))
        rows = [[task_score(model, t) for t in some]]
    else:
        how = dict(later=later, loss_fn=task_loss(found), done=1)
        rows = in_turn(model, some, cfg, method(arm, setting, seed), **how).tolist()
    unknown = [task_score(model, t, known=False) for t in some]
    out = {"matrix": rows, "before": before, "unknown": unknown, "average": sum(rows[-1]) / 3}
    if len(rows) == 3:
        out |= {k: v for k, v in summary(torch.tensor(rows), torch.tensor(before))._asdict().items()}
    return out | {"order": [t.name for t in some]}


def one_by_one(arm: str, some: list[Task], seed: int) -> dict:
    """Each task on its own, from the same start: an adapter each, or a whole model each."""
    last, numbers = [], 0
    for i, task in enumerate(some):
        model = fresh(some, seed)
        if arm == "lora":
            how = dict(rank=HOW["rank"], alpha=HOW["alpha"], layers=HOW["layers"], also="score", seed=seed)
            model = add_lora(model, **how)
        rate = HOW["lora" if arm == "lora" else "full"]
        cfg = dataclasses.replace(config(seed, rate, HOW["steps"], HOW["batch"]), seed=seed * 10 + i)
        finetune(model, task.train, cfg, loss_fn=task_loss(some))
        last.append(task_score(model, task))
        numbers += trainable(model)[0]
    out = {"matrix": [last], "average": sum(last) / 3, "order": [t.name for t in some], "numbers": numbers}
    return out | ({"backward": 0.0, "forgetting": 0.0} if arm == "lora" else {})


ARMS = (
    "plain",
    "slow",
    "ewc",
    "ewc-shuffled",
    "ewc-true",
    "replay",
    "replay-random",
    "noise",
    "lora",
    "alone",
    "joint",
)


def best(kept: Path, part: str, kind: str, grid, key: Callable[[dict], float]) -> float:
    """The setting whose runs were best in the mean."""
    mean = {}
    for setting in grid:
        files = sorted(kept.glob(f"{part}_{kind}-{setting:g}_*.json"))
        if not files:
            raise BadInput(f"{kind} is without runs of the part {part!r}; allowed: after that part has run.")
        found = [key(json.loads(f.read_text(encoding="utf8"))) for f in files]
        mean[setting] = sum(found) / len(found)
    return max(mean, key=mean.get)


def settings(seeds, kept: Path) -> Iterator[tuple[str, Callable]]:
    for order in VALIDATION[: len(seeds)]:
        for kind, grid in GRID.items():
            for setting in grid:
                go = functools.partial(turns_of, kind, order, 100 + order, "val", setting)
                yield f"settings {kind}-{setting:g} {order}", go


def turns(seeds, kept: Path) -> Iterator[tuple[str, Callable]]:
    for run in seeds:
        for arm in ARMS:
            yield f"turns {arm} {run}", functools.partial(turn, arm, run, kept)


def turn(arm: str, run: int, kept: Path) -> dict:
    """One run of an arm, with the setting that was best on the validation texts."""
    kind = arm.partition("-")[0]
    found = best(kept, "settings", kind, GRID[kind], lambda r: r["average"]) if kind in GRID else None
    return turns_of(arm, run, run, "test", found) | {"setting": found}


@functools.cache
def body_after(source: str, seed: int):
    """The house model after another task, or after reading the topics' texts without labels."""
    model, tokenizer = base("course-3m")
    if source == "nothing":
        return model
    kind, _, mixed = source.partition("-")
    pairs = pairs_of("topics", "train") if kind == "unlabeled" else topics("train", "description")
    pairs = balanced(pairs_of(kind, "train") if kind in NAMES else pairs, HOW["labels"], seed)
    n, (texts, classes) = 1 + max(c for _, c in pairs), zip(*pairs)
    if mixed:
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed + 1000)).tolist()
        classes = [classes[i] for i in order]
    data = Labeled(tokenizer, texts, classes, n_classes=n, cut=HOW["cut"])
    student = Classifier(model, n, pool=HOW["pool"], seed=seed)
    read = lambda m, b: causal_lm_loss(m.model, {k: b[k] for k in ("input_ids", "attention_mask")})
    if kind == "unlabeled":
        finetune(student, data, config(seed, FEW["unlabeled"], HOW["steps"], HOW["batch"]), loss_fn=read)
    else:
        finetune(student, data, config(seed, HOW["full"], HOW["steps"], HOW["batch"]))
    return student.model


def after(source: str, seed: int) -> dict:
    pairs, tokenizer = balanced(pairs_of("topics", "train"), FEW["labels"], seed + 50), base("course-3m")[1]
    few = {"topics": (pairs, balanced(pairs_of("topics", "test"), HOW["test"], 0))}
    [task] = tasks_of(tokenizer, few, cut=HOW["cut"])
    model = Classifier(body_after(source, seed), len(task.classes), pool=HOW["pool"], seed=seed)
    finetune(model, task.train, config(seed, HOW["full"], FEW["steps"], HOW["batch"]))
    return {"right": task_score(model, task)}


FIRST = ("nothing", "descriptions", "descriptions-shuffled", "reviews", "reviews-shuffled", "sources", "unlabeled")


def transfer(seeds, kept: Path) -> Iterator[tuple[str, Callable]]:
    for seed in seeds:
        for source in FIRST:
            yield f"transfer {source} {seed}", functools.partial(after, source, seed)


@functools.cache
def texts_of(name: str, model: str = "course-3m"):
    return token_data(base(model)[1], name)


def stream(arm: str, length: int, seed: int, model: str = "course-3m") -> list:
    """Examples to train on: finance, general text of the same size, or finance with a share of general ones."""
    finance, general = (Sequences(texts_of(n, model).train, length) for n in ("banking", "wikipedia"))
    dice = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(general), generator=dice)[: len(finance)].tolist()
    if arm == "general":
        return [general[i] for i in picks]
    few = round(DOMAIN["general"] / (1 - DOMAIN["general"]) * len(finance)) if arm.endswith("replay") else 0
    return [*(finance[i] for i in range(len(finance))), *(general[i] for i in picks[:few])]


def measured(model, name: str, split: str, limit: int, how: dict, of: str = "course-3m"):
    text = Text.of(texts_of(name, of), split, limit=limit)
    return perplexity(model, text, context=how["length"], stride=how["length"] // 2, batch_size=8)


@functools.cache
def untouched(name: str, split: str, limit: int, of: str):
    how = REAL if of != "course-3m" else DOMAIN
    return measured(base(of)[0], name, split, limit, how, of)


def adapt(arm: str, seed: int, rate: float, how: dict = DOMAIN, of: str = "course-3m", split: str = "test"):
    """The adapted model, and its perplexities before and after, in and out of the domain."""
    body = base(of)[0]
    adapter = dict(rank=HOW["rank"], alpha=HOW["alpha"], layers=HOW["layers"], seed=seed)
    model = add_lora(body, **adapter) if arm.startswith("lora") else copy.deepcopy(body)
    cfg = config(seed, rate, how["steps"], how["batch"], seq_len=how["length"])
    kind = "general" if arm.endswith("general") else arm
    train(model, (stream(kind, how["length"], seed, of), None), cfg)
    out = {"numbers": trainable(model)[0]}
    for where, name in (("in", "banking"), ("out", "wikipedia")):
        was = untouched(name, split, how["test"], of)
        now = measured(model, name, split, how["test"], how, of)
        ratio = compare_perplexity(was, now)
        out[where] = {"before": [was.value, was.low, was.high], "after": [now.value, now.low, now.high],
                      "ratio": list(ratio), "documents": len(now.documents)}  # fmt: skip
    return model, out


def rates(seeds, kept: Path) -> Iterator[tuple[str, Callable]]:
    for kind, grid in RATES.items():
        for rate in grid:
            yield f"rates {kind}-{rate:g} 100", lambda k=kind, r=rate: adapt(k, 100, r, split="val")[1]


def domain(seeds, kept: Path) -> Iterator[tuple[str, Callable]]:
    lower = lambda r: -r["in"]["after"][0]
    chosen = {kind: best(kept, "rates", kind, grid, lower) for kind, grid in RATES.items()}
    for seed in seeds[:3]:
        for arm in ("full", "lora", "full-replay", "lora-replay", "general"):
            rate = chosen["lora" if arm.startswith("lora") else "full"]
            yield f"domain {arm} {seed}", lambda a=arm, s=seed, r=rate: adapt(a, s, r)[1]


def continued(model, tokenizer, prompts: list[str], new: int) -> list[str]:
    """One continuation each, drawn with the same seed."""
    texts = []
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        torch.manual_seed(i)
        how = dict(do_sample=True, temperature=0.8, top_k=50, max_new_tokens=new, pad_token_id=0)
        out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), **how)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return texts


def first_words() -> list[str]:
    """The beginnings of the first test documents."""
    documents = load_records("banking", "test")[: REAL["prompts"]]
    return [" ".join(r["text"].split()[:10]) for r in documents]


def real_run(arm: str, seed: int) -> dict:
    name = "smollm2-135m"
    body, tokenizer = base(name)
    before = continued(body, tokenizer, first_words(), REAL["new"])
    model, out = adapt(arm, seed, REAL["rate"], REAL, name)
    return out | {"prompts": first_words(), "texts": {
        "before": before, "after": continued(model, tokenizer, first_words(), REAL["new"])}}  # fmt: skip


def real(seeds, kept: Path) -> Iterator[tuple[str, Callable]]:
    for seed in seeds[:3]:
        for arm in ("lora", "lora-general", "lora-replay"):
            yield f"real {arm} {seed}", functools.partial(real_run, arm, seed)


PARTS = {
    "settings": settings,
    "turns": turns,
    "transfer": transfer,
    "rates": rates,
    "domain": domain,
    "real": real,
    "collect": lambda seeds, kept: (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[p for p in PARTS if p != "collect"], help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(len(ORDERS))), help="only these runs")
    parser.add_argument("--arms", nargs="+", default=[], help="only these arms")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: a smoke run")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "continual.json")
    args = parser.parse_args()
    if unknown := [p for p in args.parts if p not in PARTS]:
        raise BadInput(f"part is {unknown[0]!r}; allowed: {', '.join(PARTS)}.")
    if args.quick:
        for how in (HOW, FEW, DOMAIN, REAL):
            how["steps"] = 1
        HOW["labels"], HOW["test"], HOW["fisher_texts"], DOMAIN["test"], REAL["test"] = 48, 24, 4, 1024, 512
        REAL["prompts"], REAL["new"], args.seeds = 1, 2, [0]
    # runs of other settings are other runs
    kept = ROOT / "build" / "continual" / digest([HOW, GRID, FEW, DOMAIN, RATES, REAL, VALIDATION])
    if args.quick and args.out.parent == ROOT / "nbs" / "_results":
        args.out = kept / "all.json"
    kept.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for name, go in PARTS[part](args.seeds, kept):
            if args.arms and name.split()[1] not in args.arms:
                continue
            keep(kept, name, go)
    rows: dict[str, dict[str, list]] = {}
    for file in sorted(kept.glob("*_*_*.json")):
        found = json.loads(file.read_text(encoding="utf8"))
        part, arm, run = found.pop("name").split()
        rows.setdefault(part, {}).setdefault(arm, []).append({"run": int(run), **found})
    report = {"how": HOW, "few": FEW, "domain": DOMAIN, "real": REAL, "tasks": NAMES, "rows": rows}
    save(report | {"machine": machine()}, args.out)
    print(args.out)


if __name__ == "__main__":
    main()

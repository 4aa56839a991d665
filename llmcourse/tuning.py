"""`llmcourse finetune`: recipe, texts, training, measurement, and a folder with adapter or model and a card.

Hand-written: what is learned here is told in `nbs/09_finetuning.ipynb`; this puts the pieces together.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmcourse.accuracy import FEWEST, Accuracy, compare_accuracy
from llmcourse.data import SPLITS, LoadedModel, TokenData, leak_test, load_model, load_records, token_data
from llmcourse.evaluation import Perplexity, Ratio, Text, compare_perplexity, perplexity
from llmcourse.finetuning import (
    Classifier,
    Labeled,
    add_lora,
    base_fingerprint,
    draw_labels,
    finetune,
    frozen_features,
    head_only,
    load_adapter,
    logistic_regression,
    merge,
    predict,
    save_adapter,
    standardized,
    tf_idf,
    trainable,
)
from llmcourse.instructions import COURSE_TEMPLATE, Chats, Turns, chat_batch, encode_chat, example_loss, tune, turns
from llmcourse.launch import check_machine
from llmcourse.modelfolder import positions_of
from llmcourse.runfolder import is_made, run_folder
from llmcourse.runtime import Runtime, evaluating
from llmcourse.schema import parse, read_toml
from llmcourse.settings import BadInput, Settings, load_settings, number, one_of, read_text, require, whole
from llmcourse.store import CATALOG, MANIFEST, atomic_folder, manifest_faults, write_manifest
from llmcourse.training import TrainConfig, TrainResult, train, training_curve
from llmcourse.verdicts import paired

__all__ = ["FinetuneRecipe", "Tuned", "check_finetuning", "finetune_recipe", "load_finetune_recipe", "load_tuned"]

TASKS, METHODS = ("language", "classify", "chat"), ("lora", "full", "head")
RESULT, ABOUT, HEAD = "result", "result.json", "score.safetensors"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The `[lora]` table of a recipe: arguments of `add_lora`."""

    rank: int = 8
    alpha: float = 16.0
    layers: str = "*_proj"
    dropout: float = 0.0

    def __post_init__(self):
        whole("rank", self.rank, 1)
        number("alpha", self.alpha, above=0)
        number("dropout", self.dropout, 0, 1)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """What `finetune_recipe` makes."""

    name: str
    task: str
    """language: go on reading a text; classify: a label for each text; chat: what the assistant answers"""
    data: str
    license: str
    limits: str
    """what a reader of the card should know"""
    train: TrainConfig
    model: str = "course-3m"
    lora: Adapter = Adapter()
    method: str = "lora"
    """lora, full, or head (classify only: everything else stays frozen)"""
    beside: tuple[str, ...] = ()
    """language, chat: other texts that are measured before and after, to see what was forgotten"""
    question: str | None = None
    """chat: what is asked, with fields of a document in braces: "Translate: {text}"; None: rows have `messages`"""
    answer: str | None = None
    """chat: what is answered, likewise"""
    longest: int | None = None
    """chat: tokens of a chat; longer ones are left out. None: as many as the model can read"""
    label: str | None = None
    """classify: the field of a document that holds its label"""
    classes: int | None = None
    """classify: only so many of the most frequent labels; None: all"""
    without: tuple[str, ...] = ()
    """classify: labels that are left out"""
    per_class: int | None = None
    """classify: labeled texts of each class that are used; None: all of the training part"""
    cut: int | None = None
    """classify: tokens that are read of each text; None: as many as the model can"""
    pool: str = "mean"
    """classify: what the head reads, "mean" or "last" """
    most: int = 400
    """classify, chat: test texts at most"""
    text: str = ""
    """the file itself, which goes into the card"""

    def __post_init__(self):
        # it becomes a heading of the card: no markup, no control characters
        plain = self.name.isprintable() and 0 < len(self.name.strip()) <= 60 and not set(self.name) & set("<>&`/\\")
        allowed = "a text of 1 to 60 characters without control characters, <, >, &, ` and slashes"
        require(plain, "name", self.name, allowed)
        one_of("task", self.task, TASKS)
        one_of("method", self.method, METHODS)
        one_of("pool", self.pool, ("mean", "last"))
        for key in ("model", "data", "license", "limits"):
            require(bool(getattr(self, key).strip()), key, getattr(self, key), "a text")
        whole("most", self.most, FEWEST)
        for key, least in (("classes", 2), ("per_class", 1), ("cut", 1), ("longest", 2)):
            if getattr(self, key) is not None:
                whole(key, getattr(self, key), least)
        classify, chat, none = self.task == "classify", self.task == "chat", f"no such key for the task {self.task!r}"
        label = "the field that holds the label of a document" if classify else none
        require(classify == (self.label is not None), "label", self.label, label)
        require(classify or self.method != "head", "method", self.method, f"lora or full for the task {self.task!r}")
        require(not (classify and self.beside), "beside", list(self.beside), "no list for the task 'classify'")
        names = [self.data, *self.beside]
        require(len(set(names)) == len(names), "beside", list(self.beside), "other data sets than data, each once")
        for key in ("classes", "per_class", "cut", "without"):
            require(classify or not getattr(self, key), key, getattr(self, key), none)
        for key in ("question", "answer", "longest"):
            require(chat or getattr(self, key) is None, key, getattr(self, key), none)
        both = (self.question is None) == (self.answer is None)
        require(both, "answer", self.answer, "a text where question is one, and none where it is none")
        for key in ("question", "answer"):
            if getattr(self, key) is not None:
                fields_of(getattr(self, key), key)


def fields_of(pattern: str, key: str) -> list[str]:
    """The fields of a document that a pattern names in braces.

    Raises:
        BadInput: none, or something in braces that is no plain name.
    """
    try:
        parts = [part[1:] for part in Formatter().parse(pattern) if part[1] is not None]
    except ValueError:  # a brace that is not closed
        parts = []
    plain = bool(parts) and all(name.isidentifier() and not spec and not how for name, spec, how in parts)
    require(plain, key, pattern, "a text with names of fields in braces, such as '{text}'")
    return [name for name, *_ in parts]


def in_place(table: dict[str, Any], *, model: str | None, data: str | None) -> dict[str, Any]:
    """A recipe with another model or text. What it says of license and limits holds for its own: then nobody has said.

    A value that is the recipe's own changes nothing.
    """
    given = {k: v for k, v in (("model", model), ("data", data)) if v is not None and v != table.get(k)}
    if not given:
        return table
    what = " and ".join(f"the {'text' if key == 'data' else key}" for key in given)
    who = f"{what} given in place of the recipe's"
    told = {"license": f"for those to say who have the rights to {who}"}
    told |= {"limits": f"Nothing is known about {who}: look at it first."}
    return table | given | {key: text for key, text in told.items() if key in table}


def load_finetune_recipe(path: str | Path, *, model: str | None = None, data: str | None = None) -> FinetuneRecipe:
    """Read a recipe file and check all of it.

    Args:
        model, data: in place of the recipe's.
    Raises:
        BadInput: not TOML, a key that is missing or unknown, or a value that is not allowed.
    """
    path = Path(path)
    table = in_place(read_toml(path), model=model, data=data)
    train, lora = table.pop("train", None), table.pop("lora", {})
    require(isinstance(train, dict), f"[train] in {path.name}", train, "a table with steps, batch_size and lr")
    given: dict[str, Any] = {}
    if (task := table.get("task")) in ("classify", "chat"):
        why = "a text has one target" if task == "classify" else "a chat is read whole (see longest)"
        allowed = f"no such key for the task {task!r}: {why}"
        require("seq_len" not in train, "seq_len", train.get("seq_len"), allowed)
        given = {"seq_len": 1}
    parts = {"train": parse(TrainConfig, train, "[train]", given=given), "lora": parse(Adapter, lora, "[lora]")}
    recipe = parse(FinetuneRecipe, table, path.name, given=parts | {"text": read_text(path, "recipe")})
    allowed = f"no such table for the method {recipe.method!r}"
    require(recipe.method == "lora" or not lora, "[lora]", lora, allowed)
    return recipe


# ---------------------------------------------------------------------------------------------- the work


def finetune_recipe(
    recipe: FinetuneRecipe,
    out: str | Path,
    *,
    settings: Settings | None = None,
    rt: Runtime | None = None,
    say: Callable[[str], None] = print,
    command: str = "",
) -> Path:
    """Train a model that is there on a text, on labels or on chats, measure before and after, and write what came out.

    Everything goes into `out`: `checkpoints/`, and at the end `result/` with `adapter/` (peft's format) or `model/`,
    or both, and a card. A run that was stopped goes on where it was when the same command is given again.

    Args:
        command: what the card says it was made by.
    Returns:
        The folder `result`; `load_tuned` reads it, and `load_model` its `model`.
    Raises:
        BadInput: a recipe, text, model or machine that cannot work (before anything is written), a folder of another
            run, or one in which another process is at work.
    """
    settings = settings or load_settings()
    rt = Runtime.of(rt, settings=settings)
    require(rt.world_size == 1, "WORLD_SIZE", rt.world_size, "1: finetune runs in one process (train takes several)")
    check_machine(recipe.train, rt)
    base = load_model(recipe.model, rt=rt, settings=settings)
    job = _job(recipe, base, settings, rt)
    inputs = {"recipe": dataclasses.asdict(recipe), "texts": job.digest, "base": job.fingerprint}
    inputs |= {"scale": dataclasses.asdict(settings.scale)} if recipe.task != "classify" else {}
    same = "a folder of this recipe with this model, these texts and this scale"
    with run_folder(out, inputs, same=same, target=RESULT, command="finetune") as folder:
        if is_made(folder / RESULT):
            say(f"{folder / RESULT} is there")
            return folder / RESULT
        model = job.prepared()
        own, all_of_it = trainable(model)
        say(f"{recipe.method}: {own:,} of {all_of_it:,} numbers are trained")
        result = job.train(model, folder / "checkpoints", say)
        rows = job.measured(model, say)
        return _write(job, model, folder / RESULT, result, rows, command)


def _job(recipe: FinetuneRecipe, base: LoadedModel, settings: Settings, rt: Runtime) -> _Job:
    return {"classify": _Labels, "language": _Reading, "chat": _Chats}[recipe.task](recipe, base, settings, rt)


def check_finetuning(recipe: FinetuneRecipe, base: LoadedModel, settings: Settings, rt: Runtime) -> None:
    """Raise BadInput for whatever `finetune_recipe` would refuse; nothing is written."""
    check_machine(recipe.train, rt)
    _job(recipe, base, settings, rt)


def _digest(records: list[dict], *fields: str) -> str:
    found = hashlib.sha256()
    for r in records:
        found.update(json.dumps([r["split"], r["text"], *(r.get(f) for f in fields)], default=str).encode())
    return found.hexdigest()[:16]


class Row(NamedTuple):
    """A line of the card's table, and what `result.json` holds of it."""

    cells: tuple[str, ...]
    numbers: dict[str, Any]


class _Job:
    """What the tasks share: a recipe, a base, and texts that were looked at before anything is written."""

    digest: str
    head: tuple[str, ...]

    def __init__(self, recipe: FinetuneRecipe, base: LoadedModel, settings: Settings, rt: Runtime):
        self.recipe, self.base, self.settings, self.rt = recipe, base, settings, rt
        self.limit, self.fingerprint = positions_of(base.model), base_fingerprint(base.model)
        packed = any(hasattr(m, "passport_counts") for m in base.model.modules())
        full = recipe.method == "full"
        require(not (packed and full), "method", "full", "lora or head for a packed model: codes cannot be trained")
        self.packed = packed
        self.prepared()  # whatever the recipe says that this model cannot do

    def enough(self, n: int, least: int, found: str, allowed: str) -> None:
        """Refuse data of which there is too little, in one sentence."""
        if n < least:
            raise BadInput(f"data is {self.recipe.data!r}, with {found}; allowed: {allowed}.")

    def told(self) -> dict[str, Any]:
        """What `load_tuned` has to know."""
        recipe = self.recipe
        about = {"task": recipe.task, "method": recipe.method, "base": recipe.model}
        return about | {"fingerprint": self.fingerprint}

    def body(self, model: nn.Module, **also: Any) -> nn.Module:
        """The model with what is trained in it, by the recipe's method."""
        recipe = self.recipe
        if recipe.method == "lora":
            return add_lora(model, **dataclasses.asdict(recipe.lora), seed=recipe.train.seed, **also)
        return model.requires_grad_(True)


class _Causal(_Job):
    """A language model, which is one afterwards, too; texts are measured before and after."""

    tokenizer: Any
    tests: dict[str, Text]

    def _test(self, name: str) -> Text:
        from llmcourse.jobs import bounded
        from llmcourse.measure import as_text

        settings = dataclasses.replace(self.settings, data=name)
        self.scale = bounded(settings.scale, self.limit)
        documents = [r["text"] for r in load_records(name, "test", settings=settings)]
        return as_text(self.base.tokenizer, documents, "test", settings, self.scale.context)

    def prepared(self) -> nn.Module:
        model = self.base.model if self.recipe.method == "lora" else copy.deepcopy(self.base.model)
        return self.body(model)

    def measured(self, model: nn.Module, say: Callable[[str], None]) -> list[Row]:
        rows = []
        for name, text in self.tests.items():
            how = {"context": self.scale.context, "stride": self.scale.stride, "batch_size": self.scale.batch_size}
            before, after = (
                perplexity(m, text, **how, rt=self.rt, model=what)
                for m, what in ((self.base.model, self.base.card.name), (model, self.recipe.name))
            )
            ratio = compare_perplexity(before, after)
            say(f"{name}: perplexity {before.value:.2f} before, {after.value:.2f} after, {ratio}")
            rows.append(_reading_row(name, before, after, ratio))
        return rows

    def write(self, model: nn.Module, folder: Path) -> list[str]:
        made = []
        if self.recipe.method == "lora":
            save_adapter(model, folder / "adapter", base=self.recipe.model)
            back = load_adapter(self.base.model, folder / "adapter")
            _same(model, back, "adapter")
            made.append("`adapter/` is the adapter alone, in peft's format")
            if self.packed:
                return made
            model = merge(model)
        _save_model(model, self.tokenizer, folder / "model", self.rt)
        return [*made, "`model/` is a model folder that `load_model` and transformers read"]


class _Reading(_Causal):
    """Language modeling on another text."""

    head = ("test part of", "perplexity before", "after", "after / before")

    def __init__(self, recipe: FinetuneRecipe, base: LoadedModel, settings: Settings, rt: Runtime):
        super().__init__(recipe, base, settings, rt)
        cfg, self.tokenizer = recipe.train, base.tokenizer
        fits = self.limit is None or cfg.seq_len <= self.limit
        require(fits, "seq_len", cfg.seq_len, f"at most {self.limit}, what the model can read")
        names = (recipe.data, *recipe.beside)
        records = {name: load_records(name, settings=settings) for name in names}
        self.digest = "-".join(_digest(r) for r in records.values())
        self.records = records[recipe.data]
        parts = {"train": None} | ({"val": None} if cfg.eval_every else {})
        self.data: TokenData = token_data(base.tokenizer, recipe.data, limits=parts, settings=settings)
        for part in parts:
            n, least = len(getattr(self.data, part)), cfg.seq_len + 1
            allowed = f"at least {least} (documents are dealt out whole: take more of them)"
            self.enough(n, least, f"{n} tokens in its {part} part", allowed)
        self.tests = {name: self._test(name) for name in names}

    def train(self, model: nn.Module, out: Path, say: Callable[[str], None]) -> TrainResult:
        return train(model, self.data, self.recipe.train, rt=self.rt, out=out, say=say)

    def protocols(self, rows: list[Row]) -> str:
        test, seen = ([r["text"] for r in self.records if r["split"] == part] for part in ("test", "train"))
        found = leak_test(test, seen)
        shared = (
            f"{len(found.flagged)} of {found.tested} test documents of {self.recipe.data} share {found.n} words in a "
            "row with its training part: what is gained on them may be repetition"
        )
        return "\n\n".join([*(row.numbers["protocol"] for row in rows), shared])


def _reading_row(name: str, before: Perplexity, after: Perplexity, ratio: Ratio) -> Row:
    numbers = {"data": name, "before": before.value, "after": after.value, "ratio": ratio.value, "low": ratio.low}
    numbers |= {"high": ratio.high, "level": ratio.level, "protocol": str(after.protocol)}
    return Row((name, *map(str, (before, after, ratio))), numbers)


class _Chats(_Causal):
    """Answers in chats: only what the assistant writes counts."""

    head = ("test part of", "perplexity before", "after", "after / before")

    def __init__(self, recipe: FinetuneRecipe, base: LoadedModel, settings: Settings, rt: Runtime):
        super().__init__(recipe, base, settings, rt)
        self.tokenizer = base.tokenizer
        if not getattr(base.tokenizer, "chat_template", None):
            self.tokenizer = copy.deepcopy(base.tokenizer)
            self.tokenizer.chat_template = COURSE_TEMPLATE
        lengths = (n for n in (recipe.longest, self.limit) if n is not None)
        self.longest, records = min(lengths, default=None), load_records(recipe.data, settings=settings)
        patterns = [p for p in (recipe.question, recipe.answer) if p is not None]
        fields = [name for p in patterns for name in fields_of(p, "question")] or ["messages"]
        beside = {name: load_records(name, settings=settings) for name in recipe.beside}
        self.digest = "-".join([_digest(records, *fields), *map(_digest, beside.values())])
        self.chats: dict[str, list[Turns]] = {part: [] for part in SPLITS}
        self.left_out = 0
        for i, record in enumerate(records):
            chat = _chat(record, recipe, i)
            fits, part = self._fits(chat), record["split"]
            self.left_out += not fits
            if fits and (part != "test" or len(self.chats[part]) < recipe.most):
                self.chats[part].append(chat)
        room = "" if self.longest is None else f" of at most {self.longest} tokens"
        for part, least in (("train", 1), ("test", FEWEST)):
            n = len(self.chats[part])
            self.enough(n, least, f"{n} chats{room} in its {part} part", f"at least {least}")
        looks = not recipe.train.eval_every or bool(self.chats["val"])
        require(looks, "eval_every", recipe.train.eval_every, f"0: no chat{room} lies in the validation part")
        self.data = {part: Chats(self.tokenizer, chats) for part, chats in self.chats.items() if chats}
        self.tests = {name: self._test(name) for name in recipe.beside}

    def _fits(self, chat: Turns) -> bool:
        return self.longest is None or len(encode_chat(self.tokenizer, chat).ids) <= self.longest

    def train(self, model: nn.Module, out: Path, say: Callable[[str], None]) -> TrainResult:
        val = self.data["val"] if self.recipe.train.eval_every else None
        return tune(model, self.data["train"], self.recipe.train, val=val, rt=self.rt, out=out, say=say)

    def measured(self, model: nn.Module, say: Callable[[str], None]) -> list[Row]:
        rows = []
        dealt = [chat for chat in _dealt(self.chats["test"]) if self._fits(chat)]  # one's question, another's answer
        others = {"answers": self.data["test"]}
        others |= {SHUFFLED: Chats(self.tokenizer, dealt)} if len(dealt) >= FEWEST else {}
        for what, chats in others.items():
            before, after = [self._losses(m, chats) for m in (self.base.model, model)]
            was, now = (math.exp(statistics.fmean(losses)) for losses in (before, after))
            ratio, low, high = (math.exp(v) for v in paired(before, after)[:3])
            shown = f"{ratio:.4f}× ({low:.4f} to {high:.4f})"
            say(f"{what}: perplexity {was:.2f} before, {now:.2f} after, {shown}")
            numbers = {"data": self.recipe.data, "what": what, "before": was, "after": now}
            numbers |= {"ratio": ratio, "low": low, "high": high, "level": 0.95}
            rows.append(Row((f"{self.recipe.data}: {what}", f"{was:.2f}", f"{now:.2f}", shown), numbers))
        return rows + super().measured(model, say)

    @torch.no_grad()
    def _losses(self, model: nn.Module, chats: Chats) -> list[float]:
        """Mean of -ln p over the answer of each chat."""
        found: list[float] = []
        with evaluating(model):
            for i in range(0, len(chats), 16):
                batch = chat_batch(chats.examples[i : i + 16])
                found += example_loss(model, {k: self.rt.move(v) for k, v in batch.items()}).tolist()
        return found

    def told(self) -> dict[str, Any]:
        return super().told() | {"template": self.tokenizer.chat_template}

    def protocols(self, rows: list[Row]) -> str:
        sizes = ", ".join(f"{part} {len(data):,}" for part, data in self.data.items())
        own = "the tokenizer's own template" if self.tokenizer is self.base.tokenizer else "the course's template"
        answers = (
            f"chats: {sizes}; {self.left_out:,} longer ones left out; {own}; the perplexity of answers is that of a "
            f"token, every chat with the same weight; intervals: pairs of chats, made for 95 %. {SHUFFLED!r}: each "
            "answer stands under another question, which takes away all that the question tells"
        )
        return "\n\n".join([answers, *(row.numbers["protocol"] for row in rows if "protocol" in row.numbers)])


SHUFFLED = "answers to other questions"


def _chat(record: dict, recipe: FinetuneRecipe, i: int) -> Turns:
    """The turns of a document: its `messages`, or question and answer from its fields."""
    where = f"document {i} of {recipe.data}"
    if recipe.question is None:
        chat = record.get("messages")
        good = isinstance(chat, list) and any(isinstance(t, dict) and t.get("role") == "assistant" for t in chat)
        allowed = "rows with a list 'messages' in which the assistant speaks, or question and answer in the recipe"
        if not good:
            raise BadInput(f"{where} has no messages of an assistant; allowed: {allowed}.")
        return chat
    said = []
    for pattern in (recipe.question, recipe.answer):
        missing = [n for n in fields_of(pattern, "question") if not isinstance(record.get(n), (str, int, float))]
        if missing:
            allowed = f"one that holds a text or a number for it (it has {', '.join(sorted(record))})"
            raise BadInput(f"{where} has no field {missing[0]!r}; allowed: {allowed}.")
        said.append(pattern.format(**record))
    return turns(*said)


def _dealt(chats: list[Turns]) -> list[Turns]:
    """The same questions, each with the last answer of the next chat: a null control."""
    last = lambda chat: max(k for k, turn in enumerate(chat) if turn["role"] == "assistant")
    answers = [chat[last(chat)] for chat in chats]
    return [
        [*chat[: last(chat)], answers[(i + 1) % len(chats)], *chat[last(chat) + 1 :]] for i, chat in enumerate(chats)
    ]


class _Labels(_Job):
    """A label for each text."""

    head = ("on the same test texts", "share right", "minus finetuned (95 %)", "word (Holm)")

    def __init__(self, recipe: FinetuneRecipe, base: LoadedModel, settings: Settings, rt: Runtime):
        records = load_records(recipe.data, settings=settings)
        labels = [_label(r, recipe) for r in records]
        often = Counter(c for r, c in zip(records, labels) if c is not None and r["split"] == "train")
        few, wanted = recipe.per_class or 1, recipe.classes or 2
        enough = sorted((c for c in often if often[c] >= few), key=lambda c: (-often[c], c))
        found = f"{len(enough)} labels in the field {recipe.label!r} that have {few} or more texts to train on"
        self.recipe = recipe
        self.enough(len(enough), wanted, found, f"at least {wanted} such labels")
        self.names, self.often = sorted(enough[: recipe.classes]), often
        self.digest = _digest(records, recipe.label)
        number_of = {name: i for i, name in enumerate(self.names)}
        self.pairs: dict[str, list[tuple[str, int]]] = {part: [] for part in SPLITS}
        for record, label in zip(records, labels):
            if label in number_of:
                self.pairs[record["split"]].append((record["text"], number_of[label]))
        if recipe.per_class is not None:
            self.pairs["train"] = draw_labels(self.pairs["train"], recipe.per_class, recipe.train.seed)
        self.pairs["test"] = self.pairs["test"][: recipe.most]
        n = len(self.pairs["test"])
        self.enough(n, FEWEST, f"{n} labeled texts in its test part", f"at least {FEWEST}: fewer say nothing")
        looks = not recipe.train.eval_every or bool(self.pairs["val"])
        require(looks, "eval_every", recipe.train.eval_every, "0: no labeled text lies in the validation part")
        super().__init__(recipe, base, settings, rt)
        lengths = (n for n in (recipe.cut, self.limit) if n is not None)
        self.cut = min(lengths, default=None)
        self.data = {part: self._labeled(self.pairs[part]) for part in SPLITS if self.pairs[part]}

    def _labeled(self, pairs: list[tuple[str, int]]) -> Labeled:
        texts, classes = zip(*pairs)
        return Labeled(self.base.tokenizer, texts, classes, n_classes=len(self.names), cut=self.cut)

    def _untouched(self) -> Classifier:
        return Classifier(
            self.base.model, len(self.names), pool=self.recipe.pool, seed=self.recipe.train.seed
        ).requires_grad_(True)

    def prepared(self) -> nn.Module:
        model = self._untouched()
        return head_only(model) if self.recipe.method == "head" else self.body(model, also="score")

    def train(self, model: nn.Module, out: Path, say: Callable[[str], None]) -> TrainResult:
        val = self.data["val"] if self.recipe.train.eval_every else None
        return finetune(model, self.data["train"], self.recipe.train, val=val, rt=self.rt, out=out, say=say)

    def measured(self, model: nn.Module, say: Callable[[str], None]) -> list[Row]:
        own = self._right(predict(model, self.data["test"]))
        say(f"share right {own}")
        others = {
            "most frequent class": self._right(self._most_frequent()),
            "counted words (TF-IDF), logistic regression": self._right(self._by_words()),
            "untouched model's vectors, logistic regression": self._right(self._by_frozen()),
        }
        rows = [Row((self.recipe.name, str(own), "", ""), {"method": "finetuned", "right": own.value})]
        for name, c in compare_accuracy(own, others).items():
            d = c.difference
            cells = (name, str(others[name]), f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})", c.word)
            numbers = {"method": name, "right": others[name].value, "minus": d.value, "low": d.low, "high": d.high}
            rows.append(Row(cells, numbers | {"word": c.word}))
        return rows

    def _right(self, scores: Tensor) -> Accuracy:
        truth = torch.tensor(self.data["test"].classes)
        return Accuracy(hits=(scores.argmax(1).cpu() == truth).numpy(), chance=1 / len(self.names))

    def _most_frequent(self) -> Tensor:
        counts = torch.tensor([self.often[name] for name in self.names])  # of the whole training part
        return counts.expand(len(self.data["test"]), -1)

    def _by_words(self) -> Tensor:
        """The words that the model reads, and no others."""
        read = {part: [self.base.tokenizer.decode(ids) for ids in self.data[part].ids] for part in ("train", "test")}
        return self._regression(*(tf_idf(read["train"], read[part]) for part in ("train", "test")), C=1.0)

    def _by_frozen(self) -> Tensor:
        model = self._untouched().eval()
        return self._regression(
            *standardized(*(frozen_features(model, self.data[p]) for p in ("train", "test"))), C=0.01
        )

    def _regression(self, train: Tensor, test: Tensor, *, C: float) -> Tensor:
        W, b = logistic_regression(train, self.data["train"].classes, n_classes=len(self.names), C=C)
        return test @ W.T + b

    def write(self, model: nn.Module, folder: Path) -> list[str]:
        recipe = self.recipe
        if recipe.method == "lora":
            save_adapter(model, folder / "adapter", base=recipe.model)
            made = "`adapter/` is adapter and head, in peft's format"
        else:
            save_file({k: v.contiguous() for k, v in model.score.state_dict().items()}, folder / HEAD)
            made = f"`{HEAD}` is the head"
            if recipe.method == "full":
                _save_model(model.model, self.base.tokenizer, folder / "model", self.rt)
                made += ", `model/` the model under it"
        back = _classifier(folder, self.base.model, self.told(), self.rt, self.settings)
        _same(model, back, "classifier")
        return [f"{made}; `llmcourse.tuning.load_tuned` puts them together"]

    def told(self) -> dict[str, Any]:
        return super().told() | {"pool": self.recipe.pool, "labels": self.names, "cut": self.cut}

    def protocols(self, rows: list[Row]) -> str:
        sizes = ", ".join(f"{part} {len(data):,}" for part, data in self.data.items())
        read = "all tokens" if self.cut is None else f"at most {self.cut} tokens"
        return (
            f"{len(self.names)} labels from the field {self.recipe.label!r}; texts: {sizes}; {read} of a text are "
            "read, by the baselines too; intervals: Wilson, pairs by McNemar; regressions: C = 1 and 0.01"
        )


def _label(record: dict, recipe: FinetuneRecipe) -> str | None:
    """The label of a document as text; None where it has none, or one that is left out."""
    value = record.get(recipe.label)
    label = str(value).strip() if isinstance(value, (str, int)) else ""
    return label if label and label not in recipe.without else None


# ---------------------------------------------------------------------------------------------- what is written


def _save_model(model: nn.Module, tokenizer: Any, folder: Path, rt: Runtime) -> None:
    """A model folder, and a look whether it holds the same weights."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _same(model, load_model(folder, rt=rt).model, "model")


def _same(ours: nn.Module, back: nn.Module, what: str) -> None:
    a, b = ours.state_dict(), back.state_dict()
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    require(same, f"{what} that was read back", "other numbers", "the same (is the disk broken?)")


def _write(job: _Job, model: nn.Module, target: Path, result: TrainResult, rows: list[Row], command: str) -> Path:
    """Adapter or model, card, loss curve and numbers, in one go."""
    from llmcourse.plotting import save

    recipe = job.recipe
    with atomic_folder(target) as partial:
        made = job.write(model, partial)
        told = job.told() | {"rows": [r.numbers for r in rows]}
        told |= {"losses": [round(v, 5) for v in result.losses], "val": result.val, "seconds": result.seconds}
        (partial / ABOUT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf8")
        (partial / "README.md").write_text(_card(job, model, result, rows, made, command), encoding="utf8")
        save(training_curve(result), partial / "loss.svg")
        for file in partial.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for the owner only
        write_manifest(partial, name=recipe.name, license=recipe.license)
    return target


def _card(job: _Job, model: nn.Module, result: TrainResult, rows: list[Row], made: list[str], command: str) -> str:
    import transformers

    recipe, cfg = job.recipe, job.recipe.train
    own, all_of_it = trainable(model)
    texts = [CATALOG[n] for n in (recipe.data,) if n in CATALOG]
    source = f" ({texts[0].what}; {texts[0].license}; {texts[0].origin})" if texts else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    adapter = dataclasses.asdict(recipe.lora) if recipe.method == "lora" else {}
    how = "".join(f", {key} {value}" for key, value in adapter.items())
    table = "\n".join(f"| {' | '.join(row.cells)} |" for row in rows)
    what = "\n".join(f"- {line}." for line in made)
    return f"""---
language: en
license: other
license_name: {recipe.license}
library_name: llmcourse
---

# {recipe.name}

{recipe.model}, fine-tuned on {recipe.data}{source}. Task: {recipe.task}.

- **Made by** `{command or "llmcourse.tuning.finetune_recipe"}`, seed {cfg.seed}, {versions}.
- **Method** {recipe.method}: {own:,} of {all_of_it:,} numbers were trained{how}.
- **Training** {result.steps:,} steps of {cfg.batch_size} texts, {result.targets:,} targets, {cfg.optimizer}, peak \
learning rate {cfg.lr:g}, in {result.seconds / 60:.1f} minutes on {job.rt.describe().split(", ")[0]}.
- **License** {recipe.license}.

| {" | ".join(job.head)} |
|{"---|" * len(job.head)}
{table}

```
{job.protocols(rows)}
```

![Loss against the step](loss.svg)

## Files

{what}

## Limits

One run with one seed: another seed gives other numbers. {recipe.limits}

## Recipe

```toml
{recipe.text.strip()}
```
"""


# ---------------------------------------------------------------------------------------------- reading it back


class Tuned(NamedTuple):
    """A fine-tuned model of a folder that `llmcourse finetune` wrote."""

    model: nn.Module
    """a `Classifier`, or a language model; its tokenizer has the template that it was trained with"""
    tokenizer: Any
    labels: list[str]
    """names of the classes; empty for a language model"""
    cut: int | None
    """tokens of a text that a classifier was trained on"""

    def classify(self, texts: list[str]) -> list[str]:
        """The label of each text."""
        require(bool(self.labels), "model", "a language model", "a classifier")
        data = Labeled(self.tokenizer, texts, [0] * len(texts), n_classes=len(self.labels), cut=self.cut)
        return [self.labels[i] for i in predict(self.model, data).argmax(1).tolist()]


def load_tuned(folder: str | Path, *, rt: Runtime | None = None, settings: Settings | None = None) -> Tuned:
    """A classifier or language model that `llmcourse finetune` wrote, with its base.

    Args:
        folder: `result` of a run.
    Raises:
        BadInput: no whole folder, or a base with other weights than those it was trained on.
    """
    folder, settings = Path(folder), settings or load_settings()
    rt = Runtime.of(rt, settings=settings)
    there = (folder / MANIFEST).is_file() and (folder / ABOUT).is_file()
    faults = manifest_faults(folder) if there else [f"lacks {ABOUT} or {MANIFEST}"]
    require(not faults, "folder", f"{folder}, which {' and '.join(faults)}", "one that `llmcourse finetune` wrote")
    about = json.loads((folder / ABOUT).read_text(encoding="utf8"))
    if about["task"] != "classify" and (folder / "model").is_dir():
        found = load_model(folder / "model", rt=rt, settings=settings)
        return Tuned(found.model, found.tokenizer, [], None)
    base = load_model(about["base"], rt=rt, settings=settings)
    if about["task"] != "classify":  # an adapter on a packed model
        base.tokenizer.chat_template = about.get("template", getattr(base.tokenizer, "chat_template", None))
        return Tuned(load_adapter(base.model, folder / "adapter").eval(), base.tokenizer, [], None)
    model = _classifier(folder, base.model, about, rt, settings)
    return Tuned(model.eval(), base.tokenizer, about["labels"], about["cut"])


def _classifier(folder: Path, base: nn.Module, about: dict, rt: Runtime, settings: Settings) -> nn.Module:
    method = about["method"]
    if method == "full":
        base = load_model(folder / "model", rt=rt, settings=settings).model
    elif method == "head":
        mine, made = base_fingerprint(base), about["fingerprint"]
        require(mine == made, "base", f"{about['base']} with fingerprint {mine}", f"the one it was trained on, {made}")
    model = Classifier(base, len(about["labels"]), pool=about["pool"])
    if method == "lora":
        return load_adapter(model, folder / "adapter")
    model.score.load_state_dict(load_file(folder / HEAD))
    return model

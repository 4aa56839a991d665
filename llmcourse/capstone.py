"""`llmcourse capstone`: adapt a model to a text, compress it in several ways, choose, export, serve, ask, report.

Hand-written: the lessons are in the chapters; `nbs/18_capstone.ipynb` reads what this has made. Every step leaves its
result in the output folder, so a run that was stopped goes on there. What can be known before the work is checked
before it. The choice is made on the validation part by a rule that the recipe states, and judged on the test part.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmcourse.recipes import Arm
from llmcourse.schema import parse, read_toml
from llmcourse.settings import BadInput, Settings, load_settings, number, one_of, read_text, require, whole
from llmcourse.store import CATALOG, atomic_folder, digests, write_atomic, write_manifest
from llmcourse.training import TrainConfig
from llmcourse.tuning import METHODS, Adapter, in_place

if TYPE_CHECKING:
    from llmcourse.accuracy import Item
    from llmcourse.evaluation import Text

__all__ = ["CapstoneRecipe", "capstone", "choose", "continuation_items", "load_capstone_recipe"]

RESULT, REPORT, NUMBERS = "result", "report.html", "capstone.json"
ORIGINAL, ADAPTED, AGAIN = "original", "adapted", "the first again"
PARTS = ("val", "test")
NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """The `[adapt]` table: how the model goes on reading the text before it is compressed."""

    train: TrainConfig
    method: str = "lora"
    lora: Adapter = field(default_factory=Adapter)

    def __post_init__(self):
        one_of("method", self.method, METHODS[:2])


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The `[choose]` table: what a compressed model may cost, as ratios of perplexities."""

    own: float = 1.1
    """on the text, against the model before compression"""
    beside: float = 1.5
    """on each text beside it, against the original model"""

    def __post_init__(self):
        number("own", self.own, 1)
        number("beside", self.beside, 1)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compress: an arm, what it starts from, and the text it is calibrated on."""

    arm: Arm
    of: str
    calib: str | None = None


@dataclass(frozen=True, kw_only=True)
class CapstoneRecipe:
    """What `capstone` does; from `load_capstone_recipe`."""

    name: str
    description: str
    model: str
    data: str
    license: str
    limits: str
    """what a reader of the report should know"""
    candidates: tuple[Candidate, ...]
    adapt: Adapt | None = None
    choose: Bounds = Bounds()
    beside: tuple[str, ...] = ()
    """texts on which it is measured what was forgotten"""
    export: tuple[str, ...] = ()
    """forms for other programs, as in `llmcourse export --to`"""
    ask: tuple[str, ...] = ()
    """beginnings that the served model goes on from; none: those of test documents"""
    validation: int = 1
    """so many times as many tokens as the scale says are read of the validation part, on which the choice rests"""
    items: int = 60
    """multiple-choice items of each text, at most"""
    answers: int = 24
    """test documents that are continued, at most"""
    text: str = ""
    """the file itself"""

    def __post_init__(self):
        plain = self.name.isprintable() and 0 < len(self.name.strip()) <= 60 and not set(self.name) & set("<>&`/\\")
        allowed = "a text of 1 to 60 characters without control characters, <, >, &, ` and slashes"
        require(plain, "name", self.name, allowed)
        for key in ("description", "model", "data", "license", "limits"):
            require(bool(getattr(self, key).strip()), key, getattr(self, key), "a text")
        whole("validation", self.validation, 1)
        whole("items", self.items, 1)
        whole("answers", self.answers, 2)
        names = [self.data, *self.beside]
        require(len(set(names)) == len(names), "beside", list(self.beside), "other texts than data, each once")
        require(len(self.candidates) > 0, "arm", [], "one or more [[arm]] tables")
        slugs = [c.arm.slug for c in self.candidates]
        called = [c.arm.name for c in self.candidates]
        taken = {f"arm-{name}" for name in (ORIGINAL, ADAPTED)}
        differ = len(set(slugs)) == len(slugs) and not taken & set(slugs)
        require(differ, "names of the arms", called, f"names that differ in their letters, none {ORIGINAL}, {ADAPTED}")
        for c in self.candidates:
            known = (ORIGINAL, ADAPTED) if self.adapt else (ORIGINAL,)
            one_of(f"of in arm {c.arm.name!r}", c.of, known)
        from llmcourse.portable import TARGETS

        for target in self.export:
            one_of("export", target, TARGETS)
        require(len(set(self.export)) == len(self.export), "export", list(self.export), "each once")
        for prompt in self.ask:
            require(bool(prompt.strip()), "ask", prompt, "texts that are not empty")

    @property
    def reference(self) -> str:
        """The model that the compressed ones are compared with on the text."""
        return ADAPTED if self.adapt else ORIGINAL


def load_capstone_recipe(path: str | Path, *, model: str | None = None, data: str | None = None) -> CapstoneRecipe:
    """Read a recipe file and check all of it.

    Args:
        model, data: in place of the recipe's, which then says nothing of license and limits. Other data are asked by
            the beginnings of their own test documents.
    Raises:
        BadInput: not TOML, a key that is missing or unknown, or a value that is not allowed.
    """
    path = Path(path)
    own = read_toml(path)
    table = in_place(own, model=model, data=data)
    if table != own and "description" in table:
        named = " and ".join(Path(str(table.get(key))).name for key in ("model", "data"))
        table["description"] = f"The recipe {path.stem} with {named}"
    if table.get("data") != own.get("data"):
        table.pop("ask", None)
        if isinstance(table.get("beside"), list):
            table["beside"] = [name for name in table["beside"] if name != data]
    adapt, arms = table.pop("adapt", None), table.pop("arm", [])
    given: dict[str, Any] = {"text": read_text(path, "recipe"), "adapt": None}
    if adapt is not None:
        require(isinstance(adapt, dict), "[adapt]", adapt, "a table")
        train, lora = adapt.pop("train", None), adapt.pop("lora", {})
        require(isinstance(train, dict), "[adapt.train]", train, "a table with steps, batch_size and lr")
        parts = {"train": parse(TrainConfig, train, "[adapt.train]"), "lora": parse(Adapter, lora, "[adapt.lora]")}
        given["adapt"] = parse(Adapt, adapt, "[adapt]", given=parts)
    require(isinstance(arms, list), "arm", arms, "[[arm]] tables")
    given["candidates"] = tuple(_candidate(i, arm, adapt is not None) for i, arm in enumerate(arms, 1))
    given["choose"] = parse(Bounds, table.pop("choose", {}), "[choose]")
    return parse(CapstoneRecipe, table, path.name, given=given)


def _candidate(i: int, table: Any, adapted: bool) -> Candidate:
    where = f"[[arm]] number {i}"
    require(isinstance(table, dict), where, table, "a table")
    table = dict(table)
    of, calib = table.pop("of", ADAPTED if adapted else ORIGINAL), table.pop("calib", None)
    require(isinstance(of, str), f"of in {where}", of, f"{ORIGINAL} or {ADAPTED}")
    require(calib is None or isinstance(calib, str), f"calib in {where}", calib, "the name of a text, or a file")
    return Candidate(arm=parse(Arm, table, where), of=of, calib=calib)


# ------------------------------------------------------------------------------------- items, answers, the choice


def continuation_items(
    documents: Sequence[str], n: int, *, before: int = 60, after: int = 12, choices: int = 4, seed: int = 0
) -> list[Item]:
    """Items "which words follow?", with words of other documents as wrong choices: any text will do.

    Args:
        documents: one item is made of each that has enough words; its first half is what is read.
        n: items at most.
        before, after: words that are read, and words of a choice, at most.
    Raises:
        BadInput: fewer documents with words enough than an item has choices.
    """
    from llmcourse.accuracy import Item

    rng = random.Random(whole("seed", seed, 0))
    cut = []
    for text in documents:
        words = list(re.finditer(r"\S+", text))
        half = len(words) // 2
        if half >= after:
            start = words[max(0, half - before)].start()
            end = words[half + after - 1].end()
            cut.append((text[start : words[half - 1].end()], text[words[half - 1].end() : end]))
    allowed = f"at least {choices} documents of {2 * after} words"
    require(len(cut) >= choices, "documents", f"{len(cut)} with {2 * after} words", allowed)
    items = []
    for k in rng.sample(range(len(cut)), min(n, len(cut))):
        context, right = cut[k]
        gap = right[: len(right) - len(right.lstrip())]
        # what stands between the words (a space, a new line) must not give the answer away
        pool = {gap + wrong.lstrip() for j, (_, wrong) in enumerate(cut) if j != k} - {right}
        if len(pool) >= choices - 1:
            shown = [right, *rng.sample(sorted(pool), choices - 1)]
            rng.shuffle(shown)
            items.append(Item(context=context, choices=tuple(shown), answer=shown.index(right)))
    require(len(items) > 0, "documents", f"{len(cut)} whose continuations are alike", f"{choices} that differ")
    return items


class Opening(NamedTuple):
    """The beginning of a document, and how it goes on."""

    prompt: str
    reference: str


def openings(documents: Sequence[str], n: int, *, before: int = 40, after: int = 24) -> list[Opening]:
    """The first words of documents, at most half of them, and the words that follow."""
    found = []
    for text in documents:
        words = list(re.finditer(r"\S+", text))
        k = min(before, len(words) // 2)
        if k >= 4:
            end = words[min(k + after, len(words)) - 1].end()
            found.append(Opening(text[: words[k - 1].end()], text[words[k - 1].end() : end].strip()))
    return found[:n]


def choose(rows: Sequence[Mapping[str, Any]], bounds: Bounds) -> str | None:
    """The name of the smallest candidate whose cost is shown to stay within the bounds; None: of none it is shown.

    Args:
        rows: of each candidate name, bytes_disk and `val`: text -> ratio with its bound (own, beside), high and level.
    """
    shown = lambda r: r["level"] is not None and r["high"] <= getattr(bounds, r["bound"])
    fit = [row for row in rows if all(map(shown, row["val"].values()))]
    return min(fit, key=lambda row: row["bytes_disk"])["name"] if fit else None


# --------------------------------------------------------------------------------------------------- the work


def capstone(
    recipe: CapstoneRecipe,
    out: str | Path,
    *,
    settings: Settings | None = None,
    say: Callable[[str], None] = print,
    command: str = "",
) -> Path:
    """Adapt, compress, measure, choose, export, serve and ask; `out/result` has the model and the report.

    A run that was stopped goes on where it was when the same command is given again.

    Args:
        command: what the report says it was made by.
    Returns:
        `out/result`, with `model/`, the exports, `report.html` and `capstone.json`.
    Raises:
        BadInput: a recipe, model or text that cannot work (before anything is written), a folder of another run, or
            one in which another process is at work.
    """
    from llmcourse.runfolder import is_made, run_folder

    settings = settings or load_settings()
    job = _Capstone(recipe, settings, say, command)
    same = "a folder of this recipe with this model, these texts, this scale and this version of the course"
    with run_folder(out, job.inputs, same=same, target=RESULT, command="capstone") as folder:
        if is_made(folder / RESULT):
            say(f"{RESULT} is there and whole: nothing to do")
        else:
            job.run(folder)
        return folder / RESULT


class _Capstone:
    """The steps of one run, after everything was looked at that they need."""

    def __init__(self, recipe: CapstoneRecipe, settings: Settings, say: Callable[[str], None], command: str):
        from llmcourse.compression import check_passes
        from llmcourse.data import load_model, load_records
        from llmcourse.jobs import bounded, digests_of_code, model_folder
        from llmcourse.modelfolder import positions_of
        from llmcourse.readers import data_source
        from llmcourse.runtime import Runtime

        self.recipe, self.say, self.command = recipe, say, command
        self._check_programs()
        self.rt = Runtime.auto(settings.device, settings.dtype)
        self.folder = model_folder(recipe.model, settings)
        base = load_model(recipe.model, rt=self.rt, settings=settings)
        packed = any(hasattr(m, "passport_counts") for m in base.model.modules())
        require(not packed, "model", recipe.model, "a dense model: this one is compressed already")
        self.limit = positions_of(base.model)
        self.settings = dataclasses.replace(settings, scale=bounded(settings.scale, self.limit))
        self.tokenizer, self.card = base.tokenizer, base.card
        # a file is called by its name, not by where it lies
        self.data, *self.beside = called = [Path(name).name for name in (recipe.data, *recipe.beside)]
        require(len(set(called)) == len(called), "beside", list(recipe.beside), f"texts whose names differ: {called}")
        names = dict(zip(called, (recipe.data, *recipe.beside)))
        self.records = {name: load_records(source, settings=settings) for name, source in names.items()}
        of = lambda name, part: [r["text"] for r in self.records[name] if r["split"] == part]
        self.texts = {(name, part): self._text(name, of(name, part), part) for name in self.records for part in PARTS}
        self.items = {n: continuation_items(of(n, "test"), recipe.items, seed=settings.seed) for n in self.records}
        self.openings = openings(of(self.data, "test"), recipe.answers)
        enough = len(self.openings) >= 2
        require(enough, "data", recipe.data, "two test documents of 8 words at least, to be continued")
        self.prompts = list(recipe.ask) or [o.prompt for o in self.openings[:3]]
        self._check_lengths()
        self._fit_calibration()
        for c in recipe.candidates:
            passes = c.arm.build(self.settings)
            try:
                check_passes(base.model, passes)
            except BadInput as e:
                raise BadInput(f"arm {c.arm.name!r}: {e}") from e
            self._data(c, passes)  # complains about too little text
        texts = {*names.values(), *(c.calib for c in recipe.candidates if c.calib)} - {"python"}
        self.inputs = {
            "recipe": dataclasses.asdict(recipe),
            "files of the model": digests(self.folder) if self.folder else {},
            "files of the data": {name: digests(data_source(name, settings=settings)) for name in sorted(texts)},
            "scale": dataclasses.asdict(self.settings.scale),
            "seed": settings.seed,
            "device": settings.device,
            "dtype": settings.dtype,
            "kernels": settings.kernels,
            "code": digests_of_code(),
        }
        self._check_adapting(base)

    def _check_programs(self) -> None:
        from llmcourse.portable import TARGETS
        from llmcourse.server import NEEDED

        extra = {"llmcourse serve": ("serve", NEEDED)} | {t: ("export", TARGETS[t]) for t in self.recipe.export}
        for what, (name, packages) in extra.items():
            for package in packages:
                there = importlib.util.find_spec(package) is not None
                require(there, package, "not installed", f"installed, for {what}: pip install 'llmcourse[{name}]'")

    def _check_adapting(self, base: Any) -> None:
        """Whatever `finetune` would refuse, before a folder is made."""
        if self.recipe.adapt is not None:
            from llmcourse.tuning import check_finetuning

            check_finetuning(self._finetune(), base, self.settings, self.rt)

    def _check_lengths(self) -> None:
        if self.limit is None:
            return
        texts = self.prompts + [o.prompt for o in self.openings]
        longest = max(len(self.tokenizer(text).input_ids) for text in texts)
        what, allowed = "tokens of a beginning and what follows it", f"at most {self.limit}, the model's positions"
        require(longest + NEW_TOKENS <= self.limit, what, longest + NEW_TOKENS, allowed)

    def _fit_calibration(self) -> None:
        """Fewer calibration sequences than the scale says, where a text has not so many: as many for all candidates."""
        from llmcourse.data import encode

        scale = self.settings.scale
        texts = [r["text"] for r in self.records[self.data] if r["split"] == "calib"]
        there = len(encode(self.tokenizer, texts, limit=scale.calib_sequences * scale.calib_length)[0])
        fit = there // scale.calib_length  # none: refused where the text is taken
        if 0 < fit < scale.calib_sequences:
            self.settings = dataclasses.replace(self.settings, scale=dataclasses.replace(scale, calib_sequences=fit))
            self.say(
                f"{self.data} has {there:,} tokens to calibrate on: {fit} sequences of {scale.calib_length:,} "
                f"for every candidate, in place of the {scale.calib_sequences} of scale {scale.name}"
            )

    def _text(self, name: str, documents: list[str], part: str) -> Text:
        from llmcourse.measure import as_text

        scale = self.settings.scale
        longer = scale.eval_tokens * (self.recipe.validation if part == "val" else 1)
        settings = dataclasses.replace(self.settings, data=name, scale=dataclasses.replace(scale, eval_tokens=longer))
        return as_text(self.tokenizer, documents, part, settings, scale.context)

    def _data(self, c: Candidate, passes: list) -> Any:
        """The text that the passes of a candidate look at."""
        from llmcourse.jobs import job_data

        wanted: dict[str, int] = {}
        for part, n in ((part, n) for p in passes for part, n in p.needs.items()):
            wanted[part] = max(n, wanted.get(part, 0))
        settings = dataclasses.replace(self.settings, data=self.recipe.data)
        try:
            return job_data(self.tokenizer, settings, c.calib or self.recipe.data, wanted)
        except BadInput as e:
            raise BadInput(f"arm {c.arm.name!r}: {e}") from e

    def _finetune(self) -> Any:
        from llmcourse.tuning import FinetuneRecipe

        r, adapt = self.recipe, self.recipe.adapt
        about = {"name": r.name, "task": "language", "model": r.model, "data": r.data, "beside": r.beside}
        about |= {"license": r.license, "limits": r.limits, "method": adapt.method}
        parts = {"lora": dataclasses.asdict(adapt.lora), "train": dataclasses.asdict(adapt.train)}
        text = "\n\n".join([_toml(about), *(f"[{name}]\n{_toml(table)}" for name, table in parts.items())])
        return FinetuneRecipe(**about, train=adapt.train, lora=adapt.lora, text=text)

    # ------------------------------------------------------------------------------------------------ steps

    def run(self, out: Path) -> None:
        """All steps, those that are finished taken from `out`; then the delivery."""
        from llmcourse.capstone_report import judged
        from llmcourse.jobs import Steps

        recipe, self.out = self.recipe, out
        (out / "steps").mkdir(exist_ok=True)
        dense = {ORIGINAL: None} | ({ADAPTED: out / "adapt" / RESULT / "model"} if recipe.adapt else {})
        steps = Steps(out / "steps", 4 + len(dense) - 1 + len(dense) + 2 * len(recipe.candidates), self.say)
        steps.cost_left = 5.0 * (recipe.adapt is not None) + len(dense) + 1.8 * len(recipe.candidates) + 1.6
        scale = self.settings.scale.name
        self.say(f"{recipe.name}: {self.card.name} on {recipe.data}, {self.rt.describe()}, scale {scale}")
        adapting = None
        if recipe.adapt is not None:
            adapting = steps(ADAPTED, f"adapt to {recipe.data}", 5.0, self._adapt)
        rows = {}
        for name in dense:
            rows[name] = steps(f"{name}-measure", f"{name}: measure", 1.0, lambda n=name: self._measure(self._dense(n)))
        for c in recipe.candidates:
            slug, name = c.arm.slug, c.arm.name
            made = steps(f"{slug}-compress", f"{name}: compress", 0.8, lambda c=c: self._compress(c))
            found = steps(f"{slug}-measure", f"{name}: measure", 1.0, lambda c=c: self._measure(self._student(c)))
            rows[name] = found | {"made": made}
        speed = steps("speed", "time of all, in turn", 0.6, self._speed)
        job = judged(self, rows, speed, adapting)
        job["exports"] = steps("export", f"{job['delivered']}: export", 0.4, lambda: self._export(job["delivered"]))
        job["asked"] = steps("serve", f"{job['delivered']}: serve and ask", 0.6, lambda: self._serve(job["delivered"]))
        kept = {p.stem: json.loads(p.read_text(encoding="utf8")) for p in sorted(steps.folder.glob("*.json"))}
        job["seconds"] = {name: step["seconds"] for name, step in kept.items()}
        start = time.perf_counter()
        self._deliver(job)
        self.say(f"[{steps.total}/{steps.total}] report: {time.perf_counter() - start:.0f} s")

    def _adapt(self) -> dict:
        from llmcourse.tuning import ABOUT, finetune_recipe

        made = finetune_recipe(
            self._finetune(), self.out / "adapt", settings=self.settings, rt=self.rt,
            say=lambda line: self.say(f"    {line}"), command=self.command,
        )  # fmt: skip
        about = json.loads((made / ABOUT).read_text(encoding="utf8"))
        return {key: about[key] for key in ("rows", "losses", "val")}

    def _dense(self, name: str) -> Path | str:
        return self.recipe.model if name == ORIGINAL else self.out / "adapt" / RESULT / "model"

    def _student(self, c: Candidate) -> Path:
        return self.out / "students" / c.arm.slug

    def _source(self, name: str) -> Path | str:
        """What `load_model` takes for a name of the table."""
        found = [self._student(c) for c in self.recipe.candidates if c.arm.name == name]
        return found[0] if found else self._dense(name)

    def _load(self, source: Path | str):
        from llmcourse.data import load_model

        return load_model(source, rt=self.rt, settings=self.settings)

    def _compress(self, c: Candidate) -> dict:
        from llmcourse.compression import compress
        from llmcourse.packed import save_student

        passes, target = c.arm.build(self.settings), self._student(c)
        blocks = target.parent / f"{target.name}-blocks"
        model = self._load(self._dense(c.of)).model
        student, reports = compress(model, passes, self._data(c, passes), self.rt, checkpoint=blocks)
        with atomic_folder(target, replace=True) as partial:
            save_student(student, self.tokenizer, partial)
        shutil.rmtree(blocks, ignore_errors=True)
        return {"reports": [str(r) for r in reports]}

    def _measure(self, source: Path | str) -> dict:
        """Everything but time, on the model as it was stored."""
        from llmcourse.accuracy import score_choices
        from llmcourse.compression import passport
        from llmcourse.evaluation import Bootstrap, perplexity
        from llmcourse.jobs import perplexity_as_json
        from llmcourse.modelfolder import locate_model
        from llmcourse.packed import dequantize_model
        from llmcourse.runtime import evaluating

        stored, scale = self._load(source).model, self.settings.scale
        packed = any(hasattr(m, "passport_counts") for m in stored.modules())
        dense = dequantize_model(stored, dtype=self.rt.dtype) if packed else stored
        how = {"context": scale.context, "stride": scale.stride, "batch_size": scale.batch_size, "rt": self.rt}
        how["bootstrap"] = Bootstrap(seed=self.settings.seed)
        read, right = {}, {}
        for (name, part), text in self.texts.items():
            p = perplexity(dense, text, **how, model=self.card.name)
            read[f"{part} of {name}"] = perplexity_as_json(p)
        with evaluating(dense):  # one text after the other: the same arithmetic for every model
            for name, items in self.items.items():
                scored = score_choices(dense, self.tokenizer, items, delimiter="", rt=self.rt, name=self.card.name)
                right[name] = scored.accuracy("characters").hits.tolist()
            written = _continued(dense, self.tokenizer, [o.prompt for o in self.openings], self.rt)
        card = passport(self.card.name, stored, self.rt, folder=locate_model(source, self.settings))
        return {"read": read, "right": right, "written": written, "passport": card.to_dict()}

    def _speed(self) -> dict:
        """Reading a prompt and writing a token, all models in turn; the first one twice, as the control."""
        from llmcourse.evaluator import prefill_and_decode
        from llmcourse.modelfolder import kernels_said
        from llmcourse.runtime import compare, evaluating

        names = [*([ADAPTED] if self.recipe.adapt else []), ORIGINAL, *(c.arm.name for c in self.recipe.candidates)]
        models = {name: self._load(self._source(name)).model for name in names}
        models[AGAIN] = models[names[0]]
        tokens = min(128, self.settings.scale.context - 1)
        with evaluating(*models.values()):
            calls = {name: prefill_and_decode(m, tokens, self.rt) for name, m in models.items()}
            timed = {
                what: compare({name: c[i] for name, c in calls.items()}, self.rt, warmup=1, repeats=repeats)
                for i, (what, repeats) in enumerate((("read", 6), ("write", 16)))
            }
        keep = lambda c: {"median_s": c.timing.median, "ratio": c.ratio, "low": c.low, "high": c.high, "n": c.timing.n}
        found = {what: {name: keep(c) for name, c in rows.items()} for what, rows in timed.items()}
        return found | {"tokens": tokens, "kernels": {name: kernels_said(m) for name, m in models.items()}}

    def _export(self, delivered: str) -> dict:
        """The delivered model in the forms of the recipe, each read back; dense ones need none."""
        from llmcourse.portable import export_folder

        if not any(c.arm.name == delivered for c in self.recipe.candidates):
            return {"made": {}, "note": "a dense model is read by transformers as it is"}
        made = {}
        for target in self.recipe.export:
            folder = self.out / "exports" / target
            shutil.rmtree(folder, ignore_errors=True)
            try:
                made[target] = str(export_folder(self._source(delivered), folder, to=target))
            except BadInput as e:  # a form that cannot hold this grid: the others, and the model itself, are there
                made[target] = f"not written: {e}"
        return {"made": made, "note": ""}

    def _serve(self, delivered: str) -> dict:
        """`llmcourse serve` in a process of its own, asked over HTTP; the same from the loaded model beside it."""
        source = self._source(delivered)
        loaded = self._load(source)
        direct = [_continued(loaded.model, loaded.tokenizer, [p], self.rt)[0] for p in self.prompts]
        answers = []
        with _Served(source, self.settings) as server:
            for prompt, own in zip(self.prompts, direct):
                start = time.perf_counter()
                text = server.complete(prompt)
                seconds = time.perf_counter() - start
                answers.append({"prompt": prompt, "answer": text, "seconds": seconds, "same": text == own})
        return {"answers": answers, "stopped": server.code}

    def _deliver(self, job: dict) -> None:
        from llmcourse import plotting
        from llmcourse.capstone_report import front, render

        figure = front(job)
        with atomic_folder(self.out / RESULT) as partial:
            source = self._source(job["delivered"])
            if isinstance(source, Path):
                shutil.copytree(source, partial / "model")
            else:  # the original: under a name, or from a hub
                self._load(source).model.save_pretrained(partial / "model")
                self.tokenizer.save_pretrained(partial / "model")
            for target in job["exports"]["made"]:
                if (self.out / "exports" / target).is_dir():
                    shutil.copytree(self.out / "exports" / target, partial / target)
            plotting.save(figure, partial / "pareto.svg")
            plotting.save(figure, partial / "pareto.png")
            svg = (partial / "pareto.svg").read_text(encoding="utf8")
            write_atomic(partial / REPORT, render(job, svg))
            write_atomic(partial / NUMBERS, json.dumps(job, indent=1))
            write_manifest(partial, name=self.recipe.name, license=self.recipe.license)

    @property
    def origin(self) -> str:
        """Where the text comes from."""
        asset = CATALOG.get(self.recipe.data)
        return f"{asset.what}; {asset.license}; {asset.origin}" if asset else "a text of the reader's own"


def _continued(model: Any, tokenizer: Any, prompts: Sequence[str], rt: Any, n: int = NEW_TOKENS) -> list[str]:
    """What a model writes after each prompt, greedily: `n` tokens at most, all prompts at a time."""
    import torch

    rows = [tokenizer(p).input_ids for p in prompts]
    longest, fill = max(map(len, rows)), tokenizer.eos_token_id or 0
    ids = torch.tensor([[fill] * (longest - len(r)) + r for r in rows])  # (B, T), padded on the left
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    with torch.inference_mode():
        made = model.generate(
            rt.move(ids), attention_mask=rt.move(mask), max_new_tokens=n, do_sample=False, pad_token_id=fill
        )
    return [tokenizer.decode(new, skip_special_tokens=True) for new in made[:, longest:]]


def _toml(table: Mapping[str, Any]) -> str:
    """Plain values as lines of TOML, whose texts, numbers and lists are written as JSON writes them."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)


class _Served:
    """`llmcourse serve SOURCE` as a process, for the time of a `with`."""

    SECONDS = 300

    def __init__(self, source: Path | str, settings: Settings):
        self.source, self.settings, self.code = str(source), settings, None

    def __enter__(self) -> _Served:
        options = {"port": 0, "device": self.settings.device, "dtype": self.settings.dtype}
        options |= {"kernels": self.settings.kernels, "max-batch": 1}
        words = [w for key, value in options.items() for w in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "llmcourse", "serve", self.source, *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        late = threading.Timer(self.SECONDS, self.process.kill)
        late.start()
        for line in self.process.stdout:
            said.append(line.strip())
            if ready := re.search(r"Ready: (\S+) serves (.+?) \(", line):
                late.cancel()
                self.url, self.name = ready[1], ready[2]
                return self
        late.cancel()
        self.__exit__()
        raise BadInput(f"llmcourse serve ended before it was ready: {' '.join(said[-3:]) or 'it said nothing'}")

    def complete(self, prompt: str) -> str:
        """The text that the server writes after a prompt, greedily."""
        body = {"model": self.name, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=self.SECONDS) as got:
            return json.loads(got.read())["choices"][0]["text"]

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.code = self.process.wait()
        self.process.stdout.close()

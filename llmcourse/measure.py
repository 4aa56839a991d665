"""`llmcourse evaluate`: a model and a text by name, measured by `evaluator.evaluate`.

Hand-written: this is plumbing. The lesson is in the chapter `nbs/05d_report.ipynb`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.settings import Settings, load_settings, one_of, require

if TYPE_CHECKING:
    from llmcourse.evaluator import Evaluation

__all__ = ["DEFAULT", "as_text", "measure", "print_evaluation"]

DEFAULT = (
    "perplexity", "bits_per_byte", "token_accuracy", "first_token", "next_token", "memory_bytes", "disk_bytes",
)  # fmt: skip
PARTS = ("test", "train", "val", "calib", "all")


def measure(
    model: str, *, metrics: Sequence[str] = (), part: str | None = None, settings: Settings | None = None
) -> Evaluation:
    """Measure a model of that name on the settings' data.

    Args:
        model: a name of the catalog, a folder (dense, packed, compressed by us), or a hub id.
        metrics: names out of `evaluator.METRICS`; by default `DEFAULT`.
        part: test, train, val, calib or all; by default the test part of a data set of the catalog, and all of a
            file, which is somebody's own text.
    Raises:
        BadInput: before anything is measured.
    """
    from llmcourse.evaluator import METRICS, check_metrics, evaluate
    from llmcourse.jobs import bounded, model_folder
    from llmcourse.modelfolder import kernels_said, positions_of

    settings = settings or load_settings()
    names = check_metrics(metrics or DEFAULT)
    folder = model_folder(model, settings)
    if folder is None and not metrics:  # a hub id: its files lie in the hub's own cache
        names = tuple(n for n in names if n != "disk_bytes")
    reads = any(METRICS[n].reads for n in names)
    documents = _documents(part, settings) if reads else []  # complains about the text before the model is loaded
    needs = {need for n in names for need in METRICS[n].needs}
    items = _items(part, settings) if "items" in needs else None
    questions = _questions(part, settings) if "questions" in needs else None

    from llmcourse.data import load_model
    from llmcourse.evaluation import Bootstrap
    from llmcourse.runtime import Runtime

    rt = Runtime.auto(settings.device, settings.dtype)
    loaded = load_model(model, rt=rt, settings=settings)
    scale = bounded(settings.scale, positions_of(loaded.model))
    options = {
        "context": scale.context,
        "stride": scale.stride,
        "batch_size": scale.batch_size,
        "prompt": min(128, scale.context - 1),
        "bootstrap": Bootstrap(seed=settings.seed),
        "name": loaded.card.name,
        "folder": folder,
        "items": items,
        "questions": questions,
        "tokenizer": loaded.tokenizer,
        "rt": rt,
    }
    text = as_text(loaded.tokenizer, documents, part, settings, scale.context) if reads else None
    parts = [evaluate(lm, text, some, **options) for lm, some in _forms(loaded.model, names, rt)]
    machine = f"{parts[0].machine}; {kernels_said(loaded.model)}"
    return replace(parts[0], machine=machine, rows=tuple(row for p in parts for row in p.rows))


def _part(part: str | None, settings: Settings) -> str:
    from llmcourse.readers import DATA

    return one_of("part", part, PARTS) if part is not None else "test" if settings.data in DATA else "all"


def _records(part: str | None, settings: Settings) -> list[dict]:
    from llmcourse.data import load_records

    part = _part(part, settings)
    return load_records(settings.data, None if part == "all" else part, settings=settings)


def _documents(part: str | None, settings: Settings) -> list[str]:
    return [r["text"] for r in _records(part, settings)]


def _items(part: str | None, settings: Settings, most: int = 100):
    """Multiple choice "which title belongs to this description?" from the encyclopedia's articles."""
    from llmcourse.accuracy import description_items

    allowed = "wikipedia: its articles have titles and descriptions, of which multiple choice is made"
    require(settings.data == "wikipedia", "data", settings.data, allowed)
    records = _records(part, settings)
    described = {r["title"] for r in records if r["description"] and r["topic"] not in ("", "Uncategorized")}
    return description_items(records, min(most, len(described)), seed=settings.seed)


def _questions(part: str | None, settings: Settings, most: int = 100):
    """Prompts with references: translations, descriptions of articles, or the `references` of a file of one's own."""
    from llmcourse.evaluator import Question

    words = lambda text: " ".join(text.split()[:60])
    forms = {
        "en-fr": lambda r: (f"English: {r['text']}\nFrench:", r["translation"]),
        "en-zh": lambda r: (f"English: {r['text']}\nChinese:", r["translation"]),
        "wikipedia": lambda r: (f"{words(r['text'])}\nThis article in a few words:", r["description"]),
    }
    form = forms.get(settings.data, lambda r: (r["text"], r.get("references")))
    made = []
    for prompt, found in map(form, _records(part, settings)):
        texts = (found,) if isinstance(found, str) else tuple(found or ())
        if texts and all(isinstance(t, str) and t.strip() for t in texts):
            made.append(Question(prompt, texts))
    allowed = f"{', '.join(forms)}, or a .jsonl file whose lines have `text` (the prompt) and `references`"
    require(bool(made), "data", settings.data, f"data with references for these metrics: {allowed}")
    return made[:most]


def as_text(tokenizer: Any, documents: list[str], part: str | None, settings: Settings, context: int):
    """The documents as one stream, at most as many tokens as the scale says; one window at least."""
    from llmcourse.data import encode, separator_id
    from llmcourse.evaluation import Text

    front = separator_id(tokenizer)
    ids, sizes = encode(tokenizer, documents, limit=settings.scale.eval_tokens)
    part, found = _part(part, settings), f"{settings.data} (part {_part(part, settings)}, {len(ids)} tokens)"
    require(len(ids) >= context, "data", found, f"at least one window of {context} tokens")
    return Text(
        tokens=ids,
        token_bytes=sizes,
        separator=front,
        data=settings.data,
        split=part,
        tokenizer=Path(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__).name,
        joining=f"one stream, token {front} before each document",
    )


def _forms(model: Any, names: Sequence[str], rt: Any) -> list[tuple[Any, list[str]]]:
    """A packed model reads a text as its dense twin (the same weights, unpacked once), and is itself what costs."""
    from llmcourse.evaluator import METRICS

    if not any(hasattr(m, "passport_counts") for m in model.modules()):
        return [(model, list(names))]
    from llmcourse.packed import dequantize_model

    quality = [n for n in names if METRICS[n].reads]
    costs = [n for n in names if not METRICS[n].reads]
    forms = [(dequantize_model(model, dtype=rt.dtype), quality)] if quality else []
    return forms + ([(model, costs)] if costs else [])


def print_evaluation(report: Evaluation) -> None:
    """The report as a table for a terminal, with the protocols and notes below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{report.model} on {report.data}", title_justify="left")
    for head, how in zip(report.HEAD, ("left", "right", "right", "right", "right")):
        table.add_column(head, justify=how, no_wrap=head in ("metric", "value"), overflow="fold")
    for cells in report.cells():
        table.add_row(*cells)
    width = None if sys.stdout.isatty() else 120
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)  # names are only names
    console.print(table)
    for i, protocol in enumerate(report.protocols(), 1):
        console.print(f"[{i}] {protocol}")
    for note in report.notes():
        console.print(note)
    console.print(report.machine)

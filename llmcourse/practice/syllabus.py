"""Three ways through the book for a class: two days, six weeks, twelve weeks. Their minutes come from the chapters.

What a chapter takes is in its front matter (minutes to read, counted; minutes to run, measured) and in its sheet
(minutes of the exercises). Nothing is typed here but the order and the reasons.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmcourse.practice import checking
from llmcourse.settings import course_root, one_of

__all__ = ["PLANS", "Chapter", "Plan", "broken_order", "chapter", "left_out", "table"]

IN_CLASS = 3
"""exercises up to this difficulty are done in class, the others at home"""


@dataclass(frozen=True)
class Chapter:
    """What a chapter asks of a class."""

    name: str
    file: str
    title: str
    needs: tuple[str, ...]
    """other chapters, by name"""
    read: float
    run: float
    in_class: int
    """minutes of the sheet's exercises up to difficulty `IN_CLASS`"""
    at_home: int


@dataclass(frozen=True)
class Plan:
    """An order of chapters: (title of the session, chapters), and for whom it is."""

    title: str
    for_whom: str
    sessions: tuple[tuple[str, tuple[str, ...]], ...]

    def order(self) -> list[str]:
        return [name for _, names in self.sessions for name in names]


PLANS: dict[str, Plan] = {
    "2 days": Plan(
        "Two days: compress a model and measure it",
        "People who have a model and want it smaller. Chapters are read before; each half-day is a talk and a sheet.",
        (
            ("Day 1, morning: ground", ("runtime", "plotting", "data")),
            ("Day 1, afternoon: measure", ("evaluation",)),
            ("Day 2, morning: one interface", ("compression", "quantization")),
            ("Day 2, afternoon: zeros, and what they are good for", ("pruning",)),
        ),
    ),
    "6 weeks": Plan(
        "Six weeks: from the attention to a fast model",
        "A short course beside other work: one lecture and one exercise hour a week.",
        (
            ("Week 1: ground", ("runtime", "plotting", "data", "tokenization")),
            ("Week 2: the model", ("attention", "model")),
            ("Week 3: measuring", ("evaluation", "accuracy")),
            ("Week 4: compression", ("compression", "pruning")),
            ("Week 5: few bits", ("quantization", "activations")),
            ("Week 6: fast", ("deployment", "speculative")),
        ),
    ),
    "12 weeks": Plan(
        "Twelve weeks: a term, with a project",
        "A course of its own: two lectures and two exercise hours a week, and the capstone as the project.",
        (
            ("Week 1: ground", ("runtime", "plotting", "data")),
            ("Week 2: the model", ("tokenization", "attention", "model")),
            ("Week 3: measuring", ("evaluation", "accuracy")),
            ("Week 4: one report", ("metrics", "report")),
            ("Week 5: training", ("optimizers", "training")),
            ("Week 6: what a model learns from", ("objectives", "finetuning")),
            ("Week 7: experiments that decide", ("experiments", "continual")),
            ("Week 8: compression", ("compression", "pruning")),
            ("Week 9: shapes and bits", ("structure", "quantization")),
            ("Week 10: teachers and activations", ("distillation", "students", "activations")),
            ("Week 11: out of the notebook", ("composition", "deployment", "export", "serving")),
            ("Week 12: the project", ("capstone",)),
        ),
    ),
}

NO_LESSONS = ("index", "errata", "glossary", "teaching", "references")


@cache
def _files() -> dict[str, Path]:
    """Name of a chapter -> its notebook, in the order of the numbers."""
    return {re.sub(r"^\d+\w?_", "", p.stem): p for p in sorted((course_root() / "nbs").glob("*.ipynb"))}


@cache
def chapter(name: str) -> Chapter:
    """What a chapter asks of a class, from its front matter and its sheet."""
    path = _files()[one_of("chapter", name, _files())]
    head = "".join(json.loads(path.read_text(encoding="utf8"))["cells"][0]["source"])
    value = lambda key, default="": m[1] if (m := re.search(rf"^ *{key}: *(.*)$", head, re.M)) else default
    needs = [n.strip(" \"'") for n in value("needs").strip("[]").split(",")]
    sheet = checking.chapters().get(path.stem)
    exercises = list(checking.load_sheet(sheet).values()) if sheet else []
    return Chapter(
        name,
        path.name,
        value("title").strip('"'),
        tuple(n for n in needs if n in _files()),
        float(value("minutes-read", "0")),
        float(value("minutes-run", "0")),
        sum(ex.minutes for ex in exercises if ex.difficulty <= IN_CLASS),
        sum(ex.minutes for ex in exercises if ex.difficulty > IN_CLASS),
    )


def broken_order(plan: Plan) -> list[str]:
    """What a plan teaches before what it needs, in words; empty when every chapter finds its ground."""
    said, seen = [], set()
    for name in plan.order():
        said += [
            f"{name} needs {need}, which does not come before it" for need in chapter(name).needs if need not in seen
        ]
        seen.add(name)
    return said


def left_out(plan: Plan) -> list[str]:
    """The chapters that a plan leaves out, by title, in the order of the book."""
    return [chapter(n).title for n in _files() if n not in (*plan.order(), *NO_LESSONS)]


def table(plan: Plan) -> str:
    """A plan as a Markdown table, with its sums."""
    rows = [
        "| session | chapters | read before (min) | run (min) | sheets in class (min) | sheets at home (min) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    total = [0.0, 0.0, 0.0, 0.0]
    for title, names in plan.sessions:
        here = [chapter(n) for n in names]
        sums = [sum(getattr(c, what) for c in here) for what in ("read", "run", "in_class", "at_home")]
        total = [a + b for a, b in zip(total, sums)]
        links = ", ".join(f"[{c.title}]({c.file})" for c in here)
        rows.append(f"| {title} | {links} | " + " | ".join(f"{s:g}" for s in sums) + " |")
    rows.append("| **together** | | " + " | ".join(f"**{s:g}**" for s in total) + " |")
    return "\n".join(rows)

"""The page for teachers: plans that can be taught, and sentences that the course really says."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from llmcourse.practice import syllabus
from llmcourse.settings import BadInput

plans = pytest.mark.parametrize("plan", syllabus.PLANS.values(), ids=list(syllabus.PLANS))


def page() -> list[dict]:
    return json.loads((ROOT / "nbs" / "92_teaching.ipynb").read_text(encoding="utf8"))["cells"]


@plans
def test_each_chapter_comes_after_what_it_needs(plan: syllabus.Plan) -> None:
    assert syllabus.broken_order(plan) == []
    assert len(set(plan.order())) == len(plan.order()), "a chapter is taught twice"


def test_a_wrong_order_is_found() -> None:
    plan = syllabus.Plan("", "", (("one", ("quantization", "runtime")),))
    assert "quantization needs compression, which does not come before it" in syllabus.broken_order(plan)
    with pytest.raises(BadInput, match="chapter is 'quantisation'"):
        syllabus.chapter("quantisation")


def test_minutes_are_those_of_the_chapters() -> None:
    pytest.importorskip("yaml")
    import yaml

    for plan in syllabus.PLANS.values():
        for name in plan.order():
            found = syllabus.chapter(name)
            cells = json.loads((ROOT / "nbs" / found.file).read_text(encoding="utf8"))["cells"]
            meta = yaml.safe_load("".join(cells[0]["source"]).strip().strip("-"))
            course = meta["course"]
            assert (found.title, found.read, found.run) == (
                meta["title"],
                course["minutes-read"],
                course["minutes-run"],
            )
            assert set(found.needs) == {n for n in course["needs"] if n in syllabus._files()}


@plans
def test_the_page_shows_the_plan_as_it_is(plan: syllabus.Plan) -> None:
    shown = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for c in page() for o in c.get("outputs", []))
    assert syllabus.table(plan) in shown, "run nbs/92_teaching.ipynb again"
    assert f"*Left out:* {'; '.join(syllabus.left_out(plan))}." in shown


def test_sums_are_sums() -> None:
    plan = syllabus.PLANS["2 days"]
    last = syllabus.table(plan).splitlines()[-1]
    read = sum(syllabus.chapter(n).read for n in plan.order())
    assert f"**{read:g}**" in last and len(syllabus.left_out(plan)) > 20


def test_the_sentences_of_trouble_are_those_of_the_course() -> None:
    """What stands in code in the first column is really said somewhere; … stands for names and numbers."""
    files = [*(ROOT / "llmcourse").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "Makefile"]
    text = "\n".join(p.read_text(encoding="utf8") for p in files)
    text = re.sub(r'"\s*\n\s*f?"', "", text)  # strings that go on in the next line
    (source,) = ("".join(c["source"]) for c in page() if c["id"] == "trouble-text")
    rows = [line.split(" | ") for line in source.splitlines() if line.startswith("|")][2:]
    said = [m for row in rows for m in re.findall(r"`([^`]+)`", row[0])]
    assert len(said) >= 9 and all(len(row) == 3 for row in rows)
    for sentence in said:
        for piece in sentence.split(" … "):
            assert piece in text, f"nothing in the course says {piece!r}"

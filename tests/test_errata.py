"""The map of the source articles: every topic has its place, or a reason why it has none."""

from __future__ import annotations

import book_rules as rules
import pytest
import yaml
from conftest import ROOT

KNOWN = yaml.safe_load((ROOT / "nbs" / "_topics.yml").read_text(encoding="utf8"))
# Topics that no chapter teaches. When one gets a place, it leaves nbs/_topics.yml and this set: it only shrinks.
NOWHERE = {"A24", "A29", "B26", "B28", "B32", "C2", "D12", "D15", "D19", "D20", "E13", "E14", "E16", "E18"}


@pytest.fixture(scope="module")
def books() -> dict[str, dict]:
    return {p.name: rules.load(p) for p in sorted((ROOT / "nbs").glob("*.ipynb"))}


def test_every_topic_has_its_place_or_a_reason(books):
    assert rules.topics_have_places(KNOWN, books) == []
    assert set(KNOWN["not_yet"]) <= NOWHERE, "a topic has lost its place"
    assert len(KNOWN["topics"]) > 100 and {t[0] for t in KNOWN["topics"]} == set("ABCDE")


def chapter(covers: str) -> dict:
    front = f"---\ntitle: T\ncourse:\n  needs: []\n  covers: {covers}\n---"
    cell = lambda kind, source: {"cell_type": kind, "metadata": {}, "source": source}
    return {"cells": [cell("raw", front), cell("markdown", "## A section")], "metadata": {}}


@pytest.mark.parametrize(
    ("covers", "waiting", "says"),
    [
        ("[A1#a-section, A2]", {}, None),
        ("[A1]", {"A2": "a chapter on it is to come later"}, None),
        ("[A1]", {}, "A2 (two) has no place"),
        ("[A1, A2, A3]", {}, "'A3', which is no topic"),
        ("[A1, A2#another-section]", {}, "no section has that anchor"),
        ("[A1, A2, A2]", {}, "twice"),
        ("[A1, A2]", {"A2": "a chapter on it is to come later"}, "take it off the list"),
        ("[A1]", {"A2": "later"}, "no reason for A2"),
        ("[A1, A2]", {"A7": "a chapter on it is to come later"}, "'A7', which is no topic"),
    ],
)
def test_the_rule_can_fail(covers, waiting, says):
    topics = {"A1": {"section": "1", "en": "one", "zh": "一"}, "A2": {"section": "2", "en": "two", "zh": "二"}}
    known = {"articles": {"A": {}}, "topics": topics, "not_yet": waiting}
    problems = rules.topics_have_places(known, {"00_a.ipynb": chapter(covers)})
    assert (problems == []) if says is None else any(says in p for p in problems), problems


def test_the_table_shows_every_topic_once(books):
    cell = next(c for c in books["90_errata.ipynb"]["cells"] if c.get("id") == "topics")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in rules.text(cell["source"]).splitlines()]
    assert [r for r in rows if r in KNOWN["topics"]] == list(KNOWN["topics"])

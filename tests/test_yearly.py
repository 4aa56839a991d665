"""Each year's sheets differ: last year's answers fail where a number is stated, and known mistakes stay known."""

from __future__ import annotations

import copy
import itertools
import re
import sys

import pytest

pytest.importorskip("nbgrader", reason='nbgrader is not installed: pip install "llmcourse[classroom]"')

import nbformat
import torch
from conftest import ROOT
from example_sheet import tool

from llmcourse.practice import checking, grading, variants, yearly
from llmcourse.settings import BadInput

YEARS = (2027, 2028, 2029)
stated = pytest.mark.parametrize("id", sorted(variants.STATED))


@pytest.fixture(autouse=True)
def book(monkeypatch: pytest.MonkeyPatch):
    """Every test begins and ends with the sheets of the book."""
    monkeypatch.delenv(yearly.VARIABLE, raising=False)
    torch.set_num_threads(1)
    yield
    yearly.sheet_seed(0)
    for name in [n for n, m in sys.modules.items() if getattr(m, "__sheet_seed__", 0)]:
        del sys.modules[name]
        checking.load_sheet.__globals__["REGISTRY"].pop(name, None)


def master(sheet: str) -> nbformat.NotebookNode:
    (path,) = (ROOT / "solutions").glob(f"*/{sheet}.ipynb")
    return nbformat.read(path, 4)


def answer_of(id: str, number: int) -> str:
    """The right answer of a year, as text."""
    with yearly.with_seed(number):
        return checking.find(id).section("solution")


def verdict(id: str, source: str, number: int) -> checking.Result:
    """What a year's check says about this text."""
    with yearly.with_seed(number):
        ex = checking.find(id)
        space = dict(vars(sys.modules[ex.module]))
        exec(source, space)
        return checking.judge(ex, checking._run_here(ex, space[ex.name]))


@stated
def test_fragments_are_those_of_the_book(id: str) -> None:
    rows = variants.STATED[id]
    sheet, name = id.split(".")
    cells = [c.source for c in master(sheet).cells if c.get("id") in (f"{name}-statement", f"{name}-answer")]
    module = (ROOT / "llmcourse" / "practice" / "sheets" / f"{sheet}.py").read_text(encoding="utf8")
    parts = re.findall(rf"^# %% (?:solution|checker) {name}\n.*?(?=^# %%|\Z)", module, re.S | re.M)
    text = "\n".join([*cells, *parts])
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) >= 4, "a book's fragment and three others in each row"
    assert len({row[0] for row in rows}) == len(rows)
    for row in rows:
        assert row[0] in text, f"{id}: {row[0]!r} stands nowhere"
    assert any(yearly.changed_text(id, cells[0], year) != cells[0] for year in YEARS), "the statement says nothing new"


@stated
def test_last_years_answer_fails_and_the_right_one_passes(id: str) -> None:
    answers = {year: answer_of(id, year) for year in (0, *YEARS)}
    for last, year in zip((0, *YEARS), YEARS):
        right = verdict(id, answers[year], year)
        assert right.passed, repr(right)
        for old in {0, last}:
            assert not verdict(id, answers[old], year).passed, f"the answer of {old or 'the book'} serves in {year}"


@pytest.mark.slow
@stated
def test_every_known_mistake_is_still_known(id: str) -> None:
    for year in YEARS:
        with yearly.with_seed(year):
            problems = checking.kill_matrix(checking.find(id))[1]
        assert not problems, "\n".join(problems)


def test_two_exercises_in_each_of_five_sheets_state_another_number() -> None:
    sheets = [id.split(".")[0] for id in variants.STATED]
    assert len([s for s in set(sheets) if sheets.count(s) >= 2]) >= 5
    for id, rows in variants.STATED.items():
        chosen = [tuple(now for _, now in yearly.changes(id, year)) for year in range(2020, 2040)]
        assert all(a != b for a, b in itertools.pairwise(chosen)), id
        assert tuple(row[0] for row in rows) not in chosen, id


@pytest.mark.parametrize("sheet", ["metrics", "report"])
def test_a_whole_sheet_keeps_its_mistakes_apart(sheet: str) -> None:
    problems = []
    for year in YEARS:
        with yearly.with_seed(year):
            problems += [p for ex in checking.load_sheet(sheet).values() for p in checking.kill_matrix(ex)[1]]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("sheet", checking.sheets())
def test_every_sheet_keeps_its_mistakes_apart(sheet: str) -> None:
    with yearly.with_seed(2027):
        problems = [p for ex in checking.load_sheet(sheet).values() for p in checking.kill_matrix(ex)[1]]
    assert not problems, "\n".join(problems)


def test_the_cases_of_the_book_stay_and_others_come_on_top() -> None:
    calls = lambda ex: [(c.name, str(c.request())) for c in ex.all_cases()]
    plain = {id: calls(ex) for s in ("attention", "metrics") for id, ex in checking.load_sheet(s).items()}
    drawn = {}
    for year in YEARS:
        with yearly.with_seed(year):
            drawn[year] = {id: calls(ex) for s in ("attention", "metrics") for id, ex in checking.load_sheet(s).items()}
        for id, cases in drawn[year].items():
            assert cases[: len(plain[id])] == plain[id] or id in variants.STATED
            assert len({name for name, _ in cases}) == len(cases), f"{id}: two cases have the same name"
    for id in ("attention.scaled_dot_product", "metrics.clipped", "metrics.swap_p"):
        new = [tuple(drawn[year][id][len(plain[id]) :]) for year in YEARS]
        assert all(new) and len(set(new)) == len(YEARS), f"{id}: every year draws other cases"
    assert torch.Generator.__module__ != yearly.__name__ and torch.Generator().manual_seed(3).initial_seed() == 3


def test_an_answer_fitted_to_the_known_cases_fails() -> None:
    """Whoever looks the book's cases up and returns what they want has no answer this year."""
    ex = checking.find("metrics.clipped")
    known = {repr(c.args): o.get("value") for c, o in zip(ex.all_cases(), ex.expected())}
    table = "clipped = lambda *a, t=" + repr(known) + ": t.get(repr(a), (0, 0))"
    assert verdict(ex.id, table, 0).passed
    assert not verdict(ex.id, table, 2027).passed


@pytest.fixture(scope="module")
def released() -> dict[int, nbformat.NotebookNode]:
    """The sheet on quantization as two years get it."""
    yearly.sheet_seed(0)
    made = {}
    for year in (0, 2027):
        with yearly.with_seed(year):
            made[year] = nbformat.reads(tool().release(master("quantization"), "14_quantization", "quantization"), 4)
    return made


def handed_in(nb: nbformat.NotebookNode, answers: int) -> nbformat.NotebookNode:
    nb = copy.deepcopy(nb)
    for name in ("bits_per_weight", "codes_used"):
        next(c for c in nb.cells if c.get("id") == f"{name}-answer").source = answer_of(f"quantization.{name}", answers)
    return nb


def points(nb: nbformat.NotebookNode) -> int:
    return grading.grade(nb, only="quantization.codes_used").points


def test_a_released_sheet_says_the_numbers_of_its_year(released: dict[int, nbformat.NotebookNode]) -> None:
    text = lambda year: "\n".join(c.source for c in released[year].cells)
    assert "sheet_seed(2027)" in text(2027) and "sheet_seed" not in text(0)
    assert "2,540" in text(0) and "2,540" not in text(2027)
    assert released[2027].metadata["llmcourse"] == {"sheet": "quantization", "seed": 2027}
    (file,) = (ROOT / "exercises").glob("*/quantization.ipynb")
    assert text(0) == "\n".join(c.source for c in nbformat.read(file, 4).cells), "without a seed it is the book's sheet"


def test_grading_takes_the_seed_of_the_sheet_unless_the_teacher_has_set_one(
    released: dict[int, nbformat.NotebookNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    this, last = handed_in(released[2027], 2027), handed_in(released[2027], 0)
    assert points(this) == 3 and points(last) == 0
    liar = copy.deepcopy(last)  # last year's sheet and answers: it says of itself that it is the book's
    liar.metadata["llmcourse"].pop("seed")
    liar.cells = [c for c in liar.cells if "sheet_seed" not in c.source]
    assert points(liar) == 3, "without the teacher's word the sheet is believed"
    monkeypatch.setenv(yearly.VARIABLE, "2027")
    assert points(liar) == 0 and points(this) == 3
    apart = grading.grade_apart("liar.ipynb", text=nbformat.writes(liar), only="quantization.codes_used")
    assert (apart.points, apart.seed) == (0, 2027) and apart.to_dict()["seed"] == 2027


def test_a_sheet_without_its_metadata_is_known_by_its_line(released: dict[int, nbformat.NotebookNode]) -> None:
    nb = copy.deepcopy(released[2027])
    nb.metadata = nbformat.from_dict({})
    assert grading.seed_of(nb) == 2027
    for odd in ({"llmcourse": {"seed": "x"}}, {"llmcourse": {"seed": -3}}, {"llmcourse": 3}):
        assert grading.seed_of({"cells": [], "metadata": odd}) == 0


def test_a_solution_is_shown_with_the_numbers_of_the_year() -> None:
    with yearly.with_seed(2027):
        assert "1.96" not in checking.find("evaluation.paired_ratio").section("solution")
    assert "1.96" in checking.find("evaluation.paired_ratio").section("solution")


@pytest.mark.parametrize("seed", [-1, 2.5, "2027", 2**31, True, None])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(BadInput, match="sheet seed"):
        yearly.sheet_seed(seed)


def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(yearly.VARIABLE, "next year")
    with pytest.raises(BadInput, match=f"{yearly.VARIABLE} is 'next year'"):
        yearly.seed()


def test_the_tool_writes_the_sheets_of_a_year(tmp_path, capsys: pytest.CaptureFixture) -> None:
    (path,) = (ROOT / "solutions").glob("*/evaluation.ipynb")
    assert tool().main(["--seed", "2028", "--out", str(tmp_path), str(path)]) == 0
    made = nbformat.read(tmp_path / path.parent.name / "evaluation.ipynb", 4)
    assert made.metadata["llmcourse"]["seed"] == 2028 and "LLMCOURSE_SHEET_SEED=2028" in capsys.readouterr().out
    assert "BEGIN SOLUTION" not in nbformat.writes(made) and yearly.seed() == 0

"""What holds for the answers of every sheet."""

from __future__ import annotations

import re
from collections.abc import Callable

import nbformat
from conftest import ROOT

from llmcourse.practice import checking


def right_answers(sheet: str | None = None) -> tuple[list[tuple[str, object]], Callable]:
    """An empty list of (exercise, answer), and a decorator that puts one more right answer to an exercise there.

    Without a sheet the decorator takes full names, such as "metrics.clipped".
    """
    answers: list[tuple[str, object]] = []

    def right(id: str) -> Callable:
        def keep(answer: object) -> object:
            answers.append((id if sheet is None else f"{sheet}.{id}", answer))
            return answer

        return keep

    return answers, right


def names(answers: list[tuple[str, object]]) -> list[str]:
    """A name for each test of a right answer."""
    return [f"{id.split('.')[1]}-{getattr(answer, '__name__', answer)}" for id, answer in answers]


def assert_passes(id: str, answer: Callable) -> None:
    """A right answer passes, of whatever kind it is."""
    ex = checking.find(id)
    result = checking.judge(ex, checking._run_here(ex, answer))
    assert result.passed, repr(result)


def broken_code(sheet: str) -> list[tuple[str, str]]:
    """(exercise, code) of the broken code in the statements of a sheet."""
    (master,) = (ROOT / "solutions").glob(f"*/{sheet}.ipynb")
    statements = [cell.source for cell in nbformat.read(master, 4).cells if cell.cell_type == "markdown"]
    found = re.findall(r"```python\n((?:def|class) (\w+).*?)```", "\n".join(statements), re.S)
    return [(f"{sheet}.{name}", code) for code, name in found]


def assert_known(id: str, code: str) -> str:
    """The broken code of a statement runs, fails, and is known to the check; returns the name of the wrong answer."""
    ex = checking.find(id)
    space = dict(vars(checking.sys.modules[ex.module]))
    exec(code, space)
    outcomes = checking._run_here(ex, space[ex.name])
    result = checking.judge(ex, outcomes)
    assert not result.passed and result.wrong_answer, repr(result)
    assert not [o for o in outcomes if o["kind"] == "error" and o["type"] in ("NameError", "SyntaxError")]
    return result.wrong_answer


def assert_as_it_was(id: str, code: str) -> None:
    """The same, and it is the wrong answer of that name."""
    assert assert_known(id, code) == "as_it_was"

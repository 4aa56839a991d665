"""The exercise machine: `check`, `hint`, `reveal`, `progress`, and what the sheets' checkers are made of.

A checker (`llmcourse/practice/sheets/<sheet>.py`) is exported from the master of its sheet in `solutions/`. It holds,
per exercise, the cases, the solution and the named wrong answers. `check` runs the cases on the learner's answer and
on the solution. When they differ it asks which wrong answer would have given the same results, and says that one's
sentence.

Importing this module loads neither torch nor a notebook: a check does, when it is run.

The parts: `exercises` (cases, exercises, sheets), `comparing` (how two results differ), `cards` (what is read),
`records` (progress). Here is the verdict: which wrong answer explains what came.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from llmcourse.practice.cards import Note, Result, clean, how_to_ask, show, show_both, shown_in_scripts
from llmcourse.practice.comparing import compare, likeness, with_article
from llmcourse.practice.exercises import (
    Case,
    Exercise,
    case,
    chapters,
    exercise,
    find,
    load_sheet,
    outcome_of,
    rng,
    setup_source,
    sheets,
)
from llmcourse.practice.records import PROGRESS_FILE, Overview, Progress, overview
from llmcourse.practice.worker import TimeLimit, time_limit, timeout_outcome

__all__ = [
    "PROGRESS_FILE",
    "Case",
    "Exercise",
    "Overview",
    "Progress",
    "Result",
    "case",
    "chapters",
    "check",
    "clean",
    "exercise",
    "find",
    "hint",
    "judge",
    "kill_matrix",
    "load_sheet",
    "nearest",
    "progress",
    "reveal",
    "rng",
    "setup_source",
    "sheets",
]


def _run_here(ex: Exercise, answer: Any) -> list[dict]:
    """The learner's outcomes in this process, up to and including the first that ran out of time."""
    outcomes: list[dict] = []
    for c in ex.all_cases():
        try:
            with time_limit(ex.time_limit):
                outcome = outcome_of(answer, c)
        except TimeLimit:
            outcome = timeout_outcome(ex.time_limit)
        outcomes.append(outcome)
        if outcome["kind"] == "timeout":
            break
    return outcomes


def judge(ex: Exercise, outcomes: list[dict], seconds: float = 0.0) -> Result:
    """The verdict on what the learner's answer did in the cases (fewer outcomes than cases: it was stopped)."""
    cases, expected = ex.all_cases(), ex.expected()
    base = dict(id=ex.id, title=ex.title, max_points=ex.points, points=0, cases=len(cases), seconds=seconds)
    blank = not ex.make_cases and outcomes and outcomes[0].get("value") is None and outcomes[0]["kind"] == "value"
    if blank or (outcomes and all(o["kind"] == "error" and o["type"] == "NotImplementedError" for o in outcomes)):
        return Result(
            **base,
            status="not started",
            sentence="Write your answer in the cell above, run it, then run this check again.",
        )
    problems = [compare(w, g, c) for w, g, c in zip(expected, outcomes, cases)]
    problems += ["This case was not run, because an earlier one was stopped."] * (len(cases) - len(outcomes))
    failing = [i for i, p in enumerate(problems) if p]
    if not failing:
        return Result(**{**base, "points": ex.points}, status="passed", cases_passed=len(cases))
    shown = [i for i in failing if i < len(outcomes)]
    base |= dict(status="failed", cases_passed=len(cases) - len(failing))
    if not shown:
        i = failing[0]
        return Result(**base, sentence=problems[i], detail=problems[i], case=cases[i].name)
    wrong, explained = nearest(ex, outcomes, failing)
    stopped = [i for i in shown if outcomes[i]["kind"] not in ("value", "error")]
    # the case that is shown belongs to the sentence that is said; one with a result says more than one with an error
    small = lambda i: (bool(cases[i].error), cases[i].size, i)
    i = stopped[0] if stopped and not wrong else min(explained or shown, key=small)
    sentence = problems[i]
    if wrong:
        sentence = ex.wrong_answers[wrong][0]
        if len(explained) < len(shown):
            sentence = _in_part(sentence, f"{len(explained)} of the {len(shown)} cases that fail")
    c, got = cases[i], outcomes[i]
    given = tuple((n, show(v)) for n, v in [*((c.called(i), v) for i, v in enumerate(c.args)), *c.kwargs.items()])
    want_text, got_text = show_both(expected[i], got, c)
    return Result(
        **base,
        sentence=sentence,
        detail=problems[i],
        case=c.name,
        wrong_answer=wrong,
        given=given,
        expected=with_article(" or ".join(c.error)) if c.error else "" if c.secret else want_text,
        got="" if got["kind"] == "error" and not c.error else got_text,
        line=f"{got['lineno']}: {got.get('line', '')}".rstrip(": ") if got.get("lineno") else "",
        printed=str(got.get("printed", "")),
    )


_AS_IT_WAS = re.compile(r"This is the code as it was[.:,] *")


def _in_part(sentence: str, cases: str) -> str:
    """The sentence of a wrong answer that explains only some of the failing `cases`.

    The code of a statement may hold several mistakes. An answer that shares its results in part need not have been made
    from it, nor hold all of them: then the sentence speaks of that code, and not of the answer.
    """
    if not (found := _AS_IT_WAS.match(sentence)):
        return f"In part: {sentence} (This explains {cases}.)"
    about = sentence[found.end() :]
    return f"In {cases} your answer gives what the code as it was gives. About that code: {about}"


def failed_by(ex: Exercise, wrong: str) -> frozenset[int]:
    """The cases that a named wrong answer fails."""
    compared = enumerate(zip(ex.expected(), ex.given_by(wrong), ex.all_cases()))
    return ex.once(f"failed by {wrong}", lambda: frozenset(i for i, each in compared if compare(*each)))


def nearest(ex: Exercise, outcomes: list[dict], failing: list[int]) -> tuple[str, list[int]]:
    """The wrong answer that explains the outcomes best, and which of the failing cases it explains; `("", [])` if none.

    A wrong answer speaks for itself where it gives what the learner got, in a case that the learner fails, and against
    itself where it fails a case that the learner passes. It must explain at least half of what fails and more than it
    contradicts: a sentence about a mistake that was not made is worse than none. Bad arguments that the learner refuses
    and the wrong answer does not are no contradiction where it gives a wrong result of the learner's: whoever makes one
    mistake may still have checked the arguments. Of several that explain as much, the one with fewer of them is said.
    """
    cases = ex.all_cases()
    asked = frozenset(name for c in cases for name in c.error)
    passed = [i for i in range(len(outcomes)) if i not in failing]
    ran = [i for i in failing if i < len(outcomes)]
    best, best_score, best_explained = "", (0.0, 0), []
    for name in ex.wrong_answers:
        given = ex.given_by(name)
        same = {i: likeness(given[i], outcomes[i], cases[i], asked) for i in ran}
        explained = sum(same.values())
        if explained * 2 < len(ran):
            continue
        fails = [i for i in passed if i in failed_by(ex, name)]
        against = [i for i in fails if likeness(given[i], outcomes[i], cases[i], asked) < 1]
        unchecked = [i for i in against if cases[i].error] if any(same[i] for i in ran if not cases[i].error) else []
        score = (explained - len(against) + len(unchecked), -len(unchecked))
        if score > best_score and score[0] > 0:
            best, best_score = name, score
            best_explained = [i for i in ran if same[i] == 1] or [i for i in ran if same[i]]
    return best, best_explained


def kill_matrix(ex: Exercise) -> tuple[list[dict], list[str]]:
    """For each wrong answer the cases that it fails and the sentence it gets; and what is wrong with the exercise."""
    problems = []
    cases = ex.all_cases()
    if why := ex.broken():
        return [], [f"{ex.id}: {why}"]
    verdict = judge(ex, _run_here(ex, ex.solution))
    if not verdict.passed:
        problems.append(f"{ex.id}: the solution does not pass: {verdict.detail}")
    rows = []
    for name in ex.wrong_answers:
        outcomes = ex.given_by(name)
        result = judge(ex, outcomes)
        killed = [cases[i].name for i in sorted(failed_by(ex, name))]
        rows.append({"exercise": ex.id, "wrong_answer": name, "killed_by": killed, "sentence_of": result.wrong_answer})
        if result.passed:
            problems.append(f"{ex.id}: the wrong answer {name} passes.")
        elif result.wrong_answer != name:
            told = f"that of {result.wrong_answer}" if result.wrong_answer else "none"
            problems.append(
                f"{ex.id}: {name} should get its own sentence and gets {told}; a case is missing that tells them apart."
            )
    return rows, problems


_MISSING = object()


def check(id: str, answer: Any = _MISSING) -> Result:
    """Check an answer: run its cases, and on failure say which known mistake gives the same results.

    Args:
        id: the exercise, for example `"attention.scaled_dot_product"`.
        answer: the function, class or value; by default what the notebook calls by the exercise's name.
    Returns:
        The verdict. In a notebook it shows itself as a card, in a plain script it prints itself. Nothing that the
        answer does is raised from here.
    """
    return shown_in_scripts(_check(find(id), answer, sys._getframe(1).f_globals))


def _check(ex: Exercise, answer: Any, space: dict) -> Result:
    if answer is _MISSING:
        if ex.name not in space:
            sentence = f"There is no {ex.name} yet: run the cell that defines it first."
            return ex.failed(sentence, status="not started")
        answer = space[ex.name]
    import torch

    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the learner's own random numbers go on as if nothing had happened
        if why := ex.broken():
            return ex.failed(
                f"The check itself cannot run: {why}. Something in this notebook has replaced a part of PyTorch or "
                "Python; restart the kernel and run all cells."
            )
        result = judge(ex, _run_here(ex, answer), time.perf_counter() - started)
    if os.environ.get("NBGRADER_EXECUTION"):
        # nbgrader run without our configuration counts a cell as wrong only when it raises.
        if not result.passed:
            raise AssertionError("\n" + repr(result))
        return result
    with contextlib.suppress(OSError):  # a folder that cannot be written must not cost the verdict
        Progress().record(result)
    return result


def hint(id: str) -> Note:
    """The next hint of an exercise, from gentle to almost there; the last one again when all were given."""
    return shown_in_scripts(_hint(id))


def _hint(id: str) -> Note:
    ex = find(id)
    given = Progress().add(ex.id, "hints", limit=len(ex.hints))
    more = "This was the last hint." if given == len(ex.hints) else f"The next one: {how_to_ask('hint', ex.id)}"
    return Note(f"Hint {given} of {len(ex.hints)} – {ex.title}", f"{ex.hints[given - 1]} {more}")


def reveal(id: str) -> Note:
    """The solution of an exercise. Progress remembers that it was seen; the points are not lost."""
    ex = find(id)
    Progress().add(ex.id, "reveals", limit=1)
    advice = "One way to do it. Close it, and write it again in your own words."
    return shown_in_scripts(Note(f"Solution – {ex.title}", advice, ex.section("solution")))


def progress(sheet: str | None = None, *, path: str | Path | None = None) -> Overview:
    """What is passed, how many tries and hints it took, and where the solution was seen; the sheet at hand first."""
    return shown_in_scripts(overview(sheet, path))

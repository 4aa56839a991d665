"""The exercise commands of `llmcourse`: check, hint, reveal, progress, exercises, classroom."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from llmcourse.settings import BadInput, course_root, number, one_of

__all__ = ["app", "register"]

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Bad input ends the command with its one sentence and exit code 2."""
    from llmcourse.practice import cards

    before, cards.IN_SHELL = cards.IN_SHELL, True
    try:
        yield
    except BadInput as e:
        print(f"llmcourse: {cards.clean(e)}", file=sys.stderr)
        raise typer.Exit(2) from None
    finally:
        cards.IN_SHELL = before


def _console():
    from rich.console import Console

    return Console(highlight=False)


def _table(title: str, *columns: str):
    """One line for each row: numbers, results and the first column keep their width; a text is cut, with a sign."""
    from rich.table import Table

    numbers = ("points", "cases", "min", "level", "tries", "hints", "known")
    texts = [name for name in columns[1:] if name not in (*numbers, "result")]
    table = Table(title=_escape(title), title_justify="left", caption_justify="left", expand=bool(texts))
    for name in columns:
        justify, ratio = "right" if name in numbers else "left", 1 if name in texts else None
        table.add_column(name, justify=justify, ratio=ratio, overflow="ellipsis", no_wrap=True)
    return table


def _mark(status: str) -> str:
    return {"passed": "[green]✓ passed[/]", "failed": "[red]✗ not yet[/]", "not yet": "[red]✗ not yet[/]"}.get(
        status, "○ not started"
    )


def _sheet_files(what: str) -> tuple[list[Path], str | None]:
    """The notebooks that PATH_OR_ID means, and the one exercise that is wanted."""
    from llmcourse.practice import checking

    path = Path(what)
    if path.is_dir():
        return sorted(p for p in path.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts), None
    if path.suffix == ".ipynb" or path.is_file():
        return [path], None
    chapters = _chapters()
    name, _, exercise = chapters.get(what, what).partition(".")
    if name not in chapters.values():
        raise BadInput(
            f"sheet is {what!r}; allowed: the path of a notebook, a folder, or one of {', '.join(chapters.values())} "
            "(or SHEET.EXERCISE)."
        )
    if exercise:
        checking.find(what)
    for folder in (Path.cwd(), *Path.cwd().parents, course_root()):
        found = sorted(folder.glob(f"exercises/*/{name}.ipynb")) or sorted(folder.glob(f"{name}.ipynb"))
        if found:
            if folder != Path.cwd():
                print(f"grading {found[0]}", file=sys.stderr)  # not here: say which copy this is
            return found[:1], what if exercise else None
    raise BadInput(
        f"sheet is {what!r}; allowed: a sheet that is in exercises/ here or above; {name}.ipynb was not found."
    )


def _chapters() -> dict[str, str]:
    """Chapter folder -> sheet: 03_attention -> attention."""
    from llmcourse.practice import checking

    return checking.chapters()


def check(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_ID",
            help="A sheet's notebook, a folder of sheets, a sheet or its chapter (attention, 03_attention), or one "
            "exercise: attention.scaled_dot_product",
        ),
    ],
    as_json: AsJson = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML to this file.")] = None,
    seconds: Annotated[float, typer.Option(help="Time limit for one cell.")] = 10.0,
    require_sandbox: Annotated[
        bool, typer.Option("--require-sandbox", help="Refuse where the system cannot wall in a stranger's code.")
    ] = False,
) -> None:
    """Grade a sheet in a child process. Exit code 0 only if every exercise passes."""
    from llmcourse.practice import grading

    with _plainly():
        if junit is not None and not junit.parent.is_dir():
            raise BadInput(f"--junit is {str(junit)!r}; allowed: a file in a folder that exists.")
        files, only = _sheet_files(what)
        if not files:
            raise BadInput(f"folder is {what!r}; allowed: a folder with notebooks in it.")
        limits = grading.Limits(cell_seconds=number("seconds", seconds, above=0))
        if require_sandbox and not grading.safe(stands := grading.walls_here()):
            raise BadInput(
                f"--require-sandbox: this system offers {', '.join(stands) or 'nothing'}; allowed: seccomp with "
                "bubblewrap or landlock (Linux; apt-get install bubblewrap)."
            )
        results = []
        for file in files:
            try:
                sheet = grading.grade_apart(file, only=only, limits=limits)
            except grading.NoSheet as e:
                if len(files) == 1:
                    raise
                print(f"left out: {_clean(file)}: {e}", file=sys.stderr)  # a folder may hold other notebooks
                continue
            results.append(sheet)
            _remember(sheet)
            if not as_json:
                _print_sheet(sheet, alone=len(files) == 1)
            if junit is not None:  # after every file: what was found is there, whatever happens next
                try:
                    junit.write_text(grading.junit(results), encoding="utf8")
                except OSError as e:
                    raise BadInput(
                        f"--junit is {str(junit)!r}; allowed: a file that can be written ({e.strerror})."
                    ) from None
        if not results:
            raise BadInput(f"folder is {what!r}; allowed: a folder with exercise sheets in it.")
    passed = all(r.passed for r in results)
    if as_json:
        print(json.dumps({"passed": passed, "sheets": [r.to_dict() for r in results]}, indent=1))
    if len(files) == 1 and results[0].error:
        raise typer.Exit(2)
    raise typer.Exit(0 if passed else 1)


def _print_sheet(sheet, alone: bool) -> None:
    """The verdicts of one file; of a file on its own also the smallest failing case of each exercise."""
    if sheet.error:
        print(f"llmcourse: {_clean(sheet.error)}", file=sys.stderr)
        return
    from llmcourse.practice import grading

    table = _table(
        f"{_clean(sheet.file)}: {sheet.points} of {sheet.max_points} points", "exercise", "result", "cases", "points"
    )
    for r in sheet.results:
        table.add_row(r.id.split(".")[1], _mark(r.status), f"{r.cases_passed}/{r.cases}", f"{r.points}/{r.max_points}")
    _console().print(table)
    for r in sheet.results:
        if r.status == "failed":
            print(f"\n{r!r}" if alone else f"  {r.id}: {r.sentence}")
    if sheet.seed:
        print(f"\nChecked with the numbers of the seed {sheet.seed}.")
    stands = ", ".join(sheet.walls) or "nothing but Python's own"
    print(
        f"\nWalls around the code: {stands}."
        + ("" if grading.safe(sheet.walls) else " Not enough for the work of strangers.")
    )


def _clean(text: object) -> str:
    from llmcourse.practice import checking

    return checking.clean(text)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _remember(sheet) -> None:
    """The learner's own sheets count in the learner's progress; a teacher's pile of submissions does not."""
    from llmcourse.practice import checking

    store = checking.Progress()
    mine = (store.path.parent / "exercises").resolve()
    if mine in Path(sheet.file).resolve().parents:
        with contextlib.suppress(OSError):
            for r in sheet.results:
                store.record(r)


def hint(id: Annotated[str, typer.Argument(help="An exercise, for example attention.scaled_dot_product")]) -> None:
    """Show the next hint of an exercise; there are three."""
    from llmcourse.practice import checking

    with _plainly():
        print(checking.hint(id))


def reveal(id: Annotated[str, typer.Argument(help="An exercise, for example attention.scaled_dot_product")]) -> None:
    """Show the solution of an exercise. Progress remembers it."""
    from llmcourse.practice import checking

    with _plainly():
        print(checking.reveal(id))


def progress(
    sheet: Annotated[str | None, typer.Argument(help="One sheet; all by default")] = None,
    merge: Annotated[Path | None, typer.Option(metavar="FILE", help="First take over another progress file.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is passed, and how many tries and hints it took."""
    from llmcourse.practice.records import Progress, overview

    with _plainly():
        if merge is not None:
            if not merge.is_file():
                raise BadInput(f"--merge is {str(merge)!r}; allowed: an existing progress file.")
            Progress().merge(merge)
        seen = overview(_chapters().get(sheet, sheet))
    if as_json:
        print(json.dumps(seen.to_dict(), indent=1))
        return
    table = _table(seen.verdict, "exercise", "result", "tries", "hints", "solution")
    for r in seen.rows:
        table.add_row(r["id"], _mark(r["status"]), str(r["attempts"]), str(r["hints"]), "seen" if r["reveals"] else "")
    _console().print(table)


def exercises(
    only: Annotated[list[str] | None, typer.Argument(metavar="SHEET…", help="All sheets without it.")] = None,
    as_json: AsJson = False,
    kill_matrix: Annotated[
        bool,
        typer.Option(
            "--kill-matrix",
            help="Run every solution and every wrong answer; exit code 0 only if all wrong answers are found out.",
        ),
    ] = False,
) -> None:
    """List the exercises of all sheets, or of some, or prove them."""
    from llmcourse.practice import checking

    with _plainly():
        chosen = [one_of("sheet", name, checking.sheets()) for name in only or checking.sheets()]
        every = [ex for sheet in dict.fromkeys(chosen) for ex in checking.load_sheet(sheet).values()]
    if kill_matrix:
        _prove(every, as_json)
        return
    rows = [
        {name: getattr(ex, name) for name in ("id", "chapter", "title", "minutes", "difficulty", "points")}
        | {"wrong_answers": list(ex.wrong_answers)}
        for ex in every
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    total = sum(ex.points for ex in every)
    table = _table(f"{len(rows)} exercises, {total} points", "exercise", "title", "min", "level", "points", "known")
    for r in rows:
        numbers = (r["minutes"], r["difficulty"], r["points"], len(r["wrong_answers"]))
        table.add_row(r["id"], _escape(r["title"]), *map(str, numbers))
    table.caption = "level: difficulty from 1 to 5; known: wrong answers that have a sentence of their own"
    _console().print(table)


def _prove(every: list, as_json: bool) -> None:
    from llmcourse.practice import checking

    all_rows, all_problems = [], []
    for ex in every:
        rows, problems = checking.kill_matrix(ex)
        all_rows += rows
        all_problems += problems
    if as_json:
        print(json.dumps({"rows": all_rows, "problems": all_problems}, indent=1))
    else:
        found = sum(bool(r["killed_by"]) for r in all_rows)
        own = sum(r["sentence_of"] == r["wrong_answer"] for r in all_rows)
        table = _table(
            f"{found} of {len(all_rows)} wrong answers found out, {own} told their own sentence",
            "exercise",
            "wrong answer",
            "own sentence",
            "found out by the cases",
        )
        for r in all_rows:
            table.add_row(
                r["exercise"],
                r["wrong_answer"],
                "yes" if r["sentence_of"] == r["wrong_answer"] else "NO",
                _escape("; ".join(r["killed_by"])) or "NONE",
            )
        _console().print(table)
        for p in all_problems:
            print(f"problem: {p}", file=sys.stderr)
    raise typer.Exit(1 if all_problems else 0)


COMMANDS = (
    (
        "nbgrader generate_assignment --force {0}",
        "make the learners' sheet in exercises/ and enter it in the gradebook",
    ),
    (
        "nbgrader zip_collect {0}",
        "unpack what was downloaded to submitted/STUDENT/{0}/ (or copy the files there yourself)",
    ),
    ("nbgrader autograde {0}", "grade every submission; renamed and damaged ones too"),
    ("nbgrader generate_feedback {0}", "write a page for each learner to feedback/STUDENT/{0}/"),
    ("nbgrader export", "write all marks to grades.csv"),
)


def classroom(
    sheet: Annotated[
        str, typer.Argument(help="A sheet or its folder, for example attention or 03_attention")
    ] = "attention",
    seed: Annotated[
        int | None, typer.Option(help="This year's number: other numbers in statements and checks than last year.")
    ] = None,
    gradescope: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write an autograder for Gradescope to this new folder.")
    ] = None,
) -> None:
    """The five commands that a teacher needs, in order; or an autograder for Gradescope."""
    from llmcourse.practice import yearly

    with _plainly(), yearly.with_seed(seed if seed is not None else yearly.seed()):
        chapters = _chapters()
        folder = next((folder for folder, name in chapters.items() if sheet in (folder, name)), None)
        if folder is None:
            raise BadInput(f"sheet is {sheet!r}; allowed: {', '.join(chapters.values())}.")
        number = yearly.seed()
        if gradescope is not None:
            from llmcourse.practice.gradescope import write

            print(f"Upload as autograder: {write(chapters[folder], gradescope)}")
            return
    before = f"{yearly.VARIABLE}={number} " if number else ""
    print("Once: pip install 'llmcourse[classroom]', in a clone of the course. Then, in its top folder:\n")
    for i, (command, what) in enumerate(COMMANDS, 1):
        print(f"{i}. {before}{command.format(folder)}\n   {what.format(folder)}")
    if number:
        _say_what_differs(chapters[folder], number)


def _say_what_differs(sheet: str, number: int) -> None:
    from llmcourse.practice import checking, yearly

    stated = [ex for ex in checking.load_sheet(sheet) if yearly.changes(ex, number)]
    print(f"\nWith the seed {number} these exercises state other numbers: {', '.join(stated) or 'none of this sheet'}.")
    print("The checks of most others have cases of this year on top.")


def register(target: typer.Typer) -> None:
    """Add the exercise commands to another app."""
    command: Callable
    for command in (check, hint, reveal, progress, exercises, classroom):
        target.command(command.__name__)(command)


app = typer.Typer(help="Exercises: check, hint, reveal, progress.", no_args_is_help=True, add_completion=False)
register(app)


if __name__ == "__main__":
    app()

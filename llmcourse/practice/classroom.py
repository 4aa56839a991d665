"""What nbgrader needs to work with the course's sheets; used by `nbgrader_config.py` and by `tools/make_exercises.py`.

nbgrader is an adapter here: releasing strips the master of what only the checker needs, and autograding asks
`llmcourse.practice.grading` for the verdicts, so that the marks are those of `llmcourse check` and a submission cannot
set its own.

Importing this module needs nbgrader (`pip install "llmcourse[classroom]"`).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbgrader.preprocessors import NbGraderPreprocessor

from llmcourse.practice import checking, grading, yearly
from llmcourse.settings import BadInput

__all__ = ["ForLearners", "GradeApart", "directive", "rename_submissions"]


def directive(cell: dict, name: str) -> bool:
    """Whether the first line of a code cell is `#| NAME: true`."""
    source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
    return cell["cell_type"] == "code" and source.split("\n", 1)[0].strip() == f"#| {name}: true"


class ForLearners(NbGraderPreprocessor):
    """Release: leave the checker cells out, drop directive lines, write the facts of an exercise under its title.

    With a seed (`LLMCOURSE_SHEET_SEED`) statements have the numbers of that seed, and a line tells it to the checks.
    """

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        sheet = nb.metadata.get("llmcourse", {}).get("sheet")
        exercises = list(checking.load_sheet(sheet).values()) if sheet in checking.sheets() else []
        nb.cells = [c for c in nb.cells if not directive(c, "checker")]
        if number := yearly.seed():
            _of_this_year(nb, sheet, number)
        for cell in nb.cells:
            if directive(cell, "export"):
                cell.source = cell.source.split("\n", 1)[1].lstrip("\n")
            grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
            for number, ex in enumerate(exercises, 1):
                if grade_id == f"{ex.name}-statement":
                    title, _, rest = cell.source.partition("\n")
                    points = "1 point" if ex.points == 1 else f"{ex.points} points"
                    minutes = "1 minute" if ex.minutes == 1 else f"{ex.minutes} minutes"
                    facts = f"*Exercise {number} · about {minutes} · difficulty {ex.difficulty} of 5 · {points}"
                    facts += f' · stuck? run* `hint("{ex.id}")`'
                    cell.source = f"{title}\n\n{facts}\n\n{rest.strip()}"
        return nb, resources


IMPORT = re.compile(r"^from llmcourse\.practice import check, .*$", re.M)


def _of_this_year(nb: NotebookNode, sheet: str, number: int) -> None:
    """Write the numbers of this seed into statements and answer cells, and the seed into the sheet."""
    nb.metadata["llmcourse"]["seed"] = number
    for cell in nb.cells:
        name, _, kind = cell.metadata.get("nbgrader", {}).get("grade_id", "").rpartition("-")
        if kind in ("statement", "answer"):
            cell.source = yearly.changed_text(f"{sheet}.{name}", cell.source, number)
        elif cell.cell_type == "code":
            cell.source = IMPORT.sub(lambda m: f"{m[0]}, sheet_seed\n\nsheet_seed({number})", cell.source)


class GradeApart(NbGraderPreprocessor):
    """Autograde: instead of running the notebook, grade it apart and write the verdicts into its test cells."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        graded = grading.grade_apart(resources.get("unique_key", "submission"), text=json.dumps(nb))
        sheet, results = graded.sheet, {r.id.split(".")[1]: r for r in graded.results}
        if graded.error:
            raise ValueError(graded.error)
        if not grading.safe(graded.walls):
            self.log.warning("Graded without the kernel's help (%s): not for the work of strangers", graded.walls)
        if graded.seed != (told := grading.seed_of(nb)):
            self.log.warning("Given out with the seed %d, graded with %d: set LLMCOURSE_SHEET_SEED", told, graded.seed)
        self.log.info("Graded sheet %s: %d of %d passed", sheet, sum(r.passed for r in results.values()), len(results))
        for cell in nb.cells:
            if cell.cell_type != "code":
                continue
            cell.outputs = []
            about = grading.about(cell)
            if about.get("grade") and not about.get("solution"):
                cell.outputs = _outputs(results.get(str(about.get("grade_id", "")).removesuffix("-check")))
        return nb, resources


def _outputs(result: checking.Result | None) -> list[NotebookNode]:
    """The outputs that nbgrader reads a mark from: an error is no points, no error is all points."""
    from nbformat.v4 import new_output

    if result is None:
        return [
            new_output("error", ename="NotGraded", evalue="no such exercise", traceback=["There is no such exercise."])
        ]
    card = new_output("display_data", data={"text/html": result._repr_html_(), "text/plain": repr(result)})
    if result.passed:
        return [card]
    return [
        card,
        new_output(
            "error", ename="NotPassed", evalue=result.verdict, traceback=[f"{result.verdict}. {result.sentence}"]
        ),
    ]


def rename_submissions(assignment: str, student: str, notebooks: list[str]) -> None:
    """nbgrader looks for a sheet by its file name; give a renamed one a copy with the name of the sheet that it is.

    Called by nbgrader before a submission is converted. `notebooks` is nbgrader's own list and is changed in place.
    """
    present = {Path(n).stem for n in notebooks}
    for i, file in enumerate(notebooks):
        path = Path(file)
        if path.stem in checking.sheets():
            continue
        try:
            sheet = grading.which_sheet(json.loads(path.read_text(encoding="utf8")))
        except (BadInput, ValueError, OSError, RecursionError):
            continue
        if sheet not in present:
            copy = path.with_name(f"{sheet}.ipynb")
            shutil.copyfile(path, copy)
            notebooks[i] = str(copy)
            present.add(sheet)
    notebooks.sort()

"""A sheet as a Gradescope autograder: the same checks, in the form that Gradescope runs.

`write` makes the zip file that a teacher uploads: `setup.sh` (run once, when Gradescope builds its image),
`run_autograder` (run for each submission) and this package. `main` is what `run_autograder` calls. It looks for the
sheet among the files that were handed in, has it graded in child processes as `llmcourse check` does, and writes
`results.json`. The learner's code never runs in the process that writes the marks.

Otter-Grader's own grading on Gradescope uses this very form (a `run_autograder` that writes a `results.json`), so a
course that runs on Otter can take the zip file beside its others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

from llmcourse.practice import checking, grading, yearly
from llmcourse.settings import BadInput, course_root, require

__all__ = ["SCHEMA", "grade_folder", "results", "write"]

MINUTES = 9
"""Gradescope ends an autograder after ten minutes, unless somebody has set more"""

_shown = {"enum": ["visible", "hidden", "after_due_date", "after_published"]}
_text = {"type": "string"}
_format = {"enum": ["text", "html", "simple_format", "md", "ansi"]}
_points = {"type": "number", "minimum": 0}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score": _points,
        "execution_time": _points,
        "output": _text,
        "output_format": _format,
        "test_output_format": _format,
        "test_name_format": _format,
        "visibility": _shown,
        "stdout_visibility": _shown,
        "extra_data": {"type": "object"},
        "tests": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "score": _points,
                    "max_score": _points,
                    "status": {"enum": ["passed", "failed"]},
                    "name": _text,
                    "name_format": _format,
                    "number": _text,
                    "output": _text,
                    "output_format": _format,
                    "tags": {"type": "array", "items": _text},
                    "visibility": _shown,
                    "extra_data": {"type": "object"},
                },
                "required": ["score", "max_score", "name"],
                "additionalProperties": False,
            },
        },
    },
    "anyOf": [{"required": ["score"]}, {"required": ["tests"]}],
    "additionalProperties": False,
}
"""what Gradescope documents of `results.json`, as a JSON schema"""


def results(sheet: grading.SheetResult, seconds: float = 0.0) -> dict:
    """The verdicts on a sheet as Gradescope's results: a test for each exercise, with the sentence as its output."""
    titles = {r.id: i for i, r in enumerate(sheet.results, 1)}
    tests = [
        {
            "number": str(titles[r.id]),
            "name": r.title,
            "score": r.points,
            "max_score": r.max_points,
            "status": "passed" if r.passed else "failed",
            "output": checking.clean(repr(r)),
            "output_format": "text",
            "visibility": "visible",
        }
        for r in sheet.results
    ]
    said = sheet.error or f"{sheet.points} of {sheet.max_points} points."
    about = {"sheet": sheet.sheet, "seed": sheet.seed, "walls": list(sheet.walls), "safe": grading.safe(sheet.walls)}
    return {
        "score": sheet.points,
        "execution_time": round(seconds, 3),
        "output": checking.clean(said),
        "output_format": "text",
        "stdout_visibility": "hidden",
        "extra_data": about,
        "tests": tests,
    }


def grade_folder(folder: Path, sheet: str, limits: grading.Limits | None = None) -> grading.SheetResult:
    """Grade the sheet among the files that were handed in, whatever its file is called.

    Where several files are this sheet, the first by name counts.
    """
    require(folder.is_dir(), "submission", str(folder), "a folder with the files that were handed in")
    files = sorted(p for p in folder.rglob("*.ipynb") if p.is_file() and not p.is_symlink())
    blank = tuple(ex.failed("Nothing was graded.", status="not started") for ex in checking.load_sheet(sheet).values())
    other = ""
    for file in files:
        name = str(file.relative_to(folder))
        try:
            graded = grading.grade_apart(name, text=grading._read_file(file), limits=limits)
        except BadInput as e:  # damaged, or none of the course's sheets
            other = other or str(e)
            continue
        if graded.sheet == sheet:
            return graded
        other = other or graded.error or f"{name} is the sheet {graded.sheet}; asked for is {sheet}."
    if not files:
        other = f"No notebook was handed in; asked for is {sheet}.ipynb."
    return grading.SheetResult(sheet, "", blank, error=other, seed=yearly.seed())


def main(argv: list[str] | None = None) -> int:
    """Grade one submission and write the results. The file appears whole, or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submission", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sheet", required=True)
    args = parser.parse_args(argv)
    started = time.monotonic()
    graded = grade_folder(args.submission, args.sheet, grading.Limits(sheet_seconds=60.0 * MINUTES - 150))
    text = json.dumps(results(graded, time.monotonic() - started), indent=1, ensure_ascii=False)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    whole = args.results.with_suffix(".part")
    whole.write_text(text + "\n", encoding="utf8")
    os.replace(whole, args.results)
    print(f"{graded.points} of {graded.max_points} points. Walls: {', '.join(graded.walls) or 'none'}.")
    return 0


# ------------------------------------------------------------------------------- the zip file

RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission. Made by `llmcourse classroom {sheet} --gradescope`.
set -eu
root="${{AUTOGRADER_ROOT:-/autograder}}"
python="${{AUTOGRADER_PYTHON:-/autograder/env/bin/python}}"
cd "$root/source"
export PYTHONPATH="$root/source" LLMCOURSE_SHEET_SEED={seed} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m llmcourse.practice.gradescope "$root/submission" "$root/results/results.json" --sheet {sheet}
"""

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image of this assignment.
set -eu
# bubblewrap is one of the walls around the learner's code (see the chapter "Teaching with this course")
apt-get update
apt-get install -y --no-install-recommends bubblewrap python3-pip curl ca-certificates
python3 -m pip install uv || python3 -m pip install --break-system-packages uv
uv venv --python {python} /autograder/env
uv pip install --python /autograder/env/bin/python --index-url https://download.pytorch.org/whl/cpu torch=={torch}
uv pip install --python /autograder/env/bin/python -r /autograder/source/requirements.txt
"""


def _requirements() -> list[str]:
    """The package's own dependencies, in the versions that are installed here; PyTorch comes from its own index."""
    names = [re.match(r"[\w.-]+", r)[0] for r in importlib.metadata.requires("llmcourse") or [] if "extra ==" not in r]
    return sorted(f"{n}=={importlib.metadata.version(n)}" for n in names if n != "torch")


def write(sheet: str, out: Path) -> Path:
    """Write the autograder of a sheet: the folder `out` with its files, and `out/autograder.zip` to upload.

    Raises:
        BadInput: no such sheet, or the folder holds something already.
    """
    checking.load_sheet(sheet)
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "out", str(out), "a new or an empty folder")
    import sys

    source = out / "source"
    source.mkdir(parents=True)
    seed, torch = yearly.seed(), importlib.metadata.version("torch").partition("+")[0]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for name, text in (
        ("run_autograder", RUN.format(sheet=sheet, seed=seed)),
        ("setup.sh", SETUP.format(python=python, torch=torch)),
        ("requirements.txt", "\n".join(_requirements()) + "\n"),
    ):
        (source / name).write_text(text, encoding="utf8")
        (source / name).chmod(0o755 if name != "requirements.txt" else 0o644)
    shutil.copyfile(course_root() / "settings.ini", source / "settings.ini")
    leave = shutil.ignore_patterns("__pycache__", "_models", "_course", "*.pyc")
    shutil.copytree(grading.PACKAGE, source / "llmcourse", ignore=leave)
    packed = out / "autograder.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            made.write(path, path.relative_to(source))  # keeps the right to run
    return packed


if __name__ == "__main__":
    raise SystemExit(main())

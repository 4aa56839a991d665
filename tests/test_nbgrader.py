"""The real nbgrader: release, four submissions, autograde, feedback, export.

The marks are those of `llmcourse check`.
"""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason='nbgrader is not installed: pip install "llmcourse[classroom]"')

import nbformat
from example_sheet import ROOT, build, tool

from llmcourse.practice import checking, grading

pytestmark = pytest.mark.slow
CHAPTER, SHEET = "03_example", "example"

POISON = """
import sys
import torch
import llmcourse.practice.checking

check = llmcourse.practice.checking.check = lambda *a, **k: "passed"
llmcourse.practice.checking.Result.passed = True
torch.equal = torch.allclose = lambda *a, **k: True


class Everything:
    def __eq__(self, other):
        return True

    def __call__(self, *a, **k):
        return self


attend = RMSNorm = sample = n_parameters = Everything()
"""


def nbgrader(folder: Path, *arguments: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader starts the program alembic
    env = os.environ | {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
        "JUPYTER_DATA_DIR": str(folder / ".jupyter-data"),
        "HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def answers(nb: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == f"{name}-answer")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder with our configuration, after all five steps; one learner handed in a renamed file."""
    folder = tmp_path_factory.mktemp("class")
    made = build(folder)
    (folder / "nbgrader_config.py").write_text(
        f"import llmcourse.practice.sheets\nllmcourse.practice.sheets.__path__.append({str(made['module'].parent)!r})\n"
        + (ROOT / "nbgrader_config.py").read_text(encoding="utf8"),
        encoding="utf8",
    )
    nbgrader(folder, "generate_assignment", "--force", CHAPTER)

    learner = nbformat.read(made["learner"], 4)
    master = nbformat.read(made["master"], 4)
    right = copy.deepcopy(learner)
    for ex in checking.load_sheet(SHEET).values():
        answers(right, ex.name).source = tool().without_markers(answers(master, ex.name).source)
    wrong = copy.deepcopy(right)
    answers(wrong, "attend").source = "def attend(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v\n"
    answers(wrong, "n_parameters").source = "n_parameters = 15"
    answers(
        wrong, "sample"
    ).source = "def sample(logits, temperature=1.0, *, generator):\n    while True:\n        pass\n"
    poisoned = copy.deepcopy(learner)
    answers(poisoned, "attend").source = POISON
    renamed = copy.deepcopy(wrong)
    renamed.metadata = nbformat.from_dict({})
    renamed.cells = [c for c in renamed.cells if c.get("id") != "RMSNorm-check"][
        ::-1
    ]  # a test cell deleted, the rest upside down
    for student, nb, name in (
        ("right", right, SHEET),
        ("wrong", wrong, SHEET),
        ("poisoned", poisoned, SHEET),
        ("renamed", renamed, "My homework (2)"),
    ):
        place = folder / "submitted" / student / CHAPTER
        place.mkdir(parents=True)
        nbformat.write(nb, place / f"{name}.ipynb")
    nbgrader(folder, "autograde", CHAPTER)
    nbgrader(folder, "generate_feedback", CHAPTER)
    nbgrader(folder, "export")
    return folder


@pytest.fixture(scope="module", autouse=True)
def example(tmp_path_factory: pytest.TempPathFactory):
    """The example sheet, known to this process."""
    import llmcourse.practice.sheets

    path = str(build(tmp_path_factory.mktemp("sheet"))["module"].parent)
    llmcourse.practice.sheets.__path__.append(path)
    sys.modules.pop(f"llmcourse.practice.sheets.{SHEET}", None)
    yield
    llmcourse.practice.sheets.__path__.remove(path)


def marks(folder: Path) -> dict[str, float]:
    with open(folder / "grades.csv", encoding="utf8") as f:
        return {row["student_id"]: float(row["raw_score"]) for row in csv.DictReader(f)}


def test_release_is_the_committed_kind(course: Path, tmp_path: Path) -> None:
    """`nbgrader generate_assignment` and tools/make_exercises.py make the same sheet."""
    ours = build(tmp_path)["learner"]
    assert nbformat.read(course / "exercises" / CHAPTER / f"{SHEET}.ipynb", 4) == nbformat.read(ours, 4)


def test_marks_are_those_of_check(course: Path) -> None:
    got = marks(course)
    total = sum(ex.points for ex in checking.load_sheet(SHEET).values())
    assert got == {"right": total, "wrong": 3, "poisoned": 0, "renamed": 3}
    for student in got:
        file = next((course / "submitted" / student / CHAPTER).glob("*.ipynb"))
        limits = grading.Limits(cell_seconds=5)
        assert grading.grade_file(file, limits=limits).points == got[student], student


def test_feedback_says_the_sentences(course: Path) -> None:
    page = (course / "feedback" / "wrong" / CHAPTER / f"{SHEET}.html").read_text(encoding="utf8")
    assert "scores are not divided by" in page
    assert "forgot the biases" in page
    assert "is there a loop that never ends?" in page
    assert "Passed: all 2 cases" in page


def test_classroom_commands_exist() -> None:
    """The five commands that `llmcourse classroom` prints are commands of this nbgrader."""
    from nbgrader.apps.nbgraderapp import NbGraderApp

    from llmcourse.practice.commands import COMMANDS

    assert len(COMMANDS) == 5
    assert {command.split()[1] for command, _ in COMMANDS} <= {
        name.replace("-", "_") for name in NbGraderApp.subcommands
    }


def test_plain_nbgrader_counts_a_failed_check_as_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without our configuration nbgrader runs the cells itself; then `check` has to raise, and nbgrader's
    Validate button works.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(AssertionError, match="forgot the biases"):
        checking.check("example.n_parameters", 15)
    assert checking.check("example.n_parameters", 20).passed
    assert not list(tmp_path.iterdir()), "a grading run is no progress of the learner"

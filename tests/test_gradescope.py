"""The Gradescope form: the zip file, the results, and the produced `run_autograder` on three submissions."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason='nbgrader is not installed: pip install "llmcourse[classroom]"')

import jsonschema
import nbformat
from conftest import ROOT
from example_sheet import tool
from typer.testing import CliRunner

from llmcourse.practice import checking, commands, gradescope, grading
from llmcourse.settings import BadInput

SHEET = "plotting"
(MASTER,) = (ROOT / "solutions").glob(f"*/{SHEET}.ipynb")

HOSTILE = """
import json, os, sys
import llmcourse.practice.checking as c

c.check = lambda *a, **k: "passed"
won = json.dumps({"score": 100, "tests": [{"name": "all", "score": 100, "max_score": 100}]})
for place in ("../../results/results.json", "/autograder/results/results.json", os.environ.get("RESULTS", "x")):
    try:
        open(place, "w").write(won)
    except BaseException:
        pass
print(won)


class Everything:
    def __eq__(self, other):
        return True

    def __call__(self, *a, **k):
        return self


front = smoothed = Everything()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gradescope") / "out"
    gradescope.write(SHEET, out)
    return out


def solved() -> nbformat.NotebookNode:
    return tool().solved(nbformat.read(MASTER, 4))


def with_answer(nb: nbformat.NotebookNode, name: str, source: str) -> nbformat.NotebookNode:
    nb = copy.deepcopy(nb)
    next(c for c in nb.cells if c.get("id") == f"{name}-answer").source = source
    return nb


def run(made: Path, root: Path, files: dict[str, str]) -> dict:
    """What `run_autograder` writes when these files are handed in; unpacked as Gradescope does it."""
    (root / "submission").mkdir(parents=True)
    (root / "results").mkdir()
    for name, text in files.items():
        (root / "submission" / name).write_text(text, encoding="utf8")
    with zipfile.ZipFile(made / "autograder.zip") as packed:
        for info in packed.infolist():
            path = packed.extract(info, root / "source")
            os.chmod(path, info.external_attr >> 16)
    env = os.environ | {
        "AUTOGRADER_ROOT": str(root),
        "AUTOGRADER_PYTHON": sys.executable,
        "RESULTS": str(root / "results" / "results.json"),
    }
    env.pop("PYTHONPATH", None)
    done = subprocess.run([root / "source" / "run_autograder"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in (root / "results").iterdir()] == ["results.json"]
    found = json.loads((root / "results" / "results.json").read_text(encoding="utf8"))
    jsonschema.validate(found, gradescope.SCHEMA)
    return found


def scores(found: dict) -> list[tuple[float, str]]:
    return [(t["score"], t["status"]) for t in found["tests"]]


@pytest.mark.slow
def test_a_right_a_wrong_and_a_hostile_submission(made: Path, tmp_path: Path) -> None:
    exercises = list(checking.load_sheet(SHEET).values())
    full = [ex.points for ex in exercises]

    right = run(made, tmp_path / "right", {"renamed (1).ipynb": nbformat.writes(solved()), "notes.txt": "hello"})
    assert scores(right) == [(p, "passed") for p in full] and right["score"] == sum(full)
    assert [t["name"] for t in right["tests"]] == [ex.title for ex in exercises]

    source = "def front(points):\n    return sorted(range(len(points)))\n"
    wrong = run(made, tmp_path / "wrong", {"plotting.ipynb": nbformat.writes(with_answer(solved(), "front", source))})
    assert scores(wrong) == [(0, "failed"), *((p, "passed") for p in full[1:])]
    ours = grading.grade(with_answer(solved(), "front", source)).results[0]
    assert len(ours.sentence) > 20 and ours.sentence in wrong["tests"][0]["output"], "the learner reads the sentence"

    hostile = run(
        made, tmp_path / "hostile", {"plotting.ipynb": nbformat.writes(with_answer(solved(), "front", HOSTILE))}
    )
    assert scores(hostile)[0] == (0, "failed") and hostile["score"] < sum(full)
    assert all(t["name"] != "all" for t in hostile["tests"]), "the file that the submission tried to write is not ours"
    assert hostile["extra_data"]["walls"] == right["extra_data"]["walls"]


def test_nothing_or_something_else_was_handed_in(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    none = gradescope.results(gradescope.grade_folder(tmp_path / "sub", SHEET))
    jsonschema.validate(none, gradescope.SCHEMA)
    assert none["score"] == 0 and none["output"] == "No notebook was handed in; asked for is plotting.ipynb."
    assert [t["score"] for t in none["tests"]] == [0, 0, 0], "the marks are there, and they are 0"
    (tmp_path / "sub" / "broken.ipynb").write_text("{", encoding="utf8")
    damaged = gradescope.results(gradescope.grade_folder(tmp_path / "sub", SHEET))
    assert damaged["score"] == 0 and "damaged" in damaged["output"]
    with pytest.raises(BadInput, match="submission is"):
        gradescope.grade_folder(tmp_path / "nowhere", SHEET)


def test_results_hold_no_markup_and_no_control_characters() -> None:
    ex = next(iter(checking.load_sheet(SHEET).values()))
    sheet = grading.SheetResult(SHEET, "x", (ex.failed("\x1b[2J<b>no</b>"),), ("seccomp",))
    found = gradescope.results(sheet, 1.23456)
    jsonschema.validate(found, gradescope.SCHEMA)
    (test,) = found["tests"]
    assert "\x1b" not in test["output"] and test["output_format"] == "text" and found["execution_time"] == 1.235
    assert found["extra_data"] == {"sheet": SHEET, "seed": 0, "walls": ["seccomp"], "safe": False}


@pytest.mark.parametrize(
    "wrong",
    [{}, {"tests": [{"name": "x"}]}, {"score": -1}, {"score": 1, "grade": 2}, {"score": 1, "visibility": "never"}],
)
def test_the_schema_refuses_what_gradescope_does_not_know(wrong: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, gradescope.SCHEMA)


def test_what_the_zip_file_holds(made: Path) -> None:
    with zipfile.ZipFile(made / "autograder.zip") as packed:
        names = {i.filename: i.external_attr >> 16 for i in packed.infolist()}
        scripts = [packed.read(name).decode() for name in ("run_autograder", "setup.sh")]
        pins = packed.read("requirements.txt").decode().split()
    assert names["run_autograder"] & 0o111 and names["setup.sh"] & 0o111
    assert "llmcourse/practice/sheets/plotting.py" in names and "settings.ini" in names
    assert not [n for n in names if "_models" in n or "__pycache__" in n]
    assert f"--sheet {SHEET}" in scripts[0] and "LLMCOURSE_SHEET_SEED=0 " in scripts[0]
    assert all("==" in pin for pin in pins) and not [p for p in pins if p.startswith("torch=")]
    for text in scripts:
        assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=30).returncode == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradescope.shutil, "copytree", lambda *a, **k: None)  # the package itself: see above
    call = lambda *a: CliRunner().invoke(commands.app, ["classroom", *a])
    good = call("01_plotting", "--gradescope", str(tmp_path / "out"), "--seed", "2027")
    assert good.exit_code == 0 and "autograder.zip" in good.stdout
    assert "LLMCOURSE_SHEET_SEED=2027 " in (tmp_path / "out" / "source" / "run_autograder").read_text(encoding="utf8")
    again = call("plotting", "--gradescope", str(tmp_path / "out"))
    assert again.exit_code == 2 and "a new or an empty folder" in again.stderr
    assert call("plotting", "--seed", "-3").exit_code == 2
    shown = call("evaluation", "--seed", "2027").stdout
    assert "LLMCOURSE_SHEET_SEED=2027 nbgrader autograde" in shown and "evaluation.paired_ratio" in shown

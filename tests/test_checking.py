"""The exercise machine, on the course's own masters and on a small sheet with one exercise of each kind."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("nbgrader", reason='nbgrader is not installed: pip install "llmcourse[classroom]"')

import nbformat
import torch
from conftest import exported_modules
from example_sheet import CELLS, ROOT, build, tool
from typer.testing import CliRunner

from llmcourse.practice import cards, checking, commands, comparing, exercises, grading, worker
from llmcourse.settings import BadInput

MASTERS = sorted((ROOT / "solutions").glob("*/*.ipynb"))
master = pytest.mark.parametrize("path", MASTERS, ids=lambda p: p.stem)
FAST = grading.Limits(cell_seconds=2.0)
cli = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def example(tmp_path_factory: pytest.TempPathFactory):
    """The example sheet, built and known to this process; gives its paths."""
    import llmcourse.practice.sheets

    torch.set_num_threads(1)
    made = build(tmp_path_factory.mktemp("sheet"))
    llmcourse.practice.sheets.__path__.append(str(made["module"].parent))
    sys.modules.pop("llmcourse.practice.sheets.example", None)
    yield made
    llmcourse.practice.sheets.__path__.remove(str(made["module"].parent))
    sys.modules.pop("llmcourse.practice.sheets.example", None)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every test is a learner with an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)


@pytest.fixture
def sheet(example) -> nbformat.NotebookNode:
    """The example sheet with every answer right."""
    return solved(example["master"])


def solved(path: Path) -> nbformat.NotebookNode:
    return tool().solved(nbformat.read(path, 4))


def answer(nb: nbformat.NotebookNode, name: str, source: str) -> nbformat.NotebookNode:
    """A copy of the sheet with this text in an answer cell."""
    nb = copy.deepcopy(nb)
    next(c for c in nb.cells if c.get("id") == f"{name}-answer").source = source
    return nb


def with_cell(nb: nbformat.NotebookNode, source: str, at: int = 1) -> nbformat.NotebookNode:
    nb = copy.deepcopy(nb)
    nb.cells.insert(at, nbformat.v4.new_code_cell(source))
    return nb


def verdicts(nb: nbformat.NotebookNode, limits: grading.Limits = FAST) -> dict[str, checking.Result]:
    return {r.id.split(".")[1]: r for r in grading.grade(nb, limits=limits).results}


def right_but(result: dict[str, checking.Result], *names: str) -> None:
    """All exercises pass except these."""
    assert {n for n, r in result.items() if not r.passed} == set(names), {n: r.sentence for n, r in result.items()}


ATTEND = (
    "def attend(q, k, v):\n"
    "    if q.shape[-1] != k.shape[-1]:\n"
    "        raise ValueError\n"
    "    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v\n"
)


# ------------------------------------------------------------------------------ the course's sheets


class TestMasters:
    @master
    def test_generated_files_are_up_to_date(self, path: Path) -> None:
        for file, text in tool().make(path, ROOT).items():
            assert file.is_file(), f"{file.name} is missing: run tools/make_exercises.py"
            assert file.read_text(encoding="utf8") == text, f"{file} is out of date: run tools/make_exercises.py"

    @master
    def test_nothing_is_left_over(self, path: Path) -> None:
        made = {p.stem for p in (ROOT / "llmcourse" / "practice" / "sheets").glob("[!_]*.py")}
        assert made == {p.stem for p in MASTERS}
        assert {(p.parent.name, p.name) for p in (ROOT / "exercises").glob("*/*.ipynb")} == {
            (p.parent.name, p.name) for p in MASTERS
        }

    @master
    def test_size(self, path: Path) -> None:
        exercises = checking.load_sheet(path.stem).values()
        # a chapter that was split, or has little to practice, has a shorter sheet: exactly these
        short = {"runtime": 5, "plotting": 3, "data": 6, "cleaning": 4, "evaluation": 7, "report": 6, "search": 7}
        short |= {"interpretability": 7, "capstone": 5}  # the capstone is a project: checkpoints beside a rubric
        assert len(exercises) >= short.get(path.stem, 8)
        assert all(len(ex.wrong_answers) >= 5 for ex in exercises)

    @master
    def test_solutions_pass_and_every_wrong_answer_hears_its_own_sentence(self, path: Path) -> None:
        problems = [p for ex in checking.load_sheet(path.stem).values() for p in checking.kill_matrix(ex)[1]]
        assert not problems, "\n".join(problems)

    @master
    def test_solutions_pass_alone_in_a_child_process_in_any_order(self, path: Path) -> None:
        nb = solved(path)
        random.Random(0).shuffle(nb.cells)
        nb.metadata = nbformat.from_dict({})
        for cell in nb.cells:
            cell.metadata = nbformat.from_dict({})
        right_but({r.id: r for r in grading.grade(nb).results})

    @master
    def test_empty_sheet_fails_every_check(self, path: Path) -> None:
        results = grading.grade_file(ROOT / "exercises" / path.parent.name / path.name).results
        assert {r.status for r in results} == {"not started"}, [(r.id, r.status, r.sentence) for r in results]

    @master
    def test_learner_sees_no_solution(self, path: Path) -> None:
        text = (ROOT / "exercises" / path.parent.name / path.name).read_text(encoding="utf8")
        for word in ("BEGIN SOLUTION", "checker: true", "ex.wrong", "@ex.cases", "export: true"):
            assert word not in text
        nb = nbformat.reads(text, 4)
        assert all(not c.outputs and c.execution_count is None for c in nb.cells if c.cell_type == "code")
        assert set(nb.metadata) == {"kernelspec", "language_info", "llmcourse"}

    @master
    def test_marking_scheme_in_the_book_is_this_one(self, path: Path) -> None:
        nb = nbformat.read(ROOT / "nbs" / "92_teaching.ipynb", 4)
        shown = "\n".join(
            str(o.get("data", {}).get("text/markdown", ""))
            for c in nb.cells
            if c.cell_type == "code"
            for o in c.outputs
        )
        for ex in checking.load_sheet(path.stem).values():
            row = f"| `{ex.id}` | {ex.title} | {ex.minutes} | {ex.difficulty} | {ex.points} |"
            assert row in shown, f"run nbs/92_teaching.ipynb again: {row}"

    @master
    def test_sheet_needs_only_chapters_up_to_its_own(self, path: Path) -> None:
        chapter, number = path.parent.name.split("_")[0], exported_modules() | {"capstone": "18"}  # written by hand
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != "code":
                continue
            for node in ast.walk(ast.parse(cell.source)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module] if node.module != "llmcourse" else [f"llmcourse.{a.name}" for a in node.names]
                for module in (n.split(".")[1] for n in names if n.startswith("llmcourse.")):
                    allowed = module in ("practice", "settings") or number.get(module, "99") <= chapter
                    assert allowed, f"{cell.id} imports llmcourse.{module}, which is no chapter up to {chapter}"


def test_numbers_are_compared_as_numpy_compares_them() -> None:
    import numpy as np

    odd = [0.0, -0.0, 1.0, 1 + 1e-7, 1 + 1e-5, 1.1, 1e300, -1e300, math.inf, -math.inf, math.nan]
    want, got = (torch.tensor(x, dtype=torch.float64) for x in zip(*itertools.product(odd, odd)))
    for rtol, atol, times in itertools.product((0, 1e-6, 1e-3), (0, 1e-9, 1e-2), (1, 100)):
        case = exercises.Case("any", (), {}, rtol=rtol, atol=atol)
        near = np.isclose(got, want, rtol=times * rtol, atol=min(times, 3) * atol, equal_nan=True)
        assert (comparing.unequal(want, got, case, times) == ~near).all(), (rtol, atol, times)


# ------------------------------------------------------------------------------------- the format


class TestFormat:
    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ('check("example.attend", attend)', 'check("example.attend", attended)', "expected check"),
            ('check("example.attend", attend)', 'check("other.attend", attend)', "expected check"),
            ("# ## RMSNorm", "# ## Norms", "the statement begins with"),
            ("    ### END SOLUTION\n\n# %%\ncheck", "    # END\n\n# %%\ncheck", "do not match"),
            (
                'ex.wrong("You counted the biases twice, once for each direction.", name="bias_twice", value=25)',
                "",
                "at least five",
            ),
            ("def greedy(", "def attend(", "has the name of"),
            ("You drew uniformly: the logits do not count at all in your answer.", "No.", "too short"),
            ('"Divide the logits by the temperature, then softmax."', "", "three sentences"),
            ("difficulty=3", "difficulty=7", "allowed: 1 to 5"),
            ("def sample(logits: Tensor", "def draw(logits: Tensor", "does not define it"),
            (
                "from llmcourse.practice import check, hint",
                "#| exprot: true\nfrom llmcourse.practice import check, hint",
                "a directive is",
            ),
        ],
    )
    def test_broken_rules_are_named(self, tmp_path: Path, old: str, new: str, says: str) -> None:
        assert CELLS.count(old) >= 1
        with pytest.raises((tool().Problem, BadInput), match=re.escape(says)):
            build(tmp_path, CELLS.replace(old, new))

    def test_making_twice_changes_nothing(self, tmp_path: Path) -> None:
        first = {k: p.read_text() for k, p in build(tmp_path).items()}
        make = tool()
        for path, text in make.make(tmp_path / "solutions/03_example/example.ipynb", tmp_path).items():
            assert path.read_text() == text
        assert "language_info" in first["learner"] and '"execution_count": null' in first["learner"]

    def test_a_survivor_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import llmcourse.practice.sheets

        same = CELLS.replace(
            "return sample(logits, 1.0, generator=generator)", "return sample(logits, temperature, generator=generator)"
        )
        same = same.replace("value=18", "value=15")
        made = build(tmp_path, same.replace("example.", "other."), sheet="other")
        monkeypatch.setattr(
            llmcourse.practice.sheets, "__path__", [*llmcourse.practice.sheets.__path__, str(made["module"].parent)]
        )
        sheet = checking.load_sheet("other")
        assert checking.kill_matrix(sheet["other.sample"])[1] == [
            "other.sample: the wrong answer no_temperature passes."
        ]
        assert (
            "bias_per_input should get its own sentence and gets that of no_bias"
            in checking.kill_matrix(sheet["other.n_parameters"])[1][0]
        )


# ------------------------------------------------------------------------------------ in a notebook


def attend_with(body: str):
    space: dict = {"torch": torch, "math": __import__("math")}
    exec("def attend(q, k, v):\n" + body, space)
    return space["attend"]


class TestCheck:
    def test_importing_loads_no_torch(self) -> None:
        code = (
            "import sys, llmcourse.practice.checking, llmcourse.practice.commands, llmcourse.practice.grading; "
            "print([m for m in ('torch', 'nbgrader', 'nbformat', 'IPython', 'numpy') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "[]", done.stdout + done.stderr

    def test_right(self) -> None:
        result = checking.check("example.attend", checking.find("example.attend").solution)
        assert result.passed and (result.points, result.cases) == (4, 5)
        assert repr(result).startswith("[passed]")

    def test_wrong_hears_its_sentence_and_sees_the_smallest_case(self) -> None:
        result = checking.check("example.attend", attend_with("    return (q @ k.mT).softmax(-1) @ v"))
        assert result.wrong_answer == "no_scale"
        assert result.sentence == "This is what you get when the scores are not divided by √D."
        assert result.case == "two by two"
        assert result.expected == "[[▸1.6605◂, 2.6605],\n [2.3395, 3.3395]]", "the first difference is marked"
        assert result.got == "[[▸1.5379◂, 2.5379],\n [2.4621, 3.4621]]"
        assert "  expected               got\n  [[▸1.6605◂, 2.6605],   [[▸1.5379◂, 2.5379],\n" in repr(result)
        assert [n for n, _ in result.given] == ["q", "k", "v"]

    def test_two_mistakes_hear_the_larger(self) -> None:
        """No scale, but the error on bad input is right: that case then speaks against no wrong answer enough."""
        body = "    if q.shape[-1] != k.shape[-1]: raise ValueError\n    return (q @ k.mT).softmax(-1) @ v"
        assert checking.check("example.attend", attend_with(body)).wrong_answer == "no_scale"

    def test_no_sentence_for_a_mistake_that_was_not_made(self) -> None:
        right_but_no_error = attend_with("    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v")
        result = checking.check("example.attend", right_but_no_error)
        assert result.wrong_answer == "" and "Your code raised a RuntimeError; expected a ValueError" in result.sentence
        result = checking.check(
            "example.attend", attend_with("    return v.sum() * torch.ones(q.shape[:-1] + v.shape[-1:])")
        )
        assert result.wrong_answer == "" and "values differ" in result.sentence

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ("    q /= 2\n    return q @ k.mT @ v", ("Your code changed its input q", "values differ")),
            ("    return None", ("The result is None; expected a tensor",)),
            ("    return 'text'", ("The result is text; expected a tensor",)),
            ("    return v[..., :1]", ("The shape is (2, 1); expected (2, 2)",)),
            ("    return v.double()", ("The dtype is float64; expected float32",)),
            ("    return v.numpy()", ("The result is a NumPy array; expected a tensor",)),
            ("    return object()", ("The result is object; expected a tensor",)),
            ("    return v * float('nan')", ("holds nan in 4 of 4 places",)),
            ("    return undefined_name", ("NameError: name 'undefined_name' is not defined",)),
            ("    raise SystemExit(3)", ("SystemExit: 3",)),
            ("    raise RecursionError", ("RecursionError",)),
            ("    return attend(q, k, v)", ("RecursionError",)),
            ("    return v + torch", ("TypeError",)),
        ],
    )
    def test_what_is_said(self, body: str, says: tuple[str, ...]) -> None:
        result = checking.check("example.attend", attend_with(body))
        assert result.status == "failed"
        assert any(s in result.sentence for s in says), result.sentence

    def test_in_part(self) -> None:
        """Two mistakes: the sentence says how much it explains."""
        result = checking.check("example.attend", attend_with("    return ((q @ k.mT).softmax(-1) @ v).detach()"))
        assert result.wrong_answer == "no_scale"
        assert result.sentence.startswith("In part: This is what you get when the scores are not divided by √D. (")
        assert "explains 4 of the 5 cases that fail" in result.sentence

    def test_the_case_shown_is_one_that_the_sentence_explains(self) -> None:
        body = "    if len(q) == 2 and q.ndim == 2: return v + 1\n    return (q @ k.mT).softmax(-1) @ v"
        result = checking.check("example.attend", attend_with(body))
        assert (result.wrong_answer, result.case) == ("no_scale", "more keys than queries")

    def test_a_crash_is_told_once_with_the_learners_line(self, tmp_path: Path) -> None:
        file = tmp_path / "cell.py"
        file.write_text("def attend(q, k, v):\n    return q.no_such_thing\n")
        space: dict = {}
        exec(compile(file.read_text(), str(file), "exec"), space)
        result = checking.check("example.attend", space["attend"])
        assert repr(result).count("no_such_thing'") == 1 and result._repr_html_().count("no_such_thing&#x27;") == 1
        assert "your line  2: return q.no_such_thing" in repr(result)

    def test_diagnosis_is_bold_and_the_difference_marked(self) -> None:
        page = checking.check("example.attend", attend_with("    return (q @ k.mT).softmax(-1) @ v"))._repr_html_()
        assert 'font-weight:600">This is what you get when the scores are not divided' in page
        assert "<mark>1.6605</mark>" in page and "<mark>1.5379</mark>" in page

    @pytest.mark.parametrize("value", [15, 21, 20.5, "20", [20]], ids=str)
    def test_the_number_asked_for_is_not_told(self, value) -> None:
        result = checking.check("example.n_parameters", value)
        text = repr(result) + result._repr_html_() + json.dumps(result.to_dict())
        assert result.expected == "" and "expected 20" not in text and "20" not in text.replace(str(value), "")

    @pytest.mark.parametrize(
        ("want", "got", "says"),
        [
            (torch.ones(3), torch.ones(3) * (1 + 1.4e-5), "rounding difference"),
            (torch.ones(3), torch.ones(3) * (1 + 1e-2), "values differ"),
            (torch.tensor([1.0, 1e-5]), torch.tensor([1.0, 0.0]), "values differ"),
            (1.0, 1.00003, "rounding difference"),
            (1.0, 1.1, "expected 1."),
            (2, 2.0, "expected a whole number"),
            (2, True, "expected a whole number"),
            (2.0, 2, ""),
            (torch.zeros(2).long(), torch.ones(2).long(), "values differ"),
        ],
    )
    def test_what_a_difference_is_called(self, want, got, says: str) -> None:
        said = comparing.difference_of(want, got, checking.case("x"))
        assert (says in said) if says else not said, said

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (torch.arange(4.0).reshape(2, 2), "[[0., 1.],\n [2., 3.]]"),
            (torch.arange(64.0).reshape(4, 4, 4), None),
            (torch.arange(65.0), "tensor of shape (65,), float32"),
            (torch.empty(0, 3), "tensor of shape (0, 3), float32"),
            (torch.tensor(2.5), "2.5 (a single number)"),
            (torch.tensor([1, -2]), "[1, -2]"),
            ([1, 2.5, "a"], "[1, 2.5, 'a']"),
            ((1,), "(1,)"),
            ({"a": [1, 2]}, "a: [1, 2]"),
            (torch.tensor([float("nan"), float("-inf")]), "[nan, -inf]"),
        ],
    )
    def test_how_a_value_is_shown(self, value, text: str | None) -> None:
        shown = cards.show(value)
        assert shown == text if text else shown.count(",") == 63

    def test_a_small_difference_is_printed_with_enough_digits(self) -> None:
        want, got = cards.show_pair(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), checking.case("x"))
        assert (want, got) == ("[1., ▸2.◂]", "[1., ▸2.001◂]")
        want, got = cards.show_pair([1.0, 2.0], [1.0, 2.000004], checking.case("x"))
        assert got == "[1, ▸2.000004◂]"

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ("torch.zeros(())", "carries no gradient"),
            ("x.sum().detach()", "carries no gradient"),
            ("torch.tensor(x.sum().item())", "carries no gradient"),
            ("torch.zeros((), requires_grad=True)", "No gradient reaches"),
            ("copy.deepcopy(x).sum()", "No gradient reaches"),
            ("x.sum().item()", "missing: 'float' object has no attribute 'backward'"),
            ("None", "missing"),
        ],
    )
    def test_errors_of_the_checkers_own_code_are_named(self, body: str, says: str) -> None:
        source = (
            "def driver(answer, x):\n"
            "    x = x.clone().requires_grad_(True)\n"
            "    answer(x).backward()\n"
            "    return x.grad.clone()"
        )
        answer = eval(f"lambda x: {body}", {"torch": torch, "copy": copy})
        request = checking.case("x", torch.ones(2)).request()
        outcome = worker.run_call(answer, request[0] | {"driver": source}, request[1])[0]
        said = comparing.compare({"kind": "value"}, outcome, checking.case("x"))
        assert says in said and "Your code stopped" not in said, said

    def test_called_with_other_arguments_than_the_statement_says(self) -> None:
        result = checking.check("example.sample", lambda logits: 1)
        assert result.status == "failed" and "argument" in result.sentence

    def test_imports_and_waiting_cost_no_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The processor time of the answer counts: not that of an import, however slow, and not the wall."""
        (tmp_path / "slow_to_import.py").write_text(
            "import time\nwhile time.thread_time() < END: pass\n".replace("END", str(time.thread_time() + 2.5))
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(checking.find("example.attend"), "time_limit", 1.0)
        body = ATTEND.split("\n", 1)[1]
        result = checking.check(
            "example.attend", attend_with("    import slow_to_import, time; time.sleep(0.3)\n" + body)
        )
        assert result.passed, result

    def test_changed_input_is_found_with_a_right_result(self) -> None:
        body = (
            "    if q.shape[-1] != k.shape[-1]: raise ValueError\n"
            "    w = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)\n"
            "    with torch.no_grad(): v0 = v.clone(); v.zero_()\n"
            "    return w @ v0"
        )
        result = checking.check("example.attend", attend_with(body))
        assert "changed its input v" in result.sentence

    def test_own_line_and_no_traceback_of_ours(self, tmp_path: Path) -> None:
        file = tmp_path / "cell.py"
        file.write_text("def helper(q):\n    return q.no_such_thing\n\n\ndef attend(q, k, v):\n    return helper(q)\n")
        space: dict = {}
        exec(compile(file.read_text(), str(file), "exec"), space)
        result = checking.check("example.attend", space["attend"])
        assert result.line == "2: return q.no_such_thing"
        assert "checking.py" not in repr(result) and "Traceback" not in repr(result)

    @pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
    def test_endless_loop(self, thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also one that catches everything, and off the main thread, where there are no signals."""
        monkeypatch.setattr(checking.find("example.attend"), "time_limit", 0.3)
        loop = attend_with("    while True:\n        try:\n            x = 1\n        except Exception: pass")
        results = []
        go = lambda: results.append(checking.check("example.attend", loop))
        started = time.monotonic()
        if thread:
            t = threading.Thread(target=go)
            t.start()
            t.join(20)
        else:
            go()
        assert time.monotonic() - started < 20
        assert results[0].status == "failed" and "stopped after 0.3 seconds" in results[0].sentence

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
    def test_the_alarm_of_another_is_kept(self) -> None:
        """A test runner, or a time limit around this one, goes on counting."""
        with worker.time_limit(30):
            with worker.time_limit(20):
                inner = signal.getitimer(signal.ITIMER_REAL)
            assert signal.getitimer(signal.ITIMER_REAL)[1] == inner[1] == pytest.approx(worker.TICK)
            with pytest.raises(worker.TimeLimit), worker.time_limit(0.05):
                while True:
                    pass
            assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(worker.TICK)
        before, rung = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic())), []
        runner = signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            started = time.monotonic()
            with worker.time_limit(20):
                time.sleep(0.1)
            time.sleep(1)
            assert len(rung) == 1 and 0.25 < rung[0] - started < 1.05
        finally:
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, *runner)

    def test_learners_random_numbers_go_on(self) -> None:
        torch.manual_seed(5)
        want = torch.rand(3)
        torch.manual_seed(5)
        checking.check("example.attend", attend_with("    torch.rand(9)\n    return v"))
        assert torch.equal(torch.rand(3), want)

    def test_a_notebook_that_broke_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        checking.find("example.RMSNorm")._known.clear()
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "rsqrt", None)
            result = checking.check("example.RMSNorm", object)
        assert result.status == "failed" and "restart the kernel" in result.sentence
        assert checking.check("example.RMSNorm", checking.find("example.RMSNorm").solution).passed

    def test_not_started(self) -> None:
        assert checking.check("example.attend", attend_with("    raise NotImplementedError()")).status == "not started"
        assert checking.check("example.n_parameters", None).status == "not started"
        assert checking.check("example.attend").status == "not started"

    def test_by_name(self) -> None:
        n_parameters = 20
        assert n_parameters
        space: dict = {"check": checking.check}
        exec("n_parameters = 20\nresult = check('example.n_parameters')", space)
        assert space["result"].passed

    @pytest.mark.parametrize("value", [15, 20.5, "20", None, [20], float("nan"), 10**400, torch.tensor(19)], ids=str)
    def test_wrong_values(self, value) -> None:
        assert not checking.check("example.n_parameters", value).passed

    def test_unknown_id_names_the_known(self) -> None:
        with pytest.raises(BadInput, match=r"example\.attend"):
            checking.check("example.atend", 1)
        with pytest.raises(BadInput, match="allowed"):
            checking.check("nothing.here", 1)

    def test_card(self) -> None:
        page = checking.check("example.attend", attend_with("    return (q @ k.mT).softmax(-1) @ v"))._repr_html_()
        root = ElementTree.fromstring(page.replace("<br>", "<br/>"))
        assert root.get("role") == "status" and root.get("data-status") == "failed"
        text = "".join(root.itertext())
        assert "Not yet: 0 of 5 cases pass" in text, "the verdict is in words, not only in color"
        assert root.find(".//table").get("aria-label") == "Smallest failing case: two by two"
        assert {t.get("scope") for t in root.iter("th")} == {"row"}
        evil = checking.check("example.attend", attend_with("    raise ValueError('<script>alert(1)</script>')"))
        assert "<script>" not in evil._repr_html_()


# ---------------------------------------------------------------------------------- through the pipe


class TestCodec:
    @pytest.mark.parametrize(
        "value",
        [None, True, 3, -(10**40), 2.5, float("inf"), "text ☃",
         [1, (2, "x")], {"a": [1], 2: None}, 1 + 2j, torch.float16,
         torch.arange(6).reshape(2, 3), (torch.arange(24.0) / 7).reshape(2, 3, 4).permute(2, 0, 1),
         torch.tensor(2.5, dtype=torch.bfloat16), torch.empty(0, 3),
         torch.tensor([True, False]), torch.tensor([1 + 2j, -0.5j, 3.25]), torch.arange(4).numpy()],
        ids=lambda v: f"{type(v).__name__}-{str(v)[:12]}",
    )  # fmt: skip
    def test_there_and_back(self, value) -> None:
        tree, blobs = worker.encode(value)
        back = worker.decode(json.loads(json.dumps(tree)), blobs)
        assert type(back) is type(value)
        assert not comparing.difference_of(value, back, checking.Case("", (), {}, rtol=0, atol=0))
        if isinstance(value, torch.Tensor):
            assert back.stride() == value.stride() or value.numel() <= 1

    def test_only_data(self) -> None:
        class Thing:
            def __reduce__(self):
                return (print, ("never",))

        tree, _ = worker.encode([Thing(), lambda: 1])
        assert all(isinstance(v, worker.Other) for v in worker.decode(tree, []))
        for module in ("grading", "checking", "exercises", "comparing", "cards", "records"):
            assert "pickle" not in (ROOT / "llmcourse" / "practice" / f"{module}.py").read_text()

    @pytest.mark.parametrize(
        "tree",
        [{"tensor": 0, "dtype": "float32", "shape": [10**9]}, {"tensor": 5, "dtype": "float32", "shape": [1]},
         {"tensor": 0, "dtype": "system", "shape": [1]}, {"array": 0, "dtype": "object", "shape": [1]},
         {"nothing": 1}, [], {"list": 3}, {"tensor": 0, "dtype": "float32", "shape": [-1]},
         {"tensor": 0, "dtype": "float32", "shape": [1], "order": [3]}, {"dict": [[[], 1]]}],
        ids=str,
    )  # fmt: skip
    def test_nonsense_is_refused(self, tree) -> None:
        with pytest.raises(ValueError):
            worker.decode(tree, [b"abcd"])


# ------------------------------------------------------------------------------- from the shell


class TestGrading:
    def test_right_sheet(self, sheet) -> None:
        right_but(verdicts(sheet))

    def test_same_verdict_as_in_the_notebook(self, sheet) -> None:
        wrong = "def attend(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v"
        here = checking.check("example.attend", attend_with(wrong.split("\n", 1)[1])).to_dict()
        there = verdicts(answer(sheet, "attend", wrong))["attend"].to_dict()
        here.pop("seconds"), there.pop("seconds")
        assert {**here, "line": ""} == {**there, "line": ""}

    def test_reordered_and_renamed(self, sheet, tmp_path: Path) -> None:
        sheet.cells.reverse()
        sheet.metadata = nbformat.from_dict({})
        for cell in sheet.cells:
            cell.metadata = nbformat.from_dict({})
        nbformat.write(sheet, tmp_path / "final FINAL (3).ipynb")
        assert grading.grade_file(tmp_path / "final FINAL (3).ipynb").passed

    def test_helper_in_another_answer(self, sheet) -> None:
        nb = answer(sheet, "n_parameters", "n_parameters = 20\ndef root(x):\n    return math.sqrt(x)\n")
        right_but(verdicts(answer(nb, "attend", ATTEND.replace("math.sqrt", "root"))))

    def test_helper_in_a_cell_of_its_own(self, sheet) -> None:
        nb = with_cell(
            answer(sheet, "attend", ATTEND.replace("math.sqrt", "root")),
            "%matplotlib inline\ndef root(x):\n    return math.sqrt(x)\n",
            at=3,
        )
        right_but(verdicts(nb))

    @pytest.mark.parametrize(
        "cell",
        [
            "%%time\n" + ATTEND,
            "\n%%capture out\n" + ATTEND + "out.show()\n",
            "%%prun -l 5\n" + ATTEND,
            "files = !ls\nn = len(files)\n" + ATTEND,
            ATTEND
            + "t = %timeit -o -n 3 attend(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))\n"
            + "assert t.best > 0\n",
            ATTEND
            + "if True:\n"
            + "    %time x = attend(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))\n"
            + "    assert x.shape == (2, 2)\n",
            ATTEND + "y = %time 1 + 1\nassert y == 2\n",
            ATTEND + "attend?\n",
            ATTEND + "?attend\n%pinfo attend\n!ls -l\n%cd /\n%load_ext autoreload\n",
            "import asyncio\nawait asyncio.sleep(0)\n" + ATTEND,
            "async def root():\n    return 2\nhalf = 1 / await root()\n"
            + ATTEND.replace("math.sqrt(q.shape[-1])", "q.shape[-1] ** half"),
            'text = """\n%time\n!ls\n"""\nassert "%time" in text and "!ls" in text\n' + ATTEND,
            "n = (7\n% 4)\nassert n == 3\n" + ATTEND,
            "%matplotlib inline\n" + ATTEND,
            ">>> x = 1\n" + ATTEND,
            "%time n = 1\nassert n == 1\n" + ATTEND,
            "%%time\nfiles = !ls\n%time n = 2\nassert n == 2\n" + ATTEND,
            "get_ipython().run_line_magic('autoreload', '2')\n" + ATTEND,
        ],
        ids=lambda s: s.replace(ATTEND, "").strip().splitlines()[0][:30],
    )  # fmt: skip
    def test_a_cell_that_runs_in_a_notebook_is_graded(self, sheet, cell: str) -> None:
        pytest.importorskip("IPython")
        assert grading.grade(answer(sheet, "attend", cell), only="example.attend", limits=FAST).passed
        assert grading._defines(cell) >= {"attend"}

    @pytest.mark.parametrize(
        "cell", ["%%bash\necho", "%%html\n<b>", "%%writefile x.py\n" + ATTEND, "%%timeit\n" + ATTEND]
    )
    def test_a_cell_that_defines_nothing_in_a_notebook_defines_nothing(self, cell: str) -> None:
        assert not grading._defines(cell)

    def test_plain_cells_do_not_load_ipython(self) -> None:
        code = (
            "import sys; from llmcourse.practice.worker import as_python as p; "
            "p('x = 7'); p('%%time\\nx = 7'); print('IPython' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "False", done.stderr

    @pytest.mark.parametrize(
        "poison",
        [
            "import llmcourse.practice.checking as c\nc.check = check = lambda *a, **k: True\nc.Result.passed = True\n",
            "class Yes:\n"
            "    def __eq__(self, o): return True\n"
            "    def __getattr__(self, n): return self\n"
            "    def __call__(self, *a): return self\n"
            "def attend(*a): return Yes()\n",
            "import torch\n"
            "torch.equal = torch.allclose = lambda *a, **k: True\n"
            "torch.Tensor.__eq__ = lambda *a: True\n"
            "def attend(q, k, v): return v\n",
            "from llmcourse.practice.sheets.example import attend\n",
            "import importlib.util as u\n"
            "s = u.spec_from_file_location('x', PATH)\n"
            "m = u.module_from_spec(s)\n"
            "s.loader.exec_module(m)\n"
            "attend = m.attend\n",
            "text = open(PATH).read()\nexec(text)\n",
            "import sys\nattend = sys.modules['llmcourse.practice.checking'].find('example.attend').solution\n",
            "import os\n"
            "for fd in range(3, 20):\n"
            "    try: os.write(fd, b'{}' * 99)\n"
            "    except OSError: pass\n"
            "def attend(q, k, v): return v\n",
            "import gc\nattend = next(f for f in gc.get_objects() if getattr(f, '__qualname__', '') == 'attend')\n",
            "class str(str): pass\nint = float = bool = None\ndef attend(q, k, v): return 1\n",
        ],
        ids=["patched check", "equal to all", "patched torch", "import", "load by path",
             "open", "modules", "garbage in the pipe", "gc", "builtins"],
    )  # fmt: skip
    @pytest.mark.parametrize("confine", [True, False], ids=["kernel", "hook only"])
    def test_poison(self, sheet, example, poison: str, confine: bool) -> None:
        nb = answer(sheet, "attend", f"PATH = {str(example['module'])!r}\n" + poison)
        right_but(verdicts(nb, grading.Limits(cell_seconds=3, confine=confine)), "attend")

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ("import os; os._exit(0)", "ended its process"),
            ("exit()", "SystemExit"),
            ("while True: pass", "loop that never ends"),
            ("import os, signal; os.kill(os.getpid(), 9)", "not allowed"),
            ("import os; os.fork()", "not allowed"),
            ("import subprocess; subprocess.run(['true'])", "not allowed"),
            ("import torch.multiprocessing as m; m.get_context('spawn').Process(target=print).start()", "not allowed"),
            ("torch.empty(2**36)", "memory"),
            ("open('big', 'wb').write(bytes(2**25))", "File too large"),
            ("open('/etc/written-by-a-test', 'w')", "Error: [Errno"),
            ("import socket; socket.create_connection(('127.0.0.1', 9))", "ermi"),
            ("import ctypes; ctypes.string_at(0)", "ended its process"),
        ],
        ids=["_exit", "exit", "loop", "kill", "fork", "subprocess",
             "spawn", "memory", "file size", "outside", "network", "segfault"],
    )  # fmt: skip
    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only part of the limits holds")
    def test_limits_in_a_call(self, sheet, body: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checking.find("example.attend"), "time_limit", 1.5)
        result = verdicts(answer(sheet, "attend", f"def attend(q, k, v):\n    {body}\n    return v\n"))
        right_but(result, "attend")
        assert says in result["attend"].sentence or says in result["attend"].got, result["attend"].sentence

    @pytest.mark.parametrize("body", ["import os; os._exit(0)", "exit()", "while True: pass", "def attend(q, k, v:"])
    def test_limits_in_the_answer_cell(self, sheet, body: str) -> None:
        result = verdicts(answer(sheet, "attend", body))
        right_but(result, "attend")
        assert result["attend"].sentence

    @pytest.mark.parametrize(
        "body",
        [
            "import os; os._exit(0)",
            "exit()",
            "while True: pass",
            "raise ValueError",
            "import torch; torch.softmax = None",
        ],
    )
    def test_a_bad_free_cell_costs_nothing(self, sheet, body: str) -> None:
        started = time.monotonic()
        right_but(verdicts(with_cell(sheet, body)))
        assert time.monotonic() - started < 60

    @pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
    def test_kernel_stops_what_python_cannot(self, sheet, example) -> None:
        """Straight through the C library, past every audit hook."""
        with grading.Child(FAST, 10) as child:
            in_force = child.walls
        c = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        if "seccomp" in in_force:
            nb = answer(sheet, "attend", c + "def attend(q, k, v):\n    return f'fork gave {libc.fork()}'\n")
            assert "fork gave -1" in verdicts(nb)["attend"].got
        if "landlock" in in_force:
            nb = answer(
                sheet,
                "attend",
                c
                + f"PATH = {str(example['module']).encode()!r}\n"
                + "def attend(q, k, v):\n    return f'open gave {libc.open(PATH, 0)}'\n",
            )
            assert "open gave -1" in verdicts(nb)["attend"].got
        if not {"landlock", "seccomp"} <= set(in_force):
            pytest.skip(f"this kernel offers only: {in_force or 'nothing'}")

    def test_no_process_and_no_folder_is_left(self, sheet) -> None:
        import tempfile

        import psutil

        before = set(Path(tempfile.gettempdir()).glob("llmcourse-*"))
        verdicts(answer(sheet, "attend", "while True: pass"))
        time.sleep(0.3)
        nursery = grading._Nursery.current
        loops = [p for p in psutil.Process(nursery.process.pid).children(recursive=True) if p.status() == "running"]
        assert not loops
        assert set(Path(tempfile.gettempdir()).glob("llmcourse-*")) <= before | {Path(nursery.outside or "/")}

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', '{"cells": []}'])
    def test_not_a_sheet(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.ipynb").write_text(text)
        with pytest.raises(BadInput, match="allowed"):
            grading.grade_file(tmp_path / "a.ipynb")

    def test_direct_child(self, sheet, monkeypatch: pytest.MonkeyPatch) -> None:
        """The way of other systems: one new process for each exercise."""
        monkeypatch.setattr(grading.sys, "platform", "elsewhere")
        nb = answer(sheet, "attend", "def attend(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v")
        assert grading.grade(nb, only="example.attend", limits=FAST).results[0].wrong_answer == "no_scale"


# ------------------------------------------------------------------------------------- the progress


def _record(folder: str, module_path: str, n: int) -> None:
    os.chdir(folder)
    for _ in range(n):
        checking.Progress().record(checking.Result(id="a.b", title="", status="failed", points=0, max_points=1))


class TestProgress:
    def result(self, status: str = "failed", id: str = "example.attend") -> checking.Result:
        return checking.Result(id=id, title="", status=status, points=0, max_points=1)

    def test_remembers(self) -> None:
        checking.check("example.n_parameters", 15)
        checking.check("example.n_parameters", 20)
        checking.check("example.n_parameters", 15)
        assert "Hint 1 of 3" in repr(checking.hint("example.attend"))
        assert "Hint 2 of 3" in repr(checking.hint("example.attend"))
        assert (
            "def attend" in checking.reveal("example.attend").code
            and "### BEGIN" not in checking.reveal("example.attend").code
        )
        for _ in range(4):
            last = checking.hint("example.attend")
        assert "Hint 3 of 3" in repr(last)
        rows = {r["id"]: r for r in checking.progress("example").rows}
        assert (rows["example.n_parameters"]["status"], rows["example.n_parameters"]["attempts"]) == ("passed", 2)
        assert (
            rows["example.attend"]["status"],
            rows["example.attend"]["hints"],
            rows["example.attend"]["reveals"],
        ) == ("not started", 3, 1)
        assert "1 of 4 exercises passed, 1 of 10 points" in repr(checking.progress("example"))
        ElementTree.fromstring(checking.progress("example")._repr_html_().replace("<br>", "<br/>"))

    def test_hints_do_not_hold_the_solution(self) -> None:
        for sheet in checking.sheets():
            for ex in checking.load_sheet(sheet).values():
                body = [
                    line.strip()
                    for line in ex.section("solution").splitlines()
                    if len(line.strip()) > 30 and not line.strip().startswith(('"""', "#", "def", "class"))
                ]
                for h in ex.hints:
                    assert not any(line in h for line in body), ex.id

    def test_kept_beside_the_course_settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "settings.ini").write_text("[llmcourse]\n")
        deep = tmp_path / "exercises" / "03_x"
        deep.mkdir(parents=True)
        monkeypatch.chdir(deep)
        checking.check("example.n_parameters", 20)
        assert (tmp_path / checking.PROGRESS_FILE).is_file()

    def test_one_file_for_all_sheets_of_a_course(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy of the exercises without the course's settings: what is passed in one chapter is known in the next."""
        for name in ("03_example", "06_other"):
            (tmp_path / "exercises" / name).mkdir(parents=True)
            (tmp_path / "exercises" / name / f"{name[3:]}.ipynb").write_text("{}")
        monkeypatch.chdir(tmp_path / "exercises" / "03_example")
        checking.check("example.n_parameters", 20)
        monkeypatch.chdir(tmp_path / "exercises" / "06_other")
        assert checking.Progress().read()["example.n_parameters"]["passed"]
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["exercises"], (
            "its files are hidden"
        )

    def test_tries_after_passing_do_not_count(self) -> None:
        for value in (15, 20, 15, 20):
            checking.check("example.n_parameters", value)
        e = checking.Progress().read()["example.n_parameters"]
        assert (e["attempts"], bool(e["passed"])) == (2, True)

    def test_the_sheet_at_hand_comes_first(self, tmp_path: Path) -> None:
        assert checking.progress().rows[0]["id"].split(".")[0] == checking.sheets()[0]
        (tmp_path / "example.ipynb").write_text("{}")
        assert checking.progress().rows[0]["id"].startswith("example.")

    @pytest.mark.parametrize("text", ["{}", "", "[]", '{"cells": []}', '{"exercises": {"a": 1}}', "[" * 100_000])
    def test_only_progress_is_merged(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(BadInput, match="progress file"):
            checking.Progress().merge(tmp_path / "other.json")
        assert (tmp_path / "other.json").read_text() == text, "it is left as it was"

    @pytest.mark.parametrize("damage", ["", "{", "[1]", '{"exercises": 3}', '{"exercises": {"a": 1}}', "\x00\x00"])
    def test_damaged_file_is_set_aside(self, tmp_path: Path, damage: str) -> None:
        (tmp_path / checking.PROGRESS_FILE).write_text(damage)
        checking.check("example.n_parameters", 20)
        assert checking.Progress().read()["example.n_parameters"]["passed"]
        assert [p.read_text() for p in tmp_path.glob("*damaged*")] == [damage]

    def test_crash_while_writing_keeps_the_old_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = checking.Progress()
        store.record(self.result())
        before, beside = store.path.read_bytes(), set(store.path.parent.iterdir())

        def crash(*a):
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", crash)
        with pytest.raises(OSError):
            store.record(self.result())
        assert store.path.read_bytes() == before
        assert set(store.path.parent.iterdir()) == beside
        assert checking.check("example.n_parameters", 20).passed, "the verdict does not depend on the file"

    def test_two_processes(self, tmp_path: Path) -> None:
        workers = [
            multiprocessing.get_context("fork").Process(target=_record, args=(str(tmp_path), "", 10)) for _ in range(3)
        ]
        for w in workers:
            w.start()
        for w in workers:
            w.join(60)
        assert checking.Progress(tmp_path / checking.PROGRESS_FILE).read()["a.b"]["attempts"] == 30

    def test_merge(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        old = checking.Progress(tmp_path / "old" / checking.PROGRESS_FILE)
        for status in ("failed", "failed", "passed"):
            old.record(self.result(status))
        old.record(self.result("failed", "gone.exercise"))
        new = checking.Progress()
        new.add("example.attend", "hints", limit=3)
        new.record(self.result("failed"))
        new.merge(old.path)
        e = new.read()["example.attend"]
        assert (e["attempts"], e["hints"]) == (3, 1) and e["passed"]
        assert "gone.exercise" in new.read(), "what a newer sheet does not know is kept"

    def test_folder_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checking.Progress, "_changing", lambda self: (_ for _ in ()).throw(PermissionError()))
        assert checking.check("example.n_parameters", 20).passed


# ------------------------------------------------------------------------------------ the commands


class TestCommands:
    def run(self, *arguments: str):
        return cli.invoke(commands.app, [*arguments])

    def test_check_passes(self, sheet, tmp_path: Path) -> None:
        nbformat.write(sheet, tmp_path / "mine.ipynb")
        done = self.run("check", "mine.ipynb", "--junit", "out.xml")
        assert done.exit_code == 0, done.output
        assert "10 of 10 points" in done.output and "passed" in done.output
        suite = ElementTree.parse(tmp_path / "out.xml").find("testsuite")
        assert (suite.get("tests"), suite.get("failures")) == ("4", "0")

    def test_check_fails(self, sheet, tmp_path: Path) -> None:
        nb = answer(sheet, "attend", "def attend(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v + 0 * '\x00'")
        nbformat.write(answer(nb, "n_parameters", "n_parameters = 15"), tmp_path / "mine.ipynb")
        done = self.run("check", "mine.ipynb", "--json", "--junit", "out.xml")
        assert done.exit_code == 1
        data = json.loads(done.stdout)
        assert data["passed"] is False and data["sheets"][0]["points"] == 5
        by_id = {e["id"]: e for e in data["sheets"][0]["exercises"]}
        assert by_id["example.n_parameters"]["wrong_answer"] == "no_bias"
        suite = ElementTree.parse(tmp_path / "out.xml").find("testsuite")
        assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
        assert "biases" in suite.find("testcase[@name='example.n_parameters']/failure").get("message")

    def test_check_by_id_and_progress(self, sheet, tmp_path: Path) -> None:
        place = tmp_path / "exercises" / "03_example"
        place.mkdir(parents=True)
        (tmp_path / "settings.ini").write_text("[llmcourse]\n")
        nbformat.write(answer(sheet, "attend", "attend = None"), place / "example.ipynb")
        assert self.run("check", "example.attend").exit_code == 1
        assert self.run("check", "example.n_parameters").exit_code == 0
        assert self.run("check", "example").exit_code == 1
        data = json.loads(self.run("progress", "example", "--json").stdout)
        assert {e["id"]: e["status"] for e in data["exercises"]} == {
            "example.attend": "not yet",
            "example.RMSNorm": "passed",
            "example.n_parameters": "passed",
            "example.sample": "passed",
        }

    def test_chapters_and_copies(self, sheet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chapter's name will do; a copy in a folder above is graded, and named."""
        place = tmp_path / "exercises" / "03_example"
        place.mkdir(parents=True)
        nbformat.write(sheet, place / "example.ipynb")
        here = self.run("check", "03_example")
        assert here.exit_code == 0 and "grading" not in here.stderr
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        above = self.run("check", "example.n_parameters")
        assert above.exit_code == 0 and f"grading {place / 'example.ipynb'}" in above.stderr
        assert self.run("progress", "03_example").exit_code == 0

    def test_the_shell_speaks_of_its_own_commands(self, sheet, tmp_path: Path) -> None:
        nb = answer(
            answer(sheet, "attend", ATTEND.replace("/ math.sqrt(q.shape[-1])", "")), "n_parameters", "n_parameters = 15"
        )
        nbformat.write(nb, tmp_path / "mine.ipynb")
        out = self.run("check", "mine.ipynb").output
        assert "A hint: llmcourse hint example.attend" in out and 'hint("' not in out
        assert "Smallest failing case: two by two" in out and "forgot the biases" in out
        assert "llmcourse hint example.sample" in self.run("hint", "example.sample").output
        assert 'hint("example.attend")' in repr(checking.check("example.attend", 3)), "and the notebook of its own"

    def test_tables_are_one_line_a_row_at_80_columns(
        self, sheet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        nbformat.write(sheet, tmp_path / ("a" * 60 + ".ipynb"))
        for command, rows in (("exercises", len(checking.sheets())), ("progress", 4), ("check", 4)):
            arguments = {"check": ["a" * 60 + ".ipynb"], "progress": ["example"], "exercises": []}[command]
            lines = self.run(command, *arguments).stdout.splitlines()
            assert all(len(line) <= 80 for line in lines if line.startswith(("│", "┃", "┏", "└")))
            body = [line for line in lines if line.startswith("│")]
            assert len(body) >= rows and all(line.split("│")[1].strip() for line in body), "no row is broken"
            assert command != "progress" or all("○ not started" in line for line in body), "the result is whole"

    def test_a_plain_script_prints_the_result(self, example, tmp_path: Path) -> None:
        code = (
            f"import llmcourse.practice.sheets as s; s.__path__.append({str(example['module'].parent)!r})\n"
            "from llmcourse.practice import check, hint, progress\n"
            "check('example.n_parameters', 15)\nhint('example.n_parameters')\nprogress('example')\n"
        )
        (tmp_path / "script.py").write_text(code)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert "[not yet] example.n_parameters" in done.stdout and "Hint 1 of 3" in done.stdout, done.stderr
        assert "0 of 4 exercises passed" in done.stdout

    def test_check_a_folder(self, sheet, tmp_path: Path) -> None:
        nbformat.write(sheet, tmp_path / "a.ipynb")
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / "other.ipynb")
        done = self.run("check", ".", "--json")
        assert done.exit_code == 0 and len(json.loads(done.stdout)["sheets"]) == 1
        assert "left out: other.ipynb" in done.stderr

    @pytest.mark.parametrize(
        "arguments",
        [("check", "no.ipynb"), ("check", "nothing"), ("check", "example.no"), ("hint", "example.no"), ("reveal", "x"),
         ("progress", "nothing"), ("progress", "--merge", "no.json"), ("classroom", "nothing"), ("check", "empty"),
         ("exercises", "example", "nothing")],
    )  # fmt: skip
    def test_bad_input_is_one_sentence(self, arguments: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        done = self.run(*arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith("llmcourse: ") and "allowed" in done.stderr and "Traceback" not in done.output

    def test_hint_reveal_exercises_classroom(self) -> None:
        assert "Hint 1 of 3" in self.run("hint", "example.sample").stdout
        assert "def sample" in self.run("reveal", "example.sample").stdout
        rows = json.loads(self.run("exercises", "--json").stdout)
        mine = [r for r in rows if r["id"].startswith("example.")]
        assert [r["id"] for r in mine] == [
            "example.attend",
            "example.RMSNorm",
            "example.n_parameters",
            "example.sample",
        ]
        assert all(
            set(r) == {"id", "chapter", "title", "minutes", "difficulty", "points", "wrong_answers"} for r in rows
        )
        assert "4" in self.run("exercises").stdout
        assert json.loads(self.run("exercises", "example", "example", "--json").stdout) == mine
        out = self.run("classroom", "example").stdout
        assert out.count("nbgrader ") == 5 and "03_example" in out

    def test_kill_matrix(self) -> None:
        """Of one sheet: those of the masters are run above, exercise by exercise."""
        done = self.run("exercises", "example", "--kill-matrix", "--json")
        rows = json.loads(done.stdout)["rows"]
        assert {r["exercise"].split(".")[0] for r in rows} == {"example"}
        assert len(rows) == 20 and all(r["killed_by"] and r["sentence_of"] == r["wrong_answer"] for r in rows)
        assert done.exit_code == 0

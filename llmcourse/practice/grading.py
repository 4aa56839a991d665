"""Grade a sheet from outside: the learner's code runs in a child process, the cases and the solution stay here.

For each exercise a fresh child runs the sheet's own set-up, then the learner's cells without those that answer another
exercise, and serves calls of the answer (`llmcourse.practice.worker`). So a cell that loops for ever, leaves, eats memory
or breaks a library costs its own exercise only, and a sheet that replaces `check` changes nothing: its `check` is not used.

On Linux the kernel keeps the child from starting processes, from the network, from reading the checker and from writing
outside its own folder. Elsewhere Python's audit hook does what it can, and on Windows only the time limit holds.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llmcourse.practice import checking
from llmcourse.practice.worker import as_python, read_message, timeout_outcome, write_message
from llmcourse.settings import BadInput, course_root, load_settings, require

__all__ = ["Limits", "SheetResult", "grade", "grade_file", "junit", "which_sheet"]

PACKAGE = Path(__file__).resolve().parent.parent  # llmcourse/


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the learner's code may use. Time is for one cell or one call; the others are for one exercise."""

    cell_seconds: float = 10.0
    memory_bytes: int = 2**30
    """beyond what Python and PyTorch take when they are loaded"""
    file_bytes: int = 16 * 2**20
    """in one file"""
    start_seconds: float = 120.0
    confine: bool = True
    """false: without the kernel's help, for tests of the audit hook"""


class Gone(Exception):
    """The child has ended, or had to be ended; the text is for the learner."""


# --------------------------------------------------------------------------------- the children


def _environment(folder: str) -> dict[str, str]:
    """Little is handed down: no tokens, no proxies."""
    keep = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "TEMP", "TMP", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k in keep}
    return env | {"HOME": folder, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
                  "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}  # fmt: skip


def _command(*arguments: str) -> list[str]:
    start = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from llmcourse.practice.worker import main; main()"
    )
    return [sys.executable, "-P", "-c", start, *arguments]


def _hidden() -> list[str]:
    """Where the reference is: a child must not read these."""
    import llmcourse.practice.sheets

    root = course_root()
    return [os.path.realpath(p) for p in (*llmcourse.practice.sheets.__path__, root / "solutions", root / ".git")]


def _permitted() -> tuple[list[str], list[str]]:
    """What a child may read, and of which folders it may only read the names."""
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev", "/opt", "/System", "/Library"]
    paths = {
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        str(PACKAGE),
        str(course_root() / "settings.ini"),
        *system,
        *sys.path,
    }
    with contextlib.suppress(BadInput, OSError, ImportError):
        paths.add(str(load_settings().home))
    hidden = _hidden()
    readable, listable = [], []
    above = lambda p, h: h.startswith(p.rstrip(os.sep) + os.sep)

    def allow(path: str) -> None:
        if path in hidden or any(above(h, path) for h in hidden):
            return
        if not any(above(path, h) for h in hidden):
            readable.append(path)
            return
        listable.append(path)  # something below is hidden: give the rest piece by piece
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(path)):
                allow(os.path.join(path, entry))

    own = str(PACKAGE.parent)
    for path in sorted({os.path.realpath(p) for p in paths if p and os.path.exists(p)}):
        if path == own and "site-packages" not in own:
            listable.append(path)  # a checkout: only its package, which has an entry of its own
        else:
            allow(path)
    return readable, listable


class _Nursery:
    """One process that has imported torch and forks a child for each exercise: a child then starts in milliseconds."""

    current: _Nursery | None = None

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="llmcourse-")
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            _command("nursery", str(theirs.fileno())), pass_fds=[theirs.fileno()], env=_environment(self.folder), cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.control = ours

    @classmethod
    def get(cls) -> _Nursery:
        if cls.current is None or cls.current.process.poll() is not None:
            cls.current = cls()
            atexit.register(cls.current.close)
        return cls.current

    def fork(self, seconds: float) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        self.control.settimeout(seconds)
        try:
            socket.send_fds(self.control, [b"x"], [theirs.fileno()])
            answer = self.control.recv(4)
        except OSError:
            answer = b""
        finally:
            theirs.close()
        if len(answer) != 4:
            ours.close()
            self.close()
            raise RuntimeError("the process that runs exercises could not be started")
        return struct.unpack("<i", answer)[0], ours

    def close(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        _Nursery.current = None


class Child:
    """A process with the learner's code. `ask` sends one request and waits for the reply, at most so many seconds."""

    def __init__(self, limits: Limits, seconds: float):
        self.folder = tempfile.mkdtemp(prefix="llmcourse-")
        self.process = self.talk = None
        try:
            if sys.platform == "linux":
                self.pid, self.talk = _Nursery.get().fork(limits.start_seconds)
                self.source, self.sink = self.talk.makefile("rb"), self.talk.makefile("wb")
            else:
                flags = {"creationflags": 0x00000200} if os.name == "nt" else {"start_new_session": True}
                self.process = subprocess.Popen(
                    _command(), env=_environment(self.folder), cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, **flags,
                )  # fmt: skip
                self.pid, self.source, self.sink = self.process.pid, self.process.stdout, self.process.stdin
            self.replies: queue.Queue = queue.Queue()
            threading.Thread(target=self._listen, daemon=True).start()
            readable, listable = _permitted()
            ready, _ = self.ask(
                {"folder": self.folder, "readable": readable, "listable": listable, "hidden": _hidden(), "seconds": seconds,
                 "memory_bytes": limits.memory_bytes, "file_bytes": limits.file_bytes, "confine": limits.confine},
                seconds=limits.start_seconds,
            )  # fmt: skip
            self.in_force = ready.get("in_force", [])
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        while True:
            try:
                self.replies.put(read_message(self.source))
            except Exception as e:  # the end, or something that is no message
                self.replies.put(e)
                return

    def ask(self, message: dict, blobs: list[bytes] = (), *, seconds: float) -> tuple[dict, list[bytes]]:
        try:
            write_message(self.sink, message, blobs)
            reply = self.replies.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        except OSError:
            raise Gone("Your code ended its process.") from None
        if isinstance(reply, (EOFError, OSError)):
            raise Gone("Your code ended its process: by an exit, by using too much memory, or by a crash.")
        if isinstance(reply, BaseException):
            raise Gone("What came back from your code could not be read.")
        return reply

    def close(self) -> None:
        if hasattr(self, "pid"):
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(self.pid, signal.SIGKILL)
                else:
                    self.process.kill()
        for thing in (getattr(self, "sink", None), self.talk):
            with contextlib.suppress(OSError, AttributeError, ValueError):
                thing.close()
        if self.process:
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


# ------------------------------------------------------------------------------- reading a sheet


def _text(cell: dict) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _defines(source: str) -> set[str]:
    """The names that a cell sets at its top level."""
    try:
        body = ast.parse(as_python(source)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(re.findall(r"^(?:def|class)\s+(\w+)", source, re.M))
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


def _is_check(source: str) -> bool:
    return bool(re.fullmatch(r"\s*check\(\s*[\"'][\w.]+[\"'][^()]*\)\s*;?\s*", source))


def which_sheet(nb: dict) -> str:
    """The sheet that a notebook is, by what is in it, whatever the file is called. `BadInput` when it is none."""
    known = checking.sheets()
    code = [c for c in nb.get("cells", []) if isinstance(c, dict) and c.get("cell_type") == "code"]
    text = "\n".join(_text(c) for c in code)
    ids = {str(c.get("metadata", {}).get("nbgrader", {}).get("grade_id", "")) for c in code}
    named = set().union(*(_defines(_text(c)) for c in code)) if code else set()

    def points(sheet: str) -> int:
        score = 3 * (nb.get("metadata", {}).get("llmcourse", {}).get("sheet") == sheet)
        for ex in checking.load_sheet(sheet).values():
            score += (f'"{ex.id}"' in text) + (f"{ex.name}-answer" in ids) + (ex.name in named)
        return score

    best = max(known, key=points, default="")
    require(
        bool(best) and points(best) > 0,
        "notebook",
        "not an exercise sheet",
        "a sheet of the course: " + ", ".join(known),
    )
    return best


@dataclass(frozen=True)
class _Cell:
    number: int
    source: str
    owner: str
    """the exercise that it answers; empty: a free cell"""

    @cached_property
    def python(self) -> str:
        return as_python(self.source)


def _cells(nb: dict, exercises: Iterable[checking.Exercise]) -> list[_Cell]:
    """The cells that are run: no checks, and each with the exercise that it answers."""
    names = [ex.name for ex in exercises]
    out = []
    for i, cell in enumerate(nb.get("cells", []), 1):
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = _text(cell)
        about = cell.get("metadata", {}).get("nbgrader", {})
        if _is_check(source) or (isinstance(about, dict) and about.get("grade") and not about.get("solution")):
            continue
        defined = _defines(source)
        owners = [n for n in names if n in defined]
        owner = (
            str(about.get("grade_id", "")).removesuffix("-answer")
            if isinstance(about, dict) and about.get("solution")
            else ""
        )
        out.append(
            _Cell(i, source, owners[0] if len(owners) == 1 else "" if owners else owner if owner in names else "")
        )
    return out


# -------------------------------------------------------------------------------------- grading


def _grade_one(ex: checking.Exercise, cells: list[_Cell], guilty: set[int], limits: Limits) -> checking.Result:
    """The verdict on one exercise. Cells of no exercise that had to be stopped are added to `guilty` and left out."""
    started = time.perf_counter()
    own = [c for c in cells if c.owner in ("", ex.name)]
    result, lacks = _attempt(ex, own, guilty, limits)
    if lacks and len(own) < len(cells):  # perhaps a helper is defined in the cell of another exercise
        again, _ = _attempt(ex, cells, set(guilty), limits)
        result = again if again.passed or (not result.passed and again.cases_passed > result.cases_passed) else result
    return replace(result, seconds=time.perf_counter() - started)


def _attempt(
    ex: checking.Exercise, cells: list[_Cell], guilty: set[int], limits: Limits
) -> tuple[checking.Result, bool]:
    """One try with these cells; the second value says that a name was missing."""
    failed = lambda sentence, **more: checking.Result(
        id=ex.id,
        title=ex.title,
        status="failed",
        points=0,
        max_points=ex.points,
        cases=len(ex.all_cases()),
        sentence=sentence,
        **more,
    )
    total = limits.cell_seconds * (len(cells) + 1) + ex.time_limit * len(ex.all_cases())
    while True:
        with Child(limits, total) as child:
            run = [c for c in cells if c.number not in guilty]
            stopped, errors = _run_cells(child, checking.setup_source(ex.sheet), run, limits)
            if stopped:
                cell, why = stopped
                if cell.owner == ex.name:
                    return failed(f"The cell with your answer was stopped. {why}"), False
                guilty.add(cell.number)
                continue
            return _call(ex, child, errors, failed)


def _run_cells(
    child: Child, setup: str, cells: list[_Cell], limits: Limits
) -> tuple[tuple[_Cell, str] | None, dict[_Cell, dict]]:
    """Run set-up and cells in the child. Returns the cell that ended or hung it, and the errors of the others."""
    errors: dict[_Cell, dict] = {}
    child.ask({"cell": setup, "name": "<set-up>"}, seconds=limits.start_seconds)
    for again in (False, True):  # a sheet whose cells were moved: what lacked a name gets a second chance
        for cell in [c for c, e in errors.items() if e.get("type") == "NameError"] if again else cells:
            try:
                reply, _ = child.ask(
                    {"cell": cell.python, "source": cell.source, "name": f"<cell {cell.number}>"},
                    seconds=limits.cell_seconds,
                )
            except TimeoutError:
                return (cell, timeout_outcome(limits.cell_seconds)["message"]), errors
            except Gone as e:
                return (cell, str(e)), errors
            errors.pop(cell, None)
            if reply.get("kind") == "error":
                errors[cell] = reply
    return None, errors


def _call(ex: checking.Exercise, child: Child, errors: dict[_Cell, dict], failed: Any) -> tuple[checking.Result, bool]:
    """Ask the child for every case, and judge."""
    outcomes: list[dict] = []
    for c in ex.all_cases():
        request, blobs = c.request()
        request |= {"answer": ex.name, "value": ex.make_cases is None}
        try:
            reply, back = child.ask(request, blobs, seconds=ex.time_limit)
            if reply.get("kind") == "missing":
                mine = [e for cell, e in errors.items() if cell.owner == ex.name] or list(errors.values())
                if not mine:
                    return checking.Result(
                        id=ex.id, title=ex.title, status="not started", points=0, max_points=ex.points, cases=len(ex.all_cases()),
                        sentence=f"No cell of the sheet defines {ex.name}.",
                    ), True  # fmt: skip
                e = mine[0]
                line = f"{e['lineno']}: {e['line']}" if e.get("line") else ""
                if e["type"] == "NotImplementedError":
                    return checking.Result(id=ex.id, title=ex.title, status="not started", points=0, max_points=ex.points,
                                           cases=len(ex.all_cases()), sentence="There is no answer yet."), False  # fmt: skip
                return failed(
                    f"The cell that should define {ex.name} stopped with {e['type']}: {e['message']}", line=line
                ), e["type"] == "NameError"
            outcome = checking._read(_plain(reply), back, c)
        except TimeoutError:
            outcome = timeout_outcome(ex.time_limit)
        except (Gone, ValueError, KeyError, TypeError) as e:
            outcome = {
                "kind": "gone",
                "message": str(e) if isinstance(e, Gone) else "What came back from your code could not be read.",
            }
        outcomes.append(outcome)
        if outcome["kind"] in ("timeout", "gone"):
            break
    lacks = any(o.get("type") in ("NameError", "UnboundLocalError") for o in outcomes)
    return checking.judge(ex, outcomes), lacks


def _plain(reply: dict) -> dict:
    """A reply with the types that it should have: a child may send anything."""
    if reply.get("kind") == "value":
        return reply
    if reply.get("kind") != "error":
        raise ValueError("not a reply")
    texts = {k: str(reply.get(k, ""))[:500] for k in ("type", "message", "line", "printed", "driver") if k in reply}
    types = [str(t) for t in reply.get("types", [])][:50] if isinstance(reply.get("types"), list) else []
    return {
        "kind": "error",
        **{"type": "", "message": "", **texts},
        "types": types,
        "lineno": reply.get("lineno", 0) if isinstance(reply.get("lineno"), int) else 0,
    }


@dataclass(frozen=True)
class SheetResult:
    """The verdicts on all exercises of one sheet."""

    sheet: str
    file: str
    results: tuple[checking.Result, ...]

    @property
    def passed(self) -> bool:
        return all(r.passed for r in self.results)

    @property
    def points(self) -> int:
        return sum(r.points for r in self.results)

    @property
    def max_points(self) -> int:
        return sum(r.max_points for r in self.results)

    def to_dict(self) -> dict:
        return {"sheet": self.sheet, "file": self.file, "passed": self.passed, "points": self.points, "max_points": self.max_points,
                "exercises": [r.to_dict() for r in self.results]}  # fmt: skip


def grade(nb: dict, *, file: str = "", only: str | None = None, limits: Limits | None = None) -> SheetResult:
    """Grade a notebook (its JSON as a dict). Whatever the learner's code does, every exercise gets its verdict.

    Args:
        nb: the notebook.
        file: the name to show.
        only: the id of one exercise; by default all of the sheet.
        limits: what the learner's code may use.
    Raises:
        BadInput: the notebook is not an exercise sheet, or `only` is not in it.
    """
    limits = limits or Limits()
    sheet = only.split(".")[0] if only else which_sheet(nb)
    exercises = checking.load_sheet(sheet)
    require(only is None or only in exercises, "exercise", only, ", ".join(exercises))
    cells = _cells(nb, exercises.values())
    guilty: set[int] = set()
    wanted = [ex for ex in exercises.values() if only in (None, ex.id)]
    return SheetResult(sheet, file, tuple(_grade_one(ex, cells, guilty, limits) for ex in wanted))


def grade_file(path: str | Path, *, only: str | None = None, limits: Limits | None = None) -> SheetResult:
    """Grade a notebook file; see `grade`."""
    path = Path(path)
    require(path.is_file(), "sheet", str(path), "an existing notebook file")
    try:
        nb = json.loads(path.read_text(encoding="utf8"))
        require(isinstance(nb, dict) and isinstance(nb.get("cells"), list), "sheet", str(path), "a Jupyter notebook")
    except ValueError as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"sheet is {str(path)!r}; allowed: a Jupyter notebook (this file is damaged).") from None
    return grade(nb, file=str(path), only=only, limits=limits)


def junit(results: Iterable[SheetResult]) -> str:
    """The results as JUnit XML: a test suite per sheet, a test case per exercise."""
    root = ElementTree.Element("testsuites")
    clean = lambda text: re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
    for sheet in results:
        failures = sum(not r.passed for r in sheet.results)
        suite = ElementTree.SubElement(root, "testsuite", name=sheet.sheet, tests=str(len(sheet.results)), failures=str(failures), errors="0",
                                       skipped="0", time=f"{sum(r.seconds for r in sheet.results):.3f}")  # fmt: skip
        for r in sheet.results:
            one = ElementTree.SubElement(suite, "testcase", classname=sheet.sheet, name=r.id, time=f"{r.seconds:.3f}")
            if not r.passed:
                ElementTree.SubElement(one, "failure", message=clean(r.sentence), type=r.status).text = clean(repr(r))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"

"""Grade a sheet from outside: the learner's code runs in a child process, the cases and the solution stay here.

For each exercise a fresh child runs the sheet's own set-up, then the learner's cells without those that answer another
exercise, and serves calls of the answer (`llmcourse.practice.worker`). So a cell that loops for ever, leaves, eats
memory or breaks a library costs its own exercise only, and a sheet that replaces `check` changes nothing: its `check`
is not used.

On Linux the kernel keeps the child from starting processes, from the network, from reading the checker and from
writing outside its own folder (`llmcourse.practice.walls`). Elsewhere Python's audit hook does what it can, and on
Windows only the time limit holds.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import json
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llmcourse.practice import checking, walls, yearly
from llmcourse.practice.exercises import read_reply
from llmcourse.practice.worker import as_python, busy_seconds, read_message, timeout_outcome, write_message
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
    sheet_seconds: float = 240.0
    """of wall time, for everything in one file"""
    confine: bool = True
    """false: without the kernel's help, for tests of the audit hook"""


SLOW = 2.0  # seconds: a cell of no exercise that takes longer is not run again for each exercise
MAX_REPLY = 2**20  # bytes of one verdict of a grading process


class Gone(Exception):
    """The child has ended, or had to be ended; the text is for the learner."""


# --------------------------------------------------------------------------------- the children


def _environment(folder: str) -> dict[str, str]:
    """Little is handed down: no tokens, no proxies."""
    keep = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "TEMP", "TMP", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k in keep}
    own = {"HOME": folder, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
    return env | own | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def _command(*arguments: str) -> list[str]:
    start = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from llmcourse.practice.worker import main; main()"
    )
    # the folder without links: inside bubblewrap only real paths exist, and the name alone says which environment it is
    python = os.path.join(os.path.realpath(os.path.dirname(sys.executable)), os.path.basename(sys.executable))
    return [python, "-P", "-c", start, *arguments]


def _hidden() -> list[str]:
    """Where the reference is: a child must not read these."""
    import llmcourse.practice.sheets

    root = course_root()
    return [os.path.realpath(p) for p in (*llmcourse.practice.sheets.__path__, root / "solutions", root / ".git")]


# What PyTorch and Python read of the system: no passwords, no other processes.
_SYSTEM = """
/usr /lib /lib64 /bin /opt /System /Library /sys/devices/system /dev/null /dev/zero /dev/urandom /dev/random
/proc/cpuinfo /proc/meminfo /proc/stat /proc/version /proc/sys/vm /etc/alternatives /etc/ld.so.cache /etc/ld.so.conf
/etc/ld.so.conf.d /etc/localtime /etc/passwd /etc/group /etc/nsswitch.conf /etc/mime.types
""".split()  # noqa: SIM905


def _permitted() -> tuple[list[str], list[str]]:
    """What a child may read, and of which folders it may only read the names."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(PACKAGE), str(course_root() / "settings.ini"), *sys.path}
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
    for path in sorted({os.path.realpath(p) for p in (*paths, *_SYSTEM) if p and os.path.exists(p)}):
        if path == own and "site-packages" not in own:
            listable.append(path)  # a checkout: only its package, which has an entry of its own
        elif path != "/":
            allow(path)
    return readable, listable


class _Nursery:
    """One process that has imported torch and forks a child for each exercise: a child then starts in milliseconds.

    Where bubblewrap can be had, the nursery and its children live inside; else in a folder of their own.
    """

    current: _Nursery | None = None

    def __init__(self):
        readable, _ = _permitted()
        inside = walls.bubblewrap(p for p in readable if not p.startswith(("/dev/", "/proc/")))
        self.walls = ["bubblewrap"] if inside else []
        self.outside = "" if inside else tempfile.mkdtemp(prefix="llmcourse-")
        self.folder = self.outside or "/tmp"  # as the children see it
        ours, theirs = socket.socketpair()
        fd, nowhere = theirs.fileno(), subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*inside, *_command("nursery", str(fd))], env=_environment(self.folder), cwd=self.outside or "/",
            pass_fds=[fd], stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True,
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
        """A new child: its number as the system outside knows it, and the line to it."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.settimeout(seconds)
        try:
            socket.send_fds(self.control, [b"x"], [theirs.fileno()])
            theirs.close()
            word, about, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(struct.calcsize("3i")))
            pid = struct.unpack("3i", about[0][2])[0]
            if not word or pid <= 0:  # it ended before its first word: 0 stands for nobody, and in killpg for ourselves
                raise OSError
        except (OSError, IndexError):
            ours.close()
            self.close()
            raise RuntimeError("the process that runs exercises could not be started") from None
        ours.settimeout(None)
        # a child that does not read must not hold up the grader: a blocked write gives up
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
        return pid, ours

    def close(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()
        if self.outside:
            walls.remove(self.outside)
        if _Nursery.current is self:
            _Nursery.current = None


class Child:
    """A process with the learner's code. `ask` sends one request and waits for the reply."""

    def __init__(self, limits: Limits, seconds: float):
        self.process = self.talk = None
        self.outside = self.folder = ""
        self.walls: list[str] = []
        try:
            if sys.platform == "linux":
                nursery = _Nursery.get()
                self.pid, self.talk = nursery.fork(limits.start_seconds)
                self.source, self.sink = self.talk.makefile("rb"), self.talk.makefile("wb")
                self.folder, self.walls = f"{nursery.folder}/{self.pid}", list(nursery.walls)
                self.outside = nursery.outside and self.folder
            else:
                self.outside = self.folder = tempfile.mkdtemp(prefix="llmcourse-")
                flags = {"creationflags": 0x00000200} if os.name == "nt" else {"start_new_session": True}
                pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
                self.process = subprocess.Popen(
                    _command(), env=_environment(self.folder), cwd=self.folder, stdin=pipe, stdout=pipe, stderr=nowhere,
                    **flags,
                )  # fmt: skip
                self.pid, self.source, self.sink = self.process.pid, self.process.stdout, self.process.stdin
            self.replies: queue.Queue = queue.Queue(maxsize=2)
            threading.Thread(target=self._listen, daemon=True).start()
            readable, listable = _permitted()
            paths = {"readable": [*readable, "/proc/self"], "listable": listable, "hidden": _hidden()}
            sizes = {"memory_bytes": limits.memory_bytes, "file_bytes": limits.file_bytes}
            settings = {"folder": self.folder, "confine": limits.confine} | paths | sizes
            ready, _ = self.ask(settings, seconds=seconds, wall=limits.start_seconds)
            self.walls += [str(w) for w in ready.get("in_force", [])]
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

    def _processor_seconds(self) -> float:
        """What the child has used so far, as the system counts it; 0 where it does not say."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return 0.0

    def ask(
        self, message: dict, blobs: list[bytes] = (), *, seconds: float, wall: float | None = None
    ) -> tuple[dict, list[bytes]]:
        """Send a request. The child itself keeps to `seconds` of processor time; this is for when it cannot."""
        started, before, busy = time.monotonic(), self._processor_seconds(), busy_seconds(str(self.pid))
        try:
            write_message(self.sink, message | {"seconds": seconds}, blobs)
            while True:
                try:
                    reply = self.replies.get(timeout=0.25)
                    break
                except queue.Empty:
                    took = time.monotonic() - started
                    awake = busy_seconds(str(self.pid))
                    asleep = 0.0 if wall or busy is None or awake is None else took - (awake - busy)
                    worked = self._processor_seconds() - before
                    if worked > 2 * seconds + 3 or asleep > seconds + 8 or took > (wall or 6 * seconds + 30):
                        raise TimeoutError from None
        except BlockingIOError:  # it does not read
            raise TimeoutError from None
        except OSError as e:
            if isinstance(e, TimeoutError):
                raise
            raise Gone("Your code ended its process.") from None
        if isinstance(reply, (EOFError, OSError)):
            raise Gone("Your code ended its process: by an exit, by using too much memory, or by a crash.")
        if isinstance(reply, BaseException):
            raise Gone("What came back from your code could not be read.")
        if reply[0].get("kind") == "timeout":
            raise TimeoutError
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
        if self.outside:
            walls.remove(self.outside)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


# ------------------------------------------------------------------------------- reading a sheet


# A file that was handed in may hold anything: nothing is taken for what it should be.


def _dict(thing: Any, *path: str) -> dict:
    """What lies at a path of dictionaries; an empty one where something else lies."""
    for name in path:
        thing = thing.get(name) if isinstance(thing, dict) else None
    return thing if isinstance(thing, dict) else {}


def about(cell: Any) -> dict:
    """nbgrader's metadata of a cell."""
    return _dict(cell, "metadata", "nbgrader")


def _text(cell: dict) -> str:
    source = cell.get("source", "")
    if isinstance(source, list):
        source = "".join(s for s in source if isinstance(s, str))
    return source if isinstance(source, str) else ""


def _code_cells(nb: dict) -> list[tuple[int, dict]]:
    cells = nb.get("cells")
    cells = cells if isinstance(cells, list) else []
    return [(i, c) for i, c in enumerate(cells, 1) if isinstance(c, dict) and c.get("cell_type") == "code"]


def _defines(source: str) -> set[str]:
    """The names that a cell sets at its top level."""
    try:
        body = ast.parse(as_python(source)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(re.findall(r"^(?:def|class) (\w+)", source, re.M))
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


def _is_check(source: str) -> bool:
    source = source.strip()
    return len(source) < 300 and bool(re.fullmatch(r"check\([\"'][\w.]+[\"'][^()]*\);?", source))


def which_sheet(nb: dict) -> str:
    """The sheet that a notebook is, by what is in it, whatever the file is called. `BadInput` when it is none."""
    known = checking.sheets()
    code = [c for _, c in _code_cells(nb)]
    text = "\n".join(_text(c) for c in code)
    ids = {str(about(c).get("grade_id", "")) for c in code}
    named = set().union(*(_defines(_text(c)) for c in code)) if code else set()

    def points(sheet: str) -> int:
        score = 3 * (_dict(nb, "metadata", "llmcourse").get("sheet") == sheet)
        for ex in checking.load_sheet(sheet).values():
            score += (f'"{ex.id}"' in text) + (f"{ex.name}-answer" in ids) + (ex.name in named)
        return score

    best = max(known, key=points, default="")
    if not best or points(best) == 0:
        raise NoSheet(f"notebook is not an exercise sheet; allowed: a sheet of the course: {', '.join(known)}.")
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
    for i, cell in _code_cells(nb):
        source, kind = _text(cell), about(cell)
        if _is_check(source) or (kind.get("grade") and not kind.get("solution")):
            continue
        defined = _defines(source)
        owners = [n for n in names if n in defined]
        owner = str(kind.get("grade_id", "")).removesuffix("-answer") if kind.get("solution") else ""
        out.append(
            _Cell(i, source, owners[0] if len(owners) == 1 else "" if owners else owner if owner in names else "")
        )
    return out


# -------------------------------------------------------------------------------------- grading


@dataclass
class _Run:
    """The grading of one file: what was learned about its cells, and when it has to end."""

    cells: list[_Cell]
    limits: Limits
    end: float
    guilty: set[int] = field(default_factory=set)
    """cells of no exercise that had to be stopped: never run again"""
    slow: set[int] = field(default_factory=set)
    """cells of no exercise that take long: only run again where a name is missing"""
    walls: tuple[str, ...] = ()

    def grade(self, ex: checking.Exercise) -> checking.Result:
        """The verdict on one exercise."""
        started = time.monotonic()
        if started > self.end:
            return ex.failed(f"Not graded: this file needs more than {self.limits.sheet_seconds:g} seconds in all.")
        own = [c for c in self.cells if c.owner in ("", ex.name) and c.number not in self.slow]
        result, lacks = self._attempt(ex, own)
        if lacks and len(own) < len(self.cells):  # perhaps a helper is defined in the cell of another exercise
            before = set(self.guilty)
            again, _ = self._attempt(ex, self.cells)
            self.guilty = before
            better = again.passed or (not result.passed and again.cases_passed > result.cases_passed)
            result = again if better else result
        return replace(result, seconds=time.monotonic() - started)

    def _attempt(self, ex: checking.Exercise, cells: list[_Cell]) -> tuple[checking.Result, bool]:
        """One try with these cells; the second value says that a name was missing."""
        total = self.limits.cell_seconds * (len(cells) + 1) + ex.time_limit * len(ex.all_cases())
        while True:
            with Child(self.limits, total) as child:
                self.walls = tuple(child.walls)
                run = [c for c in cells if c.number not in self.guilty]
                stopped, errors = _run_cells(child, checking.setup_source(ex.sheet), run, self.limits, self.slow)
                if not stopped:
                    return _call(ex, child, errors)
                cell, why = stopped
                if cell.owner == ex.name:
                    return ex.failed(f"The cell with your answer was stopped. {why}"), False
                self.guilty.add(cell.number)


def _run_cells(
    child: Child, setup: str, cells: list[_Cell], limits: Limits, slow: set[int]
) -> tuple[tuple[_Cell, str] | None, dict[_Cell, dict]]:
    """Run set-up and cells in the child. Returns the cell that ended or hung it, and the errors of the others."""
    errors: dict[_Cell, dict] = {}
    child.ask({"cell": setup, "name": "<set-up>"}, seconds=limits.start_seconds)
    for again in (False, True):  # a sheet whose cells were moved: what lacked a name gets a second chance
        for cell in [c for c, e in errors.items() if e.get("type") == "NameError"] if again else cells:
            started = time.monotonic()
            try:
                reply, _ = child.ask(
                    {"cell": cell.python, "source": cell.source, "name": f"<cell {cell.number}>"},
                    seconds=limits.cell_seconds,
                )
            except TimeoutError:
                return (cell, timeout_outcome(limits.cell_seconds)["message"]), errors
            except Gone as e:
                return (cell, str(e)), errors
            if not cell.owner and time.monotonic() - started > SLOW:
                slow.add(cell.number)
            errors.pop(cell, None)
            if reply.get("kind") == "error":
                errors[cell] = reply
    return None, errors


def _call(ex: checking.Exercise, child: Child, errors: dict[_Cell, dict]) -> tuple[checking.Result, bool]:
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
                    return ex.failed(f"No cell of the sheet defines {ex.name}.", status="not started"), True
                e = mine[0]
                if e["type"] == "NotImplementedError":
                    return ex.failed("There is no answer yet.", status="not started"), False
                sentence = f"The cell that should define {ex.name} stopped with {e['type']}: {e['message']}"
                line = f"{e['lineno']}: {e['line']}" if e.get("line") else ""
                return ex.failed(sentence, line=line), e["type"] == "NameError"
            outcome = read_reply(_plain(reply), back, c)
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
    walls: tuple[str, ...] = ()
    """what stood around the learner's code: bubblewrap, landlock, seccomp"""
    error: str = ""
    """why the file could not be graded"""
    seed: int = 0
    """whose numbers the checks had: a year's seed, or 0 for those of the book"""

    @property
    def passed(self) -> bool:
        return not self.error and all(r.passed for r in self.results)

    @property
    def points(self) -> int:
        return sum(r.points for r in self.results)

    @property
    def max_points(self) -> int:
        return sum(r.max_points for r in self.results)

    def to_dict(self) -> dict:
        names = ("sheet", "file", "passed", "points", "max_points", "error", "seed")
        exercises = [r.to_dict() for r in self.results]
        return {n: getattr(self, n) for n in names} | {"walls": list(self.walls), "exercises": exercises}


class NoSheet(BadInput):
    """A notebook, but none of the course's sheets."""


def safe(names: Iterable[str]) -> bool:
    """Whether these walls keep a stranger's code from the checker, the teacher's files and other processes."""
    return "seccomp" in names and bool({"bubblewrap", "landlock"} & set(names))


def walls_here() -> list[str]:
    """The walls that this system offers."""
    with Child(Limits(), 10.0) as child:
        return child.walls


def seed_of(nb: dict) -> int:
    """The seed with which a sheet says it was released; 0 for a sheet of the book."""
    told = _dict(nb, "metadata", "llmcourse").get("seed")
    if isinstance(told, int) and 0 <= told < 2**31:
        return int(told)
    lines = re.search(r"^sheet_seed\((\d{1,9})\)", "\n".join(_text(c) for _, c in _code_cells(nb)), re.M)
    return int(lines[1]) if lines else 0


def _begin(nb: dict, only: str | None, limits: Limits) -> tuple[str, list[checking.Exercise], _Run]:
    sheet = only.split(".")[0] if only else which_sheet(nb)
    exercises = checking.load_sheet(sheet)
    require(only is None or only in exercises, "exercise", only, ", ".join(exercises))
    run = _Run(_cells(nb, exercises.values()), limits, time.monotonic() + limits.sheet_seconds)
    return sheet, [ex for ex in exercises.values() if only in (None, ex.id)], run


def grade(nb: dict, *, file: str = "", only: str | None = None, limits: Limits | None = None) -> SheetResult:
    """Grade a notebook (its JSON as a dict). Whatever the learner's code does, every exercise gets its verdict.

    The notebook is read in this process, the learner's code runs in others. For work of strangers see `grade_apart`.

    Args:
        nb: the notebook.
        file: the name to show.
        only: the id of one exercise; by default all of the sheet.
        limits: what the learner's code may use.
    Raises:
        BadInput: the notebook is not an exercise sheet, or `only` is not in it.
    """
    with yearly.with_seed(seed_of(nb) or yearly.seed()):
        sheet, exercises, run = _begin(nb, only, limits or Limits())
        results = tuple(run.grade(ex) for ex in exercises)
        return SheetResult(sheet, file, results, run.walls, seed=yearly.seed())


def _read(text: str, file: str) -> dict:
    try:
        nb = json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput(f"sheet is {file!r}; allowed: a Jupyter notebook (this file is damaged).") from None
    if not isinstance(nb, dict) or not isinstance(nb.get("cells"), list):
        raise BadInput(f"sheet is {file!r}; allowed: a Jupyter notebook (this file is none).")
    return nb


def _read_file(path: str | Path) -> str:
    require(Path(path).is_file(), "sheet", str(path), "an existing notebook file")
    try:
        return Path(path).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"sheet is {str(path)!r}; allowed: a Jupyter notebook (this file cannot be read).") from None


def grade_file(path: str | Path, *, only: str | None = None, limits: Limits | None = None) -> SheetResult:
    """Grade a notebook file; see `grade`."""
    return grade(_read(_read_file(path), str(path)), file=str(path), only=only, limits=limits)


# ------------------------------------------------------------------- a process for each submission


def _grade_into(
    pipe: Any, text: str, file: str, only: str | None, limits: Limits, sheet_folders: list[str], seed: int | None
) -> None:
    """Grade in this process, and send each verdict as soon as it is there."""
    import llmcourse.practice.sheets

    walls.die_with_parent()
    known = llmcourse.practice.sheets.__path__
    known.extend(f for f in sheet_folders if f not in known)
    send = lambda kind, **what: pipe.send_bytes(json.dumps({"kind": kind, **what}).encode())
    try:
        import torch

        torch.set_num_threads(1)
        nb = _read(text, file)
        os.environ[yearly.VARIABLE] = str(seed_of(nb) if seed is None else seed)  # an older one may have been inherited
        sheet, exercises, run = _begin(nb, only, limits)
        blank = lambda ex: asdict(ex.failed(""))
        send("begin", sheet=sheet, seed=yearly.seed(), blank=[blank(ex) for ex in exercises])
        for ex in exercises:
            result = run.grade(ex)
            send("verdict", result=asdict(result), walls=run.walls)
        send("end")
    except NoSheet as e:
        send("no sheet", text=str(e))
    except BadInput as e:
        send("bad", text=str(e))


def _context():
    """Forked from a clean process that has imported PyTorch, where that exists; else a new process."""
    import multiprocessing

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "llmcourse.practice.grading"])
    return context


def grade_apart(
    path: str | Path, *, text: str | None = None, only: str | None = None, limits: Limits | None = None
) -> SheetResult:
    """Read and grade a file in a process of its own, with one deadline. Whatever happens there is this file's result.

    Args:
        path: the notebook file; with `text`, only the name to show.
        text: the notebook's text, instead of reading it.
    Raises:
        BadInput: the file is not there, or `only` is no exercise.
        NoSheet: the file is a notebook, but no exercise sheet.
    """
    import llmcourse.practice.sheets

    limits, file = limits or Limits(), str(path)
    if text is None:
        try:
            text = _read_file(path)
        except BadInput as e:
            if not Path(path).is_file():
                raise
            return SheetResult("", file, (), error=str(e))
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_grade_into,
        args=(theirs, text, file, only, limits, list(llmcourse.practice.sheets.__path__), yearly.fixed()),
        daemon=True,
    )
    process.start()
    theirs.close()
    end = time.monotonic() + limits.sheet_seconds + limits.start_seconds
    sheet, results, done, stood, why, seed = "", [], 0, (), "", 0
    try:
        while not why:
            if not ours.poll(max(0.0, end - time.monotonic())):
                why = f"it took more than {limits.sheet_seconds:g} seconds"
                break
            message = json.loads(ours.recv_bytes(MAX_REPLY))
            if message["kind"] == "begin":
                sheet, seed, results = message["sheet"], message["seed"], [_result(r) for r in message["blank"]]
            elif message["kind"] == "verdict":
                results[done], stood, done = _result(message["result"]), tuple(message["walls"]), done + 1
            elif message["kind"] == "no sheet":
                raise NoSheet(message["text"])
            elif message["kind"] == "bad":
                return SheetResult("", file, (), error=message["text"])
            else:
                break
    except (EOFError, OSError):
        why = "the process that graded it ended"
    finally:
        ours.close()
        process.kill()
        process.join()
    results[done:] = [replace(r, sentence=f"Not graded: {why}.") for r in results[done:]]
    error = "" if results else f"The file could not be graded: {why}."
    return SheetResult(sheet, file, tuple(results), stood, error, seed)


def _result(fields: dict) -> checking.Result:
    return checking.Result(**fields | {"given": tuple(map(tuple, fields["given"]))})


def junit(results: Iterable[SheetResult]) -> str:
    """The results as JUnit XML: a test suite per sheet, a test case per exercise."""
    root = ElementTree.Element("testsuites")
    clean = lambda text: re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
    for sheet in results:
        counts = {"tests": len(sheet.results), "failures": sum(not r.passed for r in sheet.results), "skipped": 0}
        counts |= {"errors": int(bool(sheet.error)), "time": f"{sum(r.seconds for r in sheet.results):.3f}"}
        name = sheet.sheet or clean(sheet.file)
        suite = ElementTree.SubElement(root, "testsuite", name=name, **{k: str(v) for k, v in counts.items()})
        if sheet.error:
            one = ElementTree.SubElement(suite, "testcase", classname=name, name="the file", time="0")
            ElementTree.SubElement(one, "error", message=clean(sheet.error))
        for r in sheet.results:
            one = ElementTree.SubElement(suite, "testcase", classname=sheet.sheet, name=r.id, time=f"{r.seconds:.3f}")
            if not r.passed:
                ElementTree.SubElement(one, "failure", message=clean(r.sentence), type=r.status).text = clean(repr(r))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"

"""Hostile and damaged submissions: each is that file's result, and nothing outside the learner's process is touched."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason='nbgrader is not installed: pip install "llmcourse[classroom]"')

import nbformat
import psutil
import torch
from conftest import clean_env
from example_sheet import ROOT, build, tool
from typer.testing import CliRunner

from llmcourse.practice import checking, commands, grading, walls, worker

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only part of the walls stands")
FAST = grading.Limits(cell_seconds=2.0, sheet_seconds=60.0)


@pytest.fixture(scope="module", autouse=True)
def example(tmp_path_factory: pytest.TempPathFactory):
    """The example sheet, built and known to this process."""
    import llmcourse.practice.sheets

    torch.set_num_threads(1)
    made = build(tmp_path_factory.mktemp("sheet"))
    llmcourse.practice.sheets.__path__.append(str(made["module"].parent))
    sys.modules.pop("llmcourse.practice.sheets.example", None)
    yield made
    llmcourse.practice.sheets.__path__.remove(str(made["module"].parent))
    sys.modules.pop("llmcourse.practice.sheets.example", None)


@pytest.fixture
def sheet(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The example sheet with every answer right."""
    monkeypatch.chdir(tmp_path)
    return tool().solved(nbformat.read(example["master"], 4))


@pytest.fixture(params=["bubblewrap", "without"])
def place(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run a child: inside bubblewrap, where this machine has it, and without."""
    if request.param == "bubblewrap" and not walls.bubblewrap():
        pytest.skip("bubblewrap is not to be had on this machine")
    if grading._Nursery.current:
        grading._Nursery.current.close()
    if request.param == "without":
        monkeypatch.setattr(walls, "bubblewrap", lambda *a: [])
    yield request.param
    if grading._Nursery.current:
        grading._Nursery.current.close()


def attend(nb: nbformat.NotebookNode, body: str, before: str = "") -> checking.Result:
    """The verdict on this body of `attend`."""
    nb = copy.deepcopy(nb)
    code = before + "def attend(q, k, v):\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    next(c for c in nb.cells if c.get("id") == "attend-answer").source = code
    return grading.grade(nb, only="example.attend", limits=FAST).results[0]


# --------------------------------------------------------------------------- what the kernel refuses

SYSTEM = """
import ctypes, struct, torch
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    return f"{libc.syscall(*a)}:{ctypes.get_errno()}"
"""
ATTACKS = {
    "a pipe's signals to the parent": "import fcntl, os\nr, w = os.pipe()\nreturn fcntl.fcntl(r, 8, os.getppid())",
    "signal number of a pipe": "import fcntl, os\nr, w = os.pipe()\nreturn fcntl.fcntl(r, 10, 9)",
    "limit of the parent": "import resource, os\nreturn resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "sigqueue": "import os\nreturn call(129, os.getppid(), 15, ctypes.create_string_buffer(128))",
    "kill": "import os\nreturn call(62, os.getppid(), 15)",
    "priority of the parent": "import os\nreturn os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "affinity of the parent": "import os\nreturn os.sched_setaffinity(os.getppid(), {0})",
    "scheduler of the parent": "import os\n"
    "return os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "ptrace": "import os\nreturn call(101, 16, os.getppid(), 0, 0)",
    "another's memory": "return call(310, 1, 0, 0, 0, 0, 0)",
    "io_uring": "return call(425, 8, ctypes.create_string_buffer(256))",
    "memfd": "import os\nreturn os.memfd_create('x')",
    "shared memory": "return call(29, 1234, 4096, 0o1666)",
    "posix shared memory": "import os\nreturn os.open('/dev/shm/llmcourse-test', os.O_CREAT | os.O_RDWR)",
    "socket": "import socket\nreturn socket.socket()",
    "a new process group": "import os\nreturn os.setpgid(0, 0)",
    "namespaces": "return call(272, 0x10000000)",
    "mount": "return call(165, 0, 0, 0, 0, 0)",
    "bpf": "return call(321, 0, 0, 0)",
    "key ring": "return call(250, 0, 0)",
    "passwords": "return open('/etc/shadow').read()",
    "the grader's environment": "import os\nreturn open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "write outside": "return open('/var/tmp/llmcourse-test', 'w')",
    "the checker, past Python": "return torch.UntypedStorage.from_file(PATH, False, 10).tolist()",
}


@linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_attacks_are_refused(example, place: str) -> None:
    """All of them in one child; what each said comes back as text."""
    cell = SYSTEM + f"PATH = {str(example['module'])!r}\nout = {{}}\n"
    for name, body in ATTACKS.items():
        lines = "".join(f"    {line}\n" for line in body.split("\n"))
        cell += f"def attack():\n{lines}try: out[{name!r}] = repr(attack())[:60]\n"
        cell += f"except BaseException as e: out[{name!r}] = f'{{type(e).__name__}}: {{e}}'[:60]\n"
    mine = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    with grading.Child(FAST, 20) as child:
        assert child.ask({"cell": cell, "name": "<cell>"}, seconds=20)[0] == {"kind": "done"}
        reply, blobs = child.ask({"answer": "out", "value": True}, seconds=10)
        if not {"landlock", "seccomp"} <= set(child.walls):
            pytest.skip(f"this kernel offers only: {child.walls}")
    said = worker.decode(reply["value"], blobs)
    refused = (
        "PermissionError",
        "OSError",
        "-1:1'",
        "-1:38'",
        "FileNotFoundError",
        "RuntimeError",
        "ProcessLookupError",
    )
    assert {n: s for n, s in said.items() if not any(r in s for r in refused)} == {}
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == mine


def judged(program: bytes, arch: int, number: int, *arguments: int) -> str:
    """What the kernel does with a call: the filter run by hand."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator, at = 0, 0
    while True:
        code, yes, no, k = struct.unpack_from("<HBBI", program, 8 * at)
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return {0x7FFF0000: "allowed", 0x50001: "refused", 0x50026: "unknown"}[k]
        else:
            true = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += yes if true else no
        at += 1


@pytest.mark.parametrize(
    ("name", "x86", "arm", "arguments", "want"),
    [
        ("read", 0, 63, (), "allowed"), ("mmap", 9, 222, (), "allowed"), ("futex", 202, 98, (), "allowed"),
        ("getrandom", 318, 278, (), "allowed"), ("openat", 257, 56, (), "allowed"),
        ("exit_group", 231, 94, (), "allowed"),
        ("socket", 41, 198, (2, 1, 0), "refused"), ("socketpair", 53, 199, (1, 1, 0), "allowed"),
        ("socketpair of the network", 53, 199, (2, 1, 0), "refused"), ("a thread", 56, 220, (0x3D0F00,), "allowed"),
        ("fork", 56, 220, (17,), "refused"), ("clone3", 435, 435, (), "unknown"), ("execve", 59, 221, (), "refused"),
        ("fcntl F_GETFL", 72, 25, (3, 3), "allowed"), ("fcntl F_SETOWN", 72, 25, (3, 8), "refused"),
        ("fcntl F_SETSIG", 72, 25, (3, 10), "refused"), ("own limit", 302, 261, (0, 0), "allowed"),
        ("limit of another", 302, 261, (77, 0), "refused"), ("prctl name", 157, 167, (15,), "allowed"),
        ("prctl death", 157, 167, (1, 0), "refused"), ("ioctl TIOCSTI", 16, 29, (0, 0x5412), "refused"),
        ("kill", 62, 129, (1, 9), "refused"), ("io_uring_setup", 425, 425, (), "refused"),
        ("memfd", 319, 279, (), "refused"), ("what is newer", 470, 470, (), "unknown"),
        ("ptrace", 101, 117, (), "refused"), ("second numbering", 0x40000001, 0x40000001, (), "refused"),
    ],
)  # fmt: skip
def test_the_filter_on_both_machines(name: str, x86: int, arm: int, arguments: tuple, want: str) -> None:
    for machine, number in (("x86_64", x86), ("aarch64", arm)):
        assert judged(walls._program(machine), walls._AUDIT_ARCH[machine], number, *arguments) == want, machine
    assert judged(walls._program("x86_64"), 0x40000003, 0) == "refused", "32-bit calls have other numbers"


def test_a_result_says_which_walls_stood(sheet) -> None:
    graded = grading.grade(sheet, only="example.n_parameters", limits=FAST)
    assert graded.to_dict()["walls"] == list(graded.walls)
    if sys.platform == "linux":
        assert "seccomp" in graded.walls
        assert grading.safe(graded.walls) == ({"landlock", "bubblewrap"} & set(graded.walls) != set())


def test_require_sandbox(sheet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat.write(sheet, tmp_path / "a.ipynb")
    for stands, code in (([], 2), (["landlock"], 2), (["seccomp"], 2), (["bubblewrap", "seccomp"], 0)):
        monkeypatch.setattr(grading, "walls_here", lambda stands=stands: stands)
        done = CliRunner().invoke(commands.app, ["check", "a.ipynb", "--require-sandbox"])
        assert done.exit_code == code, done.output
        assert code == 0 or "--require-sandbox" in done.stderr


# ------------------------------------------------------------------------------ whatever is handed in


ODD_CELLS = [
    None, 3, "text", [], {}, {"cell_type": None}, {"cell_type": "code"}, {"cell_type": "code", "source": None},
    {"cell_type": "code", "source": 3}, {"cell_type": "code", "source": [1, None, "x = 1"]},
    {"cell_type": "code", "source": {"a": 1}}, {"cell_type": "code", "source": "", "metadata": None},
    {"cell_type": "code", "source": "", "metadata": []}, {"cell_type": "code", "source": "", "metadata": "x"},
    {"cell_type": "code", "source": "", "metadata": {"nbgrader": None}},
    {"cell_type": "code", "source": "", "metadata": {"nbgrader": [1]}},
    {"cell_type": "code", "source": "y = 2", "metadata": {"nbgrader": {"solution": True, "grade_id": None}}},
    {"cell_type": "code", "source": "y = 2", "metadata": {"nbgrader": {"solution": 1, "grade_id": {"a": 1}}}},
    {"cell_type": "code", "source": "\ud800"}, {"cell_type": "code", "source": "x = '\x00'"},
    {"cell_type": "code", "source": "raise ValueError('\\ud800 \\x1b[31m')"},
    {"cell_type": "code", "source": "(" * 5000},
    {"cell_type": "code", "source": "x = " + "-" * 50000 + "1"}, {"cell_type": "code", "source": "%%\n%\n!\n?"},
]  # fmt: skip


def test_odd_cells_cost_nothing(sheet) -> None:
    nb = json.loads(nbformat.writes(sheet))
    for metadata in (None, [], "x", {"llmcourse": None}, {"llmcourse": [1]}, {"llmcourse": {"sheet": {"a": 1}}}):
        odd = nb | {"metadata": metadata, "cells": [*ODD_CELLS, *nb["cells"]]}
        assert grading.which_sheet(odd) == "example"
    assert grading.grade(odd, limits=FAST).passed


@pytest.mark.parametrize(
    "text", ["check(" + " " * 200_000, " " * 200_000 + "x", "def" + " " * 200_000, "check('a'" + "\n" * 200_000 + "("]
)
def test_long_blanks_take_no_time(text: str) -> None:
    started = time.process_time()
    grading._is_check(text), grading._defines(text)
    assert time.process_time() - started < 8, "one that is quadratic takes minutes"


DAMAGED = {
    "empty": "", "half": '{"cells": [', "a list": "[]", "no cells": '{"cells": 3}', "nested": "[" * 100_000,
    "nested metadata": '{"metadata": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + ', "cells": []}',
}  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error_of_that_file(text: str) -> None:
    graded = grading.grade_apart("a.ipynb", text=text)
    assert graded.error and not graded.passed and "allowed: a Jupyter notebook" in graded.error


def test_a_folder_with_everything(sheet, tmp_path: Path) -> None:
    """Damaged, foreign and oddly named files beside a good one: exit code 1, and no result is lost."""
    folder = tmp_path / "in"
    (folder / "[/red] [bold]x").mkdir(parents=True)
    nbformat.write(sheet, folder / "[/red] [bold]x" / "good\x1b[31m.ipynb")
    (folder / "bad.ipynb").write_text(DAMAGED["nested"])
    (folder / "latin.ipynb").write_bytes(b"\xff\xfe{}")
    nbformat.write(nbformat.v4.new_notebook(), folder / "foreign.ipynb")
    nb = json.loads(nbformat.writes(sheet))
    bare = nb | {"metadata": None, "cells": [c | {"metadata": None} for c in nb["cells"]]}
    (folder / "null.ipynb").write_text(json.dumps(bare))
    done = CliRunner().invoke(commands.app, ["check", "in", "--json", "--junit", "out.xml"])
    data = json.loads(done.stdout)
    assert done.exit_code == 1 and data["passed"] is False
    by_name = {Path(s["file"]).name: s for s in data["sheets"]}
    assert set(by_name) == {"good\x1b[31m.ipynb", "bad.ipynb", "latin.ipynb", "null.ipynb"}
    assert by_name["good\x1b[31m.ipynb"]["passed"] and by_name["null.ipynb"]["passed"]
    assert by_name["bad.ipynb"]["error"] and by_name["latin.ipynb"]["error"]
    assert "left out" in done.stderr and (tmp_path / "out.xml").is_file()
    done = CliRunner().invoke(commands.app, ["check", "in"])
    assert done.exit_code == 1 and "\x1b" not in done.output and "[/red] [bold]x" in done.output
    done = CliRunner().invoke(commands.app, ["check", "in/bad.ipynb"])
    assert done.exit_code == 2 and "damaged" in done.stderr


def test_escape_sequences_do_not_reach_the_teacher(sheet) -> None:
    result = attend(sheet, "print('\\x1b[2J')\nraise ValueError('\\x1b]0;owned\\x07 \\u202e \\ud800 ☃')")
    text = repr(result) + result._repr_html_() + grading.junit([grading.SheetResult("s", "f", (result,))])
    assert not set(text) & set("\x1b\x07\u202e\ud800") and "☃" in text
    text.encode()


def test_one_deadline_for_a_file(sheet) -> None:
    nb = copy.deepcopy(sheet)
    nb.cells.insert(0, nbformat.v4.new_code_cell("import time; time.sleep(1.5)"))
    started = time.monotonic()
    graded = grading.grade(nb, limits=grading.Limits(cell_seconds=5, sheet_seconds=0.5))
    assert time.monotonic() - started < 30
    assert graded.results[0].passed and [r.sentence[:10] for r in graded.results[1:]] == ["Not graded"] * 3


@pytest.mark.parametrize("allowed", [60.0, 2.0], ids=["slow", "stopped"])
def test_a_slow_cell_of_no_exercise_runs_once(sheet, monkeypatch, allowed: float) -> None:
    nb, ran, run_cells = copy.deepcopy(sheet), [], grading._run_cells
    nb.cells.insert(0, nbformat.v4.new_code_cell(f"import time; time.sleep({grading.SLOW + 0.2})"))

    def counted(child, setup, cells, *rest):
        ran.append(sum("time.sleep" in cell.source for cell in cells))
        return run_cells(child, setup, cells, *rest)

    monkeypatch.setattr(grading, "_run_cells", counted)
    assert grading.grade(nb, limits=grading.Limits(cell_seconds=allowed, sheet_seconds=600.0)).passed
    assert len(ran) >= 4 and sum(ran) == 1, "each of four exercises would wait for it"


@linux
def test_a_child_that_does_not_read(sheet) -> None:
    """It says "done" by itself, never reads again, and two megabytes wait to be sent."""
    fake = worker_message({"kind": "done"})
    silent = (
        "import os, time\n"
        "for fd in range(3, 30):\n"
        f"    try: os.write(fd, {fake!r})\n"
        "    except OSError: pass\n"
        "time.sleep(1e6)\n"
    )
    nb = copy.deepcopy(sheet)
    nb.cells[1:1] = [nbformat.v4.new_code_cell(silent), nbformat.v4.new_code_cell("x = '" + "a" * 2_000_000 + "'")]
    started = time.monotonic()
    result = grading.grade(nb, only="example.n_parameters", limits=FAST).results[0]
    assert time.monotonic() - started < 90 and result.status in ("failed", "passed")


def worker_message(message: dict) -> bytes:
    import io

    sink = io.BytesIO()
    worker.write_message(sink, message)
    return sink.getvalue()


@pytest.mark.parametrize("head", [worker.MAX_HEAD + 1, 2**32 - 1])
def test_replies_are_bounded(head: int) -> None:
    import io

    with pytest.raises(ValueError, match="too large"):
        worker.read_message(io.BytesIO(struct.pack("<I", head) + b"{}"))


@linux
def test_nested_folders_are_removed(sheet, place: str) -> None:
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nreturn v"
    assert attend(sheet, deep).status == "failed"
    outside = grading._Nursery.current.outside
    assert not outside or not os.listdir(outside)
    assert attend(sheet, "return (q @ k.mT).softmax(-1) @ v").wrong_answer == "no_scale"


@linux
def test_what_was_there_before_the_first_sheet_stays(sheet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A course may lie below the folder that sheets work in, and is not swept out between two of them."""
    course, outside = tmp_path / "course" / "nbs", Path(tempfile.mkdtemp())
    course.mkdir(parents=True)
    shutil.move(course.parent, outside)
    monkeypatch.setattr(walls, "bubblewrap", lambda readable: [])
    monkeypatch.setattr(grading.tempfile, "mkdtemp", lambda prefix="": str(outside))
    if grading._Nursery.current:
        grading._Nursery.current.close()
    for _ in range(2):
        assert attend(sheet, "open('mine', 'w').close()\nreturn (q @ k.mT).softmax(-1) @ v").wrong_answer == "no_scale"
        assert os.listdir(outside / "course") == ["nbs"] and len(os.listdir(outside)) <= 2
    nursery = grading._Nursery.current
    nursery.control.close()
    nursery.process.wait(20)
    assert os.listdir(outside) == ["course"]
    nursery.close()


@linux
def test_a_child_that_ends_before_its_first_word_is_not_number_0(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel names 0 as the sender of an end. `killpg(0)` would be the end of the grader and of its shell."""
    takes_and_ends = "import socket, sys; socket.recv_fds(socket.socket(fileno=int(sys.argv[2])), 1, 1)"
    python, killed = grading._command()[0], []
    monkeypatch.setattr(grading, "_command", lambda *more: [python, "-c", takes_and_ends, *more])
    monkeypatch.setattr(grading.os, "killpg", lambda *which: killed.append(which))
    with pytest.raises(RuntimeError, match="could not be started"):
        grading.Child(grading.Limits(), 5.0)
    assert killed == [] and grading._Nursery.current is None


@linux
def test_an_environment_behind_a_link_grades(
    sheet, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment that is reached through a link, as home folders often are."""
    (tmp_path / "link").symlink_to(Path(sys.executable).parent, target_is_directory=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "link" / Path(sys.executable).name))
    assert attend(sheet, "return (q @ k.mT).softmax(-1) @ v").wrong_answer == "no_scale"


@linux
def test_a_killed_grader_leaves_nothing(sheet, tmp_path: Path, place: str) -> None:
    nb = copy.deepcopy(sheet)
    next(c for c in nb.cells if c.get("id") == "attend-answer").source = "while True: pass"
    nbformat.write(nb, tmp_path / "loop.ipynb")
    code = (
        "import llmcourse.practice.sheets as s, sys\n"
        f"s.__path__[:] = {list(sys.modules['llmcourse.practice.sheets'].__path__)!r}\n"
        "from llmcourse.practice import grading, walls\n"
        f"if {place == 'without'}: walls.bubblewrap = lambda *a: []\n"
        "import json\n"
        "grading.grade(json.load(open('loop.ipynb')), only='example.attend', limits=grading.Limits(cell_seconds=60))\n"
    )
    own = Path(tempfile.mkdtemp(prefix="walls-"))  # other graders may be at work in the common one
    own.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(own)}
    grader = psutil.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        below = grader.children(recursive=True)
        if any(p.cpu_times().user > 1 and p.name() != "bwrap" for p in below[1:]):
            break
        time.sleep(0.1)
    assert len(below) >= 2
    assert (place == "without") == bool(list(own.iterdir()))
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive, alive
    own.rmdir()  # it is empty


@linux
def test_the_grading_process_is_one_files_result(sheet) -> None:
    """It is killed in the middle: what was found stays, the rest says so, and the next file is graded."""
    nb = copy.deepcopy(sheet)
    next(c for c in nb.cells if c.get("id") == "attend-answer").source = "import time; time.sleep(60)"

    def shoot() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.1)
        time.sleep(1)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=shoot, daemon=True).start()
    graded = grading.grade_apart("a.ipynb", text=nbformat.writes(nb), limits=grading.Limits(cell_seconds=60))
    said = [graded.error, *(r.sentence for r in graded.results)]
    assert not graded.passed and any("the process that graded it ended" in s for s in said), said


@linux
def test_a_sheet_makes_so_many_files_and_no_more(sheet, place: str) -> None:
    """Endless small files would fill the disk's table of files, which no limit of the system counts."""
    body = "import os\nfor i in range(2000): {}\nreturn v"
    for making in ("open(f'f{i}', 'w').close()", "os.mkdir(f'd{i}')", "os.symlink('x', f's{i}')"):
        result = attend(sheet, body.format(making))
        assert "more than 1000 files" in repr(result), result
    assert "more than" not in repr(
        attend(sheet, "for i in range(2000): open(__import__('os').devnull).close()\nreturn v")
    )


@linux
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give it up")
@pytest.mark.parametrize("readable", [True, False])
def test_root_without_landlock_becomes_nobody(readable: bool, tmp_path: Path) -> None:
    """In a process of its own: Python's folders are told to be where nobody may look, or may not."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    code = (
        "import ctypes, os, platform, sys\nfrom llmcourse.practice import walls\nwalls._landlock = lambda *a: False\n"
        f"sys.prefix = sys.base_prefix = {'/' if readable else str(closed)!r}\nsys.path[:] = []\n"
        f"folder = {str(tmp_path / 'scratch')!r}\nos.mkdir(folder)\n"
        "print(walls.confine([], [], [folder]), os.getuid(), os.getgid(), os.getgroups())\n"
        "os.chdir('/')\n"
        "try: open('/etc/shadow').read(); print('read')\nexcept OSError: print('refused')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(), capture_output=True, text=True)
    nobody = "['nobody', 'seccomp'] 65534 65534 []\nrefused\n"
    assert run.stdout == nobody if readable else "['seccomp'] 0 0" in run.stdout and "nobody" not in run.stdout, run

"""`subprocess.run` for Python commands, in a fork of a process that has the large libraries imported already.

PyTorch and transformers take some seconds of processor time in every new process, and the tests start hundreds. The
standard library's fork server imports them once; its children see a command, environment and folder of their own.
What a test says about importing itself, or about a process that is read while it runs, needs a cold start.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

# only what chapters and commands import anyway; nothing of the course, so that its own imports are tested
LIBRARIES = ["torch", "torch._dynamo", "torch.distributed.nn", "accelerate", "datasets", "scipy.stats"]
LIBRARIES += ["transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"]
LIBRARIES += ["compressed_tensors", "transformers.generation.utils", "matplotlib.pyplot", "IPython", "nbdev.test"]
NO_NETWORK = Path(__file__).with_name("no_network")
# what the libraries read when they are imported
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
_ONE_AT_A_TIME = threading.Lock()  # what is patched while a process starts is seen by all threads


@functools.cache
def _server():
    """A fork server of our own. The grader uses the one that multiprocessing has, with other libraries in it."""
    from multiprocessing import forkserver  # not on Windows

    own = forkserver.ForkServer()
    own.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        own.ensure_running()
    return own


def _become(arguments: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    """In the child: `python ARGUMENTS`, until the process ends."""
    gc.freeze()  # the libraries are no garbage: without this each collection looks through them again
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf8", closefd=False) for n in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.process._parent_process = None  # as a process that a shell has started
    multiprocessing.current_process().name = "MainProcess"
    mode, *rest = arguments
    given = [cwd if mode in ("-c", "-m") else str(Path(mode).resolve().parent)]
    given += filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    here = Path(__file__).parent  # pytest has put it on the path, for itself
    sys.path[:] = given + [p for p in sys.path if p and Path(p).resolve() != here]
    if str(NO_NETWORK) in sys.path:
        runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))
    code, main = 0, types.ModuleType("__main__")
    try:
        if mode == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif mode == "-c":
            sys.argv, sys.modules["__main__"] = ["-c", *rest[1:]], main
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        else:
            sys.argv = arguments
            runpy.run_path(mode, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    raise SystemExit(code)


def start(arguments: Sequence[str | Path], *, env: Mapping[str, str], cwd: str | Path | None, out: str, err: str):
    """`python ARGUMENTS` as a process of multiprocessing that writes to two files."""
    given = ([str(a) for a in arguments], dict(env), str(cwd or Path.cwd()), out, err)
    process = multiprocessing.get_context("forkserver").Process(target=_become, args=given)
    with _ONE_AT_A_TIME:
        ours = _server().connect_to_new_process
        with mock.patch("multiprocessing.forkserver.connect_to_new_process", ours):
            process.start()
    return process


def run(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    cwd: str | Path | None = None,
    timeout: float = 300,
    copies: Sequence[Mapping[str, str]] = ({},),
) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` (a file, `-m MODULE` or `-c CODE`, and what follows) to its end.

    With several `copies`, one process for each, with these variables more; output and exit code are those of all.
    """
    if not hasattr(os, "fork"):
        assert len(copies) == 1, "several processes need a fork server"
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, text=True, capture_output=True)
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        started = [start(arguments, env=env | more, cwd=cwd, out=out.name, err=err.name) for more in copies]
        end = time.monotonic() + timeout
        for process in started:
            process.join(max(0, end - time.monotonic()))
        late = [p for p in started if p.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        said = [Path(f.name).read_text(encoding="utf8", errors="replace") for f in (out, err)]
    if late:
        raise subprocess.TimeoutExpired([str(a) for a in arguments], timeout, *said)
    code = next((p.exitcode for p in started if p.exitcode), 0)
    return subprocess.CompletedProcess([str(a) for a in arguments], code, *said)

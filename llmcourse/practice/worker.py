"""The learner's side of an exercise: runs the learner's code, calls the answer, sends back what came out.

Two users. In a notebook `llmcourse.practice.checking` calls `run_call` in the learner's own process. From the shell
`llmcourse.practice.grading` starts this module as a child process without the right to read the checker, to start
programs or to write outside one folder. The child knows no solution and no expected value. What it sends back is JSON
and raw numbers, never a pickle, so that nothing which the learner's code makes is ever run by the grader.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import json
import linecache
import math
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, BinaryIO

from llmcourse.practice import walls

MAX_MESSAGE = 16 * 2**20  # bytes of the tensors in one message: a learner's result that is larger is refused
MAX_HEAD = 4 * 2**20  # bytes of its JSON
MAX_ITEMS = 100_000  # entries of a nested result
MAX_DEPTH = 20
MAX_PRINTED = 2000  # characters of the learner's prints that are kept
SEED = 0  # torch's seed before every call
DRIVER = "<driver>"  # the file name of the checker's code around an answer


class Rng:
    """Stands for `torch.Generator().manual_seed(seed)`: each call gets a fresh one."""

    def __init__(self, seed: int):
        self.seed = seed

    def __repr__(self) -> str:
        return f"torch.Generator().manual_seed({self.seed})"


class Other:
    """A result that is not data, known by the name of its type only."""

    def __init__(self, type_name: str):
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"an object of type {self.type_name}"


# ---------------------------------------------------------------------------------- data as bytes
# A value becomes a JSON tree in which tensors and arrays are numbered, and a list of their bytes.

_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
)


def _encode(value: Any, blobs: list[bytes], depth: int = 0, room: list[int] | None = None) -> Any:
    room = room if room is not None else [MAX_ITEMS]
    room[0] -= 1
    if depth > MAX_DEPTH or room[0] < 0:
        return {"other": "too large or too deep a structure"}
    if value is None or isinstance(value, (bool, str)):
        return value if not isinstance(value, str) else str(value)
    if isinstance(value, int) and type(value).__name__ != "bool":
        return int(value) if abs(int(value)) < 10**300 else {"other": "an enormous whole number"}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    again = lambda v: _encode(v, blobs, depth + 1, room)
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [again(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[again(k), again(v)] for k, v in value.items()]}
    if isinstance(value, Rng):
        return {"rng": value.seed}
    kind = type(value)
    module, name = kind.__module__ or "", kind.__qualname__
    if "torch" in sys.modules:
        import torch

        if isinstance(value, torch.Tensor):
            return _encode_tensor(value, blobs)
        if isinstance(value, torch.dtype):
            return {"torch.dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Generator):
            return {"rng": value.initial_seed()}
    if "numpy" in sys.modules:
        import numpy as np

        if isinstance(value, np.generic):
            return again(value.item())
        if isinstance(value, np.ndarray) and str(value.dtype) in _DTYPES:
            blobs.append(np.ascontiguousarray(value).tobytes())
            return {"array": len(blobs) - 1, "dtype": str(value.dtype), "shape": list(value.shape)}
    return {
        "other": name if module == "builtins" else f"{module.removeprefix('__main__').strip('.')}.{name}".strip(".")
    }


def _encode_tensor(t: Any, blobs: list[bytes]) -> Any:
    import torch

    name = str(t.dtype).removeprefix("torch.")
    if name not in _DTYPES or t.layout != torch.strided or t.device.type == "meta":
        return {"other": f"a tensor of {name} ({t.layout}, {t.device})"}
    if t.numel() * t.element_size() > MAX_MESSAGE // 2:
        return {"other": f"a tensor of shape {tuple(t.shape)}, which is too large"}
    t = t.detach().cpu().resolve_conj().resolve_neg()
    # A transposed view stays one: code that only works on contiguous tensors must be found out.
    order = sorted(range(t.dim()), key=lambda d: -t.stride(d))
    flat = t.permute(order).contiguous().reshape(-1)
    blobs.append(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    tree = {"tensor": len(blobs) - 1, "dtype": name, "shape": list(t.shape)}
    return tree if order == list(range(t.dim())) else tree | {"order": order}


def _decode(tree: Any, blobs: list[bytes], make_rng: bool) -> Any:
    if not isinstance(tree, dict):
        if isinstance(tree, (str, int, float)) or tree is None:
            return tree
        raise ValueError("not a value")
    again = lambda t: _decode(t, blobs, make_rng)
    if "list" in tree:
        return [again(t) for t in tree["list"]]
    if "tuple" in tree:
        return tuple(again(t) for t in tree["tuple"])
    if "dict" in tree:
        return {again(k): again(v) for k, v in tree["dict"]}
    if "complex" in tree:
        return complex(*tree["complex"])
    if "other" in tree:
        return Other(str(tree["other"])[:200])
    if "rng" in tree:
        if not make_rng:
            return Rng(int(tree["rng"]))
        import torch

        return torch.Generator().manual_seed(int(tree["rng"]))
    if "torch.dtype" in tree:
        import torch

        if tree["torch.dtype"] not in _DTYPES:
            return Other(str(tree["torch.dtype"])[:200])
        return getattr(torch, tree["torch.dtype"])
    dtype, shape = tree["dtype"], [int(n) for n in tree["shape"]]
    data = blobs[tree["tensor" if "tensor" in tree else "array"]]
    if dtype not in _DTYPES or min(shape, default=0) < 0:
        raise ValueError("not a tensor")
    if "tensor" in tree:
        import torch

        order = [int(d) for d in tree.get("order", range(len(shape)))]
        stored = [shape[d] for d in order]
        kind = getattr(torch, dtype)
        if math.prod(shape) * kind.itemsize != len(data) or sorted(order) != list(range(len(shape))):
            raise ValueError("not a tensor")
        flat = torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
        back = sorted(range(len(order)), key=lambda i: order[i])
        return flat.reshape(stored).permute(back)
    import numpy as np

    return np.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def encode(value: Any) -> tuple[Any, list[bytes]]:
    """`value` as a JSON tree and the bytes of its tensors and arrays, in the order of their numbers."""
    blobs: list[bytes] = []
    return _encode(value, blobs), blobs


def decode(tree: Any, blobs: list[bytes], *, make_rng: bool = False) -> Any:
    """The value back. Only data comes out, never code; `ValueError` when it is not what `encode` makes."""
    try:
        return _decode(tree, blobs, make_rng)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"not an encoded value: {e}") from None


def write_message(stream: BinaryIO, message: dict, blobs: list[bytes] = ()) -> None:
    head = json.dumps({"message": message, "sizes": [len(b) for b in blobs]}).encode()
    stream.write(struct.pack("<I", len(head)) + head + b"".join(blobs))
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict, list[bytes]]:
    """The next message. `EOFError` at the end, `ValueError` when it is no message."""

    def exactly(n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            piece = stream.read(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    size = struct.unpack("<I", exactly(4))[0]
    if size > MAX_HEAD:
        raise ValueError("a message is too large")
    head = json.loads(exactly(size))
    if not isinstance(head, dict) or not isinstance(head.get("message"), dict):
        raise ValueError("not a message")
    sizes = [int(n) for n in head.get("sizes", [])]
    if min(sizes, default=0) < 0 or sum(sizes) > MAX_MESSAGE:
        raise ValueError("a message is too large")
    return head["message"], [exactly(n) for n in sizes]


# ------------------------------------------------------------------------------------- one call


class TimeLimit(BaseException):
    """Raised inside the learner's code when its time is up. Not an `Exception`: `except Exception` must not stop it."""


TICK = 0.05  # seconds between two looks at the clock


def _importing(frame: Any) -> bool:
    """Whether a module is being imported, at any depth: PyTorch loads parts of itself when they are first used."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def busy_seconds(thread: str = "thread-self") -> float | None:
    """Linux: for how long a thread has run or stood in the queue for a processor. What is left of the wall it slept."""
    try:
        with open(f"/proc/{thread}/schedstat", encoding="ascii") as f:
            ran, queued, _ = map(int, f.read().split())
        return (ran + queued) / 1e9
    except (OSError, ValueError):
        return None


class _Clock:
    """The processor time of one thread without its imports; a limit of sleep stands behind it (sleep, input)."""

    def __init__(self, seconds: float, now: Any, thread: str = "thread-self"):
        self.seconds, self.now, self.thread = seconds, now, thread
        self.used, self.last = 0.0, now()
        self.started, self.busy = time.monotonic(), busy_seconds(thread)
        # without the kernel's word a busy machine looks like sleep
        self.sleep = seconds + 5 if self.busy is not None else 6 * seconds + 20

    def is_up(self, frame: Any) -> bool:
        now = self.now()
        if not _importing(frame):
            self.used += now - self.last
        self.last = now
        awake = (busy_seconds(self.thread) or 0.0) - (self.busy or 0.0)
        return self.used >= self.seconds or time.monotonic() - self.started - awake > self.sleep


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the block when it has used more processor time, imports not counted.

    In the main thread by a signal, elsewhere from a timer thread. The alarm repeats, so that code which catches
    everything is stopped as well.
    """
    tick = min(TICK, seconds / 4)
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        clock = _Clock(seconds, time.thread_time)

        def ring(_: int, frame: Any) -> None:
            if clock.is_up(frame):
                raise TimeLimit

        started = time.monotonic()
        old = signal.signal(signal.SIGALRM, ring)
        delay, interval = signal.setitimer(signal.ITIMER_REAL, tick, tick)
        try:
            yield
        finally:
            while True:  # the repeating alarm may ring once more on the way out
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, old)
                    break
                except TimeLimit:
                    continue
            if delay:  # somebody else's alarm, as a test runner's: it rings when it would have
                signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-3), interval)
        return

    import ctypes

    done, me = threading.Event(), threading.get_ident()
    now = time.monotonic
    if hasattr(time, "pthread_getcpuclockid"):
        number = time.pthread_getcpuclockid(me)
        now = lambda: time.clock_gettime(number)
    clock = _Clock(seconds, now, f"self/task/{threading.get_native_id()}")

    def watch() -> None:
        wait = tick
        while not done.wait(wait):
            if clock.is_up(sys._current_frames().get(me)):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), ctypes.py_object(TimeLimit))
                wait = 0.2

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        while True:
            try:
                done.set()
                watcher.join()
                # one that was sent and not yet delivered
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), None)
                break
            except TimeLimit:
                continue


def timeout_outcome(seconds: float) -> dict:
    return {
        "kind": "timeout",
        "message": f"Your code was stopped after {seconds:g} seconds: is there a loop that never ends?",
    }


def _own_line(e: BaseException) -> dict:
    """The learner's own line in which `e` was raised: the deepest frame that is neither ours nor a library's."""
    here = os.path.dirname(os.path.abspath(__file__))
    frames = []
    tb = e.__traceback__
    while tb:
        name = tb.tb_frame.f_code.co_filename
        library = name.startswith((here, os.path.dirname(os.__file__), "<frozen")) or "site-packages" in name
        if not library:
            frames.append((name, tb.tb_lineno))
        tb = tb.tb_next
    if isinstance(e, SyntaxError) and e.lineno:
        return {"line": (e.text or "").strip()[:200], "lineno": e.lineno}
    if not frames:
        return {}
    name, number = frames[-1]
    if name == DRIVER:  # the checker used the answer, and that went wrong: no line of the learner's
        return {"driver": linecache.getline(name, number).strip()[:200]}
    return {"line": linecache.getline(name, number).strip()[:200], "lineno": number}


def error_outcome(e: BaseException) -> dict:
    """What is reported about an exception: its type and all the types it is, its text, the learner's own line."""
    try:
        message = str(e)[:500]
    except Exception:
        message = "(its text cannot be shown)"
    return {
        "kind": "error",
        "type": type(e).__name__,
        "types": [t.__name__ for t in type(e).__mro__],
        "message": message,
        **_own_line(e),
    }


class _Printed(io.StringIO):
    """Keeps the first characters that are printed, and forgets the rest."""

    def write(self, text: str) -> int:
        if self.tell() < MAX_PRINTED:
            super().write(text[: MAX_PRINTED - self.tell()])
        return len(text)


def _tensors(value: Any) -> list:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def load_driver(source: str) -> Any:
    """The function that a driver's text defines; it finds `torch, nn, F, math, np` as globals."""
    import numpy as np
    import torch

    space = {"__name__": "driver", "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math, "np": np}
    code, name = _compiled(source)
    linecache.cache[DRIVER] = (len(source), None, source.splitlines(True), DRIVER)
    exec(code, space)
    return space[name]


@functools.cache
def _compiled(source: str) -> tuple[Any, str]:
    """A driver's code, and the name of its first function."""
    tree = ast.parse(source)
    return compile(tree, DRIVER, "exec"), next(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


def run_call(answer: Any, request: dict, blobs: list[bytes]) -> tuple[dict, list[bytes]]:
    """Call `answer` once as `request` says; whatever happens is described, nothing is raised.

    Args:
        answer: the learner's function, class or value.
        request: `args`, `kwargs` (encoded), `gradients` (positions and names), `driver` (its text, or None),
            `value` (true: the answer is a plain value, nothing is called).
        blobs: the bytes that belong to `request`.
    Returns:
        A tree with `kind` value or error, and the bytes of its tensors. A value has `value`, `gradients` (one for each
        that was asked for), `after` (the arguments after the call) and `printed`.
    """
    out: list[bytes] = []
    printed = _Printed()
    try:
        import torch

        if request.get("value"):
            return {"kind": "value", "value": _encode(answer, out), "printed": ""}, out
        args = decode(request["args"], blobs, make_rng=True)
        kwargs = decode(request["kwargs"], blobs, make_rng=True)
        asked = request.get("gradients") or []
        leaves = [args[k] if isinstance(k, int) else kwargs[k] for k in asked]
        for leaf in leaves:
            leaf.requires_grad_(True)
        call = load_driver(request["driver"]) if request.get("driver") else None
        if not callable(answer):
            raise TypeError(
                f"the answer is {answer!r:.60} (type {type(answer).__name__}); expected a function or a class"
            )
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed also asks for a GPU, and takes milliseconds
        with contextlib.redirect_stdout(printed), torch.enable_grad():
            result = call(answer, *args, **kwargs) if call else answer(*args, **kwargs)
            reply = {"kind": "value", "value": _encode(result, out)}
            if asked:
                reply["gradients"] = _gradients(result, leaves, out)
        reply["after"] = _encode([args, kwargs], out)
        reply["printed"] = printed.getvalue()
        return reply, out
    except (TimeLimit, KeyboardInterrupt):
        raise
    except BaseException as e:  # SystemExit too: a learner's exit() is an error like any other
        return error_outcome(e) | {"printed": printed.getvalue()}, []


def _gradients(result: Any, leaves: list, blobs: list[bytes]) -> Any:
    """Gradients of a weighted sum of all that was returned; unequal weights, so that no symmetry hides a mistake."""
    import torch

    total = None
    for t in _tensors(result):
        if t.is_floating_point() and t.requires_grad:
            weight = (torch.arange(t.numel(), dtype=torch.float64) % 7 - 2.5).to(t.dtype).reshape(t.shape)
            total = (t * weight).sum() if total is None else total + (t * weight).sum()
    if total is None:
        return {"list": [None for _ in leaves]}
    return {"list": [_encode(g, blobs) for g in torch.autograd.grad(total, leaves, allow_unused=True)]}


# ------------------------------------------------------------------------------ the child process


def _no_checker() -> None:
    """A sheet imports `check` and friends; in the child they do nothing, because the grader asks from outside."""
    quiet = types.ModuleType("llmcourse.practice.checking")
    for name in ("check", "hint", "reveal", "progress"):
        setattr(quiet, name, lambda *a, **k: None)
    sys.modules["llmcourse.practice.checking"] = quiet


def _lines(name: str, source: str) -> None:
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)


_MAGIC_BODY = ("time", "capture", "prun", "debug")  # cell magics that run the cell as it is, in its own namespace


def as_python(source: str) -> str:
    """A notebook cell as the Python that it runs, line for line: `%`, `!` and `?` become calls of `get_ipython()`.

    What is Python already stays as it is. IPython's own transformer knows the rest; where there is no IPython, lines
    that begin with % or ! are left out.
    """
    head, _, body = source.lstrip().partition("\n")
    if head.startswith("%%"):
        name, _, rest = head[2:].partition(" ")
        words = [w for w in rest.split() if not w.startswith("-")]
        first = (
            f"{words[0]} = get_ipython().captured" if name == "capture" and words and words[0].isidentifier() else ""
        )
        skipped = source[: len(source) - len(source.lstrip())].count("\n")
        return "\n" * skipped + f"{first}\n{as_python(body)}" if name in _MAGIC_BODY else ""
    if _parses(source):
        return source
    with contextlib.suppress(Exception):  # no IPython, or no Python in the cell: its compiler says what is wrong
        from IPython.core.inputtransformer2 import TransformerManager

        return TransformerManager().transform_cell(source)
    return "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())


def _parses(source: str) -> bool:
    try:
        compile(source, "<cell>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


class _Shell:
    """What `get_ipython()` gives in a graded cell: timing magics run their line, the others do nothing."""

    captured = SimpleNamespace(stdout="", stderr="", outputs=[], show=lambda: None)

    def run_line_magic(self, name: str, line: str, _stack_depth: int = 1) -> Any:
        if name not in ("time", "timeit"):
            return None
        options = [w for w in line.split() if w.startswith("-")]
        code = line if name == "time" else re.sub(r"^\s*(-[a-z]\s*\d*\s+)*", "", line)
        frame = sys._getframe(1)
        started = time.perf_counter()
        try:
            value = eval(compile(as_python(code), "<magic>", "eval"), frame.f_globals, frame.f_locals)
        except SyntaxError:
            value = exec(compile(as_python(code), "<magic>", "exec"), frame.f_globals, frame.f_locals)
        took = time.perf_counter() - started
        if name == "time":
            return value
        if "-o" not in options:
            return None
        same = dict.fromkeys(("best", "average", "worst"), took) | {key: [took] for key in ("all_runs", "timings")}
        return SimpleNamespace(**same, stdev=0.0, loops=1, repeat=1)

    magic = run_cell_magic = system = lambda self, *a, **k: None

    def getoutput(self, *a: Any, **k: Any) -> list[str]:
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *a, **k: None


def _run_cell(python: str, name: str, space: dict) -> None:
    """Run a cell in a namespace; one with `await` at its top level in an event loop."""
    code = compile(python, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        import asyncio

        asyncio.run(eval(code, space))
    else:
        exec(code, space)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer the grader until it hangs up: put up the walls once, run cells, serve calls."""
    settings, _ = read_message(source)
    os.makedirs(settings["folder"], exist_ok=True)
    os.chdir(settings["folder"])
    os.environ["HOME"] = os.environ["TMPDIR"] = settings["folder"]
    import torch

    torch.set_num_threads(1)
    _no_checker()
    walls.limit(settings)
    in_force = []
    if settings.get("confine", True):
        writable = [settings["folder"], "/dev/null"]
        in_force = walls.confine(settings["readable"], settings["listable"], writable)
    walls.refuse(settings["hidden"], strict="seccomp" not in in_force or "landlock" not in in_force)
    write_message(sink, {"ready": True, "in_force": in_force})

    sheet = sys.modules["__main__"] = types.ModuleType("__main__")
    space, shell = sheet.__dict__, _Shell()
    space["get_ipython"] = lambda: shell
    space["display"] = lambda *a, **k: None  # a notebook has it without an import
    while True:
        try:
            request, blobs = read_message(source)
        except EOFError:
            return
        out: list[bytes] = []
        try:
            with time_limit(request["seconds"]):
                if "cell" in request:
                    _lines(request["name"], request.get("source", request["cell"]))
                    with contextlib.redirect_stdout(_Printed()), contextlib.redirect_stderr(_Printed()):
                        _run_cell(request["cell"], request["name"], space)
                    reply = {"kind": "done"}
                elif request["answer"] not in space:
                    reply = {"kind": "missing"}
                else:
                    reply, out = run_call(space[request["answer"]], request, blobs)
        except TimeLimit:
            reply = {"kind": "timeout"}
        except BaseException as e:
            reply = error_outcome(e)
        write_message(sink, reply, out)


def _quiet_streams() -> None:
    """Standard input, output and error lead nowhere: the learner's prints cannot disturb the conversation."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)


def _nursery(control_fd: int) -> None:
    """Linux: import torch once, then fork one worker for each request. Trusted code only runs here.

    A worker's folder lies below this process's own, and goes with it when the grader hangs up or is killed.
    """
    import torch  # noqa: F401

    own, pid = os.getcwd(), 0
    kept = set(os.listdir(own))  # the course itself may lie below it; behind bubblewrap that is /tmp
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            break
        if not fds:
            continue
        for left in set(os.listdir(own)) - kept:
            walls.remove(os.path.join(own, left))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                walls.die_with_parent()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                os.setsid()
                _quiet_streams()
                talk = socket.socket(fileno=fds[0])
                talk.send(b"!")  # the kernel adds who this is, as the grader sees it
                serve(talk.makefile("rb"), talk.makefile("wb"))
                status = 0
            except BaseException:
                pass
            finally:
                os._exit(status)
        os.close(fds[0])
    if pid:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    for left in set(os.listdir(own)) - kept:
        walls.remove(os.path.join(own, left))
    os.chdir("/")
    if not kept:
        walls.remove(own)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "nursery":
        _nursery(int(sys.argv[2]))
        return
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _quiet_streams()
    serve(source, sink)


if __name__ == "__main__":
    main()

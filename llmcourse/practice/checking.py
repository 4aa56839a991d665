"""The exercise machine: `check`, `hint`, `reveal`, `progress`, and what the sheets' checkers are made of.

A checker (`llmcourse/practice/sheets/<sheet>.py`) is exported from the master of its sheet in `solutions/`. It holds,
per exercise, the cases, the solution and the named wrong answers. `check` runs the cases on the learner's answer and
on the solution. When they differ it asks which wrong answer would have given the same results, and says that one's
sentence.

Importing this module loads neither torch nor a notebook: a check does, when it is run.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmcourse.practice.worker import Other, Rng, TimeLimit, decode, encode, run_call, time_limit, timeout_outcome
from llmcourse.settings import BadInput, require
from llmcourse.store import write_atomic

__all__ = [
    "Case",
    "Exercise",
    "Progress",
    "Result",
    "case",
    "check",
    "exercise",
    "find",
    "hint",
    "load_sheet",
    "progress",
    "reveal",
    "rng",
    "sheets",
]

RTOL, ATOL = 1e-5, 1e-6  # the default closeness of floating-point results
LOOSE_FOR = {"float16": 1e-3, "bfloat16": 1e-2}  # results in half precision cannot be closer than their format
PROGRESS_FILE = ".llmcourse-progress.json"
IN_SHELL = False  # set by the command line: help is then named by its commands, and nothing prints itself


# --------------------------------------------------------------------- what a checker is made of


def rng(seed: int = 0) -> Rng:
    """An argument that arrives as `torch.Generator().manual_seed(seed)`, a fresh one for each call."""
    return Rng(seed)


@dataclass(frozen=True)
class Case:
    """One call of the learner's answer. Made by `case`; the methods return a changed copy."""

    name: str
    args: tuple
    kwargs: dict
    grads: tuple = ()
    error: tuple[str, ...] = ()
    rtol: float = RTOL
    atol: float = ATOL
    driver: Callable | None = None
    same_dtype: bool = True
    may: tuple = ()
    secret: bool = False
    names: tuple[str, ...] = ()
    """names of the positional arguments, for the learner"""

    def gradients(self, *arguments: int | str) -> Case:
        """Also compare the gradients of a weighted sum of the result with respect to these arguments."""
        for a in arguments:
            known = range(len(self.args)) if isinstance(a, int) else self.kwargs
            require(a in known, f"gradient of case {self.name!r}", a, "a position or keyword of the case's arguments")
        return replace(self, grads=arguments)

    def raises(self, *errors: type[BaseException]) -> Case:
        """The right answer to this case is one of these exceptions."""
        return replace(self, error=tuple(e.__name__ for e in errors))

    def tolerance(self, *, rtol: float = RTOL, atol: float = ATOL) -> Case:
        return replace(self, rtol=rtol, atol=atol)

    def through(self, driver: Callable) -> Case:
        """Run `driver(answer, *args, **kwargs)`: for answers that are classes, or need something that is not data."""
        return replace(self, driver=driver)

    def any_dtype(self) -> Case:
        """The dtype of the result is not compared."""
        return replace(self, same_dtype=False)

    def may_change(self, *arguments: int | str) -> Case:
        """These arguments may be changed in place."""
        return replace(self, may=arguments)

    def keep_secret(self) -> Case:
        """What was expected is not shown: the exercise asks for this very number."""
        return replace(self, secret=True)

    @property
    def size(self) -> int:
        """How many numbers a learner has to look at."""
        return sum(_count(v) for v in (*self.args, *self.kwargs.values()))

    def called(self, argument: int | str) -> str:
        """The name of an argument that is known by its position."""
        if isinstance(argument, str):
            return argument
        return self.names[argument] if argument < len(self.names) else f"argument {argument + 1}"

    def request(self) -> tuple[dict, list[bytes]]:
        """The call as a message: encoded arguments, the text of the driver, what is asked for."""
        both, blobs = encode([list(self.args), self.kwargs])
        args, kwargs = both["list"]
        source = inspect.getsource(self.driver) if self.driver else None
        return {"args": args, "kwargs": kwargs, "gradients": list(self.grads), "driver": source, "value": False}, blobs


def case(name: str, /, *args: Any, **kwargs: Any) -> Case:
    """One call: a name that a learner understands, then the arguments of the learner's function."""
    return Case(name, args, kwargs)


_THE_VALUE = Case("the value", (), {}, same_dtype=False, secret=True)


@dataclass(eq=False)
class Exercise:
    """One exercise of a sheet. Made by `exercise` in a checker; `cases` and `wrong` fill it."""

    id: str
    title: str
    minutes: int
    difficulty: int
    points: int
    hints: tuple[str, ...]
    time_limit: float
    module: str
    chapter: str = ""
    make_cases: Callable[[], Iterable[Case]] | None = None
    wrong_answers: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """name -> (sentence, answer)"""
    equivalent: dict[str, str] = field(default_factory=dict)
    """changed line of the solution -> why this change makes no difference (`tools/mutate.py`)"""
    _known: dict = field(default_factory=dict, repr=False)

    @property
    def sheet(self) -> str:
        return self.id.split(".")[0]

    @property
    def name(self) -> str:
        """The name that the learner defines."""
        return self.id.split(".")[1]

    def cases(self, make: Callable[[], Iterable[Case]]) -> Callable:
        """Decorator: the generator function of the cases."""
        self.make_cases = make
        return make

    def wrong(self, sentence: str, *, name: str = "", value: Any = None) -> Callable | None:
        """Decorator: a named wrong answer and its sentence. A plain value is given by `name` and `value`."""
        if name:
            self.wrong_answers[name] = (sentence, value)
            return None

        def keep(answer: Callable) -> Callable:
            require(
                answer.__name__ not in self.wrong_answers,
                f"wrong answer of {self.id}",
                answer.__name__,
                "a name of its own",
            )
            self.wrong_answers[answer.__name__] = (sentence, answer)
            return answer

        return keep

    def failed(self, sentence: str, **more: Any) -> Result:
        """The verdict on an answer of which no case was run."""
        base = dict(id=self.id, title=self.title, points=0, max_points=self.points, cases=len(self.all_cases()))
        return Result(**base | {"status": "failed", "sentence": sentence} | more)

    @property
    def solution(self) -> Any:
        return getattr(sys.modules[self.module], self.name)

    def section(self, kind: str) -> str:
        """The text of the checker between `# %% KIND NAME` and the next `# %%`: the solution as it was written."""
        text = Path(sys.modules[self.module].__file__).read_text(encoding="utf8")
        found = re.search(rf"^# %% {kind} {self.name}\n(.*?)(?=^# %%|\Z)", text, re.S | re.M)
        return found[1].strip("\n") if found else ""

    # What the solution and the wrong answers give is worked out once and kept: the cases are deterministic.

    def all_cases(self) -> list[Case]:
        if "cases" not in self._known:
            made = list(self.make_cases()) if self.make_cases else [_THE_VALUE]
            self._known["cases"] = [replace(c, names=_argument_names(self, c)) for c in made]
        return self._known["cases"]

    def expected(self) -> list[dict]:
        if "solution" not in self._known:
            self._known["solution"] = [_outcome(self.solution, c) for c in self.all_cases()]
        return self._known["solution"]

    def broken(self) -> str:
        """Why the solution itself cannot be run in this process, where something is not as it should be; else empty."""
        for c, outcome in zip(self.all_cases(), self.expected()):
            if (outcome["kind"] != "value") != bool(c.error):
                said = outcome.get("message") or outcome.get("type") or "no error was raised"
                self._known.pop("solution")
                return f"in the case {c.name!r} the solution gives: {said}"
        return ""

    def given_by(self, wrong: str) -> list[dict]:
        if wrong not in self._known:
            self._known[wrong] = [_outcome(self.wrong_answers[wrong][1], c) for c in self.all_cases()]
        return self._known[wrong]


_REGISTRY: dict[str, dict[str, Exercise]] = {}


def exercise(
    id: str,
    *,
    title: str,
    minutes: int,
    difficulty: int,
    points: int,
    hints: tuple[str, ...],
    time_limit: float = 5.0,
    equivalent: dict[str, str] | None = None,
) -> Exercise:
    """Declare an exercise in a checker. `time_limit` is in seconds, for each call of the answer.

    `equivalent`: mutants of the solution that do the same, by their changed line, with the reason (`tools/mutate.py`).
    """
    require(bool(re.fullmatch(r"[a-z_0-9]+\.[A-Za-z_]\w*", id)), "id", id, "SHEET.NAME")
    require(isinstance(difficulty, int) and 1 <= difficulty <= 5, f"difficulty of {id}", difficulty, "1 to 5")
    require(isinstance(minutes, int) and minutes >= 1, f"minutes of {id}", minutes, "a whole number of at least 1")
    require(isinstance(points, int) and points >= 1, f"points of {id}", points, "a whole number of at least 1")
    require(
        isinstance(hints, tuple) and len(hints) == 3,
        f"hints of {id}",
        hints,
        "three sentences, from gentle to almost there",
    )
    space = sys._getframe(1).f_globals
    made = Exercise(
        id, title, minutes, difficulty, points, hints, time_limit, space["__name__"], space.get("CHAPTER", ""),
        equivalent=equivalent or {},
    )  # fmt: skip
    _REGISTRY.setdefault(made.module, {})[id] = made
    return made


def chapters() -> dict[str, str]:
    """Chapter folder -> sheet (03_attention -> attention), in the order of the chapters."""
    import pkgutil

    package = importlib.import_module("llmcourse.practice.sheets")
    found = {}
    for m in pkgutil.iter_modules(package.__path__):
        if not m.name.startswith("_") and m.name not in found.values():
            spec = m.module_finder.find_spec(f"llmcourse.practice.sheets.{m.name}")
            line = re.search(r'^CHAPTER = "(.*)"$', Path(spec.origin).read_text(encoding="utf8"), re.M)
            found[line[1] if line else m.name] = m.name
    return dict(sorted(found.items()))


def sheets() -> list[str]:
    """The names of all sheets, in the order of their chapters."""
    return list(chapters().values())


def load_sheet(sheet: str) -> dict[str, Exercise]:
    """All exercises of a sheet, by id, in the order of the sheet."""
    known = sheets()
    require(sheet in known, "sheet", sheet, ", ".join(known) or "no sheet is installed")
    return _REGISTRY[importlib.import_module(f"llmcourse.practice.sheets.{sheet}").__name__]


def setup_source(sheet: str) -> str:
    """The imports and data that a sheet gives to learner and checker alike, as text."""
    load_sheet(sheet)
    text = Path(sys.modules[f"llmcourse.practice.sheets.{sheet}"].__file__).read_text(encoding="utf8")
    return "\n\n".join(m[1].strip("\n") for m in re.finditer(r"^# %% setup\n(.*?)(?=^# %%|\Z)", text, re.S | re.M))


def find(id: str) -> Exercise:
    """The exercise with this id. `BadInput` names the ids that there are."""
    sheet = str(id).split(".")[0]
    known = sheets()
    require(sheet in known, "exercise", id, ", ".join(f"{s}.…" for s in known) or "no sheet is installed")
    found = load_sheet(sheet)
    require(id in found, "exercise", id, ", ".join(found))
    return found[id]


# ----------------------------------------------------------------------------- comparing results


def _count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_count(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_count(v) for v in value)
    return int(math.prod(value.shape)) if hasattr(value, "shape") else 1


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _flat(value: Any) -> Any:
    """A tensor or array as a flat NumPy array (float64 for floating point, so that any two can be compared)."""
    import numpy as np

    if type(value).__module__.startswith("torch"):
        value = value.double() if value.is_floating_point() else value
        value = value.detach().numpy()
    return np.asarray(value, dtype=np.float64 if value.dtype.kind == "f" else None).reshape(-1)


def _type_name(value: Any) -> str:
    if isinstance(value, Other):
        return value.type_name
    if _is_array(value):
        return "a tensor" if type(value).__module__.startswith("torch") else "a NumPy array"
    return {
        "NoneType": "None",
        "int": "a whole number",
        "float": "a floating-point number",
        "str": "text",
        "bool": "True or False",
    }.get(type(value).__name__, f"a {type(value).__name__}")


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _unequal(want: Any, got: Any, c: Case, times: int = 1) -> Any:
    """Where two arrays of one shape differ by more than the case allows, or by more than `times` as much; flat."""
    import numpy as np

    a, b = _flat(want), _flat(got)
    if a.dtype.kind not in "fc" and b.dtype.kind not in "fc":
        return a != b
    rtol = max(c.rtol, LOOSE_FOR.get(_dtype(want), 0), LOOSE_FOR.get(_dtype(got), 0))
    atol = max(c.atol, rtol if rtol > c.rtol else 0)
    return ~np.isclose(b, a, rtol=times * rtol, atol=min(times, 3) * atol, equal_nan=True)


def _rounding(difference: float, value: float, c: Case, at: str) -> str:
    return (
        f"This is a rounding difference{at}: at most {difference:.1e}, where the values go up to {value:.3g} and "
        f"{c.rtol:g} of a value is allowed. The formula is right; another order of its steps rounds less."
    )


def _difference(want: Any, got: Any, c: Case, where: str = "") -> str:
    """One sentence saying how `got` differs from `want`; empty when they agree."""
    at = f" ({where})" if where else ""
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    if _is_array(want):
        import numpy as np

        if not _is_array(got) or type(got).__module__.split(".")[0] != type(want).__module__.split(".")[0]:
            return f"The result{at} is {_type_name(got)}; expected {_type_name(want)}."
        if tuple(want.shape) != tuple(got.shape):
            return f"The shape{at} is {tuple(got.shape)}; expected {tuple(want.shape)}."
        if c.same_dtype and _dtype(want) != _dtype(got):
            return f"The dtype{at} is {_dtype(got)}; expected {_dtype(want)}."
        a, b = _flat(want), _flat(got)
        bad = _unequal(want, got, c)
        if not bad.any():
            return ""
        if a.dtype.kind == b.dtype.kind == "f" and not _unequal(want, got, c, times=100).any():
            return _rounding(float(np.abs(a - b).max()), float(np.abs(a).max()), c, at)
        first = np.unravel_index(int(bad.argmax()), tuple(want.shape)) if want.shape else ()
        place = (
            f" First at [{', '.join(map(str, first))}]: {_short(b[bad][0])}; expected {_short(a[bad][0])}."
            if want.shape
            else ""
        )
        if np.isnan(b[bad]).any() and not np.isnan(a[bad]).any():
            return f"The result{at} holds nan in {int(np.isnan(b).sum())} of {b.size} places.{place}"
        count = (
            f"{int(bad.sum())} of {bad.size} values{at} differ."
            if want.shape
            else f"The value{at} is {_short(b[0])}; expected {_short(a[0])}."
        )
        return count + place
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or (c.same_dtype and isinstance(want, list) != isinstance(got, list)):
            return f"The result{at} is {_type_name(got)}; expected {_type_name(want)}."
        if len(want) != len(got):
            return f"The result{at} has {len(got)} parts; expected {len(want)}."
        return next((d for i, (w, g) in enumerate(zip(want, got)) if (d := _difference(w, g, c, f"{where}[{i}]"))), "")
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(want) != set(got):
            names = f"the names {', '.join(map(str, got))}" if isinstance(got, dict) else _type_name(got)
            return f"The result{at} has {names}; expected {', '.join(map(str, want))}."
        return next((d for k in want if (d := _difference(want[k], got[k], c, f"{where}[{k!r}]"))), "")
    if number(want) and number(got):
        if isinstance(want, int) and isinstance(got, float) and c.same_dtype:
            return f"The result{at} is {_short(got)}, a floating-point number; expected a whole number."
        if isinstance(want, int) and isinstance(got, int):
            same = want == got
        else:
            near = lambda n: math.isclose(want, got, rel_tol=n * c.rtol, abs_tol=min(n, 3) * c.atol)
            same = (math.isnan(want) and math.isnan(got)) or near(1)
            if not same and near(100):
                return _rounding(abs(want - got), abs(want), c, at)
        return "" if same else f"The value{at} is {_short(got)}; expected {_short(want)}."
    if type(want) is not type(got):
        return f"The result{at} is {_type_name(got)}; expected {_type_name(want)}."
    if isinstance(want, Rng):
        return ""
    if isinstance(want, Other):
        return "" if want.type_name == got.type_name else f"The result{at} is {got!r}; expected {want!r}."
    return "" if want == got else f"The value{at} is {_short(got)}; expected {_short(want)}."


def _compare(want: dict, got: dict, c: Case) -> str:
    """How the outcome `got` differs from the outcome `want`, as a sentence for the learner; empty when it is right."""
    if got["kind"] == "error" and got["type"] == "ReadyMade":
        return got["message"]
    if c.error:
        allowed = " or ".join(c.error)
        if got["kind"] == "value":
            return f"No error was raised; expected {_a(allowed)}."
        if got["kind"] == "error" and not set(c.error) & set(got["types"]):
            return f"Your code raised {_a(got['type'])}; expected {_a(allowed)}."
        return "" if got["kind"] == "error" else got["message"]
    if got["kind"] == "error":
        if "driver" in got:
            return _misused(got)
        return f"Your code stopped with {got['type']}{': ' if got['message'] else ''}{got['message']}"
    if got["kind"] != "value":
        return got["message"]
    if d := _difference(want["value"], got["value"], c):
        number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
        alike = type(want["value"]) is type(got["value"]) or (number(want["value"]) and number(got["value"]))
        return f"Your answer is {_short(got['value'])}, and that is not right." if c.secret and alike else d
    for asked, w, g in zip(c.grads, want.get("gradients") or [], got.get("gradients") or [None] * len(c.grads)):
        which = c.called(asked)
        if w is None and g is not None:
            return f"There is a gradient with respect to {which}; expected none."
        if w is not None and g is None:
            return f"No gradient reaches {which}: the result is cut off from it."
        if w is not None and (d := _difference(w, g, c, f"the gradient with respect to {which}")):
            return d
    changed = [n for n in got["changed"] if n not in want["changed"]]
    if changed:
        return f"Your code changed its input {', '.join(map(str, changed))}; inputs must stay as they are."
    return ""


# What PyTorch says when a driver uses a result that is not what the statement asks for -> what it means.
_MISUSES = (
    ("does not require grad and does not have a grad_fn",
     "Your result carries no gradient: it was detached, was computed without gradients, or is a new constant that "
     "nothing was computed into."),
    ("not have been used in the graph",
     "Your result does not depend on what it should: it was computed from a copy, or from nothing at all."),
    ("modified by an inplace operation",
     "Something that the gradient still needs was changed in place after it was used."),
    ("backward through the graph a second time",
     "The gradient was already computed from this result, and its graph is gone: call backward once."),
    ("a leaf Variable that requires grad",
     "A parameter was changed in place where gradients are recorded: wrap the change in torch.no_grad()."),
)  # fmt: skip


def _misused(got: dict) -> str:
    """The sentence about an error that was raised where the checker used the answer, not in the learner's lines."""
    said, at = f"{got['type']}: {got['message']}", got["driver"]
    for part, meaning in _MISUSES:
        if part in got["message"]:
            return meaning
    if ".grad" in at and "NoneType" in got["message"]:
        return (
            "No gradient reaches one of the tensors: the result was computed from a copy, a constant or a detached one."
        )
    if "argument" in got["message"] and got["type"] == "TypeError":
        return f"Your answer cannot be called as the statement says: {got['message']}."
    if "object has no attribute" in got["message"]:
        return f"Something that the statement asks for is missing: {got['message']}."
    return f"What came out of your code cannot be used as the statement says ({said})."


def _a(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _same(a: dict, b: dict, c: Case) -> float:
    """How much two outcomes speak for the same mistake: 1 yes, 0 no, a little when only the kind of error agrees."""
    if a["kind"] != b["kind"]:
        return 0.0
    if a["kind"] == "error":
        return 0.0 if a["type"] != b["type"] else 1.0 if a["message"] == b["message"] else 0.25
    if a["kind"] != "value":
        return 1.0
    plain = replace(c, error=())
    return float(not _compare(a, b, plain) and not _compare(b, a, plain))


def _read(reply: dict, blobs: list[bytes], c: Case) -> dict:
    """A reply of `run_call` as an outcome: decoded, and with the names of the inputs that were changed."""
    if reply.get("kind") != "value":
        return reply
    out = {
        "kind": "value",
        "value": decode(reply["value"], blobs),
        "printed": str(reply.get("printed", ""))[:2000],
        "changed": [],
    }
    if "gradients" in reply:
        out["gradients"] = decode(reply["gradients"], blobs)
        if not isinstance(out["gradients"], list) or len(out["gradients"]) != len(c.grads):
            out["gradients"] = [None] * len(c.grads)
    if "after" in reply:
        args, kwargs = decode(reply["after"], blobs)
        before = decode(*encode([list(c.args), c.kwargs]))
        exact = Case("", (), {}, rtol=0, atol=0)
        pairs = [*zip(range(len(before[0])), before[0], args), *((k, v, kwargs.get(k)) for k, v in before[1].items())]
        for name, was, now in pairs:
            if name not in c.may and _difference(was, now, exact):
                out["changed"].append(c.called(name))
    return out


def _outcome(answer: Any, c: Case) -> dict:
    """What `answer` does in case `c`, in this process."""
    request, blobs = c.request()
    request["value"] = c.name == _THE_VALUE.name
    return _read(*run_call(answer, request, blobs), c)


# ----------------------------------------------------------------------------- the learner's call


def _run_here(ex: Exercise, answer: Any) -> list[dict]:
    """The learner's outcomes in this process, up to and including the first that ran out of time."""
    outcomes: list[dict] = []
    for c in ex.all_cases():
        try:
            with time_limit(ex.time_limit):
                outcome = _outcome(answer, c)
        except TimeLimit:
            outcome = timeout_outcome(ex.time_limit)
        outcomes.append(outcome)
        if outcome["kind"] == "timeout":
            break
    return outcomes


# What a terminal or a page would act on: control characters, the direction of writing, halves of characters.
_UNSAFE = re.compile(
    r"[^\t\n\x20-\x7e\xa0-\u200d\u2010-\u2027\u2030-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
MAX_TEXT = 4000


def clean(text: Any, limit: int = MAX_TEXT) -> str:
    """A text of a learner's for somebody else's screen: no escape sequences, not too long."""
    return _UNSAFE.sub("\ufffd", str(text)[:limit])


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict on one answer. Shows itself as a card in a notebook and as text in a terminal."""

    id: str
    title: str
    status: str
    """`passed`, `failed` or `not started`"""
    points: int
    max_points: int
    cases_passed: int = 0
    cases: int = 0
    sentence: str = ""
    """what to read: the wrong answer's sentence, or how the smallest failing case differs"""
    detail: str = ""
    """how the smallest failing case differs"""
    wrong_answer: str = ""
    """name of the wrong answer that gives the same results"""
    case: str = ""
    """name of the smallest failing case"""
    given: tuple[tuple[str, str], ...] = ()
    """the arguments of that case: name and text"""
    expected: str = ""
    got: str = ""
    line: str = ""
    """the learner's own line in which an exception was raised"""
    printed: str = ""
    seconds: float = 0.0

    def __post_init__(self):
        for name in ("sentence", "detail", "expected", "got", "line", "printed"):
            object.__setattr__(self, name, clean(getattr(self, name)))

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def verdict(self) -> str:
        if self.passed:
            return f"Passed: all {self.cases} cases" if self.cases > 1 else "Passed"
        if self.status == "not started":
            return "Not started"
        return f"Not yet: {self.cases_passed} of {self.cases} cases pass" if self.cases > 1 else "Not yet"

    def to_dict(self) -> dict:
        return {
            k: getattr(self, k)
            for k in (
                "id",
                "title",
                "status",
                "points",
                "max_points",
                "cases_passed",
                "cases",
                "sentence",
                "detail",
                "wrong_answer",
            )
        } | {
            "case": self.case,
            "expected": self.expected,
            "got": self.got,
            "line": self.line,
            "seconds": round(self.seconds, 3),
        }

    def __repr__(self) -> str:
        mark = {"passed": "[passed]", "failed": "[not yet]"}.get(self.status, "[not started]")
        lines = [f"{mark} {self.id} – {self.title}", self.verdict + f" ({self.points} of {self.max_points} points)."]
        if self.sentence:
            lines += ["", self.sentence]
        if self.case:
            lines += ["", f"Smallest failing case: {self.case}"]
            if self.detail != self.sentence:
                lines.append(f"  {self.detail}")
            beside = _beside(self.expected, self.got)
            both = [] if beside else [("expected", self.expected), ("got", self.got)]
            rows = [*self.given, *both, ("your line", self.line)]
            wide = max(len(name) for name, _ in rows)
            for name, text in rows:
                if text:
                    lines.append(f"  {name:<{wide}}  " + text.replace("\n", "\n  " + " " * (wide + 2)))
            lines += [f"  {line}" for line in beside]
        elif self.line:
            lines.append(f"  your line: {self.line}")
        if self.printed and not self.passed:
            lines += ["", "Your code printed: " + self.printed.strip()[:500]]
        if not self.passed:
            lines += ["", f"A hint: {_ask('hint', self.id)}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        e = html.escape
        marked = lambda text: re.sub("▸([^◂]*)◂", r"<mark>\1</mark>", e(text))
        symbol, color = {"passed": ("✓", "#0a7d4f"), "failed": ("✗", "#b3400a")}.get(self.status, ("○", "#5a6270"))
        cell = "text-align:left;vertical-align:top;padding:.25em .9em .25em 0;border:0;"
        pre = lambda text: f'<pre style="margin:0;background:none;white-space:pre-wrap">{marked(text)}</pre>'
        rows = "".join(
            f'<tr style="background:none"><th scope="row" style="{cell}font-weight:600">{e(name)}</th>'
            f'<td style="{cell}">{pre(text)}</td></tr>'
            for name, text in [*self.given, ("your line", self.line)]
            if text
        )
        both = [(name, text) for name, text in (("expected", self.expected), ("got", self.got)) if text]
        beside = "".join(
            f'<div style="margin:0 2em 0 0"><div style="font-weight:600">{name}</div>{pre(text)}</div>'
            for name, text in both
        )
        parts = [
            f'<p style="margin:0"><span aria-hidden="true" style="color:{color};font-weight:600">{symbol}</span> '
            f"{e(self.verdict)} – {e(self.title)}, {self.points} of {self.max_points} points</p>"
        ]
        if self.sentence:
            parts.append(f'<p style="margin:.6em 0 0;font-weight:600">{e(self.sentence)}</p>')
        if self.case:
            more = f"<br>{e(self.detail)}" if self.detail != self.sentence else ""
            parts.append(f'<p style="margin:.6em 0 0">Smallest failing case: <em>{e(self.case)}</em>{more}</p>')
            parts.append(
                f'<table aria-label="Smallest failing case: {e(self.case)}" '
                'style="margin:.3em 0 0;border-collapse:collapse;font-size:inherit">'
                f"<tbody>{rows}</tbody></table>"
                f'<div style="display:flex;flex-wrap:wrap">{beside}</div>'
            )
        if self.printed and not self.passed:
            parts.append(
                f'<p style="margin:.6em 0 0">Your code printed: <code>{e(self.printed.strip()[:500])}</code></p>'
            )
        if not self.passed:
            parts.append(f'<p style="margin:.6em 0 0">A hint: <code>hint("{e(self.id)}")</code></p>')
        return (
            f'<div role="status" class="llmcourse-check" data-status="{e(self.status)}" '
            'style="border:1px solid currentColor;'
            f'border-left:.4em solid {color};padding:.7em 1em;margin:.3em 0;max-width:60em">{"".join(parts)}</div>'
        )


def _beside(expected: str, got: str) -> list[str]:
    """The lines of two texts side by side, as far as they fit into 78 columns."""
    if not expected or not got:
        return []
    left, right = ["expected", *expected.split("\n")], ["got", *got.split("\n")]
    wide = max(map(len, left)) + 3
    if wide + max(map(len, right)) > 76:
        return []
    rows = max(len(left), len(right))
    left, right = left + [""] * (rows - len(left)), right + [""] * (rows - len(right))
    return [f"{a:<{wide}}{b}".rstrip() for a, b in zip(left, right)]


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 200 else value[:200] + "…")
    if hasattr(value, "item"):
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:200]


SHOWN = 64  # numbers of a value that are printed; larger ones are known by their shape
MARK = ("▸", "◂")  # around the first difference


def _grid(texts: list[str], shape: tuple[int, ...]) -> str:
    """Texts in nested brackets, one row a line."""
    if not shape:
        return texts[0]
    if len(shape) == 1:
        return f"[{', '.join(texts)}]"
    step = len(texts) // shape[0]
    rows = [_grid(texts[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]
    return "[" + (",\n" + "\n" * (len(shape) - 2)).join(rows).replace("\n", "\n ") + "]"


def _numbers(value: Any, digits: int) -> tuple[list[str], tuple[int, ...]] | None:
    """The entries of an array or of a list of plain values as texts, and the shape; None for anything else or large."""
    if _is_array(value):
        flat, shape = _flat(value).tolist(), tuple(value.shape)
    elif isinstance(value, (list, tuple)) and all(isinstance(v, (int, float, str, type(None))) for v in value):
        flat, shape = list(value), (len(value),)
    else:
        return None
    if not 0 < len(flat) <= SHOWN:
        return None
    texts = [f"{v:.{digits}g}" if isinstance(v, float) else repr(v) for v in flat]
    if _is_array(value) and _dtype(value).startswith(("float", "bfloat")):
        texts = [t if set(t) & set(".en") else t + "." for t in texts]
    wide = max(map(len, texts)) if len(shape) > 1 else 0
    return [t.rjust(wide) for t in texts], shape


def _show(value: Any, first: int | None = None, digits: int = 5) -> str:
    """A value as text that a learner reads: small ones whole, with a mark at entry `first`; large ones by shape."""
    if found := _numbers(value, digits):
        texts, shape = found
        if first is not None:
            texts[first] = f"{MARK[0]}{texts[first].strip()}{MARK[1]}"
        text = _grid(texts, shape)
        if isinstance(value, tuple):
            return f"({text[1:-1]}{',' if len(value) == 1 else ''})"
        return text if shape else f"{text} (a single number)"
    if _is_array(value):
        return f"{_type_name(value)[2:]} of shape {tuple(value.shape)}, {_dtype(value)}"
    if isinstance(value, (list, tuple)) and any(_is_array(v) for v in value):
        return "\n".join(f"[{i}] {_show(v)}" for i, v in enumerate(value))
    if isinstance(value, dict):
        return "\n".join(f"{k}: {_show(v)}" for k, v in value.items())
    text = repr(value)
    return text if len(text) <= 400 else text[:400] + " …"


def _show_pair(want: Any, got: Any, c: Case) -> tuple[str, str]:
    """Two values as text; the first entry in which they differ is marked, with digits enough to see it."""
    several = lambda v: isinstance(v, (list, tuple)) and any(_is_array(part) for part in v)
    if several(want) and several(got) and len(want) == len(got):
        pairs = [_show_pair(w, g, c) for w, g in zip(want, got)]
        return tuple("\n".join(f"[{i}] {p[side]}" for i, p in enumerate(pairs)) for side in (0, 1))
    if isinstance(want, dict) and isinstance(got, dict) and set(want) == set(got):
        pairs = {k: _show_pair(want[k], got[k], c) for k in want}
        return tuple("\n".join(f"{k}: {p[side]}" for k, p in pairs.items()) for side in (0, 1))
    for digits in (5, 7, 9, 17):
        a, b = _numbers(want, digits), _numbers(got, digits)
        if not a or not b or a[1] != b[1]:
            break
        if _is_array(want) and _is_array(got):
            bad = _unequal(want, got, c)
            first = int(bad.argmax()) if bad.any() else None
        else:
            first = next((i for i, (w, g) in enumerate(zip(a[0], b[0])) if w != g), None)
        if first is not None and (a[0][first].strip() != b[0][first].strip() or digits == 17):
            return _show(want, first, digits), _show(got, first, digits)
    return _show(want), _show(got)


def _show_both(want: dict, got: dict, c: Case) -> tuple[str, str]:
    """What was expected and what came, as two texts."""
    if want["kind"] != "value" or got["kind"] != "value":
        return _show_outcome(want, c), _show_outcome(got, c)
    texts = list(_show_pair(want["value"], got["value"], c))
    for asked, w, g in zip(c.grads, want.get("gradients") or [], got.get("gradients") or []):
        both = _show_pair(w, g, c) if w is not None and g is not None else (_show_gradient(w), _show_gradient(g))
        texts = [f"{t}\ngradient of {c.called(asked)}: {s}" for t, s in zip(texts, both)]
    return tuple(texts)


def _show_gradient(value: Any) -> str:
    return "none" if value is None else _show(value)


def _show_outcome(outcome: dict, c: Case) -> str:
    if outcome["kind"] == "error":
        return f"{outcome['type']}: {outcome['message']}" if outcome["message"] else outcome["type"]
    if outcome["kind"] != "value":
        return "nothing: it was stopped"
    return _show_pair(outcome["value"], outcome["value"], c)[0]


def _argument_names(ex: Exercise, c: Case) -> tuple[str, ...]:
    """The names of the positional arguments, from the solution's signature, or from the driver's if that names them."""
    try:
        parameters = list(inspect.signature(c.driver or ex.solution).parameters.values())
        skip = 1 if c.driver else 0
        if c.driver and any(p.kind == p.VAR_POSITIONAL for p in parameters):  # it hands on what the solution gets
            parameters, skip = list(inspect.signature(ex.solution).parameters.values()), 0
    except (TypeError, ValueError):
        return ()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(named[skip:])[: len(c.args)]


def judge(ex: Exercise, outcomes: list[dict], seconds: float = 0.0) -> Result:
    """The verdict on what the learner's answer did in the cases (fewer outcomes than cases: it was stopped)."""
    cases, expected = ex.all_cases(), ex.expected()
    base = dict(id=ex.id, title=ex.title, max_points=ex.points, points=0, cases=len(cases), seconds=seconds)
    blank = not ex.make_cases and outcomes and outcomes[0].get("value") is None and outcomes[0]["kind"] == "value"
    if blank or (outcomes and all(o["kind"] == "error" and o["type"] == "NotImplementedError" for o in outcomes)):
        return Result(
            **base,
            status="not started",
            sentence="Write your answer in the cell above, run it, then run this check again.",
        )
    problems = [_compare(w, g, c) for w, g, c in zip(expected, outcomes, cases)]
    problems += ["This case was not run, because an earlier one was stopped."] * (len(cases) - len(outcomes))
    failing = [i for i, p in enumerate(problems) if p]
    if not failing:
        return Result(**{**base, "points": ex.points}, status="passed", cases_passed=len(cases))
    shown = [i for i in failing if i < len(outcomes)]
    base |= dict(status="failed", cases_passed=len(cases) - len(failing))
    if not shown:
        i = failing[0]
        return Result(**base, sentence=problems[i], detail=problems[i], case=cases[i].name)
    wrong, explained = nearest(ex, outcomes, failing)
    stopped = [i for i in shown if outcomes[i]["kind"] not in ("value", "error")]
    # the case that is shown belongs to the sentence that is said; one with a result says more than one with an error
    small = lambda i: (bool(cases[i].error), cases[i].size, i)
    i = stopped[0] if stopped and not wrong else min(explained or shown, key=small)
    sentence = problems[i]
    if wrong:
        sentence = ex.wrong_answers[wrong][0]
        if len(explained) < len(shown):
            sentence = f"In part: {sentence} (This explains {len(explained)} of the {len(shown)} cases that fail.)"
    c, got = cases[i], outcomes[i]
    given = tuple((n, _show(v)) for n, v in [*((c.called(i), v) for i, v in enumerate(c.args)), *c.kwargs.items()])
    want_text, got_text = _show_both(expected[i], got, c)
    return Result(
        **base,
        sentence=sentence,
        detail=problems[i],
        case=c.name,
        wrong_answer=wrong,
        given=given,
        expected=_a(" or ".join(c.error)) if c.error else "" if c.secret else want_text,
        got="" if got["kind"] == "error" and not c.error else got_text,
        line=f"{got['lineno']}: {got.get('line', '')}".rstrip(": ") if got.get("lineno") else "",
        printed=str(got.get("printed", "")),
    )


def nearest(ex: Exercise, outcomes: list[dict], failing: list[int]) -> tuple[str, list[int]]:
    """The wrong answer that explains the outcomes best, and which of the failing cases it explains; `("", [])` if none.

    A wrong answer speaks for itself where it gives what the learner got, in a case that the learner fails, and against
    itself where it fails a case that the learner passes. It must explain at least half of what fails and more than it
    contradicts: a sentence about a mistake that was not made is worse than none.
    """
    cases, expected = ex.all_cases(), ex.expected()
    best, best_score, best_explained = "", 0.0, []
    for name in ex.wrong_answers:
        given = ex.given_by(name)
        same = [_same(given[i], outcome, cases[i]) for i, outcome in enumerate(outcomes)]
        ran = [i for i in failing if i < len(outcomes)]
        explained = sum(same[i] for i in ran)
        against = sum(
            s < 1 and bool(_compare(expected[i], given[i], cases[i])) for i, s in enumerate(same) if i not in failing
        )
        if explained * 2 >= len(ran) and explained - against > best_score:
            best, best_score = name, explained - against
            best_explained = [i for i in ran if same[i] == 1] or [i for i in ran if same[i]]
    return best, best_explained


def kill_matrix(ex: Exercise) -> tuple[list[dict], list[str]]:
    """For each wrong answer the cases that it fails and the sentence it gets; and what is wrong with the exercise."""
    problems = []
    cases = ex.all_cases()
    if why := ex.broken():
        return [], [f"{ex.id}: {why}"]
    verdict = judge(ex, _run_here(ex, ex.solution))
    if not verdict.passed:
        problems.append(f"{ex.id}: the solution does not pass: {verdict.detail}")
    rows = []
    for name, (_, answer) in ex.wrong_answers.items():
        outcomes = _run_here(ex, answer)
        result = judge(ex, outcomes)
        killed = [c.name for c, w, g in zip(cases, ex.expected(), outcomes) if _compare(w, g, c)]
        rows.append({"exercise": ex.id, "wrong_answer": name, "killed_by": killed, "sentence_of": result.wrong_answer})
        if result.passed:
            problems.append(f"{ex.id}: the wrong answer {name} passes.")
        elif result.wrong_answer != name:
            told = f"that of {result.wrong_answer}" if result.wrong_answer else "none"
            problems.append(
                f"{ex.id}: {name} should get its own sentence and gets {told}; a case is missing that tells them apart."
            )
    return rows, problems


_MISSING = object()


def _ask(word: str, id: str) -> str:
    """How a learner asks for more, here."""
    return f"llmcourse {word} {id}" if IN_SHELL else f'{word}("{id}")'


def _in_a_script() -> bool:
    """Whether nothing shows the value of an expression: no notebook, no interactive Python, not the command line."""
    shell = sys.modules.get("IPython")
    return not (IN_SHELL or hasattr(sys, "ps1") or (shell is not None and shell.get_ipython() is not None))


def _shown(thing: Any) -> Any:
    """In a plain script a result prints itself."""
    if _in_a_script():
        print(thing)
    return thing


def check(id: str, answer: Any = _MISSING) -> Result:
    """Check an answer: run its cases, and on failure say which known mistake gives the same results.

    Args:
        id: the exercise, for example `"attention.scaled_dot_product"`.
        answer: the function, class or value; by default what the notebook calls by the exercise's name.
    Returns:
        The verdict. In a notebook it shows itself as a card, in a plain script it prints itself. Nothing that the
        answer does is raised from here.
    """
    return _shown(_check(find(id), answer, sys._getframe(1).f_globals))


def _check(ex: Exercise, answer: Any, space: dict) -> Result:
    if answer is _MISSING:
        if ex.name not in space:
            sentence = f"There is no {ex.name} yet: run the cell that defines it first."
            return ex.failed(sentence, status="not started")
        answer = space[ex.name]
    import torch

    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the learner's own random numbers go on as if nothing had happened
        if why := ex.broken():
            return ex.failed(
                f"The check itself cannot run: {why}. Something in this notebook has replaced a part of PyTorch or "
                "Python; restart the kernel and run all cells."
            )
        result = judge(ex, _run_here(ex, answer), time.perf_counter() - started)
    if os.environ.get("NBGRADER_EXECUTION"):
        # nbgrader run without our configuration counts a cell as wrong only when it raises.
        if not result.passed:
            raise AssertionError("\n" + repr(result))
        return result
    with contextlib.suppress(OSError):  # a folder that cannot be written must not cost the verdict
        Progress().record(result)
    return result


# ------------------------------------------------------------------------ hints, solution, progress


class Note:
    """A text with a title that shows itself in a notebook and in a terminal."""

    def __init__(self, title: str, text: str, code: str = ""):
        self.title, self.text, self.code = title, text, code

    def __repr__(self) -> str:
        return "\n\n".join(p for p in (self.title + "\n" + self.text, self.code) if p)

    def _repr_html_(self) -> str:
        code = f'<pre style="margin:.6em 0 0"><code>{html.escape(self.code)}</code></pre>' if self.code else ""
        return (
            '<div role="status" class="llmcourse-note" style="border:1px solid currentColor;'
            'border-left:.4em solid #3d6fb4;padding:.7em 1em;margin:.3em 0;max-width:60em">'
            f'<p style="margin:0;font-weight:600">{html.escape(self.title)}</p>'
            f'<p style="margin:.4em 0 0">{html.escape(self.text)}</p>{code}</div>'
        )


def hint(id: str) -> Note:
    """The next hint of an exercise, from gentle to almost there; the last one again when all were given."""
    return _shown(_hint(id))


def _hint(id: str) -> Note:
    ex = find(id)
    given = Progress().add(ex.id, "hints", limit=len(ex.hints))
    more = "This was the last hint." if given == len(ex.hints) else f"The next one: {_ask('hint', ex.id)}"
    return Note(f"Hint {given} of {len(ex.hints)} – {ex.title}", f"{ex.hints[given - 1]} {more}")


def reveal(id: str) -> Note:
    """The solution of an exercise. Progress remembers that it was seen; the points are not lost."""
    ex = find(id)
    Progress().add(ex.id, "reveals", limit=1)
    advice = "One way to do it. Close it, and write it again in your own words."
    return _shown(Note(f"Solution – {ex.title}", advice, ex.section("solution")))


def _learner_folder() -> Path:
    """Where progress is kept: the course's root, so that all its sheets share one file; outside a course, this folder.

    The root is the nearest folder above with the course's settings, or a clone or copy that has its `exercises`.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        own = folder / "settings.ini"
        if own.is_file() and re.search(r"^\[llmcourse\]", own.read_text(encoding="utf8", errors="replace"), re.M):
            return folder
        if any((folder / "exercises").glob("[0-9][0-9]*_*/*.ipynb")) or (folder / PROGRESS_FILE).is_file():
            return folder
    return here


def _sheets_at_hand() -> list[str]:
    """All sheets; those that lie in this folder first."""
    here = Path.cwd()
    return sorted(sheets(), key=lambda name: not (here / f"{name}.ipynb").is_file())


class Progress:
    """What the learner has done, in one JSON file of the learner's folder.

    Every change reads the file, merges and replaces it in one step under a lock, so that two notebooks can write and a
    crash leaves the old file or the new one. Entries are kept by exercise id: replacing a sheet loses nothing.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else _learner_folder() / PROGRESS_FILE

    def read(self) -> dict[str, dict]:
        """The entries by exercise id. A damaged file is set aside beside itself, not deleted, and counts as empty."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8-sig"))
            entries = data["exercises"]
            if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
                raise TypeError
            return entries
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, RecursionError):
            with contextlib.suppress(OSError):
                os.replace(self.path, self.path.with_suffix(f".damaged-{time.strftime('%Y%m%d-%H%M%S')}.json"))
            return {}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, dict]]:
        from filelock import FileLock

        with FileLock(str(self.path) + ".lock", timeout=5):
            entries = self.read()
            yield entries
            text = json.dumps({"version": 1, "exercises": dict(sorted(entries.items()))}, indent=1) + "\n"
            write_atomic(self.path, text)

    def record(self, result: Result) -> None:
        """One more attempt; a pass is never taken back, and tries after it do not count."""
        if result.status == "not started":
            return
        with self._changing() as entries:
            e = entries.setdefault(result.id, {})
            e["last"] = result.status
            if not e.get("passed"):
                e["attempts"] = _whole(e.get("attempts")) + 1
                if result.passed:
                    e["passed"] = time.strftime("%Y-%m-%d")

    def add(self, id: str, what: str, *, limit: int) -> int:
        """Count one more hint or reveal, up to `limit`; returns the count."""
        try:
            with self._changing() as entries:
                e = entries.setdefault(id, {})
                e[what] = min(_whole(e.get(what)) + 1, limit)
                return e[what]
        except OSError:
            return 1

    def merge(self, other: str | Path) -> None:
        """Take over another progress file: of each entry the larger counts, and the earlier pass."""
        try:
            theirs = json.loads(Path(other).read_text(encoding="utf-8-sig"))["exercises"]
            require(
                all(isinstance(e, dict) for e in theirs.values()), "progress file", str(other), "a file of progress"
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadInput(f"progress file is {str(other)!r}; allowed: a {PROGRESS_FILE} of the course.") from None
        with self._changing() as entries:
            for id, new in theirs.items():
                e = entries.setdefault(id, {})
                for key, value in new.items():
                    if key == "passed":
                        e[key] = min(str(value), str(e.get(key) or value))
                    elif isinstance(value, int):
                        e[key] = max(value, _whole(e.get(key)))
                    else:
                        e.setdefault(key, value)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


@dataclass(frozen=True)
class Overview:
    """All exercises with what the learner did; shows itself as a table."""

    rows: tuple[dict, ...]

    @property
    def points(self) -> tuple[int, int]:
        return sum(r["points"] for r in self.rows if r["status"] == "passed"), sum(r["points"] for r in self.rows)

    @property
    def verdict(self) -> str:
        got, of = self.points
        passed = sum(r["status"] == "passed" for r in self.rows)
        return f"{passed} of {len(self.rows)} exercises passed, {got} of {of} points"

    def to_dict(self) -> dict:
        return {"points": self.points[0], "max_points": self.points[1], "exercises": list(self.rows)}

    def __repr__(self) -> str:
        wide = max((len(r["id"]) for r in self.rows), default=2)
        lines = [
            f"{r['id']:<{wide}}  {r['status']:<11}  {r['attempts']:>3} tries  {r['hints']} hints"
            + ("  solution seen" if r["reveals"] else "")
            for r in self.rows
        ]
        return "\n".join([self.verdict, "", *lines])

    def _repr_html_(self) -> str:
        head = "".join(
            f'<th scope="col" style="text-align:left">{h}</th>'
            for h in ("Exercise", "Status", "Tries", "Hints", "Solution seen")
        )
        body = "".join(
            f'<tr><th scope="row" style="text-align:left;font-weight:400">{html.escape(r["id"])}<br>'
            f"<small>{html.escape(r['title'])}</small></th>"
            f'<td style="text-align:left">{"✓ " if r["status"] == "passed" else ""}{r["status"]}</td>'
            f"<td>{r['attempts']}</td><td>{r['hints']}</td>"
            f'<td style="text-align:left">{"yes" if r["reveals"] else "no"}</td></tr>'
            for r in self.rows
        )
        table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        caption = f'<caption style="text-align:left">{self.verdict}</caption>'
        return f'<div role="status"><table>{caption}{table}</table></div>'


def progress(sheet: str | None = None, *, path: str | Path | None = None) -> Overview:
    """What is passed, how many tries and hints it took, and where the solution was seen; the sheet at hand first."""
    return _shown(_overview(sheet, path))


def _overview(sheet: str | None, path: str | Path | None = None) -> Overview:
    entries = Progress(path).read()
    rows = []
    for name in [sheet] if sheet else _sheets_at_hand():
        for ex in load_sheet(name).values():
            e = entries.get(ex.id, {})
            status = "passed" if e.get("passed") else "not yet" if _whole(e.get("attempts")) else "not started"
            counts = {name: _whole(e.get(name)) for name in ("attempts", "hints", "reveals")}
            rows.append(dict(id=ex.id, title=ex.title, status=status, points=ex.points) | counts)
    return Overview(tuple(rows))

"""What a checker is made of: cases, exercises, and the sheets that hold them."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmcourse.practice import yearly
from llmcourse.practice.cards import Result
from llmcourse.practice.comparing import difference_of, numbers_in
from llmcourse.practice.variants import SAME_DATA
from llmcourse.practice.worker import Rng, decode, encode, run_call
from llmcourse.settings import require

RTOL, ATOL = 1e-5, 1e-6  # the default closeness of floating-point results
DRAWN_RTOL, DRAWN_ATOL = 1e-4, 3e-5  # and that of cases which a year's seed has drawn


def rng(seed: int = 0) -> Rng:
    """An argument that arrives as `torch.Generator().manual_seed(seed)`, a fresh one for each call."""
    number = _drawing[-1] if _drawing else 0
    return Rng(yearly.drawn(seed, number) if number else seed)


_drawing: list[int] = []  # the sheet's seed while cases are made whose data it draws


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
        return sum(numbers_in(v) for v in (*self.args, *self.kwargs.values()))

    def called(self, argument: int | str) -> str:
        """The name of an argument that is known by its position."""
        if isinstance(argument, str):
            return argument
        return self.names[argument] if argument < len(self.names) else f"argument {argument + 1}"

    def request(self) -> tuple[dict, list[bytes]]:
        """The call as a message: encoded arguments, the text of the driver, what is asked for."""
        both, blobs = encode([list(self.args), self.kwargs])
        args, kwargs = both["list"]
        source = _source(self.driver) if self.driver else None
        return {"args": args, "kwargs": kwargs, "gradients": list(self.grads), "driver": source, "value": False}, blobs


@functools.cache
def _source(driver: Callable) -> str:
    """Text of a driver; to find it takes longer than most calls, and every answer is asked with the same ones."""
    return inspect.getsource(driver)


def case(name: str, /, *args: Any, **kwargs: Any) -> Case:
    """One call: a name that a learner understands, then the arguments of the learner's function."""
    return Case(name, args, kwargs)


def _as_text(c: Case) -> str:
    """A call as text, to compare two of them."""
    tree, blobs = c.request()
    return f"{tree} {blobs}"


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
        text = _text_of(self.module)
        found = re.search(rf"^# %% {kind} {self.name}\n(.*?)(?=^# %%|\Z)", text, re.S | re.M)
        return found[1].strip("\n") if found else ""

    # What the solution and the wrong answers give is worked out once and kept: the cases are deterministic.

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        if what not in self._known:
            self._known[what] = make()
        return self._known[what]

    def all_cases(self) -> list[Case]:
        return self.once("cases", lambda: [replace(c, names=_argument_names(self, c)) for c in self._made()])

    def _made(self) -> list[Case]:
        if not self.make_cases:
            return [_THE_VALUE]
        number = getattr(sys.modules.get(self.module), "__sheet_seed__", 0)
        book = list(self.make_cases())
        if not number:
            return book
        _drawing.append(0 if self.id in SAME_DATA else number)
        try:
            with yearly.other_data(self.id, number):
                made = list(self.make_cases())
        finally:
            _drawing.pop()
        # The cases of the book stay: what finds every known mistake there finds it with any seed. What the seed has
        # drawn comes on top.
        known = {(c.name, _as_text(c)) for c in book}
        drawn = [replace(c, name=f"{c.name} (this year's)") for c in made if (c.name, _as_text(c)) not in known]
        like = replace(next((c for c in book if not c.error), book[0]), kwargs={}, grads=(), error=())
        calls = enumerate(yearly.more_calls(self.id, number), 1)
        drawn += [replace(like, name=f"this year's, {i}", args=a) for i, a in calls]
        # Nobody has looked at these numbers: other right answers may round differently there, and the cases of the book
        # are as strict as before. What was drawn may also be a case that the statement refuses.
        drawn = [replace(c, rtol=max(c.rtol, DRAWN_RTOL), atol=max(c.atol, DRAWN_ATOL)) for c in drawn]
        return book + [c for c in drawn if (outcome_of(self.solution, c)["kind"] == "error") == bool(c.error)]

    def expected(self) -> list[dict]:
        return self.once("solution", lambda: [outcome_of(self.solution, c) for c in self.all_cases()])

    def broken(self) -> str:
        """Why the solution itself cannot be run in this process, where something is not as it should be; else empty."""
        for c, outcome in zip(self.all_cases(), self.expected()):
            if (outcome["kind"] != "value") != bool(c.error):
                said = outcome.get("message") or outcome.get("type") or "no error was raised"
                self._known.pop("solution")
                return f"in the case {c.name!r} the solution gives: {said}"
        return ""

    def given_by(self, wrong: str) -> list[dict]:
        answer = self.wrong_answers[wrong][1]
        return self.once(wrong, lambda: [outcome_of(answer, c) for c in self.all_cases()])


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


def read_reply(reply: dict, blobs: list[bytes], c: Case) -> dict:
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
            if name not in c.may and difference_of(was, now, exact):
                out["changed"].append(c.called(name))
    return out


def outcome_of(answer: Any, c: Case) -> dict:
    """What `answer` does in case `c`, in this process."""
    request, blobs = c.request()
    request["value"] = c.name == _THE_VALUE.name
    return read_reply(*run_call(answer, request, blobs), c)


REGISTRY: dict[str, dict[str, Exercise]] = {}


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
    REGISTRY.setdefault(made.module, {})[id] = made
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
    """All exercises of a sheet, by id, in the order of the sheet; with the numbers of this year's seed."""
    known = sheets()
    require(sheet in known, "sheet", sheet, ", ".join(known) or "no sheet is installed")
    name, number = f"llmcourse.practice.sheets.{sheet}", yearly.seed()
    if getattr(sys.modules.get(name), "__sheet_seed__", 0) != number:
        sys.modules.pop(name, None)
        REGISTRY.pop(name, None)
    if number and name not in sys.modules:
        yearly.load(name, number)
    return REGISTRY[importlib.import_module(name).__name__]


def _text_of(module: str) -> str:
    """The text of a checker as it is in force."""
    there = sys.modules[module]
    return getattr(there, "__sheet_text__", "") or Path(there.__file__).read_text(encoding="utf8")


def setup_source(sheet: str) -> str:
    """The imports and data that a sheet gives to learner and checker alike, as text."""
    load_sheet(sheet)
    text = _text_of(f"llmcourse.practice.sheets.{sheet}")
    return "\n\n".join(m[1].strip("\n") for m in re.finditer(r"^# %% setup\n(.*?)(?=^# %%|\Z)", text, re.S | re.M))


def find(id: str) -> Exercise:
    """The exercise with this id. `BadInput` names the ids that there are."""
    sheet = str(id).split(".")[0]
    known = sheets()
    require(sheet in known, "exercise", id, ", ".join(f"{s}.…" for s in known) or "no sheet is installed")
    found = load_sheet(sheet)
    require(id in found, "exercise", id, ", ".join(found))
    return found[id]

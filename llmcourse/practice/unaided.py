"""Exercises that ask for a thing to be written: inside them the ready function is not accepted.

The functions of the chapters get another code object for the time of the call, so that a name which the learner
imported earlier is caught as well; PyTorch's own functions are seen by a `TorchFunctionMode`. A profile function
(`sys.setprofile`) would see both, but together with the alarm of `time_limit` CPython 3.11 can spin in it for ever.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

from llmcourse.practice.worker import TimeLimit

__all__ = ["ReadyMade", "unaided"]


class ReadyMade(Exception):
    """The answer called what the exercise asks for."""


_refusals: list[ReadyMade] = []  # of the call that is going on: an answer may have caught them


def _refuse(name: str) -> None:
    _refusals.append(
        ReadyMade(f"You called {name}, which does what this exercise asks for: write that part yourself, step by step.")
    )
    raise _refusals[-1]


def _instead(*args: Any, **kwargs: Any) -> None:
    """What runs in place of a function of the chapters, under its name and among the globals of its module."""
    from sys import _getframe

    from llmcourse.practice.unaided import _refuse

    _refuse(f"{__name__}.{_getframe().f_code.co_qualname}".removesuffix(".__init__"))


def _is_ours(module: Any) -> bool:
    """Whether this is the name of a module of the chapters."""
    return isinstance(module, str) and module.startswith("llmcourse.") and not module.startswith("llmcourse.practice")


def _loaded() -> tuple[str, ...]:
    """The modules of the chapters that are loaded now."""
    return _among(len(sys.modules), next(reversed(sys.modules)))


@functools.lru_cache(maxsize=1)
def _among(n: int, last: str) -> tuple[str, ...]:
    """Asked for every call of an answer, and looked up again when a module has come or gone."""
    course = [m for m in list(sys.modules) if isinstance(m, str) and m.startswith("llmcourse.")]
    return tuple(sorted(m for m in course if _is_ours(m)))


@functools.cache
def _functions(modules: tuple[str, ...]) -> list[tuple[FunctionType, CodeType]]:
    """The functions and methods that these modules of the chapters define, each with the code that refuses it."""
    found: dict[FunctionType, CodeType] = {}
    for module in modules:
        named = list(vars(sys.modules[module]).values())
        named += [f for c in named if isinstance(c, type) and _is_ours(c.__module__) for f in vars(c).values()]
        for f in named:
            f = getattr(f, "fget" if isinstance(f, property) else "__func__", f)
            f = inspect.unwrap(f) if isinstance(f, FunctionType) else f
            if isinstance(f, FunctionType) and _is_ours(f.__module__):
                found[f] = _instead.__code__.replace(
                    co_name=f.__name__, co_qualname=f.__qualname__, co_freevars=f.__code__.co_freevars
                )
    return list(found.items())


def unaided(answer: Callable, *args: Any, chapter: str, torch_functions: Sequence[str] = (), **kwargs: Any) -> Any:
    """Call the answer; a call of a function of the chapters inside it raises `ReadyMade`, also when that was caught.

    Args:
        answer, args, kwargs: the learner's function and what it is given.
        chapter: the module that holds the ready function: it is loaded first, so that the answer cannot load it.
        torch_functions: patterns of the names of PyTorch's functions that are refused too, as "*softmax".
    """
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            name = getattr(func, "__name__", "")
            if any(fnmatch.fnmatchcase(name, p) for p in torch_functions):
                _refuse(f"torch's {name}")
            return func(*args, **(kwargs or {}))

    importlib.import_module(f"llmcourse.{chapter}")
    refused = _functions(_loaded())
    was = [(f, f.__code__) for f, _ in refused]
    _refusals.clear()
    try:
        for f, refusing in refused:
            f.__code__ = refusing
        with Watch():
            return answer(*args, **kwargs)
    finally:
        stops: list[type[BaseException]] = []
        while was:  # whatever rings here: a learner's kernel goes on with the chapters as they were
            try:
                for f, code in was:
                    f.__code__ = code
                was = []
            except (TimeLimit, KeyboardInterrupt) as e:
                stops.append(type(e))
        if KeyboardInterrupt in stops:
            raise KeyboardInterrupt
        if _refusals:
            raise _refusals[0] from None

"""Each year's sheets differ: one whole number, the seed, changes numbers of the statements and data of the checks.

A class gets its seed from the environment (`LLMCOURSE_SHEET_SEED`, the teacher's setting) or from a line in its sheets
(`sheet_seed(2027)`, written when they are released). Without a seed the sheets are those of the book. With one

- some exercises state other numbers (`variants.STATED`), so that last year's answer fails in this year's check;
- the random data of the checks are drawn a second time, so that an answer fitted to known cases fails;
- some exercises without random data get a few more cases, drawn by the seed (`variants.MORE`).

The cases of the book stay beside those of the year: what finds every known mistake there finds it with any seed.

Two seeds that follow each other never choose the same number, and none chooses that of the book.
"""

from __future__ import annotations

import contextlib
import importlib.util
import linecache
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from llmcourse.settings import environment_whole, whole

__all__ = ["VARIABLE", "changed_text", "changes", "fixed", "seed", "sheet_seed", "with_seed"]

VARIABLE = "LLMCOURSE_SHEET_SEED"
_given = 0  # by sheet_seed: what the sheet at hand says


def fixed() -> int | None:
    """The teacher's setting; None where there is none."""
    number = environment_whole(VARIABLE, -1)
    return None if number < 0 else number


def seed() -> int:
    """The seed of the sheets; 0 stands for those of the book. The teacher's setting counts more than a sheet's line."""
    number = fixed()
    return _given if number is None else number


def sheet_seed(number: int) -> None:
    """The line of a released sheet: its checks are those of this seed."""
    global _given
    _given = whole("sheet seed", number, 0, 2**31 - 1)


@contextlib.contextmanager
def with_seed(number: int) -> Iterator[None]:
    """Inside the block the sheets have this seed, unless the teacher has set one."""
    before = _given
    sheet_seed(number)
    try:
        yield
    finally:
        sheet_seed(before)


def drawn(what: object, number: int) -> int:
    """A whole number that belongs to this thing and this seed."""
    return zlib.crc32(f"{number}:{what}".encode())


# --------------------------------------------------------------------------------- stated numbers


def _chosen(id: str, number: int) -> list[tuple[str, str]]:
    """The fragments of an exercise's text, each with what takes its place."""
    from llmcourse.practice.variants import STATED

    rows = STATED.get(id, ())
    if not number or not rows:
        return []
    others = len(rows[0]) - 1
    k = 1 + (number + zlib.crc32(id.encode())) % others
    return [(row[0], row[k]) for row in rows]


def changed_text(id: str, text: str, number: int) -> str:
    """A text of an exercise (statement, answer, cases) with the numbers of this seed. All fragments change at once."""
    rows = dict(_chosen(id, number))
    if not rows:
        return text
    either = "|".join(re.escape(was) for was in sorted(rows, key=len, reverse=True))
    return re.sub(either, lambda m: rows[m[0]], text)


def changes(id: str, number: int) -> list[tuple[str, str]]:
    """What this seed changes in an exercise: (fragment of the book, fragment of this year)."""
    return _chosen(id, number)


def changed_module(sheet: str, text: str, number: int) -> str:
    """The text of a checker with the numbers of this seed."""

    def part(found: re.Match) -> str:
        return changed_text(f"{sheet}.{found[1]}", found[0], number)

    return re.sub(r"^# %% (?:solution|checker) (\w+)\n.*?(?=^# %%|\Z)", part, text, flags=re.S | re.M)


def load(name: str, number: int) -> ModuleType:
    """Import a checker with the numbers of this seed. Its text is kept, so that `reveal` shows what is in force."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    module.__sheet_seed__ = number
    module.__sheet_text__ = changed_module(
        name.rpartition(".")[2], Path(spec.origin).read_text(encoding="utf8"), number
    )
    file = f"{spec.origin} with seed {number}"
    lines = module.__sheet_text__.splitlines(True)
    linecache.cache[file] = (len(module.__sheet_text__), None, lines, file)
    sys.modules[name] = module
    try:
        exec(compile(module.__sheet_text__, file, "exec"), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


# ---------------------------------------------------------------------------------- random data


@contextlib.contextmanager
def other_data(id: str, number: int) -> Iterator[None]:
    """Inside the block, random numbers with a fixed seed are those of this year.

    The cases of an exercise are made in it. What an answer draws when it is called is not touched.
    """
    from llmcourse.practice.variants import SAME_DATA

    if not number or id in SAME_DATA:
        yield
        return
    import torch

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(drawn(seed, number))

    class Random(random.Random):
        def __init__(self, seed: object = None):
            super().__init__(drawn(seed, number))

    before = torch.Generator, torch.manual_seed, random.Random
    torch.Generator, random.Random = Generator, Random
    torch.manual_seed = lambda seed: before[1](drawn(seed, number))
    try:
        yield
    finally:
        torch.Generator, torch.manual_seed, random.Random = before


def more_calls(id: str, number: int) -> list[tuple]:
    """Arguments of calls that only this seed has."""
    from llmcourse.practice.variants import MORE

    draws = random.Random(drawn(id, number))
    return [MORE[id](draws) for _ in range(3)] if number and id in MORE else []

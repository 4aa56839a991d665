"""The exercises' checks against mutants of the solutions; see tools/mutate.py, which also makes the scores."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("cosmic_ray", reason='cosmic-ray is not installed: pip install "llmcourse[dev]"')
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="every mutant runs in a fork")

from example_sheet import ROOT  # noqa: E402

from llmcourse.practice import checking  # noqa: E402

spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
mutate = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)

every_sheet = pytest.mark.parametrize("sheet", checking.sheets())

SOURCE = '''
def answer(x: float, y: "int | None" = 2) -> float:
    """What it does: 1 thing."""
    if x < 0:
        raise ValueError(f"{x + 1} is too small")
    return max(x, y)
'''


@pytest.mark.parametrize(
    "now",
    [
        "if x <= 0:", "if x > 0:", "if not x < 0:", "if x < 1:", "if x < -1:", "if True:", "if False:",
        'pass # raise ValueError(f"{x + 1} is too small")', "return min(x, y)", "return max(x)",
        "return max(y)", "pass # return max(x, y)", 'def answer(x: float, y: "int | None" = 3) -> float:',
    ],
)  # fmt: skip
def test_kinds_of_change(now: str) -> None:
    assert now in {m.now for m in mutate.mutants(SOURCE)}


def test_what_no_check_can_see_is_not_changed() -> None:
    """Annotations, docstrings and the texts of errors."""
    shown = [m.now for m in mutate.mutants(SOURCE)]
    assert len(shown) == len(set(shown)), "every change once"
    assert not [s for s in shown if "thing" in s or "x - 1" in s or "x + 2" in s or "&" in s]


@pytest.mark.parametrize(
    ("source", "alive"),
    [
        ("def n(x):\n    return x + 1", False),
        ("def n(x):\n    return x + 2", True),
        ("def n(x):\n    return 0 + x + 2", True),
        ("def n(x):\n    while True: pass", False),
        ("def n(x):\n    import os; os._exit(7)", False),
        ("def n(x):\n    return torch.empty(2**40)", False),
        ("def n(x:", False),
    ],
)
def test_killed_or_alive(source: str, alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless loops, exits and crashes of a mutant are deaths of that mutant only."""
    solution = "def n(x):\n    return x + 2"
    module = SimpleNamespace(__file__="")
    exec("import torch\n" + solution, vars(module))
    monkeypatch.setitem(sys.modules, "mutated", module)
    ex = checking.Exercise("s.n", "", 1, 1, 1, ("", "", ""), 5.0, "mutated")
    monkeypatch.setattr(checking.Exercise, "section", lambda self, kind: solution)
    ex.cases(lambda: [checking.case("three", 3)])
    mutant = mutate.Mutant(source, 1, "", "")
    assert mutate.survivors(ex, [mutant]) == ([mutant] if alive else [])


@every_sheet
def test_every_mutant_is_found_out(sheet: str) -> None:
    """The committed scores belong to the masters as they are, and nothing survives without a reason."""
    said = mutate.old_or_bad(sheet)
    assert not said, "\n".join(said)


@every_sheet
def test_a_sample_of_the_mutants(sheet: str) -> None:
    """The score was not made up: of some mutants of every exercise the same ones survive today."""
    kept = mutate.read_scores(sheet)
    for ex in checking.load_sheet(sheet).values():
        recorded = {m["now"] for m in kept[ex.name]["survivors"]} | set(ex.equivalent)
        alive = {m.now for m in mutate.survivors(ex, mutate.sample(ex, 1))}
        assert alive <= recorded, ex.id


def test_reasons_are_reasons() -> None:
    for sheet in checking.sheets():
        for ex in checking.load_sheet(sheet).values():
            for line, reason in ex.equivalent.items():
                assert line and len(reason) >= 15, f"{ex.id}: {line}: {reason!r}"

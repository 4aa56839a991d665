"""The reference of the package: in step with the sources, nothing left out, nothing without words.

tools/reference.py reads the sources without importing them; here what it says is held against the imported package.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import book_rules as rules
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import form
import reference

CELLS = {c["id"]: rules.text(c["source"]) for c in rules.load(ROOT / "nbs" / reference.PAGE)["cells"]}
# needs nbgrader, which is not everywhere
OPTIONAL = {"practice.classroom"}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package of one module of one's own: small(text) makes its cell."""
    monkeypatch.setattr(reference, "PACKAGE", tmp_path)
    reference.modules.cache_clear()

    def make(text: str) -> str:
        (tmp_path / "thing.py").write_text(text, encoding="utf8")
        reference.modules.cache_clear()
        return reference.section(reference.modules()["thing"])

    yield make
    reference.modules.cache_clear()


@pytest.fixture(scope="module")
def made():
    return reference.page()


def test_the_page_is_in_step_with_the_sources(made) -> None:
    now = {c["id"]: c["source"] for c in made.cells if c["id"] != "front"}  # there form.py writes the minutes
    old = {name: words for name, words in CELLS.items() if name not in ("front", "head", "foot")}
    stale = [name for name in sorted(now.keys() | old.keys()) if now.get(name) != old.get(name)]
    assert stale == [], "run: python tools/reference.py"


def test_every_public_name_says_what_it_is() -> None:
    assert reference.silent() == []


def test_the_page_has_every_name_of_the_imported_modules() -> None:
    for name, module in reference.modules().items():
        if name and module.public and name not in OPTIONAL:
            imported = importlib.import_module(f"llmcourse.{name}")
            assert module.public == list(imported.__all__), name
            shown = re.findall(r'<span id="([\w-]+)"></span>', CELLS[f"module-{name.replace('.', '-')}"])
            assert shown == [reference.anchor(module, n) for n in module.public], name
    import llmcourse

    assert reference.modules()[""].public == [n for n in llmcourse.__all__ if n != "passes"] + ["passes"]
    for name, where in llmcourse._PUBLIC.items():
        assert f"[{name}](#" in CELLS["module-names"] and f"[{where}](#{where})" in CELLS["module-names"]


def shown_arguments(text: str) -> list[str]:
    """The names of the arguments in `(a: int, *, b: str = ', (')`."""
    names, depth, part, quote = [], 0, "", ""
    for c in text:
        quote = ("" if c == quote else quote) if quote else c if c in "'\"" else ""
        depth += 0 if quote else (c in "([{") - (c in ")]}")
        if depth == 0:
            break
        if depth == 1 and not quote and c == ",":
            names, part = [*names, part], ""
        elif not (depth == 1 and c == "(" and not part):
            part += c
    names = [re.match(r"\s*\**(\w*)", n)[1] for n in [*names, part]]
    return [n for n in names if n]


def test_signatures_are_those_of_the_imported_names() -> None:
    """Of every function, and of every class that Python itself can tell the arguments of."""
    seen = 0
    for name, module in reference.modules().items():
        if not name or not module.public or name in OPTIONAL:
            continue
        imported, cell = importlib.import_module(f"llmcourse.{name}"), CELLS[f"module-{name.replace('.', '-')}"]
        for n in module.public:
            thing = getattr(imported, n)
            own = n in module.definitions and isinstance(
                module.definitions[n], (*reference.FUNCTIONS, reference.ast.ClassDef)
            )
            if not own or not callable(thing) or getattr(thing, "_is_protocol", False) or inspect.isabstract(thing):
                continue
            try:
                want = [p for p in inspect.signature(thing).parameters if not p.startswith("_")]
            except (TypeError, ValueError):
                continue
            told = re.search(rf'<span id="{reference.anchor(module, n)}"></span>\*\*.*?\*\*`+ ?(\(.*)', cell)
            got = shown_arguments(told[1]) if told else []
            if inspect.isclass(thing) and not got:
                continue  # a class that takes what its base outside the package takes
            assert got == want, f"{name}.{n}"
            seen += 1
    assert seen > 700


def test_links_to_the_sections_that_make_a_name() -> None:
    assert "14_quantization.ipynb#the-same-thing-fast" in CELLS["module-quantization"]
    both = CELLS["module-pruning"]  # two chapters write it
    assert "12_pruning.ipynb#" in both and "12b_structure.ipynb#" in both
    assert "No notebook makes these modules" in CELLS["module-hand"]
    order = list(CELLS)
    assert order.index("module-runtime") < order.index("module-quantization") < order.index("module-hand")
    assert order.index("module-hand") < order.index("module-cli" if "module-cli" in CELLS else "module-store")
    for chapter, modules in (("14_quantization", ["quantization"]), ("12b_structure", ["pruning"]), ("index", [])):
        assert form.exports(f"{chapter}.ipynb") == modules
        head = next(c for c in rules.load(ROOT / "nbs" / f"{chapter}.ipynb")["cells"] if c["id"] == "head")
        link = "".join(f"[{m}]({reference.PAGE}#{m})" for m in modules)
        assert (f"**Reference:** {link}" if link else "**Reference:**") in rules.text(head["source"]) or not link


def test_every_command_is_there() -> None:
    from llmcourse.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    shown = re.findall(r"^\| `llmcourse ([\w-]+)` \| (.*) \|$", CELLS["module-shell"], re.M)
    assert {name for name, _ in shown} == commands and all(words for _, words in shown)


THING = '''"""A module for the test."""
from dataclasses import dataclass

__all__ = ["LIMIT", "Point", "measure"]
# how many at most
LIMIT = 3


@dataclass
class Base:
    """Not public."""
    left: int  # on the left


@dataclass
class Point(Base):
    """A place."""
    right: float = 0.5

    def move(self, by: int) -> "Point":
        """Move it on."""


def measure(x: int, *more: int, unit: str = "m", **options) -> float:
    """Words with a <tag>, a * and an _underscore_.

    Args:
        x: first line
            and its second line.
        unit: `m` or `km`.
    Returns:
        a number.
    Raises:
        BadInput: always.
    """
'''


def test_what_a_module_looks_like(small) -> None:
    text = small(THING)
    for words in (
        "### thing\n\nA module for the test.",
        "<details><summary>3 names: LIMIT, Point, measure</summary>",
        '<span id="thing-LIMIT"></span>**LIMIT**`= 3`: how many at most',
        "**Point**`(left: int, right: float = 0.5)` *(class, extends `Base`)*: A place.\n\n* `left`: on the left\n"
        "* **.move**`(by: int) → 'Point'`: Move it on.",
        "**measure**`(x: int, *more: int, unit: str = 'm', **options) → float`: "
        "Words with a &lt;tag&gt;, a \\* and an \\_underscore\\_.\n\n"
        "* `x`: first line and its second line.\n* `unit`: `m` or `km`.\n* *Returns:* a number.\n"
        "* *Raises* `BadInput`: always.",
    ):
        assert words in text, text


def test_what_is_missing_is_found(small) -> None:
    small(THING.replace('    """Move it on."""', "        pass"))
    assert reference.silent() == []  # of methods, those without words are listed by name
    small(THING.replace('    """A place."""\n', ""))
    assert reference.silent() == ["llmcourse.thing.Point"]
    with pytest.raises(SystemExit, match="names nothing_of_it, and nothing there makes it"):
        small(THING.replace('"measure"]', '"measure", "nothing_of_it"]'))


def test_a_page_that_is_out_of_date_is_told(made, tmp_path: Path) -> None:
    page, stale = made.copy(), []
    form.write(tmp_path / reference.PAGE, page, False, stale)
    page.cells[1].source += " More."
    stale.clear()
    form.write(tmp_path / reference.PAGE, page, True, stale)
    assert stale == [f"nbs/{reference.PAGE}"]
    assert "More." not in (tmp_path / reference.PAGE).read_text(encoding="utf8")

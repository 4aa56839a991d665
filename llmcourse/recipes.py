"""Recipes of a job: which passes are applied, in which arms, and which arm is delivered.

Hand-written. Reading a recipe checks names and types without torch; `Arm.build` makes the passes themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse import passes
from llmcourse.schema import parse, read_toml
from llmcourse.settings import BadInput, Settings, course_root, one_of, require

__all__ = ["Arm", "Recipe", "find_recipe", "load_recipe"]

DENSE = "dense"


def _title(what: str, text: str, longest: int) -> None:
    """Names go into tables, pages, file names and terminals: no control characters, no markup, not endless."""
    good = 0 < len(text) <= longest and text.isprintable() and not set(text) & set("<>&`") and text.strip() == text
    require(good, what, text, f"a text of 1 to {longest} characters without control characters, <, >, & and `")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compress the model: passes that are applied one after the other."""

    name: str
    passes: tuple[dict[str, Any], ...]

    def __post_init__(self):
        _title("name", self.name, 60)
        letters = any(c.isalnum() for c in self.name)
        require(letters and self.slug != f"arm-{DENSE}", "name", self.name, f"a text with a letter, not {DENSE!r}")
        require(len(self.passes) > 0, "passes", [], 'one or more tables like {method = "gptq", bits = 4}')
        for table in self.passes:
            method = table.get("method")
            require(isinstance(method, str), "method", method, 'the name of a method, such as "gptq"')

    @property
    def slug(self) -> str:
        """The name of the arm's folder among the job's scratch."""
        return "arm-" + "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")

    def build(self, settings: Settings, *, layers: str | None = None) -> list:
        """The pass objects. Where the recipe does not say it: calibration size and seed of the settings.

        Args:
            layers: a glob over names of layers, for every pass that treats layers.
        """
        return [self._build(dict(table), settings, layers) for table in self.passes]

    def _build(self, table: dict[str, Any], settings: Settings, layers: str | None) -> Any:
        known, where = passes(), f"arm {self.name!r}"
        cls = known[one_of(f"method in {where}", table.pop("method"), known)]
        defaults = {
            "n_calib": settings.scale.calib_sequences,
            "seq_len": settings.scale.calib_length,
            "seed": settings.seed,
            "layers": layers,
        }
        fields = {f.name for f in dataclasses.fields(cls)}
        return parse(cls, {k: v for k, v in defaults.items() if k in fields and v is not None} | table, where)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a job does: the arms that are compared, and which one is delivered."""

    name: str
    description: str
    deliver: str
    arms: tuple[Arm, ...]

    def __post_init__(self):
        _title("name", self.name, 60)
        require(self.description.isprintable(), "description", self.description, "a text without control characters")
        require(len(self.arms) > 0, "arm", [], "one or more [[arm]] tables")
        slugs = [arm.slug for arm in self.arms]
        names = [arm.name for arm in self.arms]
        require(len(set(slugs)) == len(slugs), "names of the arms", names, "names that differ in their letters")
        one_of("deliver", self.deliver, names)

    def pairs(self) -> list[tuple[Arm, Arm]]:
        """(arm, baseline) for arms that store the same and differ in how the values are chosen."""
        methods = ("method", "act_order", "damping", "block_size", "n_calib", "seq_len", "seed")
        stored = [[{k: v for k, v in p.items() if k not in methods} for p in arm.passes] for arm in self.arms]
        n = len(self.arms)
        return [(self.arms[j], self.arms[i]) for i in range(n) for j in range(i + 1, n) if stored[i] == stored[j]]


@dataclass(frozen=True, kw_only=True)
class _File:
    """A recipe file as it is written."""

    name: str
    deliver: str
    arm: list[dict[str, Any]]
    description: str = ""


def find_recipe(name: str | Path, kind: str | None = None) -> Path:
    """The recipe file: a path, or the name of one that comes with the course.

    Args:
        kind: compress (in `recipes/`), or pretrain, finetune, sweep, capstone (in folders of these names); None: all.
    """
    recipes = course_root() / "recipes"
    folders = {"compress": recipes} | {k: recipes / k for k in ("pretrain", "finetune", "sweep", "capstone")}
    shipped = [p for k, folder in folders.items() if kind in (None, k) for p in sorted(folder.glob("*.toml"))]
    names = ", ".join(p.stem for p in shipped)
    require("\0" not in str(name), "recipe", str(name), f"the path of a .toml file, or one of {names}")
    if Path(name).is_file():
        return Path(name)
    for candidate in shipped:
        if str(name) in (candidate.stem, candidate.name, candidate.relative_to(course_root()).as_posix()):
            return candidate
    raise BadInput(f"recipe is {str(name)!r}; allowed: the path of a .toml file, or one of {names}.")


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Every complaint names the key, the value and what is allowed."""
    raw: Mapping[str, Any] = read_toml(path)
    file = parse(_File, raw, "recipe")
    arms = tuple(parse(Arm, table, _where(i, table)) for i, table in enumerate(file.arm, 1))
    try:
        return Recipe(name=file.name, description=file.description, deliver=file.deliver, arms=arms)
    except BadInput as e:
        raise BadInput(f"recipe {str(path)!r}: {e}") from e


def _where(number: int, table: Mapping[str, Any]) -> str:
    name = table.get("name")
    return f"arm {name!r}" if isinstance(name, str) and name.isprintable() else f"[[arm]] number {number}"

"""What a reader of a finished project would stumble over: `python -m llmcourse.practice.project DIR/result`.

Hand-written. It repeats what can be repeated from the folder alone, without a model: the digests of the files, the
recipe, the rule of the choice, the words of the verdicts, the conclusion. It marks nothing that takes judgment, and it
proves nothing against somebody who writes a whole folder by hand: its use is that an honest one is whole.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcourse.settings import BadInput, read_text, require

__all__ = ["main", "project_faults"]


def project_faults(folder: str | Path) -> list[str]:
    """One sentence for everything in the folder of `llmcourse capstone` that does not fit the rest; none: all fits.

    Raises:
        BadInput: no folder, or one without the numbers that the command writes.
    """
    from llmcourse.capstone import NUMBERS, REPORT

    folder = Path(folder)
    file = folder / NUMBERS
    require(file.is_file(), "folder", str(folder), f"the folder `result` of llmcourse capstone, with {NUMBERS}")
    found = list(_files(folder))
    try:
        job = json.loads(read_text(file, NUMBERS))
        for part in (_recipe(job), _choice(job), _verdicts(job), _model(job, folder), _told(job, folder / REPORT)):
            found += part
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        if isinstance(e, BadInput):
            raise
        found.append(f"{NUMBERS} is not as the command writes it ({type(e).__name__}: {e}).")
    return found


def _files(folder: Path) -> Iterator[str]:
    from llmcourse.store import MANIFEST, manifest_faults

    for where in (folder, folder / "model"):
        if where == folder or (where / MANIFEST).is_file():
            yield from (f"The folder {where.name} {fault}." for fault in manifest_faults(where))


def _recipe(job: dict[str, Any]) -> Iterator[str]:
    """Whether the recipe inside is one that the command accepts, and the one that the table is of."""
    from llmcourse.capstone import load_capstone_recipe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.toml")
        file.write_text(job["recipe"], encoding="utf8")
        try:
            recipe = load_capstone_recipe(file)
        except BadInput as e:
            yield f"The recipe inside is not accepted: {e}"
            return
    arms, rows = [c.arm.name for c in recipe.candidates], [r["name"] for r in _compressed(job)]
    if arms != rows:
        yield f"The recipe has the arms {', '.join(arms)}, and the table the models {', '.join(rows) or 'none'}."
    if dataclasses.asdict(recipe.choose) != job["bounds"]:
        yield f"The recipe states the bounds {dataclasses.asdict(recipe.choose)}, and the numbers say {job['bounds']}."


def _compressed(job: dict[str, Any]) -> list[dict]:
    return [r for r in job["rows"] if r["compressed"]]


def _choice(job: dict[str, Any]) -> Iterator[str]:
    """Whether the rule, applied to the stored numbers, chooses what is delivered."""
    from llmcourse.capstone import Bounds, choose

    chosen = choose(_compressed(job), Bounds(**job["bounds"]))
    if chosen != job["chosen"]:
        yield f"By the rule {_name(chosen)} is chosen, and the numbers say {_name(job['chosen'])}."
    if job["delivered"] != (job["chosen"] or job["reference"]):
        yield f"{job['delivered']} is delivered, and {_name(job['chosen'])} was chosen."


def _name(name: str | None) -> str:
    return "none of the models" if name is None else name


def _verdicts(job: dict[str, Any]) -> Iterator[str]:
    """Whether ratios belong to the perplexities, and words to the intervals."""
    rows = {r["name"]: r for r in job["rows"]}
    for row in job["rows"]:
        costs = [(part, text, cost) for part in ("val", "test") for text, cost in row[part].items()]
        for part, text, cost in costs:
            where = f"{row['name']} on the {part} part of {text}"
            value, low, high, limit = (cost[key] for key in ("value", "low", "high", "limit"))
            if not low <= value <= high:
                yield f"{where}: {value:.6g} is not between {low:.6g} and {high:.6g}."
            if limit != job["bounds"][cost["bound"]]:
                yield f"{where}: the bound is {limit:g}, and should be {job['bounds'][cost['bound']]:g}."
            decided = cost["level"] is not None and (high <= limit or low > limit)
            word = "not decided" if not decided else "within" if high <= limit else "above"
            if word != cost["word"]:
                yield f"{where}: {low:.6g} to {high:.6g} and the bound {limit:g} are {word!r}, not {cost['word']!r}."
            if part == "test":
                ratio = row["perplexity"][text]["value"] / rows[cost["base"]]["perplexity"][text]["value"]
                if not math.isclose(ratio, value, rel_tol=1e-6):
                    yield f"{where}: the ratio is {value:.6g}, and the perplexities make {ratio:.6g}."


def _model(job: dict[str, Any], folder: Path) -> Iterator[str]:
    """Whether the model beside the numbers has the bytes of the chosen one."""
    from llmcourse.compression import disk_bytes

    for row in _compressed(job):
        if row["name"] == job["delivered"]:
            try:
                there = disk_bytes(folder / "model")
            except BadInput as e:
                yield str(e)
                continue
            if there != row["bytes_disk"]:
                name, told = row["name"], row["bytes_disk"]
                yield f"The model in the folder has {there:,} bytes of weights, and {name} of the table {told:,}."


def _told(job: dict[str, Any], report: Path) -> Iterator[str]:
    """Whether the conclusion is what the numbers give, and the report says it."""
    from llmcourse.capstone_report import conclusion

    if conclusion(job) != job["conclusion"]:
        yield f"The conclusion should read: {conclusion(job)}"
    plain = lambda text: " ".join(html.unescape(text).split())
    if report.is_file() and plain(job["conclusion"]) not in plain(report.read_text(encoding="utf8", errors="replace")):
        yield f"{report.name} does not say the conclusion of the numbers."


def main(argv: list[str] | None = None) -> int:
    """Print what does not fit; 0: all fits, 1: something does not, 2: not a folder of the command."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m llmcourse.practice.project", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder result that llmcourse capstone has made")
    folder = parser.parse_args(argv).folder
    try:
        faults = project_faults(folder)
    except BadInput as e:
        print(e, file=sys.stderr)
        return 2
    print("\n".join(f"- {fault}" for fault in faults) or "Files, recipe, choice, words and conclusion fit together.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

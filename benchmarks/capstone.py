"""The capstone on the real model: `llmcourse capstone` with its recipe, kept for the chapter.

    python benchmarks/capstone.py [--out build/capstone] [--device cuda --scale gpu]

About half an hour on two cores; a run that was stopped goes on where it was. Times are taken in one step: to
take them again on a quiet machine, remove `steps/speed.json` and `result` from the folder. The chapter
`nbs/18_capstone.ipynb` reads `nbs/_results/capstone.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from shared import machine, save

from llmcourse.capstone import NUMBERS, capstone, load_capstone_recipe
from llmcourse.capstone_report import print_capstone
from llmcourse.recipes import find_recipe
from llmcourse.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="finance")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "capstone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", default="cpu")
    args = parser.parse_args()
    settings = load_settings(overrides={"device": args.device, "scale": args.scale})
    recipe = load_capstone_recipe(find_recipe(args.recipe, "capstone"))
    command = f"llmcourse capstone {args.recipe}"
    folder = capstone(recipe, args.out, settings=settings, command=command, say=lambda line: print(line, flush=True))
    job = json.loads((folder / NUMBERS).read_text(encoding="utf8"))
    print_capstone(job)
    default = (args.recipe, args.device, args.scale) == ("finance", "cpu", "cpu")
    place = ROOT / "nbs" / "_results" / "capstone.json" if default else folder / "kept.json"
    save(job | {"machine": machine()}, place)
    print(place)


if __name__ == "__main__":
    main()

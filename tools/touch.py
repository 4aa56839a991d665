"""Make the figures that can be moved anew from the data that the notebooks hold, without running a chapter.

python tools/touch.py            after a change in llmcourse/touch.py or llmcourse/templates/touch
python tools/touch.py --check    change nothing; exit 1 when a figure is not what the package would make of its data

A figure whose data or controls change needs its cell: python tools/notebooks.py NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def main(*, check: bool) -> int:
    from llmcourse.touch_figures import redrawn

    stale = []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        if "llmcourse-touch" not in path.read_text(encoding="utf8"):
            continue
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            for output in cell.get("outputs", []):
                html = output.get("data", {}).get("text/html", "")
                if html.startswith('<div class="llmcourse-touch"') and (new := redrawn(html)) != html:
                    output.data["text/html"] = new
                    stale.append(f"nbs/{path.name}, cell {cell.id}")
        if any(path.name in name for name in stale) and not check:
            path.write_text(nbformat.writes(nb, version=4).rstrip("\n") + "\n", encoding="utf8")
    for name in stale:
        print(f"{name} is not as the package draws it" if check else f"wrote {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv))

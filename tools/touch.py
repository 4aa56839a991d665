"""Make the figures that can be moved anew from the data that the notebooks hold, without running a chapter.

python tools/touch.py            after a change in llmcourse/touch.py or llmcourse/templates/touch
python tools/touch.py --check    change nothing; exit 1 when a figure is not what the package would make of its data

A figure whose data or controls change needs its cell: python tools/notebooks.py NAME.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURE = '<div class="llmcourse-touch"'


def main(*, check: bool) -> int:
    from llmcourse.touch_figures import redrawn

    stale = []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        text = path.read_text(encoding="utf8")
        nb, before = json.loads(text) if "llmcourse-touch" in text else {"cells": []}, len(stale)
        for cell in nb["cells"]:
            for output in cell.get("outputs", []):
                html = "".join(output.get("data", {}).get("text/html", ""))
                if html.startswith(FIGURE) and (new := redrawn(html)) != html:
                    output["data"]["text/html"] = new.splitlines(keepends=True)
                    stale.append(f"nbs/{path.name}, cell {cell['id']}")
        if len(stale) > before and not check:  # written as nbformat does
            path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf8")
    for name in stale:
        print(f"{name} is not as the package draws it" if check else f"wrote {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv))

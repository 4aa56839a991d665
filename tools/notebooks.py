"""Run notebooks, save their outputs, clean them, and write the measured minutes into their front matter.

python tools/notebooks.py            every notebook, in reading order
python tools/notebooks.py 14 index   those whose name contains one of the words
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run(notebook: Path) -> float:
    """Run one notebook alone, with its outputs saved; returns minutes."""
    start = time.time()
    # no limit for a cell: on a busy machine a long experiment is slow, and not wrong
    command = [BIN / "nbdev-test", "--save", "--n-workers", "0", "--cell-timeout", "0", str(notebook)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"{notebook.name} failed")
    minutes = (time.time() - start) / 60
    subprocess.run([BIN / "nbdev-clean", "--fname", str(notebook)], cwd=ROOT, check=True)
    return minutes


def main() -> None:
    words = sys.argv[1:]
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb"), key=lambda p: (p.stem == "index", p.name)):
        if words and not any(w in notebook.name for w in words):
            continue
        minutes = run(notebook)
        nb = nbformat.read(notebook, 4)
        # rounded up to half a minute: a promise, measured on this machine
        nb.cells[0].source = re.sub(
            r"(?m)^(\s*minutes-run:).*$", rf"\1 {max(1, -(-minutes * 2 // 1)) / 2:g}", nb.cells[0].source
        )
        nbformat.write(nb, notebook)
        print(f"{notebook.name}: {minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main()

"""What the benchmarks that time candidates in turn have in common: rows as text and as JSON, the machine, the file."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmcourse.runtime import Comparison
from llmcourse.store import write_atomic

RESULTS = Path(__file__).resolve().parent / "results"


def show_rows(results: Mapping[str, Comparison], width: int = 24) -> dict[str, dict]:
    """Print a line for each candidate of `llmcourse.runtime.compare`; the same as plain numbers."""
    rows = {}
    for name, c in results.items():
        rows[name] = {
            "ms": c.timing.median * 1e3,
            "quartiles_ms": [q * 1e3 for q in c.timing.quartiles],
            "ratio": c.ratio,
            "low": c.low,
            "high": c.high,
            "n": c.timing.n,
        }
        ends = f"({c.low:.2f} to {c.high:.2f})"
        print(f"   {name:{width}} {c.timing.median * 1e3:9.2f} ms   {c.ratio:.2f} × {ends}", flush=True)
    return rows


def machine(**more: Any) -> dict[str, Any]:
    """The machine without its name."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"cores": os.cpu_count(), "python": platform.python_version(), "load": load} | more


def keep(folder: Path, name: str, go: Callable[[], dict] | None = None) -> dict:
    """What `go` found, from its file where it has run before: a benchmark of hours goes on where it was."""
    file = folder / f"{name.replace(' ', '_')}.json"
    if go and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        found = go()
        write_atomic(file, json.dumps({"name": name, **found, "seconds": time.perf_counter() - start}))
        print(f"{name:<32}{time.perf_counter() - start:4.0f} s  {str(found)[:160]}", flush=True)
    return json.loads(file.read_text(encoding="utf8"))


def save(report: dict, out: Path) -> None:
    """Write the whole file or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    temporary.replace(out)

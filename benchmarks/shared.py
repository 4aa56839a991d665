"""What the benchmarks that time candidates in turn have in common: rows as text and as JSON, the machine, the file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcourse.runtime import Comparison

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


def save(report: dict, out: Path) -> None:
    """Write the whole file or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    temporary.replace(out)

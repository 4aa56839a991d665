"""What a learner has done: tries, hints and passes in one file of the course's root, and the table that shows them."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse.practice.cards import Result
from llmcourse.practice.exercises import load_sheet, sheets
from llmcourse.settings import BadInput, require
from llmcourse.store import write_atomic

PROGRESS_FILE = ".llmcourse-progress.json"


def _learner_folder() -> Path:
    """Where progress is kept: the course's root, so that all its sheets share one file; outside a course, this folder.

    The root is the nearest folder above with the course's settings, or a clone or copy that has its `exercises`.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        own = folder / "settings.ini"
        if own.is_file() and re.search(r"^\[llmcourse\]", own.read_text(encoding="utf8", errors="replace"), re.M):
            return folder
        if any((folder / "exercises").glob("[0-9][0-9]*_*/*.ipynb")) or (folder / PROGRESS_FILE).is_file():
            return folder
    return here


def _sheets_at_hand() -> list[str]:
    """All sheets; those that lie in this folder first."""
    here = Path.cwd()
    return sorted(sheets(), key=lambda name: not (here / f"{name}.ipynb").is_file())


class Progress:
    """What the learner has done, in one JSON file of the learner's folder.

    Every change reads the file, merges and replaces it in one step under a lock, so that two notebooks can write and a
    crash leaves the old file or the new one. Entries are kept by exercise id: replacing a sheet loses nothing.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else _learner_folder() / PROGRESS_FILE

    def read(self) -> dict[str, dict]:
        """The entries by exercise id. A damaged file is set aside beside itself, not deleted, and counts as empty."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8-sig"))
            entries = data["exercises"]
            if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
                raise TypeError
            return entries
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, RecursionError):
            with contextlib.suppress(OSError):
                os.replace(self.path, self.path.with_suffix(f".damaged-{time.strftime('%Y%m%d-%H%M%S')}.json"))
            return {}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, dict]]:
        from filelock import FileLock

        with FileLock(str(self.path) + ".lock", timeout=5):
            entries = self.read()
            yield entries
            text = json.dumps({"version": 1, "exercises": dict(sorted(entries.items()))}, indent=1) + "\n"
            write_atomic(self.path, text)

    def record(self, result: Result) -> None:
        """One more attempt; a pass is never taken back, and tries after it do not count."""
        if result.status == "not started":
            return
        with self._changing() as entries:
            e = entries.setdefault(result.id, {})
            e["last"] = result.status
            if not e.get("passed"):
                e["attempts"] = _whole(e.get("attempts")) + 1
                if result.passed:
                    e["passed"] = time.strftime("%Y-%m-%d")

    def add(self, id: str, what: str, *, limit: int) -> int:
        """Count one more hint or reveal, up to `limit`; returns the count."""
        try:
            with self._changing() as entries:
                e = entries.setdefault(id, {})
                e[what] = min(_whole(e.get(what)) + 1, limit)
                return e[what]
        except OSError:
            return 1

    def merge(self, other: str | Path) -> None:
        """Take over another progress file: of each entry the larger counts, and the earlier pass."""
        try:
            theirs = json.loads(Path(other).read_text(encoding="utf-8-sig"))["exercises"]
            require(
                all(isinstance(e, dict) for e in theirs.values()), "progress file", str(other), "a file of progress"
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadInput(f"progress file is {str(other)!r}; allowed: a {PROGRESS_FILE} of the course.") from None
        with self._changing() as entries:
            for id, new in theirs.items():
                e = entries.setdefault(id, {})
                for key, value in new.items():
                    if key == "passed":
                        e[key] = min(str(value), str(e.get(key) or value))
                    elif isinstance(value, int):
                        e[key] = max(value, _whole(e.get(key)))
                    else:
                        e.setdefault(key, value)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


@dataclass(frozen=True)
class Overview:
    """All exercises with what the learner did; shows itself as a table."""

    rows: tuple[dict, ...]

    @property
    def points(self) -> tuple[int, int]:
        return sum(r["points"] for r in self.rows if r["status"] == "passed"), sum(r["points"] for r in self.rows)

    @property
    def verdict(self) -> str:
        got, of = self.points
        passed = sum(r["status"] == "passed" for r in self.rows)
        return f"{passed} of {len(self.rows)} exercises passed, {got} of {of} points"

    def to_dict(self) -> dict:
        return {"points": self.points[0], "max_points": self.points[1], "exercises": list(self.rows)}

    def __repr__(self) -> str:
        wide = max((len(r["id"]) for r in self.rows), default=2)
        lines = [
            f"{r['id']:<{wide}}  {r['status']:<11}  {r['attempts']:>3} tries  {r['hints']} hints"
            + ("  solution seen" if r["reveals"] else "")
            for r in self.rows
        ]
        return "\n".join([self.verdict, "", *lines])

    def _repr_html_(self) -> str:
        head = "".join(
            f'<th scope="col" style="text-align:left">{h}</th>'
            for h in ("Exercise", "Status", "Tries", "Hints", "Solution seen")
        )
        body = "".join(
            f'<tr><th scope="row" style="text-align:left;font-weight:400">{html.escape(r["id"])}<br>'
            f"<small>{html.escape(r['title'])}</small></th>"
            f'<td style="text-align:left">{"✓ " if r["status"] == "passed" else ""}{r["status"]}</td>'
            f"<td>{r['attempts']}</td><td>{r['hints']}</td>"
            f'<td style="text-align:left">{"yes" if r["reveals"] else "no"}</td></tr>'
            for r in self.rows
        )
        table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        caption = f'<caption style="text-align:left">{self.verdict}</caption>'
        return f'<div role="status"><table>{caption}{table}</table></div>'


def overview(sheet: str | None, path: str | Path | None = None) -> Overview:
    entries = Progress(path).read()
    rows = []
    for name in [sheet] if sheet else _sheets_at_hand():
        for ex in load_sheet(name).values():
            e = entries.get(ex.id, {})
            status = "passed" if e.get("passed") else "not yet" if _whole(e.get("attempts")) else "not started"
            counts = {name: _whole(e.get(name)) for name in ("attempts", "hints", "reveals")}
            rows.append(dict(id=ex.id, title=ex.title, status=status, points=ex.points) | counts)
    return Overview(tuple(rows))

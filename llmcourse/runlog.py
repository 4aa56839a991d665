"""An append-only log of runs: one JSON object a line, one line a run.

Hand-written; the chapter `nbs/10b_search.ipynb` uses it. A line is written by one call of `write` on a file that is
open for appending, under a lock: the lines of two processes do not mix, and what a crash leaves is at most one line
without its end, which is never taken for a whole one.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from llmcourse.settings import BadInput, require, whole

__all__ = ["RunLog", "Runs", "columns", "parallel_coordinates", "surroundings", "to_tensorboard"]


class Runs(NamedTuple):
    """What a log holds."""

    rows: list[dict[str, Any]]
    broken: list[int]
    """numbers of the lines, from 1, that are no whole entry: what a crash has left"""


@contextmanager
def _locked(path: Path, wait: float) -> Iterator[None]:
    """Only one process writes; the system gives the lock back when its owner is killed."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=wait):
            yield
    except Timeout:
        raise BadInput(f"log is {str(path)!r}, which another process holds; allowed: a file that is free.") from None


def surroundings() -> dict[str, Any]:
    """Code, versions and hardware: what a number depends on and no configuration tells."""
    from llmcourse import __version__
    from llmcourse.jobs import digests_of_code

    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "optuna"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    hardware = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}
    if "torch" in sys.modules:  # only then can it have been used
        import torch

        hardware |= {"threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            hardware["gpu"] = torch.cuda.get_device_name()
    return {"code": digests_of_code()[:16], "llmcourse": __version__, "versions": versions, "hardware": hardware}


def _jsonable(what: str, table: Mapping[str, Any]) -> dict[str, Any]:
    require(isinstance(table, Mapping), what, table, "a table")
    for key, value in table.items():
        fine = isinstance(key, str) and key != ""
        require(fine, f"key of {what}", key, "a text that is not empty")
        simple = value is None or isinstance(value, bool | int | float | str)
        require(simple, f"{what}[{key!r}]", value, "a number, a text, true, false or nothing")
    # JSON has no nan and no infinity, and a run that diverged belongs in the log: they are written as texts
    finite = lambda v: str(v) if isinstance(v, float) and not math.isfinite(v) else v
    return {key: finite(value) for key, value in table.items()}


class RunLog:
    """A file of runs that only grows.

    Args:
        path: of the file; its folder must exist. A log of an earlier day goes on.
        wait: seconds to wait for another process that is writing.
    """

    def __init__(self, path: str | Path, *, wait: float = 10.0):
        self.path, self.wait = Path(path), wait
        usable = self.path.parent.is_dir() and not self.path.is_dir()
        require(usable, "path", str(path), "a file, in a folder that exists")

    def append(
        self, config: Mapping[str, Any], metrics: Mapping[str, Any], *, seed: int, about: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """Write one run; returns its entry.

        Args:
            config, metrics: tables of numbers and texts.
            about: more tables or values for the entry, e.g. `{"trial": 3}`.
        Raises:
            BadInput: a value that is no number or text, or a log that another process holds; nothing is written.
        """
        entry = {"config": _jsonable("config", config), "metrics": _jsonable("metrics", metrics)}
        entry |= {"seed": whole("seed", seed, 0), "about": _jsonable("about", about)} | surroundings()
        entry["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with _locked(self.path, self.wait):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                # a crash has left a line without its end: close it, or ours would become a part of it
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line
                written = os.write(descriptor, line)
                if written != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes could be written to {self.path}")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return entry

    def read(self) -> Runs:
        """All whole entries, and the numbers of the lines that are none."""
        if not self.path.exists():
            return Runs([], [])
        *lines, rest = self.path.read_bytes().split(b"\n")
        rows, broken = [], []
        for i, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                rows.append(entry) if isinstance(entry, dict) and "metrics" in entry else broken.append(i)
            except ValueError:
                broken.append(i)
        return Runs(rows, broken + [len(lines) + 1] * bool(rest))  # without its end it is not whole, even if it parses


def columns(runs: Runs | Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The log as a table: name of a column → one value per run, None where a run has none.

    Columns of the configuration begin with "config.", metrics with "metrics."; seed, code and time keep their names.
    """
    rows = runs.rows if isinstance(runs, Runs) else list(runs)
    flat = [
        {f"config.{k}": v for k, v in row["config"].items()}
        | {f"metrics.{k}": v for k, v in row["metrics"].items()}
        | {k: row.get(k) for k in ("seed", "code", "time")}
        for row in rows
    ]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name) for row in flat] for name in names}


def parallel_coordinates(
    table: Mapping[str, Sequence], names: Sequence[str], value: str, *, alt: str, log: Sequence[str] = ()
) -> Any:
    """One line per run through one axis per setting, colored by a result.

    Args:
        table: as `columns` gives it.
        names: the columns that become axes; texts are placed in the order of their names.
        value: a column of numbers, which becomes the last axis and the color.
        log: those of the axes that are logarithmic.
        alt: what the picture shows, for those who do not see it.
    Returns:
        A figure.
    """
    import numpy as np

    from llmcourse.plotting import new_figure, style

    axes = [*names, value]
    for name in (*axes, *log):
        require(name in table, "column", name, ", ".join(table))
    rows = [i for i in range(len(table[value])) if all(_number(table[a][i]) or a in names for a in axes)]
    rows = [i for i in rows if all(table[a][i] is not None for a in axes)]
    require(len(rows) >= 2, "runs", len(rows), "at least two that have all the columns, and finite results")
    places, labels = [], []
    for name in axes:
        cells = [table[name][i] for i in rows]
        if all(map(_number, cells)):
            x = np.array(cells, dtype=float)
            if name in log:
                require(x.min() > 0, name, x.min(), "numbers above 0 on a logarithmic axis")
            low, high = x.min(), x.max()
            scaled = np.log(x) if name in log else x
        else:
            order = sorted(map(str, set(cells)))
            scaled = np.array([order.index(str(c)) for c in cells], dtype=float)
            low, high = order[0], order[-1]
        width = np.ptp(scaled)
        places.append((scaled - scaled.min()) / width if width else np.full(len(rows), 0.5))
        labels.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in (low, high)])
    fig, grid = new_figure(alt)
    ax, lines, result = grid[0, 0], np.array(places).T, np.array([table[value][i] for i in rows], dtype=float)
    rank = result.argsort().argsort() / (len(rows) - 1)
    from matplotlib import colormaps

    with style():
        for k in result.argsort()[::-1]:  # the lowest on top
            ax.plot(range(len(axes)), lines[k], color=colormaps["viridis"](0.9 * rank[k]), lw=1.2, ls="-", alpha=0.8)
        for x, (low, high) in enumerate(labels):
            ax.axvline(x, color="0.5", lw=0.8, zorder=0)
            ax.text(x, -0.03, low, ha="center", va="top"), ax.text(x, 1.03, high, ha="center", va="bottom")
        ax.set_xticks(range(len(axes)), [name.split(".", 1)[-1].replace("_", " ") for name in axes])
        ax.tick_params(axis="x", pad=18, length=0)
        ax.set_yticks([]), ax.set_ylim(-0.02, 1.02), ax.grid(False)
        for side in ax.spines.values():
            side.set_visible(False)
    return fig


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def to_tensorboard(runs: Runs | Sequence[Mapping[str, Any]], folder: str | Path) -> Path:
    """Write event files that TensorBoard reads: one folder per run, with its settings and metrics.

    Raises:
        BadInput: tensorboard is not installed, no runs, or a folder that is not empty; nothing is written.
    """
    rows = runs.rows if isinstance(runs, Runs) else list(runs)
    folder = Path(folder)
    require(len(rows) > 0, "runs", 0, "at least one run")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "folder", str(folder), "a folder that does not exist yet, or an empty one")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("tracker is 'tensorboard'; allowed: after pip install 'llmcourse[tracking]'.") from None
    for i, row in enumerate(rows):
        with SummaryWriter(str(folder / f"run-{i:04d}"), filename_suffix=f".{i}") as writer:
            for name, value in row["metrics"].items():
                if _number(value):
                    writer.add_scalar(name, value, global_step=0)
            told = {k: row[k] for k in ("config", "seed", "code", "versions", "hardware", "time") if k in row}
            writer.add_text("run", "```json\n" + json.dumps(told, indent=1, ensure_ascii=False) + "\n```")
    return folder

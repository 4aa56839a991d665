"""The folder of one run that may be stopped and taken up again: whose it is, and whether its result is whole.

Hand-written plumbing of `pretrain` and `finetune`. The folder holds `recipe.json`, from which the run is known again,
what is kept on the way (checkpoints, a tokenizer), and at the end the result, which is written in one go.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcourse.settings import BadInput, require
from llmcourse.store import MANIFEST, manifest_faults

__all__ = ["is_made", "run_folder"]

FILE = "recipe.json"


@contextlib.contextmanager
def run_folder(out: str | Path, inputs: Mapping[str, Any], *, same: str, target: str, command: str) -> Iterator[Path]:
    """Hold `out` for one run: it is empty, or of an earlier run of the same inputs.

    Args:
        inputs: everything that the result follows from, as JSON: settings, and digests of texts and weights.
        same: how a complaint calls such a folder, e.g. "a folder of this recipe".
        target: the folder in `out` that the run writes at its end.
        command: how a complaint calls the other process that is at work there.
    Raises:
        BadInput: a folder of something else, or one in which another process is at work; nothing is written.
    """
    from filelock import FileLock, Timeout

    out, wanted = Path(out).expanduser(), json.dumps(inputs, default=str, sort_keys=True)
    usable = not out.exists() or out.is_dir()
    require(usable, "out", str(out), "a folder of an earlier run of this recipe, or an empty one")
    _check(out, wanted, same, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.parent / f".{out.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            allowed = "another folder"
            raise BadInput(f"out is {str(out)!r}, where another {command} is at work; allowed: {allowed}.") from None
        _check(out, wanted, same, target)  # another process may have begun another run in the meantime
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE).write_text(wanted, encoding="utf8")
        yield out


def _check(out: Path, wanted: str, same: str, target: str) -> None:
    told, result = out / FILE, out / target
    if told.is_file():
        require(told.read_text(encoding="utf8") == wanted, "out", str(out), f"{same}, or an empty one")
    else:
        empty = not out.exists() or not any(out.iterdir())
        require(empty, "out", str(out), "a folder of an earlier run of this recipe, or an empty one")
    ours = not result.exists() or (result / MANIFEST).is_file() or (result.is_dir() and not any(result.iterdir()))
    require(ours, "out", str(out), f"a folder in which {target} is ours, or absent: it is written at the end")


def is_made(target: Path) -> bool:
    """Whether the result is there, as a whole.

    Raises:
        BadInput: it is there, and damaged.
    """
    if not (target / MANIFEST).is_file():
        return False
    faults, what = " and ".join(manifest_faults(target)), target.name
    found = f"{target.parent}, whose {what} {faults}"
    require(not faults, "out", found, f"a whole {what}; remove that folder to write it anew")
    return True

"""The exercise machine: checks, hints and grades of the sheets in `exercises/`.

`checking` judges an answer in the learner's own process, `grading` judges a notebook in a process apart (`worker`),
`commands` are the shell commands, `classroom` is the adapter to nbgrader, `yearly` makes each year's sheets differ,
and `sheets` holds the checkers that are exported from the masters in `solutions/`. The lessons' modules do not depend
on any of it.
"""

from importlib import import_module as _import_module

__all__ = ["check", "hint", "progress", "reveal", "sheet_seed"]


def __getattr__(name: str):
    # looked up when it is used: the grader's child process puts a silent module in the place of `checking`
    if name == "sheet_seed":
        return _import_module(f"{__name__}.yearly").sheet_seed
    if name in __all__:
        return getattr(_import_module(f"{__name__}.checking"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])

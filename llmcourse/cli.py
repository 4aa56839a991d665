"""The command `llmcourse`.

Only typer and the settings are imported here: `llmcourse --help` must answer at once. Everything that needs torch is
imported inside the command that needs it. Exit codes: 0 done, 1 something broke, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmcourse import __version__
from llmcourse.practice import commands as practice
from llmcourse.settings import BadInput, course_root, load_settings, require

app = typer.Typer(
    name="llmcourse",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a language model smaller, and measure what was lost. The course itself is in the notebooks: llmcourse start DIR.",
)


def _say(line: str) -> None:
    print(line, flush=True)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"llmcourse {__version__}")
        raise typer.Exit


@app.command()
def tour(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("build/tour"),
    model: Annotated[str | None, typer.Option(help="Model to compress; by default the one of settings.ini.")] = None,
) -> None:
    """The main job in one go: measure the real model, compress it four ways, measure again, write a report."""
    settings = load_settings()
    _run(model or settings.model, "w4", out)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A name from `llmcourse data`, a folder, or a hub id.")],
    recipe: Annotated[str, typer.Option(help="A .toml file, or the name of a recipe that comes with the course.")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet, or an empty one.")],
) -> None:
    """Run a recipe on a model: writes a model folder, passport.json, a Pareto figure and report.html."""
    _run(model, recipe, out)


def _run(model: str, recipe: str, out: Path) -> None:
    from llmcourse.jobs import find_recipe, load_recipe, print_table, run_job

    settings = load_settings()  # a typing error is reported before torch is imported
    job = run_job(model, load_recipe(find_recipe(recipe, "compress")), out, settings=settings, say=_say)
    print_table(job)
    _say(f"Report: {out / 'report.html'}   model: {out} (loads with llmcourse.load_model)")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a recipe that comes with the course.")],
    out: Annotated[
        Path, typer.Option(help="Where tokenizer, checkpoints and the model go; a run that was stopped goes on there.")
    ],
) -> None:
    """Train a language model from nothing: tokenizer, weights, and a card with what was measured."""
    from llmcourse.jobs import find_recipe

    settings, path = (
        load_settings(),
        find_recipe(recipe, "pretrain"),
    )  # a typing error is reported before torch is imported
    from llmcourse.training import load_pretrain_recipe
    from llmcourse.training import pretrain as run

    folder = run(
        load_pretrain_recipe(path, settings.scale.name),
        out,
        settings=settings,
        say=_say,
        command=f"llmcourse pretrain {recipe} --out {out}",
    )
    _say(f"Card: {folder / 'README.md'}   model: {folder} (loads with llmcourse.load_model)")


@app.command()
def data(
    fetch: Annotated[
        list[str] | None, typer.Option(help="Prepare this model or data set (repeatable); 'all' for the whole catalog.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every prepared file with its digest.")] = False,
) -> None:
    """List the course's models and data with licence, origin, size and checksum; fetch or verify them."""
    from llmcourse.store import CATALOG, asset_folder, is_prepared, prepare
    from llmcourse.store import verify as verify_asset

    settings = load_settings()
    names = list(CATALOG) if fetch and "all" in fetch else list(fetch or ())
    for name in names:
        require(name in CATALOG, "fetch", name, "all, " + ", ".join(CATALOG))
    for i, name in enumerate(names, 1):
        head = f"[{i}/{len(names)}] "
        if (
            prepare(name, settings.home, say=lambda line, head=head: _say(head + line))
            and len(names) > 1
            and i == len(names)
        ):
            _say(f"{len(names)} of {len(names)} ready in {settings.home}")
    if names:
        return
    if verify:
        for name in CATALOG:
            if asset_folder(name, settings.home).exists():
                verify_asset(name, settings.home)
                _say(f"{name}: every file has its digest")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for head in ("name", "kind", "ready", "download", "licence", "origin", "sha256 of the package"):
        table.add_column(head, overflow="fold")
    for a in CATALOG.values():
        table.add_row(
            a.name,
            a.kind,
            "yes" if is_prepared(a.name, settings.home) else "no",
            "in the package" if a.bundled else f"{a.carrier.size / 1e6:.1f} MB",
            a.licence,
            a.origin,
            a.carrier.sha256,
        )
    console = Console(width=None if sys.stdout.isatty() else 320, highlight=False)  # a pipe has no width: fold nothing
    console.print(table)
    for a in CATALOG.values():
        if a.note:
            console.print(f"{a.name}: {a.note}")
    console.print(f"Kept in {settings.home}. Prepare with: llmcourse data --fetch all")


@app.command()
def start(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or an empty one.")
    ],
) -> None:
    """Unpack the notebooks, recipes and settings of the course into a folder of yours."""
    from llmcourse.store import atomic_folder

    root, target = course_root(), directory.expanduser().absolute()
    if target.exists():
        require(
            target.is_dir() and not any(target.iterdir()),
            "DIR",
            str(directory),
            "a folder that does not exist yet, or an empty one",
        )
    with atomic_folder(target) as partial:
        for part in ("nbs", "exercises", "recipes"):
            if (root / part).is_dir():
                shutil.copytree(
                    root / part,
                    partial / part,
                    ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_*"),
                )
        shutil.copyfile(root / "settings.ini", partial / "settings.ini")
    _say(f"The course is in {directory}. Next: llmcourse data --fetch all, then: jupyter lab {directory}")


practice.register(app)


def main() -> None:
    """Entry point: one sentence for bad input, never a traceback of ours."""
    # the course is offline unless it says otherwise; these keep libraries from asking the network behind its back
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        if load_settings().offline:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        code = app(standalone_mode=False)  # typer turns Ctrl-C into the exit code 130 and returns it
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except BadInput as e:
        print(f"llmcourse: {e}", file=sys.stderr)
        sys.exit(2)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("\nllmcourse: stopped. Finished steps are kept: run the same command to go on.", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        print(f"llmcourse: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", file=sys.stderr)
        sys.exit(1)
    except Exception as e:
        # click's own complaints about the command line (unknown option, missing argument) know how to show themselves
        if hasattr(e, "show") and hasattr(e, "exit_code"):
            e.show()
            sys.exit(e.exit_code)
        raise

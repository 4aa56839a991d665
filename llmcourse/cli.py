"""The command `llmcourse`.

Only typer and the settings are imported here: `llmcourse --help` must answer at once. Everything that needs torch is
imported inside the command that needs it. Exit codes: 0 done, 1 something broke, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmcourse import __version__
from llmcourse.practice import commands as practice
from llmcourse.settings import BadInput, course_root, load_settings, plain, require

app = typer.Typer(
    name="llmcourse",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a language model smaller, and measure what was lost. The course itself: llmcourse start DIR.",
)


def _say(line: str) -> None:
    print(plain(line), flush=True)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"llmcourse {__version__}")
        raise typer.Exit


Data = Annotated[
    str | None, typer.Option(help="Text that is measured: a name from `llmcourse data`, a file, a folder.")
]
Calib = Annotated[str | None, typer.Option(help="Text to calibrate on; by default the calibration part of the data.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Kernels = Annotated[
    str | None, typer.Option(help="auto, int4 or portable: how a CPU multiplies packed weights (auto tries them).")
]
ScaleName = Annotated[str | None, typer.Option("--scale", help="How much is measured: a [scale.NAME] of settings.ini.")]
Layers = Annotated[str | None, typer.Option(help="Treat only layers whose names match, e.g. '*.mlp.*'.")]
Model = Annotated[str, typer.Argument(help="A name from `llmcourse data`, a folder, or a hub id.")]
RecipeName = Annotated[str, typer.Option(help="A .toml file, or the name of a recipe that comes with the course.")]
Out = Annotated[Path, typer.Option(help="A folder that does not exist yet, or an empty one.")]


@app.command()
def tour(
    out: Out = Path("build/tour"),
    model: Annotated[str | None, typer.Option(help="Model to compress; by default the one of settings.ini.")] = None,
    recipe: RecipeName = "w4",
    data: Data = None,
    calib: Calib = None,
    device: Device = None,
    dtype: Dtype = None,
    scale: ScaleName = None,
    layers: Layers = None,
) -> None:
    """The main job in one go: measure the real model, compress it four ways, measure again, write a report."""
    _run(model, recipe, out, calib, layers, {"data": data, "device": device, "dtype": dtype, "scale": scale})


@app.command()
def compress(
    model: Model,
    recipe: RecipeName,
    out: Out,
    data: Data = None,
    calib: Calib = None,
    device: Device = None,
    dtype: Dtype = None,
    scale: ScaleName = None,
    layers: Layers = None,
) -> None:
    """Run a recipe on a model: writes a model folder, passport.json, a Pareto figure and report.html."""
    _run(model, recipe, out, calib, layers, {"data": data, "device": device, "dtype": dtype, "scale": scale})


def _run(model: str | None, recipe: str, out: Path, calib: str | None, layers: str | None, given: dict) -> None:
    settings = load_settings(overrides=given)  # a typing error is reported before torch is imported
    from llmcourse.recipes import find_recipe, load_recipe

    chosen = load_recipe(find_recipe(recipe, "compress"))
    from llmcourse.jobs import print_table, run_job

    model = settings.model if model is None else model
    job = run_job(model, chosen, out, settings=settings, calib=calib, layers=layers, say=_say)
    print_table(job)
    _say(f"Report: {out / 'report.html'}   model: {out} (loads with llmcourse.load_model)")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that `llmcourse compress` wrote.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gguf or onnx: what the program that loads it reads.")],
    out: Out,
    exact: Annotated[
        bool, typer.Option("--exact", help="Lose nothing: take more bytes, or refuse (gguf with zero points).")
    ] = False,
) -> None:
    """Write a compressed model in a form that other programs load, and read it back."""
    from llmcourse.portable import export_folder

    _say(str(export_folder(folder, out, to=to, exact=exact)))
    _say(f"Written: {out}")


@app.command()
def evaluate(
    model: Model,
    data: Data = None,
    part: Annotated[
        str | None,
        typer.Option(help="test, train, val, calib or all; by default test, and all of a file or folder of yours."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names with commas between them; a wrong one lists those that there are.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Only JSON on standard output.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    scale: ScaleName = None,
    kernels: Kernels = None,
) -> None:
    """Measure a model: quality on a text and what it costs, each number with its interval and protocol."""
    given = {"data": data, "device": device, "dtype": dtype, "scale": scale, "kernels": kernels}
    settings = load_settings(overrides=given)
    names = [name.strip() for name in metrics.split(",")] if metrics is not None else ()
    from llmcourse.measure import measure, print_evaluation

    with contextlib.redirect_stdout(sys.stderr):  # what a library tells goes beside the result
        report = measure(model, metrics=names, part=part, settings=settings)
    print(report.to_json(), flush=True) if json else print_evaluation(report)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address; one that others can reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Requests that run at a time.")] = 8,
    cache_tokens: Annotated[int, typer.Option(help="Tokens that the key-value cache has room for.")] = 4096,
    queue: Annotated[int, typer.Option(help="Requests that may wait; one more gets 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="New tokens that a request may ask for.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds for an answer; then it ends as it is.")] = 300.0,
    grace: Annotated[float, typer.Option(help="Seconds for running answers after SIGTERM or Ctrl-C.")] = 30.0,
    api_key_file: Annotated[
        str | None, typer.Option(help="File with the key that clients must show; else LLMCOURSE_API_KEY, or none.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    kernels: Kernels = None,
) -> None:
    """Serve a model over HTTP in the form of OpenAI's API, many requests at a time."""
    settings = load_settings(overrides={"device": device, "dtype": dtype, "kernels": kernels})
    from llmcourse.server import ServerConfig, read_key
    from llmcourse.server import serve as run

    config = ServerConfig(
        host=host,
        port=port,
        max_batch=max_batch,
        cache_tokens=cache_tokens,
        queue=queue,
        max_tokens=max_tokens,
        timeout=timeout,
        grace=grace,
        key=read_key(api_key_file),
    )
    run(model, config, settings=settings, say=_say)


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a recipe that comes with the course.")],
    out: Annotated[
        Path, typer.Option(help="Where tokenizer, checkpoints and the model go; a run that was stopped goes on there.")
    ],
) -> None:
    """Train a language model from nothing: tokenizer, weights, and a card with what was measured."""
    from llmcourse.recipes import find_recipe

    # a typing error is reported before torch is imported
    settings, path = load_settings(), find_recipe(recipe, "pretrain")
    from llmcourse.pretraining import load_pretrain_recipe
    from llmcourse.pretraining import pretrain as run

    folder = run(
        load_pretrain_recipe(path, settings.scale.name),
        out,
        settings=settings,
        say=_say,
        command=f"llmcourse pretrain {recipe} --out {out}",
    )
    _say(f"Card: {folder / 'README.md'}   model: {folder} (loads with llmcourse.load_model)")


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a recipe that comes with the course.")],
    out: Annotated[
        Path, typer.Option(help="Where checkpoints and the result go; a run that was stopped goes on there.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model in place of the recipe's: a name, a folder, a hub id.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text in place of the recipe's: a name, a file, a folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    scale: ScaleName = None,
) -> None:
    """Train a model further, on a text or on labels: writes an adapter or a model, and a card with what it is worth."""
    settings = load_settings(overrides={"device": device, "dtype": dtype, "scale": scale})
    from llmcourse.recipes import find_recipe

    path = find_recipe(recipe, "finetune")
    from llmcourse.tuning import finetune_recipe, load_finetune_recipe

    chosen = load_finetune_recipe(path, model=model, data=data)
    options = "".join(f" --{k} {v}" for k, v in (("model", model), ("data", data)) if v is not None)
    command = f"llmcourse finetune {recipe} --out {out}{options}"
    folder = finetune_recipe(chosen, out, settings=settings, say=_say, command=command)
    _say(f"Card: {folder / 'README.md'}   result: {folder} (loads with llmcourse.tuning.load_tuned)")


@app.command()
def capstone(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file, or the name of a recipe that comes with the course.")
    ] = "finance",
    out: Annotated[
        Path, typer.Option(help="Where every step and the result go; a run that was stopped goes on there.")
    ] = Path("build/capstone"),
    model: Annotated[
        str | None, typer.Option(help="Model in place of the recipe's: a name, a folder, a hub id.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text in place of the recipe's: a name, a file, a folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    scale: ScaleName = None,
    kernels: Kernels = None,
) -> None:
    """The whole way: adapt a model to a text, compress it, measure, choose, export, serve, ask, and report."""
    settings = load_settings(overrides={"device": device, "dtype": dtype, "scale": scale, "kernels": kernels})
    from llmcourse.recipes import find_recipe

    path = find_recipe(recipe, "capstone")
    from llmcourse.capstone import NUMBERS, REPORT, load_capstone_recipe
    from llmcourse.capstone import capstone as run
    from llmcourse.capstone_report import print_capstone

    chosen = load_capstone_recipe(path, model=model, data=data)
    options = "".join(f" --{k} {v}" for k, v in (("model", model), ("data", data)) if v is not None)
    folder = run(chosen, out, settings=settings, say=_say, command=f"llmcourse capstone {recipe} --out {out}{options}")
    print_capstone(jsonlib.loads((folder / NUMBERS).read_text(encoding="utf8")))
    _say(f"Report: {folder / REPORT}   model: {folder / 'model'} (loads with llmcourse.load_model)")


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a recipe that comes with the course.")],
    out: Annotated[
        Path, typer.Option(help="Where journal, tokenizer and log go; a sweep that was stopped goes on there.")
    ],
    storage: Annotated[
        str | None, typer.Option(help="URL of a database in place of the journal, for workers on several machines.")
    ] = None,
) -> None:
    """Search the settings of a training recipe; run it in several terminals and they share the work."""
    from llmcourse.recipes import find_recipe

    settings, path = load_settings(), find_recipe(recipe, "sweep")
    from llmcourse.sweep import in_words
    from llmcourse.sweep import sweep as run

    study = run(path, out, storage=storage, settings=settings, say=_say, live=sys.stdout.isatty())
    _say(f"{in_words(study)}   log: {out / 'runs.jsonl'}")


@app.command()
def data(
    fetch: Annotated[
        list[str] | None, typer.Option(help="Prepare this model or data set (repeatable); 'all' for the whole catalog.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every prepared file with its digest.")] = False,
) -> None:
    """List the course's models and data with license, origin, size and checksum; fetch or verify them."""
    from llmcourse.store import CATALOG, is_prepared, prepare

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
        return _verify_all(settings.home)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for head in ("name", "kind", "ready", "download", "license", "origin", "sha256 of the package"):
        table.add_column(head, overflow="fold")
    for a in CATALOG.values():
        table.add_row(
            a.name,
            a.kind,
            "yes" if is_prepared(a.name, settings.home) else "no",
            "in the package" if a.bundled else f"{a.carrier.size / 1e6:.1f} MB",
            a.license,
            a.origin,
            a.carrier.sha256,
        )
    console = Console(width=None if sys.stdout.isatty() else 320, highlight=False)  # a pipe has no width: fold nothing
    console.print(table)
    for a in CATALOG.values():
        if a.note:
            console.print(f"{a.name}: {a.note}")
    console.print(f"Kept in {settings.home}. Prepare with: llmcourse data --fetch all")


def _verify_all(home: Path) -> None:
    """Every fault of every asset, with the command that mends them; exit code 2 if there is one, or nothing at all."""
    from llmcourse.store import CATALOG, asset_faults, asset_folder, manifest_faults

    broken, missing = [], []
    for name, asset in CATALOG.items():
        folder = asset_folder(name, home)
        faults = asset_faults(name, home)
        if faults == ["is not prepared"] and not folder.exists():
            missing.append(name)
            _say(f"{name}: not prepared")
            continue
        if faults and not asset.bundled and faults[0].startswith("was prepared by another"):
            faults += manifest_faults(folder)
        broken += [name] * bool(faults)
        for fault in faults:
            _say(f"{name}: {fault}")
        if not faults:
            _say(f"{name}: every file has its digest")
    known = {asset_folder(name, home) for name in CATALOG}
    for folder in sorted(p for kind in ("models", "data") for p in (home / kind).glob("*") if p.is_dir()):
        if folder not in known and not folder.name.startswith("."):
            _say(f"{folder}: not of this version of the course (it may be removed)")
    if len(missing) == sum(not asset.bundled for asset in CATALOG.values()):
        raise BadInput(f"home is {str(home)!r}, where nothing is prepared; run: llmcourse data --fetch all.")
    if broken:
        again = " ".join(f"--fetch {name}" for name in broken if not CATALOG[name].bundled)
        mend = f"run: llmcourse data {again}" if again else "install llmcourse again"
        raise BadInput(f"{len(broken)} of {len(CATALOG)} are damaged: {', '.join(broken)}; {mend}.")


@app.command()
def start(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or an empty one.")
    ],
) -> None:
    """Unpack the notebooks, recipes and settings of the course into a folder of yours."""
    from llmcourse.jobs import output_path
    from llmcourse.store import atomic_folder, write_atomic

    root, target = course_root(), output_path(directory, "DIR")
    allowed = "a folder that does not exist yet, or an empty one"
    require(not target.exists() or (target.is_dir() and not any(target.iterdir())), "DIR", str(directory), allowed)
    # the teachers' page names the mistakes and their sentences: it stays in the package
    left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_theme", "92_teaching.ipynb")
    with atomic_folder(target) as partial:
        for part in ("nbs", "exercises", "recipes"):
            if (root / part).is_dir():
                shutil.copytree(root / part, partial / part, ignore=left_out)
        for notebook in (partial / "nbs").rglob("*.ipynb"):  # no link to what is left out
            text = notebook.read_text(encoding="utf8")
            plain_text = re.sub(r"\[([^\]\[]*)\]\((?:\.\./)?92_teaching\.ipynb[^)]*\)", r"\1", text)
            if plain_text != text:
                notebook.write_text(plain_text, encoding="utf8")
        shutil.copyfile(root / "settings.ini", partial / "settings.ini")
        write_atomic(
            partial / "README.md", (Path(__file__).parent / "templates" / "start.md").read_text(encoding="utf8")
        )
    _say(
        f"The course is in {directory}. Next: llmcourse data --fetch all, then: jupyter lab {directory}/nbs/index.ipynb"
    )


practice.register(app)


def _complain(sentence: object) -> None:
    """One line on standard error: what came from outside cannot steer the terminal nor add lines."""
    print(f"llmcourse: {plain(' '.join(str(sentence).split()))}", file=sys.stderr)


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
        _complain(e)
        sys.exit(2)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("\nllmcourse: stopped. Finished steps are kept: run the same command to go on.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has gone (llmcourse data | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        _complain(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
        sys.exit(1)
    except Exception as e:
        # click's own complaints about the command line (unknown option, missing argument) know how to show themselves
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):
            _complain(f"{e.format_message()} (llmcourse --help lists what there is)")
            sys.exit(e.exit_code)
        if type(e).__name__ == "OutOfMemoryError" or isinstance(e, MemoryError):
            _complain("there is not enough memory: a smaller scale, model or batch_size needs less.")
            sys.exit(1)
        raise

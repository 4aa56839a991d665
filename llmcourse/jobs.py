"""The main job: measure a model, compress it in several ways, measure again, and keep the best with a report.

Hand-written: this is the machine around the lessons. A job is a list of steps. Each step writes its result atomically
into a work folder beside the output, so an interrupted job goes on from its finished steps, and the output folder
appears only when everything is there.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import inspect
import io
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llmcourse import __version__
from llmcourse.settings import BadInput, Settings, course_root, load_settings, require
from llmcourse.store import CATALOG, MANIFEST, asset_folder, atomic_folder, verify

__all__ = ["Arm", "Recipe", "find_recipe", "load_recipe", "run_job"]

DENSE = "dense"
# method in a recipe -> (module, class). Named as text, so that reading a recipe needs no torch.
METHODS = {
    "rtn": ("llmcourse.quantization", "RTN"),
    "gptq": ("llmcourse.quantization", "GPTQ"),
    "rtn-embedding": ("llmcourse.quantization", "EmbeddingRTN"),
    "noise": ("llmcourse.compression", "Noise"),
}


# ---------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Arm:
    """One way to compress the model: passes that are applied one after the other."""

    name: str
    passes: tuple[dict, ...]

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")

    def build(self, settings: Settings) -> list:
        """The pass objects, with the calibration size of the settings' scale where the recipe does not say."""
        from importlib import import_module

        built = []
        for entry in self.passes:
            options = dict(entry)
            module, cls = METHODS[options.pop("method")]
            pass_class = getattr(import_module(module), cls)
            known = [n for n in inspect.signature(pass_class).parameters if n != "filter_fn"]
            for key in options:
                require(key in known, f"recipe key in arm {self.name!r}", key, ", ".join(["method", *known]))
            defaults = {
                "n_calib": settings.scale.calib_sequences,
                "seq_len": settings.scale.calib_length,
                "seed": settings.seed,
            }
            options = {k: v for k, v in defaults.items() if k in known} | options
            try:
                built.append(pass_class(**options))
            except BadInput as e:
                raise BadInput(f"arm {self.name!r}: {e}") from e
            except TypeError as e:
                raise BadInput(
                    f"arm {self.name!r} has {options!r}; allowed: every option that the method needs ({e})."
                ) from e
        return built


@dataclass(frozen=True)
class Recipe:
    """What a job does: the arms that are compared, and which one is delivered."""

    name: str
    description: str
    deliver: str
    arms: tuple[Arm, ...]


def find_recipe(name: str | Path, kind: str | None = None) -> Path:
    """The recipe file: a path, or the name of one that comes with the course.

    Args:
        kind: compress (in `recipes/`) or pretrain (in `recipes/pretrain/`); None looks for both.
    """
    path = Path(name)
    if path.is_file():
        return path
    folders = {"compress": course_root() / "recipes", "pretrain": course_root() / "recipes" / "pretrain"}
    shipped = [p for k, folder in folders.items() if kind in (None, k) for p in sorted(folder.glob("*.toml"))]
    for candidate in shipped:
        if str(name) in (candidate.stem, candidate.name, candidate.relative_to(course_root()).as_posix()):
            return candidate
    raise BadInput(
        f"recipe is {str(name)!r}; allowed: the path of a .toml file, or one of {', '.join(p.stem for p in shipped)}."
    )


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Every complaint names the key, the value and what is allowed."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"recipe is {str(path)!r}; allowed: TOML ({e}).") from None
    for key in raw:
        require(key in ("name", "description", "deliver", "arm"), "recipe key", key, "name, description, deliver, arm")
    for key in ("name", "deliver", "arm"):
        require(key in raw, "recipe key", f"{key} (missing)", "a recipe with name, deliver and at least one [[arm]]")
    require(
        isinstance(raw["arm"], list) and len(raw["arm"]) > 0,
        "recipe key 'arm'",
        raw["arm"],
        "one or more [[arm]] tables",
    )
    arms = []
    for entry in raw["arm"]:
        for key in entry:
            require(key in ("name", "passes"), "recipe key in [[arm]]", key, "name, passes")
        require(
            isinstance(entry.get("name"), str) and bool(entry.get("name")),
            "recipe key 'name' in [[arm]]",
            entry.get("name"),
            "a text",
        )
        passes = entry.get("passes")
        require(
            isinstance(passes, list) and len(passes) > 0 and all(isinstance(p, dict) for p in passes),
            f"recipe key 'passes' in arm {entry['name']!r}",
            passes,
            'a list of tables like {method = "gptq", bits = 4}',
        )
        for p in passes:
            require(p.get("method") in METHODS, f"method in arm {entry['name']!r}", p.get("method"), ", ".join(METHODS))
        arms.append(Arm(entry["name"], tuple(passes)))
    slugs = [a.slug for a in arms]
    require(
        len(set(slugs)) == len(slugs) and DENSE not in slugs,
        "recipe arm names",
        [a.name for a in arms],
        f"different names, none of them {DENSE!r}",
    )
    require(
        raw["deliver"] in [a.name for a in arms],
        "recipe key 'deliver'",
        raw["deliver"],
        ", ".join(a.name for a in arms),
    )
    return Recipe(str(raw["name"]), str(raw.get("description", "")), raw["deliver"], tuple(arms))


# ---------------------------------------------------------------------------------------------- steps


def _write_atomic(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _job_fingerprint(recipe: Recipe, model: str, settings: Settings) -> tuple[str, dict]:
    """Everything that the results depend on; a step of another fingerprint is never reused."""
    import torch
    import transformers

    about = {
        "recipe": asdict(recipe),
        "model": model,
        "data": settings.data,
        "scale": asdict(settings.scale),
        "seed": settings.seed,
        "device": settings.device,
        "dtype": settings.dtype,
        "llmcourse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if model in CATALOG:
        about["weights"] = json.loads((asset_folder(model, settings.home) / MANIFEST).read_text(encoding="utf8"))[
            "files"
        ]
    elif (folder := Path(model).expanduser()).is_dir():
        about["model"] = str(folder.resolve())
        about["weights"] = {
            f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.glob("*.safetensors"))
        }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(), about


class _Steps:
    """Runs named steps once: a finished step's JSON in the work folder is its result."""

    def __init__(self, folder: Path, total: int, say: Callable[[str], None]):
        self.folder, self.total, self.say, self.done = folder, total, say, 0
        self._spent = self._spent_cost = 0.0
        self.cost_left = 0.0

    def __call__(self, name: str, title: str, cost: float, work: Callable[[], dict]) -> dict:
        """The step's result; `cost` is its share of the work, only for the estimate of the time left."""
        self.done += 1
        self.cost_left -= cost
        path = self.folder / f"{name}.json"
        head = f"[{self.done}/{self.total}] {title}"
        if path.exists():
            self.say(f"{head}: done before")
            return json.loads(path.read_text(encoding="utf8"))
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        result["seconds"] = seconds
        _write_atomic(path, json.dumps(result, indent=1).encode())
        self._spent += seconds
        self._spent_cost += cost
        left = self._spent / self._spent_cost * self.cost_left if self._spent_cost else 0
        self.say(f"{head}: {seconds:.0f} s" + (f", about {_minutes(left)} left" if self.cost_left > 0 else ""))
        return result


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _check_output(out: Path, fingerprint: str) -> bool:
    """True when this very job is finished there; raises when something else is."""
    if not out.exists():
        return False
    require(out.is_dir(), "out", str(out), "a folder that does not exist yet, or an empty one")
    finished = out / "job.json"
    if finished.is_file():
        try:
            if json.loads(finished.read_text(encoding="utf8"))["fingerprint"] == fingerprint:
                return True
        except (ValueError, KeyError):
            pass
    if any(out.iterdir()):
        raise BadInput(
            f"out is {str(out)!r}, which is not empty and holds something else; allowed: a folder that does not exist yet, an empty one, or the same job's."
        )
    return False


def run_job(
    model: str, recipe: Recipe, out: str | Path, *, settings: Settings | None = None, say: Callable[[str], None] = print
) -> dict:
    """Run a recipe on a model and write `out`: a model folder that loads back, `passport.json`, figures and a report.

    A second call does nothing; a call after an interruption goes on from the finished steps.

    Args:
        model: a name of the catalog, a folder, or a hub id.
        recipe: from `load_recipe`.
        out: a folder that does not exist yet, or an empty one.
        say: called with one line per step.
    Returns:
        what is in `job.json`: the rows of the table, the protocol and where things are.
    Raises:
        BadInput: before anything is written.
    """
    from filelock import FileLock, Timeout

    settings = settings or load_settings()
    out = Path(out).expanduser().absolute()
    arms = {arm.name: arm.build(settings) for arm in recipe.arms}  # all options are checked before any work
    if model in CATALOG:
        verify(model, settings.home)  # every digest, once per job
    fingerprint, about = _job_fingerprint(recipe, model, settings)
    if _check_output(out, fingerprint):
        say(f"{out} already holds this job: nothing to do")
        return json.loads((out / "job.json").read_text(encoding="utf8"))
    job = _Job(model, recipe, arms, out, settings, fingerprint, about, say)
    job.load_dense()  # complains about the model and the data before a folder is made
    work = out.parent / f".{out.name}.work"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.parent / f".{out.name}.lock")
        try:
            with lock.acquire(timeout=0):
                result = job.run(work)
        except Timeout:
            raise BadInput(
                f"out is {str(out)!r}, and another process is working on it; allowed: wait for it, or another folder."
            ) from None
        Path(lock.lock_file).unlink(missing_ok=True)
        return result
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise BadInput(
                f"out is {str(out)!r} and its disk is full; finished steps are kept in {str(work)!r}: make room and run the same command again."
            ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise BadInput(
                f"out is {str(out)!r} and cannot be written ({e.strerror}: {e.filename}); allowed: a folder that you can write to."
            ) from e
        raise


class _Job:
    """The steps of one run."""

    def __init__(
        self, model: str, recipe: Recipe, arms: dict, out: Path, settings: Settings, fingerprint: str, about: dict, say
    ):
        from llmcourse.runtime import Runtime

        self.model_name, self.recipe, self.arms, self.out = model, recipe, arms, out
        self.settings, self.fingerprint, self.about, self.say = settings, fingerprint, about, say
        self.rt = Runtime.auto(settings.device, settings.dtype)

    def load_dense(self) -> None:
        from llmcourse.data import load_model, token_data

        scale = self.settings.scale
        self.model, self.tokenizer, self.card = load_model(self.model_name, rt=self.rt, settings=self.settings)
        for name, passes in self.arms.items():
            for p in passes:
                try:
                    p.check(self.model)
                except BadInput as e:
                    raise BadInput(f"arm {name!r}: {e}") from e
        needed = {p.n_calib * p.seq_len for passes in self.arms.values() for p in passes if getattr(p, "stat", None)}
        self.data = token_data(
            self.tokenizer,
            self.settings.data,
            settings=self.settings,
            limits={"test": scale.eval_tokens, "calib": max(needed, default=0)},
        )

    def _evaluate(self, model, folder: Path | None, packed=None) -> dict:
        """Perplexity of `model`, and the passport of the form it is stored in (`packed`, or the model itself)."""
        import numpy as np

        from llmcourse.compression import passport
        from llmcourse.evaluation import perplexity

        scale = self.settings.scale
        p = perplexity(
            model,
            self.data.test,
            context=scale.context,
            stride=scale.stride,
            token_bytes=self.data.bytes["test"],
            batch_size=scale.batch_size,
            rt=self.rt,
            seed=self.settings.seed,
            model=self.model_name,
            data=self.data.name,
            split="test",
            tokenizer=self.data.tokenizer,
        )
        card = passport(
            self.model_name,
            packed if packed is not None else model,
            self.rt,
            perplexity=p,
            folder=folder,
            prefill_tokens=min(128, scale.context),
            repeats=3,
        )
        buffer = io.BytesIO()
        np.save(buffer, p.nll.numpy())
        numbers = {f.name: getattr(p, f.name) for f in fields(p) if f.name not in ("nll", "protocol")}
        return {
            "passport": card.to_dict(),
            "perplexity": numbers,
            "protocol": asdict(p.protocol),
            "nll": base64.b64encode(buffer.getvalue()).decode(),
        }

    def _compress_arm(self, arm: Arm, work: Path) -> dict:
        from llmcourse.compression import compress
        from llmcourse.packed import save_packed

        student, reports = compress(self.model, self.arms[arm.name], self.data, self.rt)
        with atomic_folder(work / arm.slug, replace=True) as folder:
            save_packed(student, self.tokenizer, folder)
        return {"reports": [str(r) for r in reports], "layers": [asdict(layer) for r in reports for layer in r.layers]}

    def _evaluate_arm(self, arm: Arm, work: Path) -> dict:
        """Measured on the model that is loaded back from its folder: what is judged is what was stored."""
        from llmcourse.packed import dequantize_model, load_packed

        packed, _ = load_packed(work / arm.slug, dtype=self.rt.dtype)
        dense = dequantize_model(packed, dtype=self.rt.dtype)  # the same weights, without unpacking them at every step
        return self._evaluate(self.rt.move(dense), work / arm.slug, self.rt.move(packed))

    def run(self, work: Path) -> dict:
        marker = work / "fingerprint"
        if not marker.exists() or marker.read_text() != self.fingerprint:
            shutil.rmtree(work)
            work.mkdir()
            _write_atomic(marker, self.fingerprint.encode())
        scale = self.settings.scale
        evaluation = scale.eval_tokens * scale.context / scale.stride
        costs = {
            arm.name: 2.0
            * max(
                (p.n_calib * p.seq_len for p in self.arms[arm.name] if getattr(p, "stat", None)),
                default=evaluation / 20,
            )
            for arm in self.recipe.arms
        }
        steps = _Steps(work, 2 * len(self.recipe.arms) + 2, self.say)
        steps.cost_left = evaluation * (1 + len(costs)) + sum(costs.values())
        self.say(f"{self.recipe.name}: {self.model_name} on {self.rt.describe()}, scale {scale.name}")
        results = {
            DENSE: steps(DENSE, "dense: evaluate", evaluation, lambda: self._evaluate(self.model, self._dense_folder()))
        }
        for arm in self.recipe.arms:
            made = steps(
                f"{arm.slug}-compress",
                f"{arm.name}: compress",
                costs[arm.name],
                lambda arm=arm: self._compress_arm(arm, work),
            )
            results[arm.name] = steps(
                f"{arm.slug}-evaluate",
                f"{arm.name}: evaluate",
                evaluation,
                lambda arm=arm: self._evaluate_arm(arm, work),
            ) | {"made": made}
        start = time.perf_counter()
        job = self._summary(results)
        deliver = next(arm for arm in self.recipe.arms if arm.name == self.recipe.deliver)
        with atomic_folder(self.out) as folder:
            shutil.copytree(work / deliver.slug, folder, dirs_exist_ok=True)
            figure = self._figures(job, folder)
            passports = {name: r["passport"] for name, r in results.items()}
            _write_atomic(folder / "passport.json", json.dumps(passports, indent=1).encode())
            _write_atomic(folder / "report.html", _render_report(job, figure).encode())
            _write_atomic(folder / "job.json", json.dumps(job, indent=1).encode())
        shutil.rmtree(work, ignore_errors=True)
        self.say(f"[{steps.total}/{steps.total}] report: {time.perf_counter() - start:.0f} s")
        return job

    def _dense_folder(self) -> Path | None:
        if self.model_name in CATALOG:
            return asset_folder(self.model_name, self.settings.home)
        folder = Path(self.model_name).expanduser()
        return folder if folder.is_dir() else None

    def _summary(self, results: dict) -> dict:
        from llmcourse.evaluation import compare_perplexity

        measured = {name: _perplexity_of(r) for name, r in results.items()}
        parameters = results[DENSE]["passport"]["parameters"]
        rows = []
        for name, r in results.items():
            ratio, p, disk = (
                compare_perplexity(measured[DENSE], measured[name]),
                r["passport"],
                r["passport"]["bytes_disk"],
            )
            rows.append(
                {
                    "name": name,
                    "perplexity": measured[name].value,
                    "low": measured[name].low,
                    "high": measured[name].high,
                    "bits_per_byte": measured[name].bits_per_byte,
                    "ratio": ratio.value,
                    "ratio_low": ratio.low,
                    "ratio_high": ratio.high,
                    "bytes_disk": disk,
                    "bytes_memory": p["bytes_memory"],
                    "smaller_than_float32": 4 * parameters / disk if disk else None,
                    "smaller_than_bfloat16": 2 * parameters / disk if disk else None,
                    "prefill_s": p["prefill"] and p["prefill"]["median_s"],
                    "decode_s": p["decode"] and p["decode"]["median_s"],
                    "reports": r.get("made", {}).get("reports", []),
                    "seconds": r["seconds"] + r.get("made", {}).get("seconds", 0),
                }
            )
        pairs = []
        for i, b in enumerate(
            self.recipe.arms
        ):  # arms that differ in the method only: which is better at the same cost?
            for a in self.recipe.arms[i + 1 :]:
                if _same_but_method(a, b):
                    ratio = compare_perplexity(measured[b.name], measured[a.name])
                    pairs.append({"a": a.name, "b": b.name, "ratio": ratio.value, "low": ratio.low, "high": ratio.high})
        packaged = CATALOG[self.model_name].carrier.size if self.model_name in CATALOG else None
        return {
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.name,
            "description": self.recipe.description,
            "deliver": self.recipe.deliver,
            "model": self.card.name,
            "note": self.card.note,
            "parameters": parameters,
            "packaged_bytes": packaged,
            "rows": rows,
            "pairs": pairs,
            "protocol": str(measured[DENSE].protocol),
            "device": self.rt.describe(),
            "scale": asdict(self.settings.scale),
            "seed": self.settings.seed,
            "versions": {k: self.about[k] for k in ("llmcourse", "torch", "transformers")},
            "seconds": sum(row["seconds"] for row in rows),
        }

    def _figures(self, job: dict, folder: Path) -> str:
        from llmcourse import plotting

        rows = [r for r in job["rows"] if r["bytes_disk"]]
        best = min(rows[1:], key=lambda r: r["perplexity"])
        alt = (
            f"Perplexity against bytes on disk for {len(rows)} models. The dense model is the largest at {rows[0]['bytes_disk'] / 1e6:.0f} MB with perplexity "
            f"{rows[0]['perplexity']:.1f}; of the compressed ones, {best['name']} has the lowest perplexity, {best['perplexity']:.1f}, at {best['bytes_disk'] / 1e6:.0f} MB."
        )
        points = [plotting.Point(r["name"], r["bytes_disk"] / 1e6, r["perplexity"], r["low"], r["high"]) for r in rows]
        figure = plotting.pareto(points, xlabel="size on disk, MB", ylabel="perplexity", alt=alt)
        plotting.save(figure, folder / "pareto.png")
        plotting.save(figure, folder / "pareto.svg")
        return (folder / "pareto.svg").read_text(encoding="utf8")


def _perplexity_of(result: dict):
    """The measurement of a finished step, with its per-token losses."""
    import numpy as np
    import torch

    from llmcourse.evaluation import Perplexity, Protocol

    nll = torch.from_numpy(np.load(io.BytesIO(base64.b64decode(result["nll"])), allow_pickle=False))
    return Perplexity(**result["perplexity"], protocol=Protocol(**result["protocol"]), nll=nll)


def _same_but_method(a: Arm, b: Arm) -> bool:
    strip = lambda arm: [
        {k: v for k, v in p.items() if k not in ("method", "act_order", "damping", "block_size")} for p in arm.passes
    ]
    return strip(a) == strip(b)


# ---------------------------------------------------------------------------------------------- report


def _render_report(job: dict, figure_svg: str) -> str:
    """One HTML file without outside references."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("llmcourse", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    svg = figure_svg[figure_svg.index("<svg") :]  # without the XML head, which HTML does not know
    return env.get_template("report.html.j2").render(job=job, figure=svg)


def print_table(job: dict) -> None:
    """The job's table for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{job['model']}: {job['recipe']}", title_justify="left")
    for head, how in (
        ("model", "left"),
        ("perplexity (95 %)", "right"),
        ("× dense, paired (95 %)", "right"),
        ("on disk", "right"),
        ("of float32", "right"),
        ("of bfloat16", "right"),
    ):
        table.add_column(head, justify=how, no_wrap=True)
    for r in job["rows"]:
        disk = r["bytes_disk"]
        table.add_row(
            r["name"],
            f"{r['perplexity']:.2f} ({r['low']:.2f}–{r['high']:.2f})",
            "1" if r["name"] == DENSE else f"{r['ratio']:.3f} ({r['ratio_low']:.3f}–{r['ratio_high']:.3f})",
            f"{disk / 1e6:.1f} MB" if disk else "?",
            f"1/{r['smaller_than_float32']:.2f}" if disk else "?",
            f"1/{r['smaller_than_bfloat16']:.2f}" if disk else "?",
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    for p in job["pairs"]:
        verdict = "is better" if p["high"] < 1 else "is worse" if p["low"] > 1 else "cannot be told from the other"
        console.print(
            f"{p['a']} against {p['b']}: perplexity × {p['ratio']:.3f} (95 % interval {p['low']:.3f} to {p['high']:.3f}): {p['a']} {verdict} on these tokens."
        )

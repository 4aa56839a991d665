"""The main job: measure a model, compress it in several ways, measure again, and keep the best with a report.

Hand-written: this is the machine around the lessons. A job is a list of steps. Each step writes its result atomically
into a work folder beside the output, so an interrupted job goes on from its finished steps, and the output folder
appears only when everything is there. Everything that can be known before the work is checked before it, and before
anything is written.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llmcourse import __version__
from llmcourse.modelfolder import check_model_folder, locate_model, positions_of
from llmcourse.recipes import DENSE, Arm, Recipe, find_recipe, load_recipe
from llmcourse.report import print_table, render_report
from llmcourse.settings import BadInput, Scale, Settings, expanded, load_settings, require
from llmcourse.store import CATALOG, atomic_folder, digests, held, manifest_faults, write_atomic, write_manifest

__all__ = ["Arm", "Recipe", "find_recipe", "load_recipe", "print_table", "run_job"]

PROMPT = "The difference between a measurement and an opinion is"


# ---------------------------------------------------------------------------------------------- what goes in


def model_folder(model: str, settings: Settings) -> Path | None:
    """The folder that a model name stands for, checked as far as it can be without loading; None for a hub id."""
    require(bool(model) and model.isprintable(), "model", model, "a name from `llmcourse data`, a folder, or a hub id")
    folder = locate_model(model, settings)
    if folder is not None:
        check_model_folder(folder)
    return folder


def bounded(scale: Scale, limit: int | None) -> Scale:
    """A preset cut to the positions of a model: windows and calibration sequences are not longer than it can read."""
    if limit is None or (scale.context <= limit and scale.calib_length <= limit):
        return scale
    require(limit >= 2, "positions of the model", limit, "2 or more")
    context = min(scale.context, limit)
    stride = max(1, min(scale.stride, context * scale.stride // scale.context, context - 1))
    return replace(scale, context=context, stride=stride, calib_length=min(scale.calib_length, limit))


def _inputs(
    recipe: Recipe, model: str, folder: Path | None, settings: Settings, calib: str, layers: str | None
) -> dict:
    """Everything that the results depend on, files by their content. A step of other inputs is never reused."""
    import torch
    import transformers

    from llmcourse.readers import data_source

    texts = {name: digests(data_source(name, settings=settings)) for name in {settings.data, calib} - {"python"}}
    teachers = {p["teacher"] for arm in recipe.arms for p in arm.passes if isinstance(p.get("teacher"), str)}
    folders = {name: model_folder(name, settings) for name in sorted(teachers)}
    return {
        "recipe": asdict(recipe),
        "model": model if folder is None or model in CATALOG else folder.name,
        "files of the model": digests(folder) if folder else {},
        "files of the teachers": {name: digests(path) if path else {} for name, path in folders.items()},
        "data": settings.data,
        "calib": calib,
        "files of the data": texts,
        "layers": layers,
        "scale": asdict(settings.scale),
        "seed": settings.seed,
        "device": settings.device,
        "dtype": settings.dtype,
        "code": digests_of_code(),
        "versions": {"llmcourse": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def digests_of_code() -> str:
    """One digest over the modules of the package (not of its exercises): results of other code are other results."""
    files = sorted(Path(__file__).parent.glob("*.py")) + sorted(Path(__file__).parent.glob("adapters/*.py"))
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()


def _fingerprint(inputs: dict) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- where it goes


def output_path(out: str | Path, name: str = "out") -> Path:
    """The absolute folder that an output argument means, links followed; refuses what can never become a folder."""
    allowed = "a folder that does not exist yet, or an empty one"
    require(str(out) != "", name, str(out), allowed)
    try:
        path = expanded(name, out).resolve()
        parent = next(p for p in (path, *path.parents) if p.exists())
    except (RuntimeError, OSError) as e:  # a name that is too long, links that go in a circle
        raise BadInput(f"{name} is {str(out)!r}; allowed: {allowed} ({getattr(e, 'strerror', e)}).") from None
    require(
        parent.is_dir() and (parent == path or os.access(parent, os.W_OK)),
        name,
        str(out),
        f"{allowed}, where you may write",
    )
    return path


def _finished(out: Path, fingerprint: str) -> dict | None:
    """The job that is finished in `out`, if it is this one and whole; raises when something else is there."""
    if not out.exists():
        return None
    require(out.is_dir(), "out", str(out), "a folder that does not exist yet, or an empty one")
    try:
        job = json.loads((out / "job.json").read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        job = None
    if isinstance(job, dict) and job.get("fingerprint") == fingerprint:
        faults = manifest_faults(out)
        if faults:
            raise BadInput(
                f"out is {str(out)!r}, where this job was finished, but it {faults[0]}; allowed: a job's folder as it "
                "was written (remove it to make it again), or another folder."
            )
        return job
    if any(out.iterdir()):
        raise BadInput(
            f"out is {str(out)!r}, which is not empty and holds something else; allowed: a folder that does not exist "
            "yet, an empty one, or the same job's (same inputs, same code)."
        )
    return None


@contextmanager
def _plain_errors(out: Path, work: Path) -> Iterator[None]:
    """What the file system says while the job writes, as a sentence."""
    try:
        yield
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise BadInput(
                f"out is {str(out)!r} and its disk is full; finished steps are kept in {str(work)!r}: make room and "
                "run the same command again."
            ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise BadInput(
                f"out is {str(out)!r} and cannot be written ({e.strerror}: {e.filename}); allowed: a folder that you "
                "can write to."
            ) from e
        raise


class Steps:
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
        write_atomic(path, json.dumps(result, indent=1))
        self._spent += seconds
        self._spent_cost += cost
        left = self._spent / self._spent_cost * self.cost_left if self._spent_cost else 0
        self.say(f"{head}: {seconds:.0f} s" + (f", about {_minutes(left)} left" if self.cost_left > 0 else ""))
        return result


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


# ---------------------------------------------------------------------------------------------- the job


def run_job(
    model: str,
    recipe: Recipe,
    out: str | Path,
    *,
    settings: Settings | None = None,
    calib: str | None = None,
    layers: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Run a recipe on a model and write `out`: a model folder that loads back, `passport.json`, figures and a report.

    A second call does nothing; a call after an interruption goes on from the finished steps.

    Args:
        model: a name of the catalog, a folder, or a hub id.
        recipe: from `load_recipe`.
        out: a folder that does not exist yet, or an empty one.
        calib: text that the passes calibrate on, all of it but documents of the test part; by default the calibration
            part of the settings' data.
        layers: a glob over names of layers; passes that name none treat only these.
        say: called with one line per step.
    Returns:
        what is in `job.json`: the rows of the table, the protocol and where things are.
    Raises:
        BadInput: before anything is written.
    """
    settings = settings or load_settings()
    out = output_path(out)
    require(out.parent != out, "out", str(out), "a folder below the root")
    require(not out.exists() or out.is_dir(), "out", str(out), "a folder that does not exist yet, or an empty one")
    model, calib = str(model), calib or settings.data
    folder = model_folder(model, settings)
    if folder is not None:
        limit = positions_of(json.loads((folder / "config.json").read_text(encoding="utf8")))
        scale = bounded(settings.scale, limit)
        if scale != settings.scale:
            say(
                f"{model} has {limit} positions: windows of {scale.context} tokens, calibration of {scale.calib_length}"
            )
        settings = replace(settings, scale=scale)
    arms = {arm.name: arm.build(settings, layers=layers) for arm in recipe.arms}
    inputs = _inputs(recipe, model, folder, settings, calib, layers)
    fingerprint, work = _fingerprint(inputs), out.parent / f".{out.name}.work"
    if (job := _finished(out, fingerprint)) is not None:
        _sweep_work(work)
        say(f"{out} already holds this job: nothing to do")
        return job
    job = _Job(model, recipe, arms, out, settings, fingerprint, inputs, say)
    job.load_dense(calib)  # complains about the model and the data before a folder is made
    with _plain_errors(out, work):
        work.mkdir(parents=True, exist_ok=True)
        with held(work) as ours:
            if not ours:
                raise BadInput(
                    f"out is {str(out)!r}, and another process is working on it; allowed: wait for it, or another "
                    "folder."
                )
            if (other := _finished(out, fingerprint)) is not None:  # finished while we waited for the lock
                shutil.rmtree(work, ignore_errors=True)
                return other
            try:
                return job.run(work)
            except BadInput:
                if not list(work.glob("*.json")):  # refused before the first step was done: nothing is to be kept
                    shutil.rmtree(work, ignore_errors=True)
                raise


def _sweep_work(work: Path) -> None:
    """Remove the work folder that a process left which was killed after it had delivered."""
    if work.is_dir():
        with held(work) as ours:
            if ours:
                shutil.rmtree(work, ignore_errors=True)


class _Job:
    """The steps of one run."""

    def __init__(
        self, model: str, recipe: Recipe, arms: dict, out: Path, settings: Settings, fingerprint: str, inputs: dict, say
    ):
        from llmcourse.runtime import Runtime

        self.model_name, self.recipe, self.arms, self.out = model, recipe, arms, out
        self.settings, self.fingerprint, self.inputs, self.say = settings, fingerprint, inputs, say
        self.rt = Runtime.auto(settings.device, settings.dtype)

    def load_dense(self, calib: str) -> None:
        """Model and text, and everything that the later steps ask of them."""
        import torch

        from llmcourse.compression import check_passes
        from llmcourse.data import load_model

        self.model, self.tokenizer, self.card = load_model(self.model_name, rt=self.rt, settings=self.settings)
        for name, tensor in self.model.named_parameters():
            require(bool(torch.isfinite(tensor).all()), f"weights of {name}", "NaN or infinite", "finite weights")
        scale, limit = self.settings.scale, positions_of(self.model)
        require(limit is None or scale.context <= limit, "context", scale.context, f"at most {limit}, its positions")
        self.left, wanted = {}, {"test": scale.eval_tokens}
        for name, passes in self.arms.items():
            try:
                self.left[name] = check_passes(self.model, passes).left
                for p in passes:
                    length = getattr(p, "seq_len", 0) if p.needs else 0
                    require(limit is None or length <= limit, "seq_len", length, f"at most {limit}, its positions")
            except BadInput as e:
                raise BadInput(f"arm {name!r}: {e}") from e
            for part, n in ((part, n) for p in passes for part, n in p.needs.items()):
                wanted[part] = max(n, wanted.get(part, 0))
        self.data = job_data(self.tokenizer, self.settings, calib, wanted)

    def _evaluate(self, model, folder: Path | None, packed=None) -> dict:
        """Perplexity of `model`, and the passport of the form it is stored in (`packed`, or the model itself)."""
        from llmcourse.compression import passport
        from llmcourse.evaluation import Bootstrap, perplexity

        scale = self.settings.scale
        p = perplexity(
            model,
            self.data,
            context=scale.context,
            stride=scale.stride,
            batch_size=scale.batch_size,
            rt=self.rt,
            model=self.card.name,
            bootstrap=Bootstrap(seed=self.settings.seed),
        )
        card = passport(self.card.name, packed if packed is not None else model, self.rt, perplexity=p, folder=folder)
        return {"passport": card.to_dict(), "writes": self._write(model)} | perplexity_as_json(p)

    def _write(self, model, n: int = 24) -> str | None:
        """What a model writes after a prompt, greedily; None where it cannot."""
        import torch

        try:
            ids = self.rt.move(torch.tensor([self.tokenizer(PROMPT).input_ids]))
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
            return self.tokenizer.decode(out[0], skip_special_tokens=True)
        except Exception:  # an example for the reader: what goes wrong in it must not cost the measurements
            return None

    def _compress_arm(self, arm: Arm, work: Path) -> dict:
        """The student in a folder of its own. Finished blocks are kept, so that a run that is cut off goes on there."""
        from llmcourse.compression import compress
        from llmcourse.packed import save_student

        blocks = work / f"{arm.slug}-blocks"
        student, reports = compress(self.model, self.arms[arm.name], self.data, self.rt, checkpoint=blocks)
        with atomic_folder(work / arm.slug, replace=True) as folder:
            save_student(student, self.tokenizer, folder)
        shutil.rmtree(blocks, ignore_errors=True)
        layers = {layer.name: layer for r in reports for layer in r.layers}
        lefts = [r.coverage.left for r in reports if r.coverage is not None] or [self.left[arm.name]]
        return {
            "reports": [str(r) for r in reports],
            "layers": [asdict(layer) for r in reports for layer in r.layers],
            "treated": sum(math.prod(layer.shape) for layer in layers.values()),
            # what no pass has treated, and why
            "left": {
                name: why
                for name, why in lefts[0].items()
                if all(name in left for left in lefts) and not ("embedding" in layers and "embed" in name)
            },
        }

    def _evaluate_arm(self, arm: Arm, work: Path) -> dict:
        """Measured on the model that is loaded back from its folder: what is judged is what was stored."""
        from llmcourse.packed import dequantize_model

        packed = self._load_arm(arm, work)
        dense = dequantize_model(packed, dtype=self.rt.dtype)  # the same weights, without unpacking them at every step
        return self._evaluate(self.rt.move(dense), work / arm.slug, self.rt.move(packed))

    def _load_arm(self, arm: Arm, work: Path):
        from llmcourse.packed import load_student

        return load_student(work / arm.slug, dtype=self.rt.dtype).model

    def _speed(self, arm: Arm, work: Path) -> dict:
        """Reading a prompt and writing a token: the delivered model beside the dense one, in turn.

        The control is the dense model a second time: a ratio that its interval reaches is noise.
        """
        from llmcourse.evaluator import prefill_and_decode
        from llmcourse.runtime import compare, evaluating

        models = {DENSE: self.model, "dense, again": self.model, arm.name: self.rt.move(self._load_arm(arm, work))}
        tokens = min(128, self.settings.scale.context - 1)
        result: dict[str, Any] = {"tokens": tokens}
        with evaluating(*models.values()):
            calls = {name: prefill_and_decode(m, tokens, self.rt) for name, m in models.items()}
            timed = {
                what: compare({name: c[i] for name, c in calls.items()}, self.rt, warmup=1, repeats=repeats)
                for i, (what, repeats) in enumerate((("read", 8), ("write", 16)))
            }
        for what, found in timed.items():
            result[what] = {
                name: {
                    "median_s": c.timing.median,
                    "q1_s": c.timing.quartiles[0],
                    "q3_s": c.timing.quartiles[1],
                    "n": c.timing.n,
                    "ratio": c.ratio,
                    "low": c.low,
                    "high": c.high,
                }
                for name, c in found.items()
            }
        return result

    def run(self, work: Path) -> dict:
        """All steps, those that are finished taken from `work`; then the delivery."""
        self._begin(work)
        scale, total = self.settings.scale, 2 * len(self.recipe.arms) + 3
        evaluation = scale.eval_tokens * scale.context / scale.stride
        costs = {
            arm.name: 2.0 * max(evaluation / 20, *(p.needs.get("calib", 0) for p in self.arms[arm.name]))
            for arm in self.recipe.arms
        }
        steps = Steps(work, total, self.say)
        steps.cost_left = evaluation * (1.2 + len(costs)) + sum(costs.values())
        self.say(f"{self.recipe.name}: {self.card.name} on {self.rt.describe()}, scale {scale.name}")
        results = {
            DENSE: steps(DENSE, "dense: evaluate", evaluation, lambda: self._evaluate(self.model, self._dense_folder()))
        }
        for arm in self.recipe.arms:
            compress, evaluate = f"{arm.slug}-compress", f"{arm.slug}-evaluate"
            made = steps(
                compress, f"{arm.name}: compress", costs[arm.name], lambda arm=arm: self._compress_arm(arm, work)
            )
            measured = steps(
                evaluate, f"{arm.name}: evaluate", evaluation, lambda arm=arm: self._evaluate_arm(arm, work)
            )
            results[arm.name] = measured | {"made": made}
        deliver = next(arm for arm in self.recipe.arms if arm.name == self.recipe.deliver)
        speed = steps("speed", f"{deliver.name}: time", 0.2 * evaluation, lambda: self._speed(deliver, work))
        start = time.perf_counter()
        job = self._summary(results, speed)
        self._deliver(job, results, work / deliver.slug)
        shutil.rmtree(work, ignore_errors=True)
        self.say(f"[{total}/{total}] report: {time.perf_counter() - start:.0f} s")
        return job

    def _begin(self, work: Path) -> None:
        """Keep the finished steps of the same inputs; say what changed and begin anew otherwise."""
        marker = work / "inputs"
        try:
            before = json.loads(marker.read_text(encoding="utf8"))
        except (OSError, ValueError):
            before = None
        if isinstance(before, dict) and _fingerprint(before) == self.fingerprint:
            return
        if isinstance(before, dict):
            changed = [k for k in self.inputs if before.get(k) != self.inputs[k]]
            self.say(f"changed since the run that was interrupted: {', '.join(changed)}; its steps are not used")
        for old in work.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        write_atomic(marker, json.dumps(self.inputs))

    def _deliver(self, job: dict, results: dict, made: Path) -> None:
        passports = {name: r["passport"] for name, r in results.items()}
        for name, row in passports.items():
            row["prefill"], row["decode"] = (job["speed"][k].get(name) for k in ("read", "write"))
        with atomic_folder(self.out) as folder:
            shutil.copytree(made, folder, dirs_exist_ok=True)
            figure = self._figures(job, folder)
            write_atomic(folder / "passport.json", json.dumps(passports, indent=1))
            write_atomic(folder / "report.html", render_report(job, figure))
            write_atomic(folder / "job.json", json.dumps(job, indent=1))
            write_manifest(folder, job=self.fingerprint)

    def _dense_folder(self) -> Path | None:
        return locate_model(self.model_name, self.settings)

    def _summary(self, results: dict, speed: dict) -> dict:
        from llmcourse.evaluation import compare_perplexity

        measured = {name: perplexity_from_json(r) for name, r in results.items()}
        parameters = results[DENSE]["passport"]["parameters"]
        rows = []
        for name, r in results.items():
            p, dense, disk = measured[name], measured[DENSE], r["passport"]["bytes_disk"]
            ratio = compare_perplexity(dense, p)
            rows.append(
                {
                    "name": name,
                    "perplexity": p.value,
                    "low": p.low,
                    "high": p.high,
                    "level": p.held,
                    "bits_per_byte": p.bits_per_byte,
                    "ratio": ratio.value,
                    "ratio_low": ratio.low,
                    "ratio_high": ratio.high,
                    "ratio_level": ratio.level,
                    "bytes_disk": disk,
                    "bytes_memory": r["passport"]["bytes_memory"],
                    "smaller_than_float32": 4 * parameters / disk if disk else None,
                    "smaller_than_bfloat16": 2 * parameters / disk if disk else None,
                    "writes": r["writes"],
                    "reports": r.get("made", {}).get("reports", []),
                    "treated": r.get("made", {}).get("treated", 0) / parameters,
                    "left": r.get("made", {}).get("left", {}),
                    "seconds": r["seconds"] + r.get("made", {}).get("seconds", 0),
                }
            )
        pairs = []
        for a, b in self.recipe.pairs():  # arms that differ in the method only: which is better at the same cost?
            theirs, ours = measured[b.name], measured[a.name]
            ratio = compare_perplexity(theirs, ours)
            found = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "level": ratio.level}
            pairs.append({"a": a.name, "b": b.name, **found})
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
            "prompt": PROMPT,
            "rows": rows,
            "pairs": pairs,
            "speed": speed,
            "protocol": str(measured[DENSE].protocol),
            "calib": self.inputs["calib"],
            "device": self.rt.describe(),
            "scale": asdict(self.settings.scale),
            "seed": self.settings.seed,
            "versions": self.inputs["versions"],
            "seconds": sum(row["seconds"] for row in rows) + speed["seconds"],
        }

    def _figures(self, job: dict, folder: Path) -> str:
        from llmcourse import plotting

        rows = [r for r in job["rows"] if r["bytes_disk"]]
        best = min(rows[1:], key=lambda r: r["perplexity"])
        alt = (
            f"Perplexity against bytes on disk for {len(rows)} models. The dense model is the largest at "
            f"{rows[0]['bytes_disk'] / 1e6:.0f} MB with perplexity {rows[0]['perplexity']:.1f}; of the compressed "
            f"ones, {best['name']} has the lowest perplexity, {best['perplexity']:.1f}, "
            f"at {best['bytes_disk'] / 1e6:.0f} MB."
        )
        points = [plotting.Point(r["name"], r["bytes_disk"] / 1e6, r["perplexity"], r["low"], r["high"]) for r in rows]
        figure = plotting.pareto(points, xlabel="size on disk, MB", ylabel="perplexity", alt=alt)
        plotting.save(figure, folder / "pareto.png")
        plotting.save(figure, folder / "pareto.svg")
        return (folder / "pareto.svg").read_text(encoding="utf8")


def job_data(tokenizer, settings: Settings, calib: str, wanted: dict[str, int]):
    """The streams of the settings' data, `wanted` tokens of each part; calibration from a text of its own if asked.

    A calibration text is used as a whole, but for documents that are in the test part.
    """
    from llmcourse.data import document_hash, encode, load_records, token_data

    fast = getattr(tokenizer, "is_fast", True)
    require(fast, "tokenizer", type(tokenizer).__name__, "a fast tokenizer (it knows where in the text a token lies)")
    own, n = calib != settings.data, wanted.get("calib", 0)
    limits = {part: size for part, size in wanted.items() if not (own and part == "calib")}
    data = token_data(tokenizer, settings.data, settings=settings, limits=limits)
    if not own:
        return data
    tested = {document_hash(r["text"]) for r in load_records(settings.data, "test", settings=settings)}
    texts = [r["text"] for r in load_records(calib, settings=settings) if document_hash(r["text"]) not in tested]
    ids, sizes = encode(tokenizer, texts if n else [], limit=n)
    require(len(ids) >= n, "calib", calib, f"text of at least {n} tokens outside the test part; it has {len(ids)}")
    return replace(data, calib=ids, bytes=data.bytes | {"calib": sizes})


def perplexity_as_json(p) -> dict:
    """A measurement with its per-token losses as JSON; `perplexity_from_json` reads it."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, p.nll.numpy())
    numbers = {f.name: getattr(p, f.name) for f in fields(p) if f.name not in ("nll", "protocol")}
    return {"perplexity": numbers, "protocol": asdict(p.protocol), "nll": base64.b64encode(buffer.getvalue()).decode()}


def perplexity_from_json(result: dict):
    """The measurement of a finished step, with its per-token losses."""
    import numpy as np
    import torch

    from llmcourse.evaluation import Perplexity, Protocol

    nll = torch.from_numpy(np.load(io.BytesIO(base64.b64decode(result["nll"])), allow_pickle=False))
    return Perplexity(**result["perplexity"], protocol=Protocol(**result["protocol"]), nll=nll)

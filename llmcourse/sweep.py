"""`llmcourse sweep`: many runs of one training recipe, chosen by Optuna, by as many processes as there are.

Hand-written. The chapter `nbs/10b_search.ipynb` builds the searches by hand; this is the engine of real use. Workers
share nothing but the storage: a journal file, or a database. Who is killed leaves a trial that says "running"; the
others see that its process is gone, or that it has not been heard of for a while, and queue the trial again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse.schema import parse, read_toml
from llmcourse.settings import BadInput, Settings, load_settings, number, one_of, require, whole

__all__ = ["Axis", "SweepRecipe", "in_words", "load_sweep_recipe", "open_study", "run_trials", "sweep"]

SEARCHED = ("lr", "weight_decay", "warmup_share", "batch_size", "optimizer", "schedule", "final_lr", "clip")
SAMPLERS, PRUNERS = ("tpe", "random"), ("median", "halving", "none")

# ---------------------------------------------------------------------------------------------- the recipe


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What one setting may be: a range, or a list."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[int | float | str, ...] = ()

    def __post_init__(self):
        if self.choices:
            alone = self.low is None and self.high is None and not self.log
            require(alone, "choices", list(self.choices), "choices without low, high and log")
            require(len(set(self.choices)) == len(self.choices), "choices", list(self.choices), "each value once")
            return
        both = self.low is not None and self.high is not None
        require(both, "low, high", (self.low, self.high), "two numbers, or choices")
        number("low", self.low, above=0 if self.log else None)
        number("high", self.high, above=self.low)

    def suggest(self, trial: Any, name: str) -> Any:
        if self.choices:
            return trial.suggest_categorical(name, list(self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    @property
    def ends(self) -> tuple:
        return self.choices or (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """Which settings are searched, how, and at what cost."""

    name: str
    pretrain: str
    """a recipe of `llmcourse pretrain`: model, data, and what is not searched"""
    trials: int
    tokens: int
    """that each trial reads"""
    search: dict[str, dict[str, Any]]
    looks: int = 4
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    lease: float = 300.0
    """seconds without a sign of life after which a trial of another machine counts as left behind"""

    def __post_init__(self):
        good = 0 < len(self.name) <= 60 and self.name.isprintable() and not set(self.name) & set("<>&`/\\")
        require(
            good, "name", self.name, "a text of 1 to 60 characters without control characters, <, >, &, ` and slashes"
        )
        whole("trials", self.trials, 1), whole("tokens", self.tokens, 1), whole("looks", self.looks, 1)
        one_of("sampler", self.sampler, SAMPLERS), one_of("pruner", self.pruner, PRUNERS)
        whole("seed", self.seed, 0, 2**31), number("lease", self.lease, above=0)
        require(len(self.search) > 0, "search", {}, "one or more [search.NAME] tables")
        for key in self.search:
            one_of("key in [search]", key, SEARCHED)

    @property
    def axes(self) -> dict[str, Axis]:
        return {name: parse(Axis, table, f"[search.{name}]") for name, table in self.search.items()}


def load_sweep_recipe(path: str | Path, settings: Settings) -> tuple[SweepRecipe, Any]:
    """Read a recipe and the training recipe that it varies; every end of every axis is tried on paper.

    Returns:
        the recipe, and the `PretrainRecipe` at the scale of the settings.
    Raises:
        BadInput: one sentence with the key, the value and what is allowed.
    """
    from llmcourse.pretraining import load_pretrain_recipe
    from llmcourse.recipes import find_recipe

    recipe = parse(SweepRecipe, read_toml(path), "recipe")
    axes = recipe.axes
    base = load_pretrain_recipe(find_recipe(recipe.pretrain, "pretrain"), settings.scale.name)
    first = {name: axis.ends[0] for name, axis in axes.items()}
    for name, axis in axes.items():
        for value in axis.ends:
            configured(recipe, base, first | {name: value})
    return recipe, base


def configured(recipe: SweepRecipe, base: Any, params: Mapping[str, Any]) -> Any:
    """The training recipe with these settings, at the sweep's number of tokens."""
    from llmcourse.pretraining import check_recipe
    from llmcourse.training import TrainConfig

    table = {f.name: getattr(base.train, f.name) for f in dataclasses.fields(TrainConfig)}
    table |= {k: v for k, v in params.items() if k != "warmup_share"}
    size = whole("batch_size", table["batch_size"], 1) * table["seq_len"]
    steps = recipe.tokens // size
    require(steps >= recipe.looks, "tokens", recipe.tokens, f"at least {recipe.looks * size}: a step per look")
    share = number("warmup_share", params.get("warmup_share", base.train.warmup / base.train.steps), 0, 1)
    table |= {"steps": steps, "warmup": min(steps - 1, round(share * steps)), "eval_every": -(-steps // recipe.looks)}
    try:
        changed = dataclasses.replace(base, train=TrainConfig(**table))
        check_recipe(changed)
    except BadInput as e:
        raise BadInput(f"[search] of {recipe.name!r} with {dict(params)}: {e}") from None
    return changed


# ---------------------------------------------------------------------------------------------- the storage


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise BadInput("engine is 'optuna'; allowed: after pip install 'llmcourse[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class _SystemLock:
    """A lock for Optuna's journal that the system takes back from a killed process at once."""

    def __init__(self, path: Path, wait: float):
        from filelock import FileLock

        self.path, self.lock = path, FileLock(path.with_name(f".{path.name}.lock"), timeout=wait)

    def acquire(self) -> bool:
        from filelock import Timeout

        try:
            self.lock.acquire()
        except Timeout:
            raise BadInput(f"storage is {str(self.path)!r}, which is locked; allowed: one that is free.") from None
        return True

    def release(self) -> None:
        self.lock.release()


def open_storage(where: str | Path, *, wait: float = 20.0) -> Any:
    """A journal file, or a database by its URL (`postgresql://…`, `mysql://…`, `sqlite:///FILE`).

    Raises:
        BadInput: locked by another process, no journal, or a database that does not answer.
    """
    _optuna()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in str(where):
        kind = str(where).split("://")[0]  # all that is shown of a URL: it may hold a password
        try:
            return RDBStorage(str(where))
        except ImportError as e:
            driver = getattr(e.__cause__ or e, "name", None)
            raise BadInput(
                f"storage is a {kind!r} URL; allowed: one whose driver is installed (there is no module {driver!r})."
            ) from None
        except Exception as e:  # a server that does not answer, a wrong password, an unknown kind
            raise BadInput(
                f"storage is a {kind!r} URL; allowed: a database that answers ({type(e).__name__})."
            ) from None
    path = Path(where)
    require(
        path.parent.is_dir() and not path.is_dir(), "storage", str(where), "a file in a folder that exists, or a URL"
    )
    lock = _SystemLock(path, wait)
    lock.acquire()
    try:
        _drop_the_unfinished(path)
    finally:
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, TypeError, AssertionError):
        raise BadInput(
            f"storage is {str(where)!r}; allowed: a journal of Optuna, or a file that does not exist."
        ) from None


def _drop_the_unfinished(path: Path) -> None:
    """Remove a last line without its end: a killed process has left it, and the next line would be glued to it."""
    if path.exists() and path.stat().st_size:
        content = path.read_bytes()
        require(content[:1] == b"{", "storage", str(path), "a journal of Optuna, or a file that does not exist")
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def open_study(
    where: str | Path, name: str, fingerprint: Mapping[str, str], *, pruner: str = "none", wait: float = 20.0
) -> Any:
    """The study of this name, made if it is not there; lower values are better.

    Args:
        fingerprint: what its results depend on, e.g. `{"recipe": …, "data": …, "code": …}`, kept in the study.
    Raises:
        BadInput: the storage is locked, or its study has another fingerprint; nothing is written.
    """
    optuna = _optuna()
    one_of("pruner", pruner, PRUNERS)
    storage = open_storage(where, wait=wait)
    others = [s.study_name for s in optuna.get_all_study_summaries(storage)]
    journal = "://" not in str(where)
    free = name in others or not (journal and others)
    require(
        free, "storage", str(where) if journal else "a URL", f"one of the study {name!r}; it holds {', '.join(others)}"
    )
    pruners = {
        "median": optuna.pruners.MedianPruner(n_startup_trials=5),
        "halving": optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        "none": optuna.pruners.NopPruner(),
    }
    how = {"storage": storage, "study_name": name, "pruner": pruners[pruner]}
    study = optuna.load_study(**how) if name in others else optuna.create_study(**how, load_if_exists=True)
    kept = study.user_attrs.get("fingerprint")
    if kept is None:
        study.set_user_attr("fingerprint", dict(fingerprint))
    else:
        differ = [key for key in fingerprint if kept.get(key) != fingerprint[key]]
        require(
            not differ,
            "storage",
            f"one with another {' and '.join(differ)}",
            f"the one of this study {name!r}, or a new one",
        )
    return study


# ---------------------------------------------------------------------------------------------- workers


def _machine() -> str:
    """Where a process number means something: host, boot, and namespace of processes."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _worker() -> dict[str, Any]:
    import psutil

    return {"machine": _machine(), "pid": os.getpid(), "born": psutil.Process().create_time()}


def _abandoned(trial: Any, lease: float) -> bool:
    """Its process is gone (on this machine), or has given no sign of life for the length of the lease (elsewhere)."""
    import psutil

    worker = trial.user_attrs.get("worker")
    if worker is None:  # killed between two lines, or about to say who it is
        return time.time() - trial.datetime_start.timestamp() > min(lease, 10.0)
    if worker["machine"] == _machine():
        try:
            return abs(psutil.Process(worker["pid"]).create_time() - worker["born"]) > 1
        except psutil.NoSuchProcess:
            return True
    return time.time() - trial.user_attrs["alive"] > lease


@contextlib.contextmanager
def _alive(trial: Any, lease: float) -> Iterator[None]:
    """Write a sign of life into the trial four times per lease."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(lease / 4):
            try:
                trial.set_user_attr("alive", time.time())
            except Exception:  # taken over, or the storage is away for a moment: the work itself will notice
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _counts(trial: Any, trials: Sequence[Any], n: int) -> bool:
    """Whether a trial is one of the `n`, or the first second try of one: two workers may have asked at once."""
    if trial.user_attrs.get("surplus"):
        return False
    again = trial.user_attrs.get("retry_of")
    if again is not None:
        return not any(t.user_attrs.get("retry_of") == again and t.number < trial.number for t in trials)
    before = [t for t in trials if t.number < trial.number and not {"retry_of", "surplus"} & set(t.user_attrs)]
    return len(before) < n


def _settle(study: Any, n: int, lease: float, say: Callable[[str], None]) -> None:
    """Mark what dead workers have left as failed, and put it into the queue once more."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _abandoned(trial, lease):
            with contextlib.suppress(UpdateFinishedTrialError, ValueError):  # another worker was faster
                study.tell(trial.number, state=TrialState.FAIL)
                say(f"trial {trial.number} was left behind by its worker")
    trials = study.get_trials(deepcopy=False)
    again = {t.user_attrs.get("retry_of") for t in trials}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in again and _counts(trial, trials, n):
            root = trial.user_attrs.get("root", trial.number)
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number, "root": root})


def _sampler(kind: str, seed: int) -> Any:
    samplers = _optuna().samplers
    return samplers.TPESampler(seed=seed, constant_liar=True) if kind == "tpe" else samplers.RandomSampler(seed=seed)


def run_trials(
    study: Any,
    objective: Callable[[Any, int], float],
    n: int,
    *,
    sampler: str = "tpe",
    seed: int = 0,
    lease: float = 300.0,
    say: Callable[[str], None] = lambda line: None,
    seen: Callable[[], None] = lambda: None,
) -> None:
    """Work until `n` trials of the study are finished, together with all who do the same.

    What a trial draws depends on `seed`, its number and the trials that were finished before it: a sweep by one worker
    can be repeated exactly.

    Args:
        study: as `open_study` returns it.
        objective: `objective(trial, root)` → the value; `root` is the same number for every try of one trial.
        seen: called after each change, to redraw a table.
    """
    optuna = _optuna()
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    whole("trials", n, 1), one_of("sampler", sampler, SAMPLERS), number("lease", lease, above=0)
    while True:
        _settle(study, n, lease, say)
        trials = study.get_trials(deepcopy=False)
        roots = [t for t in trials if "retry_of" not in t.user_attrs and not t.user_attrs.get("surplus")]
        waiting = any(t.state == TrialState.WAITING for t in trials)
        if len(roots) >= n and not waiting:
            if not any(t.state == TrialState.RUNNING for t in trials):
                return seen()
            time.sleep(min(1.0, lease / 4))  # others are at work, and one of them may die
            seen()
            continue
        trial = study.ask()
        trial.set_user_attr("alive", time.time()), trial.set_user_attr("worker", _worker())
        trials = study.get_trials(deepcopy=False)
        if not _counts(next(t for t in trials if t.number == trial.number), trials, n):
            trial.set_user_attr("surplus", True)
            study.tell(trial, state=TrialState.FAIL)
            continue
        study.sampler = _sampler(sampler, seed + 100_003 * (trial.number + 1))
        seen()
        try:
            with _alive(trial, lease):
                value = objective(trial, trial.user_attrs.get("root", trial.number))
            study.tell(trial, value)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except UpdateFinishedTrialError:
            say(f"trial {trial.number} was taken over by another worker")
        except BaseException:  # an error or a stop from the keyboard: the next worker tries it again
            with contextlib.suppress(Exception):
                study.tell(trial, state=TrialState.FAIL)
            raise
        seen()


# ---------------------------------------------------------------------------------------------- the command


def _digest(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sweep(
    path: str | Path,
    out: str | Path,
    *,
    storage: str | None = None,
    settings: Settings | None = None,
    say: Callable[[str], None] = print,
    live: bool = False,
) -> Any:
    """Run a recipe until its trials are finished; as many processes as you like may do so at once.

    Args:
        out: folder of tokenizer, log and journal; a sweep that was stopped goes on there.
        storage: URL of a database in place of the journal, for workers on several machines.
    Returns:
        The Optuna study.
    Raises:
        BadInput: before any work: a recipe or text that cannot work, a storage that is locked or of another study.
    """
    from llmcourse.jobs import digests_of_code
    from llmcourse.pretraining import _texts
    from llmcourse.runlog import RunLog

    settings, out = settings or load_settings(), Path(out).expanduser()
    recipe, base = load_sweep_recipe(path, settings)
    _optuna()
    require(
        not out.exists() or out.is_dir(), "out", str(out), "a folder of an earlier run of this recipe, or a new one"
    )
    texts = _texts(base, settings)
    told = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("trials", "lease")}  # these may be changed
    marks = {"recipe": _digest([told, dataclasses.asdict(base)]), "data": texts.digest, "code": digests_of_code()[:16]}
    journal = out / "study.journal"
    fresh = not out.exists() or not any(out.iterdir())
    ours = fresh or storage is not None or journal.exists()
    require(ours, "out", str(out), "a folder of an earlier run of this recipe, or an empty one")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        study = open_study(storage or journal, recipe.name, marks, pruner=recipe.pruner)
    except BadInput:
        if new and not any(out.iterdir()):  # a refusal leaves nothing
            out.rmdir()
        raise
    data = _tokens(out, base, texts, _digest([marks["data"], dataclasses.asdict(base), marks["code"]]), settings)
    log = RunLog(out / "runs.jsonl")
    objective = _objective(recipe, base, data, settings, out, log)
    with _shown(study, recipe, say, live) as seen:
        how = {"sampler": recipe.sampler, "seed": recipe.seed, "lease": recipe.lease}
        run_trials(study, objective, recipe.trials, say=say, seen=seen, **how)
    return study


def _tokens(out: Path, base: Any, texts: Any, mark: str, settings: Settings) -> Any:
    """The text as `TokenData`: one worker makes tokenizer and tokens, all others and all later starts read them.

    Args:
        mark: of everything that the tokens depend on; a folder of other or damaged tokens is not read but made anew.
    """
    import torch
    from filelock import FileLock
    from transformers import AutoTokenizer

    from llmcourse.data import TokenData
    from llmcourse.pretraining import _encoded
    from llmcourse.store import atomic_folder, manifest_faults, write_manifest
    from llmcourse.tokenizer import BPE

    folder = out / f"text-{mark}"
    with FileLock(out / ".text.lock"):
        if manifest_faults(folder):
            with atomic_folder(folder, replace=True) as partial:
                BPE.train(texts.train, base.vocab_size).save_pretrained(partial / "tokenizer")
                data = _encoded(base, AutoTokenizer.from_pretrained(partial / "tokenizer"), settings)
                torch.save(vars(data), partial / "tokens.pt")
                write_manifest(partial)
    return TokenData(**torch.load(folder / "tokens.pt", weights_only=True))


def _objective(recipe: SweepRecipe, base: Any, data: Any, settings: Settings, out: Path, log: Any) -> Callable:
    """Train once with the settings of a trial; its value is the last loss on the validation part, in nats per token."""
    import shutil

    import optuna
    import torch

    from llmcourse.model import GPT
    from llmcourse.runtime import Runtime
    from llmcourse.training import NotFinite, Observer, train

    rt = dataclasses.replace(Runtime.of(None, settings=settings), dtype=getattr(torch, base.dtype))

    def objective(trial: Any, root: int) -> float:
        params = {name: axis.suggest(trial, name) for name, axis in recipe.axes.items()}
        changed = configured(recipe, base, params)

        class Watch(Observer):
            told = 0  # looks; a second try begins with those of the first

            def after_step(self, run):
                new, self.told = run.result.val[self.told :], len(run.result.val)
                for done, loss in new:
                    trial.report(loss, step=-(-done // changed.train.eval_every))
                if new and run.result.steps < changed.train.steps and trial.should_prune():
                    raise optuna.TrialPruned

        folder = out / "trials" / f"{root:04d}"  # a second try goes on from the checkpoint of the first
        torch.manual_seed(changed.train.seed)
        state, value = "complete", math.inf
        try:
            kept = folder if changed.train.save_every else None
            value = train(rt.move(GPT(changed.model)), data, changed.train, rt=rt, out=kept, observers=[Watch()]).val[
                -1
            ][1]
        except NotFinite:
            state = "diverged"
        except optuna.TrialPruned:
            state = "pruned"
        seen = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        metrics = {"val": value if state != "pruned" else list(seen.values())[-1], "looks": len(seen)}
        about = {"study": recipe.name, "trial": trial.number, "root": root, "state": state}
        log.append(params | {"tokens": recipe.tokens}, metrics, seed=changed.train.seed, about=about)
        shutil.rmtree(folder, ignore_errors=True)
        if state == "pruned":
            raise optuna.TrialPruned
        return value

    return objective


@contextlib.contextmanager
def _shown(study: Any, recipe: SweepRecipe, say: Callable[[str], None], live: bool) -> Iterator[Callable[[], None]]:
    """A table that is redrawn in a terminal; elsewhere a line per finished trial, and the table at the end."""
    from optuna.trial import TrialState
    from rich.console import Console
    from rich.live import Live

    if live:
        with Live(table_of(study, recipe), refresh_per_second=4) as screen:
            yield lambda: screen.update(table_of(study, recipe))
        return
    told = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}

    def seen() -> None:
        for t in study.get_trials(deepcopy=False):
            if t.state.is_finished() and t.number not in told and not t.user_attrs.get("surplus"):
                told.add(t.number)
                value = f"{t.value:.4f}" if t.state == TrialState.COMPLETE else t.state.name.lower()
                say(f"trial {t.number}: {value}  {_words(t.params)}")

    yield seen
    Console(highlight=False, width=100).print(table_of(study, recipe))


def _words(params: Mapping[str, Any]) -> str:
    return "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def in_words(study: Any) -> str:
    """The best trial of those that were trained to the end with a finite loss, or that there is none."""
    from optuna.trial import TrialState

    whole = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE and math.isfinite(t.value)]
    if not whole:
        return "No trial reached its end with a finite loss."
    best = min(whole, key=lambda t: t.value)
    return f"Best: trial {best.number} with {best.value:.4f}"


def table_of(study: Any, recipe: SweepRecipe, rows: int = 12) -> Any:
    """The best trials so far, and how many are finished, given up, running and tried again."""
    from optuna.trial import TrialState
    from rich import box
    from rich.table import Table

    trials = [t for t in study.get_trials(deepcopy=False) if not t.user_attrs.get("surplus")]
    count = {s: sum(t.state == s for t in trials) for s in TrialState}
    done = count[TrialState.COMPLETE] + count[TrialState.PRUNED]
    title = f"{recipe.name}: {done} of {recipe.trials} finished ({count[TrialState.PRUNED]} given up early), "
    title += f"{count[TrialState.RUNNING]} running, {count[TrialState.FAIL]} tried again"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for head in ("trial", "val loss", "state", *recipe.search):
        table.add_column(head, justify="left" if head == "state" else "right")
    last = lambda t: t.value if t.value is not None else list(t.intermediate_values.values() or [math.inf])[-1]
    order = {TrialState.COMPLETE: 0, TrialState.RUNNING: 1}
    for t in sorted(trials, key=lambda t: (order.get(t.state, 2), last(t)))[:rows]:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (t.params.get(k, "") for k in recipe.search)]
        table.add_row(str(t.number), f"{last(t):.4f}" if last(t) < math.inf else "–", t.state.name.lower(), *cells)
    return table

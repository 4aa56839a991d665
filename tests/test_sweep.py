"""The sweep: workers that are killed, storages that are locked or of others; and the log of runs."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import ROOT

from llmcourse.runlog import RunLog, columns, parallel_coordinates, to_tensorboard
from llmcourse.settings import BadInput, load_settings
from llmcourse.sweep import in_words, load_sweep_recipe, open_study, run_trials, sweep

optuna = pytest.importorskip("optuna")
WORKER = ROOT / "tests" / "sweep_worker.py"


def worker(storage, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(WORKER), str(storage), *map(str, args)])


def wait_for(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def finished(study) -> list:
    """Trials that count, by the number that all tries of one share."""
    return [t.user_attrs.get("root", t.number) for t in study.get_trials() if t.state.name in ("COMPLETE", "PRUNED")]


def objective(trial, root):
    return (trial.suggest_float("x", -1, 1) - 0.3) ** 2


def study_at(path, **how):
    return open_study(path, "parabola", {"recipe": "a"}, **how)


# ---------------------------------------------------------------------------------------------- workers


def test_two_workers_of_which_one_is_killed(tmp_path):
    """Nothing is lost, and nothing counts twice."""
    storage = tmp_path / "study.journal"
    first = worker(storage, 12, 0, 3)  # it hangs in trial 3, and is killed there
    try:
        wait_for(Path(f"{storage}.hangs").exists)
        second = worker(storage, 12, 0.02)
        try:
            wait_for(lambda: len(finished(study_at(storage))) >= 6)
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            assert second.wait(60) == 0
        finally:
            second.kill()
    finally:
        first.kill()
    study = study_at(storage)
    assert len(finished(study)) == len(set(finished(study))) == 12 and 3 in finished(study)
    tries = [t for t in study.get_trials() if t.user_attrs.get("root", t.number) == 3]
    assert [t.state.name for t in tries] == ["FAIL", "COMPLETE"] and tries[0].params == tries[1].params


def test_two_workers_make_no_trial_too_many(tmp_path):
    storage = tmp_path / "study.journal"
    workers = [worker(storage, 9, 0.01) for _ in range(2)]
    assert [w.wait(60) for w in workers] == [0, 0]
    assert Counter(finished(study_at(storage))) == {n: 1 for n in range(9)}


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_sweep_goes_on_and_may_grow(tmp_path, kind):
    storage = tmp_path / "study.journal" if kind == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    run_trials(study_at(storage), objective, 3, seed=1)
    before = [t.params for t in study_at(storage).get_trials()]
    run_trials(study_at(storage), objective, 3, seed=1)  # nothing is left to do
    run_trials(study_at(storage), objective, 5, seed=1)
    after = [t.params for t in study_at(storage).get_trials()]
    assert len(before) == 3 and len(after) == 5 and after[:3] == before


def test_one_worker_can_be_repeated_exactly_also_when_it_was_stopped(tmp_path):
    whole = study_at(tmp_path / "a")
    run_trials(whole, objective, 14, seed=5)
    for n in (4, 14):
        run_trials(study_at(tmp_path / "b"), objective, n, seed=5)
    other = study_at(tmp_path / "c")
    run_trials(other, objective, 14, seed=6)
    values = lambda study: [t.params["x"] for t in study.get_trials()]
    assert values(whole) == values(study_at(tmp_path / "b")) != values(other)
    assert len(set(values(whole))) == 14


def test_an_error_ends_the_worker_and_the_trial_is_tried_again(tmp_path):
    study = study_at(tmp_path / "a")

    def broken(trial, root):
        trial.suggest_float("x", -1, 1)
        if trial.number == 1:
            raise RuntimeError("no")
        return 0.0

    with pytest.raises(RuntimeError):
        run_trials(study, broken, 3)
    run_trials(study_at(tmp_path / "a"), broken, 3)
    assert sorted(finished(study_at(tmp_path / "a"))) == [0, 1, 3]  # 2 is the second try of 1


def test_a_worker_that_slept_beyond_its_lease_does_not_count_twice(tmp_path):
    study = study_at(tmp_path / "a")

    def sleepy(trial, root):
        if trial.number == 0:  # as the other worker does it when the lease is over
            study_at(tmp_path / "a").tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return objective(trial, root)

    told = []
    run_trials(study, sleepy, 2, say=told.append)
    assert sorted(finished(study_at(tmp_path / "a"))) == [0, 2] and "taken over" in " ".join(told)


@pytest.mark.parametrize(
    "attrs, left",
    [
        ({"machine": "another", "pid": 1, "born": 0.0, "age": 1.0}, False),
        ({"machine": "another", "pid": 1, "born": 0.0, "age": 9.0}, True),
        ({"machine": "here", "pid": os.getpid(), "born": "mine", "age": 9.0}, False),  # alive, and slow to say so
        ({"machine": "here", "pid": os.getpid(), "born": 5.0, "age": 0.0}, True),  # the number has a new owner
        ({"machine": "here", "pid": 2**22 + 1, "born": 5.0, "age": 0.0}, True),
    ],
)
def test_who_counts_as_gone(tmp_path, attrs, left):
    from llmcourse import sweep as engine

    study = study_at(tmp_path / "a")
    trial = study.ask()
    mine = engine._worker()
    where = mine["machine"] if attrs["machine"] == "here" else attrs["machine"]
    born = mine["born"] if attrs["born"] == "mine" else attrs["born"]
    trial.set_user_attr("alive", time.time() - attrs["age"])
    trial.set_user_attr("worker", {"machine": where, "pid": attrs["pid"], "born": born})
    assert engine._abandoned(study.get_trials()[0], lease=5.0) is left


# ---------------------------------------------------------------------------------------------- storages


def test_a_storage_of_another_study_is_refused_and_not_changed(tmp_path):
    path = tmp_path / "a"
    run_trials(study_at(path), objective, 1)
    before = path.read_bytes()
    for name, marks in (("parabola", {"recipe": "b"}), ("another", {"recipe": "a"})):
        with pytest.raises(BadInput, match="storage is"):
            open_study(path, name, marks)
        assert path.read_bytes() == before


def test_a_locked_storage_is_refused(tmp_path):
    from filelock import FileLock

    study_at(tmp_path / "a")
    with FileLock(tmp_path / ".a.lock"), pytest.raises(BadInput, match="which is locked"):
        study_at(tmp_path / "a", wait=0.1)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"\x00\x01", b'{"a": 1}\n', b"{not json}\n{}\n", b"[]\n"], ids=lambda b: repr(b)[:12]
)
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadInput, match="storage is"):
        study_at(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content


def test_a_database_that_does_not_answer_and_its_password(tmp_path):
    with pytest.raises(BadInput) as e:
        study_at("nosuchdatabase://user:secret@host/x")
    assert "secret" not in str(e.value) and "nosuchdatabase" in str(e.value)


@pytest.mark.parametrize(
    "url, driver",
    [
        ("postgresql+psycopg2://user:secret@host/x", "psycopg2"),
        ("postgresql+pg8000://user:secret@host/x", "pg8000"),
        ("mysql+pymysql://user:secret@host/x", "pymysql"),
    ],
)
def test_a_database_whose_driver_is_missing(monkeypatch, url, driver):
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(BadInput) as e:
        study_at(url)
    assert f"no module '{driver}'" in str(e.value) and "secret" not in str(e.value) and "\n" not in str(e.value)


def test_a_url_goes_to_the_database_storage_as_it_is(tmp_path, monkeypatch):
    seen, url = [], "postgresql://user:secret@host:5432/x"

    class Server(optuna.storages.RDBStorage):
        def __init__(self, url):
            seen.append(url)
            super().__init__(f"sqlite:///{tmp_path / 'server.db'}")

    monkeypatch.setattr(optuna.storages, "RDBStorage", Server)
    for n in (1, 2):
        run_trials(study_at(url), objective, n)
    assert seen == [url, url] and len(finished(study_at(url))) == 2


def test_a_journal_with_half_a_line_goes_on(tmp_path):
    path = tmp_path / "a"
    run_trials(study_at(path), objective, 2)
    with path.open("ab") as f:
        f.write(b'{"op_code": 5, "work')
    run_trials(study_at(path), objective, 3)
    assert len(finished(study_at(path))) == 3


# ---------------------------------------------------------------------------------------------- recipes, and a real run

RECIPE = """
name = "tiny"
pretrain = "course"
trials = 3
tokens = 2048
looks = 2
sampler = "random"
pruner = "halving"
[search.lr]
low = 0.001
high = 0.01
log = true
[search.batch_size]
choices = [4, 8]
"""


PRETRAIN = """
data = [{corpus!r}]
license = "none"
limits = "none"
[test]
name = "tiny"
vocab_size = 270
model = {{ d_model = 16, n_layers = 1, n_heads = 2, context = 32 }}
train = {{ steps = 8, batch_size = 4, seq_len = 32, lr = 0.003, save_every = 2 }}
"""


@pytest.fixture
def tiny(tmp_path):
    """A sweep over a model of 16 columns and a page of text."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "the", "sea"]
    lines = [" ".join(words[(i * k) % 12] for k in range(1, 40)) + f" {i}" for i in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    (tmp_path / "base.toml").write_text(PRETRAIN.format(corpus=str(tmp_path / "text.txt")))
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.replace('"course"', f'"{tmp_path / "base.toml"}"'))
    return path


@pytest.fixture
def settings(tmp_path):
    return load_settings(overrides={"scale": "test", "device": "cpu", "dtype": "float32"})


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("trials = 3", "trials = 0", "trials is 0"),
        ("trials = 3", "trails = 3", "'trails'"),
        ("tokens = 2048", "tokens = 500", "tokens is 500"),
        ('"random"', '"bayes"', "sampler is 'bayes'"),
        ('"halving"', '"hyper"', "pruner is 'hyper'"),
        ("low = 0.001", "low = 0.0", "low is 0"),
        ("low = 0.001", "low = 0.01", "high is 0.01"),
        ("high = 0.01", "", "low, high"),
        ("[search.lr]", "[search.steps]", "'steps'"),
        ("[4, 8]", "[4, 4]", "choices is"),
        ("[4, 8]", "[4, 8.5]", "batch_size is 8.5"),
        ("[4, 8]", "[4, 0]", "batch_size is 0"),
        ('"course"', '"w4"', "recipe is 'w4'"),
        ('"tiny"', '"a/b"', "name is"),
    ],
)
def test_a_recipe_is_refused_before_work(tmp_path, settings, old, new, says):
    path = tmp_path / "r.toml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(BadInput) as e:
        sweep(path, tmp_path / "out", settings=settings)
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_the_recipe_that_comes_with_the_course(settings):
    recipe, base = load_sweep_recipe(ROOT / "recipes" / "sweep" / "course-lr.toml", settings)
    assert recipe.trials > 1 and base.name


def test_a_refused_storage_leaves_no_folder(tmp_path, settings, tiny):
    (tmp_path / "mine").mkdir()
    for out in ("new", "mine"):
        with pytest.raises(BadInput, match="nosuchdatabase"):
            sweep(tiny, tmp_path / out, settings=settings, storage="nosuchdatabase://host/x")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine").is_dir()  # a folder that was there stays


def test_a_sweep_from_start_to_log(tmp_path, settings, tiny):
    path, told = tiny, []
    sweep(path, tmp_path / "out", settings=settings, say=told.append)
    study = sweep(path, tmp_path / "out", settings=settings, say=told.append)  # nothing left to do
    assert len(finished(study)) == 3 == len(told)
    rows = RunLog(tmp_path / "out" / "runs.jsonl").read().rows
    assert len(rows) == 3 and {r["about"]["state"] for r in rows} <= {"complete", "pruned"}
    assert min(r["metrics"]["val"] for r in rows if r["about"]["state"] == "complete") == study.best_value
    path.write_text(path.read_text().replace("0.01\n", "0.02\n"))
    with pytest.raises(BadInput, match="another recipe"):
        sweep(path, tmp_path / "out", settings=settings)
    path.write_text(path.read_text().replace("0.02\n", "0.01\n"))
    with (tmp_path / "text.txt").open("a") as f:
        f.write("\n\na new page of the text")
    with pytest.raises(BadInput, match="another data"):
        sweep(path, tmp_path / "out", settings=settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(BadInput, match="out is"):
        sweep(path, tmp_path / "full", settings=settings)


def test_in_a_terminal_the_table_is_redrawn_after_every_trial(tmp_path, settings, tiny, monkeypatch):
    import rich
    from rich.console import Console

    screen, told = io.StringIO(), []
    monkeypatch.setattr(rich, "_console", Console(file=screen, force_terminal=True, width=100))
    study = sweep(tiny, tmp_path / "out", settings=settings, say=told.append, live=True)
    frames = re.findall(r"(\d) of 3 finished", screen.getvalue())
    assert frames == sorted(frames) and set(frames) >= {"0", "3"}  # a fast trial may be passed over
    assert "\x1b[2K" in screen.getvalue()  # a frame takes the place of the one before
    assert told == [] and len(finished(study)) == 3  # no lines between the frames
    lines = screen.getvalue().split("3 of 3 finished")[-1]
    assert f"{study.best_value:.4f}" in lines


def test_a_worker_that_is_killed_between_two_checkpoints(tmp_path, settings, tiny, monkeypatch):
    """The trial goes on from its last checkpoint in another process, to the same bits; nothing is lost or double."""
    from llmcourse import training

    killed = subprocess.run([sys.executable, str(WORKER), "--dies", "1", "5", str(tiny), str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert len(RunLog(tmp_path / "out" / "runs.jsonl").read().rows) == 1 and (tmp_path / "out/trials/0001").is_dir()
    begun, train = [], training.train

    class First(training.Observer):
        def after_step(self, run):
            begun.append((self.trial, run.result.steps))

    def watched(*args, out, observers, **how):
        first = First()
        first.trial = int(out.name)
        return train(*args, out=out, observers=[*observers, first], **how)

    monkeypatch.setattr(training, "train", watched)
    study = sweep(tiny, tmp_path / "out", settings=settings, say=lambda line: None)
    assert begun[0] == (1, 5)  # checkpoints are written after every second step
    assert sorted(finished(study)) == [0, 1, 3] and [t.state.name for t in study.get_trials()].count("FAIL") == 1
    rows = {r["about"]["root"]: r for r in RunLog(tmp_path / "out" / "runs.jsonl").read().rows}
    assert sorted(rows) == [0, 1, 3] and not list((tmp_path / "out" / "trials").iterdir())
    sweep(tiny, tmp_path / "whole", settings=settings, say=lambda line: None)
    for row in RunLog(tmp_path / "whole" / "runs.jsonl").read().rows[:2]:
        again = rows[row["about"]["root"]]
        assert (again["config"], again["metrics"]) == (row["config"], row["metrics"])


def test_the_text_is_encoded_once(tmp_path, settings, tiny, monkeypatch):
    from llmcourse import pretraining

    tiny.write_text(tiny.read_text().replace("trials = 3", "trials = 1"))
    calls, encoded = [], pretraining._encoded
    monkeypatch.setattr(pretraining, "_encoded", lambda *a: calls.append(a) or encoded(*a))
    start = lambda: sweep(tiny, tmp_path / "out", settings=settings, say=lambda line: None)
    start(), start()
    assert len(calls) == 1
    (tokens,) = (tmp_path / "out").glob("text-*/tokens.pt")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    start()
    assert len(calls) == 2  # a flipped bit is found, and the tokens are made anew


# ---------------------------------------------------------------------------------------------- the log


def fill(log: RunLog, n=3):
    for i in range(n):
        log.append({"lr": 10.0**-i, "rule": "adamw"}, {"val": 3.0 - i, "note": float("nan")}, seed=i)


def test_a_log_keeps_what_a_number_depends_on(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    fill(log)
    rows, broken = log.read()
    assert len(rows) == 3 and not broken
    assert {"code", "versions", "hardware", "seed", "time"} <= set(rows[0]) and "torch" in rows[0]["versions"]
    table = columns(rows)
    assert (
        table["config.lr"] == [1.0, 0.1, 0.01] and table["metrics.note"] == ["nan"] * 3 and table["seed"] == [0, 1, 2]
    )


def test_a_line_that_is_cut_anywhere_is_told_and_never_taken_for_a_whole_one(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    fill(log, 2)
    content = log.path.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(first, len(content)):
        log.path.write_bytes(content[:cut])
        rows, broken = log.read()
        assert len(rows) == 1 and broken == ([] if cut == first else [2])
    log.path.write_bytes(content[:-20])
    fill(log, 1)
    rows, broken = log.read()
    assert len(rows) == 2 and broken == [2] and json.dumps(rows[1])


def _many(path, who):
    for i in range(40):
        RunLog(path).append({"who": who, "long": "x" * 3000}, {"i": i}, seed=0)


def test_two_processes_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "runs.jsonl"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_many, [path] * 2, range(2)))
    rows, broken = RunLog(path).read()
    assert not broken and Counter(r["config"]["who"] for r in rows) == {0: 40, 1: 40}


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"a": [1]}},
        {"config": {"": 1}},
        {"config": 5},
        {"metrics": {"a": 1j}},
        {"seed": -1},
        {"seed": 1.5},
        {"about": {1: 2}},
    ],
    ids=str,
)
def test_what_no_log_can_hold_is_refused_and_nothing_written(tmp_path, change):
    log = RunLog(tmp_path / "runs.jsonl")
    with pytest.raises(BadInput):
        log.append(**({"config": {}, "metrics": {}, "seed": 0} | change))
    assert not log.path.exists()


def test_a_log_that_is_held(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".runs.jsonl.lock"), pytest.raises(BadInput, match="another process"):
        RunLog(tmp_path / "runs.jsonl", wait=0.05).append({}, {}, seed=0)


def test_the_picture(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    fill(log)
    table = columns(log.read())
    names = ["config.lr", "config.rule"]
    fig = parallel_coordinates(table, names, "metrics.val", alt="three runs with a learning rate", log=["config.lr"])
    lines = [line.get_ydata() for line in fig.axes[0].lines if len(line.get_xdata()) == 3 and line.get_lw() == 1.2]
    assert len(lines) == 3 and sorted(float(y[0]) for y in lines) == [0.0, 0.5, 1.0]
    with pytest.raises(BadInput):
        parallel_coordinates(table, ["config.nothing"], "metrics.val", alt="three runs with a learning rate")
    with pytest.raises(BadInput):
        parallel_coordinates(columns(log.read().rows[:1]), names, "metrics.val", alt="three runs and a learning rate")


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path / "runs.jsonl")
    fill(log)
    folder = to_tensorboard(log.read(), tmp_path / "events")
    for i, run in enumerate(sorted(folder.iterdir())):
        events = EventAccumulator(str(run))
        events.Reload()
        assert [e.value for e in events.Scalars("val")] == [3.0 - i]
        assert "adamw" in events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    with pytest.raises(BadInput, match="folder is"):
        to_tensorboard(log.read(), tmp_path / "events")
    with pytest.raises(BadInput, match="runs is 0"):
        to_tensorboard([], tmp_path / "other")


def test_without_tensorboard_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path / "runs.jsonl")
    fill(log, 1)
    with pytest.raises(BadInput, match="tracking"):
        to_tensorboard(log.read(), tmp_path / "events")
    assert not (tmp_path / "events").exists()


def test_the_last_word_where_every_trial_was_given_up() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study()
    none = "No trial reached its end with a finite loss."
    assert in_words(study) == none
    for state, value in (("PRUNED", None), ("FAIL", None), ("COMPLETE", float("inf"))):
        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState[state], value=value))
        assert in_words(study) == none
    for value in (0.5, 0.25, 0.75):
        study.add_trial(optuna.trial.create_trial(value=value))
    assert in_words(study) == "Best: trial 4 with 0.2500"

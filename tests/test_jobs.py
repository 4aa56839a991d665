"""The main job on a tiny model: what it writes, that it resumes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, clean_env, run_cli
from safetensors.torch import load_file, save_file

from llmcourse import jobs
from llmcourse.cli import main
from llmcourse.data import load_model
from llmcourse.jobs import find_recipe, load_recipe, run_job
from llmcourse.settings import BadInput

QUIET = lambda line: None


@pytest.fixture(scope="module")
def finished(tiny_model, corpus, tmp_path_factory):
    """One finished job, shared by the tests that only look at it."""
    from llmcourse.settings import load_settings

    out = tmp_path_factory.mktemp("job") / "out"
    settings = load_settings(
        ROOT / "settings.ini", env=SMALL | {"LLMCOURSE_DATA": str(corpus), "LLMCOURSE_HOME": str(out.parent / "home")}
    )
    lines: list[str] = []
    job = run_job(str(tiny_model), load_recipe(find_recipe("w4")), out, settings=settings, say=lines.append)
    return out, job, lines, settings


def test_the_output_is_complete_and_nothing_else_is_left(finished):
    out, _, lines, _ = finished
    assert {
        "config.json",
        "packed.safetensors",
        "tokenizer.json",
        "passport.json",
        "pareto.png",
        "pareto.svg",
        "report.html",
        "job.json",
    } <= {p.name for p in out.iterdir()}
    assert [p.name for p in out.parent.iterdir() if p.name != "home"] == ["out"]
    assert sum(line.startswith("[") for line in lines) == 10 and lines[-1].startswith("[10/10] report")


def test_the_table_has_the_five_models_with_intervals_and_real_bytes(finished):
    out, job, _, _ = finished
    rows = {r["name"]: r for r in job["rows"]}
    assert list(rows) == ["dense", "RTN 4-bit", "GPTQ 4-bit", "RTN 3-bit", "GPTQ 3-bit"]
    for r in rows.values():
        assert r["low"] <= r["perplexity"] <= r["high"] and r["ratio_low"] <= r["ratio"] <= r["ratio_high"]
    assert rows["dense"]["ratio"] == rows["dense"]["ratio_low"] == rows["dense"]["ratio_high"] == 1
    assert rows["GPTQ 4-bit"]["bytes_disk"] == (out / "packed.safetensors").stat().st_size
    assert rows["GPTQ 3-bit"]["bytes_disk"] < rows["GPTQ 4-bit"]["bytes_disk"] < rows["dense"]["bytes_disk"] / 3
    assert {(p["a"], p["b"]) for p in job["pairs"]} == {("GPTQ 4-bit", "RTN 4-bit"), ("GPTQ 3-bit", "RTN 3-bit")}


def test_the_model_loads_back_and_has_the_perplexity_of_the_report(finished, corpus):
    from llmcourse.data import token_data
    from llmcourse.evaluation import perplexity

    out, job, _, settings = finished
    model, tokenizer, card = load_model(out, settings=settings)
    data = token_data(tokenizer, corpus, limits={"test": 512}, settings=settings)
    again = perplexity(model, data.test, context=64, stride=48, batch_size=4)
    row = next(r for r in job["rows"] if r["name"] == job["deliver"])
    assert again.value == pytest.approx(row["perplexity"], rel=1e-5) and card.source == "folder"


def test_the_passport_file_has_every_model(finished):
    out, job, _, _ = finished
    cards = json.loads((out / "passport.json").read_text(encoding="utf8"))
    assert list(cards) == [r["name"] for r in job["rows"]]
    dense, small = cards["dense"], cards["GPTQ 4-bit"]
    assert small["parameters"] == dense["parameters"] and small["flops_per_token"] == dense["flops_per_token"]
    assert (
        small["bytes_memory"] < dense["bytes_memory"]
        and small["prefill"]["n"] == 3
        and small["perplexity"]["protocol"]["context"] == 64
    )


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.outside.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_self_contained_page_with_the_numbers_of_the_job(finished):
    out, job, _, _ = finished
    html = (out / "report.html").read_text(encoding="utf8")
    page = _Page()
    page.feed(html)
    assert page.outside == [] and "script" not in page.tags and "svg" in page.tags and page.tags.count("h1") == 1
    assert not re.search(
        r"url\((?!#)|@import|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", html
    )
    text = " ".join(" ".join(page.text).split())
    for r in job["rows"]:
        assert r["name"] in text and f"{r['perplexity']:.2f}" in text
    assert "context 64" in text and "<title" in html[html.index("<svg") :]  # the figure says in words what it shows


def test_a_second_call_does_nothing(finished, tiny_model):
    out, job, _, settings = finished
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    lines: list[str] = []
    assert run_job(str(tiny_model), load_recipe(find_recipe("w4")), out, settings=settings, say=lines.append) == job
    assert (
        len(lines) == 1
        and "nothing to do" in lines[0]
        and before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    )


def test_another_job_does_not_overwrite_a_finished_one(finished, tiny_model):
    from dataclasses import replace

    out, _, _, settings = finished
    with pytest.raises(BadInput, match="not empty and holds something else"):
        run_job(str(tiny_model), load_recipe(find_recipe("w4")), out, settings=replace(settings, seed=1), say=QUIET)


def job_env(corpus: Path, tmp_path: Path) -> dict[str, str]:
    return clean_env(
        **SMALL,
        LLMCOURSE_DATA=str(corpus),
        LLMCOURSE_HOME=str(tmp_path / "home"),
        PYTHONPATH=str(ROOT / "tests" / "no_network"),
        PYTHONUNBUFFERED="1",
    )


# The command line, but when the second arm is written, half a file is on the disk and the process waits to be killed.
STUCK = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that Ctrl-C is ignored
import llmcourse.packed as q
from llmcourse.cli import main
real, calls = q.save_packed, []
def save_packed(model, tokenizer, folder, **kw):
    calls.append(folder)
    if len(calls) < 2:
        return real(model, tokenizer, folder, **kw)
    (Path(folder) / "packed.safetensors").write_bytes(b"half")
    print("half a file is written", flush=True)
    time.sleep(300)
q.save_packed = save_packed
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_job_leaves_no_output_and_resumes(finished, tiny_model, corpus, tmp_path, how):
    _, job, _, _ = finished
    out, env = tmp_path / "out", job_env(corpus, tmp_path)
    arguments = ["compress", str(tiny_model), "--recipe", "w4", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=1,
    )
    for line in process.stdout:
        if line.startswith("half a file"):  # in the middle of the fourth step
            process.send_signal(getattr(signal, how))
            break
    _, err = process.communicate(timeout=120)
    assert not out.exists() and process.returncode != 0
    if how == "SIGINT":
        assert (
            process.returncode == 130
            and err.strip().endswith("run the same command to go on.")
            and "Traceback" not in err
        )
    again = subprocess.run(
        [sys.executable, "-m", "llmcourse", *arguments], env=env, text=True, capture_output=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3
    resumed = json.loads((out / "job.json").read_text(encoding="utf8"))
    assert [r["perplexity"] for r in resumed["rows"]] == [r["perplexity"] for r in job["rows"]]  # to the last bit
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


def test_a_full_disk_keeps_the_finished_steps(tiny_model, tmp_path, small_settings, monkeypatch):
    import errno

    import llmcourse.packed as q

    out, recipe = tmp_path / "out", load_recipe(find_recipe("w4"))
    calls = []
    real = q.save_packed

    def full(model, tokenizer, folder, **kw):
        calls.append(folder)
        if len(calls) == 2:
            (Path(folder) / "packed.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(model, tokenizer, folder, **kw)

    monkeypatch.setattr(q, "save_packed", full)
    with pytest.raises(BadInput, match="disk is full; finished steps are kept"):
        run_job(str(tiny_model), recipe, out, settings=small_settings, say=QUIET)
    assert not out.exists() and not list((tmp_path / ".out.work").glob("*partial*"))
    lines: list[str] = []
    run_job(str(tiny_model), recipe, out, settings=small_settings, say=lines.append)
    assert sum("done before" in line for line in lines) == 3 and (out / "report.html").is_file()


def test_two_processes_do_not_work_on_the_same_output(tiny_model, tmp_path, small_settings):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.lock"), pytest.raises(BadInput, match="another process is working on it"):
        run_job(str(tiny_model), load_recipe(find_recipe("w4")), tmp_path / "out", settings=small_settings, say=QUIET)


# ------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def cli(monkeypatch, capsys, corpus, tmp_path):
    """The command line in this process: (exit code, standard output, standard error)."""

    def run(*args, **env):
        for key, value in (
            SMALL | {"LLMCOURSE_DATA": str(corpus), "LLMCOURSE_HOME": str(tmp_path / "home")} | env
        ).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "argv", ["llmcourse", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            main()
        captured = capsys.readouterr()
        return e.value.code, captured.out, captured.err

    return run


def broken_folder(tiny_model: Path, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / f"model-{how}"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    if how == "no-weights":
        weights.unlink()
    elif how == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "nan":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no-config":
        (folder / "config.json").unlink()
    return folder


def assert_refused(result, tmp_path, *words):
    code, out, err = result
    assert code == 2, (out, err)
    sentence = err.strip()
    assert sentence.startswith("llmcourse: ") and "\n" not in sentence and "Traceback" not in sentence
    for word in words:
        assert word in sentence, sentence
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".out", "out"))] == []  # nothing written


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no-weights", ("has no weights", "*.safetensors")),
        ("pickle", ("pytorch_model.bin", "pickle", "run any code", "*.safetensors")),
        ("cut", ("model-cut", "safetensors")),
        ("nan", ("model.layers.1.mlp.up_proj", "NaN")),
        ("no-config", ("config.json",)),
    ],
)
def test_a_model_folder_that_cannot_be_used(cli, tiny_model, tmp_path, how, words):
    assert_refused(
        cli("compress", broken_folder(tiny_model, tmp_path, how), "--recipe", "w4", "--out", tmp_path / "out"),
        tmp_path,
        *words,
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt-9", ("'gpt-9'", "smollm2-135m")), ("someone/some-model", ("offline", "LLMCOURSE_OFFLINE"))],
)
def test_an_unknown_model(cli, tmp_path, name, words):
    assert_refused(cli("compress", name, "--recipe", "w4", "--out", tmp_path / "out"), tmp_path, *words)


GOOD = 'name = "x"\ndeliver = "a"\n[[arm]]\nname = "a"\npasses = [{ method = "rtn", bits = 4, group_size = 64 }]\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bits = 4", "bits = 0", ("bits", "0", "2 to 8", "arm 'a'")),
        ("bits = 4", "bits = 1.5", ("bits", "1.5", "2 to 8")),
        ("group_size = 64", "group_size = 48", ("group_size", "48")),
        ("group_size = 64", "group_size = 0", ("group_size", "0")),
        ("bits = 4", "bitz = 4", ("'bitz'", "bits")),
        ('method = "rtn"', 'method = "magic"', ("'magic'", "gptq")),
        ('deliver = "a"', 'deliver = "b"', ("'b'", "a")),
        ('name = "x"', 'nome = "x"', ("'nome'", "name")),
        ("[[arm]]", "[arm]", ("arm",)),
        ('name = "x"', "name = x", ("TOML",)),
    ],
)
def test_a_mistake_in_a_recipe(cli, tiny_model, tmp_path, old, new, words):
    assert old in GOOD
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(GOOD.replace(old, new, 1), encoding="utf8")
    assert_refused(cli("compress", tiny_model, "--recipe", recipe, "--out", tmp_path / "out"), tmp_path, *words)


def test_the_good_recipe_is_good(tmp_path):
    path = tmp_path / "good.toml"
    path.write_text(GOOD, encoding="utf8")
    assert load_recipe(path).arms[0].name == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ("data", "documents with text")), ("three short words", ("data",)), ("word " * 3000, ("data", "part"))],
)
def test_text_that_is_empty_or_too_short(cli, tiny_model, tmp_path, text, words):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf8")
    assert_refused(
        cli("compress", tiny_model, "--recipe", "w4", "--out", tmp_path / "out", LLMCOURSE_DATA=str(path)),
        tmp_path,
        *words,
    )


def test_a_test_part_shorter_than_one_window(cli, tiny_model, tmp_path, corpus):
    assert_refused(
        cli("compress", tiny_model, "--recipe", "w4", "--out", tmp_path / "out", LLMCOURSE_EVAL_TOKENS="1000000"),
        tmp_path,
        "part 'test'",
        "at least 1000000",
    )


def test_an_output_folder_that_is_not_empty(cli, tiny_model, tmp_path):
    out = tmp_path / "folder"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert_refused(cli("compress", tiny_model, "--recipe", "w4", "--out", out), tmp_path, "out is", "not empty")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_an_output_that_is_a_file(cli, tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(cli("compress", tiny_model, "--recipe", "w4", "--out", tmp_path / "file"), tmp_path, "out is")
    assert (tmp_path / "file").read_text() == "x"


def test_unknown_recipe_and_unknown_command(cli, tiny_model, tmp_path):
    assert_refused(cli("compress", tiny_model, "--recipe", "w5", "--out", tmp_path / "out"), tmp_path, "'w5'", "w4")
    code, _, err = cli("compres")
    assert code == 2 and "compress" in err


# ------------------------------------------------------------------------------------------- the command itself


def test_help_answers_at_once_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter(); sys.argv = ['llmcourse', '--help']\n"
        "from llmcourse.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted(m for m in ('torch', 'transformers', 'numpy', 'datasets', 'matplotlib') if m in sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=clean_env(), check=True)
    assert "compress" in result.stdout and result.stderr.strip() == "[]"
    # what can be promised on any machine: no more than a few times what Python itself needs to start
    times = {}
    for name, args in {
        "python": ["-c", "import typing, dataclasses, inspect"],
        "help": ["-m", "llmcourse", "--help"],
    }.items():
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *args], env=clean_env(), capture_output=True, check=True)
            runs.append(time.perf_counter() - start)
        times[name] = min(runs)
    assert times["help"] < max(0.5, 12 * times["python"])


def test_start_unpacks_the_course_and_does_not_touch_what_is_there(tmp_path):
    target = tmp_path / "course"
    result = run_cli("start", target)
    assert result.returncode == 0, result.stderr
    assert {"nbs", "recipes", "settings.ini"} <= {p.name for p in target.iterdir()} and (
        target / "nbs" / "00_runtime.ipynb"
    ).is_file()
    again = run_cli("start", target)
    assert again.returncode == 2 and "DIR is" in again.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert run_cli("start", tmp_path / "mine").returncode == 2 and [p.name for p in (tmp_path / "mine").iterdir()] == [
        "file"
    ]


def test_every_shipped_recipe_is_valid():
    from llmcourse.settings import load_settings

    settings = load_settings(ROOT / "settings.ini", env={})
    for path in (ROOT / "recipes").glob("*.toml"):
        for arm in load_recipe(path).arms:
            arm.build(settings)
    assert set(jobs.METHODS) >= {"rtn", "gptq"}

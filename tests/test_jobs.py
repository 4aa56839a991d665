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
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, SMALL, clean_env
from safetensors.torch import load_file, save_file

from llmcourse.compression import LayerPass, LayerUpdate, Pass, Report
from llmcourse.data import load_model
from llmcourse.jobs import find_recipe, load_recipe, run_job
from llmcourse.report import levels, print_table, render_report, told_levels
from llmcourse.settings import BadInput

pytestmark = pytest.mark.usefixtures("plain_figures")  # but for the job that tests share, which has real ones
QUIET = lambda line: None
PASS = '{ method = "rtn", bits = 4, group_size = 64 }'
GOOD = f'name = "x"\ndeliver = "a"\n[[arm]]\nname = "a"\npasses = [{PASS}]\n'
GPTQ = '{ method = "gptq", bits = 4, group_size = 64, n_calib = 4 }'


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
    assert sum(line.startswith("[") for line in lines) == 11 and lines[-1].startswith("[11/11] report")


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


def test_the_levels_of_the_intervals_are_told_and_no_verdict_is_built_on_an_unknown_one(finished, capsys):
    assert levels(0.95) == "95 %" and levels(0.94449, 0.951, 0.946) == "94.4 to 95.1 %"
    assert levels(0.95, None) == "unknown: few or skewed units"
    _, job, _, _ = finished
    measured = [r["level"] for r in job["rows"]]
    assert all(level is None or 0.8 < level < 0.95 for level in measured) and job["rows"][0]["ratio_level"] is None
    assert told_levels(job).startswith(f"How often such intervals hold the truth: perplexity {levels(*measured)}, × ")
    few, none = (
        "Too few documents carry the difference: they cannot",
        "The interval contains 1: on these tokens they cannot",
    )
    for level, low, high, says in (
        (0.93, 0.7, 0.8, "GPTQ 4-bit is better"),
        (0.93, 1.1, 1.2, "GPTQ 4-bit is worse"),
        (0.93, 0.9, 1.2, none),
        (0.93, 0.9, 1.0, none),
        (0.93, 1.0, 1.2, none),
        (None, 0.7, 0.8, few),
    ):
        pair = job["pairs"][0] | {"low": low, "high": high, "level": level}
        print_table(job | {"pairs": [pair]})
        told = f"(interval {low:.3f} to {high:.3f}, level {levels(level)}). {says}"
        assert told in " ".join(capsys.readouterr().out.split())
        assert told in " ".join(render_report(job | {"pairs": [pair]}, "<svg></svg>").split())


def test_the_model_loads_back_and_has_the_perplexity_of_the_report(finished, corpus):
    from llmcourse.data import token_data
    from llmcourse.evaluation import perplexity

    out, job, _, settings = finished
    settings = replace(settings, kernels="portable")  # a kernel rounds as bfloat16 does
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
        and small["prefill"]["n"] == 8
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
    assert not re.search(r"[a-zB]\.[A-Z]", text), "two sentences without a blank between them"
    assert "context 64" in text and "<title" in html[html.index("<svg") :]  # the figure says in words what it shows


def page_text(job: dict) -> str:
    page = _Page()
    page.feed(render_report(job, "<svg></svg>"))
    return " ".join(" ".join(page.text).split())


@pytest.mark.parametrize(
    ("own", "control", "words"),
    [
        ((0.5, 0.4, 0.6), (1.0, 0.9, 1.1), "Yes , to write a token"),
        ((4.0, 3.0, 5.0), (1.0, 0.9, 1.1), "No , to write a token"),
        ((0.95, 0.93, 0.97), (1.0, 0.9, 1.1), "It cannot be told , to write a token"),  # inside what nothing shows
        ((1.2, 0.9, 1.5), (1.0, 0.9, 1.1), "It cannot be told , to write a token"),
        ((1.2, 1.15, 1.25), (1.1, 1.0, 1.3), "It cannot be told , to write a token"),
    ],
)
def test_is_it_faster_is_answered_first_and_with_a_control(finished, own, control, words):
    job = json.loads(json.dumps(finished[1]))
    for name, values in ((job["deliver"], own), ("dense, again", control)):
        job["speed"]["write"][name] |= dict(zip(("ratio", "low", "high"), values))
    text = page_text(job)
    answer = text[text.index("Is it faster?") :]
    assert answer.startswith(f"Is it faster? {words}"), answer[:120]
    assert f"{control[1]:.2f} to {control[2]:.2f}" in answer


def test_the_headline_names_what_the_weights_came_in_and_no_ratio_is_one_over(finished):
    job = json.loads(json.dumps(finished[1]))
    chosen = next(r for r in job["rows"] if r["name"] == job["deliver"])
    assert "package that the weights came in" not in page_text(job)  # this model came in none
    job["packaged_bytes"] = round(chosen["bytes_disk"] / 0.92)
    text = page_text(job)
    assert "against that the file is 8 % smaller" in text and text.index("8 % smaller") < text.index("What was gained")
    assert not re.search(r"\b1/\d", text) and f"{1 / chosen['smaller_than_bfloat16']:.3f} ×" in text


def test_what_other_people_call_their_models_is_text_and_nothing_else(finished):
    job = json.loads(json.dumps(finished[1]))
    job["model"] = "<img src=x onerror=alert(1)>"
    job["rows"][0]["writes"] = job["rows"][2]["writes"] = "<script>alert(1)</script>"
    html = render_report(job, "<svg></svg>")
    assert "<img" not in html and "<script" not in html and "&lt;img" in html


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


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest"])
def test_a_finished_job_that_was_changed_is_not_called_finished(finished, tiny_model, tmp_path, harm):
    out, _, _, settings = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    weights = copy / "packed.safetensors"
    if harm == "flip":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 4
        weights.write_bytes(content)
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "remove":
        (copy / "report.html").unlink()
    else:
        (copy / "MANIFEST.json").unlink()
    with pytest.raises(BadInput, match="this job was finished, but it "):
        run_job(str(tiny_model), load_recipe(find_recipe("w4")), copy, settings=settings, say=QUIET)
    if harm in ("flip", "cut"):
        with pytest.raises(BadInput, match=r"packed\.safetensors"):
            load_model(copy, settings=settings)


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
real, calls = q.save_student, []
def save_student(model, tokenizer, folder, **kw):
    calls.append(folder)
    if len(calls) < 2:
        return real(model, tokenizer, folder, **kw)
    (Path(folder) / "packed.safetensors").write_bytes(b"half")
    print("half a file is written", flush=True)
    time.sleep(300)
q.save_student = save_student
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
    again = warm.run(["-m", "llmcourse", *arguments], env=env)
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
    real = q.save_student

    def full(model, tokenizer, folder, **kw):
        calls.append(folder)
        if len(calls) == 2:
            (Path(folder) / "packed.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(model, tokenizer, folder, **kw)

    monkeypatch.setattr(q, "save_student", full)
    with pytest.raises(BadInput, match="disk is full; finished steps are kept"):
        run_job(str(tiny_model), recipe, out, settings=small_settings, say=QUIET)
    assert not out.exists() and not list((tmp_path / ".out.work").glob("*partial*"))
    lines: list[str] = []
    run_job(str(tiny_model), recipe, out, settings=small_settings, say=lines.append)
    assert sum("done before" in line for line in lines) == 3 and (out / "report.html").is_file()


def test_two_processes_do_not_work_on_the_same_output(tiny_model, tmp_path, small_settings):
    from llmcourse.store import held

    (tmp_path / ".out.work").mkdir()
    with held(tmp_path / ".out.work"), pytest.raises(BadInput, match="another process is working on it"):
        run_job(str(tiny_model), load_recipe(find_recipe("w4")), tmp_path / "out", settings=small_settings, say=QUIET)


def small_copy(tiny_model: Path, corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model and a text of the test's own, to be changed."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(corpus, tmp_path / "text.jsonl")
    return tmp_path / "model", tmp_path / "text.jsonl"


def other_weights(model: Path, text: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(model: Path, text: Path) -> None:
    """The merges in the other order: the same vocabulary, other tokens."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf8"))
    merges = tokenizer["model"]["merges"]
    merges.reverse()
    path.write_text(json.dumps(tokenizer), encoding="utf8")


CHANGES = {  # every input of a job: what is changed, and how the job calls it
    "weights": (other_weights, "files of the model"),
    "configuration": (
        lambda m, t: (m / "config.json").write_text(
            (m / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')
        ),
        "files of the model",
    ),
    "tokenizer": (other_tokenizer, "files of the model"),
    "text": (lambda m, t: t.write_text(t.read_text().replace("ka", "ko")), "files of the data"),
    "recipe": (None, "recipe"),
    "settings": (None, "seed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_input_that_changed_is_noticed_after_the_end_and_before_going_on(
    tiny_model, corpus, tmp_path, small_settings, what, monkeypatch
):
    """Neither a finished job nor finished steps of other inputs are taken for this one's."""
    from dataclasses import replace

    import llmcourse.jobs as jobs

    model, text = small_copy(tiny_model, corpus, tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD, encoding="utf8")
    settings = replace(small_settings, data=str(text))

    def run(out, **more):
        lines: list[str] = []
        job = run_job(str(model), load_recipe(path), out, settings=replace(settings, **more), say=lines.append)
        return job, lines

    before, _ = run(tmp_path / "done")

    def killed(self, arm, work):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(jobs._Job, "_evaluate_arm", killed)
        run(tmp_path / "half")
    change, name = CHANGES[what]
    more = {"seed": 1} if what == "settings" else {}
    if what == "recipe":
        path.write_text(GOOD.replace("bits = 4", "bits = 3"), encoding="utf8")
    elif change:
        change(model, text)
    with pytest.raises(BadInput, match="holds something else"):
        run(tmp_path / "done", **more)
    resumed, lines = run(tmp_path / "half", **more)
    assert any("changed since the run that was interrupted" in line and name in line for line in lines)
    assert not any("done before" in line for line in lines)
    anew, _ = run(tmp_path / "anew", **more)
    numbers = lambda job: [(r["name"], r["perplexity"], r["bytes_disk"]) for r in job["rows"]]
    assert numbers(resumed) == numbers(anew)
    if what != "settings":
        assert numbers(resumed) != numbers(before)


def test_a_file_of_the_user_at_the_place_of_delivery_is_kept(tiny_model, tmp_path, small_settings, monkeypatch):
    import llmcourse.jobs as jobs

    path, out = tmp_path / "recipe.toml", tmp_path / "out"
    path.write_text(GOOD, encoding="utf8")
    real = jobs._Job._summary

    def meanwhile(self, *args):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        return real(self, *args)

    with monkeypatch.context() as m, pytest.raises(BadInput, match="holds something else by now"):
        m.setattr(jobs._Job, "_summary", meanwhile)
        run_job(str(tiny_model), load_recipe(path), out, settings=small_settings, say=QUIET)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"] and (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()  # the person moves it: the finished steps are still there
    lines: list[str] = []
    run_job(str(tiny_model), load_recipe(path), out, settings=small_settings, say=lines.append)
    assert sum("done before" in line for line in lines) == 4 and (out / "report.html").is_file()


def test_a_work_folder_that_a_killed_clean_up_left_is_swept(tiny_model, tmp_path, small_settings):
    path, out = tmp_path / "recipe.toml", tmp_path / "out"
    path.write_text(GOOD, encoding="utf8")
    run_job(str(tiny_model), load_recipe(path), out, settings=small_settings, say=QUIET)
    (tmp_path / ".out.work" / "arm-a").mkdir(parents=True)
    run_job(str(tiny_model), load_recipe(path), out, settings=small_settings, say=QUIET)
    assert not (tmp_path / ".out.work").exists()


def test_windows_and_calibration_are_bounded_by_the_positions_of_the_model(tiny_model, tmp_path, small_settings):
    """The shipped presets are longer than what this model can read (256 positions)."""
    from dataclasses import replace

    path = tmp_path / "recipe.toml"
    path.write_text(GOOD.replace(PASS, GPTQ.replace("n_calib = 4", "n_calib = 2")), encoding="utf8")
    scale = replace(small_settings.scale, context=512, stride=384, eval_tokens=1024, calib_length=512)
    lines: list[str] = []
    settings = replace(small_settings, scale=scale)
    job = run_job(str(tiny_model), load_recipe(path), tmp_path / "out", settings=settings, say=lines.append)
    assert "256 positions" in lines[0] and "context 256, stride 192" in job["protocol"]
    assert job["scale"]["calib_length"] == 256 and "seq_len=256" in job["rows"][1]["reports"][0].replace(" ", "")


def test_calibration_on_a_text_of_its_own_leaves_the_test_part_out(tiny_model, corpus, tmp_path, small_settings):
    from llmcourse.data import load_records
    from llmcourse.jobs import job_data

    tokenizer = load_model(tiny_model).tokenizer
    tested = [r["text"] for r in load_records(corpus, "test", settings=small_settings)]
    other = tmp_path / "calib.jsonl"
    fresh = [f"fresh text number {i} about nothing at all" for i in range(50)]
    other.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*tested, *fresh]), encoding="utf8")
    data = job_data(tokenizer, small_settings, str(other), {"test": 512, "calib": 256})
    said = tokenizer.decode(data.calib)
    assert "fresh text" in said and not any(text[:40] in said for text in tested)
    assert torch.equal(data.test, job_data(tokenizer, small_settings, small_settings.data, {"test": 512}).test)
    with pytest.raises(BadInput, match=r"calib is .*tokens outside the test part"):
        job_data(tokenizer, small_settings, str(other), {"test": 512, "calib": 10**6})


# ------------------------------------------------------------------------------------------- any student


@dataclass(frozen=True, kw_only=True)
class Halves(LayerPass):
    """Keeps the larger half of the weights of each row, as a mask."""

    name = "test-halves"

    def solve(self, W, stats, mask):
        keep = W.abs() >= W.abs().median(1, keepdim=True).values
        return LayerUpdate(W * keep, keep)


@dataclass(frozen=True, kw_only=True)
class Shorter(Pass):
    """Drops the last block: another, smaller model."""

    name = "test-shorter"
    reshapes = True

    def run(self, model, ctx):
        model.model.layers = model.model.layers[:-1]
        model.config.num_hidden_layers -= 1
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:-1]
        return model, Report(self.name, self.config, (), 0.0)


STUDENTS = {
    "masked": '{ method = "test-halves" }',
    "masked and packed": '{ method = "test-halves" }, { method = "rtn", bits = 4, group_size = 64 }',
    "some layers": '{ method = "rtn", bits = 4, group_size = 64, layers = "*.mlp.*" }',
    "smaller": '{ method = "test-shorter" }',
    "smaller and packed": '{ method = "test-shorter" }, { method = "gptq", bits = 4, group_size = 64 }',
    "noise": '{ method = "rounding-noise", bits = 4, group_size = 64 }',
    "16 values": '{ method = "nf4" }',
    "two values": '{ method = "binary" }',
    "masked, three values": '{ method = "test-halves" }, { method = "ternary" }',
    "turned inputs": '{ method = "rotate-inputs", kind = "permutation" }, { method = "nf4" }',
}


def recipe_of(tmp_path: Path, passes: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD.replace(PASS, passes), encoding="utf8")
    return path


@pytest.mark.parametrize("kind", STUDENTS)
def test_any_student_is_saved_measured_and_loaded_back(tiny_model, corpus, tmp_path, small_settings, kind):
    from llmcourse.data import token_data
    from llmcourse.evaluation import perplexity

    recipe = load_recipe(recipe_of(tmp_path, STUDENTS[kind]))
    job = run_job(str(tiny_model), recipe, tmp_path / "out", settings=small_settings, say=QUIET)
    model, tokenizer, _ = load_model(tmp_path / "out", settings=replace(small_settings, kernels="portable"))
    data = token_data(tokenizer, corpus, limits={"test": 512}, settings=small_settings)
    row, weights = job["rows"][1], dict(model.named_parameters())
    again = perplexity(model, data, context=64, stride=48, batch_size=4)
    assert again.value == pytest.approx(row["perplexity"], rel=1e-4)
    assert 0 < row["treated"] < 1 or kind == "smaller"
    if kind.startswith("masked"):
        layer = model.get_submodule("model.layers.0.mlp.up_proj").weight
        assert float((layer == 0).float().mean()) >= 0.45
    if kind.startswith("smaller"):
        assert model.config.num_hidden_layers == 1 and not any(".layers.1." in name for name in weights)
    if "values" in kind:  # nothing of what was rounded is stored dense
        stored = load_file(tmp_path / "out" / "packed.safetensors")
        layers = {name.removesuffix(".codes") for name in stored if name.endswith(".codes")}
        assert len(layers) == 14 and not layers & {name.removesuffix(".weight") for name in stored}
    if kind == "some layers":
        whole = {k for k in weights if "self_attn" in k and k.endswith("weight")}
        assert len(whole) == 8 and row["treated"] < 0.6


def test_layers_of_the_command_line_hold_for_passes_that_name_none(tiny_model, tmp_path, small_settings):
    passes = PASS + ', { method = "rtn-embedding", bits = 8 }'
    recipe, out = load_recipe(recipe_of(tmp_path, passes)), tmp_path / "out"
    job = run_job(str(tiny_model), recipe, out, settings=small_settings, layers="*.mlp.down_proj", say=QUIET)
    said = " ".join(job["rows"][1]["reports"])
    assert "layers=*.mlp.down_proj" in said and ": 2 layers" in said and job["rows"][1]["left"]
    page = (out / "report.html").read_text(encoding="utf8")
    assert f"{100 * job['rows'][1]['treated']:.2f} % of the dense model" in " ".join(page.split())
    with pytest.raises(BadInput, match="layers"):
        other = tmp_path / "other"
        run_job(str(tiny_model), recipe, other, settings=small_settings, layers="*.nothing.*", say=QUIET)


def test_a_pass_that_is_cut_off_goes_on_from_its_finished_blocks(tiny_model, tmp_path, small_settings, monkeypatch):
    import llmcourse.compression as compression

    recipe = load_recipe(recipe_of(tmp_path, GPTQ))
    whole = run_job(str(tiny_model), recipe, tmp_path / "whole", settings=small_settings, say=QUIET)
    real, solved = compression.treat, []

    def stop(method, site, *more):
        if "layers.1." in site.name or any("layers.1." in name for name in site.layers):
            raise KeyboardInterrupt
        return real(method, site, *more)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(compression, "treat", stop)
        run_job(str(tiny_model), recipe, tmp_path / "cut", settings=small_settings, say=QUIET)
    assert list((tmp_path / ".cut.work").rglob("block-0000.safetensors"))

    def count(method, site, *more):
        solved.extend(site.layers)
        return real(method, site, *more)

    monkeypatch.setattr(compression, "treat", count)
    again = run_job(str(tiny_model), recipe, tmp_path / "cut", settings=small_settings, say=QUIET)
    assert solved and all("layers.1." in name for name in solved)  # the first block was not solved again
    assert [r["perplexity"] for r in again["rows"]] == [r["perplexity"] for r in whole["rows"]]  # to the last bit
    assert (tmp_path / "cut" / "packed.safetensors").read_bytes() == (
        tmp_path / "whole" / "packed.safetensors"
    ).read_bytes()


# ------------------------------------------------------------------------------------------- bad input


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


MISTAKES = [  # (what stands in the good recipe, what a person wrote instead, words of the refusal)
    # the right key with a wrong value
    ("bits = 4", "bits = 0", ("bits", "0", "2 to 8", "arm 'a'")),
    ("bits = 4", "bits = 9", ("bits", "9", "2 to 8")),
    ("bits = 4", "bits = 1.5", ("bits", "1.5", "whole number")),
    ("bits = 4", "bits = 4.0", ("bits", "4.0", "whole number")),
    ("bits = 4", 'bits = "4"', ("bits", "'4'", "whole number")),
    ("bits = 4", "bits = true", ("bits", "True", "whole number")),
    ("bits = 4", "bits = [4]", ("bits", "[4]", "whole number")),
    ("bits = 4", "bits = nan", ("bits", "nan", "whole number")),
    ("bits = 4", "bits = 2020-01-01", ("bits", "2020", "whole number")),
    ("bits = 4", "bits = 99999999999999999999", ("bits", "2 to 8")),
    ("group_size = 64", "group_size = 48", ("group_size", "48")),
    ("group_size = 64", "group_size = 0", ("group_size", "0")),
    ("group_size = 64", "group_size = 64.0", ("group_size", "64.0")),
    ("group_size = 64", "group_size = true", ("group_size", "True")),
    ("group_size = 64", 'group_size = "row"', ("group_size", "'row'")),
    ("group_size = 64", 'symmetric = "false"', ("symmetric", "'false'", "true or false")),
    ("group_size = 64", "symmetric = 0", ("symmetric", "0", "true or false")),
    (PASS, GPTQ.replace("n_calib = 4", 'n_calib = "16"'), ("n_calib", "'16'", "whole number")),
    (PASS, GPTQ.replace("n_calib = 4", "n_calib = 2.5"), ("n_calib", "2.5", "whole number")),
    (PASS, GPTQ.replace("n_calib = 4", "n_calib = 0"), ("n_calib", "0")),
    (PASS, GPTQ.replace("n_calib = 4", "n_calib = -1"), ("n_calib", "-1")),
    (PASS, GPTQ.replace("n_calib = 4", "n_calib = 1000000"), ("calib", "tokens")),
    (PASS, GPTQ.replace("n_calib = 4", "seq_len = 0"), ("seq_len", "0")),
    (PASS, GPTQ.replace("n_calib = 4", "seq_len = 100000"), ("seq_len", "100000", "positions")),
    (PASS, GPTQ.replace("n_calib = 4", 'act_order = "no"'), ("act_order", "'no'", "true or false")),
    (PASS, GPTQ.replace("n_calib = 4", "damping = nan"), ("damping", "nan", "finite")),
    (PASS, GPTQ.replace("n_calib = 4", "damping = inf"), ("damping", "inf", "finite")),
    (PASS, GPTQ.replace("n_calib = 4", "damping = -0.1"), ("damping", "-0.1")),
    (PASS, GPTQ.replace("n_calib = 4", 'damping = "0.01"'), ("damping", "'0.01'", "number")),
    (PASS, GPTQ.replace("n_calib = 4", "seed = -1"), ("seed", "-1")),
    # a wrong key, or none
    ("bits = 4", "bitz = 4", ("'bitz'", "bits")),
    ('method = "rtn"', 'method = "magic"', ("'magic'", "gptq")),
    ('method = "rtn"', 'method = ["rtn"]', ("method", "['rtn']", "gptq")),
    ('method = "rtn", ', "", ("method", "None", "gptq")),
    ('deliver = "a"', 'deliver = "b"', ("'b'", "a")),
    ('deliver = "a"', "deliver = 1", ("deliver", "1", "text")),
    ('deliver = "a"\n', "", ("deliver (missing)",)),
    ('name = "x"', 'nome = "x"', ("'nome'", "name")),
    # what holds the arms
    ("[[arm]]", "[arm]", ("arm", "list")),
    (f"passes = [{PASS}]", "passes = []", ("passes", "[]")),
    (f"passes = [{PASS}]", f"passes = {PASS}", ("passes", "list")),
    (f"passes = [{PASS}]", 'passes = ["rtn"]', ("passes", "table")),
    (f"passes = [{PASS}]", "", ("passes (missing)",)),
    (GOOD[GOOD.index("[[arm]]") :], "arm = []\n", ("arm", "[]")),
    ('[[arm]]\nname = "a"', '[[arm]]\nname = ""', ("name", "''")),
    ('[[arm]]\nname = "a"', '[[arm]]\nname = "."', ("name", "'.'", "letter")),
    ('[[arm]]\nname = "a"', '[[arm]]\nname = "../../x"\n#', ("deliver",)),
    ('[[arm]]\nname = "a"', '[[arm]]\nname = "Dense"', ("name", "'Dense'")),
    ('[[arm]]\nname = "a"', '[[arm]]\nname = "<b>a</b>"', ("name", "<b>a</b>")),
    ('[[arm]]\nname = "a"', '[[arm]]\nname = "a\\u001b[31m"', ("name", "control characters")),
    ('[[arm]]\nname = "a"', f'[[arm]]\nname = "{"a" * 61}"', ("name", "60 characters")),
    ("[[arm]]", f'[[arm]]\nname = "A!"\npasses = [{PASS}]\n[[arm]]', ("names", "differ")),
    ('name = "x"', 'name = "\\u001b]0;title\\u0007"', ("name", "control characters")),
    ('name = "x"', 'name = "x"\ndescription = 3', ("description", "3", "text")),
    # the file
    ('name = "x"', "name = x", ("TOML",)),
    ('name = "x"', "\xff", ("TOML",)),
    ('name = "x"', "a = " + "[" * 5000, ("TOML",)),
    ('name = "x"', "a = " + "9" * 5000, ("TOML",)),
]


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES)
def test_a_mistake_in_a_recipe(cli, tiny_model, tmp_path, old, new, words):
    assert old in GOOD
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(GOOD.replace(old, new, 1), encoding="utf8")
    assert_refused(cli("compress", tiny_model, "--recipe", recipe, "--out", tmp_path / "out"), tmp_path, *words)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x89PNG", GOOD.replace('"x"', '"é"').encode("latin-1")])
def test_a_recipe_that_is_no_text(cli, tiny_model, tmp_path, content):
    (tmp_path / "recipe.toml").write_bytes(content)
    result = cli("compress", tiny_model, "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert_refused(result, tmp_path, "UTF-8")


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
        "heavy = ('torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'pydantic')\n"
        "print(sorted(m for m in heavy if m in sys.modules), file=sys.stderr)"
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


def test_every_shipped_recipe_is_valid():
    from llmcourse.settings import load_settings

    settings = load_settings(ROOT / "settings.ini", env={})
    paths = list((ROOT / "recipes").glob("*.toml"))
    assert paths
    for path in paths:
        for arm in load_recipe(path).arms:
            assert len(arm.build(settings)) == len(arm.passes) > 0

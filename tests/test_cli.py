"""Odd command lines: none ends in a traceback, and none writes anything before it refuses."""

from __future__ import annotations

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, run_cli

# what is in the folder that the commands run in; {model} and {recipe} are good ones
FILES = {
    "empty.toml": "",
    "list.toml": "a = [",
    "empty.txt": "",
    "two.txt": "one word\n",
    "notes.md": "# no data file",
    "bad.jsonl": '{"text": "one"}\n{"text": \n',
    "numbers.jsonl": "1\n2\n",
    "null.jsonl": '{"text": null}\n',
    "nocolumn.csv": "title\nx\n",
    "full/mine.txt": "keep",
    "model/config.json": "{}",
    "progress.json": "not a progress file",
    "sheet.ipynb": "not a notebook",
    "list.ipynb": "[]",
    "null.ipynb": '{"nbformat": 4, "nbformat_minor": 5, "metadata": null, "cells": null}',
    "empty.ipynb": '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}',
    "a.toml": 'name = "x"\ndeliver = "a"\n[[arm]]\nname = "a"\n'
    'passes = [{ method = "rtn", bits = 4, group_size = 64 }]\n',
}
GO = "compress {model} --recipe a.toml --out out"
REFUSED = [  # exit code 2, one line
    "compres",
    "compress",
    "compress {model}",
    "compress {model} --recipe a.toml",
    "compress --recipe a.toml --out out",
    "compress {model} {model} --recipe a.toml --out out",
    GO + " --speed 11",
    GO + " --out",
    "compress '' --recipe a.toml --out out",
    "compress . --recipe a.toml --out out",
    "compress / --recipe a.toml --out out",
    "compress model --recipe a.toml --out out",
    "compress empty.txt --recipe a.toml --out out",
    "compress full --recipe a.toml --out out",
    "compress $'\\x1b[31mred' --recipe a.toml --out out",
    "compress $'two\\nlines' --recipe a.toml --out out",
    "compress nobody --recipe a.toml --out out",
    "compress some/one --recipe a.toml --out out",
    "compress ../../etc --recipe a.toml --out out",
    "compress wikipedia --recipe a.toml --out out",
    "compress ~nobody-has-this-name/x --recipe a.toml --out out",
    "compress {model} --recipe '' --out out",
    "compress {model} --recipe . --out out",
    "compress {model} --recipe w9 --out out",
    "compress {model} --recipe course --out out",
    "compress {model} --recipe empty.toml --out out",
    "compress {model} --recipe list.toml --out out",
    "compress {model} --recipe empty.txt --out out",
    "compress {model} --recipe nothing.toml --out out",
    "compress {model} --recipe a.toml --out ''",
    "compress {model} --recipe a.toml --out /",
    "compress {model} --recipe a.toml --out .",
    "compress {model} --recipe a.toml --out full",
    "compress {model} --recipe a.toml --out empty.txt",
    "compress {model} --recipe a.toml --out empty.txt/out",
    "compress {model} --recipe a.toml --out ~nobody-has-this-name/out",
    f"compress {{model}} --recipe a.toml --out {'x' * 300}",
    GO + " --data nothing",
    GO + " --data ''",
    GO + " --data empty.txt",
    GO + " --data two.txt",
    GO + " --data notes.md",
    GO + " --data bad.jsonl",
    GO + " --data numbers.jsonl",
    GO + " --data null.jsonl",
    GO + " --data nocolumn.csv",
    GO + " --data model",
    GO + " --data some/set",
    GO + " --calib nothing",
    GO + " --calib notes.md",
    GO + " --device gpu",
    GO + " --device cuda:99",
    GO + " --device ''",
    GO + " --dtype int4",
    GO + " --dtype float64",
    GO + " --scale huge",
    GO + " --scale ''",
    "evaluate",
    "evaluate {model} {model}",
    "evaluate ''",
    "evaluate .",
    "evaluate model",
    "evaluate nobody",
    "evaluate some/one",
    "evaluate wikipedia",
    "evaluate {model} --data empty.txt",
    "evaluate {model} --data two.txt",
    "evaluate {model} --data notes.md",
    "evaluate {model} --data bad.jsonl",
    "evaluate {model} --data nothing",
    "evaluate {model} --data some/set",
    "evaluate {model} --metrics accuracy --data two.txt",
    "evaluate {model} --metrics beauty",
    "evaluate {model} --metrics ''",
    "evaluate {model} --metrics perplexity,,beauty",
    "evaluate {model} --metrics perplexity --part half",
    "evaluate {model} --device gpu",
    "evaluate {model} --dtype int4",
    "evaluate {model} --scale huge",
    "evaluate {model} --json yes",
    "tour --recipe w9",
    "tour --model nobody --out out",
    "tour --scale huge --out out",
    "tour --out full",
    "serve",
    "serve ''",
    "serve nobody --port 0",
    "serve model --port 0",
    "serve wikipedia --port 0",
    "serve some/one --port 0",
    "serve {model} --port many",
    "serve {model} --port 65536",
    "serve {model} --port 0 --host 0.0.0.0",
    "serve {model} --port 0 --host 300.1.1.1",
    "serve {model} --port 0 --max-batch 0",
    "serve {model} --port 0 --cache-tokens 1",
    "serve {model} --port 0 --queue -1",
    "serve {model} --port 0 --max-tokens 0",
    "serve {model} --port 0 --timeout nan",
    "serve {model} --port 0 --grace -1",
    "serve {model} --port 0 --device gpu",
    "serve {model} --port 0 --dtype int4",
    "serve {model} --port 0 --api-key-file nothing",
    "serve {model} --port 0 --api-key-file empty.txt",
    "export",
    "export model",
    "export model --to gguf --out out",
    "export model --to awq --out out",
    "export nothing --to gguf --out out",
    "export full --to gguf --out full",
    "pretrain",
    "pretrain nothing --out out",
    "pretrain w4 --out out",
    "pretrain empty.toml --out out",
    "pretrain list.toml --out out",
    "finetune",
    "finetune nothing --out out",
    "finetune w4 --out out",
    "finetune empty.toml --out out",
    "finetune list.toml --out out",
    "finetune topics --out out --data nothing --model {model}",
    "finetune topics --out out --data null.jsonl --model {model}",
    "finetune finance --out full --model nothing",
    "capstone nothing --out out",
    "capstone w4 --out out",
    "capstone empty.toml --out out",
    "capstone list.toml --out out",
    "capstone finance --out out --model nothing",
    "capstone finance --out out --model {model} --data nothing",
    "sweep",
    "sweep nothing --out out",
    "sweep course --out out",
    "sweep empty.toml --out out",
    "sweep list.toml --out out",
    "sweep course-lr --out empty.txt",
    "sweep course-lr --out full",
    "data --fetch nothing",
    "data --fetch ''",
    "data --verify",
    "data extra",
    "start",
    "start full",
    "start empty.txt",
    "start empty.txt/x",
    "start ''",
    "start /",
    "check",
    "check nothing",
    "check nothing.ipynb",
    "check sheet.ipynb",
    "check list.ipynb",
    "check empty.ipynb",
    "check full",
    "check attention.nothing",
    "check attention --seconds nan",
    "check attention --seconds 0",
    "check attention --seconds -1",
    "check attention --seconds x",
    "hint",
    "hint nothing",
    "hint attention.nothing",
    "reveal nothing",
    "progress --merge nothing.json",
    "exercises nothing",
    "--nothing",
]
ACCEPTED = ["--help", "--version", "compress --help", "evaluate --help", "data", "exercises", "progress"]


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the commands name."""
    folder = tmp_path / "there"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf8")
    monkeypatch.chdir(folder)
    return folder


def words(line: str, model: Path) -> list[str]:
    line = line.replace("{model}", shlex.quote(str(model)))
    for written, meant in (("$'\\x1b[31mred'", "\x1b[31mred"), ("$'two\\nlines'", "two\nlines")):
        if written in line:
            before, after = line.split(written)
            return [*shlex.split(before), meant, *shlex.split(after)]
    return shlex.split(line)


def contents(folder: Path) -> dict:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("line", REFUSED)
def test_an_odd_command_line_is_one_sentence_and_writes_nothing(cli, there, tiny_model, line):
    before, beside = contents(there), set(there.parent.iterdir())
    code, out, err = cli(*words(line, tiny_model))
    assert code == 2, (code, out, err)
    said = [text for text in err.splitlines() if text.startswith("llmcourse: ")]
    assert len(said) == 1 and "Traceback" not in err and "\x1b" not in err, err
    assert contents(there) == before and set(there.parent.iterdir()) == beside


@pytest.mark.parametrize("line", ACCEPTED)
def test_a_plain_command_line_writes_nothing_either(cli, there, tiny_model, line):
    before = contents(there)
    code, _, err = cli(*words(line, tiny_model))
    assert code == 0 and "Traceback" not in err and contents(there) == before


# ------------------------------------------------------------------------------------------- what start hands out


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "course"
    result = run_cli("start", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_start_unpacks_the_course_and_does_not_touch_what_is_there(unpacked, tmp_path):
    assert {p.name for p in unpacked.iterdir()} == {"README.md", "exercises", "nbs", "recipes", "settings.ini"}
    chapters = {p.name for p in (ROOT / "nbs").glob("*.ipynb")} - {"92_teaching.ipynb"}
    assert {p.name for p in (unpacked / "nbs").glob("*.ipynb")} == chapters
    chinese = {p.name for p in (ROOT / "nbs" / "zh").glob("*.ipynb")}
    assert {p.name for p in (unpacked / "nbs" / "zh").glob("*.ipynb")} == chinese
    sheets = lambda root: {p.relative_to(root) for p in root.rglob("exercises/**/*.ipynb")}
    assert sheets(unpacked) == {p for p in sheets(ROOT) if p.parts[0] == "exercises"}
    before = contents(unpacked)
    again = run_cli("start", unpacked)
    assert again.returncode == 2 and "DIR is" in again.stderr and contents(unpacked) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert run_cli("start", tmp_path / "mine").returncode == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_three_start_at_once_and_one_wins(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: run_cli("start", tmp_path / "course"), range(3)))
    assert sorted(e.returncode for e in ended) == [0, 2, 2], [e.stderr for e in ended]
    assert all(e.stderr.count("\n") == 1 and "allowed: a folder that" in e.stderr for e in ended if e.returncode)
    assert [p.name for p in tmp_path.iterdir()] == ["course"]
    assert (tmp_path / "course" / "nbs" / "index.ipynb").is_file()


def test_learners_do_not_get_the_teachers_page_nor_the_solutions(unpacked):
    assert not (unpacked / "solutions").exists() and not list(unpacked.rglob("*teaching*"))
    page = json.loads((ROOT / "nbs" / "92_teaching.ipynb").read_text(encoding="utf8"))
    text = "".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
    sentences = [line for line in text.splitlines() if len(line) > 200][:20]
    everything = "".join(p.read_text(encoding="utf8") for p in unpacked.rglob("*.ipynb"))
    assert sentences and not any(json.dumps(line)[1:-1] in everything for line in sentences)


def prose(file: Path) -> str:
    text = file.read_text(encoding="utf8")
    if file.suffix == ".md":
        return text
    return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def test_every_link_of_the_unpacked_course_leads_somewhere(unpacked):
    links = 0
    for file in [*unpacked.rglob("*.ipynb"), unpacked / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", prose(file)):
            if re.search(r"\.(ipynb|png|svg|md|toml)$", target):
                links += 1
                assert (file.parent / target).exists(), f"{file.name}: {target}"
    assert links > 20


def test_the_start_page_has_a_path_for_each_reader(unpacked):
    page = (unpacked / "README.md").read_text(encoding="utf8")
    for words in ("want to learn", "teach", "model to shrink", "nbs/index.ipynb", "`check`", "`hint`", "`progress`"):
        assert words in page, words


# ------------------------------------------------------------------------------------------- llmcourse data --verify


def test_verify_tells_every_fault_and_says_when_there_is_nothing(cli, monkeypatch, tmp_path, home):
    home = tmp_path / "home"
    code, out, err = cli("data", "--verify")
    assert code == 2 and "nothing is prepared" in err and "sotu: not prepared" in out and "course-3m: every file" in out
    from llmcourse.store import CATALOG, write_manifest

    def prepared(name):
        folder = home / CATALOG[name].kind / name
        folder.mkdir(parents=True)
        for file in ("a.txt", "b.txt"):
            (folder / file).write_text(name)
        write_manifest(folder, carrier=CATALOG[name].carrier.sha256, revision=CATALOG[name].revision)
        return folder

    sotu, banking = prepared("sotu"), prepared("banking")
    code, out, err = cli("data", "--verify")
    assert code == 0 and "sotu: every file has its digest" in out and "en-fr: not prepared" in out, err
    (sotu / "a.txt").write_text("SOTU")
    (sotu / "b.txt").unlink()
    (banking / "b.txt").write_text("bankin")
    (home / "data" / "old-set").mkdir()
    code, out, err = cli("data", "--verify")
    assert code == 2 and "--fetch sotu --fetch banking" in err
    for words in ("sotu: has a a.txt whose sha256", "sotu: lacks b.txt", "banking: has a b.txt of 6 bytes", "old-set"):
        assert words in out, out

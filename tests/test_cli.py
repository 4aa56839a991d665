"""Odd command lines: none ends in a traceback, and none writes anything before it refuses."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

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
    "a.toml": 'name = "x"\ndeliver = "a"\n[[arm]]\nname = "a"\npasses = [{ method = "rtn", bits = 4, group_size = 64 }]\n',
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
    "tour --recipe w9",
    "tour --model nobody --out out",
    "tour --scale huge --out out",
    "tour --out full",
    "pretrain",
    "pretrain nothing --out out",
    "pretrain w4 --out out",
    "pretrain empty.toml --out out",
    "pretrain list.toml --out out",
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
ACCEPTED = ["--help", "--version", "compress --help", "data", "exercises", "progress"]


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

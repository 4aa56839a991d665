"""Shared by the tests: small models and texts made on the spot, the command line as a subprocess, no network."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
# small enough that a whole job takes seconds; numbers mean nothing
SMALL = {
    "LLMCOURSE_EVAL_TOKENS": "512",
    "LLMCOURSE_CONTEXT": "64",
    "LLMCOURSE_STRIDE": "48",
    "LLMCOURSE_BATCH_SIZE": "4",
    "LLMCOURSE_CALIB_SEQUENCES": "4",
    "LLMCOURSE_CALIB_LENGTH": "64",
}


def clean_env(**more: str) -> dict[str, str]:
    """The environment without the course's variables, on one thread, plus `more`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLMCOURSE_")}
    return (
        env
        | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        | more
    )


def exported_modules() -> dict[str, str]:
    """module -> the key of its chapter, the start of the notebook's name: "02" < "02b" < "02c" < "03"."""
    found = {}
    for notebook in (ROOT / "nbs").glob("*.ipynb"):
        match = re.search(r"#\|\s*default_exp:?\s*(\w+)", notebook.read_text(encoding="utf8"))
        if match:
            found[match[1]] = notebook.name.split("_")[0]
    return found


def run_cli(*args: str, cwd: Path | str | None = None, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """`llmcourse ARGS` in a process that cannot reach the network."""
    env = clean_env(**env)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests" / "no_network"), env.get("PYTHONPATH")]))
    return warm.run(["-m", "llmcourse", *args], cwd=cwd, env=env, timeout=timeout)


@pytest.fixture(scope="session")
def home() -> Path:
    """The prepared cache of the course; tests that need it are skipped with a word where it is not there."""
    from llmcourse.settings import load_settings
    from llmcourse.store import is_prepared

    folder = load_settings().home
    if not is_prepared("smollm2-135m", folder) or not is_prepared("wikipedia", folder):
        pytest.skip("the model and data are not prepared: run make course, or llmcourse data --fetch all")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A data file of short documents made of a few hundred words, the same on every machine."""
    rng = random.Random(0)
    syllables = ["ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "qu", "ze"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w", encoding="utf8") as f:
        for _ in range(400):
            f.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 60))) + "."}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, corpus) -> Path:
    """A folder with a random two-block Llama and a byte-level BPE tokenizer: compresses in seconds."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    bpe = ByteLevelBPETokenizer()
    texts = (json.loads(line)["text"] for line in corpus.read_text(encoding="utf8").splitlines())
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_settings(corpus, tmp_path, monkeypatch):
    """Settings of the small scale with the corpus as data."""
    from llmcourse.settings import load_settings

    env = SMALL | {"LLMCOURSE_DATA": str(corpus), "LLMCOURSE_HOME": str(tmp_path / "home")}
    return load_settings(ROOT / "settings.ini", env=env)


@pytest.fixture
def cli(monkeypatch, capsys, corpus, tmp_path):
    """The command line in this process: (exit code, standard output, standard error)."""

    from llmcourse.cli import main

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


@pytest.fixture
def plain_figures(monkeypatch):
    """Jobs of this process that draw nothing: half of the time of a tiny job is its figure."""
    from llmcourse import jobs

    def drawn(self, job, folder):
        for name in ("pareto.png", "pareto.svg"):
            (folder / name).write_text("<svg></svg>", encoding="utf8")
        return "<svg></svg>"

    monkeypatch.setattr(jobs._Job, "_figures", drawn)


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect from this process fails the test."""
    import socket

    def refuse(self, address):
        raise AssertionError(f"a network connection was attempted, to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)

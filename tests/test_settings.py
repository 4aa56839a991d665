"""Settings: what is read, what overrides it, and one sentence for every mistake."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_env, run_cli
from hypothesis import given
from hypothesis import strategies as st

from llmcourse.settings import BadInput, environment_whole, load_settings, number, one_of, whole

SHIPPED = ROOT / "settings.ini"


def test_shipped_settings_are_valid_at_every_scale():
    for scale in ("test", "cpu", "gpu"):
        settings = load_settings(SHIPPED, env={"LLMCOURSE_SCALE": scale})
        assert settings.scale.name == scale and settings.model == "smollm2-135m" and settings.offline


def test_environment_overrides_the_file_and_the_chosen_scale(tmp_path):
    settings = load_settings(
        SHIPPED,
        env={
            "LLMCOURSE_CONTEXT": "100",
            "LLMCOURSE_STRIDE": "50",
            "LLMCOURSE_HOME": str(tmp_path),
            "LLMCOURSE_OFFLINE": "no",
        },
    )
    assert (settings.scale.context, settings.scale.stride, settings.home, settings.offline) == (
        100,
        50,
        tmp_path,
        False,
    )


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LLMCOURSE_SCALLE": "cpu"}, ("LLMCOURSE_SCALLE", "LLMCOURSE_SCALE")),
        ({"LLMCOURSE_SCALE": "huge"}, ("scale", "'huge'", "test, cpu, gpu")),
        ({"LLMCOURSE_CONTEXT": "1.5"}, ("context", "'1.5'", "whole number")),
        ({"LLMCOURSE_STRIDE": "512"}, ("stride", "512", "1 to 511")),
        ({"LLMCOURSE_EVAL_TOKENS": "0"}, ("eval_tokens", "0", "from 1")),
        ({"LLMCOURSE_OFFLINE": "perhaps"}, ("offline", "'perhaps'", "true, false")),
        ({"LLMCOURSE_KERNELS": "fast"}, ("kernels", "'fast'", "auto, int4, portable")),
        ({"LLMCOURSE_DEVICE": "gpu"}, ("device", "'gpu'", "cuda")),
        ({"LLMCOURSE_DTYPE": "int8"}, ("dtype", "'int8'", "bfloat16")),
        ({"LLMCOURSE_SEED": "-1"}, ("seed", "-1", "4294967295")),
        ({"LLMCOURSE_SEED": ""}, ("seed", "''")),
        ({"LLMCOURSE_SEED": "1_0"}, ("seed", "'1_0'")),
        ({"LLMCOURSE_SEED": "٣"}, ("seed",)),
        ({"LLMCOURSE_SEED": "9" * 5000}, ("seed",)),
        ({"LLMCOURSE_BATCH_SIZE": "1" + "0" * 20}, ("batch_size",)),
        ({"LLMCOURSE_BATCH_SIZE": "nan"}, ("batch_size", "'nan'")),
        ({"LLMCOURSE_HOME": "~nobody-has-this-name/x"}, ("home", "no such user")),
        ({"LLMCOURSE_MODEL": "a\x1b[31mb"}, ("model", "control characters")),
        ({"LLMCOURSE_MODEL": ""}, ("model", "''")),
        ({"LLMCOURSE_SETTINGS": "/nowhere/settings.ini"}, ("LLMCOURSE_SETTINGS", "/nowhere/settings.ini")),
    ],
)
def test_a_bad_value_is_one_sentence_with_name_value_and_what_is_allowed(env, words):
    with pytest.raises(BadInput) as e:
        load_settings(None if "LLMCOURSE_SETTINGS" in env else SHIPPED, env=env)
    text = str(e.value)
    assert "\n" not in text and "allowed" in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed = 0", "sead = 0", ("sead", "seed")),
        ("[scale.cpu]", "[scales.cpu]", ("scales.cpu",)),
        ("seed = 0", "", ("seed (missing)",)),
        ("[llmcourse]", "[llmcourse", ("INI syntax",)),
        ("[llmcourse]", "[other]", ("[llmcourse] section",)),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, old, new, words):
    text = SHIPPED.read_text(encoding="utf8")
    assert old in text
    path = tmp_path / "settings.ini"
    path.write_text(text.replace(old, new, 1), encoding="utf8")
    with pytest.raises(BadInput) as e:
        load_settings(path, env={})
    for word in words:
        assert word in str(e.value)


FILES = {  # how a person's editor may have saved it: the bytes, and the words of the refusal (none: it is read)
    "utf-8": (lambda text: text.encode(), ()),
    "byte-order mark": (lambda text: text.encode("utf-8-sig"), ()),
    "windows line ends": (lambda text: text.replace("\n", "\r\n").encode(), ()),
    "latin-1": (
        lambda text: text.replace("home =", "home = /srv/données", 1).encode("latin-1", "ignore"),
        ("UTF-8", "byte "),
    ),
    "utf-16": (lambda text: text.encode("utf-16"), ("UTF-8",)),
    "a NUL": (lambda text: text.replace("home =", "home = a\0b", 1).encode(), ("home", "a path")),
    "defaults": (lambda text: ("[DEFAULT]\nseed = 3\n" + text).encode(), ("section", "DEFAULT")),
    "a key twice": (lambda text: text.replace("seed = 0", "seed = 0\nseed = 1").encode(), ("INI syntax",)),
    "a key without a value": (lambda text: text.replace("seed = 0", "seed").encode(), ("INI syntax",)),
    "nothing": (lambda text: b"", ("[llmcourse] section",)),
    "a picture": (lambda text: b"\x89PNG\r\n\x1a\n\xff", ("UTF-8",)),
}


@pytest.mark.parametrize("how", FILES)
def test_a_settings_file_as_editors_save_it(tmp_path, how):
    make, words = FILES[how]
    path = tmp_path / "settings.ini"
    path.write_bytes(make(SHIPPED.read_text(encoding="utf8")))
    if not words:
        assert load_settings(path, env={}).model == load_settings(SHIPPED, env={}).model
        return
    with pytest.raises(BadInput) as e:
        load_settings(path, env={})
    assert "\n" not in str(e.value) and "allowed" in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_a_file_with_a_byte_order_mark_is_found_in_the_folder_above(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_bytes(
        SHIPPED.read_text(encoding="utf8").replace("seed = 0", "seed = 7").encode("utf-8-sig")
    )
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert load_settings(env={}).seed == 7


def test_what_a_caller_gives_goes_over_the_environment_and_is_checked_like_it():
    env = {"LLMCOURSE_SCALE": "test", "LLMCOURSE_DEVICE": "cpu"}
    settings = load_settings(SHIPPED, env=env, overrides={"scale": "gpu", "device": None})
    assert settings.scale.name == "gpu" and settings.device == "cpu"
    with pytest.raises(BadInput, match="scale is 'huge'"):
        load_settings(SHIPPED, env=env, overrides={"scale": "huge"})


@pytest.mark.parametrize(("text", "value"), [("", 0), (" ", 0), ("0", 0), ("3", 3)])
def test_a_variable_that_other_programs_set(text, value):
    assert environment_whole("RANK", 0, {"RANK": text}) == value and environment_whole("RANK", 5, {}) == 5


@pytest.mark.parametrize("text", ["first", "-1", "1.0", "1e3"])
def test_a_variable_that_other_programs_set_wrongly(text):
    with pytest.raises(BadInput, match="RANK is"):
        environment_whole("RANK", 0, {"RANK": text})


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_unknown_variable_is_ignored(name):
    known = {
        "settings",
        "model",
        "data",
        "scale",
        "seed",
        "home",
        "offline",
        "device",
        "dtype",
        "kernels",
        "eval_tokens",
        "context",
        "stride",
        "batch_size",
        "calib_sequences",
        "calib_length",
        "train_steps",
        "seeds",
    }
    if name in known:
        return
    with pytest.raises(BadInput, match="environment variable"):
        load_settings(SHIPPED, env={f"LLMCOURSE_{name.upper()}": "1"})


def test_a_foreign_settings_ini_is_not_taken(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    result = run_cli("data", cwd=tmp_path, LLMCOURSE_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr


def test_the_command_line_says_it_in_one_line_and_exits_with_2():
    result = run_cli("data", LLMCOURSE_SCALE="huge")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.strip() == "llmcourse: scale is 'huge'; allowed: test, cpu, gpu."


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import llmcourse, sys; heavy = ('torch', 'transformers', 'datasets', 'numpy', 'pydantic')\n"
        "print([m for m in heavy if m in sys.modules]); print(sorted(llmcourse.__all__)[0])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, env=clean_env(), check=True
    ).stdout
    assert out.splitlines()[0] == "[]"


def test_every_public_name_resolves():
    import llmcourse

    for name in llmcourse.__all__:
        assert getattr(llmcourse, name).__module__.partition(".")[0] == "llmcourse"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmcourse.nothing


@pytest.mark.parametrize("good", [1, 8, np.int64(8), np.uint8(1), torch.tensor(3)])
def test_whole_takes_whole_numbers_of_any_library(good):
    assert whole("bits", good, 1, 8) == int(good) and type(whole("bits", good, 1, 8)) is int


PARTS = [np.array([1, 2]), torch.tensor([1, 2]), torch.tensor(3.0)]


@pytest.mark.parametrize("bad", [0, 9, 3.0, "3", True, np.bool_(True), None, [3], float("nan"), *PARTS])
def test_whole_refuses_the_rest(bad):
    with pytest.raises(BadInput, match=r"^bits is .*; allowed: a whole number from 1 to 8\.$"):
        whole("bits", bad, 1, 8)


@pytest.mark.parametrize("good", [0, 1, 0.5, np.float32(0.25)])
def test_number_takes_the_borders(good):
    assert number("p", good, 0, 1) == float(good)


@pytest.mark.parametrize("bad", [-1e-9, 1.0000001, float("nan"), float("inf"), True, "0.5", None, 1j, [0.5]])
def test_number_refuses_the_rest(bad):
    with pytest.raises(BadInput, match=r"^p is .*; allowed: a finite number from 0 to 1\.$"):
        number("p", bad, 0, 1)


def test_number_can_leave_its_borders_out():
    assert number("rate", 1e-9, above=0, below=1) == 1e-9
    for bad in (0, 1):
        with pytest.raises(BadInput, match="allowed: a finite number above 0 and below 1"):
            number("rate", bad, above=0, below=1)


def test_one_of():
    assert one_of("kind", "a", ["a", "b"]) == "a" and one_of("heads", 0, [0, 1]) == 0
    for bad in ("c", None, True, 1):
        with pytest.raises(BadInput, match=r"kind is .*; allowed: a, b"):
            one_of("kind", bad, ["a", "b"])
    with pytest.raises(BadInput):
        one_of("heads", True, [0, 1])

"""The wheel is the course: everything that the commands need, nothing that they do not, installable without a clone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, without the network."""
    copy = tmp_path_factory.mktemp("build") / "course"
    skip = shutil.ignore_patterns(".venv", ".git", "build", "dist", "_book", "__pycache__", ".*cache", "tests")
    shutil.copytree(ROOT, copy, ignore=skip)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=copy,
        env=clean_env(),
        check=True,
        capture_output=True,
    )
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lets_python_keep_its_bytecode():
    """Where PYTHONDONTWRITEBYTECODE is set, every process would compile PyTorch again: 7 s each time."""
    probe = "include Makefile\nprobe:\n\t@echo [$$PYTHONDONTWRITEBYTECODE]\n"
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "-s", "-f", "-", "probe"]
    made = subprocess.run(command, input=probe, cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert made.stdout.strip() == "[]"


def test_the_wheel_holds_the_package_and_the_course(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "llmcourse").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert ours <= names
    for notebook in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "zh").glob("*.ipynb")]:
        assert f"llmcourse/_course/{notebook.relative_to(ROOT).as_posix()}" in names
    assert {"llmcourse/_course/settings.ini", "llmcourse/_course/recipes/w4.toml"} <= names
    assert not [n for n in names if n.startswith(("tests/", "tools/", "benchmarks/")) or n.endswith(".pyc")]


def test_the_installed_wheel_unpacks_the_course(wheel, tmp_path):
    site, target = tmp_path / "site", tmp_path / "course"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    env = clean_env(PYTHONPATH=str(site))
    where = subprocess.run(
        [sys.executable, "-c", "import llmcourse; print(llmcourse.__file__)"],
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert str(site) in where  # not the checkout
    result = subprocess.run(
        [sys.executable, "-m", "llmcourse", "start", str(target)], env=env, cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert (target / "nbs" / "14_quantization.ipynb").read_bytes() == (
        ROOT / "nbs" / "14_quantization.ipynb"
    ).read_bytes()
    settings = subprocess.run(
        [sys.executable, "-c", "from llmcourse.settings import load_settings; print(load_settings().source)"],
        env=env,
        cwd=target,
        text=True,
        capture_output=True,
        check=True,
    )
    assert settings.stdout.strip() == str((target / "settings.ini").resolve())


def test_every_extra_is_there_and_constrained():
    assert {"lab", "classroom", "book", "eval", "dev"} <= set(PROJECT["optional-dependencies"])
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    names = {re.match(r"[\w-]+", d).group().lower().replace("_", "-") for d in wanted} - {"llmcourse"}
    assert names - pins == set()


def test_the_pins_allow_what_the_project_asks_for():
    from packaging.requirements import Requirement

    pins = dict(
        line.strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    pins = {k.lower().replace("_", "-"): v for k, v in pins.items()}
    for text in [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name != "llmcourse":
            assert requirement.specifier.contains(pins[name]), text


def test_the_package_imports_without_what_the_gpu_image_lacks():
    """Every module imports where datasets, nbdev, gguf, platformdirs, psutil and torchao are not installed."""
    code = """
import sys
absent = {"datasets", "nbdev", "fastcore", "gguf", "platformdirs", "psutil", "torchao", "pydantic", "nbgrader"}
absent |= {"IPython", "execnb", "fastapi", "starlette", "uvicorn", "prometheus_client"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib, pkgutil, llmcourse
for module in pkgutil.walk_packages(llmcourse.__path__, "llmcourse."):
    if module.name not in ("llmcourse.__main__", "llmcourse.practice.classroom"):  # the adapter to nbgrader
        importlib.import_module(module.name)
print("imported")
"""
    result = subprocess.run([sys.executable, "-c", code], env=clean_env(), text=True, capture_output=True)
    assert "imported" in result.stdout, result.stderr[-2000:]


def test_the_readme_names_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    for target in set(re.findall(r"make ([a-z]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for picture in re.findall(r"!\[[^\]]{40,}\]\(([^)]+)\)", readme):
        assert (ROOT / picture).is_file(), picture
    assert "![" in readme
    from llmcourse.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    for command in set(re.findall(r"`llmcourse ([a-z]+)", readme)):
        assert command in commands, command
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf8")


def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIRST = ["--index-strategy", "unsafe-best-match"]


@pytest.mark.parametrize(
    ("config", "args", "env"),
    [
        ("", [], {}),
        # an address may hold a password: it is no argument, which everybody on the machine can read
        (
            "global.index-url='https://me:pw@m.example/simple'",
            [],
            {"UV_DEFAULT_INDEX": "https://me:pw@m.example/simple"},
        ),
        # a command's section is above the general one, a variable above both
        (
            "global.index-url='https://a/'\n:env:.index-url='https://c/'\ninstall.index-url='https://b/'",
            [],
            {"UV_DEFAULT_INDEX": "https://c/"},
        ),
        ("global.extra-index-url='https://a/ https://b/'", [], {"UV_INDEX": "https://a/ https://b/"}),
        (r"global.extra-index-url='\nhttps://a/\nhttps://b/'", [], {"UV_INDEX": "https://a/ https://b/"}),
        # pip goes on without a folder that is missing, uv would stop
        (
            "global.find-links='/no/such/folder {here}'\nglobal.constraint='/no/such.txt'",
            ["--find-links", "{here}"],
            {},
        ),
        ("global.extra-index-url='file:///no/such file://{here}'", [], {"UV_INDEX": "file://{here}"}),
        ("global.extra-index-url='file:///no/such'", [], {}),
        (
            "global.trusted-host='m.example other'",
            ["--allow-insecure-host", "m.example", "--allow-insecure-host", "other"],
            {},
        ),
        ("global.no-index='true'\nglobal.cert='/c.pem'", ["--no-index"], {"SSL_CERT_FILE": "/c.pem"}),
        ("global.no-index='false'\nglobal.timeout='60'", [], {"UV_HTTP_TIMEOUT": "60"}),
        ("global.proxy='http://p:1'", [], {"HTTP_PROXY": "http://p:1", "HTTPS_PROXY": "http://p:1"}),
        ("a line of another kind\nlist.format='columns'", [], {}),
    ],
)
def test_uv_is_told_what_pip_is_set_up_with(config, args, env, tmp_path, monkeypatch):
    for name in ("SSL_CERT_FILE", "UV_HTTP_TIMEOUT", "HTTP_PROXY", "HTTPS_PROXY", "UV_DEFAULT_INDEX", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)
    here = str(tmp_path)
    want = {name: value.replace("{here}", here) for name, value in env.items()}
    tool = setup_env()
    got = tool.as_uv(config.replace("{here}", here))
    assert got == (FIRST + [a.replace("{here}", here) for a in args], want)
    for name in want:  # what somebody has set for uv stays
        monkeypatch.setenv(name, "mine")
    assert tool.as_uv(config.replace("{here}", here))[1] == {}


@pytest.mark.parametrize("uv", ["missing", "fails", "works"])
def test_where_uv_cannot_install_pip_does(uv, tmp_path, monkeypatch, capsys):
    tool, asked = setup_env(), []
    monkeypatch.setattr(tool, "UV", tmp_path / "uv")
    if uv != "missing":
        (tmp_path / "uv").touch()

    def run(command, quiet=True, check=True, env=None):
        asked.append(Path(command[0]).name)
        code = int(uv == "fails" and asked[-1] == "uv")
        return subprocess.CompletedProcess(
            command, code, stdout="", stderr="no such index https://me:pw@m.example/simple"
        )

    monkeypatch.setattr(tool, "run", run)
    tool.install("a-package")
    python = tool.PYTHON.name
    assert asked == {"missing": [python], "fails": [python, "uv", python], "works": [python, "uv"]}[uv]
    said = capsys.readouterr().out
    assert ("no such index https://…@m.example" in said) == (uv == "fails") and "pw" not in said

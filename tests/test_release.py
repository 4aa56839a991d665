"""What a release and a contributor rely on: one version, workflows and guides that name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import llmcourse

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf8")
WORKFLOWS = {p.name: p.read_text(encoding="utf8") for p in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
GUIDES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CITATION.cff")
# written by a command before it is named, or an example
MADE = {"dist/*-bundle.tar", "dist/*", "constraints.txt", "dist/llmcourse-site.tar.gz"}
TARGETS = set(re.findall(r"^([a-z]+):(?!=)", MAKEFILE, re.M))


def commands_of(workflow: dict) -> list[str]:
    """Every `run:` of every step, one line each."""
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines() if line.strip()]


def what_is_missing(line: str) -> list[str]:
    """Targets of make, scripts, modules, tests and commands of ours that a line names and that are not there."""
    from llmcourse.cli import app
    from llmcourse.store import CATALOG

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    missing = [f"make {t}" for t in re.findall(r"(?:^|[ `])make ([a-z]+)", line) if t not in TARGETS]
    extras = re.findall(r"make \.venv/\.(\w+)\.stamp", line)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    missing += [f"extra {e}" for e in extras if not re.search(rf"^{e} = \[", pyproject, re.M)]
    paths = re.findall(r"(?<![\w/.-])((?:tools|tests|benchmarks|solutions|nbs|recipes|llmcourse|\.ci)/[\w./-]+)", line)
    missing += [path for path in paths if not (ROOT / path.rstrip(".")).exists()]
    missing += [f"llmcourse {c}" for c in re.findall(r"(?:^|[ `/])llmcourse ([a-z]+)", line) if c not in commands]
    return missing + [a for a in re.findall(r"--fetch ([\w-]+)", line) if a not in {"all", *CATALOG}]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_names_only_what_exists(name: str) -> None:
    workflow = yaml.safe_load(WORKFLOWS[name])
    assert commands_of(workflow)
    assert [m for line in commands_of(workflow) for m in what_is_missing(line) if m not in MADE] == []
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
        assert "timeout-minutes" in job or not any("run" in step for step in job["steps"])
        for step in job["steps"]:
            assert len({"uses", "run"} & set(step)) == 1
            assert re.fullmatch(r"[\w-]+/[\w./-]+@v\d+", step["uses"]) if "uses" in step else True


@pytest.mark.parametrize(
    "line",
    [
        "make rocket", "python tools/rocket.py", "python -m pytest tests/test_rocket.py", "llmcourse rocket",
        "llmcourse data --fetch rocket", "make .venv/.rocket.stamp", "bash .ci/rocket",
    ],
)  # fmt: skip
def test_the_look_at_commands_can_fail(line: str) -> None:
    assert what_is_missing(line)
    assert (
        what_is_missing("make test && bash .ci/run && .venv/bin/python tools/form.py && llmcourse data --fetch all")
        == []
    )


def test_a_release_makes_what_it_says() -> None:
    lines = "\n".join(commands_of(yaml.safe_load(WORKFLOWS["release.yml"])))
    for command in ("bash .ci/run", "make dist", "make book", "make bundle", "tools/bundle.py --verify", "gh release"):
        assert command in lines
    assert lines.index("make book") < lines.index("make bundle"), "the bundle holds the book"
    trigger = yaml.safe_load(WORKFLOWS["release.yml"])[True]  # YAML reads the key `on` as true
    assert trigger == {"push": {"tags": ["v*"]}}
    # the shell's way to read the version, in Python's words
    (found,) = re.findall(r'^__version__ = "(.*)"$', (ROOT / "llmcourse" / "__init__.py").read_text(), re.M)
    assert found == llmcourse.__version__


def test_one_version_everywhere() -> None:
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    assert cite["version"] == llmcourse.__version__
    assert {"cff-version", "message", "title", "authors", "license", "date-released"} <= cite.keys()
    assert cite["license"] == "Apache-2.0" and (ROOT / "LICENSE").is_file()
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    assert f"\n## [{llmcourse.__version__}] - {cite['date-released']}\n" in changes
    assert changes.index("## [Unreleased]") < changes.index(f"## [{llmcourse.__version__}]")
    assert f'right: "llmcourse {llmcourse.__version__}"' in (ROOT / "_quarto.yml").read_text(encoding="utf8")


@pytest.mark.parametrize("name", GUIDES[1:])
def test_the_front_page_leads_to_the_guides(name: str) -> None:
    assert f"]({name})" in (ROOT / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_links_only_to_what_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf8")
    links = [t for t in re.findall(r"\]\(([^)#\s]+)\)", text) if not re.match(r"[a-z]+:", t)]
    assert [t for t in links if not (ROOT / t).exists()] == []


def placeholders(text: str) -> str:
    """The guide's own names for what a reader writes, taken out."""
    return re.sub(r"\S*(?:NN_name|NAME|CHAPTER|SHEET|my-method|name\.py|MODEL|FOLDER)\S*", "", text)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_a_guide_names_only_what_exists(name: str) -> None:
    text = placeholders((ROOT / name).read_text(encoding="utf8"))
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    assert [m for part in code for m in what_is_missing(part)] == []
    assert all(path.exists() for path in [ROOT / p for p in re.findall(r"`(\w+\.(?:toml|bib|yml|ini))`", text)])


def test_the_guide_takes_ten_steps_each() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    for title in ("A chapter", "An exercise", "A method of compression", "A family of models"):
        part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert [int(n) for n in re.findall(r"^(\d+)\. ", part, re.M)] == list(range(1, 11)), title


def test_the_image_is_built_from_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    assert [m for line in lines for part in re.split(r"&&|;|\|\|", line) for m in what_is_missing(part.strip())] == []
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER learner"] and lines.index("USER learner") < next(
        i for i, line in enumerate(lines) if "setup_env" in line
    )
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf8").split()
    assert {".git", ".venv", "solutions"} <= set(left_out)
    kept = {p.name for p in Path(ROOT).iterdir()} - set(left_out)
    assert {"pyproject.toml", "constraints.txt", "tools", "llmcourse", "nbs", "LICENSE", "README.md"} <= kept

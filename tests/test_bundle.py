"""The bundle: whole or not there, the same every time, and it installs and works where there is no network.

The bundle of these tests has the course's own wheel only; what else is needed is taken from this environment. The whole
one, with PyTorch, is gigabytes: BUNDLE_TEST=1 makes it, installs it into an empty environment and takes the tour there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, clean_env
from example_sheet import tool

sys.path.insert(0, str(ROOT / "tools"))
import bundle

from llmcourse.settings import BadInput

NO_NETWORK = ["unshare", "-rn"]


def can_cut_off() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode
    )


def python(*args: object, cwd: Path, seconds: float = 300, **env: str) -> subprocess.CompletedProcess:
    """A command in a namespace that has no network, without this project in its path."""
    env = clean_env(**{"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull} | env)
    env = {k: v for k, v in env.items() if k not in ("PYTHONPATH", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    command = [*NO_NETWORK, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=seconds)


@pytest.fixture(scope="module")
def small(tmp_path_factory, home: Path) -> Path:
    """The small bundle with one text."""
    folder = tmp_path_factory.mktemp("bundle")
    return bundle.make(folder / "small.tar", small=True, assets=["wikipedia"], home=home)


@pytest.fixture
def unpacked(small: Path, tmp_path: Path) -> Path:
    with tarfile.open(small) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "small"


def test_it_is_whole_and_says_so(small: Path) -> None:
    assert bundle.archive_faults(small) == []
    with tarfile.open(small) as tar:
        names = [m.name.removeprefix("small/") for m in tar]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(bundle.DATE, 0, 0, "", 0o644)}
    assert names[0] == "MANIFEST.json" and names[-1] == "install.py" and names[1:-1] == sorted(names[1:-1])
    assert {"README.md", "LICENSE", "cache/data/wikipedia/MANIFEST.json"} < set(names)
    assert [n for n in names if n.startswith("wheels/")] == [f"wheels/llmcourse-{bundle.__version__}-py3-none-any.whl"]
    told = small.with_name("small.tar.sha256").read_text()
    digest = subprocess.run(["sha256sum", "-c", "small.tar.sha256"], cwd=small.parent, capture_output=True)
    assert told.endswith("  small.tar\n") and digest.returncode == 0
    assert sorted(p.name for p in small.parent.iterdir()) == ["small.tar", "small.tar.sha256"], "nothing is left behind"


def test_the_same_files_give_the_same_archive(small: Path, tmp_path: Path, home: Path) -> None:
    again = bundle.make(tmp_path / "small.tar", small=True, assets=["wikipedia"], home=home)
    assert again.read_bytes() == small.read_bytes()


@pytest.mark.parametrize("kept", [0, 700, 0.3, 0.999])
def test_an_archive_that_was_cut_off_is_found_out(small: Path, tmp_path: Path, kept: float) -> None:
    content = small.read_bytes()
    part = tmp_path / "part.tar"
    part.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert bundle.archive_faults(part)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", part, "-C", tmp_path / "out"], capture_output=True)
    installer = tmp_path / "out" / "small" / "install.py"
    if installer.exists():  # tar writes what it has of the last file
        done = subprocess.run([sys.executable, installer, tmp_path / "x"], text=True, capture_output=True)
        assert done.returncode, done.stdout
    assert not (tmp_path / "x").exists()


def test_a_changed_archive_is_found_out(small: Path, tmp_path: Path, unpacked: Path) -> None:
    (unpacked / "README.md").write_text("other words\n", encoding="utf8")
    (unpacked / "LICENSE").unlink()
    changed = tmp_path / "changed.tar"
    subprocess.run(["tar", "-cf", changed, "small/MANIFEST.json", "small/README.md"], cwd=tmp_path, check=True)
    found = bundle.archive_faults(changed)
    assert "holds a README.md that is not what the manifest says" in found and "lacks LICENSE" in found
    assert "ends with README.md, not with the installer" in found


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "LICENSE").unlink(), "LICENSE is missing"),
        (lambda d: (d / "README.md").write_text("x"), "README.md is not what the manifest says (1 of "),
        (lambda d: (d / "MANIFEST.json").unlink(), "MANIFEST.json is missing or cut off"),
        (lambda d: (d / "MANIFEST.json").write_text('{"files": {'), "MANIFEST.json is missing or cut off"),
    ],
)
def test_the_installer_writes_nothing_from_a_bundle_that_is_not_whole(unpacked: Path, damage, says: str) -> None:
    damage(unpacked)
    target = unpacked.parent / "there"
    done = subprocess.run([sys.executable, unpacked / "install.py", target], text=True, capture_output=True)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not target.exists()


def test_the_installer_refuses_what_it_cannot_do(unpacked: Path) -> None:
    def says(*args: object) -> str:
        done = subprocess.run([sys.executable, unpacked / "install.py", *args], text=True, capture_output=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return done.stderr

    assert "allowed: one that does not exist yet, or an empty one" in says(unpacked)
    assert "--packages names a folder with the rest" in says(unpacked.parent / "there")
    manifest = json.loads((unpacked / "MANIFEST.json").read_text()) | {"machine": "Python 2.7, OS/2, sparc"}
    (unpacked / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "the wheels are for Python 2.7, OS/2, sparc; this is " in says(unpacked.parent / "there")
    assert not (unpacked.parent / "there").exists()


def test_a_bundle_that_cannot_be_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wheels(into: Path, small: bool) -> str:
        (into / "a.whl").write_bytes(b"x")
        return "a"

    monkeypatch.setattr(bundle, "collect_wheels", wheels)
    with pytest.raises(BadInput, match="is not prepared"):
        bundle.make(tmp_path / "out" / "b.tar", small=True, assets=["wikipedia"], home=tmp_path / "nothing")
    assert list((tmp_path / "out").iterdir()) == []


def take_the_tour(place: Path, model: str, *options: str) -> None:
    """In an installed folder and without a network: the tour, and one sheet with its right answers."""
    course, program = place / "course", place / "env" / "bin" / "llmcourse"
    done = python(program, "tour", *options, cwd=course, seconds=900, LLMCOURSE_SCALE="test", LLMCOURSE_MODEL=model)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (course / "build" / "tour" / "report.html").is_file()
    sheet = course / "exercises" / "00_runtime" / "runtime.ipynb"
    nbformat.write(tool().solved(nbformat.read(ROOT / "solutions" / "00_runtime" / "runtime.ipynb", 4)), sheet)
    done = python(program, "check", sheet, "--json", cwd=course)
    assert done.returncode == 0 and json.loads(done.stdout)["passed"] is True, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not can_cut_off(), reason="this machine makes no namespace without a network")
def test_it_installs_and_works_without_a_network(unpacked: Path, tmp_path: Path) -> None:
    reach = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    assert "unreachable" in python(sys.executable, "-c", reach, cwd=tmp_path).stderr, "the network is not cut off"
    place = tmp_path / "there"
    beside = sysconfig.get_path("purelib")
    done = python(sys.executable, unpacked / "install.py", place, "--packages", beside, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(unpacked)  # it is not needed any more
    where = "import llmcourse, llmcourse.settings as s; print(llmcourse.__file__, s.load_settings().home)"
    told = python(place / "env" / "bin" / "python", "-c", where, cwd=place / "course").stdout.split()
    assert told[0].startswith(str(place / "env")) and told[1] == str(place / "cache")
    take_the_tour(place, "course-3m", "--recipe", "rtn")  # the same walk with fewer arms


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("BUNDLE_TEST") != "1", reason="makes gigabytes: set BUNDLE_TEST=1")
@pytest.mark.skipif(not can_cut_off(), reason="this machine makes no namespace without a network")
@pytest.mark.timeout(3600)
def test_the_whole_bundle(tmp_path: Path, home: Path) -> None:
    made = bundle.make(tmp_path / "whole.tar", home=home)
    assert bundle.archive_faults(made) == []
    subprocess.run(["tar", "-xf", made], cwd=tmp_path, check=True)
    made.unlink()
    done = python(sys.executable, tmp_path / "whole" / "install.py", tmp_path / "there", cwd=tmp_path, seconds=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    take_the_tour(tmp_path / "there", "smollm2-135m")
    assert (tmp_path / "there" / "env" / "bin" / "jupyter").is_file()

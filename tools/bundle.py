"""One archive that installs the course where there is no network.

    python tools/bundle.py                    dist/llmcourse-VERSION-bundle.tar, with everything
    python tools/bundle.py --small            only the course's own wheel, for machines that have the other packages
    python tools/bundle.py --verify ARCHIVE   read it and compare every file with its digest

In it: the wheels of the `lab` environment at the versions of constraints.txt, for the Python and the system that make
the bundle; the course's own wheel, which holds notebooks, sheets and recipes; the prepared models and texts; the book,
where `make book` has made it; an installer and a page that says how. MANIFEST.json, the first file, has the digest of
every other one. The installer is the last file: what was cut off has none. The archive appears under its name when it
is whole and not before, and the same files give the same archive, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import bundle_install  # noqa: E402

from llmcourse import __version__  # noqa: E402
from llmcourse.settings import BadInput, load_settings  # noqa: E402
from llmcourse.store import CATALOG, MANIFEST, digests, scratch_folder, verify, write_atomic  # noqa: E402

TORCH = "https://download.pytorch.org/whl/cpu"
DATE = 315532800  # 1980-01-01, the first date that a wheel can hold
EXTRA = "lab"
README = """\
# llmcourse {version}, to install without a network

You need Python and nothing else: {needs}.

    python3 install.py FOLDER

It compares every file with its digest, makes an environment in FOLDER/env, copies models and texts to FOLDER/cache,
unpacks the course in FOLDER/course and says how to go on. Nothing outside FOLDER is touched, no rights of an
administrator are needed, and this folder can be removed afterwards.

Many people on one machine, or a server for a class: install once, into a folder that all can read. FOLDER/cache is only
read from then on. Each person takes the course with `FOLDER/env/bin/llmcourse start course` and sets
`LLMCOURSE_HOME=FOLDER/cache`.

The licenses of models and texts: `FOLDER/env/bin/llmcourse data`.
"""


def run(*command: str | Path) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"SOURCE_DATE_EPOCH": str(DATE)},
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise SystemExit(f"bundle: {' '.join(map(str, command[1:4]))} … failed:\n{(done.stdout + done.stderr)[-2000:]}")


def collect_wheels(into: Path, small: bool) -> str:
    """Fill a folder with wheels; returns what the installer has to ask for."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", into)
    (own,) = into.glob("llmcourse-*.whl")
    if small:
        return f"llmcourse=={__version__}"
    # a CPU build has to be asked for by its full version, and may be at PyTorch's own index only
    torch = f"torch=={importlib.metadata.version('torch')}"
    wanted = ["wheel", "--quiet", "--wheel-dir", into, "-c", ROOT / "constraints.txt", f"{own}[{EXTRA}]", torch]
    index = ["--extra-index-url", TORCH] if torch.endswith("+cpu") and not offered(torch) else []
    run(sys.executable, "-m", "pip", *wanted, *index)
    return f"llmcourse[{EXTRA}]=={__version__}"


def offered(requirement: str) -> bool:
    """Whether pip finds it where it is set up to look."""
    command = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", requirement]
    return subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True).returncode == 0


def collect(folder: Path, *, small: bool, assets: Sequence[str], home: Path) -> None:
    """Everything that the archive holds, in a folder; the manifest last."""
    (folder / "wheels").mkdir()
    install = collect_wheels(folder / "wheels", small)
    (folder / "cache").mkdir()
    for name in assets:
        asset = CATALOG[name]
        if not asset.bundled:
            source = verify(name, home)
            for file in [*digests(source), MANIFEST]:
                target = folder / "cache" / asset.kind / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, target)
    if (ROOT / "_book" / "index.html").is_file() and not small:
        shutil.copytree(ROOT / "_book", folder / "book")
    machine = "any" if small else bundle_install.this_machine()
    needs = "3.11 or newer, with the packages of the course" if small else machine
    (folder / "README.md").write_text(README.format(version=__version__, needs=needs), encoding="utf8")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copyfile(ROOT / "tools" / "bundle_install.py", folder / "install.py")
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": d} for n, d in digests(folder).items()}
    about = {"version": __version__, "machine": machine, "install": install, "files": files}
    (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")


def archive(folder: Path, target: Path, top: str) -> None:
    """The folder as one archive: the manifest first, the installer last, and nothing that depends on the day."""
    names = [MANIFEST, *json.loads((folder / MANIFEST).read_text(encoding="utf8"))["files"]]
    order = {MANIFEST: 0, "install.py": 2}
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(names, key=lambda n: (order.get(n, 1), n)):
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size, info.mtime, info.mode = (folder / name).stat().st_size, DATE, 0o644
            with open(folder / name, "rb") as f:
                tar.addfile(info, f)


def make(target: Path, *, small: bool = False, assets: Sequence[str] | None = None, home: Path | None = None) -> Path:
    """Write the archive, and beside it its digest, in the form that `sha256sum -c` reads."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    home = home or load_settings().home
    with scratch_folder(target.parent, f".{target.name}.") as scratch:
        (scratch / "files").mkdir()
        collect(scratch / "files", small=small, assets=list(CATALOG) if assets is None else assets, home=home)
        archive(scratch / "files", scratch / "whole.tar", target.stem)
        with open(scratch / "whole.tar", "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        os.replace(scratch / "whole.tar", target)
    write_atomic(target.with_name(f"{target.name}.sha256"), f"{digest}  {target.name}\n")
    return target


def archive_faults(path: Path) -> list[str]:
    """What is wrong with an archive, read from its beginning to its end; an empty list: it is whole."""
    try:
        with tarfile.open(path) as tar:
            first = tar.next()
            if first is None or Path(first.name).name != MANIFEST:
                return ["has no manifest at its beginning"]
            wanted = json.load(io.TextIOWrapper(tar.extractfile(first), encoding="utf8"))["files"]
            found, last = [], ""
            for member in tar:
                if member.name == first.name:
                    continue
                last = member.name.partition("/")[2]
                entry = wanted.pop(last, None)
                digest = hashlib.file_digest(tar.extractfile(member), "sha256").hexdigest()
                if entry is None:
                    found.append(f"holds {last}, which the manifest does not name")
                elif digest != entry["sha256"]:
                    found.append(f"holds a {last} that is not what the manifest says")
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as e:
        return [f"cannot be read to its end ({type(e).__name__}: {e})"]
    found += [f"lacks {name}" for name in wanted]
    return found + ([f"ends with {last}, not with the installer"] if last != "install.py" else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"default: dist/llmcourse-{__version__}-bundle.tar")
    parser.add_argument("--small", action="store_true", help="only the wheel of the course, not those of others")
    parser.add_argument("--asset", action="append", help="a name from `llmcourse data` (repeatable); default: all")
    parser.add_argument("--verify", type=Path, metavar="ARCHIVE", help="read an archive instead of making one")
    args = parser.parse_args()
    if args.verify:
        found = archive_faults(args.verify)
        print(f"bundle: {args.verify.name} " + ("; ".join(found[:5]) if found else "is whole"))
        return int(bool(found))
    for name in args.asset or []:
        if name not in CATALOG:
            raise SystemExit(f"bundle: asset is {name!r}; allowed: {', '.join(CATALOG)}.")
    start, name = time.time(), f"llmcourse-{__version__}-bundle{'-small' if args.small else ''}.tar"
    try:
        made = make(args.out or ROOT / "dist" / name, small=args.small, assets=args.asset)
    except BadInput as e:
        raise SystemExit(f"bundle: {e}") from None
    print(f"bundle: {made} ({made.stat().st_size / 1e6:.1f} MB, {time.time() - start:.0f} s)")
    print("Unpack it with tar -xf, then: python3 install.py FOLDER")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Install the course from this folder, without a network.

    python3 install.py [FOLDER]     default: llmcourse, below the folder you are in

Every file is compared with its digest first, and nothing is written when one is missing or another. Then FOLDER has an
environment (`env`), the models and texts (`cache`) and the course itself (`course`), and this folder can go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def faults(manifest: dict) -> list[str]:
    """Files of this folder that are missing, cut off or changed."""
    found = []
    for name, entry in manifest["files"].items():
        path = HERE / name
        if not path.is_file():
            found.append(f"{name} is missing")
            continue
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                found.append(f"{name} is not what the manifest says ({path.stat().st_size} of {entry['bytes']} bytes)")
    return found


def read_manifest() -> dict:
    try:
        manifest = json.loads((HERE / "MANIFEST.json").read_text(encoding="utf8"))
        found = faults(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        found = ["MANIFEST.json is missing or cut off"]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise SystemExit(f"install: the bundle is not whole: {found[0]}{more}. Copy and unpack it again.")
    return manifest


def this_machine() -> str:
    return f"Python {sys.version_info[0]}.{sys.version_info[1]}, {platform.system()}, {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("llmcourse"))
    parser.add_argument(
        "--packages", type=Path, help="a site-packages folder that has what the bundle has no wheels of"
    )
    args = parser.parse_args()
    folder = args.folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(
            f"install: FOLDER is {str(args.folder)!r}; allowed: one that does not exist yet, or an empty one."
        )
    manifest = read_manifest()
    if manifest["machine"] not in ("any", this_machine()):
        raise SystemExit(f"install: the wheels are for {manifest['machine']}; this is {this_machine()}.")
    if manifest["machine"] == "any" and args.packages is None:
        raise SystemExit(
            "install: this bundle has the wheel of the course only; --packages names a folder with the rest."
        )

    print(f"install: {len(manifest['files'])} files are whole; making {folder / 'env'}", flush=True)
    venv.create(folder / "env", with_pip=True, symlinks=os.name != "nt")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(HERE / "wheels")]
    subprocess.run([*command, *(["--no-deps"] if args.packages else []), manifest["install"]], check=True)
    if args.packages is not None:  # after pip, which would take what is there for installed
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([python, "-c", ask], check=True, text=True, capture_output=True).stdout.strip()
        (Path(site) / "beside.pth").write_text(f"{args.packages.resolve()}\n", encoding="utf8")
    print("install: copying models and texts", flush=True)
    shutil.copytree(HERE / "cache", folder / "cache")
    subprocess.run([python, "-m", "llmcourse", "start", str(folder / "course")], check=True, stdout=subprocess.DEVNULL)
    settings = folder / "course" / "settings.ini"
    text = settings.read_text(encoding="utf8")
    settings.write_text(text.replace("\nhome =\n", f"\nhome = {folder / 'cache'}\n", 1), encoding="utf8")
    if (HERE / "book").is_dir():
        shutil.copytree(HERE / "book", folder / "book")
    print(f"install: done. Next: cd {folder / 'course'} && {scripts / 'llmcourse'} tour")
    print(f"         then: {scripts / 'jupyter'} lab nbs/index.ipynb")


if __name__ == "__main__":
    main()

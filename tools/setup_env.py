"""Make the environment in .venv/: called by make, needs nothing but Python's standard library.

PyTorch first. Where there is no NVIDIA GPU the CPU build is wanted, because the CUDA build is several gigabytes. On
Linux the Python registry carries the CUDA build, so PyTorch's own CPU index is asked, unless the index that pip is set
up with offers a CPU build itself. On macOS and Windows the registry's build is the right one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def pip(*args: str, quiet: bool = True, check: bool = True) -> subprocess.CompletedProcess:
    if args[0] == "install":
        args = ("install", "--no-compile", *args[1:])  # the first import of a module does it; most are never imported
    command = [str(PYTHON), "-m", "pip", *args]
    result = subprocess.run(
        command,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
    )
    if check and result.returncode:
        sys.stderr.write((result.stderr or "")[-3000:])
        raise SystemExit(
            f"environment: `pip {' '.join(args[:3])} …` failed; "
            "nothing is lost, run make again after mending the cause above."
        )
    return result


def torch_requirement() -> str:
    """What pyproject.toml asks for, pinned by the constraints."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    return re.search(r'"(torch[<>=][^"]*)"', text).group(1)


def has_nvidia() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def install_torch() -> None:
    if pip("show", "torch", check=False).returncode == 0:
        return
    requirement, constraints = torch_requirement(), ["-c", str(ROOT / "constraints.txt")]
    start = time.time()
    if platform.system() == "Linux" and not has_nvidia():
        # which file would pip take by itself? Asked without downloading it.
        report = pip(
            "install", "--dry-run", "--no-deps", "--quiet", "--report", "-", requirement, *constraints, check=False
        )
        try:
            offered = json.loads(report.stdout)["install"][0]["metadata"]["version"]
        except (ValueError, LookupError):
            offered = ""
        if not offered.endswith("+cpu"):
            say("no NVIDIA GPU: asking PyTorch's CPU index")
            got = pip(
                "install",
                "--no-deps",
                "--retries",
                "1",
                "--timeout",
                "20",
                "--index-url",
                CPU_INDEX,
                requirement,
                *constraints,
                check=False,
            )
            if got.returncode:
                say(
                    "PyTorch's CPU index cannot be reached; taking what your index offers, "
                    "which may be the CUDA build of several gigabytes"
                )
    pip("install", requirement, *constraints)
    build = subprocess.run(
        [
            str(PYTHON),
            "-c",
            "import torch; print(torch.__version__, "
            "'for CUDA ' + torch.version.cuda if torch.version.cuda else 'for the CPU')",
        ],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    say(f"PyTorch {build}, {time.time() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--extra", required=True, help="lab, dev, …: an extra of pyproject.toml")
    extra = parser.parse_args().extra
    if sys.version_info < (3, 11):  # noqa: UP036  (this script runs under whatever Python make finds)
        raise SystemExit(
            f"environment: Python is {platform.python_version()}; allowed: 3.11 or newer (make PYTHON=python3.12 …)."
        )
    start = time.time()
    if not PYTHON.exists() or subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode:
        say(f"making {VENV.name} with Python {platform.python_version()}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip("install", "--upgrade", "pip")
    install_torch()
    say(f"installing the course with the extra '{extra}' (some minutes the first time)")
    show = sys.stdout.isatty()  # pip's own bars where somebody watches
    pip("install", "--editable", f"{ROOT}[{extra}]", "-c", str(ROOT / "constraints.txt"), quiet=not show)
    (VENV / f".{extra}.stamp").write_text(f"{extra}\n")
    say(f"ready, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Make the environment in .venv/: called by make, needs nothing but Python's standard library.

PyTorch first. Where there is no NVIDIA GPU the CPU build is wanted, because the CUDA build is several gigabytes. On
Linux the Python registry carries the CUDA build, so PyTorch's own CPU index is asked, unless the index that pip is set
up with offers a CPU build itself. On macOS and Windows the registry's build is the right one.
"""

from __future__ import annotations

import argparse
import ast
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
UV = PYTHON.with_name("uv.exe" if os.name == "nt" else "uv")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def run(command: list[str], quiet: bool = True, check: bool = True, env: dict[str, str] | None = None):
    result = subprocess.run(
        command,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        env=os.environ | (env or {}),
    )
    if check and result.returncode:
        sys.stderr.write((result.stderr or "")[-3000:])
        said = " ".join(Path(command[0]).name if i == 0 else part for i, part in enumerate(command[:5]))
        raise SystemExit(
            f"environment: `{said} …` failed; nothing is lost, run make again after mending the cause above."
        )
    return result


def pip(*args: str, quiet: bool = True, check: bool = True) -> subprocess.CompletedProcess:
    if args[0] == "install":
        args = ("install", "--no-compile", *args[1:])  # the first import of a module does it; most are never imported
    return run([str(PYTHON), "-m", "pip", *args], quiet, check)


def as_uv(pip_config: str) -> tuple[list[str], dict[str, str]]:
    """What `pip config list` prints, as (arguments, environment variables) for `uv pip install`.

    uv does not read pip's files. As pip does, it is to take the best version that any of the indexes offers
    (`unsafe-best-match`: the warning in that name holds for pip as well).
    """
    values: dict[str, str] = {}
    lines = [re.fullmatch(r"(global|install|:env:)\.([\w-]+)=(.*)", line) for line in pip_config.splitlines()]
    for section in ("global", "install", ":env:"):  # the later one wins
        for line in lines:
            if line and line[1] == section:
                values[line[2]] = str(ast.literal_eval(line[3]))
    args, env = ["--index-strategy", "unsafe-best-match"], {}

    def places(key: str) -> list[str]:
        here = [p for p in values.get(key, "").split() if "://" in p or Path(p).exists()]
        # uv stops at a folder that is missing, pip goes on without it
        return [p for p in here if not p.startswith("file://") or Path(p.removeprefix("file://")).exists()]

    # addresses may hold a password, and what is in a command line can be read by everybody on the machine
    for key, variable in (("index-url", "UV_DEFAULT_INDEX"), ("extra-index-url", "UV_INDEX")):
        if places(key) and variable not in os.environ:
            env[variable] = " ".join(places(key))
    for key, option in (
        ("find-links", "--find-links"),
        ("constraint", "--constraint"),
        ("trusted-host", "--allow-insecure-host"),
    ):
        for place in values.get(key, "").split() if key == "trusted-host" else places(key):
            args += [option, place]
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        args += ["--no-index"]
    for key, variables in (
        ("cert", ["SSL_CERT_FILE"]),
        ("client-cert", ["SSL_CLIENT_CERT"]),
        ("proxy", ["HTTP_PROXY", "HTTPS_PROXY"]),
        ("timeout", ["UV_HTTP_TIMEOUT"]),
        ("default-timeout", ["UV_HTTP_TIMEOUT"]),
    ):
        for variable in variables:
            if key in values and variable not in os.environ:
                env[variable] = values[key]
    return args, env


def install(*args: str) -> None:
    """uv resolves, fetches and unpacks many packages at once (a sixth of pip's time); pip, where uv cannot."""
    if UV.exists():
        config = pip("config", "list", check=False).stdout or ""
        options, env = as_uv(config)
        # --no-config: a uv.toml or pyproject.toml above this folder is about other projects
        command = [str(UV), "pip", "install", "--no-config", "--python", str(PYTHON), *options, *args]
        result = run(command, check=False, env=env)
        if not result.returncode:
            return
        why = re.sub(r"://[^/@\s]+@", "://…@", " ".join((result.stderr or "").split()))  # no passwords
        say(f"uv could not do it ({why[-160:]}); asking pip")
    pip("install", *args, quiet=not sys.stdout.isatty())  # pip's own bars where somebody watches


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
        if offered.endswith("+cpu"):
            requirement = f"torch=={offered}"
        else:
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
    install(requirement, *constraints)
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
    if not UV.exists():
        pip("install", "uv", "-c", str(ROOT / "constraints.txt"), check=False)  # there is none for some machines
    install_torch()
    say(f"installing the course with the extra '{extra}' (some minutes the first time)")
    install("--editable", f"{ROOT}[{extra}]", "-c", str(ROOT / "constraints.txt"))
    (VENV / f".{extra}.stamp").write_text(f"{extra}\n")
    say(f"ready, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

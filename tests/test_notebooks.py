"""Every chapter runs from top to bottom, alone, offline, on one thread, at the small scale, most on a small model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# these read the real model; the others the house model, which is trained too and thirty times smaller
REAL = {"02_data", "02b_tokenization", "05_evaluation", "15_deployment"}


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook: Path, home: Path, tmp_path: Path):
    env = clean_env(LLMCOURSE_SCALE="test", LLMCOURSE_HOME=str(home), MPLBACKEND="agg")
    env["PYTHONPATH"] = str(ROOT / "tests" / "no_network")
    env["LLMCOURSE_MODEL"] = "smollm2-135m" if notebook.stem in REAL else "course-3m"
    before = notebook.read_bytes()
    result = subprocess.run(
        [
            Path(sys.executable).with_name("nbdev-test" + (".exe" if os.name == "nt" else "")),
            "--n-workers",
            "0",
            "--cell-timeout",
            "0",
            str(notebook),
        ],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=850,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert notebook.read_bytes() == before  # a test run changes nothing

"""Every chapter runs from top to bottom, alone, offline, on one thread, at the small scale, most on a small model.

Some run on a device that is not there: a tensor that nobody has moved fails as it would on a GPU. With
COURSE_TEST_DEVICE=pretend all do that can.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import warm
from conftest import ROOT, clean_env

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# these read the real model; the others the house model, which is trained too and thirty times smaller
REAL = {"02_data", "02b_tokenization", "05_evaluation", "15_deployment"}
# these always do
MOVED = {"05c_accuracy", "05d_report"}
# these are about the processor itself, or about choosing a device, or run processes that know nothing of the device
AT_HOME = {
    "00_runtime",
    "07_training",
    "15_deployment",
    "15b_export",
    "15c_serving",
    "15d_speculative",
    "15e_structured",
}
AT_HOME |= {"15f_gpu", "16_distributed"}
if os.environ.get("COURSE_TEST_DEVICE") == "pretend":
    MOVED = {path.stem for path in NOTEBOOKS} - AT_HOME
DEVICE = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import pretend_device; pretend_device.start()\n"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook: Path, home: Path):
    env = clean_env(LLMCOURSE_SCALE="test", LLMCOURSE_HOME=str(home), MPLBACKEND="agg")
    env["PYTHONPATH"] = str(warm.NO_NETWORK)
    env["LLMCOURSE_MODEL"] = "smollm2-135m" if notebook.stem in REAL else "course-3m"
    before = notebook.read_bytes()
    test = f"from nbdev.test import nbdev_test; nbdev_test({str(notebook)!r}, n_workers=0, cell_timeout=0)"
    if notebook.stem in MOVED:
        test = DEVICE + test
    result = warm.run(["-c", test], cwd=ROOT, env=env, timeout=850)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "Success" in result.stdout
    assert notebook.read_bytes() == before  # a test run changes nothing

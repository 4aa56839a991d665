"""Functions of the compression chapters take text of the CPU to a model that is elsewhere, and compute there."""

from __future__ import annotations

import json

import warm
from conftest import ROOT, clean_env


def test_the_model_may_be_elsewhere() -> None:
    env = clean_env(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", LLMCOURSE_DTYPE="float32")
    result = warm.run([ROOT / "tests" / "device_compression.py"], cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 2 * 9 + 15
    assert {name: said for name, said in found.items() if said is not None} == {}

"""The forks in which commands and chapters are tested: whatever goes wrong in one is seen outside."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import clean_env

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork, commands are started as usual")
ENDS = {
    "print('fine')": 0,
    "import sys; sys.exit(3)": 3,
    "import sys; sys.exit('a sentence')": 1,
    "raise SystemExit": 0,
    "1 / 0": 1,
    "assert False, 'no'": 1,
    "import this_is_no_module": 1,
    "def (": 1,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -9,
    "import os; os._exit(7)": 7,
}


@pytest.mark.parametrize("code", ENDS)
def test_it_ends_as_python_ends(code: str):
    """Exit code and the last line of the error are those of a cold start."""
    cold = subprocess.run([sys.executable, "-c", code], env=clean_env(), text=True, capture_output=True)
    found = warm.run(["-c", code], env=clean_env())
    assert found.returncode == cold.returncode == ENDS[code]
    assert found.stdout == cold.stdout and found.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


SEEN = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), __name__]))"


def test_it_sees_its_own_arguments_folder_and_environment(tmp_path: Path):
    file = tmp_path / "file.py"
    file.write_text(SEEN)
    for command in (["-c", SEEN], [file], ["-m", "file"]):
        found = warm.run([*command, "a", "b c"], env=clean_env(ONLY_HERE="1"), cwd=tmp_path)
        arguments, folder, env, name = json.loads(found.stdout)
        assert arguments == ["a", "b c"] and Path(folder) == tmp_path and name == "__main__"
        assert env["ONLY_HERE"] == "1" and "PYTEST_CURRENT_TEST" in env  # of this process, by clean_env
    assert "ONLY_HERE" not in os.environ


def test_one_leaves_nothing_to_the_next():
    warm.run(["-c", "import torch; torch.left = 1; torch.set_default_dtype(torch.float64)"], env=clean_env())
    found = warm.run(["-c", "import torch; print(hasattr(torch, 'left'), torch.get_default_dtype())"], env=clean_env())
    assert found.stdout == "False torch.float32\n"


def test_neither_the_tests_nor_the_course_are_there_before_they_are_imported():
    # the grader's own server, which has the course in it, may run beside ours, and may have been there before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "llmcourse.practice.grading"])
    other = context.Process(target=print)
    other.start()
    other.join()
    code = "import sys; print([m for m in sys.modules if m.startswith('llmcourse')]); import conftest"
    found = warm.run(["-c", code], env=clean_env(), cwd=Path(sys.prefix))
    assert found.stdout == "[]\n" and "No module named 'conftest'" in found.stderr


def test_no_network_where_that_is_asked_for():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"
    found = warm.run(["-c", code], env=clean_env(PYTHONPATH=str(warm.NO_NETWORK)))
    assert found.returncode == 1 and "a network connection was attempted" in found.stderr


def test_what_takes_too_long_is_stopped_with_all_its_copies():
    with pytest.raises(subprocess.TimeoutExpired) as e:
        code = "import os, time; print(os.environ['N'], flush=True); time.sleep(60 * (os.environ['N'] == '1'))"
        warm.run(["-c", code], env=clean_env(), timeout=5, copies=[{"N": "0"}, {"N": "1"}])
    assert sorted(e.value.output.split()) == ["0", "1"]
    found = warm.run(["-c", "import os, sys; sys.exit(int(os.environ['N']))"], env=clean_env(),
                     copies=[{"N": "0"}, {"N": "5"}])  # fmt: skip
    assert found.returncode == 5

"""A worker of a study, in a process of its own: python sweep_worker.py STORAGE TRIALS [SECONDS [TRIAL THAT HANGS]]."""

import sys
import time
from pathlib import Path

from llmcourse.sweep import open_study, run_trials


def main(storage: str, trials: str, seconds: str = "0", hangs: str = "-1") -> None:
    study = open_study(storage, "parabola", {"recipe": "a"})

    def objective(trial, root):
        x = trial.suggest_float("x", -1, 1)
        if trial.number == int(hangs) and root == trial.number:
            Path(f"{storage}.hangs").touch()
            time.sleep(600)
        time.sleep(float(seconds))
        return (x - 0.3) ** 2

    run_trials(study, objective, int(trials), lease=2.0)


if __name__ == "__main__":
    main(*sys.argv[1:])

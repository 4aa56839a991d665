"""Workers in a process of their own.

python sweep_worker.py STORAGE TRIALS [SECONDS [TRIAL THAT HANGS]]: of a study of a parabola
python sweep_worker.py --dies TRIAL STEP RECIPE OUT: of a real sweep, killed after that step of that trial
"""

import os
import signal
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


def dies(trial: str, step: str, recipe: str, out: str) -> None:
    from llmcourse import training
    from llmcourse.settings import load_settings
    from llmcourse.sweep import sweep

    class Killer(training.Observer):
        def after_step(self, run):
            if run.result.steps == int(step):
                os.kill(os.getpid(), signal.SIGKILL)

    train = training.train

    def train_and_die(*args, out, observers, **how):
        last = [Killer()] if int(out.name) == int(trial) else []
        return train(*args, out=out, observers=[*observers, *last], **how)

    training.train = train_and_die
    sweep(recipe, out, settings=load_settings(overrides={"scale": "test", "device": "cpu", "dtype": "float32"}))


if __name__ == "__main__":
    dies(*sys.argv[2:]) if sys.argv[1] == "--dies" else main(*sys.argv[1:])

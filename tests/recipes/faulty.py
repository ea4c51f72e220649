"""The recipe, with something that happens once: `faulty.py KILLS STEP MARK ARGUMENTS...`.

When the last rank reads the data of step STEP for the first time (the file MARK is not there yet), it sends the signals
of KILLS: `self:SIGKILL`, or `parent:SIGKILL,self:SIGKILL` for torchrun's agent and then itself.
"""

import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.append(str(HERE.parents[2] / "recipes"))

import tasks.lm  # noqa: E402 -- the path comes first
import train  # noqa: E402

if __name__ == "__main__":
    kills, when, mark, *arguments = sys.argv[1:]
    original = tasks.lm.Task.batch

    def batch(self, step, first, count):
        is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if step == int(when) and is_last and not Path(mark).exists():
            Path(mark).touch()
            for kill in kills.split(","):
                whom, name = kill.split(":")
                os.kill(os.getpid() if whom == "self" else os.getppid(), signal.Signals[name])
        return original(self, step, first, count)

    tasks.lm.Task.batch = batch
    sys.exit(train.main(arguments))

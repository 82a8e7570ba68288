"""Run app.train with a disturbance on one process: WHAT PROCESS STEP, then its arguments."""

import atexit
import math
import os
import signal
import subprocess
import sys
import time

from app.command import run_command
from app.errors import UserError
from app.train import main


def disturb(what, process, step):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return  # once is enough
    from app.training.trainer import Trainer

    train_step = Trainer._train_step

    def disturbed(self, *arguments):
        train_step(self, *arguments)
        if self.runtime.process_index == process and self.position.step == step:
            if what == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            if what == "group":  # as a launcher does: from a process of its own
                subprocess.run(["sh", "-c", f"kill -TERM -{os.getpgrp()}"], check=False)
            if what == "fault":
                raise RuntimeError("the machine is on fire")
            if what == "mistake":
                raise UserError("image 7 is damaged")
            if what == "nan":
                self.model.get_parameter("blocks.1.mlp.fc2.weight").data[0, 0] = math.nan
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "sleep":
                time.sleep(1000)
            if what == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "move":
                self.storage.folder.rename(self.storage.folder.with_name("moved"))
            if what == "unlink":
                (self.storage.folder / "metrics.h5").unlink()
            if what == "mpi":
                self.runtime.communicator.Barrier()

    Trainer._train_step = disturbed
    if what == "group":
        os.setpgid(0, 0)
    if what == "move in the test":
        move_in_the_test(process)
    if what == "evaluation":
        disturb_evaluation(process, step)
    if what == "signal":  # and once more on every process, when the program is on its way out
        for number in (signal.SIGUSR1, signal.SIGTERM):
            atexit.register(os.kill, os.getpid(), number)


def move_in_the_test(process):
    """Move the run's folder before the test's first batch."""
    from app.training.trainer import Trainer

    evaluate = Trainer._evaluate

    def disturbed(self, split):
        if self.runtime.process_index == process and split == "test":
            self.storage.folder.rename(self.storage.folder.with_name("moved"))
        return evaluate(self, split)

    Trainer._evaluate = disturbed


def disturb_evaluation(process, step):
    """Send the process a signal in the evaluation after a step, before its first batch."""
    from app.training.trainer import Trainer

    evaluate = Trainer._evaluate

    def disturbed(self, split):
        if self.runtime.process_index == process and self.position.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, split)

    Trainer._evaluate = disturbed


if __name__ == "__main__":
    disturb(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    run_command(lambda: main(sys.argv[4:]))

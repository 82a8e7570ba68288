"""Run app.search with a disturbance by evaluation: JSON of number to WHAT, then its arguments."""

import json
import os
import shutil
import signal
import sys

from app.command import run_command
from app.errors import AgreedUserError
from app.search.__main__ import main


def disturb(plan):
    from app.training.trainer import Trainer

    train_step = Trainer._train_step

    def disturbed(self, *arguments):
        train_step(self, *arguments)
        number = os.path.basename(self.configuration.run.dir)
        what = plan.get(str(int(number)) if number.isdecimal() else number)
        if what is None or self.position.step != 3:
            return
        process = self.runtime.process_index
        if what == "raise" and process == 1:
            raise ValueError("a bad day")
        if what == "refuse":  # on all processes of the worker
            raise AgreedUserError("data.root: an image is damaged")
        if what == "memory" and process == 0:
            raise MemoryError("no room")
        if what == "diverge":
            next(self.model.parameters()).data.fill_(float("nan"))
        if what == "slow" and process == 1:
            self._batches._signal._end = 0  # its time is over
        if what == "hopeless":  # on all processes, as the medians are
            watch = self._batches._signal
            watch._medians = [0.0, 0.0, 0.0]
            watch._section = watch._section.model_copy(update={"median_stop_epoch": 2})
        if what == "signal" and process == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if what == "taken" and process == 0:
            open(os.path.join(self.configuration.run.dir, "../../.lease-000009"), "w").close()
        if what == "gone" and process == 0:
            shutil.rmtree(os.path.dirname(os.path.dirname(self.configuration.run.dir)))
        if what == "kill" and process == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._train_step = disturbed


if __name__ == "__main__":
    disturb(json.loads(sys.argv[1]))
    run_command(lambda: main(sys.argv[2:]))

"""Imported by each Python that has this folder on its path: notes in the end what it has loaded."""

import atexit
import os
import sys


def _note() -> None:
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    try:
        with open(os.path.join(os.environ["NOTE_MODULES_IN"], str(os.getpid())), "a") as notes:
            notes.write("\n".join(sorted(files)) + "\n")
    except FileNotFoundError:  # the session has ended before this program
        pass


if "NOTE_MODULES_IN" in os.environ:
    atexit.register(_note)

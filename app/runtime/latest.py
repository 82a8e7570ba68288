"""runs/latest, a symbolic link to the run or search that was started last."""

import os
import uuid
from contextlib import suppress
from pathlib import Path

RUNS = Path("runs")
LATEST = RUNS / "latest"


def point_to(folder: Path) -> None:
    """Let runs/latest lead to a folder, if that lies in runs/ itself.

    Of several programs that start at once the last one wins; readers see the old link or the new
    one. Where there can be no link, or something else has this name, nothing happens.

    Args:
        folder: of what has just begun or goes on.
    """
    if folder.resolve().parent != RUNS.resolve() or (LATEST.exists() and not LATEST.is_symlink()):
        return
    link = RUNS / f".latest-{uuid.uuid4().hex}"
    try:
        link.symlink_to(folder.resolve().name, target_is_directory=True)
        os.replace(link, LATEST)
    except OSError:  # a file system without links, for one
        with suppress(OSError):
            link.unlink(missing_ok=True)


def led_to(folder: Path) -> Path:
    """Return the folder that a symbolic link leads to now; another one as it is.

    What is begun by way of a link must not go on elsewhere when that is changed.
    """
    return folder.parent / folder.readlink() if os.path.islink(folder) else folder

"""The folder of a run: made when everything fits together, found again, written atomically.

As long as a run is not finished, ``unfinished.json`` in its folder says so, with the command that
goes on with it.
"""

import itertools
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from app.config.run_section import RunSection
from app.config.settings import Configuration
from app.errors import StorageError, UserError
from app.runtime.launch import read_launch
from app.runtime.lease import Lease
from app.runtime.processes import Runtime
from app.runtime.startup_check import check_folder
from app.training.early_stopping import ended_early

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished.json"
HELD = {
    "metrics.h5": "a run",
    "search.yaml": "a search",
    "summary.json": "the summary of a run or search",
}
"""Files that show that a folder is taken."""


def find_folder(configuration: Configuration, runtime: Runtime, *, resume: bool) -> Path | None:
    """Return the folder of the run that this start goes on with. A collective call.

    That is the one that is resumed, or, where torchrun starts its processes anew, the one of the
    attempt before. Nothing is made.

    Returns:
        The same path on all processes; None: a new run, whose folder is free.

    Raises:
        AgreedUserError: run.dir holds another run, or cannot be written to.
    """
    agents = _agents(runtime)

    def find() -> Path | None:
        run = configuration.run
        if resume:
            assert run.dir is not None
            return Path(run.dir)
        if earlier := _of_earlier_attempt(run, agents):
            return earlier
        if run.dir is not None:
            check_free(Path(run.dir))
        return None

    processes = runtime.processes
    return processes.from_first(processes.agree(lambda: find() if runtime.is_first else None))


def prepare_folder(configuration: Configuration, runtime: Runtime, *, earlier: Path | None) -> Path:
    """Make the folder of a new run, and check that all nodes share it. A collective call.

    Args:
        configuration: run.dir and run.name are read.
        runtime: this process among all.
        earlier: folder of a run that goes on, which is checked only.

    Returns:
        The same path on all processes.

    Raises:
        AgreedUserError: some process cannot write there; nothing is left of a new folder.
    """
    processes = runtime.processes
    made = processes.agree(
        lambda: make_folder(configuration.run) if runtime.is_first and not earlier else None
    )
    folder = earlier or processes.from_first(made)
    assert folder
    try:
        check_folder(folder, runtime)
    except UserError:
        if made:
            remove_if_empty(made)
        raise
    return folder


def check_free(folder: Path) -> None:
    """Reject a folder for a new run or search: another one is there, or a part of it.

    To be asked before anything is built, and again when the folder is owned: another program may
    have begun and ended there meanwhile.

    Args:
        folder: which need not exist yet.

    Raises:
        UserError: it is taken, or nothing can be written there.
    """
    with naming("run.dir", folder):
        if what := _held_in(folder):
            raise UserError(
                f"run.dir: {folder} holds {what} already; go on with it by --resume {folder}, "
                f"or choose another folder"
            )
        place = folder
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            raise UserError(f"run.dir: cannot write to {folder}: {place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"run.dir: cannot write to {folder}: no permission in {place}")


def _held_in(folder: Path) -> str | None:
    """Say what lies in a folder that something new would overwrite."""
    for name, what in HELD.items():
        if os.path.lexists(folder / name):
            return what
    checkpoints = folder / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    return "the checkpoints of a run" if any(n.startswith("step-") for n in names) else None


def make_folder(run: RunSection) -> Path:
    """Make run.dir, or runs/NAME-TIME; several runs may be started in the same second.

    Raises:
        UserError: it cannot be made, or the name leads elsewhere.
    """
    if run.dir is not None:
        with naming("run.dir", Path(run.dir)):
            Path(run.dir).mkdir(parents=True, exist_ok=True)
        return Path(run.dir)
    if "/" in run.name or "\0" in run.name:
        raise UserError(
            f"run.name: {run.name!r} is no name of a folder: leave out slashes, or set run.dir"
        )
    name = f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count():
        folder = Path("runs") / (f"{name}-{number}" if number else name)
        try:
            with naming("run.name", folder):
                folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count has no end")


@contextmanager
def naming(key: str, folder: Path) -> Iterator[None]:
    """Say which key gave a folder that cannot be made.

    Raises:
        UserError: so it is.
        FileExistsError: it is there; where a plain file is, a UserError.
    """
    try:
        yield
    except FileExistsError:
        if folder.is_dir():
            raise
        raise UserError(f"{key}: {folder} is a file; choose another folder") from None
    except OSError as error:
        raise UserError(f"{key}: cannot write to {folder}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{key}: {str(folder)!r} is no path ({error})") from None


def hold_folder(folder: Path, runtime: Runtime) -> AbstractContextManager[Callable[[], None]]:
    """Own the run's folder, see :class:`app.runtime.lease.Lease`. A collective call.

    Returns:
        A context that gives what makes sure that the folder is still this program's; it is process
        0 that owns it, and on the others nothing happens.

    Raises:
        AgreedUserError: the folder has an owner, or cannot be written to.
    """
    lease = runtime.processes.agree(lambda: Lease.take(folder) if runtime.is_first else None)
    return _held(lease)


@contextmanager
def _held(lease: Lease | None) -> Iterator[Callable[[], None]]:
    if lease is None:
        yield lambda: None
        return
    with lease:
        yield lease.check


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing lies."""
    try:
        folder.rmdir()
    except OSError:  # something lies there that is not ours
        return


def mark_unfinished(folder: Path, runtime: Runtime, *, stopped: str | None = None) -> None:
    """Say in the run's folder that the run is not finished. A collective call.

    Args:
        folder: of the run.
        runtime: this process among all.
        stopped: what stopped it, after a checkpoint; None: it goes on, or was killed.
    """
    agents = _agents(runtime)
    if runtime.is_first:
        content = {
            "stopped": stopped,
            "go_on": f"python -m app.train --resume {shlex.quote(str(folder))}",
            "agents": agents,
        }
        write_text(folder / UNFINISHED, json.dumps(content, indent=2) + "\n")


def finish(folder: Path, summary: dict[str, Any]) -> None:
    """Write the summary of a run that is finished."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    (folder / UNFINISHED).unlink(missing_ok=True)


def finished(folder: Path, configuration: Configuration) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do.

    A damaged one counts as none: the run goes on from its last checkpoint and writes it again.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        training = configuration.training
        ended = summary["epochs"] >= training.epochs or ended_early(summary, training)
        return summary if ended else None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("%s is damaged (%s): it is made anew", path, reason)
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, to the disk: readers see the old one or the new one.

    Raises:
        StorageError: it cannot be written.
    """
    # Under a name of its own: workers of a search may write the same file at once.
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        with partial.open("x") as file:
            file.write(text)
            file.flush()
            # Otherwise the new name may reach the disk before what the file holds.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"run.dir: cannot write {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _agents(runtime: Runtime) -> list[str]:
    """Return who starts the processes anew where one fails, each once. A collective call."""
    return sorted(set(runtime.processes.gather(read_launch().agent)) - {""})


def _of_earlier_attempt(run: RunSection, agents: Sequence[str]) -> Path | None:
    """Return the folder of the run that some of these agents have started before."""
    if run.dir is not None:
        folders = [Path(run.dir)]
    else:
        found = [path for path in Path("runs").glob("*/") if not path.is_symlink()]
        folders = sorted(found, reverse=True) if agents else []
    for folder in folders:
        if not set(agents).isdisjoint(_started_by(folder)):
            return folder
    return None


def _started_by(folder: Path) -> list[str]:
    try:
        agents = json.loads((folder / UNFINISHED).read_text())["agents"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        return []
    return agents if isinstance(agents, list) else []


def _is_there(path: Path) -> bool:
    """Whether something lies there; unlike Path.exists, raises for a name that cannot be."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True

"""The folder of a run: made once, found again, written atomically."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from app.distributed.lease import Lease
from app.distributed.runtime import Runtime
from app.errors import StorageError, UserError
from app.settings import Configuration


def prepare_folder(configuration: Configuration, runtime: Runtime, *, resume: bool) -> Path:
    """Create the run's folder; the same path on all processes."""

    def prepare() -> Path:
        if configuration.run.dir is None:
            return new_folder(configuration.run.name)
        folder = Path(configuration.run.dir)
        with naming("run.dir", folder):
            if not resume and (folder / "metrics.h5").exists():
                raise UserError(
                    f"run.dir: {folder} holds a run already; go on with it by --resume {folder}, "
                    f"or choose another folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    processes = runtime.processes
    prepared = processes.agree(lambda: prepare() if runtime.is_first else None)
    folder = processes.from_first(prepared)
    assert folder
    return folder


def new_folder(name: str) -> Path:
    """Create runs/NAME-TIME; several runs may be started in the same second.

    Raises:
        UserError: it cannot be made, or the name leads elsewhere.
    """
    if "/" in name or "\0" in name or not name:
        raise UserError(
            f"run.name: {name!r} is no name of a folder: leave out slashes, or set run.dir"
        )
    name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
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
    """Own the run's folder, see :class:`app.distributed.lease.Lease`. A collective call.

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


def finished(folder: Path, configuration: Configuration) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary if summary["epochs"] >= configuration.training.epochs else None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old one or the new one.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"run.dir: cannot write {path}: {error.strerror}") from None

"""Copying of a data set to a disk of the node itself, where many small files are read faster."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from app.config.settings import DataSection
from app.data.image_listing import PARTS, LeftOut, Walk
from app.errors import UserError

COPIES_AT_ONCE = 16
"""Threads: on a parallel file system small files wait for latency, not for bandwidth."""


def staged_root(data: DataSection) -> str:
    """Return the data.root to read from: the copy if there is to be one, named by its origin."""
    if data.stage_to is None:
        return data.root
    origin = Path(data.root).resolve()
    key = hashlib.sha256(str(origin).encode()).hexdigest()[:12]
    return str(Path(data.stage_to, f"{origin.name}-{key}"))


def stage(data: DataSection) -> None:
    """Copy the data set to where :func:`staged_root` says, unless a copy is there.

    To be called on one process per node. Other jobs on the node may do the same: who comes second
    waits for the first one's copy. What a killed job left is removed. A copy has its final name
    only when it is complete; it is not renewed when the origin changes.

    Raises:
        UserError: the origin is missing, or the disk is full or not writable.
    """
    if data.stage_to is None:
        return
    origin, copy = Path(data.root), Path(staged_root(data))
    if not origin.is_dir():
        raise UserError(f"data.root: {origin} not found")
    if copy.resolve().is_relative_to(origin.resolve()):
        raise UserError(
            f"data.stage_to: {data.stage_to} is inside data.root, {origin}, and would be copied "
            f"into itself; choose another folder, or leave data.stage_to out"
        )
    try:
        with _locked(copy.with_name(f"{copy.name}.lock")):
            if copy.exists():
                return
            partial = copy.with_name(f"{copy.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _copy_folder(origin, partial)
                partial.rename(copy)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        if error.filename and Path(error.filename).is_relative_to(origin):
            reason = error.strerror or error
            raise UserError(f"data.root: cannot read {error.filename} ({reason})") from None
        raise UserError(
            f"data.stage_to: cannot copy {origin} to {copy} ({error.strerror or error}); choose "
            f"another folder, or leave data.stage_to out"
        ) from None


def _folders(origin: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders of all parts with the names of their files, as they are listed later."""
    for name in PARTS:
        if (origin / name).is_dir():
            yield from Walk(origin / name, LeftOut())(origin / name)


def _copy_folder(origin: Path, copy: Path) -> None:
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        copied = []
        for folder, files in _folders(origin):
            target = copy / folder.relative_to(origin)
            target.mkdir(parents=True)
            for name in files:
                copied.append(pool.submit(shutil.copyfile, folder / name, target / name))
        try:
            for future in copied:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; a process that dies gives it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

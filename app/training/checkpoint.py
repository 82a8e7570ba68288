"""Checkpoints: complete, atomic, verified, and readable with weights_only=True.

A checkpoint is a folder ``step-00001200`` with ``state.pt`` (what all processes share) and one
``process-00000.pt`` per process (its random states and the like), and beside that its parts,
``process-00000-NAME.pt``: what never changes once it is there. A part is written with the first
checkpoint that has it and is a hard link to the same file in the following ones, so that each
folder is whole, may be copied or deleted, and costs no more than what is new. One damage to such a
file is in all of them: so a run goes on without a part that no checkpoint has whole.

A checkpoint is written under another name and renamed when everything has reached the disk, so a
folder of this name is always complete.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from app.errors import AgreedStorageError, AgreedUserError, StorageError, UserError
from app.training import files
from app.training.archive import DamagedFileError, load_verified, verify
from oialr.placement.processes import Processes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHECKPOINT_KEYS = (
    "configuration",
    "position",
    "last_loss",
    "seconds",
    "method",
    "model",
    "optimizer",
    "precision",
    "average",
    "early_stopping",
    "rows",
)
"""What a checkpoint of a run holds for all processes, beside their number."""

_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


class Checkpoints:
    """The checkpoints of a run, in a folder that all processes see."""

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        keep: int,
        keys: Collection[str] = (),
        check_owner: Callable[[], None] = lambda: None,
        read_only: bool = False,
    ) -> None:
        """Take hold of the folder, which need not exist yet.

        Args:
            folder: where checkpoints live.
            processes: who writes and reads together.
            keep: number of newest checkpoints that are kept; 0: none is written.
            keys: what all processes share has at least these; without one it counts as damaged.
            check_owner: called by the first process before others see a checkpoint; raises
                StorageError where the folder is not this program's any more.
            read_only: leave names as they are: the folder may be another program's.
        """
        self._read_only = read_only
        self._folder = folder
        self._processes = processes
        self._keep = keep
        self.check_owner = check_owner
        self._keys = {"process_count", *keys}
        self._parts: dict[str, Path] = {}
        """Files of the parts that this object wrote or linked, in the newest checkpoint."""

    def save(
        self,
        step: int,
        shared: dict[str, Any],
        own: dict[str, Any],
        parts: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Write a checkpoint and drop old ones. A collective call.

        Args:
            step: optimizer steps taken.
            shared: the same on all processes; process 0's is written.
            own: what this process alone knows.
            parts: more of that, by name. What was saved under a name must be the same ever after.
        """
        if not self._keep:
            return
        parts = parts or {}
        partial = self._folder / f"partial-{step:08d}"
        index = self._processes.index
        first = index == 0

        def begin() -> None:
            self.check_owner()
            for leftover in self._folder.glob("partial-*"):
                files.remove(leftover)
            partial.mkdir(parents=True)

        def write_own() -> None:
            files.write(partial / _own_file(index), {**own, "parts": list(parts)})
            for name, content in parts.items():
                files.link_or_write(
                    self._parts.get(name), partial / _part_file(index, name), content
                )
            if first:
                files.write(partial / "state.pt", shared)

        def finish() -> Path:
            files.sync_folder(partial)
            # A second one of the same step (an epoch's end) comes after it.
            folder = self._free_name(f"step-{step:08d}")
            self.check_owner()
            partial.rename(folder)
            files.sync_folder(self._folder)
            complete = self.complete()
            # What comes after it is of a killed session, whose steps are taken again.
            end = complete.index(folder) + 1
            for old in complete[: max(0, end - self._keep)] + complete[end:]:
                files.remove_old(old)
            return folder

        self._together(lambda: begin() if first else None)
        try:
            self._together(write_own)
        except AgreedStorageError:
            if first:  # what may have filled the disk
                shutil.rmtree(partial, ignore_errors=True)
            raise
        folder = self._processes.from_first(self._together(lambda: finish() if first else None))
        assert folder
        self._parts = {name: folder / _part_file(index, name) for name in parts}

    def tidy(self, keep: int) -> int:
        """Take away what only a fault of a run that goes on would need. A collective call.

        The parts go, and all but some checkpoints. What stays is verified before.

        Args:
            keep: number of newest checkpoints that stay; at least one.

        Returns:
            Bytes that became free, on process 0; 0 on the others.

        Raises:
            AgreedStorageError: a checkpoint that is to stay is damaged, and then all stay; or the
                disk failed.
        """

        def act() -> int:
            self.check_owner()
            complete = self.complete()
            before = files.size_of(self._folder)
            for folder in complete[-keep:]:
                try:
                    verify(folder / "state.pt")
                    owns = {path: load_verified(path) for path in folder.glob("process-?????.pt")}
                except DamagedFileError as error:
                    raise StorageError(f"{folder}: {error}") from None
                for path, own in owns.items():
                    rewritten = path.with_name(f"{path.name}.partial")
                    files.write(rewritten, {**own, "parts": []})
                    rewritten.replace(path)
                for part in folder.glob("process-?????-*.pt"):
                    part.unlink()
            for folder in [*complete[:-keep], *self._folder.glob("partial-*")]:
                files.remove(folder)
            return before - files.size_of(self._folder)

        freed = self._together(lambda: act() if self._processes.index == 0 else 0)
        self._parts = {}
        return freed

    def _together(self, act: Callable[[], Result]) -> Result:
        """Do something with the disk on every process; where it fails on one, it fails on all.

        Raises:
            AgreedStorageError: it failed; what was complete is complete still.
        """
        result, problem = None, None
        try:
            result = act()
        except StorageError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"run.dir: cannot write {error.filename or self._folder}: "
                f"{error.strerror or error}; once that is mended, go on by --resume from the "
                f"newest complete checkpoint"
            )
        for found in self._processes.gather(problem):
            if found:
                raise AgreedStorageError(found)
        return result  # type: ignore[return-value]

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first; what has another name is none."""
        found = []
        for name in self._names():
            path = self._folder / name
            match = _NAME.fullmatch(name)
            if match and path.is_dir():
                found.append((int(match[1]), int(match[2] or 0), path))
        return [path for *_, path in sorted(found)]

    def _names(self) -> list[str]:
        """Return what lies in the folder, which may not be there yet.

        Raises:
            OSError: it cannot be read; a pattern of pathlib would find nothing in it.
        """
        try:
            return os.listdir(self._folder)
        except FileNotFoundError:
            return []

    def _found(self) -> list[Path]:
        """Return the complete checkpoints as the first process finds them. A collective call.

        Raises:
            AgreedUserError: it cannot read the folder.
        """

        def find() -> list[Path] | None:
            if self._processes.index:
                return None
            try:
                return self.complete()
            except OSError as error:
                raise UserError(
                    f"run.dir: cannot read {self._folder}: {error.strerror}; whether there are "
                    "checkpoints to go on from is not known"
                ) from None

        found = self._processes.from_first(self._processes.agree(find))
        assert found is not None
        return found

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Read the newest checkpoint that all processes can read. A collective call.

        Newer ones are renamed then, to damaged-*. If none can be read, all stay as they are. Where
        none is whole, a part that is damaged or missing counts as an empty one, with a warning.

        Returns:
            What all processes share, and the parts of the processes: of this one alone if the
            process count is that of the checkpoint, otherwise of all. None if there is no
            checkpoint yet.

        Raises:
            AgreedUserError: there are checkpoints, and none can be read.
        """
        newest = self._newest()
        if newest.loaded is None:
            if not newest.damaged:
                return None
            last, problem = list(newest.damaged.items())[-1]
            raise AgreedUserError(
                f"{self._folder}: none of {len(newest.damaged)} checkpoints can be read to resume "
                f"from ({last.name}: {problem}); restore one, or start anew in another folder"
            )
        self._set_aside(newest.damaged)
        return newest.loaded

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint that can be read. A collective call.

        Others are renamed then, to damaged-*, also where none is left.
        """
        newest = self._newest()
        self._set_aside(newest.damaged)
        return int(newest.folder.name.split("-")[1]) if newest.folder else None

    def _newest(self) -> "_Newest":
        """Find the newest checkpoint that all processes can read. A collective call.

        One that is whole counts before one of which parts are damaged.
        """
        found = self._found()
        newest = self._newest_of(found)
        if newest.loaded is None and newest.damaged:
            newest = self._newest_of(found, without_parts=True)
        if self._processes.index == 0:
            for folder, problem in newest.damaged.items():
                logger.warning("%s cannot be read: %s", folder, problem)
            for problem in newest.lost:
                logger.warning(
                    "%s: %s; no checkpoint is whole, and this one is used without the bases of "
                    "stability that were in there",
                    newest.folder,
                    problem,
                )
        return newest

    def _newest_of(self, found: Sequence[Path], *, without_parts: bool = False) -> "_Newest":
        """Find the newest of these that all processes can read. A collective call.

        Args:
            found: checkpoints, oldest first.
            without_parts: a part that is damaged or missing counts as an empty one. On another
                process it may be whole: what processes do alike follows from names of parts alone,
                never from what is in them.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(found):
            loaded, own_problem = None, None
            own_lost: list[str] = []
            try:
                loaded = self._read(folder, own_lost if without_parts else None)
            except (DamagedFileError, OSError) as error:
                own_problem = str(error)
            reports = self._processes.gather((own_problem, own_lost))
            problems = [problem for problem, _ in reports if problem]
            if not problems:
                lost = sorted({one for _, several in reports for one in several})
                return _Newest(folder=folder, loaded=loaded, damaged=damaged, lost=lost)
            damaged[folder] = problems[0]
        return _Newest(damaged=damaged)

    def _set_aside(self, damaged: Iterable[Path]) -> None:
        """Take damaged checkpoints out of the way, so that they are not among those kept."""
        if self._read_only:
            return
        for folder in damaged if self._processes.index == 0 else []:
            folder.rename(self._free_name(f"damaged-{folder.name}"))

    def _read(
        self, folder: Path, lost: list[str] | None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        shared = load_verified(folder / "state.pt")
        if missing := self._keys - shared.keys():
            raise DamagedFileError(f"state.pt lacks {', '.join(sorted(missing))}")
        count = shared["process_count"]
        wanted = [self._processes.index] if count == self._processes.count else range(count)
        return shared, [_load_own(folder, index, lost) for index in wanted]

    def _free_name(self, name: str) -> Path:
        """Return the path of this name, with a number behind it if there is one already."""
        path, number = self._folder / name, 1
        while path.exists():
            path, number = self._folder / f"{name}-{number}", number + 1
        return path


@dataclass(frozen=True, kw_only=True)
class _Newest:
    """What was found when the newest readable checkpoint was looked for."""

    folder: Path | None = None
    loaded: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
    damaged: Mapping[Path, str] = field(default_factory=dict)
    """Newer ones, which cannot be read, newest first, with what is wrong with them."""
    lost: Sequence[str] = ()
    """What is wrong with parts that count as empty ones."""


def _own_file(process_index: int) -> str:
    return f"process-{process_index:05d}.pt"


def _part_file(process_index: int, name: str) -> str:
    return f"process-{process_index:05d}-{name}.pt"


def _load_own(folder: Path, process_index: int, lost: list[str] | None) -> dict[str, Any]:
    """Read what a process saved; its parts by name under "parts".

    Args:
        folder: of the checkpoint.
        process_index: whose.
        lost: told of parts that cannot be read, which are empty then; None: that is an error.
    """
    own = load_verified(folder / _own_file(process_index))
    if "parts" not in own:
        raise DamagedFileError(f"{_own_file(process_index)} lacks parts")
    parts: dict[str, dict[str, Any]] = {}
    for name in own["parts"]:
        try:
            parts[name] = load_verified(folder / _part_file(process_index, name))
        except (DamagedFileError, OSError) as error:
            if lost is None:
                raise
            parts[name] = {}
            lost.append(str(error))
    return {**own, "parts": parts}

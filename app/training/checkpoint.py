"""Checkpoints: complete, atomic, and readable with weights_only=True.

A checkpoint is a folder ``step-00001200`` with ``state.pt`` (what all processes share) and one
``process-00000.pt`` per process (its random states and the like), and beside that its parts,
``process-00000-NAME.pt``: what never changes once it is there. A part is written with the first
checkpoint that has it and is a hard link to the same file in the following ones, so that each
folder is whole, may be copied or deleted, and costs no more than what is new.

A checkpoint is written under another name and renamed when everything has reached the disk, so a
folder of this name is always complete.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from app.distributed.processes import Processes
from app.errors import AgreedUserError

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in a folder that all processes see."""

    def __init__(self, folder: Path, processes: Processes, *, keep: int) -> None:
        """Take hold of the folder, which need not exist yet.

        Args:
            folder: where checkpoints live.
            processes: who writes and reads together.
            keep: number of newest checkpoints that are kept; 0: none is written.
        """
        self._folder = folder
        self._processes = processes
        self._keep = keep
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
        partial = folder = self._folder / f"partial-{step:08d}"
        index = self._processes.index
        first = index == 0
        if first:
            for leftover in self._folder.glob("partial-*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        self._processes.barrier()
        _write(partial / _own_file(index), {**own, "parts": list(parts)})
        for name, content in parts.items():
            _link_or_write(self._parts.get(name), partial / _part_file(index, name), content)
        if first:
            _write(partial / "state.pt", shared)
        self._processes.barrier()
        if first:
            _sync_folder(partial)
            # A second one of the same step (an epoch's end) comes after it.
            folder = self._free_name(f"step-{step:08d}")
            partial.rename(folder)
            _sync_folder(self._folder)
            complete = self.complete()
            # What comes after it is of a killed session, whose steps are taken again.
            end = complete.index(folder) + 1
            for old in complete[: max(0, end - self._keep)] + complete[end:]:
                shutil.rmtree(old)
        folder = self._processes.from_first(folder)
        self._parts = {name: folder / _part_file(index, name) for name in parts}

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(self._folder.glob("step-*"))

    def newest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none. Collective."""
        complete = self._processes.from_first(self.complete())
        return int(complete[-1].name.split("-")[1]) if complete else None

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Read the newest checkpoint that all processes can read. A collective call.

        Newer ones are renamed then, to damaged-*. If none can be read, all stay as they are.

        Returns:
            What all processes share, and the parts of the processes: of this one alone if the
            process count is that of the checkpoint, otherwise of all. None if there is no
            checkpoint yet.

        Raises:
            AgreedUserError: there are checkpoints, and none can be read.
        """
        candidates = self._processes.from_first(self.complete())
        if not candidates:
            return None
        first = self._processes.index == 0
        damaged: list[Path] = []
        for folder in reversed(candidates):
            loaded, problem = None, None
            try:
                loaded = self._read(folder)
            except Exception as error:  # a damaged file may raise anything: it cannot be read
                problem = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
            problems = [p for p in self._processes.gather(problem) if p]
            if loaded and not problems:
                # Out of the way, so that they do not count among those that are kept.
                for other in damaged if first else []:
                    other.rename(self._free_name(f"damaged-{other.name}"))
                return loaded
            damaged.append(folder)
            if first and len(damaged) < len(candidates):
                logger.warning("%s cannot be read (%s): trying the one before", folder, problems[0])
        raise AgreedUserError(
            f"{self._folder}: none of {len(candidates)} checkpoints can be read to resume from "
            f"({folder.name}: {problems[0]}); restore one, or start anew in another folder"
        )

    def _read(self, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        shared = _load(folder / "state.pt")
        count = shared["process_count"]
        wanted = [self._processes.index] if count == self._processes.count else range(count)
        return shared, [_load_own(folder, index) for index in wanted]

    def _free_name(self, name: str) -> Path:
        """Return the path of this name, with a number behind it if there is one already."""
        path, number = self._folder / name, 1
        while path.exists():
            path, number = self._folder / f"{name}-{number}", number + 1
        return path


def _own_file(process_index: int) -> str:
    return f"process-{process_index:05d}.pt"


def _part_file(process_index: int, name: str) -> str:
    return f"process-{process_index:05d}-{name}.pt"


def _load_own(folder: Path, process_index: int) -> dict[str, Any]:
    """Read what a process saved; its parts by name under "parts"."""
    own = _load(folder / _own_file(process_index))
    parts = {name: _load(folder / _part_file(process_index, name)) for name in own["parts"]}
    return {**own, "parts": parts}


def _link_or_write(earlier: Path | None, path: Path, content: dict[str, Any]) -> None:
    if earlier:
        try:
            os.link(earlier, path)
        except OSError:  # a file system without links, or the earlier checkpoint was deleted
            pass
        else:
            return
    _write(path, content)


def _load(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert isinstance(content, dict)
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

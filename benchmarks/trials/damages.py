"""Damage to every file that the program writes: it is named, or it makes no difference."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from app.search.store import Evaluation, Store, read_evaluations
from app.training.archive import load_verified
from benchmarks.trials import programs
from benchmarks.trials.comparison import difference, different, read_outcome, read_rows
from benchmarks.trials.runs import VARIANTS, References, start

TEXTS = {"config.yaml", "log.txt", "unfinished.json", "summary.json"}
"""People read and change these; they have no checksums."""
_NAMED = {"UserError", "DamagedFileError", "FileNotFoundError"}
"""What is raised of a file that cannot be used."""


def damage(path: Path, chance: Random) -> str:
    """Damage a file in a way that disks, copies and people have; say which."""
    content = bytearray(path.read_bytes())
    size = len(content)
    kind = chance.choice(("bit", "bit", "zeros", "zeros", "noise", "end", "moved", "empty", "gone"))
    block = chance.choice((16, 512, 4096))
    place = chance.randrange(size)
    if block > 16:  # as disks do, from a multiple of it on
        place -= place % block
    if kind == "bit":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        content[place : place + block] = bytes(len(content[place : place + block]))
    elif kind == "noise":
        content[place : place + block] = chance.randbytes(len(content[place : place + block]))
    elif kind == "moved":  # a block of the file where another belongs
        other = chance.randrange(size)
        content[place : place + block] = content[other : other + block]
    elif kind == "end":
        del content[place:]
    elif kind == "empty":
        content.clear()
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{kind} ({block} B at {place} of {size}) in {path.name}"


def copy_with_links(folder: Path, target: Path) -> None:
    """Copy a folder in which what is one file under several names is one file in the copy, too."""
    copies: dict[tuple[int, int], str] = {}

    def copy(source: str, place: str) -> str:
        status = os.stat(source)
        first = copies.setdefault((status.st_dev, status.st_ino), place)
        if first == place:
            shutil.copy2(source, place)
        else:
            os.link(first, place)
        return place

    shutil.copytree(folder, target, copy_function=copy)


class Damages:
    """Damages files one by one, and looks at what becomes of it."""

    def __init__(self, folder: Path, references: References) -> None:
        """Make what is damaged when the first damage comes."""
        self._folder = folder
        self._references = references
        self._variant = VARIANTS[1]
        self._stopped = folder / "stopped"
        self._store = folder / "store"
        self._number = 0

    def next(self, chance: Random) -> dict[str, Any]:
        """Try one damage; see kill_run."""
        if not self._number:
            self._prepare()
        self._number += 1
        ways: list[Callable[[Random], tuple[str, str, str]]] = [
            self._resumed,
            self._resumed,
            self._metrics_read,
            self._store_read,
            self._checkpoint_read,
            self._finished,
        ]
        weights = (4, 4, 4, 3, 4, 1)
        way = chance.choices(ways, weights)[0]
        name, what, problem = way(chance)
        found = {"damages": 1, f"{name}: {what}": 1}
        return {"counts": found, "problems": [problem] if problem else []}

    def _prepare(self) -> None:
        self._reference = self._references.get(self._variant, 1)
        ended = start(self._stopped, self._variant, 1, "run.stop_after=28").wait()
        if ended.codes != (75,):
            raise RuntimeError(f"the run to be damaged failed: {ended.output}")
        self._files = sorted(
            path.relative_to(self._stopped) for path in self._stopped.rglob("*") if path.is_file()
        )
        self._groups = list(self._reference.outcome.rows)
        self._whole = read_rows(self._reference.folder / "metrics.h5", self._groups)
        self._store.mkdir()
        _fill(self._store)
        self._evaluations = read_evaluations(self._store)
        self._work = self._folder / "copy"

    def _resumed(self, chance: Random) -> tuple[str, str, str]:
        """Damage any file of a run that was stopped, and go on with it."""
        copy = self._copy(self._stopped)
        file = chance.choice(self._files)
        what = damage(copy / file, chance)
        end = start(copy, self._variant, 1, "run.stop_after=null").wait()
        kind = file.name if file.name in TEXTS else "metrics.h5" if file.suffix == ".h5" else "*.pt"
        kind = f"resumed with damaged {kind}"
        told = file.name in end.output or file.parent.name in end.output
        if file.name == "config.yaml":  # an error names the key; a value that is right is told
            told |= bool(end.errors) or "differs from the checkpoint's" in end.output
        if end.hung or "Traceback" in end.output:
            return kind, "unexplained", self._keep(copy, f"{what}: {end.output[-2500:]}")
        if any(end.codes):
            if len(end.errors) == 1 and told:
                return kind, "refused in one line", ""
            return kind, "unexplained", self._keep(copy, f"{what}: {end.output[-2500:]}")
        other = difference(read_outcome(copy), self._reference.outcome)
        if not other:
            return kind, "told and mended" if "damaged" in end.output else "no effect", ""
        if "which are lost" in end.output and not difference(
            read_outcome(copy), self._reference.outcome, lost_rows=True
        ):
            return kind, "told, the rest is whole", ""
        if "without the bases of stability" in end.output and not difference(
            read_outcome(copy), self._reference.outcome, lost_bases=True
        ):
            return kind, "told, the rest is whole", ""
        if told and file.name == "config.yaml":
            return kind, "told: another value", ""
        return kind, "unexplained", self._keep(copy, f"{what}: differs in {other}; {end.output}")

    def _finished(self, chance: Random) -> tuple[str, str, str]:
        """Damage the summary of a run that has ended, and resume it."""
        copy = self._copy(self._reference.folder)
        what = damage(copy / "summary.json", chance)
        end = start(copy, self._variant, 1).wait()
        kind = "finished with damaged summary.json"
        if end.hung or "Traceback" in end.output or (any(end.codes) and len(end.errors) != 1):
            return kind, "unexplained", self._keep(copy, f"{what}: {end.output[-2500:]}")
        return kind, "refused in one line" if any(end.codes) else "no fault", ""

    def _metrics_read(self, chance: Random) -> tuple[str, str, str]:
        """Damage metrics.h5 and read all of it."""
        self._fresh()
        path = self._work / "metrics.h5"
        shutil.copy(self._reference.folder / "metrics.h5", path)

        def same(rows: Any) -> bool:
            return all(
                np.array_equal(values, self._whole[group][name], equal_nan=values.dtype.kind == "f")
                for group, columns in rows.items()
                for name, values in columns.items()
            )

        return self._read(path, chance, lambda: same(read_rows(path, self._groups)), "metrics.h5")

    def _store_read(self, chance: Random) -> tuple[str, str, str]:
        """Damage a file of a search's store and read all of it."""
        copy = self._copy(self._store)
        path = chance.choice(sorted(copy.iterdir()))
        return self._read(
            path,
            chance,
            lambda: read_evaluations(copy) == self._evaluations,
            "a search's store",
            may_be_gone=True,
        )

    def _checkpoint_read(self, chance: Random) -> tuple[str, str, str]:
        """Damage a file of a checkpoint and load it."""
        self._fresh()
        file = chance.choice([file for file in self._files if file.suffix == ".pt"])
        path = self._work / file.name
        shutil.copy(self._stopped / file, path)
        whole = torch.load(path, weights_only=True)
        return self._read(path, chance, lambda: not different(load_verified(path), whole), "*.pt")

    def _read(
        self,
        path: Path,
        chance: Random,
        same: Callable[[], bool],
        name: str,
        *,
        may_be_gone: bool = False,
    ) -> tuple[str, str, str]:
        what = damage(path, chance)
        kind = f"read {name}, damaged"
        end, result = programs.call(same, folder=self._folder)
        if result is True:
            return kind, "no effect", ""
        if (
            isinstance(result, programs.Raised)
            and path.name in result.text
            and _NAMED & {*result.kinds}
        ):
            return kind, "named", ""
        if may_be_gone and not path.exists():
            return kind, "file missing", ""
        return kind, "unexplained", self._keep(path.parent, f"{what}: {result!r} {end}")

    def _fresh(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()

    def _copy(self, folder: Path) -> Path:
        shutil.rmtree(self._work, ignore_errors=True)
        copy_with_links(folder, self._work)
        return self._work

    def _keep(self, folder: Path, problem: str) -> str:
        kept = self._folder / f"damaged-{self._number}"
        copy_with_links(folder, kept)
        return f"{kept.name}: {problem}"


def _fill(folder: Path) -> None:
    """Write the store of a search of two workers."""
    chance = Random(0)
    for worker in range(2):
        store = Store.create(
            folder, session=0, worker=worker, parameters={"oialr.cutoff": "f8", "model.name": "S64"}
        )
        for number in range(worker, 60, 2):
            store.append(
                Evaluation(
                    number=number,
                    parameters={"oialr.cutoff": chance.random(), "model.name": "lenet5"},
                    loss=chance.random(),
                    status="finished",
                    error=chance.random(),
                    trainable_percent=50.0,
                    step_seconds=0.1,
                    epochs=4,
                    seconds=3.0,
                    started="2026-01-01T00:00:00+00:00",
                    seed=number,
                    processes=1,
                    worker=worker,
                    island=0,
                    folder=f"evaluations/{number}",
                    traceback="",
                    curve=tuple(chance.random() for _ in range(4)),
                )
            )
        store.close()

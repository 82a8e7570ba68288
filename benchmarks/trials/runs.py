"""The small training that the faults meet, and what it comes to where nothing disturbs it."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.recording.store import read_rows
from benchmarks._paper import paper_keys
from benchmarks.trials import programs
from benchmarks.trials.comparison import Outcome, read_outcome
from benchmarks.trials.programs import End, Program

STEPS = 32
TINY = (  # with the paper's algorithm, which has more events than the recipe
    "training.epochs=4",  # of 8 steps, a checkpoint after each
    "training.warmup_epochs=1",
    "oialr.delay=11",  # then events after steps 11, 15, 19, 23, 27 and 31
    "oialr.update_interval=4",
    "oialr.layer_fraction=0.5",
    "oialr.cutoff=0.4",
    "model.arguments={patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2, proj_drop_rate: 0.1}",
    "data.train_samples=500",
    "data.augmentation=crop",
    "stability.window=2",
    "run.log_interval=1",  # metrics.h5 is written after every step
    "run.tidy=false",  # the bases of stability are compared, too
    "distributed.timeout=60",
    "distributed.device=cpu",
)
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("training.early_stopping=9",),
    ("training.ema_decay=0.9", "stability.background_steps=3"),
    ("training.accumulation=2", "run.keep_checkpoints=1"),
)


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed."""

    folder: Path
    outcome: Outcome
    seconds: float
    """From its start to its end."""


class References:
    """Undisturbed runs, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        """Keep them in a folder."""
        self._folder = folder
        self._made: dict[tuple[tuple[str, ...], int], Reference] = {}

    def get(self, variant: tuple[str, ...], count: int) -> Reference:
        """Return the run of a variant on some processes."""
        if (variant, count) not in self._made:
            self._folder.mkdir(exist_ok=True)
            folder = self._folder / f"run-{len(self._made)}"
            begin = time.monotonic()
            expect_success(start(folder, variant, count).wait())
            seconds = time.monotonic() - begin
            self._made[variant, count] = Reference(folder, read_outcome(folder), seconds)
        return self._made[variant, count]


def start(
    folder: Path,
    variant: Sequence[str],
    count: int,
    *more: str,
    mpirun: bool = False,
    variables: Mapping[str, str] = {},
) -> Program:
    """Start a run, or go on with it where it has begun."""
    arguments = [*paper_keys(), *TINY, *variant, f"run.dir={folder}", *more]
    if (folder / "config.yaml").exists():
        arguments = ["--resume", str(folder), *more]
    output = folder.with_name(f"{folder.name}.txt")
    if mpirun:
        return programs.start_under_mpirun(arguments, count=count, output=output)
    return programs.start(arguments, count=count, output=output, variables=variables)


def expect_success(end: End) -> None:
    """Stop the trials where what they are compared with fails."""
    if any(end.codes) or end.hung:
        raise RuntimeError(f"an undisturbed run failed ({end.codes}):\n{end.output}")


def sessions(folder: Path) -> list[tuple[int, int]]:
    """Return the process count and the first step of each session that got anywhere, in order.

    A session without a step got somewhere, too, if it ended the last epoch of one that was stopped
    after the last step: then the newest checkpoint is its own.
    """
    rows = read_rows(folder / "metrics.h5", "sessions")
    counts, firsts = rows["process_count"].tolist(), rows["first_step"].tolist()
    ends = [*firsts[1:], STEPS]
    parts = [
        (count, first)
        for count, first, end in zip(counts, firsts, ends, strict=True)
        if end > first
    ]
    newest = max((folder / "checkpoints").glob("step-*"))
    writers = len(list(newest.glob("process-?????.pt")))
    return parts if writers == parts[-1][0] else [*parts, (writers, STEPS)]


def replay(folder: Path, variant: Sequence[str], parts: Sequence[tuple[int, int]]) -> Outcome:
    """Train as some sessions did, with stops in place of kills; return what that comes to."""
    shutil.rmtree(folder, ignore_errors=True)
    ends = [first for _, first in parts[1:]]
    for (count, _), end in zip(parts, [*ends, None], strict=True):
        stop = "null" if end is None else str(end)
        ended = start(folder, variant, count, f"run.stop_after={stop}").wait()
        if ended.hung or any(code not in (0, 75) for code in ended.codes):
            raise RuntimeError(f"a replayed run failed ({ended.codes}):\n{ended.output}")
    return read_outcome(folder)

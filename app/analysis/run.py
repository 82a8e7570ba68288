"""An analysis from the files to metrics.h5: puts the parts together."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.analysis.choice import (
    Comparisons,
    PassedOver,
    Series,
    compare,
    drop_copies,
    order,
    several_series,
)
from app.analysis.estimate import Estimate, Speed, estimate, measure_speed
from app.analysis.files import Source, find_checkpoints
from app.analysis.measuring import find_damage, measure
from app.analysis.portions import divide, rounds
from app.analysis.progress import Progress
from app.analysis.selection import select_weights
from app.analysis.survey import look_into, of_one_network
from app.analysis.unfinished import Part, Unfinished
from app.errors import AgreedStorageError, AgreedUserError, StorageError, UserError
from app.runtime.processes import Runtime
from app.training.recorder import Recorder
from oialr.layer_survey import LayerReport
from oialr.placement.processes import Processes


@dataclass
class Analysis:
    """What came of an analysis; the same on all processes."""

    metrics: Path
    checkpoints: int = 0
    """Those that are measured."""
    layers: int = 0
    ordered: str = ""
    """What the series is ordered by, and from where to where."""
    problems: list[str] = field(default_factory=list)
    """A line for each file that was skipped."""
    passed_over: list[PassedOver] = field(default_factory=list)
    """Copies, averages and the like, of which nothing new would be measured."""
    integers: list[str] = field(default_factory=list)
    """Tensors of integers that are left out, in any of the checkpoints."""
    by_count: bool = False
    """Whether a window is a number of checkpoints, for want of any two that are it apart."""
    estimate: Estimate | None = None
    """What a dry run tells; None of an analysis that was made."""


def analyze(
    paths: Sequence[Path],
    *,
    output: Path | None,
    window: int,
    include: Sequence[str],
    exclude: Sequence[str],
    not_averaged: Sequence[str],
    runtime: Runtime,
    dry_run: bool = False,
) -> Analysis:
    """Measure the weights of checkpoints of one network. A collective call.

    The weights are measured one after the other, each over all checkpoints: so neither checkpoints
    nor the bases of all weights need fit into memory. What is measured is kept on the disk, and an
    analysis that was killed goes on from there: the result is the same, bit for bit.

    Args:
        paths: files, and folders of them.
        output: folder of metrics.h5; None: "analysis" in the only folder given, or else here.
        window: checkpoints between the two that are compared, at their most common distance.
        include, exclude, not_averaged: as in :func:`app.analysis.selection.select_weights`.
        runtime: the processes that share the layers.
        dry_run: whether only to tell what it will take; nothing is written.

    Raises:
        AgreedUserError: there is nothing to measure, the folder cannot be written to or is another
            analysis', or a checkpoint was removed meanwhile.
        AgreedStorageError: the disk is full, or failed.
    """
    processes = runtime.processes
    sources, problems = processes.from_first(
        processes.agree(lambda: find_checkpoints(paths) if runtime.is_first else ([], []))
    )
    found, unreadable = look_into(sources, processes)
    found, others = of_one_network(found)
    problems += unreadable + others
    if not found:
        reason = f": {problems[0]}" if problems else ""
        raise AgreedUserError(f"no checkpoint can be read{reason}")
    found, passed_over = drop_copies(found)
    if problem := several_series(found):
        raise AgreedUserError(problem)
    series, of_the_same_time = order(found)
    comparisons = compare(series.times, window)
    layers = processes.agree(
        lambda: select_weights(
            [checkpoint.shapes for checkpoint in series.found],
            include=include,
            exclude=exclude,
            not_averaged=not_averaged,
        )
    )
    folder = output or _default_output(paths)
    result = Analysis(
        metrics=folder / "metrics.h5",
        checkpoints=len(series.found),
        layers=len(layers),
        ordered=series.described(),
        problems=problems,
        passed_over=passed_over + of_the_same_time,
        integers=list(dict.fromkeys(text for entry in series.found for text in entry.integers)),
        by_count=comparisons.by_count,
    )
    work = _Work(layers, series, comparisons, min(window, len(series.found) - 1), runtime)
    if dry_run:
        result.estimate = work.estimate(layers)
        return result
    configuration = json.dumps(
        {
            "analysis": {
                "checkpoints": [str(path) for path in paths],
                "position": series.label,
                "window": window,
                "span": None if comparisons.by_count else comparisons.span,
                "include": list(include),
                "exclude": list(exclude),
                "not_averaged": list(not_averaged),
            }
        },
        indent=2,
    )
    unfinished = Unfinished(folder)
    damaged = _begin(unfinished, folder, work)
    problems += damaged.values()
    result.checkpoints -= len(damaged)
    if not result.checkpoints:
        raise AgreedUserError(f"no checkpoint can be measured: {problems[-1]}")
    recorder = processes.agree(
        lambda: _open(unfinished, configuration, layers) if runtime.is_first else Recorder(None)
    )
    try:
        recorder.session(process_count=runtime.process_count, first_step=0)
        parts = _measure(work, unfinished, sound=[i for i in work.all if i not in damaged])
        if runtime.is_first:
            _record(recorder, parts, work, damaged)
    finally:
        recorder.close()
    _end_together(processes, recorder.problem)
    if runtime.is_first:
        os.replace(unfinished.folder / "metrics.h5", result.metrics)
        unfinished.remove()
    return result


@dataclass(frozen=True)
class _Work:
    """What is measured, and by whom."""

    layers: Sequence[LayerReport]
    series: Series
    comparisons: Comparisons
    references: int
    """Earlier checkpoints that are remembered at most."""
    runtime: Runtime

    @property
    def all(self) -> range:
        """Places of the checkpoints in the order of time."""
        return range(len(self.series.found))

    def plan(self) -> dict[str, Any]:
        """Say what is measured, wherever the files lie."""
        return {
            "checkpoints": [
                [time, checkpoint.fingerprint]
                for time, checkpoint in zip(self.comparisons.times, self.series.found, strict=True)
            ],
            "window": self.comparisons.span,
            "weights": [
                [layer.name, list(layer.shape), layer.groups, layer.is_linear_map]
                for layer in self.layers
            ],
        }

    def speed(self, layers: Sequence[LayerReport]) -> Speed:
        """Find out how fast the processes are. A collective call."""
        return measure_speed(layers, checkpoint_count=len(self.all), runtime=self.runtime)

    def estimate(self, layers: Sequence[LayerReport], speed: Speed | None = None) -> Estimate:
        """Tell what the measurement of these weights will take. A collective call."""
        count = self.runtime.process_count
        return estimate(
            rounds(divide(layers, count), count),
            speed or self.speed(layers),
            checkpoint_count=len(self.all),
            references=self.references,
        )


def _begin(unfinished: Unfinished, folder: Path, work: _Work) -> dict[int, str]:
    """Make the folder, or find what was begun there; and look through all values.

    A collective call.

    Returns:
        A line for each checkpoint that holds what cannot be measured, by its place.
    """
    runtime, plan = work.runtime, work.plan()

    def begin() -> dict[str, Any]:
        if (folder / "metrics.h5").exists():
            raise UserError(f"--output: {folder} holds metrics already; choose another folder")
        return unfinished.begin(plan)

    notes = runtime.processes.from_first(
        runtime.processes.agree(lambda: begin() if runtime.is_first else {})
    )
    if "damaged" in notes:
        return {int(place): line for place, line in notes["damaged"].items()}
    damaged = _find_damage(work)
    _first_writes(runtime, lambda: unfinished.note(plan, {"damaged": damaged}))
    return damaged


def _find_damage(work: _Work) -> dict[int, str]:
    """Look for NaN in all checkpoints, shared over the processes. A collective call."""
    processes = work.runtime.processes
    places = {layer.name: place for place, layer in enumerate(work.layers)}
    pairs = [
        (index, portion) for index in work.all for portion in divide(work.layers, processes.count)
    ]
    mine: list[tuple[int, int, str]] = []
    for index, portion in pairs[processes.index :: processes.count]:
        damage = find_damage(portion, work.series.found[index].source)
        if damage is not None:
            place, line = damage
            mine.append((index, places[portion[place].name], line))
    found = sorted(entry for part in processes.gather(mine) for entry in part)
    # Of each checkpoint the first weight's.
    return {index: line for index, _, line in reversed(found)}


def _measure(work: _Work, unfinished: Unfinished, *, sound: Sequence[int]) -> list[Part]:
    """Measure what is not measured yet, a portion by each process at a time. A collective call.

    Returns:
        Everything, on the first process.
    """
    runtime = work.runtime
    processes = runtime.processes
    parts = unfinished.parts() if runtime.is_first else []
    done = processes.from_first({name for part in parts for name in part.rows})
    left = [layer for layer in work.layers if layer.name not in done]
    speed = work.speed(left)
    progress = Progress(
        len(work.layers), len(done), work.estimate(left, speed), shown=runtime.is_first
    )
    sources = [work.series.found[i].source for i in sound]
    times = [work.comparisons.times[i] for i in sound]

    with progress:
        for together in rounds(divide(left, processes.count), processes.count):
            parts += _measure_round(work, together, sources, times, unfinished)
            progress.advance(
                sum(map(len, together)),
                max(sum(map(speed.seconds, portion)) for portion in together) * len(work.all),
            )
    return parts


def _measure_round(
    work: _Work,
    together: Sequence[Sequence[LayerReport]],
    sources: Sequence[Source],
    times: Sequence[int],
    unfinished: Unfinished,
) -> list[Part]:
    """Measure a portion by each process, and keep what came of them. A collective call."""
    runtime = work.runtime
    processes = runtime.processes

    def measure_mine() -> Part | None:
        if processes.index >= len(together):
            return None
        return measure(
            together[processes.index],
            sources,
            times,
            window=work.comparisons.span,
            device=runtime.device,
        )

    def keep() -> None:
        for part in parts:
            unfinished.add(part)

    mine = processes.agree(measure_mine)
    parts = [part for part in processes.gather(mine) if part is not None]
    _first_writes(runtime, keep)
    return parts


def _record(
    recorder: Recorder, parts: Sequence[Part], work: _Work, damaged: dict[int, str]
) -> None:
    """Write all rows, in the order of time and of the weights."""
    rows = {name: rows for part in parts for name, rows in part.rows.items()}
    measured = (place for place in work.all if place not in damaged)
    for number, place in enumerate(measured):
        checkpoint, position = work.series.found[place], work.series.times[place]
        recorder.stability(
            [rows[layer.name][number] for layer in work.layers],
            epoch=position if checkpoint.epoch is None else checkpoint.epoch,
            step=position,
            seconds=sum(part.seconds[number] for part in parts),
        )


def _first_writes(runtime: Runtime, write: Callable[[], object]) -> None:
    """Let the first process write; where it cannot, all of them end. A collective call."""
    problem = None
    if runtime.is_first:
        try:
            write()
        except StorageError as error:
            problem = error
    _end_together(runtime.processes, problem)


def _end_together(processes: Processes, problem: StorageError | None) -> None:
    """Raise what the first process cannot write on all of them. A collective call."""
    if (problem := processes.from_first(problem)) is not None:
        raise AgreedStorageError(str(problem))


def _default_output(paths: Sequence[Path]) -> Path:
    return paths[0] / "analysis" if len(paths) == 1 and paths[0].is_dir() else Path("analysis")


def _open(unfinished: Unfinished, configuration: str, layers: Sequence[LayerReport]) -> Recorder:
    try:
        return Recorder.create(
            unfinished.folder / "metrics.h5",
            configuration=configuration,
            layers=layers,
            figures=(),
        )
    except OSError as error:
        raise UserError(
            f"--output: cannot write to {unfinished.folder}: {error.strerror}"
        ) from None

"""An analysis from the files to metrics.h5: puts the parts together."""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from tqdm import tqdm

from app.analysis.checkpoint import as_module, fingerprint, is_finite, read_checkpoint
from app.analysis.choice import Found, PassedOver, compare, drop_copies, order
from app.analysis.files import Source, find_checkpoints
from app.analysis.selection import select_weights, shapes_of, signature
from app.errors import AgreedUserError, UserError
from app.runtime.processes import Runtime
from app.training.foreign_files import CheckpointError
from app.training.recorder import Recorder
from oialr.layer_survey import LayerReport
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker


@dataclass
class Analysis:
    """What came of an analysis; the same on all processes."""

    metrics: Path
    measured: int = 0
    """Checkpoints."""
    layers: int = 0
    problems: list[str] = field(default_factory=list)
    """A line for each file that was skipped."""
    passed_over: list[PassedOver] = field(default_factory=list)
    """Copies, averages and the like, of which nothing new would be measured."""
    by_count: bool = False
    """Whether a window is a number of checkpoints, for want of any two that are it apart."""


def analyze(
    paths: Sequence[Path],
    *,
    output: Path | None,
    window: int,
    include: Sequence[str],
    exclude: Sequence[str],
    not_averaged: Sequence[str],
    runtime: Runtime,
) -> Analysis:
    """Measure the weights of checkpoints of one network. A collective call.

    Args:
        paths: files, and folders of them.
        output: folder of metrics.h5; None: "analysis" in the only folder given, or else here.
        window: checkpoints between the two that are compared, at their most common distance.
        include, exclude, not_averaged: as in :func:`app.analysis.selection.select_weights`.
        runtime: the processes that share the layers.

    Raises:
        AgreedUserError: there is nothing to measure, or the folder cannot be written to.
    """
    processes = runtime.processes
    sources, problems = processes.from_first(
        processes.agree(lambda: find_checkpoints(paths) if runtime.is_first else ([], []))
    )
    found, unreadable = _survey(sources, processes)
    found, others = _of_one_network(found)
    problems += unreadable + others
    if not found:
        reason = f": {problems[0]}" if problems else ""
        raise AgreedUserError(f"no checkpoint can be read{reason}")
    found, passed_over = drop_copies(found)
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
    configuration = json.dumps(
        {
            "analysis": {
                "checkpoints": [str(path) for path in paths],
                "position": series.label,
                "window": window,
                "include": list(include),
                "exclude": list(exclude),
                "not_averaged": list(not_averaged),
            }
        },
        indent=2,
    )
    recorder = processes.agree(
        lambda: _open(folder, configuration, layers) if runtime.is_first else Recorder(None)
    )
    result = Analysis(
        metrics=folder / "metrics.h5",
        layers=len(layers),
        problems=problems,
        passed_over=passed_over + of_the_same_time,
        by_count=comparisons.by_count,
    )
    tracker = BasisTracker(layers, processes, window=comparisons.span)
    try:
        recorder.session(process_count=runtime.process_count, first_step=0)
        quiet = not (runtime.is_first and sys.stderr.isatty())
        bar = tqdm(series.found, unit="checkpoint", dynamic_ncols=True, disable=quiet)
        for checkpoint, position, time_of in zip(bar, series.times, comparisons.times, strict=True):
            model = _load(checkpoint.source, layers, runtime, problems)
            if model is None:
                continue
            start = time.perf_counter()
            rows = tracker.measure(model, time_of)
            seconds = time.perf_counter() - start
            epoch = position if checkpoint.epoch is None else checkpoint.epoch
            recorder.stability(rows, epoch=epoch, step=position, seconds=seconds)
            result.measured += 1
    finally:
        recorder.close()
    return result


def _survey(sources: Sequence[Source], processes: Processes) -> tuple[list[Found], list[str]]:
    """Look into all files, each process into its share. A collective call."""
    mine: list[tuple[int, Found | str]] = []
    for index in range(processes.index, len(sources), processes.count):
        try:
            stored = read_checkpoint(*sources[index].files, index=sources[index].index)
        except CheckpointError as error:
            mine.append((index, str(error)))
            continue
        entry = Found(
            source=sources[index],
            shapes=shapes_of(stored.weights),
            step=stored.step,
            epoch=stored.epoch,
            within_epoch=stored.within_epoch,
            fingerprint=fingerprint(stored.weights),
        )
        mine.append((index, entry))
    gathered = [entry for part in processes.gather(mine) for entry in part]
    entries = [entry for _, entry in sorted(gathered, key=lambda pair: pair[0])]
    return (
        [entry for entry in entries if isinstance(entry, Found)],
        [entry for entry in entries if isinstance(entry, str)],
    )


def _of_one_network(found: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Keep the checkpoints of the network that most of them are of."""
    signatures = [signature(checkpoint.shapes) for checkpoint in found]
    if not found:
        return [], []
    common, _ = Counter(signatures).most_common(1)[0]
    kept, problems = [], []
    for checkpoint, own in zip(found, signatures, strict=True):
        if own == common:
            kept.append(checkpoint)
            continue
        name, m, n = next(iter(sorted(set(own) ^ set(common))))
        problems.append(
            f"{checkpoint.path}: of another network than the others: {name} ({m}, {n}) is "
            f"{'only here' if (name, m, n) in own else 'missing'}"
        )
    return kept, problems


def _load(
    source: Source, layers: Sequence[LayerReport], runtime: Runtime, problems: list[str]
) -> nn.Module | None:
    """Read the weights; None, with a line more in ``problems``, where they cannot be measured.

    A collective call. Each process looks for NaN in its share.
    """
    problem, model = "", None
    try:
        stored = read_checkpoint(*source.files).weights
        weights = {layer.name: stored[layer.name] for layer in layers}
        for layer in layers[runtime.process_index :: runtime.process_count]:
            if not is_finite(weights[layer.name]):
                problem = f"{source.path}: {layer.name} holds NaN or infinity"
                break
        model = as_module(weights, runtime.device)
    except (CheckpointError, KeyError) as error:  # replaced since it was looked into
        problem = str(error)
    found = [line for line in runtime.processes.gather(problem) if line]
    problems += found[:1]
    return None if found else model


def _default_output(paths: Sequence[Path]) -> Path:
    return paths[0] / "analysis" if len(paths) == 1 and paths[0].is_dir() else Path("analysis")


def _open(folder: Path, configuration: str, layers: Sequence[LayerReport]) -> Recorder:
    metrics = folder / "metrics.h5"
    if metrics.exists():
        raise UserError(f"--output: {folder} holds metrics already; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Recorder.create(metrics, configuration=configuration, layers=layers, figures=())
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder}: {error.strerror}") from None

"""A report from its runs to its files: puts the parts together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.errors import UserError, one_line, refused_path
from app.reporting.comparison import RunGroup, final_figures, group_runs
from app.reporting.curves import costs, learning, means, other_measures, seconds
from app.reporting.drawing import Drawing, save, style
from app.reporting.layer_maps import floor, mixing_map, rank_map, stability_map, window_of
from app.reporting.page import render_page, write_page
from app.reporting.reference import REFERENCE_CURVES, ReferenceCurve
from app.reporting.runs import Run, check_patterns, choose_layers, read_run
from app.reporting.spectra import spectra

_SPECTRA = 6  # panels, where nobody says which


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a report has written."""

    page: Path
    figures: Sequence[Path]
    notices: Sequence[str]
    """What is missing in it, a line each."""


def write_report(
    paths: Sequence[Path],
    *,
    output: Path | None,
    formats: Sequence[str],
    layers: Sequence[str],
    reference: str | None,
) -> Written:
    """Draw everything that was recorded of some runs, and write figures and page.

    Args:
        paths: folders of runs; of several, those that are none are skipped with a notice.
        output: folder of the report; None: that of the run for one run, ./report for several.
        formats: of the figures' files, of drawing.FORMATS.
        layers: patterns of the layers whose spectra are drawn; none: some of them.
        reference: key of REFERENCE_CURVES, or None.

    Raises:
        UserError: no run can be read, a pattern matches no layer, or the folder cannot be
            written to.
    """
    runs, notices = _read_runs(paths)
    check_patterns(runs, layers)
    curve = REFERENCE_CURVES[reference] if reference else None
    groups = group_runs(runs)
    folder = output or (runs[0].report_folder if len(runs) == 1 else Path("report"))
    comparable, left_out = _of_one_axis(groups)
    notices += _missing(runs, reference) + left_out
    with style():
        found = (
            learning(comparable),
            costs(comparable),
            means(comparable, curve) if sum(len(g.runs) for g in comparable) > 1 else None,
            seconds(comparable),
        )
        together = [drawing for drawing in found if drawing]
        scales = _Scales.common(runs)
        drawings = {
            run.metrics: _draw_run(run, number if len(runs) > 1 else None, layers, curve, scales)
            for number, run in enumerate(runs, 1)
        }
        figures = [
            path
            for drawing in [*together, *(d for part in drawings.values() for d in part)]
            for path in save(drawing, folder / "figures", formats)
        ]
        page = render_page(
            title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
            groups=groups,
            table=final_figures(groups),
            together=together,
            drawings=drawings,
            notices=notices,
        )
    return Written(page=write_page(folder, page), figures=figures, notices=notices)


def _missing(runs: Sequence[Run], reference: str | None) -> list[str]:
    """Say what cannot be drawn of some runs, a line each."""
    notices = [
        f"{run.path}: no basis stability was recorded yet that could be compared; its maps are "
        f"left out"
        for run in runs
        if not len(run.series("stability").steps)
    ]
    notices += [
        f"{run.path}: --reference counts epochs, and this run {run.axis.label}: left out"
        for run in runs
        if reference and run.axis.label != "epoch"
    ]
    notices += [
        f"{run.path}: --reference has a window of 5 epochs, and this run compares with "
        f"{window_of(run)}"
        for run in runs
        if reference and run.axis.label == "epoch" and window_of(run) != "5 epochs before"
    ]
    return notices


def _of_one_axis(groups: Sequence[RunGroup]) -> tuple[list[RunGroup], list[str]]:
    """Leave out the analyses whose time is counted in something else than that of the other runs.

    A figure of all runs has one axis, and an epoch is no step and no number in a name. Runs of
    trainings are counted alike; without any, all are counted as the first analysis is.

    Returns:
        The groups, and a line for each analysis that is left out.
    """
    runs = [run for group in groups for run in group.runs]
    label = min(runs, key=lambda run: "analysis" in run.configuration).axis.label
    kept = [
        replace(group, runs=[run for run in group.runs if run.axis.label == label])
        for group in groups
    ]
    notices = [
        f"{run.path}: its axis is {run.axis.label!r}, that of the other runs {label!r}: it is not "
        f"in the figures of all runs together"
        for run in runs
        if run.axis.label != label
    ]
    return [group for group in kept if group.runs], notices


def _read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the runs among several folders; the others are told of, a line each.

    Raises:
        UserError: none of them is a run that has begun, or one is given twice.
    """
    runs: dict[Path, Run] = {}
    skipped = []
    for path in paths:
        try:
            run = read_run(path)
            if run.is_empty:
                raise UserError(
                    f"{run.metrics}: nothing is recorded yet; try again when the run has begun"
                )
        except UserError as error:
            skipped.append(str(error))
            continue
        except OSError as error:  # another user's, for one
            skipped.append(refused_path(error) or f"{path}: cannot be read ({one_line(error)})")
            continue
        if run.metrics.resolve() in runs:
            raise UserError(f"{path}: given twice")
        runs[run.metrics.resolve()] = run
    if not runs:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(skipped[0] + more)
    found = list(runs.values())
    # Before its first evaluation a run cannot tell epochs; beside it nobody is drawn by them.
    labels = {run.axis.label for run in found if "analysis" not in run.configuration}
    skipped = [f"skipped: {problem}" for problem in skipped]
    return [replace(run, by_steps=len(labels) > 1) for run in found], skipped


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """Of the colours, common to all runs of a page, or to those whose time is counted alike."""

    stability: float
    mixing: float
    times: Mapping[str, tuple[float, float]]
    """By what is counted."""

    @classmethod
    def common(cls, runs: Sequence[Run]) -> "_Scales":
        """Return those that take in what was measured of all runs."""
        times: dict[str, tuple[float, float]] = {}
        for run in runs:
            first, last = run.span()
            others = times.get(run.axis.label, (first, last))
            times[run.axis.label] = min(first, others[0]), max(last, others[1])
        return cls(
            stability=floor(runs, "stability"),
            mixing=floor(runs, "mixing_similarity"),
            times=times,
        )


def _draw_run(
    run: Run,
    number: int | None,
    layers: Sequence[str],
    reference: ReferenceCurve | None,
    scales: _Scales,
) -> list[Drawing]:
    """Draw what belongs to one run alone; its number tells its files from those of others."""

    def name(kind: str) -> str:
        return kind if number is None else f"{kind}-{number}-{run.name}"

    chosen = choose_layers(run, layers, count=_SPECTRA)
    found = [
        stability_map(run, name("stability"), scales.stability, reference),
        mixing_map(run, name("mixing"), scales.mixing),
        rank_map(run, name("rank")),
        spectra(run, chosen, name("spectra"), scales.times[run.axis.label]),
        other_measures(run, name("measures")),
    ]
    return [drawing for drawing in found if drawing]

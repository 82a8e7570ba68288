"""What the cells of a study say: means, differences to the baseline, sizes, times, fronts."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.config.settings import Configuration
from app.errors import UserError
from benchmarks.study.cell import (
    FINGERPRINT_STEPS,
    IDLE,
    Cell,
    Code,
    agrees,
    diverged,
    read_record,
)
from benchmarks.study.plan import Plan, Waiting


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method with one network."""

    method: str
    figures: dict[int, float] = field(default_factory=dict)
    """On the test part, by seed: accuracy in percent, or mean squared error."""
    differences: list[float] = field(default_factory=list)
    """To the baseline's, seed by seed."""
    trained: float = math.nan
    """Parameters, in percent of the baseline's; the mean over the seeds."""
    stored: float = math.nan
    stored_parameters: float = math.nan
    stored_bytes: float = math.nan
    time: float | None = None
    """CPU seconds over the baseline's, each alone on the machine; None: not measured."""
    factor: float = math.nan
    """Of the configuration's learning rate."""
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN without any."""
        return statistics.fmean(self.figures.values()) if self.figures else math.nan


@dataclass(frozen=True, kw_only=True)
class Table:
    """All methods with one network."""

    network: str
    figure: str
    """What is told of the test part: "accuracy" or "mse"."""
    rows: list[Row]
    notes: list[str]
    """On the whole: commits, and cells that do not stand in it."""

    @property
    def better(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.figure == "accuracy" else -1


def interval(differences: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a mean (Student's t); or NaN.

    Args:
        differences: independent ones, of pairs with the same seed.
    """
    from scipy import stats

    count = len(differences)
    if count < 2:
        return math.nan
    quantile = float(stats.t.ppf(0.975, count - 1))
    return quantile * statistics.stdev(differences) / math.sqrt(count)


def front(points: Iterable[tuple[float, float]], *, better: int = 1) -> list[tuple[float, float]]:
    """Return the points that none beats: with no larger cost and no worse a figure.

    Args:
        points: (cost, figure).
        better: 1 where more of the figure is better, -1 where less is.

    Returns:
        The points of the front, by cost.
    """
    kept: list[tuple[float, float]] = []
    for cost, figure in sorted(set(points), key=lambda point: (point[0], -better * point[1])):
        if not kept or better * figure > better * kept[-1][1]:
            kept.append((cost, figure))
    return kept


def tabulate(plan: Plan, network: str, code: Code) -> Table:
    """Read the cells of a network.

    Cells of another code stand in the table if one of their method has been found to take the same
    first steps with the present one; otherwise they are left out, and a note says so.
    """
    methods = plan.study.methods_for(network)
    read = {method: _read(plan, network, method, code) for method in methods}
    baseline = read[plan.study.baseline]
    rows, notes, commits = [], [], set()
    accuracy = True
    for method, (summaries, factor, remarks, left_out) in read.items():
        accuracy = accuracy and all("test_accuracy" in each for each in summaries.values())
        figures = {seed: _figure(each) for seed, each in summaries.items()}
        commits |= {each["cell"]["commit"] for each in summaries.values()}
        for commit, count in left_out.items():
            notes.append(
                f"{count} of {method} left out: made at commit {commit}, and it is not known that "
                f"the present code takes the same first {FINGERPRINT_STEPS} steps, or known that "
                "it does not"
            )
        whole = [each["stored_parameters"] for each in baseline[0].values()]
        rows.append(
            Row(
                method=method,
                figures=figures,
                differences=[
                    figure - _figure(baseline[0][seed])
                    for seed, figure in figures.items()
                    if seed in baseline[0]
                ],
                trained=_percent(summaries, "trained_parameters", whole),
                stored=_percent(summaries, "stored_parameters", whole),
                stored_parameters=_mean(each["stored_parameters"] for each in summaries.values()),
                stored_bytes=_mean(each["stored_bytes"] for each in summaries.values()),
                time=plan.time_ratio(network, method),
                factor=factor,
                notes=remarks,
            )
        )
    if len(commits) > 1:
        notes.insert(
            0,
            f"made at commits {', '.join(sorted(commits))}, which take the same first "
            f"{FINGERPRINT_STEPS} steps",
        )
    elif commits:
        notes.insert(0, f"made at commit {commits.pop()}")
    alone = {
        method: read_record(place)
        for method in methods
        if (place := plan.alone(network, method)) is not None
    }
    loads = [record.get("load", 0.0) for record in alone.values()]
    timed = {record["commit"] for record in alone.values()}
    if len(timed) > 1:
        pairs = ", ".join(f"{method} {record['commit']}" for method, record in alone.items())
        notes.append(f"CPU times are of several commits: {pairs}")
    if max(loads, default=0.0) > IDLE:
        notes.append(f"CPU times are of runs beside other work ({max(loads):.1f} cores of it)")
    return Table(network=network, figure="accuracy" if accuracy else "mse", rows=rows, notes=notes)


def markdown(table: Table, baseline: str) -> list[str]:
    """Return a table's lines."""
    unit = "accuracy, %" if table.figure == "accuracy" else "MSE"
    lines = [
        f"### {table.network}",
        "",
        f"| training | test {unit} | to {baseline} | trained | stored | stored bytes | CPU time "
        "| rate x |",
        "| --- " * 8 + "|",
    ]
    for row in table.rows:
        cells = [
            _spread(row, table),
            _difference(row, table) if row.method != baseline else "",
            _number(row.trained, ".1f", " %"),
            _number(row.stored, ".1f", " %"),
            _number(row.stored_bytes, ",.0f"),
            _number(math.nan if row.time is None else row.time, ".2f"),
            _number(row.factor, "g"),
        ]
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    remarks = [f"{row.method}: {note}" for row in table.rows for note in row.notes]
    return [*lines, "", *(f"- {note}" for note in [*table.notes, *remarks]), ""]


def put_into(document: Path, study: str, text: str) -> None:
    """Put the tables of a study into a document, in place of those that stand there.

    Args:
        document: of which a line ``<!-- study NAME -->`` is before the tables, and ``<!-- end -->``
            after them.
        study: its name.
        text: the tables.

    Raises:
        UserError: there is no such place in it.
    """
    before, after = parts_around(document, study)
    document.write_text(f"{before}\n{text.strip()}\n\n{after}")


def parts_around(document: Path, study: str) -> tuple[str, str]:
    """Return what is before the tables of a study in a document, and after them, lines included.

    Raises:
        UserError: there is no such place in it.
    """
    begin, end = f"<!-- study {study} -->\n", "<!-- end -->\n"
    before, found, rest = document.read_text().partition(begin)
    _, ends, after = rest.partition(end)
    if not found or not ends:
        raise UserError(f"--into {document}: it has no line {begin.strip()}, then {end.strip()}")
    return f"{before}{begin}", f"{end}{after}"


def as_dict(table: Table) -> dict[str, Any]:
    """Return a table for JSON, with fronts over stored size and over time."""
    done = [row for row in table.rows if row.figures]
    timed = [row for row in done if row.time is not None]
    sizes = front([(row.stored, row.mean) for row in done], better=table.better)
    times = front([(row.time or 0.0, row.mean) for row in timed], better=table.better)
    return {
        "figure": table.figure,
        "notes": table.notes,
        "rows": [
            {
                **{key: value for key, value in vars(row).items() if not _is_nan(value)},
                **({"mean": row.mean} if row.figures else {}),
                "front_of_size": (row.stored, row.mean) in sizes,
                "front_of_time": row.time is not None and (row.time, row.mean) in times,
            }
            for row in table.rows
        ],
    }


def _read(
    plan: Plan, network: str, method: str, code: Code
) -> tuple[dict[int, dict[str, Any]], float, list[str], dict[str, int]]:
    """Return summaries by seed, the learning rate's factor, notes, and what was left out."""
    try:
        factor = plan.chosen(network, method)
    except Waiting as waiting:
        return {}, math.nan, [f"waiting for {waiting}"], {}
    found: dict[int, dict[str, Any]] = {}
    notes: dict[str, list[int]] = {}
    for seed in plan.study.seeds_of(network):
        try:
            cell = plan.cell(network, method, seed, factor)
        except Waiting as waiting:
            notes.setdefault(f"waiting for {waiting}", []).append(seed)
            continue
        if cell.method != method:
            notes.setdefault(f"the same training as {cell.method}", []).append(seed)
        summary = cell.summary()
        if summary is None:
            notes.setdefault(_why_not(cell, code), []).append(seed)
        elif form := _other_form(summary, cell.settings):
            remark = f"the tested weights, of step {summary['tested_step']}, are {form}"
            notes.setdefault(remark, []).append(seed)
        else:
            found[seed] = summary
    # One cell tells of all of its code, unless another one tells otherwise.
    tried = [each["cell"] for each in found.values() if code.digest in each["cell"]["fingerprints"]]
    known = {cell.get("digest") for cell in tried if agrees(cell, code)}
    known -= {cell.get("digest") for cell in tried if not agrees(cell, code)}
    left_out: dict[str, int] = {}
    for seed, summary in list(found.items()):
        if summary["cell"].get("digest") not in known:
            commit = summary["cell"].get("commit", "unknown")
            left_out[commit] = left_out.get(commit, 0) + 1
            del found[seed]
    remarks = [f"{note} (seeds {', '.join(map(str, seeds))})" for note, seeds in notes.items()]
    return found, factor, remarks, left_out


def _other_form(summary: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Say what tested weights are if not what the training was to make of them; None if so."""
    ranks = summary["tested_ranks"].values()
    configuration = Configuration.model_validate(settings)
    # Shares are of the steps that the run was to have: early stopping may have ended it before.
    steps = summary["steps"] // summary["epochs"] * configuration.training.epochs
    release = configuration.oialr.step_of("release", steps)
    if ranks and all(rank is None for rank in ranks):
        return "full-rank"
    if ranks and release is not None and summary["tested_step"] <= release:
        return "those of before the release"
    return None


def _why_not(cell: Cell, code: Code) -> str:
    if reason := diverged(cell, code):
        return reason
    return "begun, not finished" if (cell.place / "cell.json").exists() else "not run yet"


def _figure(summary: dict[str, Any]) -> float:
    if "test_accuracy" in summary:
        return 100 * float(summary["test_accuracy"])
    return float(summary["test_mse"])


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def _percent(summaries: dict[int, dict[str, Any]], key: str, whole: Sequence[float]) -> float:
    if not whole:
        return math.nan
    return 100 * _mean(each[key] for each in summaries.values()) / whole[0]


def _spread(row: Row, table: Table) -> str:
    digits = ".2f" if table.figure == "accuracy" else ".4f"
    values = list(row.figures.values())
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
    return f"{row.mean:{digits}}{deviation} ({len(values)})"


def _difference(row: Row, table: Table) -> str:
    digits = "+.2f" if table.figure == "accuracy" else "+.4f"
    if not row.differences:
        return ""
    half = interval(row.differences)
    around = "" if math.isnan(half) else f" ± {half:{digits[1:]}}"
    return f"{statistics.fmean(row.differences):{digits}}{around}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _number(value: float, digits: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{digits}}{unit}"

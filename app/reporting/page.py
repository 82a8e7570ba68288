"""The page: one HTML file that needs nothing else, for screens, phones and paper."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.reporting.comparison import FinalFigures, RunGroup
from app.reporting.drawing import Drawing, to_svg
from app.reporting.events import EventTable, event_table
from app.reporting.runs import Run


@dataclass(frozen=True, kw_only=True)
class _RunSection:
    """What the page says of one run."""

    name: str
    configuration: str
    state: str
    started: str
    processes: str
    versions: str
    yaml: str
    drawings: Sequence[Drawing]
    events: EventTable | None


def render_page(
    *,
    title: str,
    groups: Sequence[RunGroup],
    table: FinalFigures,
    together: Sequence[Drawing],
    drawings: Mapping[Path, Sequence[Drawing]],
    notices: Sequence[str],
) -> str:
    """Return the HTML document.

    Args:
        title: heading.
        groups: all runs, by configuration.
        table: the final figures.
        together: drawings of all runs.
        drawings: those of each run, by its file.
        notices: what the reader should know first.
    """
    sections = [
        _section(run, group, drawings[run.metrics]) for group in groups for run in group.runs
    ]
    shown = [*together, *(drawing for section in sections for drawing in section.drawings)]
    return _render(
        "page.html",
        title=title,
        groups=groups,
        table=table,
        together=together,
        runs=sections,
        notices=notices,
        images={drawing.name: _as_address(drawing) for drawing in shown},
    )


def render_search(
    *,
    title: str,
    statuses: Sequence[tuple[str, int]],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    command: str,
    drawings: Sequence[Drawing],
    notices: Sequence[str],
) -> str:
    """Return the HTML document of a search.

    Args:
        title: heading.
        statuses: what became of how many evaluations.
        columns: headings of the table of evaluations.
        rows: the best evaluations, the best first.
        command: that trains one of them again.
        drawings: in order.
        notices: what the reader should know first.
    """
    return _render(
        "search.html",
        title=title,
        statuses=statuses,
        columns=columns,
        rows=rows,
        command=command,
        drawings=drawings,
        notices=notices,
        images={drawing.name: _as_address(drawing) for drawing in drawings},
    )


def write_page(folder: Path, page: str) -> Path:
    """Write an HTML document into the folder of a report, and return its path.

    Raises:
        UserError: it cannot be written.
    """
    target = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Names of folders may hold bytes that are no text.
        target.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output: cannot write {target}: {error.strerror}") from None
    return target


def _render(template: str, **content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now(UTC).isoformat(timespec="minutes")
    return environment.get_template(template).render(made=made, **content)


def _section(run: Run, group: RunGroup, drawings: Sequence[Drawing]) -> _RunSection:
    last = {column: str(values[-1]) for column, values in run.sessions.items() if len(values)}
    count = last.get("process_count", "")
    return _RunSection(
        name=run.name,
        configuration=group.label,
        state=run.state(),
        started=last.get("started", ""),
        processes=f"{count} process" + ("es" if count != "1" else ""),
        versions=last.get("versions", ""),
        yaml=run.yaml,
        drawings=drawings,
        events=event_table(run),
    )


def _as_address(drawing: Drawing) -> str:
    """The drawing itself as the address of an image: names inside one SVG meet no other's."""
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(drawing)).decode()

"""Draw what runs have recorded: figures and one self-contained HTML page."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from app.command import Parser, run_command
from app.errors import UserError
from app.reporting.drawing import FORMATS
from app.reporting.reference import REFERENCE_CURVES
from app.runtime.latest import led_to
from app.runtime.streams import printing, show

LONGEST_INTERVAL = 86_400
"""Seconds between two looks with --follow."""
EXAMPLES = """\
examples:
  python -m app.report runs/digits_vit-20261124-115810
  python -m app.report runs/oialr-0 runs/oialr-1 runs/full-rank-0 --output comparison
  python -m app.report runs/vit --reference vit_b16 --layers 'blocks.*.attn.qkv.weight'
  python -m app.report runs/vit --follow
  python -m app.report runs/search

RUN is the folder of a run, of an analysis (python -m app.analyze) or, alone, of a search
(python -m app.search), finished or not. Of several, those that are none of these are named and
skipped, so that runs/* may be given. Runs whose configurations differ in seed, folder and name
alone are averaged in the table.

exit codes: 0 done, 1 a fault, 2 a mistake in what was asked for.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, report, return the exit code."""
    parser = Parser(
        prog="python -m app.report",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="folder of the report (RUN/report for one run, ./report for several)",
    )
    parser.add_argument(
        "--formats",
        metavar="LIST",
        default="png,pdf",
        help=f"formats of the figures' files, of {', '.join(FORMATS)} (png,pdf)",
    )
    parser.add_argument(
        "--layers",
        metavar="PATTERN",
        action="append",
        default=[],
        help="draw the spectra of layers that match, such as 'blocks.0.*', at most six of them at "
        "even distances (all); repeatable",
    )
    parser.add_argument(
        "--reference",
        choices=REFERENCE_CURVES,
        help="draw the paper's mean stability (arXiv 2401.08505) beside the run's own",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="show a running job, or one about to begin, in the terminal until it ends or Ctrl-C",
    )
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=float,
        default=2.0,
        help="seconds between two looks with --follow (2)",
    )
    options = parser.parse_args(arguments)
    options.runs = _distinct(options.runs)
    return _follow(options) if options.follow else _write(options)


def _write(options: argparse.Namespace) -> int:
    formats = [part for part in options.formats.split(",") if part]
    for part in formats:
        if part not in FORMATS:
            raise UserError(f"--formats: {part!r} is not one of {', '.join(FORMATS)}")
    if len(options.runs) == 1 and _is_search(options.runs[0]):
        from app.search.report import write_search_report

        written = write_search_report(options.runs[0], output=options.output, formats=formats)
    else:
        from app.reporting.report import write_report

        written = write_report(
            options.runs,
            output=options.output,
            formats=formats,
            layers=options.layers,
            reference=options.reference,
        )
    for notice in written.notices:
        show(f"note: {notice}", error=True)
    show(f"{written.page} and {len(written.figures)} files in {written.page.parent / 'figures'}")
    return 0


def _distinct(paths: Sequence[Path]) -> list[Path]:
    """Return where the paths lead to, without links to what is there itself: runs/* has both."""
    others = {os.path.realpath(path) for path in paths if not os.path.islink(path)}
    return [led_to(p) for p in paths if not (os.path.islink(p) and os.path.realpath(p) in others)]


def _is_search(folder: Path) -> bool:
    return (folder / "search.yaml").exists()


def _follow(options: argparse.Namespace) -> int:
    if len(options.runs) != 1:
        raise UserError(f"--follow: shows one run, {len(options.runs)} were given")
    if not 0 < options.interval <= LONGEST_INTERVAL:
        raise UserError(
            f"--interval: {options.interval} is not a positive number of seconds, "
            f"{LONGEST_INTERVAL} at most"
        )
    if _is_search(options.runs[0]):
        from app.search.follow import follow_search

        with printing():
            follow_search(options.runs[0], interval=options.interval)
        return 0
    from app.reporting.follow import follow

    with printing():
        follow(options.runs[0], interval=options.interval)
    return 0


if __name__ == "__main__":
    run_command(main)

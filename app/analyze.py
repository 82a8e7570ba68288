"""Measure basis stability on checkpoints of any PyTorch model, without training."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.command import EXIT_USER, Parser, describe_fault, run_command
from app.errors import AgreedStorageError, AgreedUserError, UserError, refusing_paths
from app.runtime.launch import read_launch
from app.runtime.streams import put, show

if TYPE_CHECKING:
    from app.analysis.run import Analysis

_NAMED = 5
"""Files that are passed over, and tensors that are left out, and named."""
EXAMPLES = """\
examples:
  python -m app.analyze checkpoints/
  python -m app.analyze epoch-*.pt --window 1 --output analysis
  mpirun -n 8 python -m app.analyze /data/gpt2 --exclude '*.attn.bias' --not-averaged '*wte*'
  python -m app.analyze llama/checkpoint-* --include 'model.layers.*' --dry-run
  python -m app.report checkpoints/analysis

CHECKPOINT is a file or a folder of files: of torch.save (a state_dict, alone or under state_dict or
model), of safetensors, or of this program; shards are one checkpoint: those that an index.json
names, or else those of names such as model-00001-of-00002. They are sorted by the epoch or step
that they hold, or else by name, 2 before 10, and the last line says which; copies, such as the last
or the best once more, and averages (ema, swa) are passed over. Checkpoints of several trainings, or
of two networks that are trained together, are refused. All floating tensors of two or more
dimensions are measured; those whose names are those of embeddings, tokens, positions, masks or
scales are not averaged.

An analysis that was killed or interrupted goes on where it was when the same command is given
again.

exit codes: 0 done; 2 a mistake in what was asked for, or some files were skipped, each named on
stderr, and the others measured; 1 a fault.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, analyze, return the exit code."""
    parser = Parser(
        prog="python -m app.analyze",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", type=Path, help="file or folder of files"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="folder of metrics.h5 (FOLDER/analysis for one folder, otherwise ./analysis)",
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=int,
        default=5,
        help="compare with the checkpoint N before, at their most common distance (5)",
    )
    for option, what in (
        ("--include", "measure only weights that match (*); repeatable"),
        ("--exclude", "do not measure weights that match; repeatable"),
        ("--not-averaged", "measure weights that match, but leave them out of means; repeatable, "
         "instead of the names of embeddings, tokens, positions, masks and scales"),
    ):  # fmt: skip
        parser.add_argument(option, metavar="PATTERN", action="append", help=what)
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU for each process if there are enough, otherwise CPUs",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would be measured, how long it takes and in how much memory",
    )
    options = parser.parse_args(arguments)
    if options.window < 1:
        raise UserError(f"--window: {options.window} is not a positive number of checkpoints")
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Start the processes, analyze, and end all of them alike."""
    from app.analysis.run import analyze
    from app.analysis.selection import NOT_AVERAGED
    from app.runtime.processes import start_runtime

    with start_runtime(device=options.device) as runtime:
        try:
            with refusing_paths():
                result = analyze(
                    options.checkpoints,
                    output=options.output,
                    window=options.window,
                    include=options.include or ["*"],
                    exclude=options.exclude or [],
                    not_averaged=options.not_averaged or NOT_AVERAGED,
                    runtime=runtime,
                    dry_run=options.dry_run,
                )
        except AgreedUserError:
            raise
        except AgreedStorageError as error:
            if runtime.is_first:
                show(f"error: {error}", error=True)
            return 1
        except BaseException as error:
            if runtime.process_count == 1:
                if isinstance(error, KeyboardInterrupt):
                    show("interrupted: the same command goes on", error=True)
                raise
            if isinstance(error, UserError):  # of this process alone: nobody else would report it
                show(f"error: {error}", error=True)
                runtime.abort(EXIT_USER)
            show(describe_fault(error), error=True)
            runtime.abort(1)
            raise
    if read_launch().process_index == 0:
        for problem in result.problems:
            show(f"skipped: {problem}", error=True)
        for note in _notes(result, options.window):
            show(note, error=True)
        what = f"{result.checkpoints} checkpoints, {result.layers} weights, {result.ordered}"
        if result.estimate:
            put(f"dry run, nothing is measured: {what}, {result.estimate}")
        else:
            metrics = result.metrics
            drawn = shlex.quote(str(metrics.parent))
            show(f"{metrics}: {what}; draw them: python -m app.report {drawn}")
    return EXIT_USER if result.problems else 0


def _notes(result: "Analysis", window: int) -> list[str]:
    """Return what the user should know, a line each."""
    notes = []
    passed_over = [f"{entry.path} ({entry.reason})" for entry in result.passed_over]
    for what, entries in (
        ("passed over", passed_over),
        ("left out, since they hold integers", result.integers),
    ):
        more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
        if entries:
            notes.append(f"{what}: {', '.join(entries[:_NAMED])}{more}")
    if result.by_count:
        notes.append(
            f"the checkpoints are at no common distance in time: each is compared with the one "
            f"that is {window} before in their order"
        )
    return notes


if __name__ == "__main__":
    run_command(main)

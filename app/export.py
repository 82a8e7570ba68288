"""Write the trained network of a run to a file that others read, and compare it before."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from app.command import Parser, how_to_evaluate, run_command
from app.errors import UserError
from app.runtime.streams import show
from oialr.export import SUFFIXES

SAMPLES = 16
EXAMPLES = """\
examples:
  python -m app.export runs/digits_vit-TIME
  python -m app.export runs/digits_vit-TIME --format onnx --output digits.onnx
  python -m app.export runs/imagenet --format factors data.root=/data

formats:
  dense         a state_dict of the full-rank network, under its own parameter names (torch.save)
  factors       two factors for each low-rank weight (safetensors), for oialr.load
  onnx          for batches of any size
  torch-export  a program of torch.export, for batches of any size

The weights are those that the run tests: with early stopping the best ones, with an average that.
The file is compared with the network on samples of the validation part, and appears when it agrees;
differences, bytes and times are printed. What goes in and what comes out stands in FILE.json beside
it: shapes, preprocessing, names of classes.

exit codes: 0 done, 1 the network cannot be written so, 2 a mistake in what was asked for.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, export, return the exit code."""
    parser = Parser(
        prog="python -m app.export",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--format", choices=SUFFIXES, default="dense", help="(dense)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="(RUN/exported/FORMAT with its suffix); of onnx it ends in .onnx, of torch-export in "
        ".pt2",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=SAMPLES,
        help=f"of the validation part, on which outputs and times are compared ({SAMPLES})",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples} is not a positive number of samples")
    if not options.run.is_dir():
        raise UserError(f"{options.run} is no folder of a run")
    return _export(options)


def _export(options: argparse.Namespace) -> int:
    """Read the run, write the file, tell of it."""
    from app.errors import StorageError
    from app.runtime.processes import start_runtime
    from app.training.description import describe
    from app.training.trained import read_configuration, samples_of, trained
    from oialr.errors import ExportError
    from oialr.export.files import EXPORTERS
    from oialr.export.formats import check_name

    configuration = read_configuration(options.run, options.overrides)
    output = options.output or options.run / "exported" / (
        options.format + SUFFIXES[options.format]
    )
    check_name(options.format, output)
    with start_runtime(device="cpu") as runtime:
        if runtime.process_count > 1:
            raise UserError("app.export runs as one process: leave mpirun out")
        with trained(configuration, runtime) as (parts, step):
            samples = samples_of(parts, options.samples)
            show(f"{options.run}: weights after step {step}, {len(samples)} samples to compare")
            try:
                result = EXPORTERS[options.format](parts.model, output, samples)
            except ExportError as error:
                show(f"error: {error}", error=True)
                return 1
            except OSError as error:
                raise StorageError(f"cannot write {output}: {error.strerror}") from error
            describe(output, parts, step)
    show(f"{result}\n{how_to_evaluate(output, options.run if options.output else None)}")
    return 0


if __name__ == "__main__":
    run_command(main)

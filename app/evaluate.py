"""Evaluate the trained network of a run, or a file exported from it, on a part of the data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from app.command import Parser, ending_all, run_command
from app.errors import UserError
from app.runtime.launch import read_launch
from app.runtime.streams import put

EXAMPLES = """\
examples:
  python -m app.evaluate runs/digits_vit-TIME
  python -m app.evaluate runs/digits_vit-TIME/exported/onnx.onnx --part validation
  python -m app.evaluate model.pt --run configs/digits_vit.yaml data.root=/data
  mpirun -n 8 python -m app.evaluate runs/imagenet

FILE is of one of the formats of app.export; a state_dict of the full-rank network, by whomever it
was written, is one too. The run tells the data and the network: that whose folder the file lies in,
or --run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, return the exit code."""
    parser = Parser(
        prog="python -m app.evaluate",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "what", metavar="RUN|FILE", type=Path, help="folder of a run, or an exported file"
    )
    parser.add_argument(
        "--part", choices=("test", "validation"), default="test", help="of the data (test)"
    )
    parser.add_argument(
        "--run", metavar="RUN|CONFIG", type=Path, help="of a file: a run's folder or a YAML file"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if not options.what.exists():
        raise UserError(f"{options.what}: there is no such folder or file")
    if options.run and options.what.is_dir():
        raise UserError(f"--run is for a file, and {options.what} is a folder")
    return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    """Start the processes, evaluate, print."""
    from app.runtime.processes import start_runtime
    from app.training.trained import (
        PROGRAMS,
        evaluate_file,
        evaluate_run,
        read_configuration,
        run_of,
    )

    what, part = options.what, options.part
    is_run = what.is_dir()
    configuration = read_configuration(
        what if is_run else options.run or run_of(what), options.overrides
    )
    device = "cpu" if what.suffix in PROGRAMS else options.device
    with start_runtime(device=device) as runtime, ending_all(runtime):
        if is_run:
            figures, step = evaluate_run(configuration, runtime, part)
        else:
            figures, step = evaluate_file(what, configuration, runtime, part), None
    if read_launch().process_index == 0:
        lines = [f"{what}: weights after step {step}" if is_run else str(what)]
        lines += [f"{part}_{name}: {value:.4f}" for name, value in figures.items()]
        put("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_command(main)

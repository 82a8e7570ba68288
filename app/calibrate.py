"""Measure what factorizations cost on this machine, for the plan of who factorizes what."""

import os
from collections.abc import Sequence
from pathlib import Path

from app.command import Parser, ending_all, run_command
from app.errors import UserError
from app.runtime.launch import read_launch
from app.runtime.streams import show

EXAMPLES = """\
examples:
  python -m app.calibrate --output calibration.json
  mpirun -n 2 python -m app.calibrate --output calibration.json    # splitting by Heat too
  mpirun -n 8 python -m app.train distributed.calibration=calibration.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write, return the exit code."""
    parser = Parser(
        prog="python -m app.calibrate",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--output", metavar="PATH", default="calibration.json")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="small matrices only")
    options = parser.parse_args(arguments)

    from dataclasses import fields

    from app.runtime.calibration import measure_costs, write_costs
    from app.runtime.processes import start_runtime

    def check_output() -> None:
        path = Path(options.output).absolute()
        if not path.parent.is_dir():
            raise UserError(f"--output: there is no folder for {options.output}")
        if path.is_dir():
            raise UserError(f"--output: {options.output} is a folder; name a file in it")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"--output: {options.output} cannot be written by this user")

    with start_runtime(device=options.device) as runtime, ending_all(runtime):
        runtime.processes.agree(lambda: check_output() if runtime.is_first else None)
        costs = measure_costs(runtime.processes, runtime.device, quick=options.quick)
        runtime.processes.agree(
            lambda: write_costs(costs, options.output) if runtime.is_first else None
        )
    if read_launch().process_index == 0:
        for field in fields(costs):
            show(f"{field.name} {getattr(costs, field.name):.3e} {field.metadata['unit']}")
    return 0


if __name__ == "__main__":
    run_command(main)

"""Search for hyperparameters with many trainings side by side, under mpirun or srun."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from app import config
from app.command import (
    EXIT_STOPPED,
    EXIT_USER,
    LOG_FORMAT,
    Parser,
    describe_fault,
    how_to_draw,
    how_to_go_on,
    run_command,
    summary_lines,
)
from app.config.yaml_text import dump_value
from app.errors import (
    AgreedStorageError,
    AgreedUserError,
    StorageError,
    UserError,
    refusing_paths,
)
from app.runtime.latest import led_to, point_to
from app.runtime.launch import read_launch
from app.runtime.streams import show
from app.search import objective
from app.search.definition import STORED, Definition, load

EXAMPLES = """\
examples:
  mpirun -n 8 python -m app.search --config configs/search/digits.yaml
  mpirun -n 8 python -m app.search --config configs/search/digits.yaml search.evaluations=4
  srun --mpi=pmi2 -n 64 python -m app.search --config configs/search/cifar10_vit.yaml run.dir=DIR
  mpirun -n 4 python -m app.search --resume DIR search.evaluations=80
  python -m app.train --config DIR/best.yaml

A search configuration extends another one and names a space:

  extends: ../paper/digits_vit.yaml       # relative to this file
  space:
    oialr.cutoff: [0.01, 0.9]             # a range; integers where the key wants them
    training.learning_rate: {range: [1.0e-4, 1.0e-2], scale: log}
    training.minimum_learning_rate: {range: [1.0e-6, 1.0e-3], scale: log,
                                     at_most: training.learning_rate}
    training.gradient_clip: {choices: [null, 1.0, 10.0]}
  search:                                 # python -m app.train --keys lists all
    evaluations: 40
    processes_per_worker: 2

exit codes: 0 done, 1 a fault or no result, 2 a mistake in what was asked for, 75 stopped by
SIGTERM, SIGUSR1 or Ctrl-C: go on with --resume, with as many workers as you like. A second Ctrl-C
ends at once.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, search, return the exit code."""
    start = time.perf_counter()
    parser = Parser(
        prog="python -m app.search",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--config", metavar="PATH", help="YAML file of a search")
    parser.add_argument("--resume", metavar="DIR", help="go on with the search in this folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    definition = _read_definition(options)
    return _run(definition, resume=options.resume is not None, start=start)


def _read_definition(options: argparse.Namespace) -> Definition:
    """Resolve the definition; a resumed search's own one."""
    if options.resume is None and options.config is None:
        raise UserError("--config: name a search, such as configs/search/digits.yaml")
    resumed = options.resume is not None
    definition = _read_stored(options) if resumed else load(options.config, options.overrides)
    if definition.base.run.stop_after is not None:
        raise UserError(
            "run.stop_after: would stop every evaluation of a search, which then is without a "
            "result; leave it out"
        )
    return definition


def _read_stored(options: argparse.Namespace) -> Definition:
    """Resolve the definition of a search that goes on, and let its losses mean what they did."""
    if options.config is not None:
        raise UserError("--config: a search that is resumed has its own; leave it out")
    for override in options.overrides:
        key, value = config.parse_override(override)
        if not key.startswith("search."):
            raise UserError(f"{key}: only search.* can change when a search is resumed")
        if key == "search.generations" and value is not None:
            raise UserError(
                f"{key}: the first start of a search has made evaluations of them; set "
                "search.evaluations"
            )
    options.resume = str(led_to(Path(options.resume)))
    stored = Path(options.resume) / STORED
    if not stored.exists():
        raise UserError(f"--resume: {options.resume} holds no search (no {STORED} there)")
    definition = load(stored, options.overrides, folder=options.resume)
    before, now = load(stored).base.search, definition.base.search
    for name in objective.KEYS:
        if (was := getattr(before, name)) != getattr(now, name):
            raise UserError(
                f"search.{name}: cannot change when a search is resumed, whose losses were "
                f"judged by {dump_value(was)}; leave it out, or begin a new search"
            )
    return definition


def _run(definition: Definition, *, resume: bool, start: float) -> int:
    """Start the workers, search, and end all processes alike."""
    from app.runtime.stop_signal import StopSignal

    folders: list[Path] = []
    with StopSignal() as stop_signal:
        from app.runtime.workers import start_workers
        from app.search.conclusion import Interrupted, NoResult
        from app.search.session import search

        base = definition.base
        workers = start_workers(
            processes_per_worker=base.search.processes_per_worker, device=base.distributed.device
        )
        logging.basicConfig(level=logging.ERROR, format=LOG_FORMAT)

        def begin(folder: Path) -> None:
            folders.append(folder)
            if workers.world.Get_rank() == 0:
                point_to(folder)

        try:
            with refusing_paths():
                summary = search(
                    definition,
                    workers,
                    stop_signal,
                    resume=resume,
                    start=start,
                    on_folder=begin,
                )
        except AgreedUserError:
            raise
        except (Interrupted, NoResult) as end:  # on all processes alike
            if workers.world.Get_rank() == 0:
                hint = f": {how_to_go_on(folders[0])}" if isinstance(end, Interrupted) else ""
                show(f"{end}{hint}\n{how_to_draw(folders[0])}", error=True)
            return EXIT_STOPPED if isinstance(end, Interrupted) else 1
        except (StorageError, UserError) as error:  # on this process, or on those of its worker
            if workers.is_first or not isinstance(error, AgreedStorageError):
                show("\n".join([f"error: {error}", *map(how_to_draw, folders)]), error=True)
            code = EXIT_USER if isinstance(error, UserError) else 1
            if workers.world.Get_size() > 1:
                workers.abort(code)
            return code
        except BaseException as error:
            if folders:
                error.add_note(how_to_draw(folders[0]))
            if workers.world.Get_size() == 1:
                raise
            show(describe_fault(error), error=True)
            workers.abort(1)
            raise
        finally:
            workers.close()
    if read_launch().process_index == 0:
        show("\n".join([*summary_lines(summary), how_to_draw(folders[0])]))
    return 0


if __name__ == "__main__":
    run_command(main)

"""Train a network full-rank or low-rank, alone or under mpirun, srun or torchrun."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from app import config
from app.command import (
    EXIT_USER,
    LOG_FORMAT,
    Parser,
    describe_fault,
    ending_all,
    how_to_draw,
    how_to_go_on,
    how_to_use,
    run_command,
    stop_code,
    summary_lines,
)
from app.config.settings import Configuration
from app.errors import (
    AgreedStorageError,
    AgreedUserError,
    DifferingReplicasError,
    DivergedError,
    StorageError,
    UserError,
    refusing_paths,
)
from app.runtime.latest import led_to
from app.runtime.launch import read_launch
from app.runtime.streams import put, show

EXAMPLES = """\
examples:
  python -m app.train
  mpirun -n 8 python -m app.train training.epochs=30 oialr.target_size=0.2
  mpirun -n 8 python -m app.train --config configs/fashion_mnist_vit.yaml data.root=/data
  python -m app.train oialr.enabled=false run.dir=runs/full-rank
  mpirun -n 8 python -m app.train --resume runs/full-rank

exit codes: 0 done, 1 a fault, 2 a mistake in what was asked for, 75 stopped by SIGTERM, SIGUSR1,
Ctrl-C, a closed terminal or run.stop_after with a checkpoint: go on with --resume. A second Ctrl-C
ends at once.
torchrun starts anew on any code but 0, so a stop has 0 there; unfinished.json in the folder tells.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, return the exit code."""
    parser = Parser(
        prog="python -m app.train",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--config", metavar="PATH", help="YAML file (configs/digits_vit.yaml)")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument(
        "--keys",
        action="store_true",
        help="list all keys with the values that this configuration gives them, their defaults, "
        "and what they mean",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration as YAML"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print for each layer how it is applied and what that costs; train nothing",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take a few steps, and tell parameters, memory, sizes and time; "
        "leave nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.dry_run and options.resume is not None:
        raise UserError("--dry-run: looks at a run that is to begin; leave out --resume")
    configuration = _read_configuration(options)
    if options.keys or options.print_config:
        if read_launch().process_index == 0:
            shown = config.describe_keys if options.keys else config.to_yaml
            put(shown(configuration).rstrip("\n"))
        return 0
    if options.explain or options.dry_run:
        return _look(configuration, options)
    resume = options.resume is not None
    stop_given = resume and "run.stop_after" in dict(map(config.parse_override, options.overrides))
    return _run(configuration, resume=resume, stop_given=stop_given)


def _read_configuration(options: argparse.Namespace) -> Configuration:
    """Resolve the configuration; a resumed run's own one unless --config names another."""
    path = options.config
    if options.resume is not None:
        options.resume = str(led_to(Path(options.resume)))
        stored = Path(options.resume) / "config.yaml"
        if not stored.exists():
            raise UserError(f"--resume: {options.resume} holds no run (no config.yaml there)")
        path = path or stored
    return config.load(path, options.overrides, folder=options.resume)


def _look(configuration: Configuration, options: argparse.Namespace) -> int:
    """Print what a run would be; nothing is trained or written."""
    from app.runtime.processes import start_runtime
    from app.runtime.watchdog import Watchdog
    from app.training.dry_run import dry_run
    from app.training.inspection import explain_run

    distributed = configuration.distributed
    with start_runtime(device=distributed.device, timeout=distributed.timeout) as runtime:
        logging.basicConfig(
            level=logging.INFO if runtime.is_first else logging.ERROR, format=LOG_FORMAT
        )
        watchdog = Watchdog(
            timeout=distributed.timeout,
            alone=runtime.process_count == 1,
            abort=runtime.abort,
            name=read_launch().name,
        )
        try:
            with ending_all(runtime), watchdog:
                if options.explain:
                    resume = options.resume is not None
                    text = explain_run(
                        configuration, runtime, resume=resume, tell=watchdog.progress
                    )
                else:
                    text = dry_run(configuration, runtime, tell=watchdog.progress)
        except DivergedError as error:  # on all processes alike
            if runtime.is_first:
                show(f"error: {error}", error=True)
            return 1
    if runtime.is_first:
        put(text)
    return 0


def _run(configuration: Configuration, *, resume: bool, stop_given: bool) -> int:
    """Start the processes, train, and end all of them alike."""
    from app.runtime.stop_signal import StopSignal

    with StopSignal() as stop_signal:
        from app.recording.log import Log
        from app.runtime.processes import start_runtime
        from app.training.early_stopping import ended_early
        from app.training.position import Stopped
        from app.training.run import train
        from app.training.trained import has_weights

        distributed = configuration.distributed
        with start_runtime(device=distributed.device, timeout=distributed.timeout) as runtime:
            log = Log(is_first=runtime.is_first)
            logging.basicConfig(
                level=logging.INFO if runtime.is_first else logging.ERROR,
                format=LOG_FORMAT,
                handlers=[log.handler()],
            )

            def tell(line: str) -> None:
                """Say how the run ended, and where it is if it has come so far."""
                log.warn(line)
                if log.folder:
                    log.warn(how_to_draw(log.folder))

            try:
                with refusing_paths():
                    outcome = train(
                        configuration,
                        runtime,
                        stop_signal,
                        resume=resume,
                        stop_given=stop_given,
                        log=log,
                    )
            except AgreedUserError as error:
                log.note(f"error: {error}")  # shown by run_command
                raise
            except UserError as error:  # on this process alone: nobody else would report it
                if runtime.process_count > 1:
                    log.warn(f"error: {error}")
                    runtime.abort(EXIT_USER)
                log.note(f"error: {error}")
                raise
            except Stopped as stop:
                if runtime.is_first:
                    assert log.folder
                    kept = has_weights(log.folder)
                    loss = "" if kept else ", from the first step again (run.keep_checkpoints=0)"
                    tell(f"{stop}: {how_to_go_on(log.folder)}{loss}")
                return stop_code()
            except (DivergedError, DifferingReplicasError, AgreedStorageError) as error:
                if runtime.is_first:  # on all processes alike
                    tell(f"error: {error}")
                return 1
            except StorageError as error:  # on this process alone
                log.warn(f"error: {error}")
                if runtime.process_count > 1:
                    runtime.abort(1)
                return 1
            except BaseException as error:
                if log.folder:
                    error.add_note(how_to_draw(log.folder))
                if runtime.process_count == 1:
                    log.note(describe_fault(error))  # shown by Python
                    raise
                log.warn(describe_fault(error))
                runtime.abort(1)
                raise
    for line in summary_lines(outcome.summary):
        log.say(line)
    if early := ended_early(outcome.summary, configuration.training):
        log.say(early)
    if outcome.finished_before:
        log.say(f"{outcome.folder} was finished before: nothing was trained now")
    if has_weights(outcome.folder):  # with run.keep_checkpoints=0 there is nothing to use
        log.say(how_to_use(outcome.folder))
    log.say(how_to_draw(outcome.folder))
    return 0


if __name__ == "__main__":
    run_command(main)

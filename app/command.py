"""What all front doors share: overrides in ``--help``, exit codes, errors from one process only."""

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import oialr
from app.errors import (
    AgreedStorageError,
    AgreedUserError,
    DifferingReplicasError,
    DivergedError,
    OutputError,
    StorageError,
    UserError,
    refused_path,
    refusing_paths,
)
from app.runtime.host_memory import keep_freed_memory
from app.runtime.launch import read_launch
from app.runtime.streams import flush, prepare, put, show
from app.runtime.versions import installed_versions
from oialr.export import SUFFIXES

if TYPE_CHECKING:
    from app.runtime.processes import Runtime

LOG_FORMAT = "%(levelname)s: %(message)s"
EXIT_USER = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL: stopped after a checkpoint, to be resumed. See :func:`stop_code`."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are those of any other mistake: one line, from one process."""

    def __init__(self, **options: Any) -> None:
        """Keep the lines of examples as they are, and give every front door ``--version``."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument(
            "--version", action=_Version, nargs=0, help="show the versions of program and packages"
        )

    def error(self, message: str) -> NoReturn:
        """Raise what the user did wrong.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with the home folder for the ~ of ``--option=~/path``."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_at_home(argument) for argument in given], namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help, as anything that was asked for."""
        put(message.rstrip("\n"))


def _at_home(argument: str) -> str:
    """Put the home folder for a ~ behind an option and =, which no shell does."""
    option, separator, path = argument.partition("=")
    is_path = option.startswith("--") and separator and path.startswith("~")
    return f"{option}={os.path.expanduser(path)}" if is_path else argument


class _Version(argparse.Action):
    """Prints the versions and ends; no package is imported for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        if read_launch().process_index == 0:
            put(f"OIALR {oialr.__version__}, {installed_versions()}")
        parser.exit()


def run_command(main: Callable[[], int]) -> None:
    """Run a front door and leave with its exit code.

    A user's mistake is one line on stderr, from process 0 only, and exit code 2 from all. It must
    be raised on all processes alike. A path that the system refuses is one, wherever it is met.
    """
    prepare()
    keep_freed_memory()
    try:
        code = main()
    except UserError as error:
        code = _tell_mistake(str(error))
    except StorageError as error:
        show(f"error: {error}", error=True)
        code = 1
    except OutputError as error:
        code = 0 if error.nobody_reads else 1
        if code:
            show(f"error: {error}", error=True)
    except OSError as error:
        if (line := refused_path(error)) is None:
            raise
        code = _tell_mistake(line)
    except KeyboardInterrupt:
        # By the signal itself, of which a shell makes 130, too: mpirun takes a process that leaves
        # by an exit code before MPI is up for one that is done, and the others wait for ever.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    flush()
    sys.exit(code)


def _tell_mistake(line: str) -> int:
    if read_launch().process_index == 0:
        show(f"error: {line}", error=True)
    return EXIT_USER


@contextmanager
def ending_all(runtime: "Runtime") -> Iterator[None]:
    """Let what one process alone meets in the block end all of them, which would wait for it.

    For front doors that keep nothing to be told later; a training and a search do it themselves.

    Args:
        runtime: the processes, which are connected.

    Raises:
        Exception: as in the block. The process is left by it where this one is alone, or where all
            raise alike.
    """
    try:
        with refusing_paths():
            yield
    except (AgreedUserError, AgreedStorageError, DivergedError, DifferingReplicasError):
        raise  # on all processes
    except Exception as error:
        if runtime.process_count > 1:
            in_a_line = isinstance(error, (UserError, StorageError))
            show(f"error: {error}" if in_a_line else describe_fault(error), error=True)
            runtime.abort(EXIT_USER if isinstance(error, UserError) else 1)
        raise


def describe_fault(error: BaseException) -> str:
    """Return a fault of ours or of the machine with its traceback."""
    which = f"{read_launch().name} failed:"
    return "\n".join([which, *(part.rstrip("\n") for part in traceback.format_exception(error))])


def stop_code() -> int:
    """Return the exit code of a run that was stopped after a checkpoint.

    torchrun starts its processes anew on any code but 0.
    """
    return 0 if read_launch().launcher == "torchrun" else EXIT_STOPPED


def how_to_go_on(folder: Path) -> str:
    """Return what to do with a stopped run or search, and what its exit code does not tell."""
    hint = f"go on with --resume {shlex.quote(str(folder))}"
    if stop_code() == EXIT_STOPPED:
        return hint
    return f"{hint} (unfinished, though torchrun gets exit code 0: it starts anew on any other)"


def how_to_draw(folder: Path) -> str:
    """Return the line that names a folder and the command that draws what is in it."""
    return f"draw it: python -m app.report {shlex.quote(str(folder))}"


def how_to_use(folder: Path) -> str:
    """Return the line that names what is done with the trained network of a run."""
    run = shlex.quote(str(folder))
    return (
        f"use it: python -m app.export {run} --format {'|'.join(SUFFIXES)}; "
        f"python -m app.evaluate {run}"
    )


def how_to_evaluate(file: Path, run: Path | None) -> str:
    """Return the line that names the command for an exported file.

    Args:
        file: that was exported.
        run: its run's folder, where the file does not lie in it.
    """
    of_run = "" if run is None else f" --run {shlex.quote(str(run))}"
    return f"evaluate it: python -m app.evaluate {shlex.quote(str(file))}{of_run}"


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return final figures, a line each; ranks of layers are for the file alone."""
    figures = {key: value for key, value in summary.items() if not isinstance(value, Mapping)}
    return [
        f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"
        for key, value in figures.items()
    ]

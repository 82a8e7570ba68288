"""What all front doors share: overrides in ``--help``, exit codes, errors from one process only."""

import argparse
import errno
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from app.distributed.launch import read_launch
from app.errors import StorageError, UserError

EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: to be resumed


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are those of any other mistake: one line, from one process."""

    def error(self, message: str) -> NoReturn:
        """Raise what the user did wrong.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[], int]) -> None:
    """Run a front door and leave with its exit code.

    A user's mistake is one line on stderr, from process 0 only, and exit code 2 from all. It must
    be raised on all processes alike.
    """
    try:
        code = main()
    except UserError as error:
        if read_launch().process_index == 0:
            print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        if read_launch().process_index == 0:
            print(f"error: {str(error.filename)[:60]}...: {error.strerror}", file=sys.stderr)
        code = EXIT_USER
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def report_fault(error: BaseException) -> None:
    """Print a fault of ours or of the machine with its traceback, at once."""
    launch = read_launch()
    print(f"process {launch.process_index} of {launch.process_count} failed:", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()

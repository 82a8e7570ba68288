"""What a run says: on stdout and stderr as it comes, and in log.txt of its folder."""

import logging
from pathlib import Path

from app.runtime.streams import show

LOG = "log.txt"


class Log:
    """Lines of one process: the first says how a run comes along, every one what went wrong.

    They go to the terminal at once, above a bar if there is one, and to the end of log.txt as soon
    as there is a folder. That file is opened for every line: it may lie behind those of earlier
    sessions, and beside those of other processes that fail. A file that cannot be written ends no
    run: its lines wait for the next one.
    """

    def __init__(self, *, is_first: bool) -> None:
        """Begin without a folder; lines are held back for it.

        Args:
            is_first: whether this process says how the run comes along.
        """
        self.folder: Path | None = None
        self._is_first = is_first
        self._waiting: list[str] = []
        self._failed = False

    def begin(self, folder: Path) -> None:
        """Write into a run's folder from here on, first what was said before."""
        self.folder = folder
        self._write()

    def say(self, line: str) -> None:
        """Tell how the run comes along, on stdout; of the first process alone."""
        if self._is_first:
            show(line)
            self.note(line)

    def warn(self, line: str) -> None:
        """Tell of a warning or an error, on stderr."""
        show(line, error=True)
        self._append(line)

    def note(self, line: str) -> None:
        """Write a line into log.txt alone, as what is shown otherwise; of the first process."""
        if self._is_first:
            self._append(line)

    def handler(self) -> logging.Handler:
        """Return a handler that writes the records of :mod:`logging` here, as warnings."""
        return _Handler(self)

    def _append(self, line: str) -> None:
        self._waiting.append(line)
        self._write()

    def _write(self) -> None:
        if self.folder is None or not self._waiting:
            return
        path = self.folder / LOG
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n".join([*self._waiting, ""]))
        except OSError as error:
            if not self._failed:
                self._failed = True
                show(f"warning: {path} lacks lines from here on: {error.strerror}", error=True)
            return
        self._waiting.clear()


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._log.warn(self.format(record))

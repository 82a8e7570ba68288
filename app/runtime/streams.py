"""The streams of a program: closed, full, read no more, or without some characters.

What a program has to say besides its work goes by :func:`show`, which ends nothing; what it was
asked to print and nothing else by :func:`put`, which says where that cannot be.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from app.errors import OutputError

_NAMES = ("stdin", "stdout", "stderr")


def prepare() -> None:
    """Let everything be written to stdout and stderr that ever will be.

    A stream that the shell has closed (``>&-``) leads nowhere: its number would be that of the next
    file that is opened, and what libraries print would go there. A character that the encoding of a
    stream lacks is written as its escape.
    """
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: TextIO) -> None:
    """Let what is written to a stream, what it holds back included, go nowhere."""
    with suppress(OSError, ValueError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream, which may be closed, leads to a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def show(line: str, *, error: bool = False) -> None:
    """Write a line at once and whole, above a bar if there is one: others write there too.

    Where nobody reads any more, as behind ``head``, the program goes on. It does so too where
    stdout takes no more for another reason, such as a full disk, which is told once.

    Args:
        line: one or several.
        error: on stderr.
    """
    from tqdm import tqdm

    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        tqdm.write(f"{_writable(line, stream)}\n", file=stream, end="")
        stream.flush()
    except (OSError, ValueError) as problem:  # ValueError: it was closed meanwhile
        silence(stream)
        if not error and isinstance(problem, OSError) and problem.errno != errno.EPIPE:
            show(f"warning: stdout takes no more lines: {problem.strerror}", error=True)


def put(text: str) -> None:
    """Print what the program was asked for, on stdout.

    Raises:
        OutputError: it cannot be written.
    """
    with printing():
        if sys.stdout is not None:
            print(_writable(text, sys.stdout), flush=True)


@contextmanager
def printing() -> Iterator[None]:
    """Tell what stdout refuses from all other errors. Files, which have names, are none of it.

    Raises:
        OutputError: in place of such an error; whatever is written later goes nowhere.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        silence(sys.stdout)
        raise OutputError(error) from None


def flush() -> None:
    """Let go of what stdout and stderr hold back, as far as they take it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)


def _writable(text: str, stream: TextIO) -> str:
    """Put escapes for the characters that the encoding of a stream lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)

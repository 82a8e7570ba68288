"""Streams that nobody reads any more."""

import os
from contextlib import suppress
from typing import TextIO


def silence(stream: TextIO) -> None:
    """Let what is written to a stream, what it holds back included, go nowhere."""
    with suppress(OSError, ValueError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

"""Files of torch.save, read only after they have proved to hold what was written into them.

``torch.load`` does not look at the checksums of the zip archive that it reads: a flipped bit
becomes another weight, without a word. Here every entry is held against its CRC-32 first, which
costs about a third of a second per GiB.
"""

import logging
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from app.errors import of_the_machine

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20


class DamagedFileError(Exception):
    """A file does not hold what was written into it; says so in one line that names it."""


def verify(path: Path) -> bool:
    """Read a zip archive to its end and compare every entry with its checksum.

    Returns:
        Whether there are checksums. torch can be told to leave them out
        (``torch.utils.serialization.config.save.compute_crc32``), and then writes zeros.

    Raises:
        DamagedFileError: it is no zip archive, or an entry is not what was written.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = [entry for entry in archive.infolist() if entry.file_size]
                if entries and not any(entry.CRC for entry in entries):
                    return False
                for entry in entries:
                    with archive.open(entry) as content:
                        while content.read(_CHUNK_BYTES):
                            pass
        except MemoryError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DamagedFileError(f"{path.name} is damaged ({reason})") from None
    return True


def verify_foreign(path: Path) -> None:
    """Verify a file that any program may have written: what has no checksums is told, once.

    Formats other than torch's zip archive have none and are left to who reads them.

    Raises:
        DamagedFileError: see :func:`verify`.
        OSError: it cannot be opened.
    """
    if zipfile.is_zipfile(path) and not verify(path):
        _tell_of_missing_checksums(path)


def load_verified(path: Path) -> dict[str, Any]:
    """Read a dictionary that this program saved, on the CPU, with weights_only=True.

    Raises:
        DamagedFileError: it is not what was written.
        OSError: it cannot be opened.
    """
    if not verify(path):
        raise DamagedFileError(f"{path.name} has no checksums: this program did not write it so")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # written whole, but not by torch.save
        if of_the_machine(error):
            raise  # no damage: others may read it
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise DamagedFileError(f"{path.name} cannot be loaded ({reason})") from None
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path.name} holds a {type(content).__name__}, not a dictionary")
    return content


@cache
def _tell_of_missing_checksums(path: Path) -> None:
    logger.warning("%s was saved without checksums: damage to it would not be seen", path)

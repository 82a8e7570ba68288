"""Image sets in memory, and the way from a configuration to its data set."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from app.data.data_set import LoadedSet
from app.data.sets import DATA_SETS
from app.errors import UserError

if TYPE_CHECKING:
    from app.config.settings import Configuration, DataSection


@dataclass(frozen=True, kw_only=True)
class Images:
    """One part of an image set."""

    images: np.ndarray
    """(n, channels, height, width) uint8."""
    labels: np.ndarray
    """(n,) int64, in [0, classes)."""

    def select(self, indices: np.ndarray) -> "Images":
        """Return the samples with these indices, in their order."""
        return Images(images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """An image set in its three parts."""

    train: Images
    validation: Images
    test: Images
    classes: int


def load(data: "DataSection") -> Any:
    """Read a data set of ours; see :meth:`app.data.data_set.LoadedSet.load`."""
    entry = DATA_SETS[data.name]
    assert isinstance(entry, LoadedSet)
    return entry.load(data)


def download(configuration: "Configuration") -> None:
    """Fetch what is missing of the data set, if configured.

    Call it on one process per node, before the others look for the files.

    Raises:
        UserError: the download failed, or the data set cannot be downloaded.
    """
    data = configuration.data
    if not data.download:
        return
    if data.by_import_path:
        raise UserError(
            f"data.download: {data.name} is your own data and brings no download; leave it out"
        )
    DATA_SETS[data.name].download(data)

"""What is known of a data set of ours before it is read: its entry in :mod:`app.data.sets`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.config.data_section import DataSection

COMMON_KEYS = frozenset({"name", "root", "download", "train_samples", "drop_last"})
"""Keys of the section data that every data set can use."""
IMAGE_KEYS = frozenset({"validation_fraction", "augmentation", "mixup", "cutmix"})
"""Those that images in memory can use beside them."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set: its name, the task that learns it, and its download."""

    name: str
    task: str = "app.data.classification:InMemoryClassification"
    """Import path of the class of :class:`app.data.Task`."""
    keys: frozenset[str] = IMAGE_KEYS
    """Keys of the section data that it can use, beside :data:`COMMON_KEYS`."""
    has_classes: bool = True
    """Whether classes are learned, whose labels can be smoothed."""
    in_root: bool = True
    """Whether it lies below data.root."""

    def download(self, data: "DataSection") -> None:
        """Fetch what is missing below data.root; files that are there are left alone.

        Raises:
            UserError: that failed, or the set cannot be downloaded.
        """


class LoadedSet(DataSet, ABC):
    """A data set that is read whole; the task of any other reads what it needs of it."""

    @abstractmethod
    def load(self, data: "DataSection") -> Any:
        """Read the set, as its task takes it.

        Raises:
            UserError: a file is missing or damaged, or ``data.train_samples`` is too large.
        """

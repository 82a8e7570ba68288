"""Image files of the user's own, in folders by class, such as ImageNet."""

from typing import TYPE_CHECKING

from app.data.data_set import DataSet
from app.errors import UserError

if TYPE_CHECKING:
    from app.config.data_section import DataSection


class ImageFolder(DataSet):
    """Stays on the disk: :mod:`app.data.image_folder` lists and reads it."""

    def download(self, data: "DataSection") -> None:
        """Say that there is nothing to download."""
        raise UserError(
            "data.download: image_folder is your own data and cannot be downloaded; put train/ and "
            "val/ into data.root"
        )


DATA_SETS = (
    ImageFolder(
        name="image_folder",
        task="app.data.image_folder:ImageFolderClassification",
        keys=frozenset(
            {
                *("validation_fraction", "mixup", "cutmix", "random_augment", "random_erasing"),
                *("stage_to", "image_size", "image_bits", "check_images", "workers"),
            }
        ),
    ),
)

"""The section of the configuration that says what is learned from."""

import difflib
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from app.config.section import Section, expand_home
from app.data.data_set import COMMON_KEYS, DataSet
from app.data.sets import DATA_SETS
from app.import_path import is_import_path

OWN = DataSet(name="", keys=frozenset({"arguments"}), has_classes=False, in_root=False)
"""What holds for a class by import path: the rest it says itself."""


class DataSection(Section):
    """What is learned from."""

    name: str = Field(
        "digits",
        description=f"{', '.join(DATA_SETS)}; or a class of your own by its import path, "
        "package.module:Class. digits ships with scikit-learn, the others lie under data.root.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of a class of your own."
    )
    root: str = Field("data", description="Folder that holds the data set in its official layout.")
    download: bool = Field(False, description="Let torchvision download what is missing.")
    validation_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the training part that serves as validation part."
    )
    train_samples: int | None = Field(
        None, gt=0, description="Train on only this many samples (the first of the training part)."
    )
    drop_last: bool = Field(
        False,
        description="Drop the last, smaller global batch of an epoch. Otherwise it is trained on, "
        "every sample with the weight 1 / (samples in that batch).",
    )
    augmentation: Literal["none", "crop", "crop_flip"] = Field(
        "none",
        description="Of training images in memory: random crops after zero-padding by an eighth of "
        "the width; crop_flip: horizontal flips too.",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Parameter a of Beta(a, a) for the share of each image; 0: no mixup.",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="The same for CutMix; of both, a batch gets one or the other.",
    )
    random_augment: str | None = Field(
        None, description="RandAugment as timm writes it: rand-m9-mstd0.5-inc1 (image_folder only)."
    )
    random_erasing: float = Field(
        0.0, ge=0, le=1, description="Share of images with a part erased (image_folder only)."
    )
    stage_to: str | None = Field(
        None,
        description="Folder on each node's own disk: data.root is copied there first, by one "
        "process per node (image_folder only).",
    )
    image_size: int = Field(
        224, gt=0, le=16_384, description="Crop size in pixels (image_folder only)."
    )
    image_bits: int | None = Field(
        None,
        ge=1,
        le=16,
        description="Bits that grey values in files of 16 bits use; null: those that the file "
        "names (a PNG by sBIT, a TIFF of 12 bits), otherwise 16 (image_folder only).",
    )
    check_images: Literal["headers", "pixels", "none"] = Field(
        "headers",
        description="Before the first step, all processes together: headers: open every image, and "
        "decode those of validation and test, at most 10,000 per process; pixels: decode all "
        "(image_folder only).",
    )
    workers: int = Field(
        2, ge=0, le=1024, description="Loader processes per process (image_folder only)."
    )
    input_length: int = Field(96, gt=0, description="Known steps of a time series (ETT only).")
    horizon: int = Field(96, gt=0, description="Steps to be forecast (ETT only).")

    _expand = field_validator("root", "stage_to")(expand_home)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.by_import_path and self.name not in DATA_SETS:
            near = difflib.get_close_matches(self.name, DATA_SETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"name: {self.name[:200]!r} is not one of {', '.join(DATA_SETS)}, nor a "
                f"package.module:Class{hint}"
            )
        usable = COMMON_KEYS | self.data_set.keys
        for key, field in sorted(type(self).model_fields.items()):
            default = field.get_default(call_default_factory=True)
            if key not in usable and getattr(self, key) != default:
                raise ValueError(f"{key}: is not for data.name={self.name}; leave it out")
        return self

    @property
    def by_import_path(self) -> bool:
        """Whether the name is that of a class of the user's own."""
        return is_import_path(self.name)

    @property
    def data_set(self) -> DataSet:
        """What is known of the data set before it is read."""
        return OWN if self.by_import_path else DATA_SETS[self.name]

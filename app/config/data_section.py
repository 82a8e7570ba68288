"""The section of the configuration that says what is learned from."""

from typing import Literal, Self

from pydantic import Field, model_validator

from app.config.section import Section

DataName = Literal[
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "image_folder",
    "etth1",
    "etth2",
    "ettm1",
    "ettm2",
]


class DataSection(Section):
    """What is learned from."""

    name: DataName = Field(
        "digits",
        description="Data set. digits ships with scikit-learn, the others lie under data.root.",
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        unused = {"random_augment", "random_erasing", "stage_to", "check_images", "image_bits"}
        if self.name == "image_folder":
            unused = {"augmentation"}
        elif self.name.startswith("ett"):
            unused |= {"augmentation", "mixup", "cutmix"}
        for key in sorted(unused):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: is not for data.name={self.name}; leave it out")
        return self

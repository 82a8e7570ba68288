"""Small folders of images, and the task on one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app import config
from app.data import Task, build_task

SIZE = 16
CLASSES = ("ant", "bee", "cat")


def write_images(folder: Path, count: int, *, first: int = 0) -> None:
    """Write ``count`` images of each class: every one in a colour of its own, with some noise."""
    generator = np.random.default_rng(first)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(40, size=(30, 40, 3), dtype=np.uint8)
            pixels[..., 0] += np.uint8(60 * label)
            pixels[..., 1] += np.uint8(10 * (number + first))
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def folder_task(
    root: Path, index: int = 0, count: int = 1, *, batch_size: int = 8, **data: Any
) -> Task:
    configuration = config.build(
        {
            "data": {
                "name": "image_folder",
                "root": str(root),
                "image_size": SIZE,
                "workers": 0,
                "validation_fraction": 0.3,
                **data,
            },
            "training": {"batch_size": batch_size},
        }
    )
    device = torch.device("cpu")
    return build_task(configuration, process_index=index, process_count=count, device=device)


def together(
    tasks: list[Task], epoch: int = 0, first_batch: int = 0
) -> list[tuple[Tensor, Tensor]]:
    batches = zip(*(task.train_batches(epoch, first_batch) for task in tasks), strict=True)
    return [
        (
            torch.cat([share.inputs[: share.count] for share in shares]),
            torch.cat([share.targets[: share.count] for share in shares]),
        )
        for shares in batches
    ]

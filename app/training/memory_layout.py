"""How batches of images lie in memory."""

from typing import Any

import torch
from torch import Tensor, nn

from app.errors import UserError


def lay_channels_last(model: nn.Module, inputs: Tensor) -> None:
    """Let a network read its images with their channels last, which convolutions hand on.

    Weights stay as they are: a convolution follows its input, and lays its own weight alike for
    the while. So what is stored, factorized and sent does not depend on the layout.

    Args:
        model: called with batches (samples, channels, height, width).
        inputs: such a batch, as the data make it.

    Raises:
        UserError: the data are no images.
    """
    if inputs.dim() != 4:
        raise UserError(
            "training.channels_last is for images (samples, channels, height, width), and the "
            f"network's inputs have {inputs.dim()} dimensions: set it to false"
        )
    model.register_forward_pre_hook(_channels_last)


def _channels_last(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *others = arguments
    # Not contiguous(), which leaves images of one channel as they are, in either layout.
    laid = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
    return laid, *others

"""Networks by name: our own, and those of timm. Built full-rank, with random weights."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from app.compatibility import import_torchvision
from app.errors import UserError
from app.settings import ModelSection

_CONSTRUCTION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What constructors raise at arguments that they do not expect."""


def build(
    name: str, arguments: Mapping[str, Any], *, input_shape: tuple[int, ...], outputs: int
) -> nn.Module:
    """Build a network for images, with random weights drawn from torch's default generator.

    The number of channels, the image size where the network depends on it, and the number of
    classes are filled in as timm's ``in_chans``, ``img_size`` and ``num_classes``, unless
    ``arguments`` give them.

    Args:
        name: "vision_transformer" (timm's, of any size), "cifar_resnet", or a name of timm.
        arguments: keyword arguments of the network's constructor.
        input_shape: (channels, height, width).
        outputs: classes.

    Returns:
        The network, on the CPU unless the caller chose another default device.

    Raises:
        UserError: the name is unknown, or the network cannot be built with these arguments.
    """
    constructor, depends_on_size = _find(name)
    channels, *size = input_shape
    filled_in: dict[str, Any] = {"in_chans": channels, "num_classes": outputs}
    if depends_on_size:
        filled_in["img_size"] = tuple(size)
    try:
        return constructor(**{**filled_in, **arguments})
    except _CONSTRUCTION_ERRORS as error:
        raise UserError(
            f"model.arguments: {name} cannot be built with {dict(arguments)}: {_one_line(error)}"
        ) from None


def check(section: ModelSection, *, input_shape: tuple[int, ...], outputs: int) -> None:
    """Find out early, without memory or computation, whether a network can be built and fits.

    It is built on the meta device and given a batch there, which draws no random numbers.

    Raises:
        UserError: as in :func:`build`; or the network cannot take these images, or does not give
            one output per class.
    """
    with torch.device("meta"), torch.no_grad():
        model = build(section.name, section.arguments, input_shape=input_shape, outputs=outputs)
        try:
            result = model.eval()(torch.empty(2, *input_shape))
        except _CONSTRUCTION_ERRORS as error:
            raise UserError(
                f"model.name: {section.name} with {section.arguments} cannot take images of shape "
                f"{tuple(input_shape)}: {_one_line(error)}"
            ) from None
    shape = getattr(result, "shape", None)
    if shape != (2, outputs):
        raise UserError(
            f"model.arguments: {section.name} with {section.arguments} gives outputs of shape "
            f"{shape and tuple(shape)} for 2 images, expected {(2, outputs)}"
        )


def _find(name: str) -> tuple[Callable[..., nn.Module], bool]:
    """Return the constructor of a network, and whether it takes the image size."""
    if name == "cifar_resnet":
        from app.models.cifar_resnet import CifarResNet

        return CifarResNet, False
    import_torchvision()
    import timm

    if name == "vision_transformer":
        return timm.models.VisionTransformer, True
    if not timm.is_model(name):
        known = ["vision_transformer", "cifar_resnet", *timm.list_models()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"model.name: {name!r} is neither vision_transformer, cifar_resnet nor a name that "
            f"timm knows{hint}"
        )

    try:
        configuration = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot
        raise UserError(f"model.name: {name!r}: {error}") from None

    def create(**arguments: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, **arguments)

    # timm's own way to tell which networks take an img_size
    return create, bool(configuration and configuration.fixed_input_size)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

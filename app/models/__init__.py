"""Networks by name: our own, those of timm, and any by import path. Built full-rank, at random."""

import difflib
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from app.errors import UserError, of_the_machine, typed_line
from app.import_path import import_by_path, is_import_path
from oialr.compatibility import import_torchvision

if TYPE_CHECKING:
    from app.config.settings import ModelSection

_OWN = {
    "autoformer": ("app.models.autoformer", "Autoformer"),
    "cifar_resnet": ("app.models.cifar_resnet", "CifarResNet"),
    "lenet5": ("app.models.lenet", "LeNet5"),
}
"""Our own networks, by module and class: imported when they are asked for."""

_CONSTRUCTION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What constructors raise at arguments that they do not expect."""
_OF_META = re.compile(r"(?<![a-z])meta(?![a-z])", re.IGNORECASE)
"""What errors name that come of tensors without numbers."""


Outputs = int | tuple[int, ...]
"""Of a network for one sample: a number of classes, or the (horizon, variables) of a forecast."""


def build(
    name: str, arguments: Mapping[str, Any], *, input_shape: tuple[int, ...], outputs: Outputs
) -> nn.Module:
    """Build a network with random weights drawn from torch's default generator.

    What the task decides is filled in unless ``arguments`` give it. For images: the number of
    channels, the image size where the network depends on it, and the number of classes, as timm's
    ``in_chans``, ``img_size`` and ``num_classes``. For time series: ``variables``,
    ``time_features``, ``input_length`` and ``horizon``.

    Args:
        name: "vision_transformer" (timm's, of any size), "cifar_resnet", "lenet5", "autoformer", or
            a name of timm; or the import path of a function of one's own, which gets the arguments
            and what the task decides: ``input_shape`` and ``outputs``.
        arguments: keyword arguments of the network's constructor.
        input_shape: (channels, height, width), or (steps, variables + time features); of own data
            any.
        outputs: classes, or (horizon, variables); of own data any shape.

    Returns:
        The network, on the CPU unless the caller chose another default device.

    Raises:
        UserError: the name is unknown, or the network cannot be built with these arguments.
    """
    if "pretrained" in arguments:
        raise UserError(
            "model.arguments: pretrained is not taken, since nothing is downloaded here; leave it "
            "out, and name a file of weights by model.initial"
        )
    if is_import_path(name):
        return _build_own(name, arguments, input_shape=input_shape, outputs=outputs)
    constructor, depends_on_size = _find(name)
    is_forecast = isinstance(outputs, tuple)
    if is_forecast != (name == "autoformer"):
        needed, given = ("time series", "images") if name == "autoformer" else ("images", "series")
        raise UserError(f"model.name: {name} is for {needed}, and data.name gives {given}")
    fits = len(input_shape) == 3
    if isinstance(outputs, tuple):
        fits = len(input_shape) == len(outputs) == 2
    if not fits:
        raise UserError(
            f"model.name: {name} is for {'series' if is_forecast else 'images'}, and data.name "
            f"gives samples of shape {tuple(input_shape)}; name a network of your own by its "
            f"import path"
        )
    if isinstance(outputs, tuple):
        filled_in = _of_a_forecast(input_shape, outputs)
    else:
        filled_in = {"in_chans": input_shape[0], "num_classes": outputs}
        if depends_on_size:
            filled_in["img_size"] = tuple(input_shape[1:])
    try:
        return constructor(**{**filled_in, **arguments})
    except _CONSTRUCTION_ERRORS as error:
        if of_the_machine(error):
            raise
        raise UserError(
            f"model.arguments: {name} cannot be built with {dict(arguments)}: {typed_line(error)}"
        ) from None


def _build_own(
    name: str, arguments: Mapping[str, Any], *, input_shape: tuple[int, ...], outputs: Outputs
) -> nn.Module:
    """Build a network of the user's own."""
    function = import_by_path("model.name", name)
    try:
        model = function(**{"input_shape": input_shape, "outputs": outputs, **arguments})
    except _CONSTRUCTION_ERRORS as error:
        if of_the_machine(error):
            raise
        raise UserError(
            f"model.arguments: {name} cannot be built with input_shape={tuple(input_shape)}, "
            f"outputs={outputs} and {dict(arguments)}: {typed_line(error)}"
        ) from None
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name: {name} gives a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def check(
    section: "ModelSection",
    *,
    input_shape: tuple[int, ...],
    outputs: Outputs,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> None:
    """Find out early, without memory or computation, whether a network can be built and fits.

    It is built on the meta device and given a batch there, which draws no random numbers. Code that
    looks at the numbers in a tensor fails there, and may be right: such a network is tried out on
    the device of the run, and random states are left as they were.

    Args:
        section: names the network.
        input_shape: of a sample.
        outputs: expected of it.
        dtype: of the inputs.
        device: of the run; by default the CPU.

    Raises:
        UserError: as in :func:`build`; or the network cannot take these inputs, or gives other
            outputs.
    """
    try:
        with torch.device("meta"):
            _try_out(section, torch.empty(2, *input_shape, dtype=dtype), outputs)
    except UserError as error:
        if not _OF_META.search(str(error)):
            raise
        device = device or torch.device("cpu")
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _try_out(section, torch.zeros(2, *input_shape, dtype=dtype, device=device), outputs)


@torch.no_grad()
def _try_out(section: "ModelSection", batch: Tensor, outputs: Outputs) -> None:
    """Build a network on the default device and call it where the batch is.

    Raises:
        UserError: as of :func:`check`.
    """
    input_shape = tuple(batch.shape[1:])
    inputs = {1: "samples", 2: "series", 3: "images"}.get(len(input_shape), "samples")
    model = build(section.name, section.arguments, input_shape=input_shape, outputs=outputs)
    try:
        result = model.eval().to(batch.device)(batch)
    except _CONSTRUCTION_ERRORS as error:
        if of_the_machine(error):
            raise
        raise UserError(
            f"model.name: {section.name} with {section.arguments} cannot take {inputs} of "
            f"shape {input_shape}: {typed_line(error)}"
        ) from None
    shape = getattr(result, "shape", None)
    expected = (2, outputs) if isinstance(outputs, int) else (2, *outputs)
    if shape != expected:
        raise UserError(
            f"model.arguments: {section.name} with {section.arguments} gives outputs of shape "
            f"{shape and tuple(shape)} for 2 {inputs}, expected {expected}"
        )


def _of_a_forecast(input_shape: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, Any]:
    (steps, columns), (horizon, variables) = input_shape, outputs
    return {
        "variables": variables,
        "time_features": columns - variables,
        "input_length": steps - horizon,
        "horizon": horizon,
    }


def _find(name: str) -> tuple[Callable[..., nn.Module], bool]:
    """Return the constructor of a network, and whether it takes the image size."""
    if name in _OWN:
        module, constructor = _OWN[name]
        return getattr(import_module(module), constructor), name == "lenet5"
    import_torchvision()
    import timm

    if name == "vision_transformer":
        return timm.models.VisionTransformer, True
    if not timm.is_model(name):
        known = ["vision_transformer", *_OWN, *timm.list_models()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"model.name: {name!r} is neither vision_transformer, {', '.join(_OWN)} nor a name "
            f"that timm knows{hint}"
        )

    try:
        configuration = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot
        raise UserError(f"model.name: {name!r}: {error}") from None

    def create(**arguments: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, **arguments)

    # timm's own way to tell which networks take an img_size
    return create, bool(configuration and configuration.fixed_input_size)

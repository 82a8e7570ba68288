"""Networks by name: what is filled in, what is rejected, and the residual networks for CIFAR."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from app import models
from app.config.settings import ModelSection
from app.errors import UserError
from app.models.cifar_resnet import CifarResNet

IMAGES = (3, 32, 32)
SMALL_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(name: str, arguments: dict[str, Any] | None = None, **task: Any) -> nn.Module:
    return models.build(name, arguments or {}, **{"input_shape": IMAGES, "outputs": 10, **task})


def check(name: str, arguments: dict[str, Any] | None = None) -> None:
    section = ModelSection(name=name, arguments=arguments or {})
    models.check(section, input_shape=IMAGES, outputs=10)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vision_transformer", {**SMALL_VIT, "patch_size": 4}),
        ("cifar_resnet", {"depth": 8}),
        ("lenet5", {}),
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"patch_size": 4}),
    ],
)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 24)])
def test_task_is_filled_in(name: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = build(name, arguments, input_shape=shape, outputs=7)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_arguments_have_the_last_word() -> None:
    model = build("vision_transformer", {**SMALL_VIT, "img_size": [16, 8], "num_classes": 3})
    assert model(torch.zeros(2, 3, 16, 8)).shape == (2, 3)


def test_weights_follow_the_callers_generator() -> None:
    weights = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights.append(nn.utils.parameters_to_vector(build("cifar_resnet").parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "near"), [("cifar_resnt", "cifar_resnet"), ("resnetrs11", "resnetrs101")]
)
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.name: '{name}' is .* did you mean .*{near}\b"):
        build(name)


def test_name_that_would_have_to_be_downloaded() -> None:
    with pytest.raises(UserError, match=r"^model\.name: 'hf-hub:some/model' is neither"):
        build("hf-hub:some/model")


def test_unknown_tag() -> None:
    with pytest.raises(UserError, match=r"^model\.name: 'resnet18\.no': .*tag"):
        build("resnet18.no")


WRONG_ARGUMENTS = [
    ("resnet18", {"depths": 3}, "unexpected keyword argument 'depths'"),
    ("vision_transformer", {"depths": 3}, "unexpected keyword argument 'depths'"),
    ("vision_transformer", {"embed_dim": 65}, "divisible by num_heads"),
    ("vision_transformer", {"embed_dim": -12}, "negative dimension"),
    ("vision_transformer", {"depth": "3"}, "'str'"),
    ("vision_transformer", {"num_heads": 0}, "ZeroDivisionError"),
    ("vision_transformer", {"norm_layer": "no"}, "KeyError: 'no'"),
    ("resnet18", {"checkpoint_path": "nowhere.pth"}, "FileNotFoundError"),
    ("cifar_resnet", {"depth": 21}, r"depth must be 6n \+ 2"),
    ("cifar_resnet", {"depth": 2}, r"depth must be 6n \+ 2"),
    ("cifar_resnet", {"width": 0}, "width must be at least 1"),
    ("cifar_resnet", {"shortcut": "C"}, "shortcut must be 'A' or 'B'"),
    ("lenet5", {"activation": "C"}, "activation must be tanh or relu, not 'C'"),
    ("lenet5", {"img_size": [8, 8]}, "img_size must be at least 12 x 12"),
]


@pytest.mark.parametrize("call", [build, check])
@pytest.mark.parametrize(("name", "arguments", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments(call: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(name, arguments)
    beginning = f"model.arguments: {name} cannot be built with {arguments}: "
    assert str(caught.value).startswith(beginning)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vision_transformer", {"img_size": 16}, "model.name: {} with {} cannot take images of"),
        ("vision_transformer", {"patch_size": 64}, "model.name: {} with {} cannot take images of"),
        ("inception_v3", {}, "model.name: {} with {} cannot take images of shape (3, 32, 32)"),
        ("cifar_resnet", {"num_classes": 7}, "model.arguments: {} with {} gives outputs of shape"),
        ("vision_transformer", {"global_pool": ""}, "model.arguments: {} with {} gives outputs"),
    ],
)
def test_check_finds_what_building_does_not(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message.format(name, arguments))) as caught:
        check(name, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vision_transformer", "cifar_resnet", "resnetrs101"])
def test_check_passes_and_leaves_no_trace(name: str) -> None:
    before = torch.get_rng_state()
    check(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_cifar_resnet_has_the_size_of_the_paper(depth: int, millions: float) -> None:
    """He et al., table 6; with projections a little more."""
    plain, projected = CifarResNet(depth=depth), CifarResNet(depth=depth, shortcut="B")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, projected)]
    assert round(sizes[0] / 1e6, 2) == millions
    assert sizes[1] - sizes[0] == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_cifar_resnet_maps() -> None:
    model = CifarResNet(depth=8, width=4)
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 8


@torch.no_grad()
def test_parameter_free_shortcut_subsamples_and_fills_with_zeros() -> None:
    block = CifarResNet(depth=8, width=4).blocks[1]
    nn.init.zeros_(block.convolution2.weight)  # leaves the shortcut alone
    features = torch.rand(2, 4, 6, 6)
    result = block(features)
    assert torch.equal(result[:, :4], features[:, :, ::2, ::2])
    assert torch.count_nonzero(result[:, 4:]) == 0


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 1)])
def test_lenet5_has_the_size_of_the_paper(size: int, channels: int) -> None:
    """LeCun et al., section II.B: 48,120 weights in C5 and 10,164 in F6; C3 is connected fully."""
    model = build("lenet5", input_shape=(channels, size, size))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.children()]
    assert sizes == [156, 2416, 48_120, 10_164, 850]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_every_parameter_of_lenet5_is_trained(activation: str) -> None:
    model = build("lenet5", {"activation": activation}, input_shape=(1, 28, 28))
    model(torch.rand(8, 1, 28, 28)).square().sum().backward()
    assert all(torch.count_nonzero(p.grad) for p in model.parameters())


def test_cifar_mini_vit_has_its_size() -> None:
    arguments = {"patch_size": 8, "embed_dim": 768, "depth": 6, "num_heads": 6, "mlp_ratio": 4}
    assert sum(p.numel() for p in build("vision_transformer", arguments).parameters()) == 42_698_506


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_every_parameter_of_cifar_resnet_is_trained(shortcut: str) -> None:
    model = CifarResNet(depth=8, width=4, shortcut=shortcut)
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert all(torch.count_nonzero(p.grad) for p in model.parameters())

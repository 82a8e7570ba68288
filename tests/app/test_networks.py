"""Every network of the configurations converts, keeps its function, trains and is cut."""

from typing import Any

import pytest
import torch
from torch import nn

from app import OIALR, models
from oialr.convert import to_dense

VIT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 6, "mlp_ratio": 4}
IMAGES, SERIES = ((3, 32, 32), 10), ((24 + 16, 7 + 5), (16, 7))
NETWORKS = {
    "vision_transformer": ("vision_transformer", VIT, IMAGES),
    "vit_base_patch16_224": (
        "vit_base_patch16_224",
        {"embed_dim": 48, "depth": 1, "num_heads": 2},
        IMAGES,
    ),
    "resnetrs101": (
        "resnetrs101",
        {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8},
        IMAGES,
    ),
    "resnet50": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, IMAGES),
    "vgg16_bn": ("vgg16_bn", {"mlp_ratio": 0.01}, IMAGES),
    "lenet5": ("lenet5", {}, ((1, 28, 28), 10)),
    "cifar_resnet": ("cifar_resnet", {"depth": 8, "width": 8}, IMAGES),
    "cifar_resnet_B": ("cifar_resnet", {"depth": 8, "width": 8, "shortcut": "B"}, IMAGES),
    "autoformer": (
        "autoformer",
        {"width": 32, "heads": 4, "feed_forward": 64, "label_length": 8},
        SERIES,
    ),
}


pytestmark = pytest.mark.usefixtures("own_random_state")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("case", NETWORKS)
def test_network_converts_trains_and_is_cut(case: str) -> None:
    name, arguments, (shape, outputs) = NETWORKS[case]
    model: Any = models.build(name, arguments, input_shape=shape, outputs=outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = OIALR(
        model,
        optimizer,
        delay=1,
        update_interval=1,
        cutoff=0.95,
        layer_fraction=1,
        rank_multiple=1,
        minimum_rank_fraction=0.05,
    )
    inputs = torch.randn(4, *shape)

    losses = [step(model, optimizer, inputs)]
    expected = model.eval()(inputs)
    event = method.step()
    assert event
    assert event.kind == "convert"
    torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-4)

    model.train()
    losses.append(step(model, optimizer, inputs))
    event = method.step()
    assert event
    assert event.kind == "cut"
    assert len(event.layers) == len(method.layers)
    assert all(layer.rank < layer.previous_rank for layer in event.layers)
    losses.append(step(model, optimizer, inputs))
    assert torch.tensor(losses).isfinite().all()
    assert method.trainable_percent() < 50

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    low_rank = model.eval()(inputs)
    torch.testing.assert_close(to_dense(model)(inputs), low_rank, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", NETWORKS)
def test_linear_maps_are_factorized_but_for_the_head(case: str) -> None:
    name, arguments, (shape, outputs) = NETWORKS[case]
    model = models.build(name, arguments, input_shape=shape, outputs=outputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    dense = [report.name for report in method.survey if report.is_linear_map and report.stays_dense]
    assert len(dense) == 1
    assert dense[0].startswith(("head.", "fc.", "projection."))

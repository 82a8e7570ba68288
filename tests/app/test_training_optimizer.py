"""The optimizers that a training takes by name."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from app import OIALR, config
from app.config.optimizers import OPTIMIZERS
from app.config.settings import TrainingSection
from app.errors import UserError
from app.training.optimizer import build_optimizer
from app.training.precision import Precision
from oialr.averages import WEIGHT_AVERAGE
from oialr.compatibility import import_torchvision
from oialr.convert import get_layer
from oialr.optimizers.registry import rule_of
from oialr.weight_average import WeightAverage


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_is_trained_low_rank_and_released_by_what_the_library_knows_of_it(name: str) -> None:
    section = TrainingSection(optimizer=name, weight_decay=0.05, momentum=0.8)
    model = network()
    optimizer = build_optimizer(model, section)
    assert type(optimizer).__name__.lower() == name
    assert rule_of(optimizer) is not None
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    for group in optimizer.param_groups:
        assert group["lr"] == section.learning_rate
        for key, value in OPTIMIZERS[name].options(0.8).items():
            assert group.get(key, value) == value  # but for what is no option of a group
    method = OIALR(
        model,
        optimizer,
        delay=3,
        update_interval=2,
        release=9,
        cutoff=0.6,
        largest_cut=0.9,
        layer_fraction=1,
        rank_multiple=1,
        core_learning_rate_factor=2,
        frobenius_decay=0.1,
    )
    average = WeightAverage(model, optimizer, decay=0.9)
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    kinds, losses = [], []
    for step in range(14):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        loss.backward()
        optimizer.step()
        average.update(step)
        event = method.step()
        kinds += [event.kind] if event else []
        losses.append(loss.item())
    assert kinds[0] == "convert"
    assert "cut" in kinds
    assert kinds[-1] == "release"
    assert all(map(math.isfinite, losses))
    for report in method.layers:
        for parameter in get_layer(model, report.name).factors:
            assert optimizer.state[parameter][WEIGHT_AVERAGE].shape == parameter.shape


def test_the_names_are_the_choices_of_the_configuration() -> None:
    with pytest.raises(UserError, match=r"training\.optimizer: .*adamax") as caught:
        config.load(None, ["training.optimizer=muon"])
    assert all(name in str(caught.value) for name in OPTIMIZERS)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_gradients_are_clipped_by_the_norm_that_they_have(name: Any, clip: float | None) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(name, torch.device("cpu"))
    G = [torch.arange(1.0, 1 + p.numel()).view_as(p) for p in before]
    terms = [(p * g).sum() for p, g in zip(model.parameters(), G, strict=True)]
    precision.backward(torch.stack(terms).sum())
    precision.step(optimizer, model, clip)
    norm = float(torch.nn.utils.get_total_norm(G))
    for p, b, g in zip(model.parameters(), before, G, strict=True):
        torch.testing.assert_close(b - p.detach(), g * min(1, (clip or math.inf) / norm))


def test_tokens_and_positions_do_not_decay() -> None:
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1)
    optimizer = build_optimizer(model, TrainingSection(weight_decay=0.05))
    (decayed,) = (group["params"] for group in optimizer.param_groups if group["weight_decay"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert {names[p] for p in decayed} == matrices - {"cls_token", "pos_embed"}


@pytest.mark.parametrize(
    ("name", "momentum", "expected"),
    [
        ("sgd", 0.8, {"momentum": 0.8, "nesterov": True}),
        ("sgd", 0.0, {"momentum": 0.0, "nesterov": False}),
        ("rmsprop", 0.8, {"momentum": 0.8}),
        ("lion", 0.8, {"betas": (0.8, 0.99)}),
        *((n, 0.8, {"betas": (0.8, 0.999)}) for n in ("adam", "adamw", "nadam", "radam", "lamb")),
    ],
)
def test_momentum_is_what_each_optimizer_makes_of_it(
    name: str, momentum: float, expected: dict[str, Any]
) -> None:
    section = TrainingSection(optimizer=name, momentum=momentum)
    for group in build_optimizer(network(), section).param_groups:
        assert {key: group[key] for key in expected} == expected

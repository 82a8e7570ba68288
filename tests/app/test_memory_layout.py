"""training.channels_last: another layout, the same network."""

import json

import pytest
import torch
from support.launching import train
from support.tiny_run import PAPER
from torch import nn

from app import models
from app.errors import UserError
from app.training.memory_layout import lay_channels_last
from oialr import OIALR
from oialr.layers.conv import FactoredConv


@pytest.mark.slow
def test_all_convolutions_follow_and_nothing_that_is_stored_does() -> None:
    def network() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models.build("cifar_resnet", {"depth": 8}, input_shape=(3, 8, 8), outputs=5)
        model = model.double()
        method = OIALR(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            delay=1,
            release=1,
            update_interval=1,
            target_size=0.5,
        )
        method.optimizer.step()
        method.step()
        assert sum(isinstance(module, FactoredConv) for module in model.modules()) > 1
        return model

    plain, laid = network(), network()
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    lay_channels_last(laid, images)
    followed = []
    for module in laid.modules():
        if hasattr(module, "kernel_size"):
            module.register_forward_hook(
                lambda _, inputs, output: followed.extend([inputs[0], output])
            )
    for model in (plain, laid):
        model(images).square().sum().backward()
    layout = torch.channels_last
    assert len(followed) >= 14
    assert all(x.is_contiguous(memory_format=layout) for x in followed if x.shape[1] > 1)
    for one, other in zip(plain.parameters(), laid.parameters(), strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.channels_last is for images .* 2 dimensions"):
        lay_channels_last(nn.Linear(3, 2), torch.rand(4, 3))


@pytest.mark.slow
def test_a_training_comes_to_the_same(tmp_path) -> None:
    losses = []
    for layout in ("false", "true"):
        folder = tmp_path / layout
        keys = ["data.train_samples=200", "training.epochs=2", "training.warmup_epochs=1"]
        keys += ["model.name=cifar_resnet", "model.arguments={depth: 8}"]
        keys += [*PAPER, "oialr.delay=4", "oialr.update_interval=2", "training.learning_rate=1e-4"]
        train(1, *keys, f"training.channels_last={layout}", f"run.dir={folder}")
        losses.append(json.loads((folder / "summary.json").read_text())["test_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]  # other sums: the key has done something

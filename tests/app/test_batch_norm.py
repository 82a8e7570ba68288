"""Shares of one sample are found before the first step, where a normalization cannot have them."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from support.launching import train
from torch import nn

from app import config
from app.data import Batch
from app.data.sharding import micro_batches, share
from app.errors import UserError
from app.runtime.processes import start_runtime
from app.training.batch_norm import check_batch_norm, global_batches, least_samples
from app.training.build import build


def network(size):
    """A batch normalization over maps of size x size behind dropout, on images of 4 x 4."""
    return nn.Sequential(
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(size), nn.BatchNorm2d(3), nn.Flatten()
    )


def check(model, samples, *overrides, processes=1):
    task = SimpleNamespace(
        train_size=samples,
        example_batch=lambda: Batch(
            inputs=torch.ones(2, 3, 4, 4), targets=torch.zeros(2), count=2, global_count=2
        ),
    )
    configuration = config.load(None, ["training.batch_size=8", *overrides])
    check_batch_norm(model, task, configuration, processes)


@pytest.mark.parametrize(
    ("samples", "overrides", "processes", "message"),
    [
        (17, [], 1, "data.drop_last: the last batch of an epoch has 1 sample "),
        (19, [], 2, "data.drop_last: the last batch of an epoch has 3 samples"),
        (18, [], 3, "data.drop_last: .* over 3 processes"),  # of padding
        (18, ["training.accumulation=2"], 1, "data.drop_last: .* training.accumulation=2"),
        (7, [], 4, "data.drop_last: the last batch of an epoch has 7 samples"),
        (16, ["training.accumulation=8"], 1, "training.batch_size: 8 samples over 1 process"),
        (16, [], 8, "training.batch_size: 8 samples over 8 processes are one at a time"),
    ],
)
def test_a_single_value_per_channel_is_refused(samples, overrides, processes, message):
    with pytest.raises(UserError, match=message) as caught:
        check(network(1), samples, *overrides, processes=processes)
    assert "2 (BatchNorm2d) has one value per channel" in str(caught.value)
    check(network(2), samples, *overrides, processes=processes)  # 4 values
    check(network(1).eval(), samples, *overrides, processes=processes)  # frozen
    check(nn.Flatten(), samples, *overrides, processes=processes)
    if "drop_last" in message and samples > 8:
        check(network(1), samples, *overrides, "data.drop_last=true", processes=processes)


def test_a_look_changes_nothing():
    model, state = network(2), torch.get_rng_state()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check(model, 17)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_what_only_reads_a_network_has_no_batches_that_are_too_small(monkeypatch):
    """An evaluation by more processes than those of the training, say."""
    keys = ["model.name=cifar_resnet", "model.arguments={depth: 8}", "oialr.enabled=false"]
    configuration = config.load(None, [*keys, "training.synchronize_batch_norm=true"])
    refused = UserError("for training alone")
    for name in ("check_batch_norm", "synchronize_batch_norm"):
        monkeypatch.setattr(f"app.training.build.{name}", MagicMock(side_effect=refused))
        with start_runtime(device="cpu") as runtime:
            with pytest.raises(UserError, match="for training alone"):
                build(configuration, runtime)
            assert build(configuration, runtime, trains=False).model.training
        monkeypatch.setattr(f"app.training.build.{name}", lambda model, *_: model)


def test_the_fewest_samples_are_those_of_the_real_shares():
    for batch in range(1, 20):
        for processes in (1, 2, 3, 5):
            for accumulation in (1, 2, 3, 7):
                found, pieces = [], micro_batches(batch, processes, accumulation)
                for index in range(processes):
                    mine = share(batch, index, processes)
                    count = mine.stop - mine.start
                    inputs = torch.zeros(max(1, count), 1)
                    whole = Batch(inputs=inputs, targets=inputs, count=count, global_count=batch)
                    parts = whole.split(pieces)
                    assert len(parts) == pieces <= accumulation  # the same for all
                    found += [len(part.inputs) for part in parts]
                assert least_samples(batch, processes, accumulation) == min(found)
    assert global_batches(17, 8, drop_last=False) == [8, 1]
    assert global_batches(17, 8, drop_last=True) == [8]
    assert global_batches(16, 8, drop_last=False) == [8]
    assert global_batches(7, 8, drop_last=False) == [7]


@pytest.mark.slow
def test_a_training_says_it_before_it_starts(tmp_path):
    place = tmp_path / "run"
    arguments = ["model.name=resnet10t", "model.arguments={}", "data.train_samples=129"]
    result = train(0, *arguments, "oialr.enabled=false", f"run.dir={place}", code=2)
    assert result.stderr.startswith(
        "error: data.drop_last: the last batch of an epoch has 1 sample "
    )
    assert "layer2.0.bn1 (BatchNorm2d)" in result.stderr
    assert not place.exists()

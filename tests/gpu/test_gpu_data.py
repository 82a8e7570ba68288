"""Data sets that are held on the device: the same batches as from the CPU, without waiting."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.gpu.accelerator import synchronization_is_an_error
from support.gpu.networks import CLASSES, Mean, relative_error, separate, training
from torch import nn

from app.data import datasets, pixels
from app.data.classification import InMemoryClassification
from app.data.datasets import Images, ImageSet
from app.training.evaluation import evaluate
from oialr.placement.processes import Processes

SAMPLES, BATCH, EPOCHS = 44, 8, 2
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_set(monkeypatch):
    random = np.random.default_rng(0)

    def part(count):
        images = random.integers(256, size=(count, 3, 16, 16), dtype=np.uint8)
        return Images(images=images, labels=random.integers(CLASSES, size=count))

    whole = ImageSet(train=part(SAMPLES), validation=part(12), test=part(10), classes=CLASSES)
    monkeypatch.setattr(datasets, "load", lambda data: whole)


def task_on(device, augmentation="none", mixup=0.0, cutmix=0.0):
    configuration = SimpleNamespace(
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(
            augmentation=augmentation, mixup=mixup, cutmix=cutmix, drop_last=False
        ),
        training=SimpleNamespace(batch_size=BATCH, accumulation=1, label_smoothing=0.1),
    )
    return InMemoryClassification(configuration, process_index=0, process_count=1, device=device)


OPTIONS = {
    "plain": {},
    "crop_flip": {"augmentation": "crop_flip"},
    "mixed": {"augmentation": "crop", "mixup": 0.4, "cutmix": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_batches_are_those_of_the_cpu(options, device):
    mine, theirs = (task_on(place, **OPTIONS[options]) for place in (device, CPU))
    for epoch in range(EPOCHS):
        pairs = zip(mine.train_batches(epoch), theirs.train_batches(epoch), strict=True)
        for batch, expected in pairs:
            assert batch.inputs.device.type == batch.targets.device.type == device.type
            # A product and a sum in float32, which a device may round once and not twice.
            torch.testing.assert_close(batch.inputs.cpu(), expected.inputs, rtol=0, atol=1e-6)
            torch.testing.assert_close(batch.targets.cpu(), expected.targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", ["plain", "crop_flip"])
def test_no_batch_waits_for_the_device(options, device, monkeypatch):
    monkeypatch.setattr(pixels, "_cut_by_numpy", pixels._cut_by_torch)  # as on a GPU
    task = task_on(device, **OPTIONS[options])
    batches = task.train_batches(0)
    next(batches)  # brings the order of the epoch to the device
    with synchronization_is_an_error(device):
        assert len(list(batches)) == task.steps_per_epoch - 1


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), Mean(2, 3), nn.Linear(16, CLASSES)
        )
    separate(model)
    return model


@pytest.mark.parametrize("options", OPTIONS)
def test_a_training_and_its_evaluation_are_those_on_the_cpu(options, device):
    results = []
    for place in (CPU, device):
        task, model = task_on(place, **OPTIONS[options]), network().to(place)
        trained = training(model)
        for epoch in range(EPOCHS):
            for batch in task.train_batches(epoch):
                trained.optimizer.zero_grad(set_to_none=True)
                loss = task.loss(model, batch)
                loss.backward()
                trained.optimizer.step()
                trained.method.step()
                trained.losses.append(loss.detach().cpu())
        results.append((trained, evaluate(model, task, "validation", Processes(), place)))
    (theirs, expected), (mine, figures) = results
    assert mine.method.ranks() == theirs.method.ranks()
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-4, atol=1e-4)
    assert relative_error(mine.weights(), theirs.weights()) < 1e-4
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert figures["accuracy"] == pytest.approx(expected["accuracy"], abs=0.1)

"""A step waits for the device nowhere, unless an event is due."""

import pytest
import torch
from support.gpu.accelerator import synchronization_is_an_error
from support.gpu.networks import NETWORKS, batches, build, input_shape, training
from torch import nn
from torch.nn import functional

from app.training.precision import Precision
from oialr.weight_average import WeightAverage

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
}


def step_counts_on_the_host(optimizer):
    """All but the fused one keep their step counts in host memory, where reading is free."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return [] if optimizer.defaults.get("fused") else counts


@pytest.mark.parametrize("precision_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_without_an_event_waits_for_nothing(name, optimizer, precision_name, size, device):
    model = build(name, size).to(device)
    trained = training(model, OPTIMIZERS[optimizer](model), delay=2, update_interval=3)
    precision = Precision(precision_name, device)
    average = WeightAverage(model, trained.optimizer, decay=0.9)
    checked = 0
    for number, (inputs, labels) in enumerate(
        trained.placed(batches(input_shape(name, size), size, 7)), start=1
    ):

        def step(inputs=inputs, labels=labels, number=number):
            trained.optimizer.zero_grad(set_to_none=True)
            with precision.autocast():
                loss = functional.cross_entropy(model(inputs), labels)
            precision.backward(loss)
            precision.step(trained.optimizer, model, clip=1.0)
            average.update(number)
            return trained.method.step(), loss.detach()

        # Full-rank, converted, and cut: the first step of each makes state and is left out.
        if number in (4, 7):
            host = step_counts_on_the_host(trained.optimizer)
            with synchronization_is_an_error(device, host):
                event, _ = step()
            assert event is None
            checked += 1
        else:
            event, _ = step()
            if event:
                trained.events[number] = event
    assert checked == 2
    assert [e.kind for e in trained.events.values()] == ["convert", "cut"]


def test_the_check_finds_what_waits(device):
    model = nn.Linear(3, 3).to(device)
    x = torch.ones(2, 3, device=device)
    with pytest.raises((RuntimeError, AssertionError)), synchronization_is_an_error(device):
        model(x).sum().item()
    with synchronization_is_an_error(device):
        model(x).sum()

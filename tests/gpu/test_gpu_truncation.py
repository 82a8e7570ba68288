"""Cuts that keep what a layer computes, on the GPU against the CPU."""

import copy

import pytest
import torch
from support.gpu.accelerator import synchronization_is_an_error
from support.gpu.networks import NETWORKS, batches, build, input_shape, relative_error, training
from torch.nn import functional

CUT = {"delay": 4, "release": 4, "update_interval": 50, "target_size": 0.6, "rank_multiple": 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_by_the_outputs_is_that_of_the_cpu(name, size, device):
    model = build(name, size, torch.float64)
    data = batches(input_shape(name, size), size, 6)
    theirs = training(copy.deepcopy(model), truncation="outputs", **CUT).run(data)
    mine = training(model.to(device), truncation="outputs", **CUT).run(data)
    assert [event.kind for event in mine.events.values()] == ["release"]
    assert mine.method.ranks() == theirs.method.ranks()
    assert relative_error(mine.weights(), theirs.weights()) < 1e-8
    assert all(parameter.device.type == device.type for parameter in mine.model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_looking_at_inputs_waits_for_nothing(autocast, size, device):
    model = build("convolution", size).to(device)
    trained = training(model, truncation="outputs", **CUT)
    data = trained.placed(batches(input_shape("convolution", size), size, 4))
    for inputs, labels in data[:3]:
        trained.step(model, inputs, labels)
    assert trained.method.watches_inputs
    trained.optimizer.zero_grad(set_to_none=True)
    inputs, labels = data[3]
    with (
        synchronization_is_an_error(device),
        torch.autocast(device.type, torch.bfloat16, enabled=autocast),
    ):
        loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()
    trained.optimizer.step()
    assert trained.method.step().kind == "release"

"""Convolutions on images that lie in memory with their channels last."""

import copy

import pytest
import torch
from support.gpu.networks import batches, build, input_shape, relative_error, training

from oialr.layers.conv import FactoredConv

LAYOUT = torch.channels_last


def placed(trained, size):
    data = trained.placed(batches(input_shape("convolution", size), size, 8))
    return [(inputs.contiguous(memory_format=LAYOUT), labels) for inputs, labels in data]


@pytest.mark.parametrize("execution", ["auto", "factored", "folded", "dense"])
def test_it_trains_like_channels_first(execution, size, device):
    model = build("convolution", size).to(device)
    first = training(copy.deepcopy(model), execution=execution)
    first.run(batches(input_shape("convolution", size), size, 8))
    last = training(model.to(memory_format=LAYOUT), execution=execution)
    for inputs, labels in placed(last, size):
        last.step(last.model, inputs, labels)
    assert [e.kind for e in last.events.values()][:2] == ["convert", "cut"]
    assert last.method.ranks() == first.method.ranks()
    # As between a GPU and the CPU: the kernels differ, and with them the order of the sums.
    assert relative_error(last.weights(), first.weights()) < 1e-4


@pytest.mark.parametrize("recompute", [False, True])
def test_the_layout_goes_through_factored_convolutions(recompute, size, device):
    model = build("convolution", size).to(device, memory_format=LAYOUT)
    trained = training(model, recompute_convolutions=recompute)
    data = placed(trained, size)
    for inputs, labels in data[:4]:
        trained.step(model, inputs, labels)
    factored = [module for module in model.modules() if isinstance(module, FactoredConv)]
    assert len(factored) == 3
    layouts = []
    for module in factored:
        module.register_forward_hook(
            lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=LAYOUT))
        )
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = model(data[0][0])
    out.sum().backward()
    assert layouts[:3] == [True] * 3

"""torch.compile with inductor over conversions and cuts: how often, and what comes out."""

import copy
from functools import partial

import pytest
import torch
from support.gpu.accelerator import skipped_graphs
from support.gpu.networks import batches, build, input_shape, training
from torch._inductor.compile_fx import compile_fx

from app.training import replicas as replicas_module
from app.training.compilation import Compiled
from app.training.replicas import Replicas
from oialr.placement.processes import Processes

STEPS = 8
# Inductor fuses what eager rounds in between; both are float32.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


class CountingInductor:
    """Inductor, and the number of graphs that it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return compile_fx(graph, inputs)


def eager_losses(model, name, size):
    trained = training(copy.deepcopy(model)).run(batches(input_shape(name, size), size, STEPS))
    return torch.stack(trained.losses)


@pytest.mark.filterwarnings("error:training.compile")
def test_it_compiles_once_at_first_and_once_after_each_change_of_shapes(size, device, monkeypatch):
    name = "linear"
    inductor = CountingInductor()
    monkeypatch.setattr(replicas_module, "Compiled", partial(Compiled, backend=inductor))
    model = build(name, size).to(device)
    expected = eager_losses(model, name, size)
    replicas = Replicas(model, Processes(), device, lambda module: None, compiled=True)
    trained = training(model)
    changes = 0
    for inputs, labels in trained.placed(batches(input_shape(name, size), size, STEPS)):
        event = trained.step(replicas.module, inputs, labels)
        if event and event.shapes_changed:
            changes += 1
            replicas.rebuild()
    # An update that changes no shape comes after the cut, and compiles nothing.
    assert [e.kind for e in trained.events.values()] == ["convert", "cut", "update", "update"]
    assert inductor.graphs == 1 + changes == 3
    torch.testing.assert_close(torch.stack(trained.losses), expected, **CLOSE)


def test_reduce_overhead_records_graphs_that_see_new_factors(size, device):
    model = build("linear", size).to(device)
    expected = eager_losses(model, "linear", size)
    trained = training(model)
    module = torch.compile(model, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for inputs, labels in trained.placed(batches(input_shape("linear", size), size, STEPS)):
        torch.compiler.cudagraph_mark_step_begin()
        event = trained.step(module, inputs, labels)
        if event and event.shapes_changed:
            model.zero_grad(set_to_none=True)  # they lie in the memory of the recorded graphs
            torch.compiler.reset()
            module = torch.compile(model, mode="reduce-overhead")
    assert [e.kind for e in trained.events.values()] == ["convert", "cut", "update", "update"]
    assert skipped_graphs() == 0
    torch.testing.assert_close(torch.stack(trained.losses), expected, **CLOSE)


@pytest.mark.filterwarnings("error:training.compile")
def test_compiled_convolutions_of_mixed_precision_follow_a_conversion(size, device):
    layout = torch.channels_last
    model = build("convolution", size).to(device, memory_format=layout)
    trained = training(model)
    data = trained.placed(batches(input_shape("convolution", size), size, 3))
    data = [(inputs.contiguous(memory_format=layout), labels) for inputs, labels in data]
    for inputs, labels in data[:2]:
        trained.step(model, inputs, labels)
    assert trained.events[2].kind == "convert"
    model.zero_grad(set_to_none=True)
    compiled = Compiled(model)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, eager = compiled(data[2][0]), model(data[2][0])
    assert out.dtype == torch.bfloat16
    # Inductor keeps float32 between what it fuses, eager rounds to 8 bits.
    torch.testing.assert_close(out.float(), eager.float(), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    trained_parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained_parameters)

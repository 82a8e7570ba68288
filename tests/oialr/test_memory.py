"""What tensors are alive: the measure itself, and what a forward pass leaves for backward."""

import gc
import weakref

import pytest
import torch
from torch import nn

from app import OIALR
from oialr.layers.registry import kind_of
from oialr.memory import TensorMemory

FLOAT = 4


def random_factors(m, n, r):
    return torch.randn(m, r), torch.randn(r, r), torch.randn(r, n)


def test_a_storage_counts_once_until_its_last_tensor_is_gone():
    here = torch.zeros(100)
    with TensorMemory([here, here[1:]]) as memory:
        assert memory.bytes == 100 * FLOAT
        made = torch.ones(50)
        view = made[10:]
        assert memory.bytes == 150 * FLOAT
        del made
        assert memory.bytes == 150 * FLOAT
        del view
        assert memory.bytes == 100 * FLOAT
        del here
        assert memory.bytes == 0
    assert memory.peak_bytes == 150 * FLOAT


@pytest.mark.slow
def test_nothing_waits_for_the_storages_that_a_finished_measure_saw():
    here = torch.zeros(100)
    with TensorMemory([here]) as memory:
        made = torch.ones(50)
    figures = memory.bytes, memory.peak_bytes
    waiting = weakref.ref(memory)
    assert figures == (150 * FLOAT, 150 * FLOAT)
    del made
    assert (memory.bytes, memory.peak_bytes) == figures  # those at the exit
    del memory
    gc.collect()
    assert waiting() is None
    TensorMemory([here])  # never entered: nothing to leave behind
    assert not any(type(thing) is TensorMemory for thing in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("measured", [False, True])
def test_events_leave_nothing_behind_and_measure_memory_on_request(measured):
    model = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 24), nn.Linear(24, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    method = OIALR(model, optimizer, delay=1, update_interval=1, measure_memory=measured)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(4, 20)).square().mean().backward()
        optimizer.step()
        event = method.step()
        assert event
        assert (event.peak_bytes is not None) == measured
    gc.collect()
    assert not any(type(thing) is TensorMemory for thing in gc.get_objects())


def twin_of(dense, factors):
    return kind_of(dense).factorize(dense, "weight", factors)[1]


def left_alive(layer, x):
    """Bytes that a forward pass leaves alive beside its output."""
    with TensorMemory([x, *layer.parameters()]) as memory:
        before = memory.bytes
        out = layer(x)
        after = memory.bytes
    assert out.requires_grad
    return after - before - out.numel() * FLOAT


@pytest.mark.parametrize("way", ["factored", "folded"])
def test_a_linear_layer_keeps_products_of_the_rank_and_not_its_input(way):
    rows, m, n, r = 300, 32, 48, 4
    layer = twin_of(nn.Linear(n, m), random_factors(m, n, r))
    layer.execution = way
    # As the output of a layer before would be: alive only as long as backward needs it.
    with TensorMemory(layer.parameters()) as memory:
        before = memory.bytes
        out = layer(torch.randn(rows, n, requires_grad=True).exp())
        kept = memory.bytes - before - out.numel() * FLOAT
    own = rows * n * FLOAT * 2  # the input's origin, and exp's own result
    assert kept - own <= rows * r * FLOAT + 2 * m * r * FLOAT


@pytest.mark.parametrize("execution", ["factored", "folded"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_that_recomputes_keeps_its_input_alone(execution, groups):
    torch.manual_seed(0)
    dense = nn.Conv2d(16, 32, 3, padding=1, groups=groups)
    stack = (groups,) if groups > 1 else ()
    factors = (
        torch.randn(*stack, 32 // groups, 6),
        torch.randn(*stack, 6, 6),
        torch.randn(*stack, 6, 144 // groups),
    )
    x = torch.randn(5, 16, 20, 20).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = {}
    for recompute in (False, True):
        layer = twin_of(dense, factors)
        layer.execution, layer.recompute = execution, recompute
        kept = left_alive(layer, x)
        out = layer(x)
        gradients = torch.autograd.grad(
            out.square().sum(), [x, layer.core, *([] if layer.bias is None else [layer.bias])]
        )
        results[recompute] = kept, out.detach(), gradients
    product = 5 * 20 * 20 * 6 * groups * FLOAT
    assert results[False][0] >= product
    assert results[True][0] < product / 10
    torch.testing.assert_close(results[True][1:], results[False][1:], rtol=0, atol=0)


def test_a_recomputing_convolution_draws_no_random_numbers_and_needs_no_gradient():
    layer = twin_of(nn.Conv2d(4, 8, 3), random_factors(8, 36, 3))
    layer.recompute = True
    state = torch.get_rng_state()
    layer(torch.ones(2, 4, 5, 5)).sum().backward()
    with torch.no_grad():
        out = layer(torch.ones(2, 4, 5, 5))
    assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), state)

"""Conversion, update and cut on the GPU against the CPU."""

import copy

import pytest
import torch
from support.gpu.networks import NETWORKS, batches, build, input_shape, relative_error, training

from oialr.convert import get_layer, to_dense
from oialr.linalg.svd import ORTHONORMAL

# In relation to the norm of a weight, after eight steps of SGD. The dtype's rounding, times the
# roots of the lengths that are summed over, comes to some 1e-6 and 1e-15 per step.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
DTYPES = list(TOLERANCE)


@pytest.fixture(params=[str(dtype) for dtype in DTYPES])
def dtype(request):
    return getattr(torch, request.param.removeprefix("torch."))


@pytest.mark.parametrize("name", NETWORKS)
def test_events_and_weights_are_those_of_the_cpu(name, dtype, size, device):
    model = build(name, size, dtype)
    data = batches(input_shape(name, size), size, 8)
    theirs = training(copy.deepcopy(model)).run(data)
    mine = training(model.to(device)).run(data)
    assert [e.kind for e in mine.events.values()] == ["convert", "cut", "update", "update"]
    assert list(mine.events) == list(theirs.events)
    for event, other in zip(mine.events.values(), theirs.events.values(), strict=True):
        assert event.kind == other.kind
        assert event.shapes_changed == other.shapes_changed
        for layer, expected in zip(event.layers, other.layers, strict=True):
            assert (layer.name, layer.rank) == (expected.name, expected.rank)
            torch.testing.assert_close(
                layer.singular_values / expected.singular_values[0],
                expected.singular_values / expected.singular_values[0],
                rtol=0,
                atol=TOLERANCE[dtype],
            )
    assert relative_error(mine.weights(), theirs.weights()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_bases_stay_orthonormal_and_everything_stays_on_the_device(name, dtype, size, device):
    trained = training(build(name, size, dtype).to(device))
    trained.run(batches(input_shape(name, size), size, 8))
    for report in trained.method.layers:
        layer = get_layer(trained.model, report.name)
        for factor in (layer.U, layer.core, layer.Vh):
            assert factor.device == device or device.index is None
            assert factor.dtype == dtype
            assert factor.is_contiguous()
        for vectors in (layer.U.double(), layer.Vh.mT.double()):
            identity = torch.eye(vectors.shape[-1], dtype=torch.float64, device=device)
            error = torch.linalg.matrix_norm(vectors.mT @ vectors - identity, 2).max()
            # Bases are products of two and three that are as orthonormal as the limit asks for.
            assert error < 4 * ORTHONORMAL[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_conversion_keeps_the_function_and_so_does_the_way_back(name, dtype, size, device):
    model = build(name, size, dtype).to(device)
    trained = training(model, delay=1)
    data = trained.placed(batches(input_shape(name, size), size, 2))
    model.eval()
    inputs = data[1][0]
    before = copy.deepcopy(model)
    trained.optimizer.param_groups[0]["lr"] = 0.0
    trained.step(model, *data[0])
    assert trained.events[1].kind == "convert"
    tolerance = {"rtol": 0, "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(model(inputs), before(inputs), **tolerance)
    low_rank = model(inputs)
    torch.testing.assert_close(to_dense(model)(inputs), low_rank, **tolerance)

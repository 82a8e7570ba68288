"""Layers after a release, whose weight is a product of two trained factors, against dense ones."""

import copy
import pickle

import pytest
import torch
from support.convolutions import KEEP, OPTIONS, convolution, pull
from torch import nn

from oialr.convert import densify_layer, factorize_layer, get_layer, to_dense
from oialr.layer_survey import survey
from oialr.layers.attention import FactoredAttention
from oialr.linalg.svd import economy_svd


def balanced(weight, report, rank=None):
    """Return A and B with A B = W, or its best approximation."""
    U, s, Vh = economy_svd(weight.detach().reshape(report.stack_shape))
    root = s[..., :rank].sqrt()
    A, B = U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]
    return A.contiguous(), B.contiguous()


def released(model, rank=None, **options):
    """Return a copy of a network whose layers are released."""
    model = copy.deepcopy(model)
    for report in survey(model, **KEEP, **options):
        if report.stays_dense is None:
            weight = model.get_parameter(report.name)
            factorize_layer(model, report.name, *balanced(weight, report, rank))
    return model


def assert_gradients(layer, G):
    """Check the gradients of A and B by that of the weight."""
    G = G.reshape(*layer.A.shape[:-1], layer.B.shape[-1])
    torch.testing.assert_close(layer.A.grad, G @ layer.B.mT)
    torch.testing.assert_close(layer.B.grad, layer.A.mT @ G)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_convolution(dimensions, options, recompute):
    layer, x = convolution(dimensions, **options)
    twin = released(nn.Sequential(layer))[0]
    twin.recompute = recompute
    torch.testing.assert_close(pull(twin, x), pull(layer, x))
    torch.testing.assert_close(twin.form_weight(), layer.weight)
    assert_gradients(twin, layer.weight.grad)
    if layer.bias is not None:
        torch.testing.assert_close(twin.bias.grad, layer.bias.grad)


@pytest.mark.parametrize("execution", ["auto", "dense"])
def test_linear(execution):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 16).double(), torch.randn(3, 5, 12).double()
    twin = released(nn.Sequential(layer))[0]
    twin.execution = execution
    torch.testing.assert_close(pull(twin, x), pull(layer, x))
    assert_gradients(twin, layer.weight.grad)
    assert list(twin.state_dict()) == ["A", "B", "bias"]


def test_a_released_layer_is_copied_pickled_and_made_dense():
    torch.manual_seed(0)
    twin = released(nn.Sequential(nn.Linear(12, 16)), rank=3)
    x = torch.randn(4, 12)
    for same in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), to_dense(released(twin))):
        torch.testing.assert_close(same(x), twin(x))
    assert twin[0].rank == 3
    assert twin[0].matrix_shape == (16, 12)
    bias = twin[0].bias
    weight = densify_layer(twin, "0.weight")
    assert type(twin[0]) is nn.Linear
    assert twin[0].weight is weight
    assert twin[0].bias is bias


@pytest.mark.parametrize("projection", ["packed", "separate"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 10}], ids=str)
def test_attention(projection, widths):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, **widths)).double()
    with torch.no_grad():
        dense[0].in_proj_bias.normal_()
    twin = released(dense, attention_projection=projection)
    q, k, v = (torch.randn(3, 5, w).double() for w in (8, *(widths or {1: 8, 2: 8}).values()))
    inputs = (q, q, q) if not widths else (q, k, v)
    for model in (dense, twin):
        model[0](*inputs, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(twin[0](*inputs), dense[0](*inputs))
    reports = [r for r in survey(dense, **KEEP, attention_projection=projection)]
    assert len(reports) == (4 if widths else 2)
    for report in reports:
        assert_gradients(get_layer(twin, report.name), dense.get_parameter(report.name).grad)
    # Some of the projections are made dense again.
    name = reports[0].name
    expected = twin[0](*inputs)
    weight = densify_layer(twin, name)
    assert twin.get_parameter(name) is weight
    assert type(twin[0]) is FactoredAttention
    torch.testing.assert_close(twin[0](*inputs), expected)
    assert next(n for n, _ in twin.named_parameters()) == name


def test_inputs_that_differ_meet_their_own_rows_of_a():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    twin = released(dense)
    q, k = torch.randn(2, 3, 5, 8).double()
    torch.testing.assert_close(twin[0](q, k, k), dense[0](q, k, k))

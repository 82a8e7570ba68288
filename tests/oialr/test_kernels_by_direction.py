"""Kernels that are read by their directions, against the dense convolution and a plain formula."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from oialr import OIALR, StabilityTracker, load, prepare, save, survey
from oialr.layers.reading import MatrixReading
from oialr.layers.registry import kind_of
from oialr.linalg.svd import economy_svd
from oialr.options import Selection

SPATIAL = Selection(convolutions="spatial")
GEOMETRIES = {
    "strides": {"kernel_size": 3, "stride": (2, 1), "padding": 1},
    "dilation": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (0, 2), "bias": False},
    "same": {"kernel_size": (5, 3), "padding": "same"},
    "valid": {"kernel_size": (2, 5), "padding": "valid", "stride": (1, 3)},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    "circular": {"kernel_size": (5, 3), "padding": 1, "padding_mode": "circular"},
}


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def dense(request):
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, **request.param).double()


def factors_of(layer, rank=None):
    """Return U, core and Vh of the kernel's matrix, by a plain loop over its numbers."""
    o, i, h, w = layer.weight.shape
    matrix = torch.zeros(o * h, i * w, dtype=torch.float64)
    for a in range(o):
        for b in range(i):
            for y in range(h):
                for x in range(w):
                    matrix[a * h + y, b * w + x] = layer.weight[a, b, y, x]
    U, s, Vh = economy_svd(matrix)
    return U[:, :rank].contiguous(), torch.diag(s[:rank]), Vh[:rank].contiguous()


@pytest.mark.parametrize("execution", ["auto", "factored", "folded", "dense"])
def test_a_twin_equals_its_dense_layer(dense, execution):
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    U, core, Vh = factors_of(dense)
    _, twin = kind_of(dense).factorize(copy.deepcopy(dense), "weight", (U, core, Vh))
    twin.execution = execution
    assert twin.reading == kind_of(dense).reading(dense, "weight", SPATIAL)
    torch.testing.assert_close(twin.weight, dense.weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin(x), dense(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(twin(x[0]), dense(x[0]), rtol=1e-11, atol=1e-11)
    for layer in (twin, dense):
        layer(x).square().sum().backward()
    G = twin.reading.to_matrix(dense.weight.grad)
    torch.testing.assert_close(twin.core.grad, U.mT @ G @ Vh.mT, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("execution", ["factored", "folded"])
def test_a_twin_learns_in_channels_last(dense, execution):
    """torch's own convolution, in float64 or without oneDNN, refused the kernel's strides."""
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    U, core, Vh = factors_of(dense)
    for factors in ((U, core, Vh), (U @ core, Vh)):
        _, twin = kind_of(dense).factorize(copy.deepcopy(dense), "weight", factors)
        twin.execution = execution
        twin(x).square().sum().backward()
        found = [parameter.grad for parameter in twin.parameters() if parameter.requires_grad]
        twin.zero_grad()
        twin(x.contiguous()).square().sum().backward()
        expected = [parameter.grad for parameter in twin.parameters() if parameter.requires_grad]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_a_released_twin_and_two_plain_layers_equal_the_weight_that_they_hold(dense):
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    U, core, Vh = factors_of(dense, rank=5)
    _, frozen = kind_of(dense).factorize(copy.deepcopy(dense), "weight", (U, core, Vh))
    _, twin = kind_of(dense).factorize(copy.deepcopy(dense), "weight", (U @ core, Vh))
    cut = twin.to_dense()
    torch.testing.assert_close(twin(x), cut(x), rtol=1e-11, atol=1e-11)
    for layer in (twin, frozen):
        pair = layer.plain_pair()
        assert [type(part) for part in pair] == [nn.Conv2d] * 2
        assert [part.kernel_size for part in pair] == [
            (1, dense.kernel_size[1]),
            (dense.kernel_size[0], 1),
        ]
        torch.testing.assert_close(pair(x), cut(x), rtol=1e-11, atol=1e-11)
    for layer in (twin, cut):
        layer(x).square().sum().backward()
    G = twin.reading.to_matrix(cut.weight.grad)
    torch.testing.assert_close(twin.A.grad, G @ twin.B.mT, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(twin.B.grad, twin.A.mT @ G, rtol=1e-10, atol=1e-9)


def test_a_kernel_of_rank_one_is_a_column_times_a_row():
    """Filters such as Sobel's, which are separable, have one singular value."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    column, row = torch.tensor([1.0, 2, 1]).double(), torch.tensor([-1.0, 0, 1]).double()
    layer.weight.data.copy_(torch.outer(column, row))
    s = torch.linalg.svdvals(
        kind_of(layer).reading(layer, "weight", SPATIAL).to_matrix(layer.weight)
    )
    assert (s[1:] < 1e-12 * s[0]).all()
    _, twin = kind_of(layer).factorize(layer, "weight", (column[:, None], row[None]))
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    expected = conv2d(
        conv2d(x, row.view(1, 1, 1, 3), padding=(0, 1)), column.view(1, 1, 3, 1), padding=(1, 0)
    )
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, (1, 3)),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv1d(4, 6, 3),
        nn.Conv3d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Linear(4, 6),
    ],
    ids=str,
)
def test_other_kernels_are_read_by_the_rule(layer):
    reading = kind_of(layer).reading(layer, "weight", SPATIAL)
    assert reading == kind_of(layer).reading(layer, "weight")
    assert not reading.is_by_direction


def test_both_readings_lead_to_each_other():
    rule = MatrixReading((6, 4, 3, 2), separable=True)
    other = rule.by_direction()
    assert (rule.matrix_shape, other.matrix_shape) == ((6, 24), (18, 8))
    assert other.by_direction(False) == rule
    assert (rule.is_by_direction, other.is_by_direction) == (False, True)
    weight = torch.randn(6, 4, 3, 2)
    assert torch.equal(other.to_weight(other.to_matrix(weight)), weight)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 4),
    ).double()


def trained(model, steps=6, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    common = {"delay": 2, "update_interval": 2, "layer_fraction": 1, "rank_multiple": 1}
    method = OIALR(model, optimizer, **{**common, "cutoff": 0.5, **options})
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        method.step()
    return optimizer, method


@pytest.mark.parametrize(
    "options", [{}, {"release": 4, "target_size": 0.7}], ids=["cores", "factors"]
)
def test_weights_tell_how_they_are_read(tmp_path, options):
    model = network()
    trained(model, convolutions="spatial", **options)
    assert model[2].reading.is_by_direction
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    other = prepare(network())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    save(model, tmp_path / "weights")
    third = network()
    load(third, tmp_path / "weights")
    assert torch.equal(third(x), model(x))
    assert third[2].reading == model[2].reading


def test_weights_of_the_other_reading_are_refused():
    model = network()
    trained(model, convolutions="spatial")
    other = network()
    _, its_method = trained(other, steps=0, convolutions="matrix")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="attention_projection or convolutions differ"):
        other.load_state_dict(model.state_dict())
    assert before.keys() == other.state_dict().keys()
    assert its_method.ranks() == {"0.weight": 8, "2.weight": 8}  # full, of (8, 27) and (8, 72)


def test_a_state_of_the_other_reading_is_refused():
    _, method = trained(network(), convolutions="spatial")
    _, early = trained(network(), steps=1, convolutions="spatial")  # with windows, or none
    other = network()
    _, its_method = trained(other, steps=0)
    before = copy.deepcopy(other.state_dict())
    for state in (method.state_dict(), early.state_dict()):
        with pytest.raises(ValueError, match=r"convolutions: cannot change from spatial to matrix"):
            its_method.load_state_dict(state)
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_stability_is_that_of_the_bases_that_are_there():
    model = network()
    _, method = trained(model, convolutions="spatial")
    rows = StabilityTracker(model, convolutions="spatial").measure()
    ranks = {row.name: row.rank for row in rows if row.name in method.ranks()}
    assert ranks == method.ranks()
    assert all(row.orthonormality_error < 1e-12 for row in rows if row.name in ranks)


def test_the_survey_tells_the_shape_of_the_matrix():
    shapes = {r.name: r.matrix_shape for r in survey(network(), convolutions="spatial")}
    assert shapes == {"0.weight": (24, 9), "2.weight": (24, 24), "4.weight": (4, 128)}
    assert {r.name: r.shape for r in survey(network(), convolutions="spatial")} == {
        r.name: r.shape for r in survey(network())
    }

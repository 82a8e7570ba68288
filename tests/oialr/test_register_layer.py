"""The layer of docs/layers.md, registered from outside the package, through the whole method."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import oialr
from app.recording.store import Follower, read_rows
from app.training.recorder import Recorder
from oialr.layer_survey import parameter_counts
from oialr.layers import registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "layers.md"


@pytest.fixture(scope="module")
def page():
    """Run the page's program; what it registers is forgotten afterwards."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_adapters", dict(registry._adapters))
        exec(program, names)
        yield names


def make(page, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        page["HeadProjection"](20, 4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    options = {"delay": 3, "update_interval": 2, "layer_fraction": 1, "rank_multiple": 1} | options
    return model, optimizer, oialr.OIALR(model, optimizer, **options)


def train(model, optimizer, method, steps):
    events = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(method.step_count)
        x = torch.randn(16, 20, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        events.append(method.step())
    return [event.kind for event in events if event]


def test_its_spectrum_is_recorded(page, tmp_path):
    """It has 20 singular values, where a weight (4, 20, 6) that is read by the rule has 4."""
    model, optimizer, method = make(page, delay=1, measure_memory=True)
    path = tmp_path / "metrics.h5"
    recorder = Recorder.create(path, configuration="", layers=method.survey, figures=["accuracy"])
    model(torch.ones(2, 20, dtype=torch.float64)).sum().backward()
    optimizer.step()
    shares = {"trainable_percent": 1.0, "compression_percent": 1.0, "gradient_bytes": 0}
    recorder.event(method.step(), model=model, **shares)
    recorder.close()
    spectrum = read_rows(path, "layers/0.weight/spectrum")["singular_values"]
    assert spectrum.shape == (1, 20)
    assert np.isfinite(spectrum).all()
    (layer,) = [layer for layer in Follower(path).layers() if layer.name == "0.weight"]
    assert layer.full_rank == 20


RELEASED = {"release": 9, "retained_energy": 0.7, "largest_cut": 0.9}


def test_it_is_surveyed_and_measured_by_its_own_reading(page):
    model, _, method = make(page)
    report, scale, _ = method.survey
    assert (report.name, report.matrix_shape, report.stays_dense) == ("0.weight", (20, 24), None)
    assert scale.stays_dense == "scale of page.HeadProjection is never factorized"
    rows = oialr.StabilityTracker(model, window=1).measure()
    row = next(row for row in rows if row.name == report.name)
    matrix = model[0].weight.transpose(0, 1).reshape(20, 24)
    torch.testing.assert_close(row.singular_values, torch.linalg.svdvals(matrix.detach()))
    model[0].register_forward_hook(lambda *_: None)
    assert "hooks" in oialr.survey(model)[0].stays_dense


def test_a_parameter_with_the_name_of_a_factor_is_an_obstacle(page):
    class Named(page["HeadProjection"]):
        pass

    class Adapter(page["HeadProjectionAdapter"]):
        dense_types = (Named,)

        def attributes(self, kind):
            return super().attributes(page["HeadProjection"]) | {"A"}

    oialr.register_layer(Adapter())
    layer = Named(20, 4, 6)
    layer.A = nn.Parameter(torch.ones(2))
    report = oialr.survey(nn.Sequential(layer, nn.Linear(6, 3)))[0]
    assert report.stays_dense == "its parameter A has the name of a factor"


def test_its_momentum_follows_exactly(page):
    model, optimizer, method = make(page)
    dense, dense_optimizer, other = make(page, delay=100)
    train(model, optimizer, method, 3)
    train(dense, dense_optimizer, other, 3)
    layer, weight = model[0], dense[0].weight
    torch.testing.assert_close(layer.form_weight(), weight)
    assert isinstance(layer, page["HeadProjection"])
    M = dense_optimizer.state[weight]["momentum_buffer"].transpose(0, 1).reshape(20, 24)
    moved = optimizer.state[layer.core]["momentum_buffer"]
    torch.testing.assert_close(moved, layer.U.T @ M @ layer.Vh.T)


@pytest.mark.slow
def test_it_is_trained_through_conversion_cut_and_release(page):
    model, optimizer, method = make(page, **RELEASED)
    stored, scale = parameter_counts(model)[1], model[0].scale
    assert train(model, optimizer, method, 3) == ["convert"]
    assert "cut" in train(model, optimizer, method, 5)
    assert train(model, optimizer, method, 4) == ["release"]
    assert model[0].released
    assert model[0].scale is scale
    assert parameter_counts(model)[1] < stored
    x = torch.randn(5, 20, dtype=torch.float64)
    expected = model(x)
    oialr.to_dense(model)
    assert type(model[0]) is page["HeadProjection"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 6, 10])
def test_a_checkpoint_of_it_is_loaded(page, steps):
    model, optimizer, method = make(page, **RELEASED)
    train(model, optimizer, method, steps)
    saved = copy.deepcopy([part.state_dict() for part in (method, model, optimizer)])
    train(model, optimizer, method, 4)
    other, other_optimizer, other_method = make(page, **RELEASED)
    for part, state in zip((other_method, other, other_optimizer), saved, strict=True):
        part.load_state_dict(state)
    train(other, other_optimizer, other_method, 4)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_type_has_one_adapter(page):
    with pytest.raises(ValueError, match=r"page\.HeadProjection has an adapter already"):
        oialr.register_layer(page["HeadProjectionAdapter"]())

    class Again(oialr.LayerAdapter):
        name = "again"
        dense_types = ("torch.nn.modules.linear.Linear",)

    with pytest.raises(ValueError, match=r"that of nn\.Linear"):
        oialr.register_layer(Again())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": (0, 0, 1)}, "no permutation"),
        ({"row_dimensions": 3}, "row_dimensions"),
        ({"groups": 3}, "4 rows cannot be parted into 3"),
    ],
)
def test_a_reading_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        oialr.MatrixReading((4, 5, 6), **options)


def test_a_reading_of_several_row_dimensions_and_groups():
    weight = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    reading = oialr.MatrixReading((2, 3, 4, 5), groups=2, order=(2, 0, 3, 1), row_dimensions=2)
    matrix = reading.to_matrix(weight)
    assert matrix.shape == (2, 4, 15)
    assert torch.equal(matrix[1, 2], weight[0, :, 3].T.flatten())
    assert torch.equal(reading.to_weight(matrix), weight)

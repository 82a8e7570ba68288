"""Every kind of layers through the whole method: what its adapter says is held against torch."""

import copy
import inspect
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from support.kinds import (
    CASES,
    DELAY,
    Conv1D,
    batch_for,
    dense_layer,
    make,
    reading_of,
    train,
    twin_of,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app.training.layer_table import explain, rows_per_sample
from oialr import Processes
from oialr.allocation import stored_parameters
from oialr.convert import to_dense
from oialr.layer_survey import parameter_counts, survey
from oialr.layers.base import FactoredLayer
from oialr.layers.registry import kind_of
from oialr.linalg.svd import economy_svd
from oialr.stability.tracker import BasisTracker


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def pull(layer, x):
    """Return output and input gradient of a layer, after a backward of fixed weights."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    out = layer(x)
    generator = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    return [out.detach()] if x.grad is None else [out.detach(), x.grad]


def test_a_twin_is_called_by_the_names_of_its_dense_layer(case):
    layer = dense_layer(case)
    twin = twin_of(copy.deepcopy(layer), case)
    names, own = (list(inspect.signature(each.forward).parameters) for each in (layer, twin))
    assert own == names


def others(layer):
    """Parameters that are neither weight nor factors."""
    names = {"weight", "U", "core", "Vh", "A", "B"}
    return {k: p.grad for k, p in layer.named_parameters() if k not in names}


@pytest.mark.parametrize("execution", ["auto", "factored", "folded", "dense"])
def test_a_twin_equals_its_dense_layer(case, execution):
    layer, x = dense_layer(case), batch_for(case)
    twin = twin_of(copy.deepcopy(layer), case)
    twin.execution = execution
    torch.testing.assert_close(pull(twin, x), pull(layer, x))
    torch.testing.assert_close(twin.form_weight(), layer.weight)
    G = reading_of(layer, case).to_matrix(layer.weight.grad)
    torch.testing.assert_close(twin.core.grad, twin.U.mT @ G @ twin.Vh.mT)
    assert twin.U.grad is None
    assert twin.Vh.grad is None
    torch.testing.assert_close(others(twin), others(layer))


@pytest.mark.parametrize("execution", ["auto", "dense"])
def test_a_released_twin_equals_its_dense_layer(case, execution):
    layer, x = dense_layer(case), batch_for(case)
    twin = twin_of(copy.deepcopy(layer), case, released=True)
    twin.execution = execution
    torch.testing.assert_close(pull(twin, x), pull(layer, x))
    G = reading_of(layer, case).to_matrix(layer.weight.grad)
    torch.testing.assert_close(twin.A.grad, G @ twin.B.mT)
    torch.testing.assert_close(twin.B.grad, twin.A.mT @ G)
    torch.testing.assert_close(others(twin), others(layer))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("size", [[10, 8], [11, 9], [6, 8, 11, 8]])
def test_a_transposed_convolution_takes_the_size_of_its_output(size, released):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(12, 8, 3, stride=2, groups=2, padding=1).double()
    x = torch.randn(6, 12, 6, 5, dtype=torch.float64)
    twin = twin_of(layer, case, released=released)
    size = [*size[:-2], size[-2] + 1, size[-1] + 1]
    torch.testing.assert_close(twin(x, size), layer(x, output_size=size))
    torch.testing.assert_close(twin(x[0], output_size=size[-2:]), layer(x[0], size[-2:]))
    with pytest.raises(ValueError, match="requested an output size"):
        twin(x, [40, 40])


def test_a_transposed_convolution_keeps_channels_last():
    layer = nn.ConvTranspose2d(12, 8, 3, stride=2)
    x = torch.randn(2, 12, 6, 5).to(memory_format=torch.channels_last)
    y = twin_of(layer, case)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("released", [False, True])
def test_copies_pickles_and_the_way_back(case, released, monkeypatch):
    for name in ("transformers", "transformers.pytorch_utils"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Conv1D=Conv1D))
    layer, x = dense_layer(case), batch_for(case)
    twin = twin_of(layer, case, rank=2, released=released).eval()
    expected = twin(x)
    assert isinstance(twin, type(layer))
    dense = twin.to_dense()
    for same in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), dense):
        torch.testing.assert_close(same(x), expected)
        assert not same.training
    assert type(dense) is type(layer)
    assert repr(dense) == repr(layer)
    assert list(dense.state_dict()) == list(layer.state_dict())
    assert "rank=2" in str(twin)
    with pytest.raises(RuntimeError, match="formed anew"):
        twin.weight.zero_()


def test_a_reading_puts_back_what_it_took(case):
    layer = dense_layer(case)
    reading = reading_of(layer, case)
    matrix = reading.to_matrix(layer.weight)
    assert tuple(matrix.shape) == reading.stack_shape
    assert torch.equal(reading.to_weight(matrix), layer.weight)


@pytest.mark.parametrize("released", [False, True])
def test_linear_state_is_carried_exactly_at_the_conversion(case, released):
    options = {"release": DELAY, "retained_energy": 0.5, "largest_cut": 0.9} if released else {}
    model, optimizer, method = make(case, "momentum", **options)
    dense, dense_optimizer, _ = make(case, "momentum", **options)
    train(case, model, optimizer, method, DELAY)
    train(case, dense, dense_optimizer, None, DELAY)
    layer, weight = model[0], dense[0].weight
    assert isinstance(layer, FactoredLayer)
    reading = reading_of(dense[0], case)
    M = reading.to_matrix(dense_optimizer.state[weight]["momentum_buffer"])
    G = reading.to_matrix(weight.grad)
    if released:
        assert layer.released
        moved = {layer.A: lambda T: T @ layer.B.mT, layer.B: lambda T: layer.A.mT @ T}
    else:
        torch.testing.assert_close(layer.form_weight(), weight)
        moved = {layer.core: lambda T: layer.U.mT @ T @ layer.Vh.mT}
    for parameter, expected in moved.items():
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], expected(M))
        torch.testing.assert_close(parameter.grad, expected(G))


def test_a_layer_that_a_release_makes_dense_again_has_its_momentum_back(case):
    """All that the core saw, U M Vh, in the shape of the weight."""
    model, optimizer, method = make(case, "momentum", cutoff=1e-9, release=DELAY + 2)
    train(case, model, optimizer, method, DELAY + 1)
    other, other_optimizer, _ = copy.deepcopy((model, optimizer, None))
    train(case, model, optimizer, method, 1, first=DELAY + 1)
    train(case, other, other_optimizer, None, 1, first=DELAY + 1)
    twin = other[0]
    expected = reading_of(model[0], case).to_weight(
        twin.U @ other_optimizer.state[twin.core]["momentum_buffer"] @ twin.Vh
    )
    torch.testing.assert_close(model[0].weight, twin.form_weight())
    state = optimizer.state[model[0].weight]
    torch.testing.assert_close(state["momentum_buffer"], expected)


def test_sgd_with_momentum_does_not_feel_a_rotation(case):
    runs = []
    for interval in (2, 10**6):
        model, optimizer, method = make(case, "momentum", cutoff=1e-9, update_interval=interval)
        events = train(case, model, optimizer, method, 8)
        assert len(events) == (3 if interval == 2 else 1)
        runs.append(model[0].form_weight())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


def test_the_first_step_after_a_conversion_is_no_larger_than_the_full_rank_step(case):
    model, optimizer, method = make(case, delay=10)
    dense, dense_optimizer, _ = make(case, delay=10)
    train(case, model, optimizer, method, 10)
    train(case, dense, dense_optimizer, None, 10)
    before = dense[0].weight.detach().clone()
    train(case, model, optimizer, None, 1, first=10)
    train(case, dense, dense_optimizer, None, 1, first=10)
    full = torch.linalg.vector_norm(dense[0].weight - before)
    low = torch.linalg.vector_norm(model[0].form_weight() - before)
    assert 0 < low <= full * 1.0001


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 6, 12])
def test_a_resumed_training_is_the_same_over_cuts_and_release(case, steps):
    options = {"release": 9, "retained_energy": 0.6, "largest_cut": 0.9}
    model, optimizer, method = make(case, **options)
    train(case, model, optimizer, method, steps)
    saved = copy.deepcopy((method.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(case, model, optimizer, method, 14 - steps, first=steps)
    assert method.ranks()["0.weight"] < method.layers[0].full_rank
    other, other_optimizer, other_method = make(case, **options)
    for part, state in zip((other_method, other, other_optimizer), saved, strict=True):
        part.load_state_dict(state)
    train(case, other, other_optimizer, other_method, 14 - steps, first=steps)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    x = batch_for(case, 99)
    expected = model(x)
    torch.testing.assert_close(to_dense(model)(x), expected)
    assert type(model[0]) is type(dense_layer(case))


@pytest.mark.slow
def test_the_stability_is_that_of_the_matrices(case):
    model, optimizer, method = make(case, cutoff=0.6)
    tracker = BasisTracker(method.survey, Processes(), window=1)
    reading, bases = reading_of(model[0], case), []
    for time, steps in enumerate((0, DELAY + 3)):
        train(case, model, optimizer, method, steps)
        row = tracker.measure(model, time)[0]
        U, _, Vh = economy_svd(reading.to_matrix(model[0].weight.detach() * 1))
        r = row.rank
        bases.append(U[..., :r] @ Vh[..., :r, :])
    assert row.rank == method.ranks()["0.weight"] < min(reading.matrix_shape)
    stability = (bases[0] * bases[1]).sum() / (reading.groups * row.rank)
    assert row.stability == pytest.approx(float(stability))
    assert row.averaged == kind_of(dense_layer(case)).is_linear_map


@pytest.mark.slow
@pytest.mark.parametrize("release", [None, 8])
def test_a_target_size_is_met(case, release):
    # Between the smallest ranks that save anything and the whole.
    model, optimizer, method = make(case, target_size=0.75, largest_cut=0.9, release=release)
    stored = parameter_counts(model)[1]
    train(case, model, optimizer, method, 12)
    assert parameter_counts(model)[1] <= 0.75 * stored
    assert method.missed_target() is None
    rank = method.ranks()["0.weight"]
    shape = method.layers[0].stack_shape
    factors = sum(factor.numel() for factor in model[0].factors)
    assert factors == stored_parameters(shape, rank, has_core=release is None)


@pytest.mark.parametrize("way", ["factored", "folded", "dense"])
def test_rows_and_costs_are_those_that_torch_counts(case, way):
    model, _, method = make(case)
    x = batch_for(case)
    rows = rows_per_sample(model, method.layers, lambda: model(x), 1)["0.weight"]
    layer = dense_layer(case)
    adapter, reading = kind_of(layer), reading_of(layer, case)
    (m, n), r = reading.matrix_shape, 2
    twin = twin_of(layer, case, rank=r)
    twin.execution = way
    counted = adapter.multiply_adds(way, rows=rows, m=m, n=n, r=r) * reading.groups
    whole = adapter.full_rank_multiply_adds(rows=rows, m=m, n=n) * reading.groups
    # torch counts the backward of groups otherwise than it is computed, and no additions.
    if reading.groups == 1 and case != "Embedding":
        assert multiply_adds(twin, x) == pytest.approx(counted)
        assert multiply_adds(layer, x) == pytest.approx(whole)
    table = explain(method.layers, {"0.weight": rows}, 1, {"0.weight": r}, way)
    line = table.splitlines()[1]  # below it a total and a legend
    assert line.split()[2:] == [str(rows), str(r), way, f"{counted / whole:.2f}"]


def test_what_an_embedding_multiplies_is_what_torch_counts():
    case, r = "Embedding", 2
    layer, x = dense_layer(case), batch_for(case)
    twin, sizes = twin_of(layer, case, rank=r), {"rows": x.numel(), "m": 30, "n": 12}
    additions = kind_of(layer).full_rank_multiply_adds(**sizes)
    assert multiply_adds(layer, x) == 0
    for way, added in (("factored", 0), ("folded", 0), ("dense", additions)):
        twin.execution = way
        counted = kind_of(layer).multiply_adds(way, **sizes, r=r)
        assert multiply_adds(twin, x) == counted - added
    released = twin_of(layer, case, rank=r, released=True)
    assert multiply_adds(released, x) == kind_of(layer).released_multiply_adds(**sizes, r=r)
    # Few rows are looked up first; for many of a small table it is cheaper to form the table.
    ways = [twin.cheapest_way(rows, 30, 12, 6) for rows in (1, 10**6)]
    assert ways == ["factored", "dense"]


def embedding_reasons(**options):
    model = nn.ModuleDict(
        {
            "plain": nn.Embedding(16, 16),
            "capped": nn.Embedding(16, 16, max_norm=1.0),
            "sparse": nn.Embedding(16, 16, sparse=True),
            "scaled": nn.Embedding(16, 16, scale_grad_by_freq=True),
            "tied": nn.Embedding(16, 16),
            "hidden": nn.Linear(16, 16),
            "head": nn.Linear(16, 16, bias=False),
        }
    )
    model["head"].weight = model["tied"].weight
    return {
        report.name.removesuffix(".weight"): report.stays_dense
        for report in survey(model, keep_last_layer=False, **options)
    }


def test_embeddings_are_factorized_on_request_and_others_are_refused_by_name():
    off = embedding_reasons()
    assert off["plain"].endswith("Embedding is never factorized without include_embeddings")
    on = embedding_reasons(include_embeddings=True)
    assert on["plain"] is None
    for name, reason in {"capped": "max_norm", "sparse": "sparse", "tied": "tied"}.items():
        assert on[name].startswith(reason)
    assert on["scaled"].startswith("scale_grad_by_freq")
    first = embedding_reasons(include_embeddings=True, keep_first_layer=True)
    assert first["plain"] == "the network's first layer (keep_first_layer)"


@pytest.mark.parametrize("way", ["factored", "folded", "dense", "released"])
def test_rows_of_an_embedding_have_the_dtype_of_its_weight_under_autocast(way):
    """Those of nn.Embedding do; the sums that begin with them would be of half precision."""
    layer = dense_layer("Embedding").float()
    twin = twin_of(layer, "Embedding", 4).float()
    twin.execution = "auto" if way == "released" else way
    if way == "released":
        twin.set_factors(*twin.pair())
    with torch.autocast("cpu", torch.bfloat16):
        rows = [module(batch_for("Embedding")) for module in (layer, twin)]
    assert rows[0].dtype == rows[1].dtype == torch.float32


def test_an_embedding_that_is_deferred_waits_for_the_release():
    model, optimizer, method = make(
        "Embedding", defer_conversion=True, release=8, retained_energy=0.5, largest_cut=0.9
    )
    train("Embedding", model, optimizer, method, 7)
    assert type(model[0]) is nn.Embedding
    train("Embedding", model, optimizer, method, 1, first=7)
    assert isinstance(model[0], FactoredLayer)


def multiply_adds(layer, x):
    """Return torch's count of multiply-adds of forward and backward."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() / 2

"""Frozen bases in bfloat16: what is stored, what is computed with, and what events make of it."""

import copy

import pytest
import torch
from support import kinds
from support.method_loop import CUT, make, network, train
from torch import nn

import oialr
from oialr import OIALR, Options
from oialr.convert import get_layer
from oialr.layers.base import FactoredLayer
from oialr.linalg.svd import orthonormality_error, orthonormalized

LOW = torch.bfloat16
NAMES = ("0.weight", "2.weight")


def low_rank(model):
    return [module for module in model.modules() if isinstance(module, FactoredLayer)]


def errors(model):
    """Of each frozen factor, how far it is from orthonormal."""
    layers = [layer for layer in low_rank(model) if not layer.released]
    return [orthonormality_error(x.double()) for f in layers for x in (f.U, f.Vh.mT)]


def formed(model):
    return [get_layer(model, name).weight.detach().clone() for name in NAMES]


@pytest.mark.parametrize("execution", ["factored", "folded", "dense"])
@pytest.mark.parametrize("case", kinds.CASES)
def test_a_layer_computes_in_the_dtype_of_its_core(case, execution):
    dense = kinds.dense_layer(case)
    twin = kinds.twin_of(dense, case, 4)
    twin.execution = execution
    twin.store_frozen(LOW)
    exact = copy.deepcopy(twin)
    exact.store_frozen(None)
    assert (twin.U.dtype, twin.Vh.dtype, twin.core.dtype) == (LOW, LOW, torch.float64)
    x = kinds.batch_for(case)
    for layer in (twin, exact):
        layer(x).square().sum().backward()
    assert torch.equal(twin(x), exact(x))
    assert torch.equal(twin.core.grad, exact.core.grad)
    assert twin.weight.dtype == torch.float64


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["Linear", "Conv2d", "ConvTranspose2d", "Embedding", "attention"])
def test_a_layer_runs_under_autocast(case, low):
    if case == "attention":
        torch.manual_seed(0)
        model = nn.MultiheadAttention(16, 2, batch_first=True)
        for name in ("in_proj_weight",):
            U, s, Vh = torch.linalg.svd(model.get_parameter(name).detach(), full_matrices=False)
            model = oialr.layers.attention.FactoredAttention.from_dense(model)
            model.factorize(name, U[:, :4], s[:4].diag(), Vh[:4])
        x = torch.randn(2, 3, 16)

        def call():
            return model(x, x.flip(0), x, need_weights=False)[0]

    else:
        model = kinds.twin_of(kinds.dense_layer(case), case, 4).float()
        x = kinds.batch_for(case)
        x = x.float() if x.is_floating_point() else x

        def call():
            return model(x)

    exact = call()
    for layer in low_rank(model):
        layer.store_frozen(LOW)
    with torch.autocast("cpu", low):
        out = call()
    out.float().sum().backward()
    assert (out - exact).norm() < 2e-2 * exact.norm()
    assert all(layer.core.grad.dtype == torch.float32 for layer in low_rank(model))


def test_events_store_rounded_bases_and_compute_as_the_weights_do():
    model, optimizer, method = make(frozen_dtype="bfloat16", cutoff=1e-9, layer_fraction=1)
    train(model, optimizer, method, 4)
    before = formed(model)
    optimizer.step()  # the conversion follows, of weights that this step has moved a little
    before = formed(model)
    assert method.step().kind == "convert"
    for layer, weight in zip(low_rank(model), before, strict=True):
        assert (layer.U.dtype, layer.Vh.dtype, layer.core.dtype) == (LOW, LOW, torch.float64)
        assert not layer.U.requires_grad
        # Each factor is rounded by 2^-8 at most, and by less than half of that in the mean.
        assert (layer.weight - weight).norm() < 2**-8 * weight.norm()
    after = errors(model)
    objects = [layer.U for layer in low_rank(model)]
    train(model, optimizer, method, 60, first=5)  # 20 updates
    assert all(a is layer.U for a, layer in zip(objects, low_rank(model), strict=True))
    assert max(errors(model)) < 2 * max(after) < 2 * 2**-7  # no drift


@pytest.mark.slow
def test_an_update_works_with_the_weight_as_it_is():
    """Its singular values are those of the weight, and only rounding changes it."""
    model, optimizer, method = make(frozen_dtype="bfloat16", layer_fraction=1, cutoff=0.3)
    train(model, optimizer, method, 7)
    optimizer.step()
    before = formed(model)
    event = method.step()
    assert event.kind == "cut"
    for row, weight, layer in zip(event.layers, before, low_rank(model), strict=True):
        s = torch.linalg.svdvals(weight)
        torch.testing.assert_close(row.singular_values, s[: row.previous_rank])
        assert layer.core.dtype == torch.float64
        torch.testing.assert_close(layer.core.detach().diagonal(), s[: row.rank])
        lost = s[row.rank :].square().sum().sqrt()
        assert (layer.weight - weight).norm() < lost + 2**-8 * weight.norm()


@pytest.mark.slow
def test_a_release_trains_factors_in_full_precision_and_changes_no_weight():
    options = {"cutoff": 1e-9, "largest_cut": 0.1, "minimum_rank_fraction": 0.1}
    model, optimizer, method = make(frozen_dtype="bfloat16", release=11, **options)
    train(model, optimizer, method, 10)
    optimizer.step()
    before = formed(model)
    assert method.step().kind == "release"
    for weight, now in zip(before, formed(model), strict=True):
        torch.testing.assert_close(now, weight, rtol=1e-9, atol=1e-11)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.slow
@pytest.mark.parametrize("method_first", [True, False])
@pytest.mark.parametrize("steps", [5, 7, 12, 16])
def test_a_resumed_training_goes_on_bit_for_bit(steps, method_first):
    options = {"frozen_dtype": "bfloat16", "release": 14, **CUT}
    model, optimizer, method = make(**options)
    train(model, optimizer, method, steps)
    state = copy.deepcopy([x.state_dict() for x in (model, method, optimizer)])
    train(model, optimizer, method, 8, first=steps)
    other, its_optimizer, its_method = make(seed=1, **options)
    order = [its_method, other] if method_first else [other, its_method]
    for thing in (*order, its_optimizer):
        thing.load_state_dict(state[{other: 0, its_method: 1}.get(thing, 2)])
    dtypes = [parameter.dtype for parameter in other.parameters()]
    assert (LOW in dtypes) == (steps < 14)
    train(other, its_optimizer, its_method, 8, first=steps)
    expected = model.state_dict()
    assert other.state_dict().keys() == expected.keys()
    for name, value in other.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_files_hold_half_the_bytes_and_come_back_as_they_were(tmp_path):
    model, optimizer, method = make(frozen_dtype="bfloat16", **CUT)
    train(model, optimizer, method, 12)
    oialr.save(model, tmp_path / "network.safetensors")
    other = oialr.load(network(seed=1), tmp_path / "network.safetensors")
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].dtype == value.dtype
        assert torch.equal(other.state_dict()[name], value)
    merged = oialr.two_factors(model)
    oialr.save(merged, tmp_path / "factors.safetensors")
    factors = oialr.load(network(seed=1), tmp_path / "factors.safetensors")
    x = torch.randn(4, 20, dtype=torch.float64)
    torch.testing.assert_close(factors(x), model(x))
    assert torch.equal(factors(x), merged(x))
    held = [layer for layer in low_rank(merged) if layer.released]
    assert held
    for layer in held:
        assert layer.B.dtype == LOW
    # Who goes on without the option has full precision from the next event on.
    its_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    its_method = OIALR(other, its_optimizer, delay=2, update_interval=2, layer_fraction=1)
    train(other, its_optimizer, its_method, 4)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float64}


@pytest.mark.slow
def test_an_average_has_the_bases_of_the_network():
    model, optimizer, method = make(frozen_dtype="bfloat16", **CUT)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    method.follow(averaged)
    train(model, optimizer, method, 12)
    for mine, its in zip(low_rank(averaged), low_rank(model), strict=True):
        assert mine.U.dtype == LOW
        assert torch.equal(mine.U, its.U)
    averaged.update_parameters(model)


AVERAGED = {
    "rotated": (CUT, {"cutoff": 1e-9}),
    "cut": (CUT, {"cutoff": 0.7, "largest_cut": 0.4}),
    "factors": (CUT, {"cutoff": 1e-9, "release": 1}),
    "dense": ({"cutoff": 1e-9}, {"cutoff": 1e-9, "release": 1}),
}


@pytest.mark.parametrize("case", AVERAGED)
def test_an_average_is_carried_over_as_the_product_that_it_is(case):
    """It was taken for one between orthonormal bases, which rounded ones are not."""
    before, after = AVERAGED[case]
    model, optimizer, method = make(frozen_dtype="bfloat16", layer_fraction=1, **before)
    train(model, optimizer, method, 8)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in low_rank(averaged):
            noise = torch.randn(layer.core.shape, generator=generator, dtype=torch.float64)
            layer.core += 0.1 * noise
    # Without the option what comes of an event is not rounded, and can be held against the average.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = OIALR(model, optimizer, delay=1, update_interval=1, **after)
    method.follow(averaged)
    optimizer.step()
    averages = formed(averaged.module)
    assert method.step()
    for name, W, now in zip(NAMES, averages, formed(averaged.module), strict=True):
        layer = get_layer(model, name)
        expected = W
        if isinstance(layer, FactoredLayer) and layer.released:
            expected = W @ torch.linalg.pinv(layer.B.detach()) @ layer.B.detach()
        elif isinstance(layer, FactoredLayer):
            U, Vh = layer.U.detach(), layer.Vh.detach()
            expected = U @ U.mT @ W @ Vh.mT @ Vh
        assert isinstance(layer, FactoredLayer) == (case != "dense")
        torch.testing.assert_close(now, expected, rtol=1e-9, atol=1e-11)


def test_what_rounding_did_to_orthonormal_columns_is_undone():
    exact = torch.linalg.qr(torch.randn(3, 40, 30, dtype=torch.float64))[0]
    U = exact.to(LOW).double()
    Q, H = orthonormalized(U)
    eye = torch.eye(30, dtype=torch.float64)
    assert (U.mT @ U - eye).abs().max() > 1e-4
    torch.testing.assert_close(Q.mT @ Q, eye.expand(3, 30, 30), rtol=0, atol=1e-13)
    torch.testing.assert_close(Q @ H, U, rtol=0, atol=1e-13)
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_dtype": "float16"}, "frozen_dtype must be bfloat16, or None, not 'float16'"),
        ({"frozen_dtype": "bfloat16", "release": 4}, "a release at the delay leaves none"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(delay=4, update_interval=2, **options)


@pytest.mark.slow
def test_a_compiled_network_and_scaled_gradients_train_with_it():
    model, optimizer, method = make(frozen_dtype="bfloat16", **CUT)
    model.float()
    compiled = torch.compile(model, backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(16, 20, generator=generator)
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(compiled(x), x[:, :5].argmax(1))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        method.step()
    assert {layer.U.dtype for layer in low_rank(model)} == {LOW}
    assert {layer.core.dtype for layer in low_rank(model)} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())

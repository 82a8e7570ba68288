"""Autoformer: each of its parts against its definition, and the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from app import models
from app.errors import UserError
from app.models.autocorrelation import (
    aggregate,
    circular_correlation,
    decompose,
    delay_count,
    delay_weights,
    mean_correlation,
)
from app.models.autoformer import AutoCorrelation, Autoformer, Embedding, SeasonalNorm

SMALL = {
    "width": 16,
    "heads": 2,
    "encoder_layers": 1,
    "feed_forward": 32,
    "moving_average": 5,
    "label_length": 6,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def small(**arguments: object) -> Autoformer:
    torch.manual_seed(0)
    sizes = {"variables": 3, "time_features": 5, "input_length": 12, "horizon": 8}
    return Autoformer(**{**sizes, **SMALL, **arguments}).double()


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def test_size_of_the_published_network() -> None:
    model = models.build("autoformer", {}, input_shape=(96 + 192, 7 + 5), outputs=(192, 7))
    assert sum(p.numel() for p in model.parameters()) == 10_536_967


@given(length=st.integers(1, 30), window=st.sampled_from([1, 3, 5, 25]))
@settings(max_examples=30)
def test_decomposition_is_a_moving_average_with_repeated_ends(length: int, window: int) -> None:
    series = random(2, length, 3)
    seasonal, trend = decompose(series, window)
    torch.testing.assert_close(seasonal + trend, series)
    for t in range(length):
        steps = [min(max(t + i, 0), length - 1) for i in range(-(window // 2), window // 2 + 1)]
        torch.testing.assert_close(trend[:, t], series[:, steps].mean(dim=1))


def test_decomposition_of_a_line_and_of_a_period() -> None:
    t = torch.arange(100, dtype=torch.float64)
    line, wave = 0.3 * t, torch.sin(2 * math.pi * t / 25)
    seasonal, trend = decompose((line + wave)[None, :, None], 25)
    inner = slice(12, -12)
    torch.testing.assert_close(trend[0, inner, 0], line[inner])
    torch.testing.assert_close(seasonal[0, inner, 0], wave[inner])


@pytest.mark.parametrize("length", [1, 7, 12])
def test_correlation_by_fft_is_the_direct_sum(length: int) -> None:
    a, b = random(2, length, 3, 4), random(2, length, 3, 4, seed=1)
    direct = torch.stack([(a.roll(-tau, dims=1) * b).sum(dim=1) for tau in range(length)], dim=1)
    torch.testing.assert_close(circular_correlation(a, b), direct)
    torch.testing.assert_close(mean_correlation(a, b), direct.mean(dim=-1))


@pytest.mark.parametrize(("length", "factor", "count"), [(96, 1, 4), (144, 1, 4), (96, 3, 13)])
def test_delay_count(length: int, factor: float, count: int) -> None:
    assert delay_count(length, factor) == int(factor * math.log(length)) == count
    assert delay_count(1, factor) == 1
    assert delay_count(2, 100) == 2


def test_delays_are_those_of_a_periodic_series() -> None:
    t = torch.arange(48, dtype=torch.float64)
    series = torch.cos(2 * math.pi * t / 12)[None, :, None, None]
    weights = delay_weights(mean_correlation(series, series), 4, shared_in_batch=False)
    assert weights[0, :, 0].nonzero().flatten().tolist() == [0, 12, 24, 36]
    torch.testing.assert_close(weights[0, [0, 12, 24, 36], 0], torch.full((4,), 0.25).double())
    torch.testing.assert_close(aggregate(series, weights), series)


def test_training_form_has_one_set_of_delays_and_inference_one_per_sample() -> None:
    correlation = random(5, 20, 2)
    for shared, delays_of in [(True, correlation.mean(dim=0, keepdim=True)), (False, correlation)]:
        weights = delay_weights(correlation, 3, shared_in_batch=shared)
        best = delays_of.argsort(dim=1, descending=True)[:, :3].expand(5, -1, -1)
        for sample in range(5):
            for head in range(2):
                kept = best[sample, :, head]
                expected = torch.zeros(20, dtype=torch.float64)
                expected[kept] = correlation[sample, kept, head].softmax(dim=0)
                torch.testing.assert_close(weights[sample, :, head], expected)


def test_forms_agree_for_a_batch_of_one() -> None:
    correlation = random(1, 20, 2)
    forms = [delay_weights(correlation, 3, shared_in_batch=shared) for shared in (True, False)]
    assert torch.equal(*forms)


def test_aggregation_is_the_weighted_sum_of_rolled_values() -> None:
    values, correlation = random(3, 15, 2, 4), random(3, 15, 2, seed=1)
    weights = delay_weights(correlation, 4, shared_in_batch=False)
    expected = sum(weights[:, tau, None, :, None] * values.roll(-tau, dims=1) for tau in range(15))
    torch.testing.assert_close(aggregate(values, weights), expected)


@pytest.mark.parametrize("training", [True, False])
def test_delays_follow_training_and_evaluation(training: bool) -> None:
    layer = AutoCorrelation(8, 2, factor=1, shared_delays=True).double().train(training)
    x = random(4, 10, 8)
    alone = torch.cat([layer(sample[None], sample[None]) for sample in x])
    assert torch.allclose(layer(x, x), alone) != training


def test_correlation_moves_along_with_a_shifted_series() -> None:
    layer = AutoCorrelation(8, 2, factor=1, shared_delays=True).double().eval()
    x = random(2, 12, 8)
    torch.testing.assert_close(layer(x.roll(5, 1), x.roll(5, 1)), layer(x, x).roll(5, 1))


def by_hand(layer: AutoCorrelation, x: Tensor, source: Tensor, channels: slice) -> Tensor:
    """What one head makes of some channels, before the output projection; two delays."""
    queries = layer.query(x)[..., channels][:, :, None]
    missing = x.shape[1] - source.shape[1]
    keys, values = (
        functional.pad(project(source)[..., channels], (0, 0, 0, missing))[:, :, None]
        for project in (layer.key, layer.value)
    )
    weights = delay_weights(mean_correlation(queries, keys), 2, shared_in_batch=False)
    return aggregate(values, weights).flatten(-2)


def test_source_of_another_length_is_cut_or_filled_with_zeros() -> None:
    layer = AutoCorrelation(8, 2, factor=1, shared_delays=True).double().eval()
    x, longer, shorter = random(2, 12, 8), random(2, 20, 8), random(2, 5, 8)
    torch.testing.assert_close(layer(x, longer), layer(x, longer[:, :12]))
    expected = layer.output(by_hand(layer, x, shorter, slice(None)))
    torch.testing.assert_close(layer(x, shorter), expected)


def test_heads_may_have_delays_of_their_own() -> None:
    layer = AutoCorrelation(8, 2, factor=1, shared_delays=False).double().eval()
    x = random(2, 16, 8)
    heads = [by_hand(layer, x, x, channels) for channels in (slice(4), slice(4, 8))]
    torch.testing.assert_close(layer(x, x), layer.output(torch.cat(heads, dim=-1)))
    together = AutoCorrelation(8, 2, factor=1, shared_delays=True).double().eval()
    together.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x, x), together(x, x))


def test_embedding_is_circular_and_knows_no_position() -> None:
    embedding = Embedding(3, 5, 8, dropout=0).double()
    values, calendar = random(2, 10, 3), random(2, 10, 5)
    rolled = embedding(values.roll(4, 1), calendar.roll(4, 1))
    torch.testing.assert_close(rolled, embedding(values, calendar).roll(4, 1))
    window = values[:, [9, 0, 1]]  # around step 0
    expected = torch.einsum("bkc,wck->bw", window, embedding.values.weight)
    first = embedding(values, torch.zeros_like(calendar))[:, 0]
    torch.testing.assert_close(first, expected)


def test_seasonal_norm_has_no_mean_over_time() -> None:
    norm = SeasonalNorm(8).double()
    nn.init.normal_(norm.norm.bias)
    x = random(2, 10, 8)
    result = norm(x)
    torch.testing.assert_close(result.mean(dim=1), torch.zeros(2, 8).double())
    differences = functional.layer_norm(x, (8,)).diff(dim=1)
    torch.testing.assert_close(result.diff(dim=1), differences)


def test_biases_are_where_the_paper_has_them() -> None:
    with_bias = {n.rpartition(".")[0] for n, _ in small().named_parameters() if n.endswith("bias")}
    kinds = {name.rpartition(".")[-1] for name in with_bias}
    assert kinds == {"query", "key", "value", "output", "norm", "projection"}


def test_forecast_ignores_the_values_to_be_forecast() -> None:
    model = small().eval()
    inputs = random(2, 20, 8)
    other = inputs.clone()
    other[:, 12:, :3] = 7
    assert model(inputs).shape == (2, 8, 3)
    assert torch.equal(model(inputs), model(other))
    other = inputs.clone()
    other[:, 12:, 3:] = 7
    assert not torch.allclose(model(inputs), model(other))


def test_network_of_no_weight_forecasts_the_mean() -> None:
    """What is left is the start of the decoder's trend (equation 2)."""
    model = small().eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    inputs = random(2, 20, 8)
    mean = inputs[:, :12, :3].mean(dim=1, keepdim=True)
    torch.testing.assert_close(model(inputs), mean.expand(-1, 8, -1))


def test_mixed_precision_is_close() -> None:
    model = small().float().eval()
    inputs = random(2, 20, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(inputs)
    assert (rounded - model(inputs)).norm() < 0.05 * model(inputs).norm()


@pytest.mark.parametrize("shared", [True, False])
def test_every_parameter_is_trained(shared: bool) -> None:
    model = small(shared_delays=shared)
    model(random(4, 20, 8)).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant over time: the mean is taken off by the norm.
    assert all(name.endswith("norm.bias") for name in idle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "width, 16, must be a multiple of heads, 3"),
        ({"moving_average": 4}, "moving_average must be odd, not 4"),
        ({"label_length": 13}, "label_length, 13, must be in [0, input_length], and that is 12"),
        ({"activation": "tanh"}, "activation must be gelu or relu, not 'tanh'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        models.build("autoformer", {**SMALL, **arguments}, input_shape=(20, 8), outputs=(8, 3))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "input_shape", "outputs", "message"),
    [
        ("autoformer", (3, 32, 32), 10, "autoformer is for time series, and data.name gives image"),
        ("resnet18", (20, 8), (8, 3), "resnet18 is for images, and data.name gives series"),
    ],
)
def test_network_and_data_of_different_kinds(
    name: str, input_shape: tuple[int, ...], outputs: int | tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^model\.name: {message}"):
        models.build(name, {}, input_shape=input_shape, outputs=outputs)

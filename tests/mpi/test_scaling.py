"""The scaling benchmark: its model of an all-reduce, and the gradient bytes that it measures."""

import json

import pytest
from support.launching import launch

from benchmarks import scaling


def test_the_fit_finds_latency_and_bandwidth():
    samples = [
        (count, size, scaling.all_reduce_seconds(count, size, latency=3e-5, bandwidth=2e9))
        for count in (2, 4, 8)
        for size in (2**12, 2**20, 2**24)
    ]
    model = scaling.fit(samples)
    assert model["latency"] == pytest.approx(3e-5)
    assert model["bandwidth"] == pytest.approx(2e9)
    assert model["median_relative_error"] == pytest.approx(0, abs=1e-9)
    assert scaling.fit([]) is None


def test_a_ring_sends_every_byte_almost_twice():
    seconds = scaling.all_reduce_seconds(4, 100.0, latency=0.0, bandwidth=50.0)
    assert seconds == pytest.approx(2 * 3 / 4 * 100 / 50)
    assert scaling.all_reduce_seconds(4, 0, latency=1.0, bandwidth=1.0) == 6


def test_the_prediction_is_that_of_the_formula():
    network = scaling.Network(latency=1e-5, bandwidth=1e10, compute=0.1, gradient_bytes=1e9)
    row = scaling.predict(network, trainable=0.16)[0]
    assert row["processes"] == 16
    seconds = 2 * 15 * 1e-5 + 2 * 15 / 16 * 1e9 / 1e10
    assert row["full-rank all-reduce"] == pytest.approx(seconds)
    assert row["full-rank efficiency"] == pytest.approx(0.1 / (0.1 + seconds))
    assert row["full-rank overlapped"] == pytest.approx(0.1 / (0.1 + seconds - 0.2 / 3))
    assert row["OIALR overlapped"] == 1.0


def test_gradient_bytes_are_those_of_the_trained_parameters():
    result = json.loads(launch(2, "-m", "benchmarks.scaling", "--rounds", "1").stdout)
    assert 0.15 < result["trainable"] <= 0.16
    for mode in ("strong", "weak"):
        full, low = (result["steps"][mode][name]["gradient_bytes"] for name in scaling.VARIANTS)
        assert full > 10_000_000
        assert low / full <= 0.17
        assert low / full == pytest.approx(result["trainable"], rel=1e-6)

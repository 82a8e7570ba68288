"""Every later way to an SVD on the GPU, when the ways before it fail."""

import logging
import sys

import pytest
import torch
from accelerator import DRY_RUN, svd_attempts
from networks import CLASSES, batches, training

from app.linalg.svd import economy_svd, orthonormality_error

COUNT = 2 if DRY_RUN else 4


class Failing:
    """torch.linalg.svd, whose first calls for a matrix fail, and what it was asked for."""

    def __init__(self, failures):
        self.failures = failures
        self.asked = []
        self._real = torch.linalg.svd

    def __call__(self, matrix, **options):
        self.asked.append((matrix.dtype, matrix.device.type, options.get("driver")))
        if len(self.asked) <= self.failures:
            raise torch.linalg.LinAlgError("did not converge")
        return self._real(matrix, **options)


@pytest.fixture(autouse=True)
def _without_scipy(monkeypatch):
    """The last way of all needs scipy, which a bare host lacks."""
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)


def test_there_are_as_many_ways_as_expected(device):
    assert len(svd_attempts(device)) == COUNT


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 16, 8)])
@pytest.mark.parametrize("failures", range(COUNT))
def test_each_way_succeeds_on_the_device_after_the_ways_before(
    failures, shape, device, monkeypatch
):
    failing = Failing(failures)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    U, s, Vh = economy_svd(matrix)
    assert failing.asked == svd_attempts(device)[: failures + 1]
    for factor in (U, s, Vh):
        assert factor.dtype == torch.float32
        assert factor.device == matrix.device
    torch.testing.assert_close(U * s[..., None, :] @ Vh, matrix, rtol=0, atol=2e-5)
    for stack in (U, Vh.mT):
        for vectors in stack.reshape(-1, *stack.shape[-2:]):
            assert orthonormality_error(vectors) < 1e-5


def test_vectors_that_are_not_orthonormal_count_as_a_failure(device, monkeypatch):
    failing = Failing(0)

    def svd(matrix, **options):
        U, s, Vh = failing(matrix, **options)
        return (U * 1.001 if len(failing.asked) == 1 else U), s, Vh

    monkeypatch.setattr(torch.linalg, "svd", svd)
    U, _, _ = economy_svd(torch.randn(40, 24).to(device))
    assert failing.asked == svd_attempts(device)[:2]
    assert orthonormality_error(U) < 1e-6


def test_a_layer_of_which_no_svd_converges_stays_full_rank_with_a_warning(
    size, device, monkeypatch, caplog
):
    w, real = size.width, torch.linalg.svd

    def svd(matrix, **options):
        if len(matrix) == 2 * w:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    layers = [torch.nn.Linear(w, w), torch.nn.Linear(w, 2 * w), torch.nn.Linear(2 * w, CLASSES)]
    trained = training(torch.nn.Sequential(*layers).to(device))
    monkeypatch.setattr(torch.linalg, "svd", svd)
    with caplog.at_level(logging.WARNING):
        trained.run(batches((w,), size, 2))
    assert [layer.name for layer in trained.events[2].layers] == ["0.weight"]
    assert "1.weight keeps its present full-rank weight" in caplog.text
    monkeypatch.setattr(torch.linalg, "svd", real)
    trained.run(batches((w,), size, 2))
    assert None not in trained.method.state_dict()["ranks"].values()

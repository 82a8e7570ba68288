"""Every later way to an SVD on the GPU, when the ways before it fail."""

import logging
import sys

import pytest
import torch
from support.gpu.accelerator import DRY_RUN, svd_attempts
from support.gpu.networks import CLASSES, batches, training

import oialr.linalg.svd
from oialr.linalg.svd import economy_svd, orthonormality_error

COUNT = 2 if DRY_RUN else 4


class Failing:
    """torch.linalg.svd and eigh, whose first calls fail, and what they were asked for."""

    def __init__(self, monkeypatch, failures, spoil=None):
        self.failures = failures
        self.asked = []
        self._spoil = spoil
        for name in ("svd", "eigh"):
            monkeypatch.setattr(
                torch.linalg, name, self._wrapped(name, getattr(torch.linalg, name))
            )

    def _wrapped(self, name, real):
        def call(matrix, **options):
            self.asked.append((name, matrix.dtype, matrix.device.type, options.get("driver")))
            if len(self.asked) <= self.failures:
                raise torch.linalg.LinAlgError("did not converge")
            result = real(matrix, **options)
            return self._spoil(result) if self._spoil and len(self.asked) == 1 else result

        return call


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
    failing = Failing(monkeypatch, failures)
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
    def stretched(parts):  # U of an SVD, or V of the Gram matrix
        *first, last = parts
        return (*first, last * 1.001)

    failing = Failing(monkeypatch, 0, spoil=stretched)
    U, _, _ = economy_svd(torch.randn(40, 24).to(device))
    assert failing.asked == svd_attempts(device)[:2]
    assert orthonormality_error(U) < 1e-6


def test_a_layer_of_which_no_svd_converges_stays_full_rank_with_a_warning(
    size, device, monkeypatch, caplog
):
    w, real, by_gram = size.width, torch.linalg.svd, oialr.linalg.svd.gram_svd

    def svd(matrix, **options):
        if len(matrix) == 2 * w:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    def gram(matrix):
        if len(matrix) == 2 * w:
            raise torch.linalg.LinAlgError("did not converge")
        return by_gram(matrix)

    layers = [torch.nn.Linear(w, w), torch.nn.Linear(w, 2 * w), torch.nn.Linear(2 * w, CLASSES)]
    trained = training(torch.nn.Sequential(*layers).to(device))
    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr(oialr.linalg.svd, "gram_svd", gram)
    with caplog.at_level(logging.WARNING):
        trained.run(batches((w,), size, 2))
    assert [layer.name for layer in trained.events[2].layers] == ["0.weight"]
    assert "1.weight keeps its present full-rank weight" in caplog.text
    monkeypatch.undo()
    trained.run(batches((w,), size, 2))
    assert None not in trained.method.state_dict()["ranks"].values()

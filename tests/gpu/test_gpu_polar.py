"""The methods of stability on the GPU against the singular value decomposition in float64."""

import math
from typing import get_args

import pytest
import torch
from support.gpu.networks import batches, build, input_shape, training
from support.matrices import gaussian, power_law, rank_deficient

from oialr.linalg.polar import Method, choose_method, polar
from oialr.linalg.svd import economy_svd, numerical_rank, orthonormality_error
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker

METHODS = get_args(Method)
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("draw", [gaussian, power_law, rank_deficient])
def test_the_error_is_that_of_rounding_the_matrix(draw, size, device):
    for shape in size.shapes:
        matrix = draw(*shape)
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        r = numerical_rank(s.float(), shape)
        for method in METHODS:
            measured = polar(matrix.to(device), method)
            assert measured.rank == r, (shape, method)
            assert measured.factor.device.type == device.type
            # As the module has it: eps times the condition of what is determined. The SVD itself is
            # in float32; its backward error, seen with LAPACK, is up to 90 eps.
            constant = math.sqrt(max(shape)) * (8 if method == "svd" else 1)
            bound = constant * EPS * float(s[0] / s[r - 1])
            B = U[:, :r] @ Vh[:r]
            factor = measured.factor.cpu().double()
            assert torch.linalg.matrix_norm(factor - B, 2) < bound, (shape, method)
            stability = float((factor * B).sum()) / r
            assert stability == pytest.approx(1, abs=1e-4), (shape, method)
            atol = max(20, 2 * math.sqrt(max(shape))) * EPS * float(s[0])
            torch.testing.assert_close(measured.s.cpu().double(), s, rtol=0, atol=atol)


@pytest.mark.parametrize("draw", [gaussian, power_law, rank_deficient])
def test_singular_vectors_are_as_orthonormal_as_stated(draw, size, device):
    for shape in size.shapes:
        matrix = draw(*shape).to(device)
        U, s, Vh = economy_svd(matrix)
        for vectors in (U, Vh.T):
            assert orthonormality_error(vectors) < 1e-5
            assert vectors.device.type == device.type
        product = (U.double() * s.double()) @ Vh.double()
        error = torch.linalg.vector_norm(product - matrix.double())
        assert error < 10 * math.sqrt(max(shape)) * EPS * torch.linalg.vector_norm(matrix.double())


def test_eigenvectors_are_chosen_on_a_gpu(size, device):
    assert choose_method((768, 768), torch.float32, torch.device("cuda")) == "eigh"
    matrix = gaussian(*size.shapes[0]).to(device)
    chosen = choose_method(size.shapes[0], matrix.dtype, device)
    assert torch.equal(polar(matrix).factor, polar(matrix, chosen).factor)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_a_training_is_measured_as_on_the_cpu(name, background, size, device):
    rows = []
    for place in (torch.device("cpu"), device):
        model = build(name, size).to(place)
        trained = training(model)
        tracker = BasisTracker(trained.method.survey, Processes(), window=1, unit="steps")
        measured = tracker.measure(model, 0)
        for time, (inputs, labels) in enumerate(
            trained.placed(batches(input_shape(name, size), size, 4)), start=1
        ):
            trained.step(model, inputs, labels)
            if background:
                tracker.start(model, time)
                measured += tracker.finish()
            else:
                measured += tracker.measure(model, time)
        tracker.close()
        rows.append(measured)
    for expected, row in zip(*rows, strict=True):
        assert (row.name, row.rank, row.numerical_rank) == (
            expected.name,
            expected.rank,
            expected.numerical_rank,
        )
        assert row.stability == pytest.approx(expected.stability, abs=1e-4, nan_ok=True)
        assert row.mixing_similarity == pytest.approx(
            expected.mixing_similarity, abs=1e-4, nan_ok=True
        )

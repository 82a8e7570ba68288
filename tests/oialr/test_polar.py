"""The polar factor by each method, against the singular value decomposition in float64."""

import math
from typing import get_args

import pytest
import torch
from support.matrices import gaussian, power_law, random_matrix, rank_deficient

from oialr.linalg.polar import Method, choose_method, polar
from oialr.linalg.svd import numerical_rank

METHODS = get_args(Method)
SHAPES = [(48, 48), (200, 40), (40, 200), (1, 30), (30, 1), (1, 1)]
EPS = torch.finfo(torch.float32).eps


def reference(matrix):
    """Factor, singular values, rank by the definition."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    r = numerical_rank(s.float(), tuple(matrix.shape))
    return U[:, :r] @ Vh[:r], s, r


@pytest.mark.parametrize("draw", [gaussian, power_law, rank_deficient])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_that_of_rounding_the_matrix(method, shape, draw):
    matrix = draw(*shape)
    B, s, r = reference(matrix)
    measured = polar(matrix, method)
    assert measured.rank == r
    assert measured.factor.shape == shape
    assert measured.factor.dtype == torch.float32
    assert measured.factor.is_contiguous()
    # As the docstring has it: of the order of eps times the condition of what is determined.
    bound = EPS * (math.sqrt(max(shape)) + 2 * float(s[0] / s[r - 1]))
    error = measured.factor.double() - B
    assert torch.linalg.matrix_norm(error, 2) < bound
    torch.testing.assert_close(measured.s.double(), s, rtol=0, atol=20 * EPS * float(s[0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 25), (25, 60)])
def test_a_null_space_is_left_out(method, shape):
    measured = polar(rank_deficient(*shape), method)
    assert measured.rank == 13
    B = measured.factor.double()
    projector = B.T @ B
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-4)
    assert float(projector.trace()) == pytest.approx(13, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_zero_matrix_has_rank_zero(method, shape):
    factor, s, rank = polar(torch.zeros(shape), method)
    assert rank == 0
    assert not factor.any()
    assert not s.any()
    assert (factor.shape, s.shape) == (shape, (3,))


@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method):
    matrix = gaussian(40, 30)
    for scale in (1e-15, 1e15):
        scaled = polar(scale * matrix, method)
        torch.testing.assert_close(scaled.factor, polar(matrix, method).factor, rtol=0, atol=1e-5)
        assert scaled.rank == 30


@pytest.mark.parametrize("method", METHODS)
def test_other_precisions(method):
    matrix = gaussian(20, 30).bfloat16()
    B, _, _ = reference(matrix)
    factor = polar(matrix, method).factor
    torch.testing.assert_close(factor.double(), B, rtol=0, atol=1e-5)
    exact = polar(random_matrix(20, 30), method).factor
    U, _, Vh = torch.linalg.svd(random_matrix(20, 30), full_matrices=False)
    torch.testing.assert_close(exact, U @ Vh, rtol=0, atol=1e-12)


def test_the_choice_of_a_method():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_method((768, 3072), torch.float32, cpu) == "eigh"
    assert choose_method((3072, 768), torch.float32, cpu) == "eigh"
    assert choose_method((768, 768), torch.float32, cpu) == "svd"
    assert choose_method((64, 64), torch.float32, cpu) == "eigh"
    assert choose_method((768, 768), torch.float32, gpu) == "eigh"
    assert choose_method((64, 768), torch.float64, gpu) == "svd"


def test_the_default_is_the_chosen_method():
    matrix = gaussian(30, 20)
    assert torch.equal(polar(matrix).factor, polar(matrix, "eigh").factor)
    assert torch.equal(polar(matrix.double()).factor, polar(matrix.double(), "svd").factor)


@pytest.mark.parametrize("method", METHODS)
def test_where_one_decomposition_fails_the_svd_takes_over(monkeypatch, method):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    matrix = gaussian(40, 12)
    expected = polar(matrix, "svd")
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fail)
    torch.testing.assert_close(polar(matrix, method).factor, expected.factor)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e36])
@pytest.mark.parametrize("method", ["svd", "eigh", "products"])
def test_entries_near_the_ends_of_the_range_have_the_factor_of_any_others(method, scale):
    """Squares of them are 0 or infinite in float32, and 1 over a singular value of 1e-39 too."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 24), (24, 40)):
        matrix = torch.randn(shape, generator=generator) * scale
        result = polar(matrix, method)
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert result.rank == 24
        torch.testing.assert_close(result.factor, (U @ Vh).float(), atol=2e-5, rtol=0)
        torch.testing.assert_close(result.s.double() / scale, s / scale, rtol=2e-3, atol=0)

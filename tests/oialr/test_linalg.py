"""Mathematics of one matrix, held against float64 and numpy."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oialr.linalg.precision import full_precision
from oialr.linalg.stability import (
    DenseBasis,
    FactoredBasis,
    basis_stability,
    mixing_factor,
    mixing_factor_from_factors,
    mixing_similarity,
)
from oialr.linalg.svd import (
    diagonal_svd,
    economy_svd,
    effective_rank,
    gram_svd,
    is_diagonal,
    numerical_rank,
    orthonormality_error,
    stable_rank,
)
from oialr.stability.measurement import measure_dense

SHAPES = [(1, 1), (7, 7), (40, 12), (12, 40), (64, 1)]


def random_matrix(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(m, n, r, seed=0):
    return random_matrix(m, r, seed) @ random_matrix(r, n, seed + 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_svd_reconstructs_with_orthonormal_contiguous_factors(shape, dtype, tolerance):
    matrix = random_matrix(*shape, dtype=dtype)
    U, s, Vh = economy_svd(matrix)
    k = min(shape)
    assert (U.shape, s.shape, Vh.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert U.is_contiguous()
    assert Vh.is_contiguous()
    identity = torch.eye(k, dtype=dtype)
    assert torch.linalg.matrix_norm(U.T @ U - identity, 2) < tolerance
    assert torch.linalg.matrix_norm(Vh @ Vh.T - identity, 2) < tolerance
    assert torch.linalg.norm(U * s @ Vh - matrix) <= tolerance * torch.linalg.norm(matrix) * 10
    reference = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(s.double().numpy(), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_svd_of_half_precision_is_computed_in_float32(dtype):
    assert economy_svd(random_matrix(6, 4).to(dtype)).U.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 3), (2, 3, 4)])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_svd_is_retried_in_float64_and_then_by_another_driver(monkeypatch, failures, shape):
    real, dtypes = torch.linalg.svd, []

    def svd(matrix, **options):
        dtypes.append(matrix.dtype)
        if len(dtypes) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, s, Vh = economy_svd(matrix)
    assert dtypes == [torch.float32, torch.float64][: failures + 1]
    assert U.dtype == s.dtype == Vh.dtype == torch.float32
    assert U.is_contiguous()
    assert Vh.is_contiguous()
    torch.testing.assert_close(U * s[..., None, :] @ Vh, matrix)


def test_svd_that_returns_nonsense_is_retried(monkeypatch):
    real = torch.linalg.svd

    def svd(matrix, **options):
        U, s, Vh = real(matrix, **options)
        return U, s * (math.nan if matrix.dtype == torch.float32 else 1), Vh

    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert economy_svd(torch.ones(4, 2)).s[0] == pytest.approx(8**0.5)


def test_svd_that_nothing_can_do_is_an_error(monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr("scipy.linalg.svd", fail)
    with pytest.raises(torch.linalg.LinAlgError, match=r"no SVD of \(5, 3\) converges"):
        economy_svd(torch.ones(5, 3))


def test_without_scipy_there_is_one_way_less_and_no_other_error(monkeypatch):
    real = torch.linalg.svd

    def svd(matrix, **options):
        if matrix.dtype == torch.float32 or always:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    always = False
    assert economy_svd(torch.ones(4, 2)).s[0] == pytest.approx(8**0.5)
    always = True
    with pytest.raises(torch.linalg.LinAlgError, match=r"no SVD of \(5, 3\) converges"):
        economy_svd(torch.ones(5, 3))


@pytest.mark.parametrize("k", [64, 1024])
@pytest.mark.parametrize("spectrum", ["flat", "wide", "deficient"])
def test_singular_vectors_of_float32_are_orthonormal_to_1e_5(k, spectrum):
    matrix = random_matrix(k + 16, k, dtype=torch.float32)
    if spectrum == "wide":
        matrix = matrix * torch.logspace(0, -6, k)
    if spectrum == "deficient":
        matrix[:, k // 2 :] = 0
    factors = economy_svd(matrix)
    for vectors in (factors.U, factors.Vh.T):
        error = vectors.T.double() @ vectors.double() - torch.eye(k, dtype=torch.float64)
        assert torch.linalg.matrix_norm(error, 2) < 1e-5


@pytest.mark.parametrize("wide", [False, True])
def test_equal_rows_and_columns_leave_singular_vectors_orthonormal(wide):
    """LAPACK alone leaves 2e-5 to 5e-5 in float32."""
    constant = torch.full((512, 256), 0.1)
    blocks = torch.kron(random_matrix(2, 2, dtype=torch.float32), torch.ones(256, 128))
    for matrix in (constant, blocks, torch.stack([constant, blocks])):
        U, s, Vh = economy_svd(matrix.mT if wide else matrix)
        for vectors in (U.double(), Vh.mT.double()):
            error = vectors.mT @ vectors - torch.eye(256, dtype=torch.float64)
            assert torch.linalg.matrix_norm(error, 2).max() < 1e-5
        product = U * s[..., None, :] @ Vh
        torch.testing.assert_close(product, matrix.mT if wide else matrix)


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=6))
def test_svd_of_a_diagonal_matrix_is_exact(values):
    matrix = torch.diag(torch.tensor(values))
    for stack in (matrix, torch.stack([matrix, -matrix])):
        left, s, right = diagonal_svd(stack)
        assert is_diagonal(stack)
        assert torch.equal(left * s[..., None, :] @ right, stack)
        assert torch.equal(s, torch.linalg.svdvals(stack.double()).float())
        identity = torch.eye(len(values)).expand_as(stack)
        assert torch.equal(left.mT @ left, identity)
        assert torch.equal(right @ right.mT, identity)


def test_what_is_not_diagonal():
    matrix = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    matrix[2, 0] = 1e-30
    assert not is_diagonal(matrix)
    assert not is_diagonal(torch.stack([torch.eye(3), matrix]))


def test_numerical_rank_ignores_rounding_noise():
    matrix = low_rank(30, 20, 6).float()
    assert numerical_rank(economy_svd(matrix).s, (30, 20)) == 6
    assert numerical_rank(torch.zeros(5), (5, 9)) == 0


def test_effective_rank():
    assert effective_rank(torch.ones(8)) == pytest.approx(8)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert math.isnan(effective_rank(torch.zeros(3)))


def test_stable_rank():
    matrix = random_matrix(30, 20)
    expected = np.linalg.norm(matrix.numpy()) ** 2 / np.linalg.norm(matrix.numpy(), 2) ** 2
    assert stable_rank(economy_svd(matrix).s) == pytest.approx(expected)
    assert stable_rank(torch.tensor([2.0, 0.0])) == 1
    assert math.isnan(stable_rank(torch.zeros(3)))


def test_orthonormality_error_is_that_of_a_column():
    Q = economy_svd(random_matrix(30, 12)).U
    assert orthonormality_error(Q) < 1e-14
    assert 1e-8 < orthonormality_error(Q.float()) < 1e-6
    assert orthonormality_error(1.001 * Q) == pytest.approx(0.002001)
    Q[:, 3] = 0
    assert orthonormality_error(Q) == pytest.approx(math.sqrt(1 / 12))


def forms(matrix, r=None):
    """Both forms of the basis of a matrix's first r directions."""
    U, s, Vh = economy_svd(matrix)
    r = len(s) if r is None else r
    U, Vh = U[:, :r], Vh[:r]
    turn = torch.linalg.qr(random_matrix(r, r, 9)).Q  # U and Vh by themselves are not unique
    return DenseBasis(U @ Vh, r), FactoredBasis(U @ turn, turn.T @ Vh, r)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9)])
def test_stability_is_the_same_in_every_form_of_the_bases(shape):
    first, second = forms(random_matrix(*shape, 1), 7), forms(random_matrix(*shape, 2))
    expected = float((first[0].factor * second[0].factor).sum()) / 7
    for a in first:
        for b in second:
            assert basis_stability(a, b) == pytest.approx(expected, abs=1e-12)
            assert basis_stability(b, a) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9)])
def test_stability_is_the_mean_cosine_of_the_bases_columns(shape):
    first, second = forms(random_matrix(*shape, 1))[0], forms(random_matrix(*shape, 2))[0]
    B_i, B_j = first.factor, second.factor
    if shape[0] < shape[1]:
        B_i, B_j = B_i.T, B_j.T
    expected = torch.nn.functional.cosine_similarity(B_i, B_j, dim=0).mean()
    assert basis_stability(first, second) == pytest.approx(float(expected), abs=1e-12)


def test_stability_is_one_for_equal_and_for_nested_bases():
    matrix = random_matrix(20, 12)
    for basis in forms(matrix):
        for other in [*forms(matrix), *forms(matrix, 5)]:
            assert basis_stability(basis, other) == pytest.approx(1)
        assert math.isnan(basis_stability(basis, forms(matrix, 0)[0]))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9)])
def test_mixing_factor_is_the_unique_r_and_comes_from_factors_too(shape):
    W = random_matrix(*shape)
    R = mixing_factor(W)
    tall = W if shape[0] >= shape[1] else W.T
    assert (R.diagonal() >= 0).all()
    torch.testing.assert_close(R, R.triu())
    torch.testing.assert_close(R.T @ R, tall.T @ tall)
    U, s, Vh = economy_svd(W)
    torch.testing.assert_close(mixing_factor_from_factors(U, torch.diag(s), Vh), R)


def test_mixing_factor_of_a_low_rank_layer_lacks_the_zero_rows_below_its_rank():
    U, s, Vh = economy_svd(low_rank(40, 12, 5))
    R = mixing_factor_from_factors(U[:, :5], torch.diag(s[:5]), Vh[:5])
    assert R.shape == (5, 12)
    W = U[:, :5] * s[:5] @ Vh[:5]
    torch.testing.assert_close(R.T @ R, W.T @ W)
    other = mixing_factor(random_matrix(40, 12))
    padded = torch.cat([R, R.new_zeros(7, 12)])
    for similarity in (mixing_similarity(R, other), mixing_similarity(other, R)):
        assert similarity == pytest.approx(mixing_similarity(padded, other))


@given(st.integers(0, 1000), st.floats(-3, 3))
@settings(max_examples=30)
def test_mixing_similarity_lies_between_zero_and_one(seed, scale):
    R = mixing_factor(random_matrix(8, 5, seed))
    assert mixing_similarity(R, R) == pytest.approx(1)
    assert -1e-12 <= mixing_similarity(R, scale * R) <= 1 + 1e-12


def test_mixing_similarity_has_its_documented_values():
    R = mixing_factor(random_matrix(8, 5))
    assert mixing_similarity(R, -R) == pytest.approx(0)
    assert mixing_similarity(R, 3 * R) == pytest.approx(0.5)
    assert mixing_similarity(0 * R, 0 * R) == 1


def half_rank(*shape):
    generator = torch.Generator().manual_seed(0)
    *batch, m, n = shape
    left = torch.randn(*batch, m, n // 2, generator=generator)
    return left @ torch.randn(*batch, n // 2, n, generator=generator)


@pytest.mark.parametrize("draw", [torch.randn, half_rank, torch.ones, torch.zeros])
@pytest.mark.parametrize("shape", [(60, 24), (24, 24), (3, 20, 8)])
def test_a_gram_matrix_gives_the_svd_to_the_digits_of_float32(draw, shape):
    torch.manual_seed(1)
    matrix = draw(*shape)
    U, s, Vh = gram_svd(matrix)
    one = torch.eye(shape[-1], dtype=torch.float64)
    for vectors in (U, Vh.mT):
        torch.testing.assert_close(
            vectors.mT @ vectors, one.expand(*shape[:-2], *one.shape), rtol=0, atol=1e-9
        )
    expected = torch.linalg.svdvals(matrix.double())
    scale = float(expected.max())
    torch.testing.assert_close(s, expected, rtol=0, atol=1e-7 * scale)
    assert (s.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(U * s[..., None, :] @ Vh, matrix.double(), rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-38), (torch.float32, 1e36), (torch.float64, 1e-200),
     (torch.float64, 1e200)],
)  # fmt: skip
def test_stability_and_mixing_do_not_depend_on_the_scale(dtype, scale):
    """At 1e-38 the stability was NaN, the mixing similarity 1; at 1e36 and 1e200 that was NaN."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((48, 32), (600, 560)):
        earlier = torch.randn(shape, generator=generator, dtype=torch.float64)
        later = earlier + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = []
        for kind, factor in ((torch.float64, 1.0), (dtype, scale)):
            a, b = (measure_dense((matrix * factor).to(kind)[None]) for matrix in (earlier, later))
            rows.append(b.compare(a.reference, name="x", averaged=True))
        expected, row = rows
        assert row.stability == pytest.approx(expected.stability, abs=1e-6)
        assert row.mixing_similarity == pytest.approx(expected.mixing_similarity, abs=1e-6)
        assert row.effective_rank == pytest.approx(expected.effective_rank, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e36])
def test_a_tiny_or_huge_matrix_is_factorized_as_any_other(scale):
    matrix = torch.randn(600, 600, generator=torch.Generator().manual_seed(0)) * scale
    U, s, Vh = economy_svd(matrix)
    error = (U.double() * s.double()) @ Vh.double() - matrix.double()
    # In subnormal numbers singular values themselves have few digits.
    assert error.abs().max() < (1e-3 if scale < 1e-40 else 1e-5) * 10 * scale
    assert torch.linalg.norm(U.T @ U - torch.eye(600), 2) < 1e-4
    with pytest.raises(torch.linalg.LinAlgError, match=r"beyond the range of torch\.float32"):
        economy_svd(torch.full((10, 10), 1e38))


def test_full_precision_is_asked_of_cpus_too():
    """oneDNN may multiply float32 matrices in bfloat16 where a program allows it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        allowed = [each.fp32_precision for each in settings]
        with full_precision():
            assert [each.fp32_precision for each in settings] == ["ieee", "ieee"]
        assert [each.fp32_precision for each in settings] == allowed != ["ieee", "ieee"]
    finally:
        torch.set_float32_matmul_precision(before)

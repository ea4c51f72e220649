"""Decompositions against float64 dense algebra, and their failures as data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder import linalg

FUNCTIONS = [linalg.orthogonalize, linalg.cholesky_qr]
DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_condition(n: int, d: int, condition: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric positive definite matrices (n, d, d) and their eigenvalues (d,), from 1 down to 1 / condition."""
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64)
    basis = torch.linalg.qr(randn(n, d, d, seed=seed))[0]
    return basis * eigenvalues @ basis.mT, eigenvalues


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 1e-13


def assert_orthonormal(Q: torch.Tensor, atol: float) -> None:
    assert (Q.mT.double() @ Q.double() - torch.eye(Q.shape[-1])).abs().max() <= atol


# eigh


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 4), d=st.integers(1, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_eigh_reconstructs_the_matrix_with_descending_eigenvalues(n, d, dtype, seed):
    X = randn(n, d, d, seed=seed)
    A = (X + X.mT).to(dtype)
    eigenvalues, Q, ok = linalg.eigh(A)
    assert ok.shape == (n,) and ok.dtype == torch.bool and ok.all()
    assert eigenvalues.dtype == Q.dtype == dtype and Q.is_contiguous()
    if n == 0:
        return
    size = A.double().abs().max().item() * d
    assert (Q * eigenvalues[:, None] @ Q.mT - A).abs().max() <= tolerance(dtype) * size
    assert_orthonormal(Q, tolerance(dtype))
    expected = torch.linalg.eigvalsh(A.double()).flip(-1)
    assert (eigenvalues.double() - expected).abs().max() <= tolerance(dtype) * size


def test_eigenvalues_of_a_condition_of_1e12_are_right_to_working_accuracy_of_the_largest():
    A, expected = with_condition(3, 30, 1e12)
    for dtype in DTYPES:
        eigenvalues, Q, ok = linalg.eigh(A.to(dtype))
        assert ok.all()
        assert (eigenvalues.double() - expected).abs().max() <= tolerance(dtype)
        assert_orthonormal(Q, tolerance(dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_eigh_is_relative_to_the_scale_of_the_matrix(scale):
    A, expected = with_condition(2, 20, 1e3)
    eigenvalues, Q, ok = linalg.eigh((A * scale).float())
    assert ok.all()
    assert (eigenvalues.double() / scale - expected).abs().max() <= tolerance(torch.float32)
    assert_orthonormal(Q, tolerance(torch.float32))


def test_a_power_of_two_scales_eigenvalues_exactly_and_leaves_the_basis():
    A = with_condition(2, 20, 1e3)[0].float()
    eigenvalues, Q, _ = linalg.eigh(A)
    scaled_eigenvalues, scaled_Q, _ = linalg.eigh(A * 2.0**-80)
    assert torch.equal(scaled_eigenvalues, eigenvalues * 2.0**-80) and torch.equal(scaled_Q, Q)


def test_eigenvalues_beyond_the_range_of_the_dtype_are_a_failure():
    eigenvalues, Q, ok = linalg.eigh(torch.full((1, 4, 4), 3e38))  # largest eigenvalue 1.2e39
    assert not ok.any() and not eigenvalues.any() and torch.equal(Q[0], torch.eye(4))


def test_eigh_of_zero_is_zero_in_an_orthonormal_basis():
    eigenvalues, Q, ok = linalg.eigh(torch.zeros(2, 5, 5))
    assert ok.all() and not eigenvalues.any()
    assert_orthonormal(Q, 0.0)


def test_eigh_of_rank_one_finds_its_vector():
    v = randn(3, 12, 1)
    eigenvalues, Q, ok = linalg.eigh(v @ v.mT)
    assert ok.all()
    torch.testing.assert_close(eigenvalues[:, 0], (v * v).sum((1, 2)))
    assert eigenvalues[:, 1:].abs().max() < 1e-14
    torch.testing.assert_close((Q[:, :, :1] * v).sum((1, 2)).abs(), v.norm(dim=(1, 2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (2, 1), (1, 2)], ids=["diagonal", "lower", "upper"])
def test_a_non_finite_matrix_fails_without_reaching_lapack_or_its_neighbours(monkeypatch, bad, where):
    A = with_condition(4, 9, 1e3)[0].float()
    clean = linalg.eigh(A)
    eigh = torch.linalg.eigh

    def strict_eigh(matrix):
        assert matrix.isfinite().all()
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", strict_eigh)
    A[1][where] = bad
    eigenvalues, Q, ok = linalg.eigh(A)
    assert ok.tolist() == [True, False, True, True]
    assert not eigenvalues[1].any() and torch.equal(Q[1], torch.eye(9))
    assert torch.equal(eigenvalues[ok], clean[0][ok]) and torch.equal(Q[ok], clean[1][ok])


@pytest.mark.parametrize("d", [7, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_on_a_cpu_do_not_depend_on_the_stack(d, dtype):
    X = randn(6, d, d).to(dtype)
    A = X @ X.mT
    stacked, orthogonal = linalg.eigh(A), linalg.orthogonalize(X)[0]
    for i in range(6):
        eigenvalues, Q, _ = linalg.eigh(A[i : i + 1].clone())
        assert torch.equal(eigenvalues[0], stacked[0][i]) and torch.equal(Q[0], stacked[1][i])
        assert torch.equal(linalg.orthogonalize(X[i : i + 1].clone())[0][0], orthogonal[i])


def test_a_failure_in_float32_is_tried_again_in_float64(monkeypatch):
    A, expected = with_condition(3, 10, 1e3)
    eigh, seen = torch.linalg.eigh, []

    def failing_eigh(matrix):
        seen.append(matrix.dtype)
        if len(seen) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh)
    eigenvalues, Q, ok = linalg.eigh(A.float())
    assert seen == [torch.float32] * 3 + [torch.float64] and ok.all()
    assert (eigenvalues.double() - expected).abs().max() <= tolerance(torch.float32)
    assert_orthonormal(Q, tolerance(torch.float32))


def test_a_decomposition_that_is_not_finite_is_tried_again_in_float64(monkeypatch):
    eigh = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda A: eigh(A) if A.dtype == torch.float64 else (A[0] * torch.nan, A * torch.nan)
    )
    A, expected = with_condition(2, 10, 1e3)
    eigenvalues, _, ok = linalg.eigh(A.float())
    assert ok.all() and (eigenvalues.double() - expected).abs().max() <= tolerance(torch.float32)


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, RuntimeError])
def test_a_decomposition_that_always_raises_is_reported_not_raised(monkeypatch, error):
    def failing(matrix):
        raise error("no")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch, "geqrf", failing)
    eigenvalues, Q, ok = linalg.eigh(torch.eye(4).repeat(2, 1, 1))
    assert not ok.any() and not eigenvalues.any() and torch.equal(Q, torch.eye(4).expand(2, 4, 4))
    Q, ok = linalg.orthogonalize(torch.ones(2, 4, 3))
    assert not ok.any() and torch.equal(Q, torch.eye(4, 3).expand(2, 4, 3))


def test_running_out_of_memory_is_raised(monkeypatch):
    def failing(matrix):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(torch.OutOfMemoryError):
        linalg.eigh(torch.eye(4)[None])


# orthogonalize and cholesky_qr


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 4),
    d=st.integers(1, 40),
    m=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_q_is_that_of_float64_up_to_signs(function, n, d, m, dtype, seed):
    m = min(d, m)
    Y = (randn(n, d, m, seed=seed) + 2 * torch.eye(d, m)).to(dtype)
    Q, ok = function(Y)
    assert Q.dtype == dtype and Q.shape == (n, d, m) and Q.is_contiguous() and ok.shape == (n,) and ok.all()
    if n == 0:
        return
    assert_orthonormal(Q, tolerance(dtype))
    R = Q.double().mT @ Y.double()
    size = Y.abs().max().item() * d
    assert R.tril(-1).abs().max() <= tolerance(dtype) * size
    assert (Q.double() @ R.triu() - Y).abs().max() <= tolerance(dtype) * size


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_condition_of_1e12_is_orthogonalised(function, dtype):
    Y = with_condition(3, 64, 1e12)[0].to(dtype)
    Q, ok = function(Y)
    assert ok.all()
    assert_orthonormal(Q, tolerance(dtype))
    assert (Q.mT @ Y).tril(-1).abs().max() <= tolerance(dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 63])
def test_a_rank_deficient_matrix_gives_an_orthonormal_basis_or_says_that_it_failed(function, dtype, rank):
    Y = (randn(6, 64, rank) @ randn(6, rank, 64, seed=1)).to(dtype)
    Q, ok = function(Y)
    if function is linalg.orthogonalize:
        assert ok.all()
    assert torch.equal(Q[~ok], torch.eye(64, dtype=dtype).expand(int((~ok).sum()), 64, 64))
    assert_orthonormal(Q, tolerance(dtype))
    assert not ok.any() or (Q.mT @ Y)[ok].tril(-1).abs().max() <= tolerance(dtype) * 64 * Y.abs().max()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_scales_of_columns_do_not_matter(function):
    Y = (randn(3, 16, 16) + 2 * torch.eye(16)).float()
    powers = torch.arange(16) * 12.0 - 90  # 2^-90 to 2^90, or 1e-27 to 1e27
    Q, ok = function(Y * 2.0**powers)
    assert ok.all() and torch.equal(Q, function(Y)[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_non_finite_matrix_does_not_disturb_the_others(function):
    Y = randn(3, 9, 5).float()
    clean, _ = function(Y)
    Y[1, 3, 2] = torch.nan
    Q, ok = function(Y)
    assert ok.tolist() == [True, False, True]
    assert torch.equal(Q[1], torch.eye(9, 5)) and torch.equal(Q[ok], clean[ok])


def test_cholesky_qr_agrees_with_householder_up_to_signs():
    Y, _ = with_condition(4, 48, 1e5)
    by_cholesky, _ = linalg.cholesky_qr(Y)
    by_householder, _ = linalg.orthogonalize(Y)
    signs = (by_cholesky * by_householder).sum(dim=-2, keepdim=True).sign()
    torch.testing.assert_close(by_cholesky, by_householder * signs, rtol=0, atol=1e-9)
    assert ((by_cholesky.mT @ Y).diagonal(dim1=1, dim2=2) > 0).all()


# contract


@pytest.mark.parametrize("function", [linalg.eigh, *FUNCTIONS])
def test_nothing_is_read_on_the_host(function):
    results = function(torch.empty(3, 4, 4, device="meta"))
    assert all(result.device.type == "meta" and result.shape[0] == 3 for result in results)


@pytest.mark.parametrize("function", [linalg.eigh, *FUNCTIONS])
def test_the_argument_is_not_changed(function):
    X = randn(3, 6, 6)
    A = X + X.mT
    before = A.clone()
    function(A)
    assert torch.equal(A, before)


@pytest.mark.parametrize("function", [linalg.eigh, *FUNCTIONS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.int64])
def test_other_dtypes_are_refused(function, dtype):
    with pytest.raises(TypeError, match=f"float32 or float64, got {dtype}"):
        function(torch.zeros(2, 3, 3, dtype=dtype))


@pytest.mark.parametrize("function", [linalg.eigh, *FUNCTIONS])
@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4), (2, 0, 0)])
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"got shape \("):
        function(torch.zeros(shape))


def test_eigh_refuses_tall_matrices():
    with pytest.raises(ValueError, match=r"\(n, d, d\), got shape \(2, 4, 3\)"):
        linalg.eigh(torch.zeros(2, 4, 3))

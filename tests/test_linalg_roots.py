"""Powers, largest eigenvalues and iterative inverse roots against eigendecompositions in float64."""

import pytest
import torch

from secondorder import linalg
from test_linalg import with_condition

ROOTS = [linalg.newton_root, linalg.newton_schulz_root]


def true_root(A, exponent):
    values, Q = torch.linalg.eigh(A.double())
    return Q * values.pow(-exponent)[:, None] @ Q.mT


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25, 0.125, -1.0, -0.5, -0.25, 0.3, -0.7, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_is_the_power(exponent, dtype):
    x = torch.logspace(-15, 15, 41, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(linalg.power(x, exponent).double(), x.double().pow(exponent), rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [0.5, -0.25, -0.7])
def test_power_does_not_depend_on_the_position(exponent):
    x = torch.rand(1, generator=torch.Generator().manual_seed(0)).expand(37).contiguous() * 1e-3
    assert linalg.power(x, exponent).unique().numel() == 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_roots_by_halving_scale_exactly(k):
    x = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linalg.power(x * 2.0 ** (2**k), -(2.0**-k)), linalg.power(x, -(2.0**-k)) / 2)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_largest_eigenvalue_is_a_lower_bound_within_a_few_per_cent(condition, scale):
    A, values = with_condition(4, 60, condition)
    found = linalg.largest_eigenvalue((A * scale).float()).double() / scale
    assert (found <= values[0] * (1 + 1e-5)).all() and (found >= 0.9 * values[0]).all()


def test_largest_eigenvalue_of_zero_is_zero():
    assert torch.equal(linalg.largest_eigenvalue(torch.zeros(2, 3, 3)), torch.zeros(2))


@pytest.mark.parametrize("exponent", [1.0, 0.5, 1 / 3, 0.25, 0.125])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_newton_finds_the_root(exponent, condition, scale):
    A = with_condition(3, 17, condition)[0] * scale
    X, ok = linalg.newton_root(A, exponent)
    assert ok.all()
    wanted = true_root(A, exponent)
    assert (X - wanted).abs().max() <= 1e-7 * wanted.abs().max()


@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_newton_schulz_finds_the_root(exponent, condition, scale):
    A = with_condition(3, 17, condition)[0] * scale
    X, ok = linalg.newton_schulz_root(A, exponent)
    assert ok.all()
    wanted = true_root(A, exponent)
    assert (X - wanted).abs().max() <= 1e-7 * wanted.abs().max()


@pytest.mark.parametrize("root", ROOTS)
def test_float32_matrices_of_condition_1e6_have_roots_of_float32_precision(root):
    A = with_condition(2, 40, 1e6)[0].float()
    X, ok = root(A, 0.25)
    assert ok.all() and X.dtype == torch.float32
    wanted = true_root(A, 0.25)
    assert (X - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("root", ROOTS)
def test_a_matrix_without_a_root_fails_alone(root):
    A = with_condition(4, 6, 10.0)[0].float()
    alone, _ = root(A[3:], 0.25)
    A[0], A[1, 2, 2], A[2] = 0.0, torch.nan, -torch.eye(6)
    X, ok = root(A, 0.25)
    assert ok.tolist() == [False, False, False, True]
    assert torch.equal(X[:3], torch.eye(6).expand(3, 6, 6))
    torch.testing.assert_close(X[3:], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("root", ROOTS)
def test_iterations_are_limited(root):
    A = with_condition(1, 6, 1e6)[0]
    assert not root(A, 0.25, max_iterations=3)[1].any()


def test_exponents_without_an_iteration_are_refused_by_value():
    A = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"1/p.*0\.4"):
        linalg.newton_root(A, 0.4)
    with pytest.raises(ValueError, match=r"2\^-k.*0\.33"):
        linalg.newton_schulz_root(A, 0.33)


@pytest.mark.parametrize("root", ROOTS)
def test_roots_need_no_host(root):
    X, ok = root(torch.empty(2, 4, 4, device="meta"), 0.25)
    assert X.shape == (2, 4, 4) and ok.shape == (2,)

"""Factors that are moved by products, against dense algebra in float64: layouts, sizes, dtypes, options, bounds."""

import functools

import pytest
import torch

pytest.importorskip("triton")
import draws  # noqa: E402
from laid import DEVICE, LAYOUTS, Laid, far_apart  # noqa: E402
from secondorder_kernels import explain  # noqa: E402
from secondorder_kernels.group import multiply_update, symmetrise  # noqa: E402
from secondorder_kernels.reference.rounding import stochastic_round  # noqa: E402

CONFIG = {"size": 32, "depth": 16, "num_warps": 4, "num_stages": 2}
SHAPES = [(3, 1), (2, 7), (1, 65), (1, 64), (0, 4), (3, 0)]
CASES = [(shape, LAYOUTS[i % 4]) for i, shape in enumerate(SHAPES)] + [((3, 33), layout) for layout in LAYOUTS]
BF16 = torch.bfloat16
randn = functools.partial(draws.randn, dtype=torch.float32, device=DEVICE)
pytestmark = pytest.mark.usefixtures("triton_mode")


def rows(n, first=0.1):
    return torch.linspace(first, 0.9, n, device=DEVICE)


def factors(n, d, skew=0.3):
    """Symmetric positive definite matrices and something that is not symmetric."""
    A = randn(n, d, d) / max(d, 1) ** 0.5
    return torch.eye(d, device=DEVICE) + A @ A.mT + skew * randn(n, d, d, seed=1) / max(d, 1) ** 0.5


def moved(K, M, step, keep=None):
    """In float64."""
    kept = K.double() if keep is None else K.double() * keep.double()[:, None, None]
    return kept - step.double()[:, None, None] * torch.einsum("nik,nkj->nij", K.double(), M.double())


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


# multiply_update


@pytest.mark.parametrize(("shape", "layout"), CASES)
@pytest.mark.parametrize("lower", [False, True])
def test_every_layout_and_size(shape, layout, lower):
    n, d = shape
    K, M = factors(n, d), randn(n, d, d, seed=2)
    K, M = (K.tril(), M.tril()) if lower else (K, M)
    keep = rows(n, 0.5) if layout in ("rows", "sliced") else None
    new, squares = multiply_update(
        Laid(K, layout).t, Laid(M, LAYOUTS[LAYOUTS.index(layout) - 1]).t, rows(n), keep=keep, lower=lower
    )
    expected = moved(K, M, rows(n), keep)
    close(new, expected)
    close(squares, (expected**2).sum((1, 2)))
    assert new.is_contiguous() and (not lower or not new.triu(1).any())


@pytest.mark.parametrize("precision", ["highest", "medium"], indirect=True)
@pytest.mark.parametrize("lower", [False, True])
def test_bfloat16_is_the_rounded_result_of_float32(lower, precision):
    K, M, keys = factors(2, 40).to(BF16), randn(2, 40, 40, seed=2), torch.tensor([5, 2**32 - 1], device=DEVICE)
    K, M = (K.tril(), M.tril()) if lower else (K, M)
    new, squares = multiply_update(Laid(K, "sliced").t, M, rows(2), lower=lower, keys=keys)
    wide, _ = multiply_update(K.float(), M, rows(2), lower=lower)
    assert torch.equal(new, stochastic_round(wide, keys))
    close(wide, moved(K, M, rows(2)), 2e-5 if precision == "highest" else 3e-2)
    close(squares, new.double().square().sum((1, 2)))


def test_a_step_of_0_keeps_the_bits_of_a_row():
    K, M, step = factors(3, 33), randn(3, 33, 33), torch.tensor([0.0, 0.5, 0.0], device=DEVICE)
    new, _ = multiply_update(K, M, step)
    assert torch.equal(new[[0, 2]], K[[0, 2]]) and not torch.equal(new[1], K[1])
    half = K.to(BF16)
    assert torch.equal(multiply_update(half, M, 0 * step, keys=torch.tensor([1, 2, 3], device=DEVICE))[0], half)


def test_what_is_not_finite_stays_in_its_row():
    K, M = factors(3, 33), randn(3, 33, 33)
    K[1, 20, 3] = torch.nan
    new, squares = multiply_update(K, M, rows(3))
    assert new[1, 20].isnan().all() and new[1, :20].isfinite().all() and new[[0, 2]].isfinite().all()
    assert squares.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("highest", 0, 1e-6), ("high", 0, 1e-6), ("medium", 1e-4, 2e-2)],
    indirect=["precision"],
)
@pytest.mark.parametrize("function", [lambda K: multiply_update(K, K, -rows(1))[0], symmetrise])
def test_the_precision_of_products_is_that_of_torch(function, precision, least, most):
    K = randn(1, 32, 32)
    expected = moved(K, K, -rows(1)) if function is not symmetrise else rotated(K)
    error = ((function(K).double() - expected).abs().max() / expected.abs().max()).item()
    assert least <= error <= most


@pytest.mark.parametrize("function", [lambda K: multiply_update(K, K.mT, rows(2))[0], symmetrise])
def test_results_are_the_same_bits_every_time_and_arguments_stay(function):
    K = factors(2, 40)
    before = K.clone()
    assert torch.equal(function(K), function(K)) and torch.equal(K, before)


@pytest.mark.parametrize("strides", [(2**30, 3, 1), (2**4, 2**30, 1), (2**4, 1, 2**30)])
def test_offsets_beyond_2_31_elements_are_right(tmp_path, strides):
    far = far_apart(tmp_path, (3, 3, 3), strides, torch.float32)
    K = far.copy_(factors(3, 3))
    close(multiply_update(K, K, rows(3))[0], moved(K, K, rows(3)))
    close(symmetrise(K), rotated(K))


# symmetrise


def rotated(K):
    """In float64: the second order of a rotation along the skew part, by Newton's step for the trace."""
    K = K.double()
    S = K.mT - K
    R = S / torch.linalg.matrix_norm(S, keepdim=True).clamp_min(1e-300)
    first, second = (torch.einsum("nij,nji->n", K, P) for P in (R, R @ R))
    turn = torch.where(second < 0, -first / second, 0.5).clamp(max=0.5)[:, None, None]
    return K + turn * K @ R + turn**2 / 2 * K @ R @ R


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_every_layout_and_size_is_rotated(shape, layout):
    K = factors(*shape)
    new = symmetrise(Laid(K, layout).t)
    close(new, rotated(K))
    assert new.is_contiguous()


def test_matrices_of_no_definite_sign_are_turned_by_one_half_at_most():
    K = randn(2, 20, 20) - 3 * torch.eye(20, device=DEVICE)  # tr(K R R) > 0
    close(symmetrise(K), rotated(K))


def test_symmetric_matrices_keep_their_bits_and_rows_are_apart():
    K = factors(4, 33)
    K[0] = K[0] + K[0].T
    K[1] = K[0]
    K[1, 0, 1] = torch.nextafter(
        K[1, 0, 1], torch.tensor(9.0, device=DEVICE)
    )  # symmetric as far as single precision goes
    K[2, 3, 4] = torch.nan
    new = symmetrise(K)
    assert torch.equal(new[:2], K[:2]) and new[2].isnan().any() and torch.equal(new[3], symmetrise(K[3:])[0])


# dispatch


@pytest.mark.parametrize("function", [lambda K: multiply_update(K, K, K[:, 0, 0]), symmetrise])
def test_double_precision_is_refused(function):
    with pytest.raises(RuntimeError, match="float64"):
        function(factors(2, 3).double())


def test_both_are_taken_by_the_registered_operations():
    K, M, operations = factors(2, 9), randn(2, 9, 9), torch.ops.secondorder
    half = {"keys": torch.tensor([1, 2], device=DEVICE)}
    assert explain("multiply_update", K.to(BF16), M, rows(2), **half) == ("triton", "the mode is 'triton'")
    assert explain("symmetrise", K) == ("triton", "the mode is 'triton'")
    torch.library.opcheck(operations.symmetrise.default, (K.mT,))
    torch.library.opcheck(operations.multiply_update.default, (K.mT, M, rows(2)), {"keep": rows(2)})
    torch.library.opcheck(operations.multiply_update.default, (K.to(BF16), M, rows(2)), half)

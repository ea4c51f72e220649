"""Factors that are moved by products, against dense algebra in float64."""

import pytest
import torch

from draws import randn
from laid import LAYOUTS, Laid
from secondorder_kernels import use_kernels
from secondorder_kernels.group import multiply_update, symmetrise

F64 = torch.float64


def factors(n, d, skew=0.3, dtype=F64):
    """Symmetric positive definite matrices and something that is not symmetric."""
    A = randn(n, d, d) / d**0.5
    return (torch.eye(d, dtype=F64) + A @ A.mT + skew * randn(n, d, d, seed=1) / d**0.5).to(dtype)


# multiply_update


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("n", "d"), [(3, 7), (1, 1), (0, 4), (2, 33)])
def test_factors_move_along_the_product_and_their_squares_are_summed(n, d, kept, dtype):
    K, M, step = factors(n, d, dtype=dtype), randn(n, d, d, seed=2, dtype=dtype), torch.linspace(0.1, 0.9, n)
    keep = torch.linspace(0.5, 2, n, dtype=dtype) if kept else None
    K = K.mT.contiguous().mT
    before = K.clone(), M.clone()
    new, squares = multiply_update(K, M, step.to(dtype), keep=keep)
    weight = torch.ones(n, dtype=F64) if keep is None else keep.double()
    product = torch.einsum("nik,nkj->nij", K.double(), M.double())
    expected = weight[:, None, None] * K.double() - step.to(dtype).double()[:, None, None] * product
    torch.testing.assert_close(new.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    assert new.dtype == squares.dtype == dtype and new.is_contiguous()
    torch.testing.assert_close(squares.double(), (expected**2).sum((1, 2)), rtol=1e-5, atol=0)
    assert torch.equal(K, before[0]) and torch.equal(M, before[1])


def test_lower_triangular_factors_stay_so():
    K, M, step = factors(2, 9).tril(), randn(2, 9, 9).tril(), torch.full((2,), 0.3, dtype=F64)
    new, squares = multiply_update(K, M, step, lower=True)
    torch.testing.assert_close(new, K - 0.3 * torch.einsum("nik,nkj->nij", K, M))
    assert not new.triu(1).any()
    torch.testing.assert_close(squares, new.square().sum((1, 2)))


def test_a_step_of_0_keeps_the_bits_of_a_row():
    K, M = factors(2, 9, dtype=torch.float32), randn(2, 9, 9, dtype=torch.float32)
    assert torch.equal(multiply_update(K, M, torch.tensor([0.0, 0.5]))[0][0], K[0])
    half, keys = K.bfloat16(), torch.tensor([3, 4])
    assert torch.equal(multiply_update(half, M, torch.zeros(2), keys=keys)[0], half)


def test_bfloat16_factors_are_rounded_to_a_neighbour_and_are_right_on_average():
    K, M, step = factors(1, 8).bfloat16(), randn(1, 8, 8, dtype=torch.float32), torch.tensor([0.01])
    expected = K.double() - 0.01 * torch.einsum("nik,nkj->nij", K.double(), M.double())
    ulp = 2.0 ** (expected.abs().log2().floor() - 7)
    n = 2000
    keys = torch.arange(n) * 7919
    new, squares = multiply_update(K.expand(n, 8, 8), M.expand(n, 8, 8), step.expand(n), keys=keys)
    assert new.dtype == torch.bfloat16
    assert ((new.double() - expected).abs() < ulp * 1.001).all()
    assert ((new.double().mean(0) - expected[0]).abs() < 5 * 0.5 * ulp[0] / n**0.5).all()  # 5 standard deviations
    torch.testing.assert_close(squares.double(), new.double().square().sum((1, 2)), rtol=1e-5, atol=0)


def test_other_shapes_are_refused_and_shown():
    K, step = torch.zeros(2, 3, 3), torch.zeros(2)
    for tensors, options in [
        ((K[0], K[0], step), {}),
        ((K[:, :2], K[:, :2], step), {}),
        ((K, K[:1], step), {}),
        ((K, K, step[:, None]), {}),
        ((K, K, step), {"keep": step[:1]}),
    ]:
        with pytest.raises(ValueError, match=r"K and M \(n, d, d\) and step, keep and keys \(n,\), got") as error:
            multiply_update(*tensors, **options)
        assert all(str(tuple(t.shape)) in str(error.value) for t in (*tensors, *options.values()))


@pytest.mark.parametrize(
    ("dtypes", "keys", "message"),
    [
        ((torch.float32, F64, F64), None, "one dtype, float32 or float64, or K of bfloat16"),
        ((torch.float16, torch.float16, torch.float16), None, "one dtype"),
        ((torch.bfloat16, F64, F64), torch.zeros(2, dtype=torch.int64), "one dtype"),
        ((torch.float32, torch.float32, F64), None, "step and keep in the dtype of M"),
        ((torch.bfloat16, torch.float32, torch.float32), None, "got none for torch.bfloat16"),
        ((torch.bfloat16, torch.float32, torch.float32), torch.zeros(2, dtype=torch.int32), "got torch.int32"),
        ((torch.float32, torch.float32, torch.float32), torch.zeros(2, dtype=torch.int64), "if and only if"),
    ],
)
def test_other_dtypes_are_refused(dtypes, keys, message):
    K, M, step = (torch.zeros(shape, dtype=t) for shape, t in zip([(2, 3, 3), (2, 3, 3), 2], dtypes, strict=True))
    with pytest.raises(TypeError, match=message):
        multiply_update(K, M, step, keys=keys)


# symmetrise


def gram_defect(K, new):
    return torch.linalg.matrix_norm(new @ new.mT - K @ K.mT)


def test_a_step_is_the_second_order_rotation_along_the_skew_part():
    K = factors(3, 12)
    S = K.mT - K
    R = S / torch.linalg.matrix_norm(S, keepdim=True)
    first, second = (torch.einsum("nij,nji->n", K, P) for P in (R, R @ R))
    turn = (-first / second).clamp(max=0.5)[:, None, None]
    torch.testing.assert_close(symmetrise(K), K + turn * K @ R + turn**2 / 2 * K @ R @ R)
    rotated = K @ torch.matrix_exp(turn * R)
    assert (
        torch.linalg.matrix_norm(symmetrise(K) - rotated) <= turn[:, 0, 0] ** 3 / 6 * 1.1 * K.abs().amax() * 12
    ).all()


def test_what_a_factor_stands_for_stays_to_third_order():
    defects = [gram_defect(K, symmetrise(K)) for skew in (0.2, 0.1) for K in [factors(3, 12, skew)]]
    assert (defects[1] < defects[0] / 6).all()  # 2^-3 and a little


def test_factors_come_near_to_their_symmetric_polar_factors():
    K = factors(3, 12)
    U, d, _ = torch.linalg.svd(K)
    polar = U @ torch.diag_embed(d) @ U.mT
    near, new = [], K
    for _ in range(12):
        near.append(torch.linalg.matrix_norm(new - polar))
        new = symmetrise(new)
    assert (near[1] < 0.8 * near[0]).all() and (near[-1] < 0.02 * near[0]).all()
    trace = [A.diagonal(dim1=1, dim2=2).sum(1) for A in (K, symmetrise(K))]
    assert (trace[1] > trace[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_symmetric_factors_keep_their_bits_and_rows_are_apart(dtype):
    K = factors(4, 9, dtype=dtype)
    K[0] = K[0] + K[0].T
    K[1] = K[0]
    K[1, 0, 1] *= 1 + 2 * torch.finfo(dtype).eps  # symmetric as far as single precision goes
    K[2, 3, 4] = torch.nan
    new = symmetrise(K)
    assert torch.equal(new[:2], K[:2]) and new[2].isnan().any()
    torch.testing.assert_close(new[3], symmetrise(K[3:].clone())[0])


def test_symmetrise_refuses_other_shapes_and_dtypes():
    with pytest.raises(ValueError, match=r"\(n, d, d\), got shape \(2, 3, 4\)"):
        symmetrise(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="got torch.bfloat16"):
        symmetrise(torch.zeros(2, 3, 3).bfloat16())


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_is_read_on_the_host(mode):
    K, row = torch.empty(2, 3, 3, device="meta"), torch.empty(2, device="meta")
    with use_kernels(mode):
        assert symmetrise(K).shape == K.shape
        new, squares = multiply_update(K, K, row, keep=row)
        assert new.shape == K.shape and squares.shape == row.shape
        keys = torch.empty(2, dtype=torch.int64, device="meta")
        assert multiply_update(K.bfloat16(), K, row, keys=keys)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_operations_make_what_they_promise(layout):
    K, M = (Laid(factors(3, 5, dtype=torch.float32), layout).t for _ in range(2))
    operations = torch.ops.secondorder
    step, keys = torch.rand(3, device=K.device), torch.tensor([1, 2, 3], device=K.device)
    with use_kernels("reference"):
        torch.library.opcheck(operations.symmetrise.default, (K,))
        torch.library.opcheck(operations.multiply_update.default, (K, M, step), {"keep": step})
        torch.library.opcheck(operations.multiply_update.default, (K.bfloat16(), M, step), {"keys": keys})

"""Structured factors against dense algebra in float64."""

import pytest
import torch

from draws import randn
from laid import LAYOUTS, Laid
from secondorder_kernels import use_kernels
from secondorder_kernels.group import multiply_update
from secondorder_kernels.structured import block_apply, diagonal_apply, diagonal_moments

DTYPES = [torch.float32, torch.float64]


def near(found, expected):
    half = found.dtype in (torch.bfloat16, torch.float16)
    tolerance = 1e-2 if half else 1e-5 if found.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def diagonals(n, d1, d2, dtype):
    G = randn(n, d2, d1, dtype=dtype).mT
    return G, randn(n, d1, seed=1, dtype=dtype), randn(n, d2, seed=2, dtype=dtype)


# diagonal factors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (0, 2, 3), (2, 30, 40)])
def test_diagonal_moments_are_the_diagonals_of_both_gram_matrices(shape, dtype):
    G, a, b = diagonals(*shape, dtype)
    W = torch.diag_embed(a.double()) @ G.double() @ torch.diag_embed(b.double())
    rows, columns = diagonal_moments(G, a, b)
    assert rows.dtype == columns.dtype == dtype
    near(rows, (W @ W.mT).diagonal(dim1=1, dim2=2))
    near(columns, (W.mT @ W).diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (0, 2, 3)])
def test_diagonal_apply_multiplies_by_the_squares_of_both_diagonals(shape, dtype):
    G, a, b = diagonals(*shape, dtype)
    before = G.clone()
    A, B = torch.diag_embed(a.double()), torch.diag_embed(b.double())
    near(diagonal_apply(G, a, b), A @ A.mT @ G.double() @ B @ B.mT)
    assert torch.equal(G, before)


@pytest.mark.parametrize("function", [diagonal_moments, diagonal_apply])
def test_diagonal_factors_of_other_shapes_and_dtypes_are_refused(function):
    G, a, b = diagonals(2, 3, 4, torch.float32)
    for tensors in ((G[0], a[0], b[0]), (G, b, a), (G, a[:1], b), (G, a, b[:, None])):
        with pytest.raises(ValueError, match=r"G \(n, d1, d2\), a \(n, d1\) and b \(n, d2\), got") as error:
            function(*tensors)
        assert all(str(tuple(t.shape)) in str(error.value) for t in tensors)
    for tensors in ((G, a.double(), b), (G.bfloat16(), a.bfloat16(), b.bfloat16())):
        with pytest.raises(TypeError, match="one dtype, float32 or float64"):
            function(*tensors)


# diagonal blocks


def dense(K):
    return torch.stack([torch.block_diag(*row) for row in K.double()])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "q", "b", "m"), [(2, 3, 4, 5), (1, 1, 1, 1), (0, 2, 3, 3), (2, 0, 3, 3)])
def test_block_apply_is_the_product_with_the_block_diagonal_matrix(n, q, b, m, transposed, dtype):
    K, X = randn(n, q, b, b, dtype=dtype), randn(n, m, q * b, seed=1, dtype=dtype).mT.unflatten(1, (q, b))
    if n * q == 0:
        assert block_apply(K, X, transposed=transposed).shape == X.shape
        return
    full = dense(K)
    expected = (full.mT if transposed else full) @ X.double().flatten(1, 2)
    found = block_apply(K, X, transposed=transposed)
    assert found.is_contiguous() and found.dtype == dtype
    near(found.flatten(1, 2), expected)


def test_products_of_block_diagonal_factors_are_those_of_stacks():
    K, m, step = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), torch.tensor([0.1, 0.7], dtype=torch.float64)
    new, squares = multiply_update(K.flatten(0, 1), m.flatten(0, 1), step.repeat_interleave(3))
    expected = dense(K) - step[:, None, None] * dense(K) @ dense(m)
    torch.testing.assert_close(dense(new.view(2, 3, 4, 4)), expected)
    torch.testing.assert_close(squares.view(2, 3).sum(1), torch.linalg.matrix_norm(expected).square())


def test_blocks_of_other_shapes_and_dtypes_are_refused():
    K, X = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5)
    for tensors in ((K[0], X[0]), (K[:, :2], X), (K[..., :3], X), (K, X[..., :3, :])):
        with pytest.raises(ValueError, match=r"K \(n, q, b, b\) and X \(n, q, b, m\), got") as error:
            block_apply(*tensors)
        assert all(str(tuple(t.shape)) in str(error.value) for t in tensors)
    with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.float64"):
        block_apply(K, X.double())


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_is_read_on_the_host(mode):
    G, K = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, 4, 4, device="meta")
    with use_kernels(mode):
        rows, columns = diagonal_moments(G, G[:, :, 0], G[:, 0])
        assert (rows.shape, columns.shape) == ((2, 3), (2, 4))
        assert diagonal_apply(G, G[:, :, 0], G[:, 0]).shape == G.shape
        assert block_apply(K, K, transposed=True).shape == K.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_operations_make_what_they_promise(layout):
    def laid(*shape):
        return Laid(randn(*shape, dtype=torch.float32), layout).t

    operations, a, b = torch.ops.secondorder, laid(3, 5), laid(3, 4)
    with use_kernels("reference"):
        torch.library.opcheck(operations.diagonal_moments.default, (laid(3, 5, 4), a, b))
        torch.library.opcheck(operations.diagonal_apply.default, (laid(3, 5, 4), a, b))
        torch.library.opcheck(operations.block_apply.default, (laid(2, 3, 4, 4), laid(2, 3, 4, 5)))

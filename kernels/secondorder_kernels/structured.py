"""Structured factors: diagonal ones, whose sums and products need one reading of the gradient, and diagonal blocks.

Products of whole blocks with each other are those of stacks: `multiply_update` and Gram matrices take `(n q, b, b)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels import kinds, policy
from secondorder_kernels.dispatch import Operation
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import structured as reference


def _diagonal_example(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 64, 64, device=device), torch.zeros(2, 64, device=device), torch.zeros(2, 64, device=device)


def _diagonal_tensors(G: Tensor, a: Tensor, b: Tensor) -> list[Tensor | None]:
    return [G, a, b]


def _diagonal_shape(G: Tensor, a: Tensor, b: Tensor) -> Shape:
    return f"float32/{kinds.layout(G)}", tuple(G.shape)


_diagonal_moments = Operation(
    reference.diagonal_moments,
    _diagonal_example,
    (
        triton_path(
            "diagonal_moments",
            "structured:diagonal_moments",
            tensors=_diagonal_tensors,
            shape=_diagonal_shape,
            dtypes=(torch.float32,),
        ),
    ),
    schema="(Tensor G, Tensor a, Tensor b) -> (Tensor, Tensor)",
    fake=lambda G, a, b: (a.new_empty(a.shape), b.new_empty(b.shape)),
)


def diagonal_moments(G: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the rows and of the columns of diag(a) G diag(b): the diagonals of W Wᵀ and Wᵀ W.

    Args:
        G: Matrices, shape `(n, d1, d2)` with any strides, float32 or float64.
        a: Diagonals on the left, shape `(n, d1)`, in the dtype of `G`.
        b: Diagonals on the right, shape `(n, d2)`, in the dtype of `G`.

    Returns:
        Sums over j, `(n, d1)`, and over i, `(n, d2)`, of (a_i G_ij b_j)².

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes differ.
    """
    _check_diagonals("diagonal_moments", G, a, b)
    rows, columns = _diagonal_moments(G, a, b)
    return rows, columns


_diagonal_apply = Operation(
    reference.diagonal_apply,
    _diagonal_example,
    (
        triton_path(
            "diagonal_apply",
            "structured:diagonal_apply",
            tensors=_diagonal_tensors,
            shape=_diagonal_shape,
            dtypes=(torch.float32,),
        ),
    ),
    schema="(Tensor G, Tensor a, Tensor b) -> Tensor",
    fake=lambda G, a, b: torch.empty_like(G),
)


def diagonal_apply(G: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """diag(a)² G diag(b)²: what factors K Kᵀ with diagonal K do to a gradient.

    Args:
        G: Matrices, shape `(n, d1, d2)` with any strides, float32 or float64.
        a: Diagonals on the left, shape `(n, d1)`, in the dtype of `G`.
        b: Diagonals on the right, shape `(n, d2)`, in the dtype of `G`.

    Returns:
        a_i (a_i G_ij) b_j b_j, a new tensor `(n, d1, d2)` with the strides of `empty_like(G)`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes differ.
    """
    _check_diagonals("diagonal_apply", G, a, b)
    scaled: Tensor = _diagonal_apply(G, a, b)
    return scaled


def _check_diagonals(function: str, G: Tensor, a: Tensor, b: Tensor) -> None:
    if G.ndim != 3 or a.shape != G.shape[:2] or b.shape != (G.shape[0], G.shape[2]):
        shapes = f"{tuple(G.shape)}, {tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{function} takes G (n, d1, d2), a (n, d1) and b (n, d2), got {shapes}")
    if G.dtype not in (torch.float32, torch.float64) or a.dtype != G.dtype or b.dtype != G.dtype:
        dtypes = f"{G.dtype}, {a.dtype} and {b.dtype}"
        raise TypeError(f"{function} takes G, a and b of one dtype, float32 or float64, got {dtypes}")


def _block_shape(K: Tensor, X: Tensor, *, transposed: bool = False) -> Shape:
    kind = f"{kinds.dtypes(K)}/{policy.precision(K.dtype)}/{kinds.layout(K.mT if transposed else K, X)}"
    return kind, (X.shape[0] * X.shape[1], *X.shape[2:])


_block_apply = Operation(
    reference.block_apply,
    lambda device: (torch.zeros(2, 4, 32, 32, device=device), torch.zeros(2, 4, 32, 64, device=device)),
    (
        triton_path(
            "block_apply",
            "structured:block_apply",
            tensors=lambda K, X, *, transposed=False: [K, X],
            shape=_block_shape,
        ),
    ),
    schema="(Tensor K, Tensor X, *, bool transposed=False) -> Tensor",
    fake=lambda K, X, *, transposed=False: X.new_empty(X.shape),
)


def block_apply(K: Tensor, X: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply every block of rows by the block of a block-diagonal factor: K X, or Kᵀ X.

    The precision of float32 products follows `torch.get_float32_matmul_precision()`; half precision is accumulated in
    float32.

    Args:
        K: q blocks of n factors, shape `(n, q, b, b)` with any strides.
        X: Rows by block, shape `(n, q, b, m)` with any strides, in the dtype of `K`.
        transposed: Multiply by the transposed blocks.

    Returns:
        The products, a new contiguous tensor `(n, q, b, m)`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes differ.
    """
    if X.ndim != 4 or K.shape != (*X.shape[:2], X.shape[2], X.shape[2]):
        raise ValueError(
            f"block_apply takes K (n, q, b, b) and X (n, q, b, m), got {tuple(K.shape)} and {tuple(X.shape)}"
        )
    if K.dtype != X.dtype:
        raise TypeError(f"block_apply takes K and X of one dtype, got {K.dtype} and {X.dtype}")
    product: Tensor = _block_apply(K, X, transposed=transposed)
    return product

"""Algebra of the modes (axes) of stacked blocks `(n, d1, ..., dk)`."""

from __future__ import annotations

from torch import Tensor


def unfold(X: Tensor, mode: int) -> Tensor:
    """Mode unfolding: `(n, d_mode, product of the other dimensions)`; a view where the block is a matrix."""
    if X.ndim == 3:
        return X if mode == 0 else X.mT
    return X.movedim(mode + 1, 1).reshape(X.shape[0], X.shape[mode + 1], -1)


def gram(X: Tensor, mode: int) -> Tensor:
    """`X_(mode) X_(mode)^T`, `(n, d, d)`."""
    M = unfold(X, mode)
    return M @ M.mT


def mul(A: Tensor, X: Tensor, mode: int) -> Tensor:
    """Mode product: contract the columns of `A (n, d, d)` with a mode of `X`; for matrices `A X` or `X A^T`."""
    if X.ndim == 3:
        return A @ X if mode == 0 else X @ A.mT
    Y = X.movedim(mode + 1, 1)
    return (A @ Y.reshape(Y.shape[0], Y.shape[1], -1)).view(Y.shape).movedim(1, mode + 1)


def along(a: Tensor, X: Tensor, mode: int) -> Tensor:
    """`a (n, d_mode)` as a tensor that broadcasts along one mode of `X`."""
    return a.view(a.shape[0], *(a.shape[1] if j == mode else 1 for j in range(X.ndim - 1)))


def mean_square(X: Tensor) -> Tensor:
    """`(n,)`, over all entries of a block."""
    return X.flatten(1).square().mean(1)

"""Algebra of the modes (axes) of stacked blocks `(n, d1, ..., dk)`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import secondorder_kernels as kernels


def unfold(X: Tensor, mode: int) -> Tensor:
    """Mode unfolding: `(n, d_mode, product of the other dimensions)`; a view where the block is a matrix."""
    if X.ndim == 3:
        return X if mode == 0 else X.mT
    return X.movedim(mode + 1, 1).reshape(X.shape[0], X.shape[mode + 1], -1)


def gram(X: Tensor, mode: int, scale: float | Tensor = 1.0) -> Tensor:
    """`scale X_(mode) X_(mode)^T`, `(n, d, d)`; a number, or one for each block `(n,)`."""
    return kernels.gram(unfold(X, mode), scale=scale)


def fold_(averages: Mapping[int, Tensor], roots: Mapping[int, Tensor], rate: Tensor) -> None:
    """`C_i <- C_i + rate (R_i R_i^T - C_i)` for the modes that have an average, rate `(n,)`, in place.

    Args:
        averages: `C_i (n, d_i, d_i)` by mode.
        roots: `R_i (n, d_i, m_i)` by mode.
        rate: One for each block.
    """
    if averages.keys() == {0, 1} and _are_transposes(roots[0], roots[1]):
        kernels.ema_syrk_pair_(averages[0], averages[1], roots[0], rate)
        return
    for i, average in averages.items():
        kernels.ema_syrk_(average, roots[i], rate)


def _are_transposes(X: Tensor, Y: Tensor) -> bool:
    """Whether one is a view of the other, transposed: the two unfoldings of a matrix."""
    return X.data_ptr() == Y.data_ptr() and X.shape == Y.mT.shape and X.stride() == Y.mT.stride()


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

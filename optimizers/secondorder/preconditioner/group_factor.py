"""Factors that are elements of a matrix group, `K_i K_i^T` per mode: how they act on a tensor, and their spectra."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.modes import unfold
from secondorder.preconditioner.structures import Diagonal, Structure


def act_along(act: Callable[[Tensor, Tensor], Tensor], K: Tensor, X: Tensor, mode: int) -> Tensor:
    """`act(K, ·)` on the vectors of `X (n, d_1, ..., d_k)` along a mode."""
    Y = X.movedim(mode + 1, 1)
    return act(K, unfold(X, mode)).view(Y.shape).movedim(1, mode + 1)


def square_along(kind: Structure, K: Tensor, X: Tensor, mode: int) -> Tensor:
    """`X ×_mode K K^T`."""
    return act_along(kind.apply, K, act_along(kind.apply_t, K, X, mode), mode)


def square_spectrum(kind: Structure, K: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues `(n, d)`, positive, and eigenvectors (None: the axes) of `K K^T`."""
    if isinstance(kind, Diagonal):
        return K.square(), None
    full = kind.to_dense(K)
    values, vectors, _ = linalg.eigh(full @ full.mT)
    return torch.maximum(values, torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)), vectors

"""Factors that are elements of a matrix group, `K_i K_i^T` per mode: how they act on a tensor, and their spectra."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.modes import unfold
from secondorder.preconditioner.structures import Diagonal, Structure
from secondorder_kernels import diagonal_apply, diagonal_moments


def act_along(act: Callable[[Tensor, Tensor], Tensor], K: Tensor, X: Tensor, mode: int) -> Tensor:
    """`act(K, ·)` on the vectors of `X (n, d_1, ..., d_k)` along a mode."""
    Y = X.movedim(mode + 1, 1)
    return act(K, unfold(X, mode)).view(Y.shape).movedim(1, mode + 1)


def square_along(kind: Structure, K: Tensor, X: Tensor, mode: int) -> Tensor:
    """`X ×_mode K K^T`."""
    return act_along(kind.apply, K, act_along(kind.apply_t, K, X, mode), mode)


def apply_squares(kinds: Mapping[int, Structure], K: Mapping[int, Tensor], X: Tensor) -> Tensor:
    """`X ×_i K_i K_i^T` for all modes with a factor."""
    if _is_diagonal_matrix(kinds, X):
        return diagonal_apply(X, K[0], K[1])
    for i, kind in kinds.items():
        X = square_along(kind, K[i], X, i)
    return X


def whitened_grams(kinds: Mapping[int, Structure], K: Mapping[int, Tensor], X: Tensor) -> dict[int, Tensor]:
    """`Π(T_(i) T_(i)^T)` by mode, `T = X ×_j K_j^T` for all modes with a factor."""
    if _is_diagonal_matrix(kinds, X):
        return dict(enumerate(diagonal_moments(X, K[0], K[1])))
    for i, kind in kinds.items():
        X = act_along(kind.apply_t, K[i], X, i)
    return {i: kind.project_gram(unfold(X, i)) for i, kind in kinds.items()}


def _is_diagonal_matrix(kinds: Mapping[int, Structure], X: Tensor) -> bool:
    """Whether blocks are matrices with a diagonal factor on either side: then nothing need be stored in between."""
    return X.ndim == 3 and len(kinds) == 2 and all(isinstance(kind, Diagonal) for kind in kinds.values())


def square_spectrum(kind: Structure, K: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues `(n, d)`, positive, and eigenvectors (None: the axes) of `K K^T`."""
    if isinstance(kind, Diagonal):
        return K.square(), None
    full = kind.to_dense(K)
    values, vectors, _ = linalg.eigh(full @ full.mT)
    return torch.maximum(values, torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)), vectors

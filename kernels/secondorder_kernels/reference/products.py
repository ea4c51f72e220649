"""Symmetric products of stacked matrices. See `products.py` and `grams.py` of the package above for arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secondorder_kernels.reference.rounding import stochastic_round


def ema_syrk_(
    C: Tensor,
    X: Tensor,
    rate: Tensor,
    *,
    lower: bool = False,
    weight: Tensor | None = None,
    ones: bool = False,
    moments: Tensor | None = None,
    keys: Tensor | None = None,
) -> None:
    """C ← C + rate (X diag(weight) Xᵀ - C), one rate per matrix."""
    rate = rate[:, None, None]
    S = sums(X.to(rate.dtype), weight, ones)
    if keys is None and not lower:
        C.lerp_(S, rate)
    else:
        moved = C.to(rate.dtype).lerp(S, rate)
        below = torch.ones_like(C[0], dtype=torch.bool).tril()
        if keys is not None:
            moved = stochastic_round(moved, keys)
            # Noise hangs on the position: rounded one by one, two mirrored entries would differ.
            moved = torch.where(below | (rate == 0), moved, moved.mT)
        C.copy_(torch.where(below, moved, C) if lower else moved)
    if moments is not None:
        moments.copy_(moments_of(C))


def ema_syrk_pair_(L: Tensor, R: Tensor, G: Tensor, rate: Tensor) -> None:
    """The averages of both unfoldings of a matrix."""
    ema_syrk_(L, G, rate)
    ema_syrk_(R, G.mT, rate)


def gram(
    X: Tensor,
    *,
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
    weight: Tensor | None = None,
    ones: bool = False,
) -> Tensor:
    """`scale X diag(weight) Xᵀ`."""
    return scaled(sums(X, weight, ones), scale, scale_tensor)


def add_gram_(C: Tensor, X: Tensor, scale: Tensor) -> None:
    """C ← C + scale X Xᵀ, one scale per matrix."""
    C.add_(scaled(sums(X.to(C.dtype)), 1.0, scale))


def symmetric_product(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    C: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """`alpha A B + beta C + diagonal I`."""
    product = torch.bmm(A, B)
    if alpha != 1:
        product.mul_(alpha)
    if C is not None:
        product.add_(C, alpha=beta)
    if diagonal:
        product.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return product


def whole(Y: Tensor, X: Tensor) -> Tensor:
    """`Y Xᵀ`, every entry by itself."""
    return torch.bmm(Y, X.mT)


def sums(
    X: Tensor,
    weight: Tensor | None = None,
    ones: bool = False,
    product: Callable[[Tensor, Tensor], Tensor] = whole,
) -> Tensor:
    """`X diag(weight) Xᵀ` in the dtype of X, where `ones` of X with a last row of ones; `product` makes `Y Xᵀ`."""
    dtype = X.dtype
    if weight is None:
        Y = X
    else:
        X = X.to(weight.dtype)
        Y = X * weight[:, None]
    S = product(Y, X)
    if ones:
        column = Y.sum(2, keepdim=True)
        count = X.new_full((len(X), 1, 1), X.shape[2]) if weight is None else weight.sum(1)[:, None, None]
        S = torch.cat([torch.cat([S, column], 2), torch.cat([column.mT, count], 2)], 1)
    return S.to(dtype)


def scaled(S: Tensor, scale: float, scale_tensor: Tensor | None) -> Tensor:
    """S, times the scale, in place."""
    if scale_tensor is not None:
        return S.mul_(scale_tensor[:, None, None])
    return S if scale == 1 else S.mul_(scale)


def moments_of(C: Tensor) -> Tensor:
    """Trace and squared Frobenius norm `(n, 2)` of symmetric matrices by their lower triangles."""
    wide = C.to(torch.promote_types(C.dtype, torch.float32))
    diagonal, below = wide.diagonal(dim1=-2, dim2=-1), wide.tril(-1)
    squares = diagonal.square().sum(-1) + 2 * below.square().sum((-2, -1))
    return torch.stack([diagonal.sum(-1), squares], -1)

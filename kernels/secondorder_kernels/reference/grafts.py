"""Grafting. See `grafts.py` of the package above for arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def graft_(
    U: Tensor,
    moment: Tensor,
    G: Tensor | None,
    V: Tensor | None,
    out: Tensor,
    scale: Tensor,
    *,
    rate: Tensor | None = None,
    eps: float = 0.0,
    kind: str,
) -> None:
    """The direction in `out`, and in `scale` what U was multiplied by."""
    D = moment
    if V is not None:
        assert G is not None and rate is not None
        square = G.square()
        if kind == "adam":
            V.lerp_(square, _expanded(rate, V))
        else:
            V.add_(torch.where(_expanded(rate, V) > 0, square, 0.0))
        D = moment * (1 / (V.sqrt() + eps))
    length = _norms(U)
    scale.copy_(torch.where(length > 0, _norms(D) / length, 0.0))
    torch.where(_expanded(length, U) > 0, U * _expanded(scale, U), D, out=out)


def _norms(X: Tensor) -> Tensor:
    """Frobenius norm `(n,)` of every row, whose bits do not hang on where the row lies."""
    wide = X.dtype if X.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(X.flatten(1), dim=1, dtype=wide).to(X.dtype)


def _expanded(r: Tensor, like: Tensor) -> Tensor:
    return r.view(-1, *([1] * (like.ndim - 1)))

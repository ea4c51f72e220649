"""Products with structured factors. See `structured.py` of the package above for arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_moments(G: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the rows and of the columns of a_i G_ij b_j."""
    W = (a.unsqueeze(2) * G).mul_(b.unsqueeze(1))
    rows, columns = (torch.linalg.vector_norm(W, dim=dim).square() for dim in (2, 1))
    return rows, columns


def diagonal_apply(G: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a_i² G_ij b_j²."""
    out = torch.mul(a.unsqueeze(2), G, out=torch.empty_like(G))
    return out.mul_(a.unsqueeze(2)).mul_(b.unsqueeze(1)).mul_(b.unsqueeze(1))


def block_apply(K: Tensor, X: Tensor, *, transposed: bool = False) -> Tensor:
    """K X, or Kᵀ X, block by block."""
    return (K.mT if transposed else K) @ X

"""Factors that are moved by products. See `group.py` of the package above for arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels.reference.rounding import stochastic_round

LARGEST_TURN = 0.5  # of one Procrustes step, in units of the normalised skew part
SYMMETRIC = 1e-7  # relative size of the skew part below which there is nothing to rotate


def multiply_update(
    K: Tensor,
    M: Tensor,
    step: Tensor,
    *,
    keep: Tensor | None = None,
    lower: bool = False,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The moved factors, and their squared Frobenius norms."""
    K = K.to(M.dtype)
    new = (K @ M).mul_(step[:, None, None])  # zeros above the diagonal, if both have them there
    torch.sub(K if keep is None else K * keep[:, None, None], new, out=new)
    if keys is None:
        return new, torch.linalg.vector_norm(new, dim=(1, 2)).square()
    rounded = stochastic_round(new, keys)
    return rounded, rounded.to(new.dtype).square().sum((1, 2))


def symmetrise(K: Tensor) -> Tensor:
    """One Procrustes step."""
    R = K.mT - K
    size = R.flatten(1).norm(dim=1).view(-1, 1, 1)
    still = size <= SYMMETRIC * K.flatten(1).norm(dim=1).view(-1, 1, 1)
    R.div_(torch.where(still, 1.0, size))
    KR = K @ R
    KRR = KR @ R
    first, second = (X.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1) for X in (KR, KRR))
    turn = torch.where(second < 0, -first / second, 1.0).clamp_max(LARGEST_TURN)
    turn = torch.where(still, 0.0, turn)
    return KR.mul_(turn).add_(K).add_(KRR.mul_(0.5 * turn * turn))

"""Updates of parameters. See `updates.py` of the package above for arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels.reference.rounding import stochastic_round


def apply_update_(
    params: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float = 0.0,
    lr_tensor: Tensor | None = None,
    keep: Tensor | None = None,
    decay_after: bool = False,
    keys: Tensor | None = None,
) -> None:
    """Three multi-tensor operations; one parameter at a time where it is rounded stochastically."""
    if lr_tensor is not None:
        lr, updates = 1.0, list(torch._foreach_mul(updates, lr_tensor))
    if keys is not None:
        for p, update, key in zip(params, updates, keys.split(1), strict=True):
            moved = p.to(torch.float32)
            if keep is not None and not decay_after:
                moved.mul_(keep)
            moved.add_(update, alpha=-lr)
            if keep is not None and decay_after:
                moved.mul_(keep)
            p.copy_(stochastic_round(moved[None], key)[0])
        return
    if keep is not None and not decay_after:
        torch._foreach_mul_(params, keep)
    torch._foreach_add_(params, updates, alpha=-lr)
    if keep is not None and decay_after:
        torch._foreach_mul_(params, keep)

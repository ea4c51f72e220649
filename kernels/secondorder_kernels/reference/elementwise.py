"""Element-wise operations on a stack. See `elementwise.py` of the package above for arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels.reference.rounding import average_, mix


def adam_direction_(
    m: Tensor,
    v: Tensor,
    g: Tensor,
    out: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    beta1: float,
    eps: float = 0.0,
    eps_tensor: Tensor | None = None,
    nesterov: bool = False,
    keys: Tensor | None = None,
) -> None:
    """Adam's two averages, and its direction in `out`."""
    first = average_(m, g, beta1_rate, keys)
    torch.mul(g, g, out=out)
    second = average_(v, out, beta2_rate, None if keys is None else mix(keys))
    torch.sqrt(second, out=out).add_(eps if eps_tensor is None else eps_tensor)
    ahead = torch.lerp(g, first, beta1) if nesterov else first
    torch.div(ahead, out, out=out)


def root_free_(
    v: Tensor,
    g: Tensor,
    moment: Tensor,
    out: Tensor,
    *,
    rate: Tensor,
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
    eps: float,
) -> None:
    """The average of `scale g²`, and `moment / (v + eps)` in `out`."""
    torch.mul(g, g, out=out).mul_(scale if scale_tensor is None else scale_tensor)
    v.lerp_(out, rate)
    torch.add(v, eps, out=out)
    torch.div(moment, out, out=out)

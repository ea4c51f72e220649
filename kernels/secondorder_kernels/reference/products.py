"""Products of stacked matrices. See `products.py` of the package above for arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_syrk_(C: Tensor, X: Tensor, rate: Tensor) -> None:
    """C ← C + rate (X Xᵀ - C), one rate per matrix."""
    C.lerp_(torch.bmm(X, X.mT), rate[:, None, None])

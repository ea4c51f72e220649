"""Adam in a rotated basis. See `basis.py` of the package above for arguments."""

from __future__ import annotations

from torch import Tensor

from secondorder_kernels.reference.elementwise import adam_direction_


def adam_in_basis_(
    m: Tensor,
    v: Tensor,
    X: Tensor,
    Q: Tensor,
    out: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    beta1: float,
    eps: float = 0.0,
    eps_tensor: Tensor | None = None,
    nesterov: bool = False,
) -> None:
    """Adam's direction of g = X Q in `out`."""
    adam_direction_(
        m,
        v,
        X @ Q,
        out,
        beta1_rate=beta1_rate[:, None, None],
        beta2_rate=beta2_rate[:, None, None],
        beta1=beta1,
        eps=eps,
        eps_tensor=eps_tensor,
        nesterov=nesterov,
    )

"""The best combination of directions for the Gauss-Newton model of a least-squares loss.

    m(c) = L + Σ_k c_k gᵀd_k + ½ |Σ_k c_k J d_k|² + ½ λ |Σ_k c_k d_k|²

With a new direction and the last increment, c are a step size and a momentum: Martens and Grosse, *Optimizing Neural
Networks with Kronecker-factored Approximate Curvature* (2015, arXiv:1503.05671, section 7); for physics-informed
networks, as KFAC*, Dangel, Müller and Zeinhofer (2024, arXiv:2405.15603).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder import linalg

CUTOFF = 1e-13  # relative eigenvalues of the model's matrix that are rounding errors


def best_combination(
    products: Sequence[Tensor], residual: Tensor, directions: Sequence[Sequence[Tensor]] = (), damping: float = 0.0
) -> Tensor:
    """Coefficients c of the least m(c).

    Directions are normalised, and what the model does not determine is left out by a pseudo-inverse: c d does not
    depend on the scale of d, and neither a direction of length zero nor two parallel ones do harm. (A 2x2 system that
    is solved as it stands has answered the second step of a run with a momentum of -3.6e7.)

    Args:
        products: J d_k, each `(N,)`.
        residual: r `(N,)`.
        directions: d_k, one tensor a parameter; needed with damping alone.
        damping: λ.

    Returns:
        c, one number a direction, in float64.
    """
    P = torch.stack([linalg.wide(product) for product in products], 1)
    M, slopes = P.mT @ P, P.mT @ linalg.wide(residual)
    if damping:
        d = torch.stack([torch.cat([linalg.wide(part).flatten() for part in parts]) for parts in directions], 1)
        M = M + damping * d.mT @ d
    scale = M.diagonal().sqrt()
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    values, basis, _ = linalg.eigh((M * inverse[:, None] * inverse)[None])
    values, basis = values[0], basis[0]
    kept = torch.where(values > CUTOFF * len(values), values.reciprocal(), 0.0)
    return -inverse * (basis @ (kept * (basis.mT @ (inverse * slopes))))


def combined(c: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`Σ_k c_k d_k` of one parameter, in its dtype."""
    first, *others = parts
    total = first * c[0].to(first)
    for weight, part in zip(c[1:], others, strict=True):
        total += part * weight.to(part)
    return total

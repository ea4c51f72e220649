"""Inverses of sums of two Kronecker products, exact, by simultaneous diagonalisation.

    (A₁ ⊗ B₁ + A₂ ⊗ B₂)^-1 G:      X with  B₁ X A₁ + B₂ X A₂ = G       X, G (o, i), A (i, i), B (o, o), symmetric

For each side V diagonalises both matrices at once, with a₁ = tr A₁ and a₂ = tr A₂:

    V_Aᵀ A₁ V_A = a₁ diag(c),    V_Aᵀ A₂ V_A = a₂ diag(1 - c),    0 <= c <= 1

    X = V_B [ (V_Bᵀ G V_A) / (b₁ a₁ c_B c_Aᵀ + b₂ a₂ (1 - c_B) (1 - c_A)ᵀ) ] V_Aᵀ

Dangel, Müller and Zeinhofer, *Kronecker-Factored Approximate Curvature for Physics-Informed Neural Networks* (2024,
arXiv:2405.15603), and before them Martens and Grosse (2015, arXiv:1503.05671, appendix B), whiten by the first term,
`A₁^-½ A₂ A₁^-½`. Here it is by the sum A₁ / a₁ + A₂ / a₂: the same inverse, and no term has to be regular by itself.

Sums of three products have no such basis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import linalg


class Pencil(NamedTuple):
    """Two symmetric positive semidefinite matrices in the basis that diagonalises both, stacked.

    Attributes:
        basis: V `(n, d, d)`.
        first: Diagonals `(n, d)` of Vᵀ A₁ V.
        second: Those of Vᵀ A₂ V.
        ok: `(n,)`: both are finite and were decomposed.
    """

    basis: Tensor
    first: Tensor
    second: Tensor
    ok: Tensor


def diagonalise(A1: Tensor, A2: Tensor) -> Pencil:
    """Diagonalise pairs of matrices by congruence.

    Args:
        A1: Symmetric positive semidefinite, `(n, d, d)`, float32 or float64.
        A2: The same. The sum of both should be regular: what is below its rounding error counts as that.

    Returns:
        The pencil, in float64 where the device has it.
    """
    A1, A2 = linalg.wide(A1), linalg.wide(A2)
    eps = torch.finfo(A1.dtype).eps
    tiny = torch.finfo(A1.dtype).tiny
    a1, a2 = (A.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(tiny)[:, None] for A in (A1, A2))
    D, Q, sound = linalg.eigh(A1 / a1[..., None] + A2 / a2[..., None])
    whiten = Q * D.clamp_min(A1.shape[-1] * eps).rsqrt().unsqueeze(1)  # the largest eigenvalue is 2 / d at least
    inner = whiten.mT @ (A1 / a1[..., None]) @ whiten
    c, E, ok = linalg.eigh((inner + inner.mT) / 2)
    c = c.clamp(eps, 1 - eps)
    return Pencil(whiten @ E, a1 * c, a2 * (1 - c), sound & ok)


def solve(A: Pencil, B: Pencil, G: Tensor) -> Tensor:
    """`(A₁ ⊗ B₁ + A₂ ⊗ B₂)^-1` applied to matrices.

    Args:
        A: The pencil of the inputs' side, `(n, i, i)`.
        B: That of the outputs' side, `(n, o, o)`.
        G: `(n, o, i)`.

    Returns:
        X `(n, o, i)` in the pencils' dtype.
    """
    first = B.first[:, :, None] * A.first[:, None, :]
    second = B.second[:, :, None] * A.second[:, None, :]
    inside = B.basis.mT @ G.to(A.basis.dtype) @ A.basis
    return B.basis @ divided(inside, first + second) @ A.basis.mT


def divided(x: Tensor, curvature: Tensor) -> Tensor:
    """Entries over their curvature; zero where that is zero, as nothing is known of it."""
    known = curvature > torch.finfo(curvature.dtype).tiny
    return torch.where(known, x / torch.where(known, curvature, 1.0), 0.0)

"""The gradient whitened by the factors of the other modes: the statistic of the KL criterion.

    Y   = G ×_j Q_j^T                             the gradient in the bases of its factors, projected before
    X_i = Y ×_{j≠i} Λ_j^(-1/2),   statistic of mode i:  X_(i) X_(i)^T d_i / N      N entries in a block

in the coordinates of `Q_i`, all modes from the factors as they are (Jacobi). A gradient with RMS(Y ×_j Λ_j^(-1/2))
above `clip` is scaled down to it: what falls into directions that the factors take for empty would otherwise swamp
the other modes for a memory's length.

Lin et al., *Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization* (2025, arXiv:2509.03378).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secondorder.preconditioner.modes import along, unfold
from secondorder.preconditioner.protocol import Context, State, Streams


class Whitener(Protocol):
    """Factors that are diagonal in their bases."""

    def inverse_roots(self, s: State, c: Context) -> dict[int, Tensor]:
        """`λ_i^(-1/2) (n, d_i)` by mode."""
        ...


@dataclass(frozen=True)
class WhitenedGradient:
    """Statistics of all modes with a factor, from the stream `"projected"`.

    Attributes:
        factor: What whitens.
        clips: Whether the statistic clips; False where the stream is clipped already.
    """

    factor: Whitener
    clips: bool = True

    def __call__(self, s: State, x: Streams, c: Context) -> dict[int, Tensor]:
        """Square roots `(n, d_i, N/d_i)` of the statistics."""
        Y, roots = x["projected"], self.factor.inverse_roots(s, c)
        if self.clips:
            Y = Y * shrink(Y, roots, c)
        entries = Y[0].numel()
        out = {}
        for i in c.modes:
            X = Y
            for j, root in roots.items():
                if j != i:
                    X = X * along(root, X, j)
            d = Y.shape[i + 1]
            out[i] = unfold(X, i) * (d / entries) ** 0.5
        return out


def shrink(Y: Tensor, roots: Mapping[int, Tensor], c: Context) -> Tensor:
    """`min(1, clip / RMS)` of the whitened gradient, to be multiplied with `Y`; zero where it overflows."""
    limit = c.hp["clip"]
    if limit is None:
        return torch.ones_like(c.expand(c.gate, Y))
    for i, root in roots.items():
        Y = Y * along(root, Y, i)
    size = Y.flatten(1).square().mean(1).sqrt()
    return c.expand(torch.where(size > limit, limit / size, 1.0), Y)

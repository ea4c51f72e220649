"""The factor of layer methods: averaged Gram matrices, their eigenbases, and the eigenvalues in those.

    C_i <- C_i + r (S_i - C_i)               S_i: normalised statistic of this step, r: debiased average, decay β2
    at a refresh:  Q_i, d_i <- eigenvectors and eigenvalues of C_i
                   (or one power iteration and QR from the last basis, with Rayleigh quotients)
    diagonal modes:  C_i is a vector, Q_i = I, d_i = C_i

Between refreshes eigenvalues are scaled so that they sum to tr(C_i). Until its first refresh a mode has `Q_i = I` and
the diagonal of its first statistic for eigenvalues. What is stored is undamped: a change of damping acts at once.

Martens and Grosse (2015, arXiv:1503.05671), section 5; the eigenbasis: George et al. (2018, arXiv:1806.03884).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.kronecker import Move
from secondorder.preconditioner.protocol import Context, Modes, Spec, State, ema_, put_


@dataclass(frozen=True)
class LayerBasis(EigenBasis):
    """`covariance_i (d, d)`, `basis_i (d, d)`, `eigenvalues_i (d,)` of dense modes; `diagonal_i (d,)` of others.

    Attributes:
        settles_ties: The basis of a null space, LAPACK's choice, is settled. It matters where moments are measured in
            it; with exact damping of its one eigenvalue it does not.
        follows_trace: Between refreshes, eigenvalues keep their ratios but not their sum: curvature falls by orders of
            magnitude within a period when training sets in.
    """

    settles_ties: bool = False
    follows_trace: bool = True

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Factor`."""
        out = super().specs(shape, modes, hp)
        out.update({f"eigenvalues_{i}": Spec((shape[i],)) for i in modes})
        return {**out, **{f"diagonal_{i}": Spec((shape[i],)) for i in diagonal}}

    def absorb(self, s: State, roots: dict[int, Tensor], c: Context) -> None:
        """Average the Gram matrices of all modes."""
        rate = self.rate(c)
        for i, gram in roots.items():
            ema_(s[f"diagonal_{i}" if i in c.diagonal else f"covariance_{i}"], gram, rate, c)
        first = c.seen_gate * (c.seen == 1)
        for i in c.modes:
            put_(s[f"eigenvalues_{i}"], s[f"covariance_{i}"].diagonal(dim1=-2, dim2=-1), first, c)

    def rate(self, c: Context) -> Tensor:
        """Rate `(n,)` of the averages."""
        return c.rate(c.hp["betas"][1], c.seen)

    def refresh(self, s: State, c: Context) -> dict[int, Move]:
        """New bases and eigenvalues for the modes that are due; a row whose decomposition failed keeps both."""
        moves = super().refresh(s, c)
        for i, move in moves.items():
            C, Q = s[f"covariance_{i}"], s[f"basis_{i}"]
            put_(s[f"eigenvalues_{i}"], (Q * (C @ Q)).sum(-2).clamp_min(0), move.gate, c)
        return moves

    def decompose(self, s: State, mode: int, c: Context) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `EigenBasis`."""
        if c.initial or c.hp["refresh_by"] == "eigh":
            values, new, ok = linalg.eigh(s[f"covariance_{mode}"])
            return (_settled(values, new) if self.settles_ties else new), None, ok
        # A QR needs the graded diagonal: an input that is always zero leaves a zero column, on which one by Cholesky
        # fails.
        return super().decompose(s, mode, c)

    def refresh_cost(self, d: int) -> float:
        """An eigendecomposition, or about as much."""
        return 25.0 * d**3

    def spectrum(self, s: State, mode: int, c: Context) -> Tensor:
        """Eigenvalues `(n, d)` of a mode, scaled to the trace that the average has now."""
        if mode in c.diagonal:
            return s[f"diagonal_{mode}"]
        values = s[f"eigenvalues_{mode}"]
        if not self.follows_trace:
            return values
        trace = s[f"covariance_{mode}"].diagonal(dim1=-2, dim2=-1).sum(-1)
        total = values.sum(-1)
        return values * torch.where(total > 0, trace / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)[:, None]

    def fresh(self, s: State, c: Context) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Eigenvectors and eigenvalues of the averages as they are now, by mode."""
        bases, values = {}, {i: s[f"diagonal_{i}"] for i in c.diagonal}
        for i in c.modes:
            found, bases[i], _ = linalg.eigh(s[f"covariance_{i}"])
            values[i] = found.clamp_min(0)
        return bases, values

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Largest over smallest stored eigenvalue, at most one over the machine epsilon."""
        out = {}
        for i in c.modes:
            d = self.spectrum(s, i, c)
            largest = d.amax(-1).clamp_min(torch.finfo(d.dtype).tiny)
            out[i] = largest / torch.maximum(d.amin(-1), torch.finfo(d.dtype).eps * largest)
        return out


def _settled(values: Tensor, Q: Tensor) -> Tensor:  # (n, d) descending, (n, d, d)
    """The same eigenvectors, but in a null space those of a graded diagonal within it.

    They hang on the null space alone: without, the last bit of a sum would choose the basis, and training would part.
    """
    d = values.shape[-1]
    null = values <= d * torch.finfo(values.dtype).eps * values[:, :1]
    P = torch.where(null[:, None], Q, 0.0)
    P = P @ P.mT
    grades = torch.arange(d, 0, -1, dtype=values.dtype, device=values.device) / d
    _, chosen, ok = linalg.eigh(P * grades @ P)
    at = (torch.arange(d, device=values.device) - (~null).sum(-1, keepdim=True)).clamp_min(0)
    chosen = torch.gather(chosen, 2, at[:, None].expand_as(chosen))
    return torch.where((null & ok[:, None])[:, None], chosen, Q)


def outer(values: Mapping[int, Tensor], shape: tuple[int, ...]) -> Tensor:
    """`⊗ d_i` as `(n, d1, ..., dk)`; modes without values count as ones."""
    some = next(iter(values.values()))
    out = some.new_ones(some.shape[0], *shape)
    for i, d in values.items():
        out = out * d.view(d.shape[0], *[-1 if j == i else 1 for j in range(len(shape))])
    return out

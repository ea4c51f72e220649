"""The eigenbasis factor: an averaged covariance per mode and the orthogonal basis that tracks its eigenvectors.

    C_i <- C_i + r (G_(i) G_(i)^T - C_i)          r: rate of the debiased average with decay `factor_beta`
    refresh "qr":    Q_i <- qr(C'_i Q_i[:, π]).Q  π: Rayleigh quotients q_j^T C'_i q_j, descending (one power iteration)
    refresh "eigh":  Q_i <- eigenvectors of C'_i, descending
    C'_i = C_i + tie_break · tr(C_i)/d · diag(1, 1 - 1/d, ..., 1/d)

In the first two periods refreshes are always eigendecompositions; before the first one `Q_i = I`. A factor of few
gradients is rank deficient. Its null space has no eigenvectors of its own, and what LAPACK makes up for it hangs on the
last bit of the sums, while Adam in that basis does not: trajectories of the same data would part. The graded diagonal
settles the tie for directions close to the parameter's own axes.

SOAP (Vyas et al. 2024, arXiv:2409.11321), algorithms 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.kronecker import Move
from secondorder.preconditioner.modes import fold_, mul
from secondorder.preconditioner.protocol import Context, Modes, Spec, State, put_


@dataclass(frozen=True)
class EigenBasis:
    """Covariance and eigenbasis of every mode, `covariance_i (d, d)` and `basis_i (d, d)` (eigenvectors in columns).

    Attributes:
        tie_break: Weight of the graded diagonal, relative to the mean eigenvalue; far below what matters, far above
            the rounding of float64.
    """

    tie_break: float = 1e-6

    def specs(self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """See `Factor`."""
        square = {i: (shape[i], shape[i]) for i in modes}
        return {
            **{f"covariance_{i}": Spec(square[i]) for i in modes},
            **{f"basis_{i}": Spec(square[i], "eye") for i in modes},
        }

    def absorb(self, s: State, roots: dict[int, Tensor], c: Context) -> None:
        """Average `R R^T` of every mode."""
        beta = c.hp["factor_beta"]
        rate = c.rate(c.hp["betas"][1] if beta is None else beta, c.seen)
        fold_({i: s[f"covariance_{i}"] for i in c.modes}, roots, rate)

    def refresh(self, s: State, c: Context) -> dict[int, Move]:
        """New bases for the modes that are due; a row whose decomposition failed keeps its basis and is counted."""
        moves = {}
        for i in c.modes:
            old = s[f"basis_{i}"]
            new, order, ok = self.decompose(s, i, c)
            due = (c.gate > 0) & (c.seen > 0)
            s["failures"].add_((due & ~ok).to(s["failures"].dtype))
            gate = (due & ok).to(c.gate.dtype)
            moves[i] = Move(new.mT @ old, order, gate)
            put_(old, new, gate, c)
        return moves

    def decompose(self, s: State, mode: int, c: Context) -> tuple[Tensor, Tensor | None, Tensor]:
        """`(basis (n, d, d), order of the old columns or None, ok (n,))`."""
        covariance, basis = self._graded(s[f"covariance_{mode}"]), s[f"basis_{mode}"]
        if c.initial or c.hp["refresh_by"] == "eigh":
            _, new, ok = linalg.eigh(covariance)
            return new, None, ok
        product = covariance @ basis
        order = (basis * product).sum(-2).argsort(dim=-1, descending=True)
        new, ok = linalg.orthogonalize(torch.gather(product, 2, order[:, None].expand_as(product)))
        return new, order, ok

    def _graded(self, covariance: Tensor) -> Tensor:
        d = covariance.shape[-1]
        graded = covariance.clone()
        diagonal = graded.diagonal(dim1=-2, dim2=-1)
        grades = torch.arange(d, 0, -1, dtype=covariance.dtype, device=covariance.device) / d
        diagonal.add_(self.tie_break * diagonal.mean(-1, keepdim=True) * grades)
        return graded

    def refresh_cost(self, d: int) -> float:
        """A product, a QR (about 4/3 products at a third of their speed) and the rotation `Q_new^T Q_old`."""
        return 12.0 * d**3

    def into(self, s: State, X: Tensor, mode: int) -> Tensor:
        """`Q^T` on a mode."""
        return mul(s[f"basis_{mode}"].mT, X, mode)

    def out(self, s: State, X: Tensor, mode: int) -> Tensor:
        """`Q` on a mode."""
        return mul(s[f"basis_{mode}"], X, mode)

    def bases(self, s: State, c: Context) -> dict[int, Tensor]:
        """See `Factor`."""
        return {i: s[f"basis_{i}"] for i in c.modes}

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Largest over smallest Rayleigh quotient of the tracked basis."""
        out = {}
        for i in c.modes:
            covariance, basis = s[f"covariance_{i}"], s[f"basis_{i}"]
            values = (basis * (covariance @ basis)).sum(-2)
            smallest = values.amin(-1).clamp_min(torch.finfo(values.dtype).tiny)
            out[i] = values.amax(-1) / smallest
        return out

"""J of centred residuals: P r and P J, where P subtracts from some rows their mean over samples.

    P = I - 1 1ᵀ / N  on the rows of every equation of a centred term, I on all others; P² = P = Pᵀ
    J v -> P J v      Jᵀ u -> Jᵀ P u      K -> P K P      JᵀJ -> Jᵀ P J = Jᵀ J - Σ_equations N m mᵀ,  m = Jᵀ 1 / N

So J itself stays what it is before, of residuals that depend on one sample each, and is never held. Centred rows of
log |ψ| make Jᵀ P J the quantum geometric tensor of variational Monte Carlo, which stochastic reconfiguration inverts;
with the kernel: Rende et al. (2024, arXiv:2310.05715); Goldshlager, Abrahamsen and Lin (2024, arXiv:2401.10190).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.residuals.matvec import PROBES

if TYPE_CHECKING:
    from secondorder.residuals.linearization import Linearization

Rows = slice | Tensor  # of a term, sample by sample


def centred(linear: Linearization, params: Sequence[Tensor], rows: Sequence[tuple[Rows, int]]) -> Linearization:
    """A linearisation whose centred terms are centred; itself if there are none.

    Args:
        linear: Of residuals before the means are subtracted.
        params: What J is with respect to.
        rows: Of every centred term its rows, and the number of equations of a sample.
    """
    return Centred(linear, params, rows) if rows else linear


class Centred:
    """See `centred`.

    Attributes:
        backend: That of the uncentred residuals, as everything here but r.
        reason: Why it is not "expand".
        residual: P r `(N,)`.
        groups: Numbers of parameters that are one layer.
    """

    def __init__(self, linear: Linearization, params: Sequence[Tensor], rows: Sequence[tuple[Rows, int]]) -> None:
        self.backend, self.reason, self.groups = linear.backend, linear.reason, linear.groups
        self._linear, self._params, self._rows = linear, list(params), rows
        self.residual = self._centre(linear.residual)
        self._gradient: list[Tensor] | None = None

    @property
    def recorded(self) -> Linearization:
        """This process's rows as they were recorded."""
        return self._linear.recorded

    @property
    def loss(self) -> Tensor:
        """½ |P r|², 0-dim."""
        return self.residual.square().sum() / 2

    @property
    def gradient(self) -> list[Tensor]:
        """Jᵀ P r, shaped like the parameters; computed once."""
        if self._gradient is None:
            parts = self.vjp(self.residual)
            self._gradient = [part.to(p.dtype) for part, p in zip(parts, self._params, strict=True)]
        return self._gradient

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """P J v `(N,)` of v shaped like the parameters."""
        return self._centre(self._linear.jvp(v))

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀ P u of u `(N,)`, shaped like the parameters."""
        return self._linear.vjp(self._centre(u))

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """P J Jᵀ P `(N, N)`."""
        K = self._centre(self._linear.kernel(dtype))
        return self._centre(K.mT).mT

    def trace(self) -> Tensor:
        """The trace of the kernel, 0-dim in float64; by "matvec" an estimate by random signs, as of `Products`."""
        N = len(self.residual)
        if self.backend == "matvec":
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (PROBES, N), generator=generator).mul(2).sub(1).to(self.residual)
            return torch.stack([_squares(self.vjp(u)) for u in signs]).mean()
        removed = torch.stack([_squares(self._linear.vjp(mean)) for mean in self._means()]).sum()
        return (self._linear.trace() - removed).clamp_min(0.0)

    def apply_kernel(self, X: Tensor) -> Tensor:
        """P K P X `(N, k)` of X `(N, k)`, in the dtype of X."""
        return self._centre(self._linear.apply_kernel(self._centre(X)))

    def restricted(self, params: Sequence[int]) -> Centred:
        """P J of some parameters, by their numbers."""
        return Centred(self._linear.restricted(params), [self._params[i] for i in params], self._rows)

    def normal(self, dtype: torch.dtype | None = None) -> Tensor:
        """Jᵀ P J `(D, D)`; a product by Jᵀ for every equation besides JᵀJ."""
        G = self._linear.normal(dtype)
        for mean in self._means():
            m = torch.cat([part.flatten() for part in self._linear.vjp(mean)]).to(G.dtype)
            G.addr_(m, m, alpha=-1)
        return G

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """P J `(N, D)`."""
        return self._centre(self._linear.rows(dtype))

    def _centre(self, X: Tensor) -> Tensor:
        """P X of X `(N, …)`."""
        X = X.clone()
        for rows, equations in self._rows:
            part = X[rows].unflatten(0, (-1, equations))
            X[rows] = (part - part.mean(0)).flatten(0, 1)
        return X

    def _means(self) -> Iterator[Tensor]:
        """The unit vectors that P removes, 1 / √N on the rows of an equation; in float64."""
        for rows, equations in self._rows:
            for m in range(equations):
                unit = linalg.wide(torch.zeros_like(self.residual))
                own = torch.zeros_like(unit[rows])
                own[m::equations] = 1 / math.sqrt(len(own) // equations)
                unit[rows] = own
                yield unit


def _squares(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([linalg.wide(part).square().sum() for part in parts]).sum()

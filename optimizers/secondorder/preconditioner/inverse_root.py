"""Shampoo's factor: an averaged covariance per mode, and its inverse root, a symmetric matrix that is applied.

    C_i <- average, or t times the mean, of G_(i) G_(i)^T                 (`factor_average`)
    R_i  = (C_i + damping · λ_max(C_i) · I)^(-e_i)                        at a refresh; applied: M ×_i R_i for all i

`e_i = 1/(2k)` for a block with `k` factors. The ridge is relative to the largest eigenvalue, so that the direction
does not depend on the gradient's scale. One product per mode and step. Roots are made by

    eigh           an eigendecomposition
    tracked        one power iteration of the last basis and a QR, with Rayleigh quotients as eigenvalues; in the first
                   two periods an eigendecomposition
    newton         coupled Newton iterations, where e_i = 1/p with an integer p
    newton_schulz  coupled Newton-Schulz iterations, where e_i = 2^-k

Gupta, Koren and Singer, *Shampoo* (2018, arXiv:1802.09568).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.grafts import SGDGraft
from secondorder.preconditioner.kronecker import Kronecker, Move, Scaling
from secondorder.preconditioner.modes import fold_, mul
from secondorder.preconditioner.protocol import Context, Modes, Spec, State, Streams, put_


@dataclass(frozen=True)
class InverseRoot:
    """`covariance_i (d, d)`, `root_i (d, d)` and, where it is tracked, `basis_i (d, d)` of every mode.

    Attributes:
        by: How roots are made.
        missing: What a root is before its first refresh: 0 (a graft then gives the step), or `"eye"`.
    """

    by: Literal["eigh", "tracked", "newton", "newton_schulz"] = "eigh"
    missing: float | Literal["eye"] = 0.0

    def specs(self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """See `Factor`."""
        out = {}
        for i in modes:
            square = (shape[i], shape[i])
            out[f"covariance_{i}"], out[f"root_{i}"] = Spec(square), Spec(square, self.missing)
            if self.by == "tracked":
                out[f"basis_{i}"] = Spec(square, "eye")
        return out

    def absorb(self, s: State, roots: dict[int, Tensor], c: Context) -> None:
        """Average `R R^T` of every mode."""
        rate = self.rate(c)
        fold_({i: s[f"covariance_{i}"] for i in c.modes}, roots, rate)

    def rate(self, c: Context) -> Tensor:
        """Rate `(n,)` of the average; the sum is kept as a mean, which stays in range."""
        if c.hp["factor_average"] == "sum":
            return torch.where(c.seen_gate > 0, 1 / c.seen.to(c.seen_gate.dtype), 0.0)
        beta = c.hp["factor_beta"]
        return c.rate(c.hp["betas"][1] if beta is None else beta, c.seen)

    def refresh(self, s: State, c: Context) -> dict[int, Move]:
        """New roots for the modes that are due; a row whose decomposition failed keeps its root and is counted."""
        for i in c.modes:
            new, ok = self.renew(s, i, c)
            due = (c.gate > 0) & (c.seen > 0)
            s["failures"].add_((due & ~ok).to(s["failures"].dtype))
            gate = (due & ok).to(c.gate.dtype)
            for name, value in new.items():
                put_(s[f"{name}_{i}"], value, gate, c)
        return {}

    def matrix(self, s: State, mode: int, c: Context) -> Tensor:
        """What the root is taken of, without the ridge."""
        covariance = s[f"covariance_{mode}"]
        return covariance * c.expand(c.seen, covariance) if c.hp["factor_average"] == "sum" else covariance

    def exponent(self, s: State, mode: int, c: Context) -> float:
        """`e` of a mode."""
        given = c.hp["exponent"]
        if given is None:  # c.modes are those that are due, not all that the block has
            return 1 / (2 * sum(name.startswith("covariance_") for name in s))
        return float(given[mode] if isinstance(given, (tuple, list)) else given)

    def renew(self, s: State, mode: int, c: Context) -> tuple[dict[str, Tensor], Tensor]:
        """New values of `root` (and `basis`) of a mode, and `ok (n,)`."""
        A, exponent = self.matrix(s, mode, c), self.exponent(s, mode, c)
        # Without any ridge, eigenvalues that are zero but for rounding would have roots of any size.
        ridge = max(float(c.hp["damping"]), torch.finfo(A.dtype).eps)
        if self.by in ("newton", "newton_schulz"):
            largest = linalg.largest_eigenvalue(A)
            A = A + torch.diag_embed((ridge * largest)[:, None].expand(A.shape[:2]))
            iterate = linalg.newton_root if self.by == "newton" else linalg.newton_schulz_root
            root, ok = iterate(A, exponent)
            return {"root": root}, ok
        if self.by == "eigh" or c.initial:
            values, Q, ok = linalg.eigh(A)
        else:
            values, Q, ok = self._track(A, s[f"basis_{mode}"], ridge)
        values = values.clamp_min(0) + ridge * values.amax(-1, keepdim=True)
        root = Q * linalg.power(values, -exponent)[:, None] @ Q.mT
        return ({"root": root, "basis": Q} if self.by == "tracked" else {"root": root}), ok

    def _track(self, A: Tensor, Q: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        product = A @ Q
        quotients = (Q * product).sum(-2)
        product = product + ridge * quotients.amax(-1)[:, None, None] * Q  # as independent as the damped matrix's
        order = quotients.argsort(dim=-1, descending=True)
        new, ok = linalg.orthogonalize(torch.gather(product, 2, order[:, None].expand_as(product)))
        return (new * (A @ new)).sum(-2), new, ok

    def refresh_cost(self, d: int) -> float:
        """An eigendecomposition and a product, or about as much."""
        return 25.0 * d**3

    def into(self, s: State, X: Tensor, mode: int) -> Tensor:
        """Nothing: the root is symmetric and applied at once."""
        return X

    def out(self, s: State, X: Tensor, mode: int) -> Tensor:
        """The root on a mode."""
        return mul(s[f"root_{mode}"], X, mode)

    def bases(self, s: State, c: Context) -> dict[int, Tensor]:
        """Eigenvectors of the roots; the identity for blocks that have not all of them yet."""
        found = {i: linalg.eigh(s[f"root_{i}"])[1] for i in c.modes}
        ready = self.ready(s, c)
        return {i: torch.where(ready[:, None, None], Q, torch.eye(Q.shape[-1]).to(Q)) for i, Q in found.items()}

    def ready(self, s: State, c: Context) -> Tensor:
        """`(n,)` bools: all roots are there."""
        ready = c.gate > 0
        for i in c.modes:
            ready = ready & (s[f"root_{i}"].abs().amax((-2, -1)) > 0)
        return ready

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Largest over smallest eigenvalue of the covariances."""
        out = {}
        for i in c.modes:
            values, _, _ = linalg.eigh(s[f"covariance_{i}"])
            out[i] = values.amax(-1) / values.amin(-1).clamp_min(torch.finfo(values.dtype).tiny)
        return out


@dataclass(frozen=True)
class Unscaled:
    """No scaling in the factor's coordinates."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `Scaling`."""
        return {}

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        """See `Scaling`."""
        return X

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """See `Scaling`."""

    def curvature(self, s: State, c: Context) -> Tensor:
        """See `Scaling`."""
        return torch.ones_like(s["momentum"])

    preconditioner = curvature


@dataclass(frozen=True)
class RootKronecker(Kronecker):
    """Roots of covariances, on the momentum, with the length of a graft's step where there is a graft."""

    factor: InverseRoot
    scaling: Scaling = field(default_factory=Unscaled)
    momentum: Literal["none", "gradient", "update"] = "gradient"
    graft: SGDGraft | None = None

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {**super().specs(shape, modes, hp, diagonal), **(self.graft.specs(shape) if self.graft else {})}

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """One product per mode, then the graft's length."""
        U = super().apply(s, moment, x, c)
        return U if self.graft is None else self.graft.lend(s, U, moment, x["grad"], c)

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """In the roots' eigenbases: `⊗ C_i / tr^(k-1)`, whose trace is that of `E[g g^T]`, and what is applied."""
        bases = self.factor.bases(s, c)
        curvature, applied = torch.ones_like(s["momentum"]), torch.ones_like(s["momentum"])
        trace = torch.ones_like(c.gate)
        for i, d in enumerate(applied.shape[1:]):
            shape = [-1 if j in (0, i + 1) else 1 for j in range(applied.ndim)]
            shape[0] = applied.shape[0]
            if i not in bases:
                curvature = curvature / d
                continue
            Q, C, R = bases[i], s[f"covariance_{i}"], s[f"root_{i}"]
            trace = C.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(C.dtype).tiny)
            curvature = curvature * ((Q * (C @ Q)).sum(-2) / trace[:, None]).view(shape)
            applied = applied * (Q * (R @ Q)).sum(-2).view(shape)
        curvature = curvature * c.expand(trace, curvature)
        if self.graft is not None:
            scaled = applied * c.expand(s["graft_scale"], applied)
            ready = c.expand(self.factor.ready(s, c), applied)
            applied = torch.where(ready, scaled, self.graft.diagonal(s, applied, c))
        return bases, curvature, applied

"""The factors of KL-Shampoo: one covariance per mode, kept in the coordinates of a basis that it turns.

    S_i = Q_i B_i Q_i^T,   λ_i = diag(B_i), clamped to floor · max λ_i from below
    Y   = G ×_j Q_j^T                                          one projection for statistic and step
    B_i <- B_i + r (X_i X_i^T d_i/N - B_i)                     X_i: mode i of Y whitened by the λ_j of the others
    at a refresh:   Q_new <- qr(Q_i B_i[:, π]).Q (one power iteration of S_i) or eigenvectors of S_i
                    R = Q_new^T Q_i;   B_i <- R B_i R^T

Fixed points satisfy S_a = E[G S_b^-1 G^T] / d_b and its like for every mode, that is, ⊗ S_i minimises
KL(N(0, E[g g^T]) || N(0, ⊗ S_i)). All modes move from the factors as they were (Jacobi). As B_i is kept in the basis,
its diagonal is the average of the eigenvalues, also after a turn: nothing is left behind, or transported by a rule of
its own. The conditions leave the ratio of the scales of the S_i open: they are balanced to one mean eigenvalue, which
changes no update.

The averages begin with an isotropic gradient of the first one's size, S_i = mean(G²)^(1/k) I for k factors, that
counts as one: it fades as `factor_beta^t`. Whitening by a factor of a few gradients would divide by its null space.

Lin et al., *Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization* (2025, arXiv:2509.03378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.curvature.whitened import shrink
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.kronecker import Kronecker, Move
from secondorder.preconditioner.layer_basis import outer
from secondorder.preconditioner.modes import along, fold_, mul
from secondorder.preconditioner.protocol import Context, Spec, State, Streams, put_


@dataclass(frozen=True)
class KLBasis(EigenBasis):
    """`covariance_i (d, d)` in the coordinates of `basis_i (d, d)`, for every mode with a factor."""

    def begin(self, s: State, G: Tensor, c: Context) -> None:
        """`B_i = mean(G²)^(1/k) I`: the first whitened gradient has mean square 1."""
        size = linalg.power(G.flatten(1).square().mean(1), 1 / len(c.modes))
        for i in c.modes:
            B = s[f"covariance_{i}"]
            unit = torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
            put_(B, c.expand(size, B) * unit, c.gate, c)

    def absorb(self, s: State, roots: dict[int, Tensor], c: Context) -> None:
        """Average the statistics of all modes, then balance the factors' scales."""
        given = c.hp["factor_beta"]
        beta = c.hp["betas"][1] if given is None else given
        rate = torch.where(c.seen_gate > 0, (1 - beta) / c.weight(beta, c.seen + 1), 0.0)
        fold_({i: s[f"covariance_{i}"] for i in c.modes}, roots, rate)
        self._balance(s, c)

    def _balance(self, s: State, c: Context) -> None:
        means = torch.stack([s[f"covariance_{i}"].diagonal(dim1=-2, dim2=-1).mean(-1) for i in c.modes])
        logs = linalg.wide(means).log()
        factors = (logs.mean(0) - logs).exp().to(means.dtype)
        for i, factor in zip(c.modes, factors, strict=True):
            B = s[f"covariance_{i}"]
            B.mul_(c.expand(torch.where(c.seen_gate > 0, factor, 1.0), B))

    def refresh(self, s: State, c: Context) -> dict[int, Move]:
        """New bases for the modes that are due; covariances go with them."""
        moves = super().refresh(s, c)
        for i, move in moves.items():
            B = s[f"covariance_{i}"]
            put_(B, move.rotation @ B @ move.rotation.mT, move.gate, c)
        return moves

    def decompose(self, s: State, mode: int, c: Context) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `EigenBasis`. The last step is always a QR in the parameter's coordinates: no basis drifts."""
        B, Q = self._graded(s[f"covariance_{mode}"]), s[f"basis_{mode}"]
        if c.initial or c.hp["refresh_by"] == "eigh":
            _, V, fine = linalg.eigh(B)
            new, ok = linalg.orthogonalize(Q @ V)
            return new, None, ok & fine
        order = B.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
        new, ok = linalg.orthogonalize(Q @ torch.gather(B, 2, order[:, None].expand_as(B)))
        return new, order, ok

    def refresh_cost(self, d: int) -> float:
        """A product, a QR, the rotation and two products with it."""
        return 16.0 * d**3

    def eigenvalues(self, s: State, c: Context) -> dict[int, Tensor]:
        """`λ_i (n, d_i)` by mode, clamped."""
        out = {}
        for i in c.modes:
            values = s[f"covariance_{i}"].diagonal(dim1=-2, dim2=-1)
            least = c.hp["floor"] * values.amax(-1, keepdim=True)
            out[i] = torch.maximum(values, least.clamp_min(torch.finfo(values.dtype).tiny))
        return out

    def inverse_roots(self, s: State, c: Context) -> dict[int, Tensor]:
        """`λ_i^(-1/2)` by mode, of all modes of the block."""
        return {i: linalg.power(values, -0.5) for i, values in self.eigenvalues(s, c).items()}

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Largest over smallest eigenvalue, as clamped."""
        return {i: values.amax(-1) / values.amin(-1) for i, values in self.eigenvalues(s, c).items()}


@dataclass(frozen=True)
class Eigenvalues:
    """KL-Shampoo's scaling: `⊗ λ_i^(-1/2)` on the momentum, `exp_avg` in the basis."""

    factor: KLBasis

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `Scaling`."""
        return {"exp_avg": Spec(shape)}

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        """Whiten the average of the projected gradients `X`."""
        beta, m = c.hp["betas"][0], s["exp_avg"]
        m.lerp_(X, c.expand(c.rate(beta, c.count), m))
        U = torch.lerp(X, m, beta) if c.hp["nesterov"] else m
        for i, root in self.factor.inverse_roots(s, c).items():
            U = U * along(root, U, i)
        return U

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """Take the momentum into the new coordinates."""
        for i, move in moves.items():
            put_(s["exp_avg"], mul(move.rotation, s["exp_avg"], i), move.gate, c)

    def curvature(self, s: State, c: Context) -> Tensor:
        """`⊗ λ_i`."""
        return outer(self.factor.eigenvalues(s, c), s["exp_avg"].shape[1:])

    def preconditioner(self, s: State, c: Context) -> Tensor:
        """`⊗ λ_i^(-1/2)`."""
        return outer(self.factor.inverse_roots(s, c), s["exp_avg"].shape[1:])


@dataclass(frozen=True)
class KLKronecker(Kronecker):
    """Statistic and scaling share one projection; bases turn after the step, so that it fits both."""

    factor: KLBasis
    works = ("projected",)
    refresh_last = True

    def begin(self, s: State, x: Streams, c: Context) -> None:
        """See `Method`."""
        self.factor.begin(s, x["grad"], c)

    def factors(self, s: State, c: Context) -> dict[int, Tensor]:
        """`S_i = Q_i B_i Q_i^T`."""
        return {i: s[f"basis_{i}"] @ s[f"covariance_{i}"] @ s[f"basis_{i}"].mT for i in c.modes}

    def screen(self, s: State, x: Streams, c: Context) -> tuple[dict[str, Tensor], Tensor]:
        """Project the gradient: one product per mode."""
        Y = x["grad"]
        for i in c.modes:
            Y = self.factor.into(s, Y, i)
        return {"projected": Y}, torch.ones_like(c.gate)

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """Scale what was projected: another product per mode."""
        X = self.scaling.scale(s, x["projected"], c)
        for i in c.modes:
            X = self.factor.out(s, X, i)
        return X


@dataclass(frozen=True)
class WhiteningKronecker(KLKronecker):
    """KL-Shampoo's row: what the statistic clips, momentum does not see either."""

    scaling: Eigenvalues

    def screen(self, s: State, x: Streams, c: Context) -> tuple[dict[str, Tensor], Tensor]:
        """Project the gradient and clip it."""
        found, live = super().screen(s, x, c)
        Y = found["projected"]
        return {"projected": Y * shrink(Y, self.factor.inverse_roots(s, c), c)}, live

    def held(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor]:
        """`⊗ S_i`: eigenvectors of the covariances as they are now."""
        values, bases = {}, {}
        for i in c.modes:
            found, V, _ = linalg.eigh(s[f"covariance_{i}"])
            values[i], bases[i] = found.clamp_min(0), s[f"basis_{i}"] @ V
        return bases, outer(values, s["exp_avg"].shape[1:])

"""Adam's scaling in the coordinates of a factor: first and second moment live in the basis and follow it.

    m <- m + r1 (X - m),   v <- v + r2 (X² - v)         both stored debiased
    u  = m̃ / (√v + eps),   m̃ = m, or with Nesterov β1 m + (1 - β1) X
    when a mode's basis moves by R = Q_new^T Q_old:   m <- R m,   v <- (R ∘ R) v

`m` moves exactly. `(R ∘ R) v` is the second moment in the new basis if the coordinates were uncorrelated in the old
one, which is what an eigenbasis is for. Leaving `v` in place gives update spikes.
SOAP (Vyas et al. 2024, arXiv:2409.11321), algorithm 3, which permutes `v` with the sorting of the basis instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.kronecker import Kronecker, Move
from secondorder.preconditioner.modes import mul
from secondorder.preconditioner.protocol import Context, Spec, State, put_
from secondorder_kernels import adam_direction_, adam_in_basis_


@dataclass(frozen=True)
class AdamInBasis:
    """`exp_avg` and `exp_avg_sq` in the basis, in the block's shape."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `Scaling`."""
        return {"exp_avg": Spec(shape), "exp_avg_sq": Spec(shape)}

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        """Adam's direction for the projected gradient `X`."""
        beta1, beta2 = c.hp["betas"]
        rate1, rate2 = self.rates(c)
        return adam_direction_(
            s["exp_avg"],
            s["exp_avg_sq"],
            X,
            beta1_rate=c.expand(rate1, X),
            beta2_rate=c.expand(rate2, X),
            beta1=beta1,
            eps=self.epsilon(c, X),
            nesterov=c.hp["nesterov"],
        )

    def rates(self, c: Context) -> tuple[Tensor, Tensor]:
        """Rates `(n,)` of the two averages."""
        beta1, beta2 = c.hp["betas"]
        return c.rate(beta1, c.count), c.rate(beta2, c.count)

    def epsilon(self, c: Context, like: Tensor) -> float | Tensor:
        """What is added to `√v`; acts on the bias-corrected average, as in AdamW."""
        del like
        return float(c.hp["eps"])

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """Take both moments into the new coordinates."""
        for i, move in moves.items():
            put_(s["exp_avg"], mul(move.rotation, s["exp_avg"], i), move.gate, c)
            self.move_second_moment(s["exp_avg_sq"], move, i, c)

    def move_second_moment(self, v: Tensor, move: Move, mode: int, c: Context) -> None:
        """`v <- (R ∘ R) v` on a mode."""
        put_(v, mul(move.rotation.square(), v, mode), move.gate, c)

    def curvature(self, s: State, c: Context) -> Tensor:
        """The second moment."""
        return s["exp_avg_sq"]

    def preconditioner(self, s: State, c: Context) -> Tensor:
        """`1 / (√v + eps)`."""
        v = s["exp_avg_sq"]
        return 1 / (v.sqrt() + self.epsilon(c, v))


@dataclass(frozen=True)
class AdamKronecker(Kronecker):
    """SOAP's row: Adam in the eigenbasis, in one operation with the last projection where blocks are matrices."""

    factor: EigenBasis
    scaling: AdamInBasis

    def scaled(self, s: State, X: Tensor, c: Context) -> Tensor:
        """See `Kronecker`."""
        if X.ndim != 3 or 1 not in c.modes:
            return super().scaled(s, X, c)
        if 0 in c.modes:
            X = self.factor.into(s, X, 0)
        rate1, rate2 = self.scaling.rates(c)
        return adam_in_basis_(
            s["exp_avg"],
            s["exp_avg_sq"],
            X,
            s["basis_1"],
            beta1_rate=rate1,
            beta2_rate=rate2,
            beta1=c.hp["betas"][0],
            eps=self.scaling.epsilon(c, X),
            nesterov=c.hp["nesterov"],
        )

"""Eigenvalue correction: the second moment of the projected gradient in place of products of eigenvalues.

    X = U · m̃,   Y = U · G                            momentum is averaged outside, in the parameter's coordinates
    v <- v + r2 (Y² - v)                              stored debiased
    u = V · (X / (v^exponent + eps))
    when a mode's basis moves by R = Q_new^T Q_old:   v <- (R ∘ R) v

`v` needs the projection of the gradient itself, not of the momentum: two products more per mode than Adam in the basis,
and no momentum to be moved. George et al., *Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis* (2018, arXiv:1806.03884); Eschenhagen et al., *Purifying Shampoo* (2025, arXiv:2506.03595).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.kronecker import Kronecker, Move
from secondorder.preconditioner.modes import mul
from secondorder.preconditioner.protocol import Context, Spec, State, Streams, ema_, put_


@dataclass(frozen=True)
class SecondMoment:
    """`exp_avg_sq` in the basis, in the block's shape."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `Scaling`."""
        return {"exp_avg_sq": Spec(shape)}

    def accumulate(self, s: State, Y: Tensor, c: Context) -> None:
        """Fold the projected gradient in."""
        ema_(s["exp_avg_sq"], Y.square(), c.rate(c.hp["betas"][1], c.count), c)

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        """`X / (v^exponent + eps)`."""
        return X / self.denominator(s, c)

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """`v <- (R ∘ R) v` on every mode that moved."""
        for i, move in moves.items():
            put_(s["exp_avg_sq"], mul(move.rotation.square(), s["exp_avg_sq"], i), move.gate, c)

    def curvature(self, s: State, c: Context) -> Tensor:
        """The second moment."""
        return s["exp_avg_sq"]

    def preconditioner(self, s: State, c: Context) -> Tensor:
        """`1 / (v^exponent + eps)`."""
        return 1 / self.denominator(s, c)

    def denominator(self, s: State, c: Context) -> Tensor:
        """`v^exponent + eps`."""
        return linalg.power(s["exp_avg_sq"], c.hp["exponent"]) + c.hp["eps"]


@dataclass(frozen=True)
class CorrectedKronecker(Kronecker):
    """Momentum before the factor, a second moment that sees the gradient itself."""

    scaling: SecondMoment
    momentum: Literal["none", "gradient", "update"] = "gradient"

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """Three products per mode."""
        Y = x["grad"]
        for i in c.modes:
            Y = self.factor.into(s, Y, i)
        self.scaling.accumulate(s, Y, c)
        return super().apply(s, moment, x, c)

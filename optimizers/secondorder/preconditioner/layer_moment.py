"""EKFAC's scaling: second moments of gradients in the factors' eigenbases, in place of products of eigenvalues.

    v <- v + r (Σ (Q_Gᵀ g aᵀ Q_A)² - v)       per-example squares that the taps gathered, normalised as G is
    v <- v + r (M Y² - v),   Y = Q_Gᵀ ∇W Q_A  or the mean gradient's, with M loss terms ("gradient")
    u  = Y / (v + λ mean(v))                  damping "relative"; "absolute": v + λ
    a refresh turns the basis by R:           v <- (R ∘ R) v

The diagonal of the true block in that basis: no other diagonal is closer to it in Frobenius norm.
George et al., *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis* (2018, arXiv:1806.03884),
sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder.preconditioner.damped import DampedSpectrum, LayerKronecker
from secondorder.preconditioner.kronecker import Move
from secondorder.preconditioner.layer_basis import outer
from secondorder.preconditioner.modes import mul
from secondorder.preconditioner.protocol import Context, Modes, Spec, State, Streams, ema_, put_


@dataclass(frozen=True)
class LayerMoment(DampedSpectrum):
    """`moment` in the eigenbasis, in the block's shape."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `Scaling`."""
        return {"moment": Spec(shape)}

    def absorb(self, s: State, moment: Tensor, c: Context) -> None:
        """Average the squares."""
        ema_(s["moment"], moment, self.factor.rate(c), c)

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """`v <- (R ∘ R) v` on every mode that moved.

        Products of eigenvalues would be no start: a factor of few rows has a null space in which examples' gradients
        do have energy, and what is divided by next to nothing there made training diverge.
        """
        for i, move in moves.items():
            put_(s["moment"], mul(move.rotation.square(), s["moment"], i), move.gate, c)

    def denominator(self, s: State, shape: tuple[int, ...], c: Context) -> Tensor:
        """See `DampedSpectrum`."""
        return s["moment"] + c.expand(self.ridge(s, c), s["moment"])

    def ridge(self, s: State, c: Context) -> Tensor:
        """See `DampedSpectrum`."""
        means = s["moment"].flatten(1).mean(1)
        return c.hp["damping"] * (means if c.hp["damping_kind"] == "relative" else torch.ones_like(means))

    def curvature(self, s: State, c: Context) -> Tensor:
        """The moments."""
        return s["moment"]


@dataclass(frozen=True)
class CorrectedLayer(LayerKronecker):
    """EKFAC's row.

    Attributes:
        scaling: The moments.
        by_example: Squares of examples' gradients, which the taps gather; else of the mean gradient.
    """

    scaling: LayerMoment
    by_example: bool = True

    def statistics(self, shape: tuple[int, ...], modes: Modes, diagonal: Modes) -> dict[str, tuple[int, ...]]:
        """See `Method`."""
        more: dict[str, tuple[int, ...]] = {} if self.by_example else {"terms": ()}
        if self.by_example and len(modes) + len(diagonal) > 1:
            more["moment"] = shape
        return {**super().statistics(shape, modes, diagonal), **more}

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {**super().specs(shape, modes, hp, diagonal), **({} if self.by_example else {"terms": Spec(())})}

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """See `Method`."""
        super().observe(s, x, c)
        if self.by_example:
            self.scaling.absorb(s, x["moment"] if "moment" in x else self._of_one_factor(s, x, c), c)
        else:
            put_(s["terms"], x["terms"], c.seen_gate, c)

    def _of_one_factor(self, s: State, x: Streams, c: Context) -> Tensor:
        """Squares in the basis of a block with one factor (a bias apart, norm layers, inputs alone): diag(QᵀSQ)."""
        (i,) = (*c.modes, *c.diagonal)
        values = x[f"gram_{i}"]
        if i in c.modes:
            Q = s[f"basis_{i}"]
            values = (Q * (values @ Q)).sum(-2)
        return outer({i: values}, tuple(s["moment"].shape[1:]))

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """See `Method`."""
        if not self.by_example:
            Y = x["grad"]
            for i in c.modes:
                Y = self.factor.into(s, Y, i)
            ema_(s["moment"], Y.square() * c.expand(s["terms"], Y), c.rate(c.hp["betas"][1], c.count), c)
        return super().apply(s, moment, x, c)

    def multiply(self, s: State, X: Tensor, c: Context) -> Tensor:
        """See `LayerKronecker`."""
        for i in c.modes:
            X = self.factor.into(s, X, i)
        X = X * s["moment"]
        for i in c.modes:
            X = self.factor.out(s, X, i)
        return X

    def held(self, s: State, c: Context) -> None:  # type: ignore[override]
        """The moments belong to the basis that is applied."""
        return None

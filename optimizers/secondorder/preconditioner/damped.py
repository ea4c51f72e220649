"""Damped curvature in the eigenbasis of Kronecker factors: what KFAC divides by.

    D = ⊗ d_i                                                          products of the factors' eigenvalues
    relative   D + λ Π_i mean(d_i)                                     λ·tr(A)·tr(G)/(d_A·d_G)
    absolute   D + λ                                                   Tikhonov, exact
    pi         Π_i (d_i + λ^(1/k) mean(d_i) / Π_j mean(d_j)^(1/k))     split by traces; for two modes π√λ and √λ/π
    factor     Π_i (d_i + λ)

Relative damping does not change with the scale of the loss, of the inputs or of the statistics. In `pi`, modes of size
one (the single output channel of a group of a depth-wise convolution) get no damping of their own, and k leaves them
out: with one other mode the damping is exact.

Martens and Grosse (2015, arXiv:1503.05671), section 6.3; split for k factors: Botev and Martens, kfac-jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder.curvature.layer import LayerStatistic
from secondorder.preconditioner.kronecker import Kronecker, Move
from secondorder.preconditioner.layer_basis import LayerBasis, outer
from secondorder.preconditioner.modes import mul
from secondorder.preconditioner.protocol import Context, Modes, Spec, State

DAMPING_KINDS = ("relative", "absolute", "pi", "factor")


def damped(values: Mapping[int, Tensor], shape: tuple[int, ...], damping: float | Tensor, kind: str) -> Tensor:
    """The denominator `(n, d1, ..., dk)` for eigenvalues `(n, d_i)` by mode."""
    if kind in ("relative", "absolute"):
        return outer(values, shape) + ridge(values, damping, kind).view(-1, *[1] * len(shape))
    if kind == "factor":
        return outer({i: d + damping for i, d in values.items()}, shape)
    means = {i: d.mean(-1) for i, d in values.items()}
    real = [i for i, d in values.items() if d.shape[-1] > 1] or list(values)
    logs = torch.stack(list(means.values())).clamp_min(torch.finfo(torch.float32).tiny).log()
    common = (logs.sum(0) / len(real)).exp()
    ridged = {}
    for i, d in values.items():
        share = means[i] / common * damping ** (1 / len(real)) if i in real else torch.zeros_like(means[i])
        ridged[i] = d + share[:, None]
    return outer(ridged, shape)


def ridge(values: Mapping[int, Tensor], damping: float | Tensor, kind: str) -> Tensor:
    """The multiple of the identity `(n,)` that damping adds to the curvature, or stands for."""
    means = torch.stack([d.mean(-1) for d in values.values()])
    return damping * (means.prod(0) if kind == "relative" else torch.ones_like(means[0]))


def inverse(denominator: Tensor) -> Tensor:
    """`1 / denominator`, and 0 where there is neither curvature nor damping: such directions stay where they are."""
    return torch.where(denominator > torch.finfo(denominator.dtype).tiny, 1 / denominator, 0.0)


def averaged(hp: Mapping[str, Any]) -> Literal["gradient", "update"]:
    """Where a layer method's momentum lives; in a quadratic model it is the last step."""
    return "update" if hp["quadratic_model"] is not None else hp["momentum"]


@dataclass(frozen=True)
class DampedSpectrum:
    """Division by the damped products of eigenvalues; no state of its own."""

    factor: LayerBasis = field(default_factory=LayerBasis)

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `Scaling`."""
        return {}

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        """`X / damped`."""
        return X * inverse(self.denominator(s, X.shape[1:], c))

    def denominator(self, s: State, shape: tuple[int, ...], c: Context) -> Tensor:
        """What the projected gradient is divided by."""
        return damped(self._values(s, c), tuple(shape), c.hp["damping"], c.hp["damping_kind"])

    def ridge(self, s: State, c: Context) -> Tensor:
        """What damping adds to every eigenvalue, `(n,)`; where it splits over the factors, λ."""
        return ridge(self._values(s, c), c.hp["damping"], c.hp["damping_kind"])

    def _values(self, s: State, c: Context) -> dict[int, Tensor]:
        return {i: self.factor.spectrum(s, i, c) for i in sorted((*c.modes, *c.diagonal))}

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """Eigenvalues belong to the factor."""

    def curvature(self, s: State, c: Context) -> Tensor:
        """Products of the stored eigenvalues."""
        return outer(self._values(s, c), tuple(s["momentum"].shape[1:]))

    def preconditioner(self, s: State, c: Context) -> Tensor:
        """One over the damped products."""
        return inverse(self.denominator(s, tuple(s["momentum"].shape[1:]), c))


@dataclass(frozen=True)
class LayerKronecker(Kronecker):
    """A Kronecker-factored method on layer statistics: observe, refresh, apply, momentum last."""

    statistic: LayerStatistic
    factor: LayerBasis
    scaling: DampedSpectrum
    momentum: Literal["none", "gradient", "update"] = "update"
    eager: bool = True

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {**self.factor.specs(shape, modes, hp, diagonal), **self.scaling.specs(shape)}

    def statistics(self, shape: tuple[int, ...], modes: Modes, diagonal: Modes) -> dict[str, tuple[int, ...]]:
        """See `Method`."""
        dense = {f"gram_{i}": (shape[i], shape[i]) for i in modes}
        return {**dense, **{f"gram_{i}": (shape[i],) for i in diagonal}, "arrived": ()}

    def multiply(self, s: State, X: Tensor, c: Context) -> Tensor:
        """The curvature as it is now, undamped, times `X (n, d1, ..., dk)`."""
        for i in c.modes:
            X = mul(s[f"covariance_{i}"], X, i)
        return X * outer({i: s[f"diagonal_{i}"] for i in c.diagonal}, tuple(X.shape[1:])) if c.diagonal else X

    def held(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor]:
        """The curvature as it is now, `(bases, spectrum)`, whatever the age of what is applied."""
        bases, values = self.factor.fresh(s, c)
        return bases, outer(values, tuple(s["momentum"].shape[1:]))

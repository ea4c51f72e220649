"""Grafting: a factor's direction with the length of another method's step, block by block.

    V <- average or sum of G ∘ G                 G: the gradient as it is
    D = m̃ / (√V + eps)                           m̃: the momentum that the factor takes too
    u = U · |D| / |U|                            U: the factor's direction; Frobenius norms; u = D where U is 0

So the learning rate of the other method carries over, and as long as a factor has no root yet (U = 0) the step is the
other method's. Anil et al., *Scalable Second Order Optimization for Deep Learning* (2020, arXiv:2002.09018), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.preconditioner.protocol import Context, Spec, State, ema_, put_


def norms(X: Tensor) -> Tensor:
    """Frobenius norm `(n,)` of every row, whose bits do not hang on where the row lies."""
    wide = X.dtype if X.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(X.flatten(1), dim=1, dtype=wide).to(X.dtype)


@dataclass(frozen=True)
class SGDGraft:
    """`D = m̃`, and what all grafts share."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """`graft_scale`: `|D| / |U|` of the last step, for `preconditioner(p)`; 0 before there is one."""
        return {"graft_scale": Spec(())}

    def accumulate(self, s: State, G: Tensor, c: Context) -> None:
        """Fold this gradient in."""

    def diagonal(self, s: State, like: Tensor, c: Context) -> Tensor:
        """`1 / (√V + eps)`, or 1: what `D` multiplies the momentum by."""
        return torch.ones_like(like)

    def lend(self, s: State, U: Tensor, moment: Tensor, G: Tensor, c: Context) -> Tensor:
        """`U` with the length of `D`, or `D` where `U` is zero."""
        self.accumulate(s, G, c)
        D = moment * self.diagonal(s, moment, c)
        length = norms(U)
        scale = torch.where(length > 0, norms(D) / length, 0.0)
        put_(s["graft_scale"], scale, c.gate, c)
        return torch.where(c.expand(length, U) > 0, U * c.expand(scale, U), D)


@dataclass(frozen=True)
class AdamGraft(SGDGraft):
    """`V` is Adam's second moment: an average with decay β2, debiased (as it is stored)."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `SGDGraft`."""
        return {**super().specs(shape), "graft_exp_avg_sq": Spec(shape)}

    def rate(self, c: Context) -> Tensor:
        """Rate `(n,)` of the average."""
        return c.rate(c.hp["betas"][1], c.count)

    def accumulate(self, s: State, G: Tensor, c: Context) -> None:
        """See `SGDGraft`."""
        ema_(s["graft_exp_avg_sq"], G.square(), self.rate(c), c)

    def diagonal(self, s: State, like: Tensor, c: Context) -> Tensor:
        """See `SGDGraft`."""
        return 1 / (s["graft_exp_avg_sq"].sqrt() + c.hp["eps"])


@dataclass(frozen=True)
class RMSpropGraft(AdamGraft):
    """The same average without bias correction: the first steps are longer."""

    def rate(self, c: Context) -> Tensor:
        """See `AdamGraft`."""
        return (1 - c.hp["betas"][1]) * c.gate


@dataclass(frozen=True)
class AdagradGraft(SGDGraft):
    """`V` is the sum of all squares: steps shrink like 1/√t."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `SGDGraft`."""
        return {**super().specs(shape), "graft_sum_sq": Spec(shape)}

    def accumulate(self, s: State, G: Tensor, c: Context) -> None:
        """See `SGDGraft`."""
        s["graft_sum_sq"].add_(torch.where(c.expand(c.gate, G) > 0, G.square(), 0.0))

    def diagonal(self, s: State, like: Tensor, c: Context) -> Tensor:
        """See `SGDGraft`."""
        return 1 / (s["graft_sum_sq"].sqrt() + c.hp["eps"])


GRAFTS = {"adam": AdamGraft, "rmsprop": RMSpropGraft, "adagrad": AdagradGraft, "sgd": SGDGraft}

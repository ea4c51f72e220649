"""Grafting: a factor's direction with the length of another method's step, block by block.

    V <- average or sum of G ∘ G                 G: the gradient as it is
    D = m̃ / (√V + eps)                           m̃: the momentum that the factor takes too
    u = U · |D| / |U|                            U: the factor's direction; Frobenius norms; u = D where U is 0

So the learning rate of the other method carries over, and as long as a factor has no root yet (U = 0) the step is the
other method's. Anil et al., *Scalable Second Order Optimization for Deep Learning* (2020, arXiv:2002.09018), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secondorder.preconditioner.protocol import Context, Spec, State, put_
from secondorder_kernels import graft_


@dataclass(frozen=True)
class SGDGraft:
    """`D = m̃`, and what all grafts share.

    Attributes:
        kind: How `V` is made of squares: "adam" for an average, "adagrad" for a sum, "sgd" for none.
        squares: Name of the state entry `V`.
    """

    kind: ClassVar[str] = "sgd"
    squares: ClassVar[str] = ""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """`graft_scale`: `|D| / |U|` of the last step, for `preconditioner(p)`; 0 before there is one."""
        return {"graft_scale": Spec(())}

    def rate(self, c: Context) -> Tensor:
        """Rate `(n,)` of the average; of a sum, which rows take part."""
        return c.gate

    def diagonal(self, s: State, like: Tensor, c: Context) -> Tensor:
        """`1 / (√V + eps)`, or 1: what `D` multiplies the momentum by."""
        return torch.ones_like(like)

    def lend(self, s: State, U: Tensor, moment: Tensor, G: Tensor, c: Context) -> Tensor:
        """`U` with the length of `D`, or `D` where `U` is zero."""
        if self.squares:
            V = s[self.squares]
            lent, scale = graft_(U, moment, G, V, rate=self.rate(c), eps=c.hp["eps"], kind=self.kind)
        else:
            lent, scale = graft_(U, moment, kind=self.kind)
        put_(s["graft_scale"], scale, c.gate, c)
        return lent


@dataclass(frozen=True)
class AdamGraft(SGDGraft):
    """`V` is Adam's second moment: an average with decay β2, debiased (as it is stored)."""

    kind: ClassVar[str] = "adam"
    squares: ClassVar[str] = "graft_exp_avg_sq"

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """See `SGDGraft`."""
        return {**super().specs(shape), self.squares: Spec(shape)}

    def rate(self, c: Context) -> Tensor:
        """See `SGDGraft`."""
        return c.rate(c.hp["betas"][1], c.count)

    def diagonal(self, s: State, like: Tensor, c: Context) -> Tensor:
        """See `SGDGraft`."""
        return 1 / (s[self.squares].sqrt() + c.hp["eps"])


@dataclass(frozen=True)
class RMSpropGraft(AdamGraft):
    """The same average without bias correction: the first steps are longer."""

    def rate(self, c: Context) -> Tensor:
        """See `AdamGraft`."""
        return (1 - c.hp["betas"][1]) * c.gate


@dataclass(frozen=True)
class AdagradGraft(AdamGraft):
    """`V` is the sum of all squares: steps shrink like 1/√t."""

    kind: ClassVar[str] = "adagrad"
    squares: ClassVar[str] = "graft_sum_sq"

    def rate(self, c: Context) -> Tensor:
        """See `SGDGraft`."""
        return c.gate


GRAFTS = {"adam": AdamGraft, "rmsprop": RMSpropGraft, "adagrad": AdagradGraft, "sgd": SGDGraft}

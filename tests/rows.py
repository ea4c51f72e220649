"""Rows of the table that no public method uses yet: they exercise what the step offers to every method."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secondorder.base import PreconditionedOptimizer
from secondorder.curvature.gradient import GradientStatistic
from secondorder.layout.blocks import Treatment
from secondorder.preconditioner.adam import AdamInBasis
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.elementwise import AdamWMethod
from secondorder.preconditioner.kronecker import Kronecker
from secondorder.preconditioner.protocol import Method, Spec, put_


@dataclass(frozen=True)
class Identity(Method):
    """The direction is the gradient (or its momentum) itself: SGD."""

    momentum: Any = "none"
    name: ClassVar[str] = "SGD"

    def specs(self, shape, modes, hp, diagonal=()):
        return {}

    def apply(self, s, moment, x, c) -> Tensor:
        return moment.clone()


@dataclass(frozen=True)
class FlatIdentity(Identity):
    """The same, end to end in a flat bucket."""

    elementwise = True


@dataclass(frozen=True)
class Anchored(Identity):
    """Remembers a block's first usable gradient, from `begin`."""

    def specs(self, shape, modes, hp, diagonal=()):
        return {"anchor": Spec(shape)}

    def begin(self, s, x, c):
        put_(s["anchor"], x["grad"], c.gate, c)


class ObservingSOAP(PreconditionedOptimizer):
    """SOAP in the other order: the basis has seen the gradient that it is applied to."""

    def __init__(self, params, lr, betas, *, eps, weight_decay, **options):
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, factor_beta=None, refresh_by="qr")
        super().__init__(params, own, options)

    def _method(self, group):
        return Kronecker(GradientStatistic(), EigenBasis(), AdamInBasis())


class SGD(PreconditionedOptimizer):
    """A row on every parameter, whole: momentum where the row says, decay as the group says."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.0), *, row=None, eps=0.0, weight_decay=0.0, **options):
        self.row = row or Identity()
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), options)

    def _method(self, group):
        return self.row

    def _blocks(self, shape, group, role):
        view = shape or (1,)
        return Treatment(view, tuple((d,) for d in view), (), "whole")


@dataclass(frozen=True)
class StackedAdamW(AdamWMethod):
    """AdamW on stacked blocks instead of end to end."""

    elementwise = False


class Adam(SGD):
    """AdamW's row in stacked buckets: the same mathematics by another way through the step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), *, eps=1e-8, **options):
        super().__init__(params, lr, betas, eps=eps, row=StackedAdamW(), **options)

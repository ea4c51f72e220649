"""The reference implementation of SOAP (nikhilvyas/SOAP), with its quirks, as a row built from our vocabulary.

What differs from `secondorder.SOAP`, and why nobody should train so:

- the first gradient of a parameter chooses the basis and is lost as a step (`first="skip"`), for vectors too;
- weight decay acts after the step, on the new parameter;
- eps is compared with the square root of the second moment *before* bias correction;
- the second moment is permuted with the sorting of a basis, not transported;
- tensors of order 4 keep four factors unless `merge_dims`; merging goes from the first axis; an axis longer than
  `max_precond_dim` has no factor; vectors have one only with `precondition_1d`; nothing is cut into blocks;
- `normalize_grads` normalises the update by its root mean square, after which the bias correction still scales it.

The first basis is a null space's arbitrary choice: `inject` puts a recorded one in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder.base import PreconditionedOptimizer
from secondorder.curvature.gradient import GradientStatistic
from secondorder.layout.blocks import Treatment
from secondorder.preconditioner.adam import AdamInBasis
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.kronecker import Kronecker, Move
from secondorder.preconditioner.protocol import Context, Method, State, Streams, put_


@dataclass(frozen=True)
class PeerAdam(AdamInBasis):
    """Second moment permuted with the basis; eps against the uncorrected root; bias correction optional."""

    correct_bias: bool = True

    def rates(self, c: Context) -> tuple[Tensor, Tensor]:
        if self.correct_bias:
            return super().rates(c)
        beta1, beta2 = c.hp["betas"]
        return (1 - beta1) * c.gate, (1 - beta2) * c.gate

    def epsilon(self, c: Context, like: Tensor) -> float | Tensor:
        if not self.correct_bias:
            return super().epsilon(c, like)
        # m̂ / (√v̂ + eps / √w) = (√w / w1) m / (√v + eps),  w = 1 - β2^t:  the reference's step, in debiased averages
        return c.expand(c.hp["eps"] / c.weight(c.hp["betas"][1], c.count).sqrt(), like)

    def move_second_moment(self, v: Tensor, move: Move, mode: int, c: Context) -> None:
        if move.order is not None:
            index = move.order.view(v.shape[0], *(v.shape[mode + 1] if i == mode else 1 for i in range(v.ndim - 1)))
            put_(v, v.gather(mode + 1, index.expand_as(v)), move.gate, c)


@dataclass(frozen=True)
class PeerKronecker(Kronecker):
    """Decay after the step; the update normalised on request."""

    decay_after = True
    normalize: bool = False

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        u = super().apply(s, moment, x, c)
        if not self.normalize:
            return u
        beta1, beta2 = c.hp["betas"]
        rms = u.flatten(1).square().mean(1).sqrt()
        return u * c.expand(c.weight(beta2, c.count).sqrt() / c.weight(beta1, c.count) / (1e-30 + rms), u)


def merged(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Merge axes from the first on, while their product stays within the limit."""
    out, running = [], 1
    for d in shape:
        if running * d <= limit:
            running *= d
        elif running > 1:
            out.append(running)
            running = d
        else:
            out.append(d)
    if running > 1 or not out:
        out.append(running)
    return tuple(out)


class PeerSOAP(PreconditionedOptimizer):
    """Arguments and defaults of the reference. `data_format` is left to the caller, who permutes the parameter."""

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(factor_beta=shampoo_beta if shampoo_beta >= 0 else None, refresh_by="qr")
        own.update(merge_dims=merge_dims, precondition_1d=precondition_1d)
        own.update(normalize_grads=normalize_grads, correct_bias=correct_bias)
        shared = dict(nesterov=False, refresh_every=precondition_frequency, refresh="together")
        super().__init__(params, own, {**shared, "max_precond_dim": max_precond_dim})

    def _method(self, group: dict[str, Any]) -> Method:
        return PeerKronecker(
            GradientStatistic(),
            EigenBasis(tie_break=0.0),
            PeerAdam(correct_bias=group["correct_bias"]),
            lagged=True,
            first="skip",
            normalize=group["normalize_grads"],
        )

    def _blocks(self, shape: tuple[int, ...], group: Mapping[str, Any], role: str | None) -> Treatment:
        limit = group["max_precond_dim"]
        view = merged(shape, limit) if group["merge_dims"] and len(shape) != 1 else shape or (1,)
        modes = tuple(i for i, d in enumerate(view) if d <= limit)
        if (len(shape) == 1 and not group["precondition_1d"]) or (len(shape) == 0 and not group["merge_dims"]):
            modes = ()
        return Treatment(view, tuple((d,) for d in view), modes, "as the reference does")


def inject(optimizer: PeerSOAP, p: Tensor, bases: Mapping[int, Tensor]) -> None:
    """Put recorded bases in the place of those that the first gradient gave."""
    for mode, basis in bases.items():
        assert optimizer.state[p][f"basis_{mode}"].shape == basis.shape
        optimizer.state[p][f"basis_{mode}"] = torch.as_tensor(basis)

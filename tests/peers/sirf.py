"""The recorded SIRFShampoo, and the original IF-Shampoo: every parameter one block, factors that start as identities,
a constant rate that is divided by the Frobenius norm of the step, momentum that starts at zero, absolute damping."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import secondorder
from secondorder.preconditioner.lie_factor import LieFactor, RareLieFactor

# How the recordings name our structures.
STRUCTURES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block30diagonal": "block(30)",
    "hierarchical15_15": "hierarchical(15,15)",
    "triltoeplitz": "tril_toeplitz",
    "triutoeplitz": "triu_toeplitz",
}
WHOLE = dict(max_block_size=None, max_precond_dim=None, max_update_rms=None, normalize=False, nesterov=False)


@dataclass(frozen=True)
class PeerLieFactor(LieFactor):
    def begin(self, s, x, c):
        self.reset(s, x["grad"], torch.ones_like(c.gate), c)

    def noise(self, s, mean_square, c):
        return c.hp["damping"] * torch.ones_like(mean_square)

    def momentum_rate(self, c):
        return (1 - c.hp["factor_momentum"]) * c.seen_gate

    def rate(self, kind, m, c):
        return c.hp["factor_rate"] * c.seen_gate / kind.frobenius(m).clamp_min(1)


@dataclass(frozen=True)
class PeerRareLieFactor(PeerLieFactor, RareLieFactor):
    pass


class PeerSIRFShampoo(secondorder.SIRFShampoo):
    """Constructed with the recordings' argument names; `joint` are pairs of a weight and a bias that is its column."""

    def __init__(
        self,
        params: Iterable[Tensor],
        structures: str,
        joint: Iterable[tuple[Tensor, Tensor]] = (),
        factor_dtype: str = "float32",
        *,
        batch_size: int,
        lr: float,
        beta2: float,
        lam: float,
        alpha1: float,
        alpha2: float,
        kappa: float,
        T: int,
    ) -> None:
        self.joined = {id(weight): id(bias) for weight, bias in joint}
        self.follows = {bias: weight for weight, bias in self.joined.items()}
        named = STRUCTURES[structures]
        of_peer = dict(weight_decay=kappa, weight_decay_kind="coupled", momentum="update", statistics_every=T)
        of_peer.update(factor_rate=beta2, factor_momentum=alpha2, damping=lam, structures=named, vectors=named)
        betas = (alpha1, 0.99)
        super().__init__(params, lr, betas, batch_size=batch_size, factor_dtype=factor_dtype, **of_peer, **WHOLE)

    def _method(self, group: dict[str, Any]) -> LieFactor:
        return PeerLieFactor(momentum="update")

    def _treat(self, p: Tensor, group: dict[str, Any], group_index: int, index: int) -> Any:
        method, treatment = super()._treat(p, group, group_index, index)
        pairs = dict(joined=self.joined.get(id(p)), follows=self.follows.get(id(p)))
        return method, replace(treatment, **pairs)


class PeerIFShampoo(secondorder.IFShampoo):
    """The original: a quarter of the rate for names that contain "norm", "proj" or "bias"."""

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        *,
        batch_size: int,
        lr: float,
        lr_cov: float,
        damping: float,
        momentum: float,
        beta2: float,
        weight_decay: float,
        T: int,
    ) -> None:
        slow = [name for name, _ in named if any(part in name for part in ("norm", "proj", "bias"))]
        groups = [
            {"params": [p for name, p in named if name not in slow], "factor_rate": lr_cov},
            {"params": [p for name, p in named if name in slow], "factor_rate": lr_cov / 4},
        ]
        of_peer = dict(weight_decay=weight_decay, weight_decay_kind="coupled", momentum="update", statistics_every=T)
        of_peer.update(factor_momentum=beta2, damping=damping, vectors="dense", batch_size=batch_size)
        super().__init__(groups, lr, (momentum, 0.99), **of_peer, **WHOLE)

    def _method(self, group: dict[str, Any]) -> LieFactor:
        return PeerRareLieFactor(momentum="update")

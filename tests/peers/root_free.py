"""The published root-free RMSProp and AdamW (yorkerlin/remove-the-square-root), as rows built from our vocabulary.

What differs from `secondorder.RFRMSProp` and `secondorder.RFAdamW`, and why nobody should train so:

- averages are not debiased unless `bias_correction`, which then divides the second moment with its prior in it;
- `dummy_init` starts the second moment at zero, so that the first updates are `1 / (1 - β2)` times too large;
- `dummy_scaling` leaves the batch out, so that lr and eps hang on its size.

Their second moment is stored divided by B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from secondorder._optimizer import ElementwiseOptimizer
from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams, ema_
from secondorder.preconditioner.root_free import RootFree


@dataclass(frozen=True)
class PeerRootFreeAdam(RootFree):
    """Plain averages of gradient and second moment, both kept here."""

    momentum: Literal["none", "gradient", "update"] = "none"

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        return {**super().specs(shape, modes, hp, diagonal), "exp_avg": Spec(shape)}

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        beta1, beta2 = c.hp["betas"]
        m = ema_(s["exp_avg"], moment, (1 - beta1) * c.gate, c)
        super().apply(s, m, x, c)  # for the average of squares
        v = s["exp_avg_sq"]
        if c.hp["bias_correction"]:
            m, v = m / c.expand(c.weight(beta1, c.count), m), v / c.expand(c.weight(beta2, c.count), v)
        return m / (v + c.hp["eps"])


class PeerRootFree(ElementwiseOptimizer):
    """Both, with the arguments of theirs: `betas` makes it AdamW, `alpha` and `momentum` RMSProp."""

    own_options = {}

    def __init__(
        self,
        params: Any,
        lr: float,
        eps: float,
        weight_decay: float,
        batch_size: int,
        betas: tuple[float, float] | None = None,
        alpha: float = 0.0,
        momentum: float = 0.0,
        bias_correction: bool = False,
        dummy_init: bool = False,
        dummy_scaling: bool = False,
    ) -> None:
        own = dict(lr=lr, betas=betas or (momentum, alpha), eps=eps, weight_decay=weight_decay)
        own.update(batch_size=None if dummy_scaling else batch_size, initial=0.0 if dummy_init else 1.0)
        own.update(bias_correction=bias_correction, root_free_adam=betas is not None)
        super().__init__(params, own, {"weight_decay_kind": "coupled" if betas is None else "decoupled"})

    def _method(self, group: dict[str, Any]) -> Method:
        return PeerRootFreeAdam() if group["root_free_adam"] else RootFree("update")

"""AdamW as a row of the table: no modes, no factor. The suite's fallback, and the method of `secondorder.AdamW`.

    m <- β1 m + (1 - β1) g,   v <- β2 v + (1 - β2) g²
    u  = (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + eps)

Decoupled Weight Decay Regularization (Loshchilov and Hutter 2019, arXiv:1711.05101), algorithm 2. The averages are
stored as torch.optim.AdamW stores them, without bias correction, so that torch's fused kernel can work on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams, ema_
from secondorder_kernels import adamw_


@dataclass(frozen=True)
class AdamWMethod(Method):
    """Element-wise: rows of any shape, end to end in a flat bucket."""

    elementwise = True
    name = "AdamW"

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {"exp_avg": Spec(shape), "exp_avg_sq": Spec(shape)}

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """The update direction, in plain tensor operations: the readable form, and the path for mixed precision."""
        beta1, beta2 = c.hp["betas"]
        m = ema_(s["exp_avg"], moment, (1 - beta1) * c.gate, c)
        v = ema_(s["exp_avg_sq"], moment.square(), (1 - beta2) * c.gate, c)
        # A row that never took a step has weight 0; its update is masked, any finite divisor will do.
        first, second = (c.weight(beta, c.count).clamp_min(1 - beta) for beta in (beta1, beta2))
        root = (v / c.expand(second, v)).sqrt_().add_(c.hp["eps"])
        return m / c.expand(first, m) / root

    def step_in_place(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        s: Mapping[str, Sequence[Tensor]],
        refused: Tensor,
        hp: Mapping[str, Any],
    ) -> None:
        """The whole step on the parameters' own storage, decoupled decay included: one multi-tensor operation.

        Args:
            params: Contiguous parameters of one dtype and device.
            grads: Their gradients, same layout and dtype.
            s: Lists of state entries in the parameters' shapes; `count` already includes this step.
            refused: 0-d, 1 where nothing may change.
            hp: The group's hyper-parameters.
        """
        beta1, beta2 = hp["betas"]
        adamw_(
            params,
            grads,
            s["exp_avg"],
            s["exp_avg_sq"],
            s["count"],
            lr=hp["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=hp["eps"],
            weight_decay=hp["weight_decay"],
            maximize=hp["maximize"],
            refused=refused,
        )

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor] | None:
        """Diagonal: the corrected second moment, and `1 / (√v̂ + eps)`."""
        beta2 = c.hp["betas"][1]
        v = s["exp_avg_sq"] / c.expand(c.weight(beta2, c.count).clamp_min(1 - beta2), s["exp_avg_sq"])
        return {}, v, 1 / (v.sqrt() + c.hp["eps"])

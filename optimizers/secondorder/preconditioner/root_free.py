"""Root-free scaling: the curvature's diagonal itself, not its root. No modes; rows end to end in a flat bucket.

    s <- average of B g²  (β2),  s_0 = initial      B: samples whose mean the loss is
    u  = m / (s + eps)                              m: the gradient, or its average

`g²` of a mean over B samples shrinks as 1/B where their gradients are independent; `B g²` estimates the diagonal of the
Fisher matrix for every B. Then `g / s` has the parameter's units, and s_0, eps and lr mean the same for every B. s_0 is
a prior curvature: without it (`initial=None`, the debiased average) the first step is `1 / (B g)`.

Lin et al., *Can We Remove the Square-Root in Adaptive Gradient Methods?* (2024, arXiv:2402.03496).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams
from secondorder_kernels import root_free_


def batch_factor(hp: Mapping[str, Any]) -> float | Tensor:
    """`B` of a group: a number or a 0-d tensor; 1 where nobody said."""
    size = hp["batch_size"]
    if size is None:
        return 1.0
    return size.view(()) if isinstance(size, Tensor) else float(size)


@dataclass(frozen=True)
class RootFree(Method):
    """`exp_avg_sq`, the average of `B g²`.

    Attributes:
        momentum: `"gradient"` (RF-AdamW) or `"update"` (RF-RMSProp).
    """

    momentum: Literal["none", "gradient", "update"] = "gradient"
    elementwise = True

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {"exp_avg_sq": Spec(shape, hp["initial"] or 0.0)}

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """The average includes this gradient, then divides."""
        v, beta2 = s["exp_avg_sq"], c.hp["betas"][1]
        rate = c.expand(c.rate(beta2, c.count) if c.hp["initial"] is None else (1 - beta2) * c.gate, v)
        return root_free_(v, x["grad"], moment, rate=rate, scale=batch_factor(c.hp), eps=c.hp["eps"])

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor] | None:
        """Diagonal: the average (a prior alone is no curvature), and `1 / (s + eps)`."""
        v = s["exp_avg_sq"]
        return {}, torch.where(c.expand(c.count, v) > 0, v, 0.0), 1 / (v + c.hp["eps"])

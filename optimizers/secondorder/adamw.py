"""AdamW, the suite's fallback, as an optimizer of its own."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from secondorder._optimizer import ElementwiseOptimizer
from secondorder._options import CommonOptions
from secondorder.preconditioner.elementwise import AdamWMethod
from secondorder.preconditioner.protocol import Method


class AdamW(ElementwiseOptimizer):
    """AdamW: Adam with decoupled weight decay, as torch.optim.AdamW, with this suite's contract.

    For every entry of a parameter `p` with gradient `g`, at its `t`-th step:

        m <- β1 m + (1 - β1) g                       exp_avg
        v <- β2 v + (1 - β2) g²                      exp_avg_sq
        p <- (1 - lr · weight_decay) p
        p <- p - lr · (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + eps)

    Source: Loshchilov and Hutter, *Decoupled Weight Decay Regularization* (2019, arXiv:1711.05101), algorithm 2.
    Deviations: none from torch.optim.AdamW on usable gradients; a step with a gradient that is not finite is refused.
    For parameters of half precision the averages are float32.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-3.
        betas: Decay rates (β1, β2) of the two averages. Default: (0.9, 0.999).
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), options)

    def _method(self, group: dict[str, Any]) -> Method:
        return AdamWMethod()

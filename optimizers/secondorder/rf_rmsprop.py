"""RFRMSProp: RMSProp without the square root."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from secondorder._batch import BatchCounting
from secondorder._optimizer import ElementwiseOptimizer
from secondorder._options import BATCH_SIZE, INITIAL, CommonOptions
from secondorder.preconditioner.protocol import Method
from secondorder.preconditioner.root_free import RootFree


class RFRMSProp(BatchCounting, ElementwiseOptimizer):
    """RFRMSProp: RMSProp that divides by the second moment itself, not by its root.

    For every entry of a parameter `p` with gradient `g`, `B = batch_size`:

        s <- β2 s + (1 - β2) B g²,   s_0 = initial    exp_avg_sq
        v <- β1 v + g / (s + eps)                     momentum (heavy ball)
        p <- (1 - lr · weight_decay) p
        p <- p - lr · v

    `B g²` estimates the diagonal of the Fisher matrix for a loss that is a mean over B samples, so that this is a
    diagonal natural gradient: its steps have the parameter's units, and `initial`, `eps` and `lr` need no change with
    the batch. Where batches differ in size, `batch_size="count"` has each step's own.

    Source: Lin et al., *Can We Remove the Square-Root in Adaptive Gradient Methods?* (2024, arXiv:2402.03496).
    Deviation: weight decay is decoupled (theirs: `weight_decay_kind="coupled"`, added to `g / (s + eps)`).

    `initial` is a prior curvature that `β2^t` wears away: the first steps are those of gradient descent with momentum.
    Without one (`initial=None`: the debiased average of `B g²` alone) the first step is `lr / (B g)`, largest where the
    gradient is smallest.

    The learning rate has no relation to AdamW's; it is a tenth of `RFAdamW`'s, since the heavy ball sums updates up.
    Published ones, with B in place, are 2e-3 to 5e-2 on convolutions and 5e-5 to 5e-4 on transformers.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 3e-3.
        betas: Decay rates (β1, β2) of the momentum and of the second moment. Default: (0.9, 0.99).
        eps: Damping: added to the second moment. Default: 1e-4.
        weight_decay: Strength of weight decay. Default: 0.
        batch_size: B, samples whose mean the loss is, over all processes and accumulated passes; None: 1;
            `"count"`: counted from the forward passes of `module`. May change at any time in the group. Default: None.
        initial: Second moment before the first gradient; None: none, the average is debiased instead. Default: 1.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {"batch_size": BATCH_SIZE, "initial": INITIAL}

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        batch_size: float | Tensor | Literal["count"] | None = None,
        initial: float | None = 1.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, batch_size=batch_size, initial=initial)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        return RootFree("update")

"""IFShampoo: inverse-free Shampoo with dense factors that are moved ever more rarely."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from secondorder._options import BlockOptions
from secondorder.preconditioner.lie_factor import RareLieFactor
from secondorder.preconditioner.protocol import Method
from secondorder.sirf_shampoo import SIRFShampoo


class IFShampoo(SIRFShampoo):
    """IFShampoo: inverse-free Shampoo, one dense factor per axis, moved ever more rarely.

    The step is that of SIRFShampoo with dense factors:

        m <- average of G   (β1, debiased)            with look-ahead if nesterov=True
        U  = m̃ ×_1 K_1 K_1^T ... ×_k K_k K_k^T,  times B · RMS(G), scaled to RMS(U) <= max_update_rms
        W <- (1 - lr · weight_decay) W - lr U

    The factors move (`K_i <- K_i (I - ρ n_i)`, see SIRFShampoo) in every call at first, in every k-th from call 4^k on,
    and at last in every `statistics_every`-th: a call in which they rest costs 2 products per axis instead of 6.

    Source: Lin et al., *Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective* (2024,
    arXiv:2402.03496), section on Shampoo, with the schedule of its code. Deviations: those of SIRFShampoo; no smaller
    rate for parameters whose names contain "norm", "proj" or "bias" (give them a group of their own).

    RMS(U) is at most 1, and near it: start at AdamW's learning rate or up to 3 times that.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-2.
        betas: Decay rate β1 of the momentum, and β2 of the AdamW fallback. Default: (0.9, 0.99).
        eps: Added to the root of the second moment in the fallback. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.
        damping: Strength of damping, relative to the average squared entry of the gradient. Default: 1e-2.
        factor_rate: Rate at which the factors forget. Default: 0.2.
        factor_momentum: Decay rate of the average of the factors' steps; 0: none is stored. Default: 0.5.
        momentum: What β1 averages: gradients, before the factors, or (heavy ball) updates. Default: "gradient".
        normalize: Multiply the update by B times the average RMS of the gradient, so that it depends neither on the
            gradient's scale nor on B. Default: True.
        vectors: `"fallback"`, or `"dense"`: parameters with one axis have a factor too. Default: "fallback".
        batch_size: B, samples whose mean the loss is; None: 1; `"count"`: counted from the forward passes of
            `module`. Default: None.
        factor_dtype: In what factors are stored: `"float32"` (float64 for float64 parameters) or `"bfloat16"`. Default:
            "float32".
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    shared_options = {
        **SIRFShampoo.shared_options,
        "statistics_every": SIRFShampoo.shared_options["statistics_every"]._replace(default=10),
    }
    own_options = {name: option for name, option in SIRFShampoo.own_options.items() if name != "structures"}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-2,
        factor_rate: float = 0.2,
        factor_momentum: float = 0.5,
        momentum: Literal["gradient", "update"] = "gradient",
        normalize: bool = True,
        vectors: str = "fallback",
        batch_size: float | Tensor | Literal["count"] | None = None,
        factor_dtype: Literal["float32", "bfloat16"] = "float32",
        **options: Unpack[BlockOptions],
    ) -> None:
        own: dict[str, Any] = dict(eps=eps, weight_decay=weight_decay, damping=damping, factor_rate=factor_rate)
        own.update(factor_momentum=factor_momentum, momentum=momentum, normalize=normalize, vectors=vectors)
        super().__init__(params, lr, betas, batch_size=batch_size, factor_dtype=factor_dtype, **own, **options)

    def _method(self, group: dict[str, Any]) -> Method:
        return RareLieFactor(momentum=group["momentum"])

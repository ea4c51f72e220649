"""KFAC: Kronecker-factored approximate curvature from layer inputs and output gradients."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._adaptive import AdaptiveLayerOptimizer
from secondorder._options import LAYERS, REFRESH_BY, LayerOptions, Option, is_number, one_of
from secondorder.curvature.layer import LayerStatistic
from secondorder.preconditioner.damped import DAMPING_KINDS, DampedSpectrum, LayerKronecker, averaged
from secondorder.preconditioner.layer_basis import LayerBasis
from secondorder.preconditioner.protocol import Method


class KFAC(AdaptiveLayerOptimizer):
    """KFAC: The gradient between damped inverses of Kronecker factors of the Fisher matrix.

    For every layer `z = W a (+ b)` with gradient `∇ = dL/d[W | b]` (bias as last column):

        A <- average of a aᵀ  (inputs),   G <- average of g gᵀ, g = dℓ/dz      (β2, debiased, over all rows of a step)
        every refresh_every calls, for each factor:    A = Q_A diag(d_A) Q_Aᵀ,  G = Q_G diag(d_G) Q_Gᵀ
        m  <- average of ∇  (β1, debiased);  m̃ = β1 m + (1 - β1) ∇             nesterov=True; else m
        U  = Q_G [ (Q_Gᵀ m̃ Q_A) / (d_G d_Aᵀ + λ · mean(d_G) · mean(d_A)) ] Q_Aᵀ
        U  <- U · min(1, norm_clip / √(Σ <U, m̃>))                              the sum is over all layers
        W  <- (1 - lr · weight_decay) W - lr U

    One line replaces AdamW; the training loop stays as it is: `KFAC(model.parameters(), lr=..., module=model)`. A and G
    are taken from the ordinary backward pass (the empirical Fisher); `fisher_backward` takes them from the model's own
    distribution. Linear layers, convolutions, transposed and grouped ones, embeddings, norm layers and
    `nn.MultiheadAttention` have factors; all other parameters go to AdamW in the same optimizer; `coverage()` tells
    which, and why. Factors are refreshed in calls 1, 2, 4, ... of the first period, then spread over the period; in
    between the eigenvalues follow the trace of their average. A change of `damping` acts at once.

    Source: Martens and Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature* (2015,
    arXiv:1503.05671); convolutions: Grosse and Martens (2016, arXiv:1602.01407); weight sharing: Eschenhagen et al.
    (2023, arXiv:2311.00636). Deviations, each with the way back: damping relative to the mean eigenvalue, in the
    eigenbasis (`damping_kind`); momentum on gradients (`momentum="update"`); a clip without the learning rate
    (`norm_clip=None, kl_clip=1e-3`); sides beyond `max_block_size` in blocks (`max_block_size=None`).

    A direction has at most length `norm_clip` in the curvature's own metric, so lr is the length of a step in that
    metric: about 3 times AdamW's learning rate on the recipes; damping 0.1 to 1 where training is noisy.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-2.
        betas: Decay rates (β1, β2) of the momentum and of the factors. Default: (0.9, 0.95).
        damping: λ. Schedules may set it in the groups. Default: 0.1.
        damping_kind: What λ is added to: `"relative"` (as above), `"absolute"` (λ itself), `"pi"` (π√λ and √λ/π to the
            factors, π² the ratio of their mean eigenvalues) or `"factor"` (λ to each). Default: `"relative"`.
        eps: Added to the root of the fallback's second moment. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        refresh_by: `"eigh"` (a full decomposition) or `"qr"` (one power iteration from the last basis).
            Default: `"eigh"`.
        grad_scaler: The `GradScaler` in use, needed only where gradients are unscaled and clipped before the step.
            Default: None.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {
        "damping": Option(0.1, "a number >= 0", lambda v: is_number(v) and v >= 0, "damping."),
        "damping_kind": Option("relative", *one_of(*DAMPING_KINDS), "what damping is added to."),
        "refresh_by": REFRESH_BY._replace(default="eigh"),
    }
    shared_options = LAYERS

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        damping: float = 0.1,
        damping_kind: Literal["relative", "absolute", "pi", "factor"] = "relative",
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        refresh_by: Literal["eigh", "qr"] = "eigh",
        grad_scaler: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(damping=damping, damping_kind=damping_kind, refresh_by=refresh_by)
        super().__init__(params, own, options, grad_scaler=grad_scaler)

    def _method(self, group: dict[str, Any]) -> Method:
        return LayerKronecker(LayerStatistic(), LayerBasis(), DampedSpectrum(), momentum=averaged(group))

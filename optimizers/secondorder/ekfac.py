"""EKFAC: KFAC's eigenbasis with second moments of its own."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._adaptive import AdaptiveLayerOptimizer
from secondorder._options import LAYERS, REFRESH_BY, LayerOptions, Option, is_number, one_of
from secondorder.curvature.layer import LayerStatistic
from secondorder.preconditioner.damped import averaged
from secondorder.preconditioner.layer_basis import LayerBasis
from secondorder.preconditioner.layer_moment import CorrectedLayer, LayerMoment
from secondorder.preconditioner.protocol import Method


class EKFAC(AdaptiveLayerOptimizer):
    """EKFAC: Second moments of examples' gradients in the eigenbasis of KFAC's factors.

    For every layer `z = W a (+ b)` with gradient `∇ = dL/d[W | b]` (bias as last column):

        A <- average of a aᵀ  (inputs),   G <- average of g gᵀ, g = dℓ/dz      (β2, debiased, over all rows of a step)
        v <- average of (Q_Gᵀ g aᵀ Q_A)²  over the examples of a step          (β2, debiased)             moment
        every refresh_every calls, for each factor:    Q_A, Q_G <- eigenvectors;  R = Q_newᵀ Q_old;  v <- (R ∘ R) v
        m  <- average of ∇  (β1, debiased);  m̃ = β1 m + (1 - β1) ∇             nesterov=True; else m
        U  = Q_G [ (Q_Gᵀ m̃ Q_A) / (v + λ · mean(v)) ] Q_Aᵀ
        U  <- U · min(1, norm_clip / √(Σ <U, m̃>))                              the sum is over all layers
        W  <- (1 - lr · weight_decay) W - lr U

    `v` is the diagonal of the layer's true block in that basis: no other diagonal is closer in Frobenius norm, products
    of KFAC's eigenvalues included. Examples are rows (expand) or samples, whose positions are summed first (reduce).
    Everything else is as in `KFAC`.

    Source: George et al., *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis* (2018,
    arXiv:1806.03884). Deviations: moments are averaged, debiased and transported when the basis turns (there:
    re-estimated); damping relative to their mean (`damping_kind="absolute"`); momentum and clip as in `KFAC`; a graded
    diagonal of relative weight 1e-6 settles the basis of a null space.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-2.
        betas: Decay rates (β1, β2) of the momentum, and of factors and moments. Default: (0.9, 0.95).
        damping: λ. Schedules may set it in the groups. Default: 0.1.
        damping_kind: What λ is relative to: `"relative"` (the mean moment) or `"absolute"`. Default: `"relative"`.
        moment: Whose squares are averaged: `"example"`, or `"gradient"` (of the mean gradient, times the loss terms:
            free of charge, EKFAC-ra). Default: `"example"`.
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
        "damping_kind": Option("relative", *one_of("relative", "absolute"), "what damping is added to."),
        "refresh_by": REFRESH_BY._replace(default="eigh"),
        "moment": Option("example", *one_of("example", "gradient"), "whose squares are averaged in the basis."),
    }
    shared_options = LAYERS

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        damping: float = 0.1,
        damping_kind: Literal["relative", "absolute"] = "relative",
        moment: Literal["example", "gradient"] = "example",
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        refresh_by: Literal["eigh", "qr"] = "eigh",
        grad_scaler: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(damping=damping, damping_kind=damping_kind, refresh_by=refresh_by, moment=moment)
        super().__init__(params, own, options, grad_scaler=grad_scaler)

    def _method(self, group: dict[str, Any]) -> Method:
        by_example = group["moment"] == "example"
        row = (LayerStatistic(), LayerBasis(settles_ties=True), LayerMoment())
        return CorrectedLayer(*row, by_example=by_example, momentum=averaged(group))

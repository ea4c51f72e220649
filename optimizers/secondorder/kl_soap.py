"""KLSOAP: Adam in the eigenbasis of KL-Shampoo's factors."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._optimizer import PreconditionedOptimizer
from secondorder._options import KL, KRONECKER, KroneckerOptions
from secondorder.curvature.whitened import WhitenedGradient
from secondorder.preconditioner.adam import AdamInBasis
from secondorder.preconditioner.kl_basis import KLBasis, KLKronecker
from secondorder.preconditioner.protocol import Method


class KLSOAP(PreconditionedOptimizer):
    """KLSOAP: SOAP in the eigenbasis of the factors that are nearest to the gradient's covariance, in KL divergence.

    For every block `G (d_0, d_1)` of a gradient, with a basis `Q_i` and a covariance `S_i = Q_i B_i Q_i^T` per mode,
    eigenvalues `λ_i = diag(B_i)`, at least `floor · max λ_i`:

        Y  = Q_0^T G Q_1                              project
        m <- average of Y   (β1, debiased)            exp_avg
        v <- average of Y²  (β2, debiased)            exp_avg_sq
        m̃  = β1 m + (1 - β1) Y                        nesterov=True; else m
        U  = Q_0 (m̃ / (√v + eps)) Q_1^T               6 products a step in all, as SOAP
        W <- (1 - lr · weight_decay) W - lr U
        r  = RMS(Λ_0^(-1/2) Y Λ_1^(-1/2)),   Y <- Y · clip / r  if r > clip
        B_0 <- average of Y Λ_1^-1 Y^T / d_1,   B_1 <- average of Y^T Λ_0^-1 Y / d_0      (factor_beta, debiased)
        B_0, B_1 scaled to one mean eigenvalue
        every refresh_every calls, for each mode:     Q_i <- qr(Q_i B_i[:, π]).Q,  π sorts diag(B_i)
                                                      R = Q_new^T Q_old;  B_i <- R B_i R^T;  m <- R m;  v <- (R ∘ R) v

    Averages of covariances begin with an isotropic gradient as large as the first one, which counts as one. The first
    step is Adam's (`Q_i = I`). Refreshes are spread over the period; in the first two they are eigendecompositions.
    Parameters that are no matrices, and large vocabularies, go to AdamW in the same optimizer; `coverage()` tells
    which, and why.

    Source: Lin et al., *Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization* (2025,
    arXiv:2509.03378). Deviations: the covariances are kept in the basis, so that the eigenvalues are their diagonals
    and turn with them (there they are averages of their own, which a refresh leaves behind); `v` follows the basis;
    all averages are debiased, and those of the covariances start from the gradient's own scale; no first step is lost;
    a floor relative to the largest eigenvalue instead of an absolute one; the clip (`clip=None`); Nesterov momentum
    (`nesterov=False`); state in float32; blocks of at most 512 and one-sided factors for matrices of aspect 4 or more
    (`max_block_size=None, one_sided_aspect=None`).

    Learning rates are SOAP's: the best is 3 to 10 times AdamW's on small models; AdamW's own is a safe start.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 3e-3.
        betas: Decay rates (β1, β2) of the moments in the basis. Default: (0.9, 0.95).
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        factor_beta: Decay rate of the covariances; None: β2. Default: None.
        floor: Smallest eigenvalue of a factor, relative to its largest, in whitening. Default: 1e-6.
        clip: Largest RMS of a whitened gradient in the statistics; None: no limit. Default: 3.
        refresh_by: `"qr"` (one power iteration) or `"eigh"` (a full decomposition). Default: `"qr"`.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = KL
    shared_options = KRONECKER

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        factor_beta: float | None = None,
        floor: float = 1e-6,
        clip: float | None = 3.0,
        refresh_by: Literal["qr", "eigh"] = "qr",
        **options: Unpack[KroneckerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(factor_beta=factor_beta, floor=floor, clip=clip, refresh_by=refresh_by)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        factor = KLBasis()
        return KLKronecker(WhitenedGradient(factor), factor, AdamInBasis())

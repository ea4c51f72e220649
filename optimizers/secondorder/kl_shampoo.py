"""KLShampoo: whitening by Kronecker factors that minimise a Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._optimizer import PreconditionedOptimizer
from secondorder._options import KL, KRONECKER, KroneckerOptions
from secondorder.curvature.whitened import WhitenedGradient
from secondorder.preconditioner.kl_basis import Eigenvalues, KLBasis, WhiteningKronecker
from secondorder.preconditioner.protocol import Method


class KLShampoo(PreconditionedOptimizer):
    """KLShampoo: The gradient whitened by the Kronecker factors that are nearest to its covariance, in KL divergence.

    For every block `G (d_0, d_1)` of a gradient, with a basis `Q_i` and a covariance `S_i = Q_i B_i Q_i^T` per mode,
    eigenvalues `λ_i = diag(B_i)`, at least `floor · max λ_i`:

        Y  = Q_0^T G Q_1                              project
        r  = RMS(Λ_0^(-1/2) Y Λ_1^(-1/2)),   Y <- Y · clip / r  if r > clip
        B_0 <- average of Y Λ_1^-1 Y^T / d_1,   B_1 <- average of Y^T Λ_0^-1 Y / d_0      (factor_beta, debiased)
        B_0, B_1 scaled to one mean eigenvalue        which changes no update
        m <- average of Y   (β1, debiased)            exp_avg
        m̃  = β1 m + (1 - β1) Y                        nesterov=True; else m
        U  = Q_0 Λ_0^(-1/2) m̃ Λ_1^(-1/2) Q_1^T        6 products a step in all
        W <- (1 - lr · weight_decay) W - lr U
        every refresh_every calls, for each mode:     Q_i <- qr(Q_i B_i[:, π]).Q,  π sorts diag(B_i)
                                                      R = Q_new^T Q_old;  B_i <- R B_i R^T;  m <- R m

    Averages begin with an isotropic gradient as large as the first one, which counts as one. The eigenvalues have seen
    the gradient that they scale, the bases have not: no update is a spike, and the first step takes place. Refreshes
    are spread over the period; in the first two they are eigendecompositions. Parameters that are no matrices, and
    large vocabularies, go to AdamW in the same optimizer; `coverage()` tells which, and why.

    Source: Lin et al., *Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization* (2025,
    arXiv:2509.03378). Deviations: the covariances are kept in the basis, so that the eigenvalues are their diagonals
    and turn with them (there they are averages of their own, which a refresh leaves behind); averages are debiased and
    start from the gradient's own scale; no first step is lost; a floor relative to the largest eigenvalue instead of an
    absolute one; the clip (`clip=None`); Nesterov momentum (`nesterov=False`); state in float32; blocks of at most 512
    and one-sided factors for matrices of aspect 4 or more (`max_block_size=None, one_sided_aspect=None`).

    The best learning rate is 1 to 3 times AdamW's on small models.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-2.
        betas: Decay rate β1 of the momentum, and β2 of the covariances (and the AdamW fallback). Default: (0.9, 0.95).
        eps: Of the AdamW fallback. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        factor_beta: Decay rate of the covariances; None: β2. Default: None.
        floor: Smallest eigenvalue of a factor, relative to its largest. Default: 1e-6.
        clip: Largest RMS of a whitened gradient; None: no limit. Default: 3.
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
        lr: Any = 1e-2,
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
        return WhiteningKronecker(WhitenedGradient(factor, clips=False), factor, Eigenvalues(factor))

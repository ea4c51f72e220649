"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._optimizer import PreconditionedOptimizer
from secondorder._options import FACTOR_BETA, KRONECKER, REFRESH_BY, KroneckerOptions, Option, one_of
from secondorder.curvature.gradient import GradientStatistic
from secondorder.preconditioner.adam import AdamInBasis, AdamKronecker
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.protocol import Method


class SOAP(PreconditionedOptimizer):
    """SOAP: Adam in the slowly turning eigenbasis of Shampoo's Kronecker factors.

    For every block `G (d_0, d_1)` of a gradient, with one covariance `C_i` and basis `Q_i` per mode:

        X  = Q_0^T G Q_1                              project
        m <- average of X   (β1, debiased)            exp_avg
        v <- average of X²  (β2, debiased)            exp_avg_sq
        m̃  = β1 m + (1 - β1) X                        nesterov=True; else m
        U  = Q_0 (m̃ / (√v + eps)) Q_1^T               6 products a step in all
        W <- (1 - lr · weight_decay) W - lr U
        C_0 <- average of G G^T,  C_1 <- average of G^T G      (factor_beta, debiased)
        every refresh_every calls, for each mode:     Q_i <- qr(C'_i Q_i[:, π]).Q,  π sorts by q^T C'_i q
                                                      R = Q_new^T Q_old;  m <- R m;  v <- (R ∘ R) v

    The gradient never chooses the basis on which it is projected: the first step is Adam's (`Q_i = I`). Refreshes are
    spread over the period, so that each mode has its first basis within `refresh_every` calls; in the first two periods
    it is an eigendecomposition. `C'_i` is `C_i` with a graded diagonal of relative weight 1e-6, which settles what a
    rank-deficient factor leaves open. Parameters that are no matrices, and large vocabularies, go to AdamW in the same
    optimizer; `coverage()` tells which, and why.

    Source: Vyas et al., *SOAP: Improving and Stabilizing Shampoo using Adam* (2024, arXiv:2409.11321), algorithm 3.
    Deviations, all for speed or quality, each with the way back: Nesterov momentum and β1 = 0.9 (paper's code:
    `betas=(0.95, 0.95), nesterov=False`); blocks of at most 512 and one-sided factors for matrices of aspect 4 or more
    (`max_block_size=None, one_sided_aspect=None`); refreshes spread over the period (`refresh="together"`); `v`
    transported instead of permuted; no first step lost to the first decomposition (`first="skip"`); decay before the
    step, as in AdamW; eps acts on the bias-corrected `v`.

    The best learning rate is 3 to 10 times AdamW's on small models; AdamW's own is a safe start.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 3e-3.
        betas: Decay rates (β1, β2) of the moments in the basis. Default: (0.9, 0.95).
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        factor_beta: Decay rate of the covariances; None: β2. Default: None.
        first: What a parameter's first gradient does besides choosing the first basis: `"apply"` (a step of Adam) or
            `"skip"` (no step). Default: `"apply"`.
        refresh_by: `"qr"` (one power iteration) or `"eigh"` (a full decomposition). Default: `"qr"`.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {
        "factor_beta": FACTOR_BETA,
        "first": Option("apply", *one_of("apply", "skip"), "what a first gradient does."),
        "refresh_by": REFRESH_BY,
    }
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
        first: Literal["apply", "skip"] = "apply",
        refresh_by: Literal["qr", "eigh"] = "qr",
        **options: Unpack[KroneckerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(factor_beta=factor_beta, first=first, refresh_by=refresh_by)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        return AdamKronecker(GradientStatistic(), EigenBasis(), AdamInBasis(), lagged=True, first=group["first"])

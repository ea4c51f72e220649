"""Eigenvalue-corrected Shampoo: the second moment in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._optimizer import PreconditionedOptimizer
from secondorder._options import FACTOR_BETA, KRONECKER, REFRESH_BY, KroneckerOptions, Option, is_number
from secondorder.curvature.gradient import GradientStatistic
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.protocol import Method
from secondorder.preconditioner.second_moment import CorrectedKronecker, SecondMoment


class EigenvalueCorrectedShampoo(PreconditionedOptimizer):
    """EigenvalueCorrectedShampoo: Momentum outside, the second moment in the eigenbasis of Shampoo's factors.

    For every block `G (d_0, d_1)` of a gradient, with one covariance `C_i` and basis `Q_i` per mode:

        m <- average of G   (β1, debiased)            momentum, in the parameter's own coordinates
        m̃  = β1 m + (1 - β1) G                        nesterov=True; else m
        Y  = Q_0^T G Q_1,  v <- average of Y²  (β2, debiased)            exp_avg_sq
        U  = Q_0 (Q_0^T m̃ Q_1 / (v^exponent + eps)) Q_1^T
        W <- (1 - lr · weight_decay) W - lr U
        C_0 <- average of G G^T,  C_1 <- average of G^T G      (factor_beta, debiased)
        every refresh_every calls, for each mode:     Q_i <- eigenvectors of C_i, or one power iteration towards them
                                                      R = Q_new^T Q_old;  v <- (R ∘ R) v

    With exponent 1/2 this is SOAP at the price of two products more per step; what one gains is a momentum that no
    refresh touches, and exponents other than 1/2. The gradient never chooses the basis on which it is projected; the
    first step is Adam's (`Q_i = I`). Parameters that are no matrices, and large vocabularies, go to AdamW in the same
    optimizer; `coverage()` tells which, and why.

    Source: `EigenvalueCorrectedShampoo` of Meta's Distributed Shampoo, described by Eschenhagen et al., *Purifying
    Shampoo* (2025, arXiv:2506.03595), after George et al. (2018, arXiv:1806.03884). Deviations: a basis is refreshed
    after its use and `v` is transported with it (there it is refreshed before and `v` stays, which makes single updates
    of 50 times the learning rate); refreshes are spread over the period (`refresh="together"`) and by QR
    (`refresh_by="eigh"`); Nesterov momentum (`nesterov=False`); blocks of at most 512 and one-sided factors for
    matrices of aspect 4 or more (`max_block_size=None, one_sided_aspect=None`).

    Its updates have the size of Adam's: the best learning rate is 3 to 10 times AdamW's on small models; AdamW's own is
    a safe start.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 3e-3.
        betas: Decay rates (β1, β2) of momentum and second moment. Default: (0.9, 0.95).
        eps: Added to `v^exponent`. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        factor_beta: Decay rate of the covariances; None: β2. Default: None.
        exponent: Power of the second moment, in (0, 1]; other values than 1/2 call for another learning rate.
            Default: 0.5.
        refresh_by: `"qr"` (one power iteration) or `"eigh"` (a full decomposition). Default: `"qr"`.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {
        "factor_beta": FACTOR_BETA,
        "exponent": Option(0.5, "a number in (0, 1]", lambda v: is_number(v) and 0 < v <= 1, "of the second moment."),
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
        exponent: float = 0.5,
        refresh_by: Literal["qr", "eigh"] = "qr",
        **options: Unpack[KroneckerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(factor_beta=factor_beta, exponent=exponent, refresh_by=refresh_by)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        return CorrectedKronecker(GradientStatistic(), EigenBasis(), SecondMoment(), lagged=True, first="apply")

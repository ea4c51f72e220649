"""SpectralFactorized: Kronecker-factored curvature kept as eigenvectors and eigenvalues, and moved by products."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from secondorder._batch import BatchCounting
from secondorder._options import BATCH_SIZE, FACTOR_BETA, KRONECKER, KroneckerOptions, Option, is_number
from secondorder.preconditioner.protocol import Method
from secondorder.preconditioner.spectral import SpectralFactors


class SpectralFactorized(BatchCounting):
    """SpectralFactorized: any root of a Kronecker-factored curvature, from eigen-factors that products alone move.

    For every block `G (d_0, d_1)` of a gradient, with `S = α S_0 ⊗ S_1`, `S_i = B_i diag(d_i) B_i^T`, `det S_i = 1`:

        V  = batch_size^(1/2) · (B_0^T G B_1) / √(α d_0 d_1^T)           whiten
        H_0 = V V^T / d_1#,  H_1 = V^T V / d_0#                          d_i#: number of entries of d_i
        α  <- α (1 + r (avg(V²) - 1))                                    r: max(1 - β2, fast_start / (t + 1))
        d_i <- d_i (1 + r (diag H_i - avg(V²)))                          det S_i goes to α
        B_i <- B_i R_i,  R_i orthogonal, turns B_i by r √(d_j d_l) (H_i)_jl / (d_l - d_j) in the plane (j, l)
        m  <- average of G   (β1, debiased)                              momentum
        m̃  = β1 m + (1 - β1) G                                           nesterov=True; else m
        U  = B_0 ((B_0^T m̃ B_1) / (α d_0 d_1^T)^exponent) B_1^T          S^(-exponent) m̃
        W  <- (1 - lr · weight_decay) W - lr U

    So S follows the average of `batch_size · vec(G) vec(G)^T`, as far as its form allows, without a covariance, an
    eigendecomposition, a QR or an inverse: 12 products of a square block's size for two factors, and 6 that apply and
    whiten. Guards: the gap `d_l - d_j` has a floor, so that no plane turns by more than 45°; R_i turns all of them by a
    limited angle; `eps` bounds S from below; one Newton-Schulz step every `refresh_every` calls keeps B_i orthogonal
    (`preconditioner/spectral.py`). Parameters that are no matrices, and large vocabularies, go to AdamW in the same
    optimizer; `coverage()` tells which, and why.

    Source: Lin et al., *Spectral-factorized Positive-definite Curvature Learning for NN Training* (2025,
    arXiv:2502.06268). Theirs, by the abstract, which is all that was read: spectral factors that are moved on their
    manifold, and with them any root for free. Derived for this library, checked by its order of accuracy, but compared
    neither with the paper's text nor with any code: the steps of α, `d_i` and `B_i`, as the projection of `r (H - S)`
    onto the tangent space of this form; the unit determinants; all guards, the damping, the fast start. Where the
    derivation has `exp(x)`, `1 + x` stands: equal to second order, exact with one factor, and no spike overflows it.

    With `exponent=0.5` updates have the size of Adam's: AdamW's best learning rate is a good start. With `exponent=1`
    (root-free) they have the parameter's units, and `batch_size` counts.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-2.
        betas: Decay rates (β1, β2) of the momentum and of the factors. Default: (0.9, 0.95).
        eps: Damping, relative to the mean eigenvalue of S; in the fallback as in AdamW. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        factor_beta: Decay rate of the factors; None: β2. Default: None.
        fast_start: The rate of gradient `t` is at least `min(1/2, fast_start / (t + 1))`. Default: 10.
        exponent: Power of the curvature that is applied, in (0, 1]; other values than 1/2 call for another learning
            rate. Default: 0.5.
        batch_size: B, samples whose mean the loss is; None: 1; `"count"`: counted from the forward passes of
            `module`. May change at any time in the group. Default: None.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {
        "factor_beta": FACTOR_BETA,
        "fast_start": Option(10.0, "a number >= 0", lambda v: is_number(v) and v >= 0, "numerator of the first rates."),
        "exponent": Option(0.5, "a number in (0, 1]", lambda v: is_number(v) and 0 < v <= 1, "of the curvature."),
        "batch_size": BATCH_SIZE,
    }
    shared_options = {**KRONECKER, "refresh_every": KRONECKER["refresh_every"]._replace(default=1)}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        factor_beta: float | None = None,
        fast_start: float = 10.0,
        exponent: float = 0.5,
        batch_size: float | Tensor | Literal["count"] | None = None,
        **options: Unpack[KroneckerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own.update(factor_beta=factor_beta, fast_start=fast_start, exponent=exponent, batch_size=batch_size)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        return SpectralFactors()

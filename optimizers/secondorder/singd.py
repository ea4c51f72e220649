"""SINGD: structured inverse-free natural gradient descent; dense, it is INGD."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import Unpack

from secondorder._layers import LayerOptimizer
from secondorder._options import FACTOR_DTYPE, LAYERS, LayerOptions, Option, is_beta, is_number, one_of
from secondorder.layout.blocks import Treatment
from secondorder.preconditioner.inverse_free import InverseFree
from secondorder.preconditioner.protocol import Method
from secondorder.preconditioner.structures import is_structure, structure

# Nothing is refreshed, and no model of the loss chooses damping or rates.
_WITHOUT = ("refresh_every", "refresh", "adapt_damping", "adapt_every", "quadratic_model", "loss")
OPTIONS = {
    **{name: option for name, option in LAYERS.items() if name not in _WITHOUT},
    "statistics_every": LAYERS["statistics_every"]._replace(default=2),
}


def _are_structures(v: Any) -> bool:
    return isinstance(v, (tuple, list)) and len(v) == 2 and all(map(is_structure, v))


class SINGD(LayerOptimizer):
    """SINGD: natural gradient descent whose factors are learned by matrix products: no inverse, no decomposition.

    For every layer's gradient `G (d_out, d_in)` of `[W | b]`, with factors `C` and `K` of chosen structures, so that
    `C C^T` and `K K^T` are their side's inverse curvature; in every `statistics_every`-th call:

        A = mean of a a^T,  S = Σ g g^T           inputs and output gradients, normalised as KFAC's
        H_K = Π(K^T A K),  M_K = Π(K^T K)         Π: projection onto the structure; avgtr: mean of the diagonal
        H_C = Π(C^T S C),  M_C = Π(C^T C)
        N_K = avgtr(H_C) H_K + ρ avgtr(M_C) M_K - I
        N_C = avgtr(H_K) H_C + ρ avgtr(M_K) M_C - I
        K <- K (I - β N_K / 2),  C <- C (I - β N_C / 2)        β: factor_rate, at first 1/t, at most 1/2
    and always:
        m <- average of G   (β1, debiased)        with look-ahead if nesterov=True
        U <- C C^T m̃ K K^T,  clipped by norm_clip
        W <- (1 - lr · weight_decay) W - lr U

    ρ is `damping`, times avgtr(A) avgtr(S) where it is relative. With dense structures, the default, this is INGD; only
    the product of both factors matters, and it does not change with A, S -> c A, S / c. Structures are named as in
    `secondorder.preconditioner.structures`: `"dense"`, `"diagonal"`, `"block(32)"`, `"hierarchical(16,16)"`,
    `"tril_toeplitz"`, `"triu_toeplitz"`, and corners. A side that is `"diagonal"` neither stores nor computes anything
    d x d; for the others statistics are dense matrices. All layers that KFAC knows are trained (`coverage()`), and all
    else by AdamW in the same optimizer.

    `factor_dtype="bfloat16"` halves the memory of factors: products are in float32, and what is stored is rounded
    stochastically, by a hash of each block's own counters (a resumed run has the same bits). Rounded to nearest,
    factors would stand still.

    Source: Lin et al., *Simplifying momentum-based positive-definite submanifold optimization with applications to deep
    learning* (2023, arXiv:2302.09738: INGD); *Structured inverse-free natural gradient descent* (2024,
    arXiv:2312.05705: SINGD). Deviations, for scale, stability and speed: the first statistic sets the scale of the
    factors, which start as multiples of the identity (theirs: as identities); a step of the factors is exact in their
    scale, and otherwise bounded in spectral norm, so that no statistic makes a factor singular; damping is relative
    (`damping_kind="absolute"`); β is 1/t at first; `factor_rate` (their lr_cov) and T are those that train; no momentum
    of factors (theirs: `factor_momentum=0.5`; worse here); momentum before the factors (`momentum="update"`) and weight
    decay decoupled (`weight_decay_kind="coupled"`: inside of it); groups of a convolution have factors of their own;
    sides beyond `max_block_size` are cut.

    A step's length in the curvature's metric is at most `lr · norm_clip`, as with KFAC: 0.01 to 0.05 suits dense
    factors, 0.01 diagonal ones. Statistics in every 10th call (the papers' T) are too few for runs of a few hundred
    steps.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 0.03.
        betas: Decay rate β1 of the momentum, and β2 of the AdamW fallback. Default: (0.9, 0.999).
        factor_rate: Rate β at which the factors move. Default: 0.1.
        factor_momentum: Decay rate of the average of the factors' steps; 0: none is stored. Default: 0.
        structures: Of K, the input side, and of C, the output side. Default: ("dense", "dense").
        damping: Strength of damping; it is learned with the factors. Default: 1e-2.
        damping_kind: `"relative"` to the curvature's mean trace, or `"absolute"`. Default: "relative".
        factor_dtype: In what factors are stored: `"float32"` (float64 for float64 parameters) or `"bfloat16"`. Default:
            "float32".
        eps: Added to the root of the second moment in the fallback. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        grad_scaler: The `GradScaler` in use, where gradients are unscaled and clipped before the step.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    coupled: ClassVar[bool] = True
    shared_options = OPTIONS
    own_options = {
        "factor_rate": Option(0.1, "a number in (0, 1/2]", lambda v: is_number(v) and 0 < v <= 0.5, ""),
        "factor_momentum": Option(0.0, "a number in [0, 1)", is_beta, ""),
        "structures": Option(("dense", "dense"), "two names of structures", _are_structures, ""),
        "damping": Option(1e-2, "a number >= 0", lambda v: is_number(v) and v >= 0, ""),
        "damping_kind": Option("relative", *one_of("relative", "absolute"), ""),
        "factor_dtype": FACTOR_DTYPE,
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        factor_rate: float = 0.1,
        factor_momentum: float = 0.0,
        structures: tuple[str, str] = ("dense", "dense"),
        damping: float = 1e-2,
        damping_kind: Literal["relative", "absolute"] = "relative",
        factor_dtype: Literal["float32", "bfloat16"] = "float32",
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        grad_scaler: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, factor_rate=factor_rate, factor_momentum=factor_momentum, structures=structures)
        own.update(damping=damping, damping_kind=damping_kind, factor_dtype=factor_dtype)
        own.update(eps=eps, weight_decay=weight_decay)
        super().__init__(params, own, options, grad_scaler=grad_scaler)

    def _method(self, group: dict[str, Any]) -> Method:
        inputs, outputs = (structure(name) for name in group["structures"])
        return InverseFree((outputs, inputs), self.coupled, group["momentum"])

    def _diagonal(self, group: dict[str, Any]) -> tuple[bool, bool]:
        inputs, outputs = (name == "diagonal" for name in group["structures"])
        return inputs, outputs

    def _treat(self, p: Tensor, group: dict[str, Any], group_index: int, index: int) -> tuple[Method, Treatment]:
        method, treatment = super()._treat(p, group, group_index, index)
        uses = self._capture.leads.get(id(p)) if self._capture is not None else None
        if isinstance(method, InverseFree) and uses and uses[0].rule.tokens:
            # An embedding's weight is (tokens, d_out): mode 1 is its output side.
            method = replace(method, structures=method.structures[::-1])
        return method, treatment

    def factors(self) -> dict[str, dict[str, Any]]:
        """Copies of the factors, in the form of `KFAC.factors`, but damped: `(K K^T)^-1` and `(C C^T)^-1`.

        They are what structures and damping leave of the curvature, and of coupled ones only the product matters: which
        of the two carries a scale is open. Multiples of the identity where there were no observations.
        """
        return super().factors()


class IKFAC(SINGD):
    """IKFAC: KFAC whose damped factors' inverses are learned by matrix products; structures as SINGD's.

    SINGD without the traces that couple the two factors of a layer:

        K <- K (I - β/2 (Π(K^T A K) + λ_K Π(K^T K) - I))          λ_K = damping · avgtr(A); absolute: damping
        C <- C (I - β/2 (Π(C^T S C) + λ_C Π(C^T C) - I))          λ_C = damping · avgtr(S)

    so that, dense, `(K K^T)^-1` is up to O(β²) a step the average of `A + λ_K I` at rate β. All else is SINGD's,
    deviations included. Source: Lin et al. (2024, arXiv:2312.05705), section 3.
    """

    coupled = False


IKFAC.__doc__ = f"{IKFAC.__doc__}\n    Args:{(SINGD.__doc__ or '').partition('    Args:')[2]}"

"""SIRFShampoo: Shampoo without inverse and root, its factors structured, one per axis of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import Unpack

from secondorder._batch import BatchCounting
from secondorder._options import (
    BATCH_SIZE,
    BLOCKS,
    FACTOR_DTYPE,
    LAYERS,
    BlockOptions,
    Option,
    is_beta,
    is_bool,
    is_number,
)
from secondorder.layout.blocks import Treatment, tensor_blocks
from secondorder.preconditioner.lie_factor import LieFactor
from secondorder.preconditioner.protocol import Method
from secondorder.preconditioner.structures import is_structure


def _are_structures(v: Any) -> bool:
    return is_structure(v) or (isinstance(v, (tuple, list)) and len(v) > 0 and all(map(is_structure, v)))


class SIRFShampoo(BatchCounting):
    """SIRFShampoo: Shampoo without inverse and root, its factors structured, one per axis of a tensor.

    For every block `G (d_1, ..., d_k)` of a gradient, N entries, with one factor `K_i` per axis, so that `K_i K_i^T` is
    the inverse of that axis' curvature; avgtr: mean of the diagonal, `Π`: projection onto the structure:

        m <- average of G   (β1, debiased)            momentum="gradient"
        m̃  = β1 m + (1 - β1) G                        nesterov=True; else m
        T  = √B G ×_1 K_1^T ... ×_k K_k^T             whitened with the factors as they are
        λ  = damping · average of mean(B G²)
        N_i = Π(T_(i) T_(i)^T) d_i / N + λ (Π_{j≠i} avgtr(K_j^T K_j)) Π(K_i^T K_i) - I
        n_i <- average of N_i / 2   (factor_momentum, debiased)
        K_i <- K_i (I - ρ n_i),  ρ = factor_rate, at first 1/t, and at most 1 / (2 ‖n_i‖_2)
        U  = m̃ ×_1 K_1 K_1^T ... ×_k K_k K_k^T        two products per axis
        U  = B · RMS(G) · U, scaled to RMS(U) <= max_update_rms
        W <- (1 - lr · weight_decay) W - lr U

    So `S_i = (K_i K_i^T)^-1` follows the average of what the other factors leave of `B G G^T`, as in KL-Shampoo, but
    what is applied is its inverse, not the inverse root. Tensors keep their axes: a convolution has four factors. A
    step is made of matrix products: no inverse, decomposition or root. Structures are named as in
    `secondorder.preconditioner.structures`: `"dense"`, `"diagonal"`, `"block(32)"`, `"hierarchical(16,16)"`,
    `"tril_toeplitz"`, `"triu_toeplitz"`, and corners. Sides with a dense factor are cut to `max_block_size`, others
    stay whole; a vocabulary side (embeddings, heads, sides beyond `max_precond_dim`) has a diagonal factor. Vectors go
    to AdamW in the same optimizer; `coverage()` tells.

    `factor_dtype="bfloat16"` halves the memory of factors: products are in float32, and what is stored is rounded
    stochastically, by a hash of each block's own counters (a resumed run has the same bits). Rounded to nearest,
    factors would stand still.

    Source: Lin et al., *Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective* (2024,
    arXiv:2402.03496), and its library of structures (2312.05705). Deviations, for scale and stability: the first
    gradient sets the scale of the factors (theirs start as identities, and move by at most factor_rate · √d in
    Frobenius norm); ρ is 1/t at first, and bounded by the spectral norm instead of the Frobenius norm; damping is
    relative to the gradient; `factor_rate` (their beta2 = 0.01) and `damping` are those that train; the update is in
    units of the gradient (`normalize=False, max_update_rms=None`: theirs, in which `batch_size` counts); momentum
    before the factors (`momentum="update"`); decoupled weight decay (`weight_decay_kind="coupled"`); vectors are left
    to AdamW (`vectors="dense"`).

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
        structures: Structure of the factors: a name for all axes, or one for each, of which the last is that of all
            further axes. Default: "dense".
        vectors: Structure of the factor of a parameter with one axis, or `"fallback"`. Default: "fallback".
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
        **{name: option for name, option in BLOCKS.items() if name != "one_sided_aspect"},
        "max_update_rms": BLOCKS["max_update_rms"]._replace(default=1.0),
    }
    own_options: ClassVar[dict[str, Option]] = {
        "damping": Option(1e-2, "a number >= 0", lambda v: is_number(v) and v >= 0, ""),
        "factor_rate": Option(0.2, "a number in (0, 1)", lambda v: is_number(v) and 0 < v < 1, ""),
        "factor_momentum": Option(0.5, "a number in [0, 1)", is_beta, ""),
        "momentum": LAYERS["momentum"],
        "normalize": Option(True, "True or False", is_bool, ""),
        "structures": Option("dense", "the name of a structure, or one for each axis", _are_structures, ""),
        "vectors": Option(
            "fallback",
            "'fallback' or the name of a structure",
            lambda v: isinstance(v, str) and (v == "fallback" or is_structure(v)),
            "",
        ),
        "batch_size": BATCH_SIZE,
        "factor_dtype": FACTOR_DTYPE,
    }

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
        structures: str | Sequence[str] = "dense",
        vectors: str = "fallback",
        batch_size: float | Tensor | Literal["count"] | None = None,
        factor_dtype: Literal["float32", "bfloat16"] = "float32",
        **options: Unpack[BlockOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, damping=damping, factor_rate=factor_rate)
        own.update(factor_momentum=factor_momentum, momentum=momentum, normalize=normalize, structures=structures)
        own.update(vectors=vectors, batch_size=batch_size, factor_dtype=factor_dtype)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        return LieFactor(momentum=group["momentum"])

    def _blocks(self, shape: tuple[int, ...], group: dict[str, Any], role: str | None) -> Treatment:
        return tensor_blocks(shape, group, role)

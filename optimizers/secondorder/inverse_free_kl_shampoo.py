"""InverseFreeKLShampoo: Shampoo's whitening under the KL criterion, learned by matrix products alone."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from secondorder._optimizer import PreconditionedOptimizer
from secondorder._options import BLOCKS, BlockOptions, Option, is_number, is_positive, optional
from secondorder.layout.blocks import Treatment, two_sided_blocks
from secondorder.preconditioner.protocol import Method
from secondorder.preconditioner.symmetric_root import SymmetricRoot


class InverseFreeKLShampoo(PreconditionedOptimizer):
    """InverseFreeKLShampoo: Shampoo's whitening, learned by matrix products: no root, eigenbasis, QR or inverse.

    For every block `G (d_0, d_1)` of a gradient, with near-symmetric factors `K_i`, `K_i K_i^T ≈ S_i^-1`:

        W  = K_0^T G K_1,   r = RMS(W)                whiten with the factors as they are
        G, W <- clip/r · (G, W)  if r > clip             a spike enters momentum and statistics bounded
        m <- average of G  (β1, debiased)             momentum
        m̃  = β1 m + (1 - β1) G                        nesterov=True; else m
        U  = K_0^T m̃ K_1,   scaled to RMS(U) <= max_update_rms
        W <- (1 - lr · weight_decay) W - lr U
        K_i moved towards the stationary point avg(W W^T) = I of the KL criterion: `preconditioner/symmetric_root.py`

    The first gradient only measures its scale. A step costs 4 products where the factors rest and about 14 where they
    move; `statistics_every=5` lets them rest four steps of five after `dense_steps`. State is half of SOAP's. A
    vocabulary side (embeddings, heads, sides beyond `max_precond_dim`) has a diagonal factor; a hidden layer is dense
    on both sides however wide it is.

    Source: this library; the criterion is that of Lin et al., *Understanding and Improving Shampoo and SOAP via
    Kullback-Leibler Minimization* (2025, arXiv:2509.03378). What it is worth: in steps ahead of SOAP (refreshed every
    10) on a deep autoencoder, a small language model and a small vision transformer (README, "Measured"), in seconds
    level or behind; all at the size of a minute on a CPU, nothing larger was measured. Refreshed in every step, SOAP
    was level with it on language and ahead on vision in earlier runs. With β1 = 0.95 and Nesterov it was unstable.
    RMS(U) is near 0.2, like AdamW's: start at 1 to 3 times AdamW's learning rate.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 1e-2.
        betas: Decay rate β1 of the momentum, and β2 of the AdamW fallback. Default: (0.9, 0.99).
        eps: Damping, relative to the average squared entry of the gradient. Default: 1e-7.
        weight_decay: Strength of weight decay. Default: 0.
        factor_rate: Rate at which the factors forget. Default: 0.1.
        fast_start: The rate of gradient `t` is at least `min(1/2, fast_start / (t + 1))`. Default: 10.
        clip: Largest RMS of a whitened gradient; None: no limit. Default: 3.
        dense_steps: Calls at first in which every gradient moves the factors. Default: 50.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    shared_options = {
        **{name: option for name, option in BLOCKS.items() if name != "one_sided_aspect"},
        "max_update_rms": BLOCKS["max_update_rms"]._replace(default=1.0),
    }
    own_options = {
        "factor_rate": Option(0.1, "a number in (0, 1/2]", lambda v: is_positive(v) and v <= 0.5, ""),
        "fast_start": Option(10.0, "a number >= 0", lambda v: is_number(v) and v >= 0, ""),
        "clip": Option(3.0, "None or a number > 0", optional(is_positive), ""),
        "dense_steps": Option(50, "an int >= 0", lambda v: is_number(v) and v == int(v) >= 0, ""),
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        factor_rate: float = 0.1,
        fast_start: float = 10.0,
        clip: float | None = 3.0,
        dense_steps: int = 50,
        **options: Unpack[BlockOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, factor_rate=factor_rate)
        own.update(fast_start=fast_start, clip=clip, dense_steps=dense_steps)
        super().__init__(params, own, options)

    def _method(self, group: dict[str, Any]) -> Method:
        return SymmetricRoot()

    def _blocks(self, shape: tuple[int, ...], group: dict[str, Any], role: str | None) -> Treatment:
        return two_sided_blocks(shape, group, role)

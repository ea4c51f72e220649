"""kfac-jax (google-deepmind/kfac-jax), with its quirks, as a row built from our vocabulary.

What differs from `secondorder.KFAC`, and why nobody should train so:

- the preconditioner's damping is λ + η with η the L2 regularization, whatever the scheme of damping;
- all factors are inverted in one call, the first and every `inverse_update_period`-th after it;
- damping is absolute: it must follow the scale of the loss, which is why it is adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import secondorder
from secondorder.curvature.layer import LayerStatistic
from secondorder.layout.faces import Layout
from secondorder.preconditioner.damped import DampedSpectrum, LayerKronecker
from secondorder.preconditioner.layer_basis import LayerBasis
from secondorder.preconditioner.protocol import Context, Method, State


@dataclass(frozen=True)
class PeerSpectrum(DampedSpectrum):
    """L2 regularization is part of the damping."""

    def denominator(self, s: State, shape: tuple[int, ...], c: Context) -> Tensor:
        hp = {**c.hp, "damping": c.hp["damping"] + c.hp["weight_decay"]}
        return super().denominator(s, shape, replace(c, hp=hp))


class PeerKFAC(secondorder.KFAC):
    """Constructed with the peer's argument names; what it takes in its step, `fixed`, is given here too."""

    def __init__(
        self,
        module: Any,
        *,
        l2_reg: float,
        ema: float,
        loss: str,
        options: Mapping[str, Any],
        fixed: Mapping[str, Any],
        **more: Any,
    ) -> None:
        adaptive = {key: options.get(f"use_adaptive_{key}", False) for key in ("learning_rate", "momentum", "damping")}
        assert adaptive["learning_rate"] or not adaptive["momentum"]
        model = ("lr_and_momentum" if adaptive["momentum"] else "lr") if adaptive["learning_rate"] else None
        super().__init__(
            module.parameters(),
            lr=fixed.get("learning_rate", 0.0),
            betas=(fixed.get("momentum", 0.0), ema),
            damping=options.get("initial_damping", fixed.get("damping")),
            damping_kind="absolute" if options.get("use_exact_inverses") else "pi",
            weight_decay=l2_reg,
            weight_decay_kind="l2",
            nesterov=False,
            refresh_every=options.get("inverse_update_period", 5),
            refresh="together",
            kl_clip=options.get("norm_constraint"),
            norm_clip=None,
            max_update_rms=None,
            momentum="update",
            adapt_damping=adaptive["damping"],
            quadratic_model=model,
            loss=loss,
            module=module,
            **more,
        )

    def _method(self, group: dict[str, Any]) -> Method:
        basis = LayerBasis(follows_trace=False)
        return LayerKronecker(LayerStatistic(), basis, PeerSpectrum(basis))

    def _current(self) -> Layout:
        """Refreshes in the first call of a period."""
        layout = super()._current()
        for b in layout.buckets:
            first = 1 % self.param_groups[0]["refresh_every"]
            b.phases = {mode: [first] * len(phases) for mode, phases in b.phases.items()}
        return layout

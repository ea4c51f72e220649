"""The recorded inverse-free KL-Shampoo: our class, each parameter one block with as many modes as it has axes."""

from typing import Any

import secondorder
from secondorder.layout.blocks import Treatment, whole

# How the recordings name our options.
NAMES = {
    "nesterov": "nesterov",
    "beta": "factor_rate",
    "eps": "eps",
    "clip": "clip",
    "max_rms": "max_update_rms",
    "weight_decay": "weight_decay",
    "every": "statistics_every",
    "warm": "dense_steps",
}


class PeerInverseFreeKLShampoo(secondorder.InverseFreeKLShampoo):
    """Constructed with the recordings' argument names; sides over `longest_dense` have the diagonal factor."""

    def __init__(self, params: Any, *, longest_dense: int, b1: float = 0.9, **recorded: Any) -> None:
        self.longest_dense = longest_dense
        super().__init__(params, betas=(b1, 0.99), **{NAMES[key]: value for key, value in recorded.items()})

    def _blocks(self, shape: tuple[int, ...], group: Any, role: str | None) -> Treatment:
        if len(shape) < 2:
            return whole(shape, "a vector")
        modes = tuple(i for i, d in enumerate(shape) if d <= self.longest_dense)
        diagonal = tuple(i for i in range(len(shape)) if i not in modes)
        return Treatment(shape, tuple((d,) for d in shape), modes, "one block", diagonal=diagonal)

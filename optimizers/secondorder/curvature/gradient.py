"""The gradient's own statistic, `G_(i) G_(i)^T` per mode.

Source: Gupta, Koren and Singer, *Shampoo* (2018, arXiv:1802.09568), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secondorder.preconditioner.modes import unfold
from secondorder.preconditioner.protocol import Context, State, Streams


@dataclass(frozen=True)
class GradientStatistic:
    """Mode unfoldings of the gradient; a factor averages their Gram matrices."""

    def __call__(self, s: State, x: Streams, c: Context) -> dict[int, Tensor]:
        """Square roots `R_i (n, d_i, m)` of the statistic, `R_i R_i^T = G_(i) G_(i)^T`, for each mode with a factor."""
        return {i: unfold(x["grad"], i) for i in c.modes}

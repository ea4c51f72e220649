"""Kronecker-factored methods: one statistic, one factor per mode, one scaling, composed into a row of the table.

`P(G) = V · (s ⊙ (U · G))` with `U = ⊗ U_i` and `V = ⊗ V_i`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams


class Move(NamedTuple):
    """How a factor's coordinates changed at a refresh.

    Attributes:
        rotation: `(n, d, d)`, `Q_new^T Q_old`.
        order: `(n, d)`, the old columns' positions in the new order, where the refresh sorted them; else None.
        gate: `(n,)`, 1 where the move took place.
    """

    rotation: Tensor
    order: Tensor | None
    gate: Tensor


class Statistic(Protocol):
    """What is observed of a gradient."""

    def __call__(self, s: State, x: Streams, c: Context) -> dict[int, Tensor]:
        """Square roots `R_i (n, d_i, m)` of the statistic `R_i R_i^T` of each mode, from the factors as they are."""
        ...


class Factor(Protocol):
    """What is stored for the modes of a block."""

    def specs(self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """State of the factors of one block."""
        ...

    def absorb(self, s: State, roots: dict[int, Tensor], c: Context) -> None:
        """Fold the statistics of all modes in."""
        ...

    def refresh(self, s: State, c: Context) -> dict[int, Move]:
        """Recompute what is applied, for the modes that are due."""
        ...

    def refresh_cost(self, d: int) -> float:
        """Floating-point operations of one refresh of a mode of size `d`."""
        ...

    def into(self, s: State, X: Tensor, mode: int) -> Tensor:
        """`U_mode` applied to a mode."""
        ...

    def out(self, s: State, X: Tensor, mode: int) -> Tensor:
        """`V_mode` applied to a mode."""
        ...

    def bases(self, s: State, c: Context) -> dict[int, Tensor]:
        """Orthogonal bases `(n, d, d)` in which the factors are diagonal."""
        ...

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Condition numbers `(n,)` by mode."""
        ...


class Scaling(Protocol):
    """What acts element by element in the factor's coordinates."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """State of the scaling of one block."""
        ...

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        """Scale `X (n, d1, ..., dk)`; may update the scaling's averages."""
        ...

    def move(self, s: State, moves: dict[int, Move], c: Context) -> None:
        """Follow the coordinates when a refresh moved them."""
        ...

    def curvature(self, s: State, c: Context) -> Tensor:
        """The curvature that the state holds, as an elementwise spectrum."""
        ...

    def preconditioner(self, s: State, c: Context) -> Tensor:
        """What is applied to the gradient, as an elementwise spectrum."""
        ...


@dataclass(frozen=True)
class Kronecker(Method):
    """A row of the table: `SOAP = Kronecker(GradientStatistic(), EigenBasis(), AdamInBasis(), lagged=True, ...)`."""

    statistic: Statistic
    factor: Factor
    scaling: Scaling
    momentum: Literal["none", "gradient", "update"] = "none"
    lagged: bool = False
    first: Literal["observe", "apply", "skip", "measure"] = "observe"
    start: int = 1

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {**self.factor.specs(shape, modes, hp), **self.scaling.specs(shape)}

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """See `Method`."""
        self.factor.absorb(s, self.statistic(s, x, c), c)

    def refresh(self, s: State, c: Context) -> None:
        """See `Method`."""
        self.scaling.move(s, self.factor.refresh(s, c), c)

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """`V · scale(U · M)`: two products per mode."""
        X = self.scaled(s, moment, c)
        for i in c.modes:
            X = self.factor.out(s, X, i)
        return X

    def scaled(self, s: State, X: Tensor, c: Context) -> Tensor:
        """`scale(U · X)`."""
        for i in c.modes:
            X = self.factor.into(s, X, i)
        return self.scaling.scale(s, X, c)

    def refresh_cost(self, shape: tuple[int, ...], mode: int) -> float:
        """See `Method`."""
        return self.factor.refresh_cost(shape[mode])

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor] | None:
        """See `Method`."""
        return self.factor.bases(s, c), self.scaling.curvature(s, c), self.scaling.preconditioner(s, c)

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """See `Method`."""
        return self.factor.conditions(s, c)

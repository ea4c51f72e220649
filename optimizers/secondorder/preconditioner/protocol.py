"""The protocol between a method and the step: what a row of the table is, and the only ways in which it touches state.

A *method* is a frozen, stateless object. It sees `n` rows (blocks of one shape) of one bucket at a time:

- `s`: the state, a dict of stacked tensors `(n, ...)` by name;
- `x`: the streams that the plan brought, `(n, d1, ..., dk)` tensors by name (`"grad"`, `"param"` where asked for);
- `c`: a `Context`, everything that a method may know of a step.

It knows no parameter, bucket, rank or kernel. State changes only through `ema_`, `put_` and increments that carry a
gate, so that a row with gate 0 keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from secondorder.linalg import known
from secondorder_kernels import row_keys, stochastic_round

State = dict[str, Tensor]
Streams = Mapping[str, Tensor]
Modes = tuple[int, ...]

FACTOR_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # of factors, by option; None: that of the products


@dataclass(frozen=True)
class Spec:
    """One stacked tensor of a block's state, without its leading row dimension.

    Attributes:
        shape: Shape of one row's entry.
        init: What a row starts with: a number, `"eye"` for the identity matrix, or a function that makes the entry,
            called with `dtype` and `device`.
        dtype: Of the stored tensor; None: that of the products. What `ema_` and `put_` write to a bfloat16 one is
            rounded stochastically. Not for element-wise methods.
    """

    shape: tuple[int, ...]
    init: float | Literal["eye"] | Callable[..., Tensor] = 0.0
    dtype: torch.dtype | None = None


def expand_rows(r: Tensor, like: Tensor) -> Tensor:
    """View `r (n,)` as `(n, 1, ..., 1)`, to broadcast over the rows of `like`."""
    return r.view(-1, *([1] * (like.ndim - 1)))


@dataclass
class Context:
    """What a method may know of a step, for the rows it is given.

    Attributes:
        hp: Hyper-parameters of the rows' parameter group.
        modes: Modes that carry a dense factor; in `refresh`, the modes that are due.
        diagonal: Modes that carry a diagonal factor.
        gate: `(n,)`, 1 where the row takes part in this step, else 0.
        seen_gate: `(n,)`, 1 where this gradient may enter statistics (its norm is in the usable range), else 0.
        count: `(n,)` updates taken, this one included once `apply` runs.
        seen: `(n,)` statistics absorbed, this one included once `observe` runs.
        initial: In `refresh`: make anew what the factors apply, instead of tracking it from the last refresh.
        expand: Broadcasts a `(n,)` tensor over the rows of a stack (flat buckets store rows end to end, so that the way
            to broadcast is the bucket's).
    """

    hp: Mapping[str, Any]
    modes: Modes
    gate: Tensor
    seen_gate: Tensor
    count: Tensor
    seen: Tensor
    initial: bool = False
    diagonal: Modes = ()
    expand: Callable[[Tensor, Tensor], Tensor] = expand_rows

    def weight(self, beta: float, clock: Tensor) -> Tensor:
        """Total weight `1 - beta^clock` of an average that began at zero; `(n,)`, factor dtype.

        Computed in float64: the rounding of `pow` in float32 depends on the position in the vector, and with it the
        bits would depend on which blocks share a bucket.
        """
        wide = clock if clock.device.type == "mps" else clock.double()
        return (1 - beta**wide).to(self.gate.dtype)

    def rate(self, beta: float, clock: Tensor) -> Tensor:
        """Rate of the debiased average after `clock` terms, `(1 - beta) / (1 - beta^clock)`, 0 where the row waits.

        `x.lerp_(new, rate)` keeps `x` equal to the bias-corrected average: what is stored needs no correction at use.
        """
        gate = self.seen_gate if clock is self.seen else self.gate
        # where, not a product: a row that waits has weight 0, and 0/0 * 0 is nan.
        return torch.where(gate > 0, (1 - beta) / self.weight(beta, clock), 0.0)


def ema_(stored: Tensor, new: Tensor, rate: Tensor, c: Context, seed: int = 0) -> Tensor:
    """Move `stored` towards `new` by `rate (n,)`, in place; a rate of 0 leaves a row bitwise as it is."""
    weight = c.expand(rate, stored)
    if stored.dtype == torch.bfloat16:
        wide = stored.to(torch.float32)
        return stored.copy_(_rounded(wide.lerp(new.to(wide.dtype), weight.to(wide.dtype)), c, seed))
    return stored.lerp_(new, weight.to(stored.dtype))


def put_(stored: Tensor, new: Tensor, gate: Tensor, c: Context, seed: int = 0) -> Tensor:
    """Replace the rows of `stored` where `gate (n,)` is set, in place."""
    if stored.dtype == torch.bfloat16:
        new = _rounded(new, c, seed)
    return stored.copy_(new if known(gate) else torch.where(c.expand(gate, stored) > 0, new, stored))


def _rounded(x: Tensor, c: Context, seed: int) -> Tensor:
    """To bfloat16, with noise that depends on a row's own clocks, and so is the same wherever the row is.

    Entries of one state that are written in one phase of a step need seeds that differ, or their errors are alike.
    """
    return stochastic_round(x, row_keys((c.count, c.seen), seed))


class Method:
    """A row of the table. Subclasses are frozen dataclasses: hashable, comparable, without state of their own.

    Class attributes are plain facts that the one step reads as data:
        streams: What the plan must bring: `"grad"`, and `"param"` for methods that read the parameter.
        momentum: Where momentum lives: `"gradient"` (before the factor), `"update"` (after), or `"none"` (the method
            keeps its own, or has none).
        lagged: Apply before the factor sees this gradient.
        first: What a row's first gradient does: `"observe"` (then apply), `"apply"` (then observe), `"skip"` (only
            observe: no momentum, no update, no decay) or `"measure"` (as `"apply"`, but the parameter stays).
        start: The call before which nothing is refreshed.
        refresh_last: Refresh after the update even where the statistic comes before it.
        eager: Where refreshes are staggered, all units are due in calls 1, 2, 4, ... of the first period too.
        works: Further workspaces of the gradient's shape that `screen` fills and `observe` reads.
        decay_after: Decoupled weight decay acts on the parameter after the step instead of before it.
        name: What `coverage()` calls it where it is the fallback.
        elementwise: No modes: rows may have any shape, and live end to end in a flat bucket.
    """

    streams: ClassVar[tuple[str, ...]] = ("grad",)
    momentum: Literal["none", "gradient", "update"] = "none"
    lagged: bool = False
    first: Literal["observe", "apply", "skip", "measure"] = "observe"
    start: int = 1
    refresh_last: ClassVar[bool] = False
    eager: bool = False
    works: ClassVar[tuple[str, ...]] = ()
    decay_after: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    name: ClassVar[str] = "method"

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """State of one block of this shape whose `modes` carry a dense factor and `diagonal` a diagonal one."""
        raise NotImplementedError

    def statistics(self, shape: tuple[int, ...], modes: Modes, diagonal: Modes) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer statistics of one block, by stream, that the plan must bring before `observe`.

        `"arrived"`, of shape `()`, is among them: 1 in rows whose statistics came, else 0.
        """
        return {}

    def begin(self, s: State, x: Streams, c: Context) -> None:
        """A row's first usable gradient; `c.gate` marks the rows that start. Must be masked: it may run again."""

    def waits(self, hp: Mapping[str, Any]) -> int:
        """Calls of a row that only observe: no momentum, no update, no decay."""
        return max(int(self.first == "skip"), int(hp.get("burn_in", 0)))

    def observes(self, t: int, hp: Mapping[str, Any]) -> bool:
        """Whether a row observes in its call `t` (from 1)."""
        return t <= self.waits(hp) or (t - 1) % int(hp["statistics_every"]) == 0

    def screen(self, s: State, x: Streams, c: Context) -> tuple[dict[str, Tensor], Tensor] | None:
        """Look at the gradients with the factors as they are, before momentum and statistics see them.

        Returns:
            What takes the place of streams (`"grad"`, or one of `works`), and `(n,)` bools: rows that are False sit
            this step out. None where nothing is screened.
        """
        return None

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """Fold this gradient's statistic into the factors."""

    def refresh(self, s: State, c: Context) -> None:
        """Recompute what the factors of `c.modes` apply."""

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """The update direction `(n, d1, ..., dk)` for `moment` (the gradient, or its momentum)."""
        raise NotImplementedError

    def refresh_cost(self, shape: tuple[int, ...], mode: int) -> float:
        """Floating-point operations of refreshing one mode of one block; 0 where nothing is refreshed."""
        return 0.0

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor] | None:
        """What the state holds and what it applies, in a common basis.

        Returns:
            `(bases by mode, curvature, preconditioner)`, the latter two as elementwise spectra `(n, d1, ..., dk)` in
            those bases; None where the method has no such view.
        """
        return None

    def held(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor] | None:
        """The curvature that the state holds, `(bases by mode, spectrum)`, where it is another than that of `spectra`.

        What is applied may lag behind. None where it is the same.
        """
        return None

    def factors(self, s: State, c: Context) -> dict[int, Tensor]:
        """Curvature factors by mode, `(n, d, d)` or `(n, d)`, of a state that keeps them in another form."""
        return {}

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Condition number `(n,)` of the factor of each mode, for `diagnostics()`."""
        return {}

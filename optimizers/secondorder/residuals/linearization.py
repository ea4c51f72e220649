"""A residual closure linearised at the current parameters: r, J = ∂r/∂θ as products, rows or kernel.

    r(θ + δ) ≈ r + J δ        r `(N,)` as `Terms.vector` has it, J `(N, D)`

Two back-ends with one interface: "expand" has all rows for about the price of a gradient, wherever a sample's residual
depends on no other sample; "matvec" takes any closure, and gives products for the price of a gradient each. Both see
residuals of centred terms before their means are subtracted; `centred` does that to what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from secondorder.residuals.centred import centred
from secondorder.residuals.expand import CannotExpand, Memory, expand
from secondorder.residuals.matvec import Products
from secondorder.residuals.terms import Terms, residual_terms

BACKENDS = ("auto", "expand", "matvec")


class Linearization(Protocol):
    """J at one point and batch. Vectors in parameter space are lists shaped like the parameters.

    Attributes:
        backend: "expand" or "matvec".
        reason: Why "auto" is "matvec"; empty otherwise.
        residual: r `(N,)`, scaled, without a graph.
        groups: Numbers of parameters by layers, as far as it is known which belong together.
    """

    backend: str
    reason: str
    residual: Tensor
    groups: list[list[int]]

    @property
    def recorded(self) -> Linearization:
        """This process's rows as they were recorded: not gathered, not centred."""

    @property
    def loss(self) -> Tensor:
        """½ |r|², 0-dim."""

    @property
    def gradient(self) -> list[Tensor]:
        """Jᵀ r."""

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v `(N,)`."""

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀ u of u `(N,)`. Of a u in float64 "expand" computes it in float64, also of a float32 network."""

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """K = J Jᵀ `(N, N)`, by blocks of J. dtype: None is that of the residual."""

    def trace(self) -> Tensor:
        """The trace of K, 0-dim in float64; by "matvec" an estimate."""

    def apply_kernel(self, X: Tensor) -> Tensor:
        """K X `(N, k)` of X `(N, k)`, in the dtype of X."""

    def restricted(self, params: Sequence[int]) -> Linearization:
        """J of some parameters, by their numbers."""

    def normal(self, dtype: torch.dtype | None = None) -> Tensor:
        """G = Jᵀ J `(D, D)`, parameters in their order, each flattened."""

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """J `(N, D)`."""


def linearize(
    closure: Callable[[], Any],
    params: Sequence[Tensor],
    backend: str = "auto",
    chunk: int | None = None,
    memory: Memory | None = None,
) -> Linearization:
    """Evaluate a residual closure with all that is needed of its Jacobian.

    The closure is called once; while a `memory` is new, and where "expand" is not possible, up to a few times: it must
    return the same residuals again. With "expand" the first call for given names, shapes and dtypes of terms compares
    one Jᵀ u with autograd's (relative difference at most 1e-8 in float64, 1e-3 otherwise). Give a new `memory` when the
    network changes in other ways, from `eval()` to `train()` say.

    Args:
        closure: Returns residuals as `residual_terms` takes them, and calls no backward.
        params: Parameters θ; those that require no gradient have J = 0.
        backend: "expand", "matvec", or "auto" (default): "expand" where it is possible.
        chunk: What of J is held at once: columns ("expand", default: 2^21 numbers) or rows ("matvec", default: 64).
        memory: Kept by the caller for further calls; None: nothing is known.

    Returns:
        The linearisation. One by "matvec" holds the graph: use it before the parameters change.

    Raises:
        TypeError: If the closure returns a loss.
        ValueError: If an argument is not allowed, no residual depends on a parameter, or "expand" is asked for and not
            possible.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    params, memory = list(params), Memory() if memory is None else memory
    rows: list[tuple[slice, int]] = []

    def evaluate() -> Terms:
        # Copies of weights are recorded in the functions that are called; "matvec" differentiates twice.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            terms = residual_terms(closure())
        if terms is None:
            raise TypeError("closure must return residuals, {'name': residual}, got a loss")
        if not any(r.requires_grad for r in terms.residuals):
            raise ValueError(
                f"closure must return residuals that depend on a parameter, got {terms.names} without graph"
            )
        rows[:] = terms.centred_rows
        return terms.uncentred()

    found = _by_backend(evaluate, params, backend, chunk, memory)
    return centred(found, params, rows)


def _by_backend(
    evaluate: Callable[[], Terms], params: Sequence[Tensor], backend: str, chunk: int | None, memory: Memory
) -> Linearization:
    if backend == "matvec" or (backend == "auto" and memory.reason):
        return Products(evaluate().vector(), params, memory.reason if backend == "auto" else "", chunk)
    try:
        return expand(evaluate, params, memory, chunk)
    except CannotExpand as error:
        if backend == "expand":
            raise ValueError(f"backend must not be 'expand' for this closure: {error}") from error
        memory.reason = str(error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch.func and forward AD don't take the recording maps; other errors come again
        if backend == "expand":
            raise
        memory.reason = f"the closure failed while it was recorded: {error}"
    return Products(evaluate().vector(), params, memory.reason, chunk)

"""Grafting: one method's direction with the length of another's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import strides
from secondorder_kernels.checks import check_dtypes, check_shapes
from secondorder_kernels.dispatch import Operation
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import grafts as reference

KINDS = ("adam", "adagrad", "sgd")


def _example(device: torch.device) -> tuple[Tensor, ...]:
    return (*(torch.zeros(2, 64, 64, device=device) for _ in range(5)), torch.zeros(2, device=device))


def _tensors(*args: Any, rate: Tensor | None = None, **options: Any) -> tuple[Tensor | None, ...]:
    return (*args, rate)


def _refuses(*args: Any, rate: Tensor | None = None, **options: Any) -> str | None:
    *tensors, _ = args
    if strides.of_rows(tensors[0].shape, tensors, rate) is None:
        return strides.SCATTERED
    return None


def _shape(U: Tensor, *args: Any, kind: str = "adam", **options: Any) -> Shape:
    return kind, (len(U), U.shape[1:].numel())


_graft = Operation(
    reference.graft_,
    _example,
    (
        triton_path(
            "graft_", "grafts:graft_", tensors=_tensors, shape=_shape, refuses=_refuses, dtypes=(torch.float32,)
        ),
    ),
    schema="(Tensor U, Tensor moment, Tensor? G, Tensor(a!)? V, Tensor(b!) out, Tensor(c!) scale, *, "
    "Tensor? rate=None, float eps=0.0, str kind) -> ()",
)


def graft_(
    U: Tensor,
    moment: Tensor,
    G: Tensor | None = None,
    V: Tensor | None = None,
    *,
    rate: Tensor | None = None,
    eps: float = 0.0,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Update an element-wise method's state, and give its length to another method's direction, row by row.

        V ← V + rate (G² - V)   ("adam"),   V ← V + G² where the rate is not 0   ("adagrad"),   no V   ("sgd")
        D = moment / (√V + eps)         for "sgd" the moment
        u = U |D| / |U|                 Frobenius norms of a row; D where U is 0

    Where the rate is 0 a row of V keeps its bits, as long as G² is finite. Norms are sums in float64.

    Args:
        U: Directions, shape `(n, d, ...)`, float32 or float64.
        moment: What the element-wise method divides, shape and dtype of `U`.
        G: Gradients, shape and dtype of `U`; None for "sgd".
        V: Average or sum of squared gradients, shape and dtype of `U`; changed in place. None for "sgd".
        rate: Between 0 and 1, shape `(n,)`, dtype of `U`; None for "sgd".
        eps: Added to √V.
        kind: "adam", "adagrad" or "sgd".

    Returns:
        New tensors: u, and what U was multiplied by, `(n,)`, 0 where U is 0.

    Raises:
        ValueError: If there is no such kind, if it needs G, V and rate and one is missing, or if shapes do not fit
            together.
        TypeError: If dtypes differ, or are not float32 or float64.

    Source: Anil et al. 2020, arXiv:2002.09018, section 5.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    of_squares = {"G": G, "V": V, "rate": rate}
    given = {name: t for name, t in of_squares.items() if t is not None}
    if len(given) != (0 if kind == "sgd" else len(of_squares)):
        raise ValueError(f'graft_ takes G, V and rate, but none of them for "sgd"; got {[*given]} for "{kind}"')
    tensors = {"U": U, "moment": moment, **given}
    check_dtypes("graft_", tensors)
    tensors.pop("rate", None)
    check_shapes("graft_", tensors, {})
    if U.ndim < 2 or (rate is not None and rate.shape != U.shape[:1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (U, rate) if t is not None)
        raise ValueError(f"graft_ takes rows (n, d, ...) and rate (n,), got {shapes}")
    out, scale = torch.empty(U.shape, dtype=U.dtype, device=U.device), U.new_empty(len(U))
    _graft(U, moment, G, V, out, scale, rate=rate, eps=eps, kind=kind)
    return out, scale

"""Element-wise operations on a stack: Adam's direction, and the direction without its root."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import kinds, policy, strides
from secondorder_kernels.checks import check_dtypes, check_keys, check_shapes
from secondorder_kernels.dispatch import Operation
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import elementwise as reference

# Of a factor that is a tensor, in which it may count samples; other tensors are refused one by one.
_FACTORS = (torch.float64, torch.int32, torch.int64)


def _adam_direction_example(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(2, 64, 64, device=device) for _ in range(4))


def _adam_direction_tensors(m: Tensor, v: Tensor, g: Tensor, out: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    rates = options.get("beta1_rate"), options.get("beta2_rate")
    return m, v, g, out, *rates, options.get("eps_tensor"), options.get("keys")


def _adam_direction_refuses(*args: Any, **options: Any) -> str | None:
    *tensors, keys = _adam_direction_tensors(*args, **options)
    wide = next((t for t in tensors if t is not None and t.dtype not in policy.FLOATS), None)
    if wide is not None:
        return f"there is no kernel for {wide.dtype}"
    return None if strides.of_tensors(args[0].shape, tensors, keys) else strides.SCATTERED


def _adam_direction_shape(m: Tensor, v: Tensor, g: Tensor, out: Tensor, **options: Any) -> Shape:
    return kinds.dtypes(m, v), (m.numel(),)


_adam_direction = Operation(
    reference.adam_direction_,
    _adam_direction_example,
    (
        triton_path(
            "adam_direction_",
            "adam:adam_direction_",
            tensors=_adam_direction_tensors,
            shape=_adam_direction_shape,
            refuses=_adam_direction_refuses,
            dtypes=(*policy.FLOATS, torch.int64),
        ),
    ),
    schema="(Tensor(a!) m, Tensor(b!) v, Tensor g, Tensor(c!) out, *, Tensor beta1_rate, Tensor beta2_rate, "
    "float beta1, float eps=0.0, Tensor? eps_tensor=None, bool nesterov=False, Tensor? keys=None) -> ()",
)


def adam_direction_(
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    beta1: float,
    eps: float | Tensor,
    nesterov: bool,
    keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Update Adam's two averages and return its direction.

        m ← m + r₁ (g - m),   v ← v + r₂ (g² - v)
        u = m̃ / (√v + eps),   m̃ = m, or with Nesterov's look-ahead beta1 m + (1 - beta1) g

    With rates r = (1 - beta) / (1 - beta^t) the averages are the bias-corrected ones. Where a rate is 0 the average
    keeps its bits, as long as g and g² are finite. The direction is made of the averages before they are rounded to
    what they are stored in.

    Args:
        m: Average of gradients, shape `(n, ...)` (or any other, without keys), in the dtype of `g` or in bfloat16;
            changed in place.
        v: Average of squared gradients, shape of `m`, in the dtype of `g` or in bfloat16; changed in place.
        g: Gradient, shape of `m`, float32, or float64 where neither average is bfloat16.
        beta1_rate: r₁, broadcastable to `g`, in its dtype.
        beta2_rate: r₂, broadcastable to `g`, in its dtype.
        beta1: Weight of `m` in the look-ahead.
        eps: Added to √v; a tensor must be broadcastable to `v`.
        nesterov: Whether to look ahead.
        keys: int64 in [0, 2^32), shape `(n,)`: how averages in bfloat16 are rounded (see `stochastic_round`), `v` with
            `mix(keys)`. To be left out where neither is.
        out: Where the direction is to be left, shape and dtype of `g`; must share no memory with the other tensors.

    Returns:
        The direction u: `out`, or a new tensor.

    Raises:
        ValueError: If shapes differ.
        TypeError: If dtypes do not fit together, or keys are missing or too many.

    Source: Kingma and Ba 2015, algorithm 1; the look-ahead is that of Dozat 2016.
    """
    direction = torch.empty_like(g) if out is None else out
    averages = {"m": m, "v": v}
    others = {"g": g, "out": direction}
    rates = {"beta1_rate": beta1_rate, "beta2_rate": beta2_rate}
    check_shapes("adam_direction_", {**averages, **others}, {**rates, "eps": eps} if isinstance(eps, Tensor) else rates)
    half = torch.bfloat16 if g.dtype == torch.float32 else None
    wide = {name: t for name, t in averages.items() if t.dtype != half}
    check_dtypes("adam_direction_", {**wide, **others, **rates})
    check_keys("adam_direction_", keys, averages)
    either = {"eps_tensor": eps} if isinstance(eps, Tensor) else {"eps": eps}
    _adam_direction(
        m,
        v,
        g,
        direction,
        beta1_rate=beta1_rate,
        beta2_rate=beta2_rate,
        beta1=beta1,
        nesterov=nesterov,
        keys=keys,
        **either,
    )
    return direction


def _root_free_example(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(4096, device=device) for _ in range(4))


def _root_free_tensors(v: Tensor, g: Tensor, moment: Tensor, out: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    return v, g, moment, out, options.get("rate"), options.get("scale_tensor")


def _root_free_refuses(*args: Any, **options: Any) -> str | None:
    *tensors, _ = _root_free_tensors(*args, **options)
    wide = next((t for t in tensors if t is not None and t.dtype != torch.float32), None)
    if wide is not None:
        return f"there is no kernel for {wide.dtype}"
    return None if strides.of_tensors(args[0].shape, tensors) else strides.SCATTERED


_root_free = Operation(
    reference.root_free_,
    _root_free_example,
    (
        triton_path(
            "root_free_",
            "root_free:root_free_",
            tensors=_root_free_tensors,
            shape=lambda v, *args, **options: ("float32", (v.numel(),)),
            refuses=_root_free_refuses,
            dtypes=(*policy.FLOATS, *_FACTORS),
        ),
    ),
    schema="(Tensor(a!) v, Tensor g, Tensor moment, Tensor(b!) out, *, Tensor rate, float scale=1.0, "
    "Tensor? scale_tensor=None, float eps) -> ()",
)


def root_free_(
    v: Tensor,
    g: Tensor,
    moment: Tensor,
    *,
    rate: Tensor,
    scale: float | Tensor = 1.0,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Update the average of squared gradients and return a moment divided by it, not by its root.

        v ← v + rate (scale g² - v),   u = moment / (v + eps)

    Where the rate is 0 the average keeps its bits, as long as scale g² is finite.

    Args:
        v: Average of scaled squared gradients, float32 or float64; changed in place.
        g: Gradient, shape and dtype of `v`.
        moment: What is divided, shape and dtype of `v`; may be `g`.
        rate: Broadcastable to `v`, in its dtype.
        scale: Factor of g², such as the number of samples that g is the mean of; a tensor must be 0-d.
        eps: Added to v.
        out: Where the result is to be left, shape and dtype of `v`; must share no memory with the other tensors.

    Returns:
        u: `out`, or a new tensor.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes differ, or are not float32 or float64.

    Source: Lin et al. 2024, arXiv:2402.03496.
    """
    direction = torch.empty_like(g) if out is None else out
    tensors = {"v": v, "g": g, "moment": moment, "out": direction}
    check_shapes("root_free_", tensors, {"rate": rate})
    check_dtypes("root_free_", {**tensors, "rate": rate})
    if isinstance(scale, Tensor) and scale.ndim:
        raise ValueError(f"root_free_ takes a scale that is a number or 0-d, got {tuple(scale.shape)}")
    either = {"scale_tensor": scale} if isinstance(scale, Tensor) else {"scale": scale}
    _root_free(v, g, moment, direction, rate=rate, eps=eps, **either)
    return direction

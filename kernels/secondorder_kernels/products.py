"""Products of stacked matrices with their transposes that are folded into a running average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import kinds, policy
from secondorder_kernels.dispatch import Operation, Path
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import products as reference

# From this dimension on, on one CPU core, panels take 0.75 to 0.9 of the time of the whole product; below, as much.
_PANELS_FROM = 256
_LEAST_PANEL = 128

_HALF = (torch.bfloat16, torch.float16)


def product_kind(X: Tensor, weight: Tensor | None = None) -> str:
    """By which tables know a product `X diag(weight) Xᵀ`: dtype, precision, and the axis of X that is fast."""
    fast = "k" if X.stride(-1) == 1 else "d" if X.stride(-2) == 1 else "any"
    kind = f"{kinds.dtypes(X)}/{policy.precision(X.dtype if weight is None else torch.float32)}"
    return f"{kind}/{fast}" if weight is None else f"{kind}/{fast}/weighted"


def mixable(stored: torch.dtype, factor: torch.dtype) -> bool:
    """Whether products of a dtype can be accumulated in a tensor of another one."""
    return factor == stored or (stored == torch.float32 and factor in _HALF)


def _ema_syrk_by_panels(C: Tensor, X: Tensor, rate: Tensor, **plain: Any) -> None:
    """The lower triangle in at most four panels of rows, then mirrored: 10/16 of the multiplications."""
    d, X = C.shape[1], X.to(C.dtype)
    size = max(_LEAST_PANEL, -(-d // 4))
    moved, rate = rate > 0, rate[:, None, None]
    all_move = not torch.compiler.is_compiling() and bool(moved.all())
    for start in range(0, d, size):
        rows = slice(start, start + size)
        C[:, rows, : rows.stop].lerp_(torch.bmm(X[:, rows], X[:, : rows.stop].mT), rate)
        if start:
            upper, lower = C[:, :start, rows], C[:, rows, :start].mT
            upper.copy_(lower if all_move else torch.where(moved[:, None, None], lower, upper))


def _panels_refuse(C: Tensor, X: Tensor, rate: Tensor, **options: Any) -> str | None:
    if C.device.type != "cpu" or C.shape[1] < _PANELS_FROM:
        return f"panels are for a CPU and dimensions from {_PANELS_FROM} on"
    if any(value is not None and value is not False for value in options.values()):
        return "panels are for products without options"
    return None


def _ema_syrk_tensors(C: Tensor, X: Tensor, rate: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    return C, X, rate, options.get("weight"), options.get("moments"), options.get("keys")


def _ema_syrk_shape(C: Tensor, X: Tensor, rate: Tensor, *, weight: Tensor | None = None, **options: Any) -> Shape:
    return product_kind(X, weight), (len(C), C.shape[1], X.shape[2])


def _ema_syrk_example(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 64, 64, device=device), torch.zeros(2, 64, 64, device=device), torch.zeros(2, device=device)


_ema_syrk = Operation(
    reference.ema_syrk_,
    _ema_syrk_example,
    (
        triton_path(
            "ema_syrk_",
            "syrk:ema_syrk_",
            tensors=_ema_syrk_tensors,
            shape=_ema_syrk_shape,
            dtypes=(*policy.FLOATS, torch.int64),
        ),
        Path("panels", run=_ema_syrk_by_panels, refuses=_panels_refuse),
    ),
    schema="(Tensor(a!) C, Tensor X, Tensor rate, *, bool lower=False, Tensor? weight=None, bool ones=False, "
    "Tensor(b!)? moments=None, Tensor? keys=None) -> ()",
)


def ema_syrk_(
    C: Tensor,
    X: Tensor,
    rate: Tensor,
    *,
    lower: bool = False,
    weight: Tensor | None = None,
    ones: bool = False,
    moments: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Fold the Gram matrices of X into their running averages: C ← C + rate (X diag(weight) Xᵀ - C).

    Where the rate is 0, C keeps its bits, as long as the Gram matrix is finite. Triton's kernel reads one triangle and
    leaves both bitwise equal; elsewhere C stays symmetric up to its last bits: even where X Xᵀ is exactly symmetric
    (as on every CPU tried), the SIMD code of the average may round the two triangles differently. The precision of
    float32 products follows `torch.get_float32_matmul_precision()`; with `weight` all products are float32 products.

    Args:
        C: Symmetric averages, shape `(n, d, d)` with any strides; changed in place. float32 or float64, or bfloat16,
            which is rounded stochastically: the lower triangle, and the other one is its mirror image.
        X: Matrices, shape `(n, d, m)` with any strides, in the dtype of `C`; bfloat16 and float16 go with float32, all
            three with bfloat16.
        rate: Between 0 and 1, one per matrix, shape `(n,)`; in the dtype of `C`, float32 if that is bfloat16.
        lower: Write the entries on and below the diagonal alone; the others keep their bits.
        weight: Of the columns of X, shape `(n, m)`, in the dtype of `rate`.
        ones: X is seen with a last row of ones more, and C is one larger: its last column follows X weight, its
            corner the sum of the weights. The bias of a layer.
        moments: Filled with trace and squared Frobenius norm of the new C by its lower triangle, shape `(n, 2)`, in
            the dtype of `rate`.
        keys: If C is bfloat16: keys of stochastic rounding, shape `(n,)`, int64 in [0, 2^32). Equal rows with equal
            keys are rounded equally.

    Returns:
        `C`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes do not.
    """
    rows = X.shape[1] + int(ones) if X.ndim == 3 else -1
    if C.ndim != 3 or X.ndim != 3 or C.shape != (X.shape[0], rows, rows) or rate.shape != X.shape[:1]:
        raise ValueError(
            f"ema_syrk_ takes C (n, d, d), X (n, {'d - 1' if ones else 'd'}, m) and rate (n,), "
            f"got {tuple(C.shape)}, {tuple(X.shape)} and {tuple(rate.shape)}"
        )
    n, _, m = X.shape
    for name, given, shape in (("weight", weight, (n, m)), ("moments", moments, (n, 2)), ("keys", keys, (n,))):
        if given is not None and given.shape != shape:
            raise ValueError(f"ema_syrk_ takes {name} {shape} for X {tuple(X.shape)}, got {tuple(given.shape)}")
    stochastic = C.dtype == torch.bfloat16 and keys is not None
    wide = torch.float32 if stochastic else C.dtype
    if (
        C.dtype not in (torch.float32, torch.float64, *(torch.bfloat16,) * stochastic)
        or not mixable(wide, X.dtype)
        or any(t is not None and t.dtype != wide for t in (rate, weight, moments))
    ):
        given_dtypes = [str(t.dtype) for t in (C, X, rate, weight, moments) if t is not None]
        raise TypeError(
            "ema_syrk_ takes C, X, rate, weight and moments of one dtype, float32 or float64; X may be of half "
            f"precision, and C bfloat16 where keys are given; got {', '.join(given_dtypes)}"
        )
    if keys is not None and not (stochastic and keys.dtype == torch.int64):
        raise TypeError(f"ema_syrk_ takes int64 keys where C is bfloat16, got {keys.dtype} and {C.dtype}")
    options: dict[str, Any] = {"lower": lower} if lower else {}
    options.update({"ones": ones} if ones else {})
    tensors = {"weight": weight, "moments": moments, "keys": keys}
    options.update({name: t for name, t in tensors.items() if t is not None})
    _ema_syrk(C, X, rate, **options)
    return C


def _apart(L: Tensor, R: Tensor, G: Tensor, rate: Tensor) -> None:
    _ema_syrk(L, G, rate)
    _ema_syrk(R, G.mT, rate)


def _ema_syrk_pair_example(device: torch.device) -> tuple[Tensor, ...]:
    return (*(torch.zeros(2, 64, 64, device=device) for _ in range(3)), torch.zeros(2, device=device))


_ema_syrk_pair = Operation(
    reference.ema_syrk_pair_,
    _ema_syrk_pair_example,
    (
        triton_path(
            "ema_syrk_pair_",
            "syrk:ema_syrk_pair_",
            tensors=lambda L, R, G, rate: (L, R, G, rate),
            shape=lambda L, R, G, rate: (product_kind(G), tuple(G.shape)),
        ),
        Path("two products", run=_apart),
    ),
    schema="(Tensor(a!) L, Tensor(b!) R, Tensor G, Tensor rate) -> ()",
)


def ema_syrk_pair_(L: Tensor, R: Tensor, G: Tensor, rate: Tensor) -> None:
    """Fold the Gram matrices of both unfoldings of G into their averages.

        L ← L + rate (G Gᵀ - L),   R ← R + rate (Gᵀ G - R)

    One launch that reads G once from memory, where Triton's kernel is taken; else two calls of `ema_syrk_`, which see.

    Args:
        L: Symmetric averages, shape `(n, d1, d1)`, float32 or float64; changed in place.
        R: Symmetric averages, shape `(n, d2, d2)`, in the dtype of `L`; changed in place.
        G: Matrices, shape `(n, d1, d2)` with any strides, in the dtype of `L`, or of half precision beside float32.
        rate: Between 0 and 1, one per matrix, shape `(n,)`, in the dtype of `L`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes do not.
    """
    n, d1, d2 = G.shape if G.ndim == 3 else (-1, -1, -1)
    if L.shape != (n, d1, d1) or R.shape != (n, d2, d2) or rate.shape != (n,):
        raise ValueError(
            "ema_syrk_pair_ takes L (n, d1, d1), R (n, d2, d2), G (n, d1, d2) and rate (n,), "
            f"got {', '.join(str(tuple(t.shape)) for t in (L, R, G, rate))}"
        )
    if (
        L.dtype not in (torch.float32, torch.float64)
        or R.dtype != L.dtype
        or rate.dtype != L.dtype
        or not mixable(L.dtype, G.dtype)
    ):
        raise TypeError(
            "ema_syrk_pair_ takes L, R, G and rate of one dtype, float32 or float64, G may be of half precision; "
            f"got {', '.join(str(t.dtype) for t in (L, R, G, rate))}"
        )
    _ema_syrk_pair(L, R, G, rate)

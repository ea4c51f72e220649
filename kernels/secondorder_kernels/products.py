"""Products of stacked matrices that are folded into a running average."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels.dispatch import Operation, Path
from secondorder_kernels.reference import products as reference

# From this dimension on, on one CPU core, panels take 0.75 to 0.9 of the time of the whole product; below, as much.
_PANELS_FROM = 256
_LEAST_PANEL = 128


def _ema_syrk_by_panels(C: Tensor, X: Tensor, rate: Tensor) -> None:
    """The lower triangle in at most four panels of rows, then mirrored: 10/16 of the multiplications."""
    d = C.shape[1]
    size = max(_LEAST_PANEL, -(-d // 4))
    moved, rate = rate > 0, rate[:, None, None]
    all_move = not torch.compiler.is_compiling() and bool(moved.all())
    for start in range(0, d, size):
        rows = slice(start, start + size)
        C[:, rows, : rows.stop].lerp_(torch.bmm(X[:, rows], X[:, : rows.stop].mT), rate)
        if start:
            upper, lower = C[:, :start, rows], C[:, rows, :start].mT
            upper.copy_(lower if all_move else torch.where(moved[:, None, None], lower, upper))


def _panels_refuse(C: Tensor, X: Tensor, rate: Tensor) -> str | None:
    if C.device.type != "cpu" or C.shape[1] < _PANELS_FROM:
        return f"panels are for a CPU and dimensions from {_PANELS_FROM} on"
    return None


def _ema_syrk_example(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 64, 64, device=device), torch.zeros(2, 64, 64, device=device), torch.zeros(2, device=device)


_ema_syrk = Operation(
    reference.ema_syrk_,
    _ema_syrk_example,
    (Path("panels", run=_ema_syrk_by_panels, refuses=_panels_refuse),),
    schema="(Tensor(a!) C, Tensor X, Tensor rate) -> ()",
)


def ema_syrk_(C: Tensor, X: Tensor, rate: Tensor) -> Tensor:
    """Fold the Gram matrices of X into their running averages: C ← C + rate (X Xᵀ - C).

    Where the rate is 0, C keeps its bits, as long as X Xᵀ is finite. C stays symmetric up to its last bits: even where
    X Xᵀ is exactly symmetric (as on every CPU tried), the SIMD code of the average may round the two triangles
    differently. The precision of float32 products follows `torch.get_float32_matmul_precision()`.

    Args:
        C: Symmetric averages, shape `(n, d, d)`, float32 or float64; changed in place.
        X: Matrices, shape `(n, d, m)` with any strides, in the dtype of `C`.
        rate: Between 0 and 1, one per matrix, shape `(n,)`, in the dtype of `C`.

    Returns:
        `C`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes differ.
    """
    if C.ndim != 3 or X.ndim != 3 or C.shape != (X.shape[0], X.shape[1], X.shape[1]) or rate.shape != X.shape[:1]:
        raise ValueError(
            "ema_syrk_ takes C (n, d, d), X (n, d, m) and rate (n,), "
            f"got {tuple(C.shape)}, {tuple(X.shape)} and {tuple(rate.shape)}"
        )
    if C.dtype not in (torch.float32, torch.float64) or X.dtype != C.dtype or rate.dtype != C.dtype:
        dtypes = f"{C.dtype}, {X.dtype} and {rate.dtype}"
        raise TypeError(f"ema_syrk_ takes C, X and rate of one dtype, float32 or float64, got {dtypes}")
    _ema_syrk(C, X, rate)
    return C

"""New symmetric products: Gram matrices, and products of symmetric matrices that commute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondorder_kernels.dispatch import Operation, Path
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.products import mixable, product_kind
from secondorder_kernels.reference import products as reference

_WHOLE_UP_TO = 128  # dimension of a tile that is not halved
_HALVINGS = 3

Scale = float | Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _halves(Y: Tensor, X: Tensor, halvings: int = _HALVINGS) -> Tensor:
    """`Y Xᵀ`, known to be symmetric: tiles below the diagonal, mirrored; with three halvings 0.56 of the work."""
    d = X.shape[1]
    if d <= _WHOLE_UP_TO or halvings == 0:
        return reference.whole(Y, X)
    first, last = slice(d // 2), slice(d // 2, d)
    below = reference.whole(Y[:, last], X[:, first])
    upper = torch.cat([_halves(Y[:, first], X[:, first], halvings - 1), below.mT], 2)
    return torch.cat([upper, torch.cat([below, _halves(Y[:, last], X[:, last], halvings - 1)], 2)], 1)


def _gram_by_halves(
    X: Tensor,
    *,
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
    weight: Tensor | None = None,
    ones: bool = False,
) -> Tensor:
    return reference.scaled(reference.sums(X, weight, ones, _halves), scale, scale_tensor)


def _halves_refuse(X: Tensor, **options: Any) -> str | None:
    _, d, m = X.shape
    # On one CPU core 0.65 to 0.85 of the time from m = d on, at m = d / 10 more than the whole product takes.
    if X.device.type != "cpu" or d <= _WHOLE_UP_TO or 2 * m < d:
        return f"halves are for a CPU, dimensions above {_WHOLE_UP_TO} and at least half as many columns"
    return None


def _gram_tensors(X: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    return X, options.get("scale_tensor"), options.get("weight")


def _gram_shape(X: Tensor, *, weight: Tensor | None = None, ones: bool = False, **scales: Any) -> Shape:
    n, d, m = X.shape
    return product_kind(X, weight), (n, d + ones, m)


def _gram_fake(X: Tensor, *, ones: bool = False, **options: Any) -> Tensor:
    n, d, _ = X.shape
    rows = d + int(ones)  # a symbolic size takes no bool
    return X.new_empty(n, rows, rows)


_gram = Operation(
    reference.gram,
    lambda device: (torch.zeros(2, 64, 64, device=device),),
    (
        triton_path("gram", "syrk:gram", tensors=_gram_tensors, shape=_gram_shape),
        Path("halves", run=_gram_by_halves, refuses=_halves_refuse),
    ),
    schema="(Tensor X, *, float scale=1.0, Tensor? scale_tensor=None, Tensor? weight=None, bool ones=False) -> Tensor",
    fake=_gram_fake,
)


def gram(X: Tensor, *, scale: Scale = 1.0, weight: Tensor | None = None, ones: bool = False) -> Tensor:
    """Return Gram matrices `scale X diag(weight) Xᵀ`.

    Bitwise symmetric where Triton's kernel is taken, up to the last bits elsewhere. The precision of float32 products
    follows `torch.get_float32_matmul_precision()`; with `weight` all products are float32 products.

    Args:
        X: Matrices, shape `(n, d, m)` with any strides; floating point. Half precision is accumulated in float32.
        scale: A number, or one per matrix, shape `(n,)`, in float32, or in float64 if `X` is.
        weight: Of the columns of X, shape `(n, m)`, in the dtype of a scale: 0 takes a column out.
        ones: X is seen with a last row of ones more: the last column of the result is X weight, its corner the sum of
            the weights. The bias of a layer.

    Returns:
        `(n, d, d)`, with `ones` `(n, d + 1, d + 1)`, in the dtype of `X`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes do not.
    """
    of_scale = scale.shape if isinstance(scale, Tensor) else X.shape[:1]
    of_weight = (*X.shape[:1], *X.shape[2:]) if weight is None else weight.shape
    if X.ndim != 3 or of_scale != X.shape[:1] or of_weight != (X.shape[0], X.shape[2]):
        raise ValueError(
            "gram takes X (n, d, m), scale (n,) or a number and weight (n, m), "
            f"got {tuple(X.shape)}, {tuple(of_scale)} and {tuple(of_weight)}"
        )
    options: dict[str, Any] = {"scale_tensor": scale} if isinstance(scale, Tensor) else {}
    if weight is not None:
        options["weight"] = weight
    if not X.dtype.is_floating_point or any(t.dtype != _wide(X.dtype) for t in options.values()):
        dtypes = ", ".join(str(t.dtype) for t in (X, *options.values()))
        raise TypeError(f"gram takes floating-point X, and scale and weight in float32, or float64 as X, got {dtypes}")
    if not isinstance(scale, Tensor) and scale != 1:
        options["scale"] = scale
    if ones:
        options["ones"] = ones
    result: Tensor = _gram(X, **options)
    return result


def _add_gram_example(device: torch.device) -> tuple[Tensor, ...]:
    return torch.zeros(2, 64, 64, device=device), torch.zeros(2, 64, 64, device=device), torch.zeros(2, device=device)


_add_gram = Operation(
    reference.add_gram_,
    _add_gram_example,
    (
        triton_path(
            "add_gram_",
            "syrk:add_gram_",
            tensors=lambda C, X, scale: (C, X, scale),
            shape=lambda C, X, scale: (product_kind(X), tuple(X.shape)),
        ),
    ),
    schema="(Tensor(a!) C, Tensor X, Tensor scale) -> ()",
)


def add_gram_(C: Tensor, X: Tensor, scale: Tensor) -> Tensor:
    """Add Gram matrices: C ← C + scale X Xᵀ.

    Where the scale is 0, C keeps its bits, as long as X Xᵀ is finite. Triton's kernel reads one triangle of C and
    leaves both bitwise equal. The precision of float32 products follows `torch.get_float32_matmul_precision()`.

    Args:
        C: Symmetric matrices, shape `(n, d, d)` with any strides, float32 or float64; changed in place.
        X: Matrices, shape `(n, d, m)` with any strides, in the dtype of `C`, or of half precision beside float32.
        scale: One per matrix, shape `(n,)`, in the dtype of `C`.

    Returns:
        `C`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes do not.
    """
    if X.ndim != 3 or C.shape != (X.shape[0], X.shape[1], X.shape[1]) or scale.shape != X.shape[:1]:
        raise ValueError(
            "add_gram_ takes C (n, d, d), X (n, d, m) and scale (n,), "
            f"got {tuple(C.shape)}, {tuple(X.shape)} and {tuple(scale.shape)}"
        )
    if C.dtype not in (torch.float32, torch.float64) or not mixable(C.dtype, X.dtype) or scale.dtype != C.dtype:
        raise TypeError(
            "add_gram_ takes C, X and scale of one dtype, float32 or float64, X may be of half precision; "
            f"got {C.dtype}, {X.dtype} and {scale.dtype}"
        )
    _add_gram(C, X, scale)
    return C


def _symmetric_product_tensors(A: Tensor, B: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    return A, B, options.get("C")


def _symmetric_product_shape(A: Tensor, B: Tensor, **options: Any) -> Shape:
    # Symmetric matrices may be read along either axis.
    return product_kind(A.mT if A.stride(1) == 1 else A), tuple(A.shape[:2])


_symmetric_product = Operation(
    reference.symmetric_product,
    lambda device: (torch.zeros(2, 64, 64, device=device), torch.zeros(2, 64, 64, device=device)),
    (
        triton_path(
            "symmetric_product",
            "symmetric_product:symmetric_product",
            tensors=_symmetric_product_tensors,
            shape=_symmetric_product_shape,
        ),
    ),
    schema="(Tensor A, Tensor B, *, float alpha=1.0, Tensor? C=None, float beta=0.0, float diagonal=0.0) -> Tensor",
    fake=lambda A, B, **options: A.new_empty(A.shape),
)


def symmetric_product(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    C: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Return `alpha A B + beta C + diagonal I` for symmetric matrices of which A and B commute.

    So the result is symmetric too, and Triton's kernel makes one triangle of it, with half of the work; what it reads
    of A and B may be either triangle. Newton's iterations for roots consist of such products. The precision of
    float32 products follows `torch.get_float32_matmul_precision()`.

    Args:
        A: Symmetric matrices, shape `(n, d, d)` with any strides; floating point. Half precision is accumulated in
            float32.
        B: Symmetric matrices that commute with those of A, shape and dtype of `A`.
        alpha: Of the product.
        C: Symmetric matrices, shape and dtype of `A`; not read if `beta` is 0.
        beta: Of `C`.
        diagonal: Added to the diagonal.

    Returns:
        `(n, d, d)` in the dtype of `A`.

    Raises:
        ValueError: If the shapes are not one shape `(n, d, d)`.
        TypeError: If dtypes differ.
    """
    given = (A, B) if C is None else (A, B, C)
    if A.ndim != 3 or A.shape[1] != A.shape[2] or any(t.shape != A.shape for t in given):
        raise ValueError(
            "symmetric_product takes A, B and C of one shape (n, d, d), "
            f"got {', '.join(str(tuple(t.shape)) for t in given)}"
        )
    if not A.dtype.is_floating_point or any(t.dtype != A.dtype for t in given):
        raise TypeError(
            "symmetric_product takes A, B and C of one floating-point dtype, "
            f"got {', '.join(str(t.dtype) for t in given)}"
        )
    options: dict[str, Any] = {"alpha": alpha, "beta": beta, "diagonal": diagonal}
    result: Tensor = _symmetric_product(A, B, C=C if beta else None, **options)
    return result

"""Differential operators of a model in its inputs.

    x (N, d)   u = model(x) (N, *M)   D_v u = <v, grad u>   L u = Σ_rs C_rs D_{v_r} D_{v_s} u

`model` is any callable of `x` whose samples do not interact; M is whatever it returns per sample, `(N,)` or `(N, M)`
for most. R directions cost about R + 2 evaluations, in the model's own precision (float32 or float64). Results are
differentiable in the parameters, in coefficients, and in `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secondorder.taylor.axes import constant
from secondorder.taylor.jet import Jet, Space

Model: TypeAlias = Callable[[Any], Any]


def value(model: Model, x: Tensor) -> Tensor:
    """`u = model(x)`, beside the other operators.

    Args:
        model: Callable of `(N, d)`.
        x: Points, `(N, d)`.

    Returns:
        u `(N, *M)`.
    """
    _check_points(x)
    return model(x)


def gradient(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients in the inputs. Costs d + 1 evaluations, whatever the number of outputs.

    Args:
        model: Callable of `(N, d)`.
        x: Points, `(N, d)`.

    Returns:
        u `(N, *M)` and du `(N, d, *M)`, `du[n, i] = ∂_i u(x_n)`.

    Raises:
        TypeError: If the model uses a function without a Taylor rule.
        ValueError: If `x` is not `(N, d)`.
    """
    _check_points(x)
    out = _run(model, x, _coordinates(x, range(x.shape[1])), Space(order=1))
    return out.value, out.first


def laplacian(
    model: Model, x: Tensor, weights: Tensor | None = None, coordinates: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """`Σ_i w_i ∂_ii u`, the Laplacian where there are no weights: the forward Laplacian.

    Args:
        model: Callable of `(N, d)`.
        x: Points, `(N, d)`.
        weights: Of the coordinates, `(d,)` or per sample `(N, d)`, of any sign; of the chosen ones where `coordinates`
            are given. Default: ones.
        coordinates: Those that are summed over, such as `[1, 2]` for space in `x = (t, x, y)`. Default: all.

    Returns:
        u `(N, *M)` and the sum `(N, *M)`.

    Raises:
        TypeError: If the model uses a function without a Taylor rule.
        ValueError: If a shape is wrong, or a coordinate not one of 0 to d - 1, or given twice.

    Li et al., *A computational framework for neural network-based variational Monte Carlo with Forward Laplacian*
    (2023, arXiv:2307.08214).
    """
    _check_points(x)
    d = x.shape[1]
    chosen = range(d) if coordinates is None else coordinates
    if len(set(chosen)) != len(chosen) or not all(0 <= i < d for i in chosen) or not len(chosen):
        raise ValueError(f"coordinates must be different ones of 0 to {d - 1}, got {list(chosen)}")
    _check_weights(x, weights, len(chosen))
    out = _run(model, x, _coordinates(x, chosen), Space(order=2, weights=weights))
    return out.value, out.second


def value_gradient_laplacian(model: Model, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and the weighted Laplacian in one pass, for operators with terms of first and second order.

    The heat equation in `x = (t, y, z)`: `weights = (0, 1, 1)`, residual `du[:, 0] - lap`.

    Args:
        model: Callable of `(N, d)`.
        x: Points, `(N, d)`.
        weights: Of the second derivatives, `(d,)` or `(N, d)`. Default: ones.

    Returns:
        u `(N, *M)`, du `(N, d, *M)` and `Σ_i w_i ∂_ii u` `(N, *M)`.

    Raises:
        TypeError: If the model uses a function without a Taylor rule.
        ValueError: If a shape is wrong.
    """
    _check_points(x)
    _check_weights(x, weights, x.shape[1])
    out = _run(model, x, _coordinates(x, range(x.shape[1])), Space(order=2, weights=weights))
    return out.value, out.first, out.second


def second_order(
    model: Model, x: Tensor, matrix: Tensor | None = None, *, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`Σ_ij c_ij ∂_ij u` with `c` the matrix, or `c = Σ_r v_r v_rᵀ`.

    Vectors cost R + 2 evaluations and are the better choice where c has low rank; a matrix costs d + 2, and d times
    more work in element-wise functions and products.

    Args:
        model: Callable of `(N, d)`.
        x: Points, `(N, d)`.
        matrix: `(d, d)` or per sample `(N, d, d)`; need not be definite, and only its symmetric part counts.
        vectors: `(R, d)` or per sample `(N, R, d)`, in place of the matrix.

    Returns:
        u `(N, *M)` and the sum `(N, *M)`.

    Raises:
        TypeError: If the model uses a function without a Taylor rule.
        ValueError: If a shape is wrong, or not exactly one of `matrix` and `vectors` is given.
    """
    _check_points(x)
    n, d = x.shape
    if (matrix is None) == (vectors is None):
        raise ValueError("second_order takes either matrix or vectors")
    if matrix is not None:
        if matrix.shape not in ((d, d), (n, d, d)):
            raise ValueError(f"matrix must be ({d}, {d}) or ({n}, {d}, {d}), got {tuple(matrix.shape)}")
        space = Space(order=2, weights=(matrix + matrix.mT) / 2, matrix=True)
        out = _run(model, x, _coordinates(x, range(d)), space)
        return out.value, out.second
    assert vectors is not None
    if vectors.dim() not in (2, 3) or vectors.shape[-1] != d or (vectors.dim() == 3 and vectors.shape[0] != n):
        raise ValueError(f"vectors must be (R, {d}) or ({n}, R, {d}), got {tuple(vectors.shape)}")
    out = _run(model, x, vectors.expand(n, *vectors.shape[-2:]), Space(order=2))
    return out.value, out.second


def biharmonic(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """`Δ²u = Σ_ij ∂_iijj u` as the Laplacian of the Laplacian, each by collapsed Taylor mode.

    Costs about (d + 2)² evaluations; directional fourth derivatives, which the Griewank-Utke-Walther formula combines
    from d² directions, would cost 3 d² + 2.

    Args:
        model: Callable of `(N, d)`, four times differentiable.
        x: Points, `(N, d)`.

    Returns:
        u `(N, *M)` and Δ²u `(N, *M)`.

    Raises:
        TypeError: If the model uses a function without a Taylor rule.
        ValueError: If `x` is not `(N, d)`.
    """
    _check_points(x)
    kept: list[Any] = []

    def inner(points: Tensor) -> Tensor:
        u, lap = laplacian(model, points)
        kept.append(u.value if isinstance(u, Jet) else u)
        return lap

    result = laplacian(inner, x)[1]
    return kept[0], result


def laplacian_estimate(
    model: Model,
    x: Tensor,
    samples: int,
    generator: torch.Generator | None = None,
    distribution: str = "rademacher",
) -> tuple[Tensor, Tensor]:
    """Unbiased estimate of the Laplacian, `1/S Σ_s v_sᵀ H v_s`, from S random directions per sample: S + 2 evaluations.

    With H the Hessian of one output at one point, the variance is exactly

        Rademacher (entries ±1)    2/S (‖H‖_F² - Σ_i H_ii²)
        Gaussian                   2/S ‖H‖_F²

    so that Rademacher directions are exact where H is diagonal. Directions are drawn independently for all samples.
    The mean of *squared* residuals is biased by the residuals' variance; for an unbiased gradient multiply residuals of
    two independent estimates. Hutchinson, *A stochastic estimator of the trace of the influence matrix* (1989).

    Args:
        model: Callable of `(N, d)`.
        x: Points, `(N, d)`.
        samples: S, at least 1.
        generator: Of the random numbers, on the device of `x`. Default: torch's global one.
        distribution: "rademacher" or "gaussian".

    Returns:
        u `(N, *M)`, exact, and the estimate `(N, *M)`.

    Raises:
        TypeError: If the model uses a function without a Taylor rule.
        ValueError: If a shape, `samples` or `distribution` is not one of those allowed.
    """
    _check_points(x)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    n, d = x.shape
    if distribution == "rademacher":
        directions = torch.randint(2, (n, samples, d), generator=generator, dtype=x.dtype, device=x.device) * 2 - 1
    elif distribution == "gaussian":
        directions = torch.randn((n, samples, d), generator=generator, dtype=x.dtype, device=x.device)
    else:
        raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {distribution!r}")
    u, total = second_order(model, x, vectors=directions)
    return u, total / samples


def _run(model: Model, x: Any, directions: Any, space: Space) -> Jet:  # directions (N, R, d)
    out = model(Jet(x, directions, None, space))
    if not space.owns(out):
        if not isinstance(out, (Tensor, Jet)):
            raise TypeError(f"the model must return one tensor, got {type(out).__name__}")
        out = constant(space, Jet(x, directions, None, space), out)  # it does not depend on x
    if out.shape[:1] != x.shape[:1]:
        raise ValueError(f"the model must keep the {x.shape[0]} samples in axis 0, got shape {tuple(out.shape)}")
    if out.second is None and space.order == 2:
        out.second = torch.zeros_like(out.value)
    return out


def _coordinates(x: Any, chosen: Sequence[int]) -> Tensor:
    rows = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if list(chosen) != list(range(x.shape[1])):
        rows = rows[list(chosen)]
    return rows.expand(x.shape[0], *rows.shape)  # one copy for all samples: the first linear map sees it


def _check_points(x: Any) -> None:
    if not isinstance(x, (Tensor, Jet)):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point of shape (N, d), got {x.dtype} {tuple(x.shape)}")


def _check_weights(x: Any, weights: Any, R: int) -> None:
    if weights is not None and tuple(weights.shape) not in ((R,), (x.shape[0], R)):
        raise ValueError(f"weights must be ({R},) or ({x.shape[0]}, {R}), got {tuple(weights.shape)}")

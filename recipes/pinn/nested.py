"""Differential operators as textbooks write them: `torch.autograd.grad` of `torch.autograd.grad`.

The functions of `secondorder.taylor` that problems use, with the same arguments and results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def gradient(u: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """u (N, 1) and its gradient (N, d, 1)."""
    x = _differentiable(x)
    value = u(x)
    return value, _gradient(value, x)[:, :, None]


def laplacian(u: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """u and Δu, both (N, 1)."""
    value, _, second = value_gradient_laplacian(u, x)
    return value, second


def value_gradient_laplacian(u: Function, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """u (N, 1), its gradient (N, d, 1) and `Σ_i w_i ∂_ii u` (N, 1), w of shape (d,)."""
    x = _differentiable(x)
    weights = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if weights is None else weights
    value = u(x)
    first = _gradient(value, x)
    second = [w * _gradient(first[:, i], x)[:, i] for i, w in enumerate(weights) if w != 0]
    return value, first[:, :, None], torch.stack(second).sum(0)[:, None]


def biharmonic(u: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """u and Δ²u, both (N, 1)."""
    x = _differentiable(x)
    return u(x), laplacian(lambda points: laplacian(u, points)[1], x)[1]


def _differentiable(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """Of every sample's value in its own inputs; samples do not interact."""
    return torch.autograd.grad(value.sum(), x, create_graph=True)[0]

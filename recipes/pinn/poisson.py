"""Poisson's equation on the unit cube, -Δu = f, with the solution's values on its faces.

The problems of Dangel et al. (2024, arXiv:2405.15603), targets in float32 as theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pinn.problem import PI, Points, Problem, Residuals, on_cube_faces, with_values


@dataclass(frozen=True)
class Poisson(Problem):
    """-Δu = f on [0, 1]^d."""

    d: int
    u: Callable[[Tensor], Tensor]
    f: Callable[[Tensor], Tensor]

    @property
    def title(self) -> str:
        return f"Poisson, {self.d} dimensions"

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(f"x{i}" for i in range(1, self.d + 1))

    @property
    def box(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1.0),) * self.d

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        x, f = with_values(torch.rand(interior, self.d, generator=generator), self.f)
        edge, g = with_values(on_cube_faces(boundary, self.d, generator), self.u)
        return {"x": x, "f": f, "edge": edge, "g": g}

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        _, laplacian = operators.laplacian(u, points["x"])
        return {"pde": laplacian + points["f"], "boundary": u(points["edge"]) - points["g"]}

    def solution(self, x: Tensor) -> Tensor:
        return self.u(x)


def _sines(x: Tensor) -> Tensor:
    return torch.sin(PI * x).prod(1, keepdim=True)


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(PI * x).sum(1, keepdim=True)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True)


POISSON2D = Poisson(2, _sines, lambda x: 2 * PI**2 * _sines(x))
POISSON5D = Poisson(5, _cosines, lambda x: PI**2 * _cosines(x))
POISSON100D = Poisson(100, _square, lambda x: torch.full_like(x[:, :1], -200.0))

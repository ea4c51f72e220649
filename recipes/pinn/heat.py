"""The heat equation in the unit cube, u_t = ¼ Δu, with the solution's values at t = 0 and on the faces.

The problems of Dangel et al. (2024, arXiv:2405.15603), targets in float32 as theirs; both conditions are one term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pinn.problem import PI, Points, Problem, Residuals, on_cube_faces, with_values

KAPPA = 0.25


@dataclass(frozen=True)
class Heat(Problem):
    """u_t = ¼ Δu in (t, x), t in [0, 1], x in [0, 1]^d."""

    d: int
    u: Callable[[Tensor], Tensor]

    @property
    def title(self) -> str:
        return f"heat, {self.d}+1 dimensions"

    @property
    def axes(self) -> tuple[str, ...]:
        return ("t", *(f"x{i}" for i in range(1, self.d + 1)))

    @property
    def box(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1.0),) * (self.d + 1)

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        x = torch.rand(interior, self.d + 1, generator=generator).double()
        half = boundary // 2
        times = torch.rand(half, 1, generator=generator)
        faces = torch.cat([times, on_cube_faces(half, self.d, generator)], 1)
        start = torch.cat([torch.zeros(half, 1), torch.rand(half, self.d, generator=generator)], 1)
        edge, g = with_values(torch.cat([faces, start]), self.u)
        return {"x": x, "edge": edge, "g": g}

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        x = points["x"]
        weights = torch.tensor([0.0] + [KAPPA] * self.d, dtype=x.dtype, device=x.device)
        _, first, diffusion = operators.value_gradient_laplacian(u, x, weights)
        return {"pde": first[:, 0] - diffusion, "conditions": u(points["edge"]) - points["g"]}

    def solution(self, x: Tensor) -> Tensor:
        return self.u(x)


def _decaying_sines(x: Tensor) -> Tensor:
    t, s = x[:, :1], x[:, 1:]
    return torch.exp(-KAPPA * PI**2 * s.shape[1] * t) * torch.sin(PI * s).prod(1, keepdim=True)


def _sum_of_sines(x: Tensor) -> Tensor:
    return torch.exp(-x[:, :1]) * torch.sin(2 * x[:, 1:]).sum(1, keepdim=True)


HEAT1D = Heat(1, _decaying_sines)
HEAT4D = Heat(4, _sum_of_sines)

"""The Fokker-Planck equation of an Ornstein-Uhlenbeck process, for the logarithm of its density: not linear.

    dX = -½ X dt + √2 dW      p_t = ½ ∇·(x p) + Δp      q = log p:  q_t = ½ d + ½ x·∇q + Δq + |∇q|²

From N(0, I) the density stays that of N(0, (2 - e^-t) I). Dangel et al. (2024, arXiv:2405.15603) have it in 9
dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pinn.problem import PI, Points, Problem, Residuals

REACH = 5.0


@dataclass(frozen=True)
class FokkerPlanck(Problem):
    """log p in (t, x), t in [0, 1], x in [-5, 5]^d."""

    d: int

    @property
    def title(self) -> str:
        return f"log-Fokker-Planck, {self.d}+1 dimensions"

    @property
    def axes(self) -> tuple[str, ...]:
        return ("t", *(f"x{i}" for i in range(1, self.d + 1)))

    @property
    def box(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1.0), *((-REACH, REACH),) * self.d)

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        x, start = self.inside(interior, generator), self.inside(boundary, generator)
        start[:, 0] = 0.0
        return {"x": x, "start": start, "g": self.solution(start)}

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        x = points["x"]
        weights = torch.tensor([0.0] + [1.0] * self.d, dtype=x.dtype, device=x.device)
        _, first, diffusion = operators.value_gradient_laplacian(u, x, weights)
        drift = (first[:, 1:, 0] * x[:, 1:]).sum(1, keepdim=True)
        squares = first[:, 1:, 0].square().sum(1, keepdim=True)
        return {
            "pde": first[:, 0] - 0.5 * self.d - 0.5 * drift - diffusion - squares,
            "initial": u(points["start"]) - points["g"],
        }

    def solution(self, x: Tensor) -> Tensor:
        variance = 2 - torch.exp(-x[:, :1])
        square = x[:, 1:].square().sum(1, keepdim=True)
        return -0.5 * self.d * torch.log(2 * PI * variance) - square / (2 * variance)

"""An inverse problem: how fast something drifts and spreads, from noisy measurements of it.

    u_t + velocity u_x = diffusivity u_xx      u(t, x) = exp(-π² diffusivity t) sin(π (x - velocity t))

No condition is given but the measurements, with noise of 1 % of the largest value; they are the same for all seeds.
Both coefficients are parameters of the model, beside the network's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pinn.problem import PI, Points, Problem, Residuals, layers

VELOCITY, DIFFUSIVITY = 0.7, 0.05
NOISE = 0.01


class Coefficients(nn.Sequential):
    """A network with the two coefficients that are sought; both begin at 0.3."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.velocity = nn.Parameter(torch.tensor(0.3))
        self.diffusivity = nn.Parameter(torch.tensor(0.3))


class Transport(Problem):
    """Transport in (t, x), t in [0, 1], x in [-1, 1]."""

    title = "transport with unknown coefficients"
    axes = ("t", "x")
    box = ((0.0, 1.0), (-1.0, 1.0))

    def network(self, widths: tuple[int, ...]) -> nn.Module:
        return Coefficients(*layers((2, *widths, 1))).double()

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        laboratory = torch.Generator().manual_seed(0)
        where = self.inside(boundary, laboratory)
        noise = torch.randn(boundary, 1, generator=laboratory).double()
        return {"x": self.inside(interior, generator), "where": where, "u": self.solution(where) + NOISE * noise}

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        x, sought = points["x"], getattr(u, "module", u)  # behind a wrapper of DDP
        weights = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        _, first, second = operators.value_gradient_laplacian(u, x, weights)
        return {
            "pde": first[:, 0] + sought.velocity * first[:, 1] - sought.diffusivity * second,
            "measurements": u(points["where"]) - points["u"],
        }

    def solution(self, x: Tensor) -> Tensor:
        t, s = x[:, :1], x[:, 1:]
        return torch.exp(-(PI**2) * DIFFUSIVITY * t) * torch.sin(PI * (s - VELOCITY * t))

    def coefficient_errors(self, u: Any) -> dict[str, Tensor]:
        """Relative errors of the coefficients."""
        return {
            "velocity_error": (u.velocity / VELOCITY - 1).abs(),
            "diffusivity_error": (u.diffusivity / DIFFUSIVITY - 1).abs(),
        }

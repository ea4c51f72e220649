"""Burgers' equation with little viscosity: a sine steepens into a front of width ν.

    u_t + u u_x = ν u_xx,  ν = 0.01/π      u(0, x) = -sin(πx)      u(t, ±1) = 0

The standard test of physics-informed networks (Raissi, Perdikaris and Karniadakis 2019). Its solution is, by Cole and
Hopf, a ratio of two Gaussian integrals,

    u(t, x) = -∫ sin(π y) w(y) dy / ∫ w(y) dy,  w = exp(-cos(π y) / (2πν)),  y = x - √(4νt) z,  z ~ exp(-z²)

which are taken by Gauss-Hermite quadrature: Basdevant et al. (1986), *Spectral and finite difference solutions of the
Burgers equation*. With 160 nodes it is exact to rounding for t up to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pinn.problem import PI, Points, Problem, Residuals

VISCOSITY = 0.01 / PI
NODES = 160


class Burgers(Problem):
    """Burgers' equation in (t, x), t in [0, 1], x in [-1, 1]."""

    title = "Burgers"
    axes = ("t", "x")
    box = ((0.0, 1.0), (-1.0, 1.0))

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        x, start, edge = (self.inside(n, generator) for n in (interior, boundary - boundary // 2, boundary // 2))
        start[:, 0] = 0.0
        edge[:, 1] = edge[:, 1].sign()
        return {"x": x, "start": start, "g": -torch.sin(PI * start[:, 1:]), "edge": edge}

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        x = points["x"]
        weights = torch.tensor([0.0, VISCOSITY], dtype=x.dtype, device=x.device)
        value, first, diffusion = operators.value_gradient_laplacian(u, x, weights)
        return {
            "pde": first[:, 0] + value * first[:, 1] - diffusion,
            "initial": u(points["start"]) - points["g"],
            "boundary": u(points["edge"]),
        }

    def solution(self, x: Tensor) -> Tensor:
        nodes, weights = (torch.from_numpy(part).to(x) for part in np.polynomial.hermite.hermgauss(NODES))
        y = x[:, 1:] - torch.sqrt(4 * VISCOSITY * x[:, :1]) * nodes  # (N, NODES)
        share = torch.softmax(-torch.cos(PI * y) / (2 * PI * VISCOSITY) + torch.log(weights), dim=1)
        return -(share * torch.sin(PI * y)).sum(1, keepdim=True)

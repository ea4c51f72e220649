"""A simply supported plate under a sinusoidal load: the biharmonic equation, of fourth order.

    Δ²u = 4 π⁴ f,  f = sin(πx) sin(πy)      u = Δu = 0 on the edges of the unit square      u = f

Residuals are divided by the scales of their derivatives, 4 π⁴ and 2 π²: as they stand, the loss would be all load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pinn.problem import PI, Points, Problem, Residuals, on_cube_faces


class Plate(Problem):
    """Deflection of a plate."""

    title = "biharmonic plate"
    axes = ("x", "y")
    box = ((0.0, 1.0), (0.0, 1.0))

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        x = self.inside(interior, generator)
        return {"x": x, "f": self.solution(x), "edge": on_cube_faces(boundary, 2, generator).double()}

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        _, load = operators.biharmonic(u, points["x"])
        deflection, moment = operators.laplacian(u, points["edge"])
        return {"pde": load / (4 * PI**4) - points["f"], "deflection": deflection, "moment": moment / (2 * PI**2)}

    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(PI * x).prod(1, keepdim=True)

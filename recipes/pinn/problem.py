"""What a problem is: an equation on a box, conditions, and a solution that is known.

    residuals(u, points, operators)    by name; all are zero for the solution
    loss = ½ Σ_t mean(residual_t²)     what `secondorder.least_squares` makes of them

Residuals are written with differential operators, of which there are two sets with the same functions: the module
`secondorder.taylor`, and `pinn.nested`, the textbook's nested calls of `torch.autograd.grad`.

Points are drawn in float32 and cast to float64, as the experiments do that this is compared with (Dangel et al. 2024,
arXiv:2405.15603): with a generator that a seed and the network's initialisation have brought to the same place, they
are the same points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PI = math.pi
Points = dict[str, Tensor]  # points (N, d) and what is known there (N, 1), by name
Residuals = dict[str, Tensor]  # (N, 1), by name


class Problem:
    """An equation for u(x), x in a box of R^d. Subclasses say which.

    Attributes:
        title: For pictures.
        axes: Names of the inputs, d of them.
        box: Their ranges.
    """

    title: ClassVar[str] | str
    axes: tuple[str, ...]
    box: tuple[tuple[float, float], ...]

    def network(self, widths: tuple[int, ...]) -> nn.Module:
        """A freshly initialised network d - widths - 1; drawn in float32, computing in float64."""
        return nn.Sequential(*layers((len(self.axes), *widths, 1))).double()

    def draw(self, interior: int, boundary: int, generator: torch.Generator) -> Points:
        """Points for all residuals: so many inside of the domain, and so many for conditions on it."""
        raise NotImplementedError

    def residuals(self, u: Any, points: Points, operators: Any) -> Residuals:
        """The residuals of a network, or of any function of points, by name."""
        raise NotImplementedError

    def solution(self, x: Tensor) -> Tensor:  # (N, d) -> (N, 1)
        """The exact solution, or a reference that is exact to rounding."""
        raise NotImplementedError

    def coefficient_errors(self, u: Any) -> dict[str, Tensor]:
        """Of what else is sought: relative errors by name."""
        return {}

    def inside(self, count: int, generator: torch.Generator) -> Tensor:  # (count, d), float64
        """Points spread uniformly over the box."""
        low, high = torch.tensor(self.box, dtype=torch.float64).T
        return low + (high - low) * torch.rand(count, len(self.axes), generator=generator).double()

    def slice(self, side: int) -> Tensor:  # (side², d), float64
        """A grid over the first two inputs; the others are in the middle of their ranges."""
        edges = [torch.linspace(*ends, side, dtype=torch.float64) for ends in self.box[:2]]
        x = torch.tensor(self.box, dtype=torch.float64).mean(1).repeat(side * side, 1)
        x[:, :2] = torch.cartesian_prod(*edges)
        return x


def layers(sizes: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers with tanh between them, in float32."""
    found: list[nn.Module] = []
    for d_in, d_out in zip(sizes, sizes[1:], strict=False):
        found += [nn.Linear(d_in, d_out, dtype=torch.float32), nn.Tanh()]
    return found[:-1]


def on_cube_faces(count: int, d: int, generator: torch.Generator) -> Tensor:  # (count, d), float32
    """Points on the faces of the unit cube, every face as likely as the others."""
    x = torch.rand(count, d, generator=generator)
    axis = torch.randint(0, d, (count,), generator=generator)
    x[torch.arange(count), axis] = torch.randint(0, 2, (count,), generator=generator).float()
    return x


def with_values(x: Tensor, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Points and values in float64, the values computed in the points' own precision before that."""
    return x.double(), f(x).double()

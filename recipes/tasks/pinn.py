"""Solve a differential equation with a network: physics-informed networks, by their residuals.

The problems are those of `recipes/pinn`; `train.batch_size` is the number of points inside of the domain. Everything is
in float64. Optimizers are given the residuals, and the loss is half the sum of their mean squares.

`val/loss`, which is compared, is the relative L2 error of the solution, on points that are never trained on: the root
of mean squares over that of the solution. `val/l2_abs` is the error itself, a root of mean squares. `loss/<name>` are
the parts of the training loss.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

import pinn
from config import knob, require
from optimizer import secondorder
from pinn import nested, pictures
from pinn.points import Sampling, evaluation


@dataclass(frozen=True)
class Data:
    """The equation, and where its residuals are taken."""

    problem: str = knob("poisson2d", f"one of {', '.join(pinn.PROBLEMS)}")
    boundary: int = knob(120, "points for conditions, or measurements, beside train.batch_size inside of the domain")
    fresh: bool = knob(False, "new points at every step, not always the same")
    operators: Literal["taylor", "nested"] = knob(
        "taylor", "derivatives: collapsed Taylor mode, or nested calls of torch.autograd.grad"
    )

    def __post_init__(self) -> None:
        require(self.boundary >= 2, f"data.boundary must be >= 2, got {self.boundary}")


@dataclass(frozen=True)
class Model:
    """A multi-layer perceptron with tanh."""

    widths: tuple[int, ...] = knob((64,), "its hidden layers")

    def __post_init__(self) -> None:
        require(bool(self.widths), "model.widths must have at least one layer, got none")
        require(all(width >= 1 for width in self.widths), f"model.widths must be >= 1, got {self.widths}")


class Task:
    """Points, residuals at them, and the error of the solution."""

    samples_unit, units_per_sample = "points", 1
    measured = "relative L2 error"

    def __init__(self, data: Data, model: Model, seed: int) -> None:
        self.problem, self.data, self.widths, self.seed = pinn.load(data.problem), data, model.widths, seed
        self.operators = secondorder.taylor if data.operators == "taylor" else nested
        self.summary = f"{self.problem.title}; {'new' if data.fresh else 'the same'} points at every step"
        self.names = tuple(self._points(2, 0))
        self.fingerprint = hashlib.sha256(evaluation(self.problem, 64, seed)[1].numpy().tobytes()).hexdigest()

    def build_model(self) -> nn.Module:
        """A freshly initialised network; the caller has seeded torch."""
        return self.problem.network(self.widths)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        """All points of the step, `count` of them inside of the domain."""
        del first  # 0: the loop divides the points among processes
        return tuple(self._points(count, step).values())

    def validation(self, first: int, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Points `first` … `first + count - 1` of `total`, and the solution there."""
        x, u = self._evaluation(total)
        return x[first : first + count], u[first : first + count]

    def residuals(self, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The residuals by name, each (N, 1)."""
        return self.problem.residuals(model, dict(zip(self.names, batch, strict=True)), self.operators)

    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Mean squares of the error and of the solution; of coefficients that are sought, the errors."""
        x, u = batch
        means = {"error": (model(x) - u).square().mean(), "solution": u.square().mean()}
        return means | self.problem.coefficient_errors(model)

    def summarise(self, means: Mapping[str, float]) -> dict[str, float]:
        """What validation reports."""
        absolute = math.sqrt(means["error"])
        others = {name: value for name, value in means.items() if name not in ("error", "solution")}
        return {"loss": absolute / math.sqrt(means["solution"]), "l2_abs": absolute, **others}

    def draw(self, model: nn.Module, title: str, folder: Path) -> str:
        """Picture of the solution; returns where it is, or why it is not there."""
        return pictures.draw(self.problem, model, title, folder / "solution.png")

    def _points(self, interior: int, step: int) -> dict[str, Tensor]:
        return self._sampling(interior).at(step)

    @functools.lru_cache(maxsize=2)  # noqa: B019 -- a task lives as long as its process
    def _sampling(self, interior: int) -> Sampling:
        return Sampling(self.problem, self.widths, interior, self.data.boundary, self.seed, self.data.fresh)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _evaluation(self, total: int) -> tuple[Tensor, Tensor]:
        return evaluation(self.problem, total, self.seed)

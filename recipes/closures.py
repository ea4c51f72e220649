"""One step of an optimizer that is given a closure: residuals for ours, their loss for torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optimizer import secondorder


def step(opt: Any, residuals: Callable[[], dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Take a step that lowers half the sum of mean squares of the residuals.

    Args:
        opt: It may evaluate the closure several times.
        residuals: By name, at the parameters as they are; always at the same points.

    Returns:
        The loss before the step, and the part of each residual in it, all without a graph.
    """
    parts: dict[str, Tensor] = {}

    def evaluate() -> dict[str, Tensor]:
        found = residuals()
        if not parts:
            parts.update({name: secondorder.least_squares(**{name: r}).detach() for name, r in found.items()})
        return found

    def loss() -> Tensor:
        opt.zero_grad()
        with torch.enable_grad():
            value = secondorder.least_squares(**evaluate())
            value.backward()
        return value

    ours = type(opt).__module__.partition(".")[0] == "secondorder"
    before = opt.step(evaluate if ours else loss)
    return before.detach(), parts

"""Step sizes that look at the loss again: along a direction, from a few evaluations, and never upwards.

    L(θ + α d) over α = start · 2^k       bracket: double while the loss falls, else halve until it falls
    L(θ + α d) over α = 2^-30, …, 2^0     grid: the least of 31

A Gauss-Newton direction at tiny damping is far too long in the first steps (α near 2^-11) and exact in the last ones
(α = 1), so a search spans many octaves; but good step sizes of successive steps are within an octave or two, which is
why the bracket needs about three evaluations where the grid needs 31.

Both take the loss as a function of α and compare floats on the host; which α is next depends on the last loss. Several
processes take the same decisions only if `loss_at` gives all of them the same value (a loss reduced over ranks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

START = 2.0**-6  # of a first search, and after one that found nothing
SMALLEST, LARGEST = 2.0**-30, 2.0
GRID = tuple(2.0**k for k in range(-30, 1))


class Found(NamedTuple):
    """What a search found.

    Attributes:
        alpha: The step size; 0.0: no step size lowered the loss.
        loss: The loss there, a 0-dim tensor as `loss_at` gave it; at 0.0 the loss the search began with.
        evaluations: Calls of `loss_at`.
    """

    alpha: float
    loss: Tensor
    evaluations: int


def bracket(loss_at: Callable[[float], Tensor], loss: Tensor, start: float = START) -> Found:
    """Search among `start · 2^k`: double while the loss falls, else halve until it falls.

    A start that lowers the loss is doubled while that lowers it further; if already the first doubling does not, it is
    halved instead while that does. A start that does not lower the loss is halved until it does, and then while that
    lowers it further. On a convex loss along the line this ends at the best of all `start · 2^k` in range. A loss that
    is not finite counts as infinite. Three evaluations where the start was right.

    Args:
        loss_at: α -> loss at θ + α d, a 0-dim tensor; called once for every α that is tried, in the order of trial.
        loss: The loss at α = 0, computed as `loss_at` computes it: rounding decides about the last steps.
        start: The last step's α. What is not positive (the last search found nothing) begins at 2^-6; the rest is
            clamped to [2^-30, 2].

    Returns:
        The best α that was tried, its loss, which is below `loss` unless α is 0.0, and the number of evaluations.

    Raises:
        ValueError: If `start` is not finite.
    """
    if not math.isfinite(start):
        raise ValueError(f"start must be finite, got {start}")
    evaluations = 0

    def evaluate(alpha: float) -> tuple[float, float, Tensor]:
        nonlocal evaluations
        evaluations += 1
        value = loss_at(alpha)
        return _comparable(value), alpha, value

    def follow(best: tuple[float, float, Tensor], factor: float) -> tuple[float, float, Tensor]:
        """Multiply by the factor while the loss falls."""
        while SMALLEST <= best[1] * factor <= LARGEST:
            next_ = evaluate(best[1] * factor)
            if not next_[0] < best[0]:
                break
            best = next_
        return best

    none = (_comparable(loss), 0.0, loss)
    first = evaluate(min(max(start, SMALLEST), LARGEST) if start > 0 else START)
    if first[0] < none[0]:
        best = follow(first, 2.0)
        if best is first:
            best = follow(first, 0.5)
    else:
        best = first
        while not best[0] < none[0] and best[1] / 2 >= SMALLEST:
            best = evaluate(best[1] / 2)
        best = follow(best, 0.5) if best[0] < none[0] else none
    return Found(best[1], best[2], evaluations)


def grid(loss_at: Callable[[float], Tensor], loss: Tensor) -> Found:
    """The best of the 31 step sizes 2^-30, …, 2^0, and 0.0 if none lowers the loss; one read of the device.

    The search of the papers on energy natural gradients (Müller and Zeinhofer 2023, arXiv:2302.13163; Dangel et al.
    2024, arXiv:2405.15603), for reproducing them. Its evaluations cost several times the rest of a step.

    Args:
        loss_at: α -> loss at θ + α d, a 0-dim tensor.
        loss: The loss at α = 0.

    Returns:
        α, its loss, and 31 evaluations; of equal losses the smallest α.
    """
    values = [loss_at(alpha) for alpha in GRID]
    losses = torch.stack([loss.detach().reshape(()), *(value.detach().reshape(()) for value in values)])
    at = int(losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf).argmin())
    return Found((0.0, *GRID)[at], (loss, *values)[at], len(GRID))


def _comparable(loss: Tensor) -> float:
    value = float(loss)
    return value if math.isfinite(value) else math.inf

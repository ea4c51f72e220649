"""The learning rate's multiple at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from config import Schedule


def of(opt: torch.optim.Optimizer, schedule: Schedule) -> Schedule:
    """The schedule for an optimizer: one that looks for its step size keeps lr, a multiple of what it finds."""
    searches = any(opt.defaults.get(key) for key in ("line_search", "line_search_fn"))
    return replace(schedule, kind="constant", warmup=0) if searches else schedule


def factor(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """A function from the number of steps taken to the multiple of lr that the next one uses.

    Args:
        schedule: Kind, warm-up, and the last multiple.
        steps: Length of the run; the decay ends there.
    """

    def multiple(step: int) -> float:
        if step < schedule.warmup:
            return (step + 1) / schedule.warmup
        if schedule.kind == "constant":
            return 1.0
        done = min((step - schedule.warmup) / max(steps - 1 - schedule.warmup, 1), 1.0)
        left = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return schedule.final + (1.0 - schedule.final) * left

    return multiple

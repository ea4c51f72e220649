"""Where residuals are taken: the same points at every step, or new ones, a function of the seed and the step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pinn.problem import Points, Problem


class Sampling:
    """The points of every step.

    The first batch is drawn from where the initialisation of the network leaves the generator that was seeded for it,
    as in the experiments of arXiv:2405.15603; later ones have generators of their own.

    Args:
        problem: Whose points.
        widths: Of the network.
        interior: Points inside of the domain.
        boundary: Points for conditions.
        seed: Of the network.
        fresh: New points at every step, not those of the first.
    """

    def __init__(
        self, problem: Problem, widths: tuple[int, ...], interior: int, boundary: int, seed: int, fresh: bool
    ) -> None:
        self._problem, self._counts, self._seed, self._fresh = problem, (interior, boundary), seed, fresh
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            problem.network(widths)
            generator = torch.Generator()
            generator.set_state(torch.get_rng_state())
        self._first = problem.draw(interior, boundary, generator)

    def at(self, step: int) -> Points:
        """The points of a step, which are counted from 0."""
        if step == 0 or not self._fresh:
            return self._first
        return self._problem.draw(*self._counts, _generator(self._seed, step))


def evaluation(problem: Problem, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points that are never trained on (count, d), and the solution there (count, 1)."""
    x = problem.inside(count, _generator(seed, 0, 1))
    return x, problem.solution(x)


def _generator(*key: int) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed % 2**63)

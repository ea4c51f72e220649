"""Adaptive damping: two dampings compete in every step for the loss that their searches find.

    c, 10 c or c / 10        the last winner and one of its neighbours: above, until that loses, then below, and so on

The larger one wins only by more than a factor in the logarithm of the loss, up to `ADVANTAGE`: a step that is damped
more finds less loss where the problem is still curved, and then goes on slowly, in the few directions that are left to
it. Where the smaller damping achieves next to nothing, the better one wins.

Levenberg's and Marquardt's idea with a search in the place of the gain ratio, and with one more decomposition a step
in the place of a model; the matrix that is decomposed is the dearer part, and is there. Steps to relative L2 errors,
medians of four initializations (2-64-1; transport: 2-16-16-1 and two unknown coefficients); "-": not in 60

                          Poisson 1e-4 | 1e-6    heat 1e-3 | 1e-5    transport 1e-2
    constant, 1e-10       30 | 53                38.5 | 64.5         -
    two that compete      24 | 26                25 | 29             18.5
    the same, other       26 | 56                24 | 72             15.5 (two)
    initializations

A rule that moves one damping by the step size it led to was no faster than the constant, and did not solve transport.
The larger one winning whenever it finds less loss ends at 1e-5, and with a factor of 4 between neighbours transport is
not solved. The constants here were chosen on the first initializations, and twice looked at on two of the others.
"""

from __future__ import annotations

import math

STEP = 10.0  # between neighbours
MOST = 1e-2  # largest damping that is not the user's, relative to the mean eigenvalue of the kernel
ADVANTAGE = 3.0  # by what the logarithm of the loss must fall more
SLOW = 0.1  # a fall of that logarithm below which less advantage is needed


def rung(start: float, level: int, least: float) -> float:
    """The damping of a level: `start · 10^level`, between the smallest one and `MOST`, or a start above it.

    A start below the smallest one is that.
    """
    start = max(start, least)
    return min(max(start * STEP**level, least), max(MOST, start))


def larger_wins(before: float, smaller: float, larger: float) -> bool:
    """Which of two dampings is better by the losses that their steps reach.

    Args:
        before: The loss before the step.
        smaller: With the smaller damping.
        larger: With the larger one.
    """
    fall, falls = (_fall(before, after) for after in (smaller, larger))
    return falls > (1 + (ADVANTAGE - 1) * min(1.0, fall / SLOW)) * fall


def _fall(before: float, after: float) -> float:
    if not after < before:
        return 0.0
    return math.log(before / after) if after > 0 else math.inf

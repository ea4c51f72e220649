"""The points of a sweep: all of a grid, or random draws.

--sweep.optimizer.lr=1e-3,3e-3,1e-2       these values
--sweep.optimizer.betas=0.9,0.95;0.9,0.99 values that hold commas themselves are separated by semicolons
--sweep.optimizer.lr=1e-4..1e-1           with --random: log-uniform between the ends (whole numbers where both are)
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from errors import RecipeError

Point = dict[str, str]
TRIES = 100  # draws per point before a space of few values counts as exhausted
EDGE = 0.1  # a value in this outer part of a range (of its logarithm) lies at the edge


@dataclass(frozen=True)
class Axis:
    """One swept key: its values, or the ends of its range."""

    key: str
    values: tuple[str, ...]
    ends: tuple[float, float] | None = None
    whole: bool = False

    def draw(self, generator: random.Random) -> str:
        """One value."""
        if self.ends is None:
            return generator.choice(self.values)
        low, high = self.ends
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        return str(round(value)) if self.whole else f"{value:.3g}"

    def at_edge(self, value: str) -> bool:
        """Whether better values may lie beyond: it is the least or the largest number of several."""
        if self.ends is not None:
            low, high = map(math.log, self.ends)
            return min(math.log(float(value)) - low, high - math.log(float(value))) <= EDGE * (high - low)
        numbers = [number(one) for one in self.values]
        if len(numbers) < 2 or any(one is None for one in numbers):
            return False
        return number(value) in (min(numbers), max(numbers))  # type: ignore[type-var]


def number(text: str) -> float | None:
    """The text as a number, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def axis(key: str, text: str) -> Axis:
    """An axis from the command line.

    Raises:
        RecipeError: There are no values, or the range's ends are not positive and in order.
    """
    ends = re.fullmatch(r"(\S+?)\.\.(\S+)", text.strip())
    if ends:
        low, high = (number(end) for end in ends.groups())
        if low is None or high is None or not 0 < low < high < math.inf:
            raise RecipeError(f"--sweep.{key}: expected LOW..HIGH with 0 < LOW < HIGH, got {text!r}")
        return Axis(key, (), (low, high), all(end.isdigit() for end in ends.groups()))
    values = [value.strip() for value in text.split(";" if ";" in text else ",")]
    values = list(dict.fromkeys(value for value in values if value))
    if not key or not values:
        raise RecipeError(f"--sweep: expected --sweep.KEY=VALUE,VALUE or --sweep.KEY=LOW..HIGH, got '{key}={text}'")
    return Axis(key, tuple(values))


def points(axes: list[Axis], draws: int, seed: int) -> list[Point]:
    """The points to train.

    Args:
        axes: What is swept.
        draws: Number of random points; 0: the whole grid.
        seed: Of the draws. More draws of one seed begin with the same points.

    Raises:
        RecipeError: Nothing is swept, or a range is to make a grid.
    """
    if not axes:
        raise RecipeError("nothing to sweep: give --sweep.KEY=VALUE,VALUE")
    if draws:
        return list(itertools.islice(_random(axes, random.Random(seed)), draws))
    for one in axes:
        if one.ends is not None:
            raise RecipeError(f"--sweep.{one.key}: a range makes no grid; give values, or --random NUMBER")
    grid = itertools.product(*(one.values for one in axes))
    return [dict(zip((one.key for one in axes), values, strict=True)) for values in grid]


def _random(axes: list[Axis], generator: random.Random) -> Iterator[Point]:
    seen = set()
    failures = 0
    while failures < TRIES:
        point = {one.key: one.draw(generator) for one in axes}
        failures += 1
        if tuple(point.values()) not in seen:
            seen.add(tuple(point.values()))
            failures = 0
            yield point


def short(keys: list[str]) -> dict[str, str]:
    """The keys by their last words, where these tell them apart."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}

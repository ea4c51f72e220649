"""Step sizes from searches: a loss never rises, few evaluations. (Recorded searches: test_residual_solve.py.)"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.residuals.line_search import GRID, LARGEST, SMALLEST, START, bracket, grid


class Along:
    """A loss along a line that remembers where it was asked."""

    def __init__(self, loss):
        self.loss, self.asked = loss, []

    def __call__(self, alpha):
        self.asked.append(alpha)
        return torch.tensor(self.loss(alpha), dtype=torch.float64)

    def search(self, method, *args):
        found = method(self, torch.tensor(self.loss(0.0), dtype=torch.float64), *args)
        assert found.evaluations == len(self.asked) == len(set(self.asked))
        assert math.isnan(self.loss(0.0)) or float(found.loss) <= self.loss(0.0)
        assert (found.alpha == 0) == (not float(found.loss) < self.loss(0.0))
        assert found.alpha == 0 or float(found.loss) == self.loss(found.alpha)
        return found


def parabola(minimum):
    return lambda alpha: (alpha - minimum) ** 2 - minimum**2


@pytest.mark.parametrize("exponent", range(-28, 1))
@pytest.mark.parametrize("off_by", (-3, 0, 3))
def test_bracket_finds_the_octave(exponent, off_by):
    minimum = 2.0**exponent
    along = Along(parabola(minimum))
    start = min(max(minimum * 2.0**off_by, SMALLEST), LARGEST)
    assert along.search(bracket, start).alpha == minimum
    assert off_by or len(along.asked) == 3


def test_bracket_from_another_lattice():
    assert Along(parabola(0.3)).search(bracket, 0.3 / 4).alpha == pytest.approx(0.3)


def test_nothing_found_is_zero_and_the_next_search_starts_afresh():
    along = Along(lambda alpha: alpha)
    found = along.search(bracket, 1.0)
    assert found.alpha == 0.0 and found.evaluations == 31 and along.asked[-1] == SMALLEST
    next_ = Along(parabola(START))
    assert next_.search(bracket, found.alpha).alpha == START and next_.asked[0] == START
    assert Along(lambda alpha: alpha).search(grid).alpha == 0.0


def test_bracket_keeps_within_its_range():
    assert Along(lambda alpha: -alpha).search(bracket, 1.0).alpha == LARGEST
    assert Along(lambda alpha: -alpha).search(bracket, 1e9).alpha == LARGEST
    with pytest.raises(ValueError, match="start"):
        bracket(lambda alpha: torch.tensor(0.0), torch.tensor(1.0), math.nan)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("method", (bracket, grid))
def test_losses_that_are_not_finite_are_no_steps(method, bad):
    along = Along(lambda alpha: bad if alpha > 2.0**-10 else parabola(2.0**-8)(alpha))
    assert along.search(method).alpha == 2.0**-10


@pytest.mark.parametrize("method", (bracket, grid))
def test_any_finite_loss_is_better_than_none(method):
    found = method(lambda alpha: torch.tensor(1.0), torch.tensor(math.nan))
    assert found.alpha > 0 and found.loss == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1) | st.just(math.nan), min_size=32, max_size=32), st.integers(-30, 1))
def test_a_loss_never_rises(values, exponent):
    """Any losses at all on the lattice."""
    table = {2.0**k: value for k, value in zip(range(-30, 2), values, strict=True)} | {0.0: 0.0}
    Along(table.__getitem__).search(bracket, 2.0**exponent)
    found = Along(table.__getitem__).search(grid)
    assert float(found.loss) == min(0.0, *(table[alpha] for alpha in GRID if not math.isnan(table[alpha])), 0.0)


@settings(max_examples=40, deadline=None)
@given(st.floats(-29, 0.4), st.integers(-30, 1), st.floats(1.1, 4))
def test_on_convex_losses_the_bracket_ends_at_the_best_of_its_lattice(minimum, exponent, power):
    def loss(alpha):
        return abs(alpha / 2.0**minimum - 1) ** power

    found = Along(loss).search(bracket, 2.0**exponent)
    assert float(found.loss) == min(loss(2.0**k) for k in range(-30, 2))

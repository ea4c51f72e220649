"""Adaptive damping: two dampings compete in every step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from residual_cases import dense, flat, off, small
from secondorder.engdw import ENGDW
from secondorder.residuals.ladder import ADVANTAGE, MOST, larger_wins, rung
from secondorder.residuals.terms import residual_terms
from secondorder.spring import SPRING


@given(fall=st.floats(0.1, 5.0), more=st.floats(0.0, 5.0))
def test_a_larger_damping_needs_an_advantage(fall, more):
    assert larger_wins(1.0, math.exp(-fall), math.exp(-ADVANTAGE * fall - more - 1e-9))
    assert not larger_wins(1.0, math.exp(-fall), math.exp(-ADVANTAGE * fall + 1e-9))


def test_where_the_smaller_does_nothing_the_better_wins():
    assert larger_wins(1.0, 1.0, 1 - 1e-6) and not larger_wins(1.0, 1 - 1e-6, 1.0)
    assert larger_wins(1.0, 0.999, 0.998) and not larger_wins(1.0, 0.999, 0.9991)
    assert not larger_wins(1.0, 1.0, 1.0)  # neither moves: the smaller one, whose steps are exact in the end
    assert not larger_wins(1.0, 0.0, 0.0) and larger_wins(1.0, 0.5, 0.0)
    assert not larger_wins(1.0, 0.5, math.nan) and larger_wins(1.0, math.inf, 0.5)


def test_rungs():
    assert rung(1e-6, 0, 1e-11) == 1e-6 and rung(1e-6, 2, 1e-11) == pytest.approx(1e-4)
    assert rung(1e-6, -9, 1e-11) == 1e-11 and rung(1e-6, 9, 1e-11) == MOST
    assert rung(1e-14, 1, 1e-11) == pytest.approx(1e-10) and rung(0.0, -1, 1e-11) == 1e-11
    assert rung(1.0, -1, 1e-11) == pytest.approx(0.1) and rung(1.0, 1, 1e-11) == rung(1.0, 0, 1e-11) == 1.0


@pytest.mark.parametrize("form", ["primal", "dual", "layerwise"])
def test_a_step_is_the_better_of_two_dense_ones(form):
    """Each step is that of one of two dampings, solved densely, and of these the one that `larger_wins` names."""
    net, closure = small(2)
    params = list(net.parameters())
    opt = ENGDW(params, line_search="grid", damping=1e-3, form=form)
    levels = [0]
    for k in range(6):
        level, trend = (opt.param_groups[0][name] for name in ("level", "trend"))
        assert (level, trend) == (levels[-1], 1) if k == 0 else level in (levels[-1] - 1, levels[-1], levels[-1] + 1)
        start, before = flat(params), float(residual_terms(closure()).loss().detach())
        found = {}
        for at in (level, level + trend):
            r, J = dense(closure, params)
            blocks = [range(J.shape[1])] if form != "layerwise" else [range(18), range(18, 25)]
            delta = torch.zeros(J.shape[1], dtype=torch.float64)
            for block in blocks:
                own = J[:, list(block)]
                damped = own.mT @ own + rung(1e-3, at, 1e-11) * own.square().sum() / len(r) * torch.eye(own.shape[1])
                delta[list(block)] = torch.linalg.solve(damped, -own.mT @ r)
            losses = {}
            for alpha in [2.0**-k for k in range(31)]:
                torch.nn.utils.vector_to_parameters(start + alpha * delta, params)
                losses[alpha] = float(residual_terms(closure()).loss().detach())
            best = min(losses, key=losses.get)
            found[at] = (losses[best], start + best * delta)
        torch.nn.utils.vector_to_parameters(start, params)
        opt.step(closure)
        small_, large = min(found), max(found)
        won = large if larger_wins(before, found[small_][0], found[large][0]) else small_
        levels.append(opt.param_groups[0]["level"])
        assert levels[-1] == won and off(flat(params), found[won][1]) < 1e-7
        assert opt.param_groups[0]["trend"] == (trend if won != level else -trend)
    assert len(set(levels)) > 1


def test_evaluations_of_both_are_counted_and_the_first_damping_is_the_users():
    net, closure = small()
    calls = []

    def counted():
        calls.append(None)
        return closure()

    opt = ENGDW(net.parameters(), damping=1e-5)
    opt.step(counted)
    opt.step(counted)
    before = len(calls)
    opt.step(counted)
    assert len(calls) - before == 1 + opt.diagnostics()["evaluations"]
    assert opt.param_groups[0]["damping"] == 1e-5


@pytest.mark.parametrize("wrong", [1e-14, 1e-2])
def test_it_goes_where_it_has_to(wrong):
    """Runs are chaotic: four of six have to arrive. With a constant 1e-14 three do."""
    arrived = 0
    for seed in range(6):
        net, closure = small(seed)
        opt = ENGDW(net.parameters(), damping=wrong)
        losses = [float(opt.step(closure)) for _ in range(30)]
        arrived += losses[-1] < 1e-4
    assert arrived >= 4


def test_one_of_both_that_cannot_be_solved_is_left_out(monkeypatch):
    from secondorder.residuals import system

    net, closure = small()
    opt, calls, factorize = ENGDW(net.parameters(), damping=1e-6), [], system.factorize

    def failing(matrix, shift):
        import dataclasses

        calls.append(None)
        factor = factorize(matrix, shift)
        return dataclasses.replace(factor, ok=torch.tensor(False)) if len(calls) % 2 else factor

    monkeypatch.setattr(system, "factorize", failing)
    losses = [float(opt.step(closure)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert opt.diagnostics()["refused_steps"] == 0


def test_without_a_search_nothing_competes():
    nets = [small() for _ in range(2)]
    for (net, closure), kind in zip(nets, ("adaptive", "relative"), strict=True):
        opt = ENGDW(net.parameters(), lr=0.1, line_search=None, damping=1e-3, damping_kind=kind)
        for _ in range(3):
            opt.step(closure)
    assert torch.equal(*(flat(net.parameters()) for net, _ in nets))


def test_spring_has_it_with_a_search():
    net, closure = small()
    opt = SPRING(net.parameters(), line_search="bracket", damping_kind="adaptive", damping=1e-6, momentum=0.0)
    losses = [float(opt.step(closure)) for _ in range(8)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert {level for level, _ in opt.param_groups[0]["step_sizes"]} >= {0, 1}

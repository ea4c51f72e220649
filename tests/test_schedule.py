"""Refreshes are spread over their period: every unit once, every call about the same work."""

import math
from collections import Counter

import pytest
import torch

import cases
from cases import parameters
from secondorder import SOAP
from secondorder.layout.buckets import Bucket
from secondorder.preconditioner.eigenbasis import EigenBasis


def units(optimizer):
    """`(cost, phase, (parameter, tile, mode))` of every refresh unit."""
    layout = optimizer._current()
    for b in layout.buckets:
        if isinstance(b, Bucket):
            for mode, phases in b.phases.items():
                for piece, phase in zip(b.pieces, phases, strict=True):
                    yield b.method.refresh_cost(b.shape, mode), phase, (piece.index, piece.key, mode)


def record_refreshes(monkeypatch):
    """A list with the `(n, d, initial)` of every refresh call from now on."""
    calls = []
    decompose = EigenBasis.decompose

    def spy(self, s, mode, c):
        calls.append((s["count"].numel(), s[f"basis_{mode}"].shape[-1], c.initial))
        return decompose(self, s, mode, c)

    monkeypatch.setattr(EigenBasis, "decompose", spy)
    return calls


@pytest.mark.parametrize("period", [4, 10])
def test_equal_layers_share_the_period_fairly(period):
    loads = Counter()
    for cost, phase, _ in units(SOAP(parameters([(16, 16)] * 12), refresh_every=period)):
        loads[phase] += cost
    assert len(loads) == period
    assert max(loads.values()) / (sum(loads.values()) / period) <= 1.5


def test_unequal_layers_share_the_period_as_well_as_their_largest_unit_allows():
    shapes = [(64, 32), (32, 32), (16, 48), (64, 64), (8, 8), (24, 24)] * 3
    loads = Counter()
    largest = 0.0
    for cost, phase, _ in units(SOAP(parameters(shapes), refresh_every=5)):
        loads[phase] += cost
        largest = max(largest, cost)
    assert max(loads.values()) <= sum(loads.values()) / 5 + largest  # the bound of greedy assignment


@pytest.mark.parametrize("options", [dict(), dict(max_block_size=5)], ids=str)
def test_every_unit_is_refreshed_once_a_period(options, monkeypatch):
    period = 4
    params = parameters([(6, 5), (6, 5), (8, 6), (3, 14)])
    optimizer = SOAP(params, refresh_every=period, **options)
    wanted = len(list(units(optimizer)))
    cases.train(optimizer, params, range(2 * period))  # the initial decompositions are over
    for round_ in range(3):
        bases = {key: value for key, value in cases.flat_state(optimizer).items() if "/basis_" in key}
        changes = Counter()
        for step in range(period):
            cases.train(optimizer, params, [100 * round_ + step])
            now = cases.flat_state(optimizer)
            for key, before in bases.items():
                if not torch.equal(before, now[key]):
                    changes[key] += 1
                    bases[key] = now[key]
        assert set(changes.values()) == {1}
        assert len(changes) == wanted


@pytest.mark.parametrize("options", [dict(), dict(max_block_size=5)], ids=str)
def test_no_call_refreshes_more_than_its_share(options, monkeypatch):
    period = 4
    params = parameters([(10, 10)] * 12)
    optimizer = SOAP(params, refresh_every=period, **options)
    calls = record_refreshes(monkeypatch)
    per_step = []
    for step in range(4 * period):
        calls.clear()
        cases.train(optimizer, params, [step])
        per_step.append(sum(n * d**3 for n, d, _ in calls))
    for first, last in ((0, period), (period, 4 * period)):  # in the first period, too
        assert max(per_step[first:last]) / (sum(per_step[first:last]) / (last - first)) <= 1.5


def test_together_refreshes_everything_in_one_call(monkeypatch):
    params = parameters([(6, 5), (8, 8)])
    optimizer = SOAP(params, refresh_every=5, refresh="together")
    calls = record_refreshes(monkeypatch)
    happened = []
    for step in range(20):
        calls.clear()
        cases.train(optimizer, params, [step])
        happened.append(len(calls))
    assert [i + 1 for i, n in enumerate(happened) if n] == [5, 10, 15, 20]
    assert {n for n in happened if n} == {4}


@pytest.mark.parametrize(
    ("first", "wanted"), [("apply", {3: True, 6: True, 9: False}), ("skip", {1: True, 4: False, 7: False, 10: False})]
)
def test_decompositions_are_full_in_the_first_two_periods(first, wanted, monkeypatch):
    params = parameters([(6, 5)])
    optimizer = SOAP(params, refresh_every=3, refresh="together", first=first)
    calls = record_refreshes(monkeypatch)
    found = {}
    for call in range(1, 11):
        calls.clear()
        cases.train(optimizer, params, [call])
        assert len(calls) in (0, 2)
        for _, _, initial in calls:
            assert found.setdefault(call, initial) == initial
    assert found == wanted


def test_every_unit_has_a_basis_after_the_first_period():
    params = parameters([(6, 5), (8, 6), (10, 10)])
    optimizer = SOAP(params, refresh_every=4, max_block_size=5)
    cases.train(optimizer, params, range(4))
    bases = {key: value for key, value in cases.flat_state(optimizer).items() if "/basis_" in key}
    assert len(bases) == len(list(units(optimizer)))
    assert not any(torch.equal(value, torch.eye(len(value))) for value in bases.values())


def test_late_group_leaves_the_schedule_of_others_alone():
    early = parameters([(7, 7), (6, 6)])
    optimizer = SOAP(early, refresh_every=3)
    before = {unit: phase for _, phase, unit in units(optimizer)}
    optimizer.add_param_group({"params": parameters([(200, 40), (5, 5)], seed=1)})
    after = {unit: phase for _, phase, unit in units(optimizer)}
    assert before.items() <= after.items() and len(after) > len(before)


@pytest.mark.parametrize("change", ["a late group", "a thaw"])
def test_first_decomposition_is_full_when_the_units_change(change, monkeypatch):
    calls = record_refreshes(monkeypatch)
    params = parameters([(200, 40), (7, 7), (6, 6)])
    optimizer = SOAP(params if change == "a thaw" else params[1:], refresh_every=3)
    trained = params if change == "a thaw" else params[1:]
    cases.train(optimizer, trained, range(2))
    if change == "a thaw":
        params[0].requires_grad_(False)  # the dearest unit goes, and the phases of the others move
        trained = params[1:]
    else:
        optimizer.add_param_group({"params": params[:1]})
        trained = params
    for step in range(2, 12):
        cases.feed(trained, step)
        optimizer.step()
    for d in (7, 6):
        assert [initial for _, size, initial in calls if size == d][:2] == [True, True]


def test_statistics_can_wait():
    """With `statistics_every=3` the covariance is the average over calls 1, 4, 7, ..., past the first periods too."""
    (p,) = parameters([(4, 4)], dtype=torch.float64)
    optimizer = SOAP([p], statistics_every=3, factor_beta=0.9, refresh_every=2)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for step in range(20):
        cases.train(optimizer, [p], [step])
        if step % 3 == 0:
            wanted = 0.9 * wanted + 0.1 * p.grad @ p.grad.T
        seen = step // 3 + 1
        torch.testing.assert_close(optimizer.state[p]["covariance_0"], wanted / (1 - 0.9**seen), rtol=1e-12, atol=1e-12)
        assert optimizer.state[p]["seen"] == seen and optimizer.state[p]["count"] == step + 1


def test_a_late_parameter_follows_its_own_clock():
    """A parameter whose first gradient comes late does what it would have done alone."""
    late, other = parameters([(6, 5), (6, 5)])
    optimizer = SOAP([late, other], refresh_every=3, refresh="together")
    for step in range(14):
        late.grad = None if step < 5 else cases.gradient((6, 5), step, 0)
        other.grad = cases.gradient((6, 5), step, 1)
        optimizer.step()
    alone = parameters([(6, 5), (6, 5)])
    for index, start in ((0, 5), (1, 0)):
        single = SOAP([alone[index]], refresh_every=3, refresh="together")
        for step in range(start, 14):
            alone[index].grad = cases.gradient((6, 5), step, index)
            single.step()
    cases.assert_same_bits([late, other], alone)
    assert optimizer.state[late]["step"] == 9 and optimizer.state[other]["step"] == 14


def test_share_is_reported():
    params = parameters([(6, 5), (7, 4)])
    optimizer = SOAP(params, refresh_every=4)
    cases.train(optimizer, params, range(9))
    assert 0 <= optimizer.diagnostics()["steps_since_refresh_max"] < 4
    assert math.isfinite(optimizer.diagnostics(full=True)["condition_max"])

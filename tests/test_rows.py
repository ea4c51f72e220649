"""What the step offers to every method: momentum before and after the factor, Nesterov, kinds of decay, clipping.

torch.optim's SGD and Adam are the oracles, on rows that have no factor.
"""

import pytest
import torch

import cases
from dense import DenseSOAP
from rows import SGD, Adam, Anchored, FlatIdentity, Identity, ObservingSOAP

SHAPES = [(4, 3), (4, 3), (5,), (2, 3, 2), ()]


def both(ours, theirs, steps=20):
    """Train twins in float64; the largest difference."""
    params, twins = (cases.parameters(SHAPES, dtype=torch.float64) for _ in range(2))
    cases.train(ours(params), params, range(steps))
    cases.train(theirs(twins), twins, range(steps))
    return max(float((p - q).detach().abs().max()) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_after_the_factor_is_heavy_ball(row, nesterov, maximize):
    common = dict(lr=0.05, nesterov=nesterov, maximize=maximize)
    off = both(
        lambda ps: SGD(ps, betas=(0.9, 0.0), row=row(momentum="update"), **common),
        lambda ps: torch.optim.SGD(ps, momentum=0.9, **common),
    )
    assert off < 1e-12


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", ["l2", "coupled"])
def test_decay_inside_the_momentum(row, nesterov, kind):
    """With no factor, decay of the gradient and decay of the update are both torch's SGD weight decay."""
    common = dict(lr=0.05, nesterov=nesterov, weight_decay=0.1)
    off = both(
        lambda ps: SGD(ps, betas=(0.9, 0.0), row=row(momentum="update"), weight_decay_kind=kind, **common),
        lambda ps: torch.optim.SGD(ps, momentum=0.9, **common),
    )
    assert off < 1e-12


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
def test_l2_decay_pulls_towards_zero_when_maximizing(row):
    common = dict(lr=0.05, weight_decay=0.1, maximize=True)
    off = both(
        lambda ps: SGD(ps, row=row(), weight_decay_kind="l2", **common), lambda ps: torch.optim.SGD(ps, **common)
    )
    assert off < 1e-12


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_before_the_factor_is_a_debiased_average(row, nesterov):
    (p,), (q,) = (cases.parameters([(4, 3)], dtype=torch.float64) for _ in range(2))
    optimizer = SGD([p], lr=0.1, betas=(0.8, 0.0), row=row(momentum="gradient"), nesterov=nesterov)
    average = torch.zeros(4, 3, dtype=torch.float64)
    for step in range(15):
        cases.train(optimizer, [p], [step])
        g = cases.gradient((4, 3), step, dtype=torch.float64)
        average = 0.8 * average + 0.2 * g
        corrected = average / (1 - 0.8 ** (step + 1))
        q.data -= 0.1 * (0.8 * corrected + 0.2 * g if nesterov else corrected)
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
def test_decoupled_decay_does_not_enter_the_momentum(row):
    (p,), (q,) = (cases.parameters([(4, 3)], dtype=torch.float64) for _ in range(2))
    cases.train(SGD([p], lr=0.1, row=row(momentum="update"), nesterov=False, weight_decay=0.2), [p], range(10))
    sgd = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    cases.train(sgd, [q], range(10), before=lambda step: q.data.mul_(1 - 0.1 * 0.2))
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["decoupled", "l2"])
def test_stacked_blocks_equal_torch(kind):
    theirs = {"decoupled": torch.optim.AdamW, "l2": torch.optim.Adam}[kind]
    off = both(
        lambda ps: Adam(ps, lr=0.01, weight_decay=0.1, weight_decay_kind=kind),
        lambda ps: theirs(ps, lr=0.01, weight_decay=0.1),
    )
    assert off < 1e-12


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
def test_missing_gradient_stops_the_momentum_too(row):
    params, twins = (cases.parameters(SHAPES, dtype=torch.float64) for _ in range(2))
    ours = SGD(params, lr=0.1, row=row(momentum="update"), nesterov=False)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9)

    def drop(group):
        return lambda step: [setattr(p, "grad", None) for i, p in enumerate(group) if (step + i) % 3 == 0]

    cases.train(ours, params, range(12), drop(params))
    cases.train(theirs, twins, range(12), drop(twins))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", [Identity, FlatIdentity])
def test_clip_scales_each_block_by_its_own_size(row):
    params = cases.parameters([(4, 3), (4, 3), (5,)], dtype=torch.float64)
    optimizer = SGD(params, lr=1.0, row=row(), max_update_rms=0.5)
    grads = [torch.ones(4, 3), 4 * torch.ones(4, 3), torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1])]
    before = cases.values(params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.double()
    optimizer.step()
    moved = [q - p.detach() for p, q in zip(params, before, strict=True)]
    for u, wanted in zip(moved, (0.5 * torch.ones(4, 3), 0.5 * torch.ones(4, 3), grads[2]), strict=True):
        torch.testing.assert_close(u, wanted.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("every", [2, 3])
def test_a_method_that_observes_first_applies_what_it_has_just_seen(every):
    hp = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, nesterov=True, refresh_every=every)
    (p,) = cases.parameters([(6, 6)], dtype=torch.float64)
    defaults = dict(factor_beta=0.95, first="observe", refresh_by="qr")
    dense = DenseSOAP(p.detach().clone(), (0, 1), {**hp, **defaults}, lagged=False)
    optimizer = ObservingSOAP([p], refresh="together", **hp)
    for step in range(12):
        cases.train(optimizer, [p], [step])
        dense.step(p.grad)
    torch.testing.assert_close(p.detach(), dense.W, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*a step was refused")
def test_a_block_begins_once_with_its_first_usable_gradient():
    params = cases.parameters([(4, 3)] * 4)
    optimizer = SGD(params, row=Anchored())

    def spoil(step):
        if step == 0:
            params[1].grad.zero_()  # no usable gradient yet
            params[2].grad = None  # no gradient yet
        if step == 1:
            params[3].grad[0, 0] = torch.nan  # a step that never was, for all

    cases.train(optimizer, params, range(5), before=spoil)
    begun = [0, 2, 2, 0]
    for i, (p, step) in enumerate(zip(params, begun, strict=True)):
        assert torch.equal(optimizer.state[p]["anchor"], cases.gradient((4, 3), step, i))

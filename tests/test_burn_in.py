"""First calls that only gather statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
from adapting import CLASSES, closure_of, linear, normal, optimize


@pytest.mark.parametrize("cls", CLASSES)
def test_burn_in_only_gathers_statistics(cls):
    """Parameters of the fallback stay, too; every call observes; the first step applies refreshed factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.PReLU(), nn.Linear(5, 3)).double()
    optimizer = optimize(model, cls, burn_in=3, statistics_every=10, refresh_every=10, betas=(0.0, 0.9))
    before = cases.values(model.parameters())
    grams = []
    for step in range(3):
        x = normal(12, 4, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(12) % 3).backward()
        optimizer.step()
        rows = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], 1)
        grams.append(rows.T @ rows / 12)
    cases.assert_same_bits(model.parameters(), before)
    state = optimizer.state[model[0].weight]
    average = (0.81 * grams[0] + 0.9 * grams[1] + grams[2]) / (0.81 + 0.9 + 1)
    torch.testing.assert_close(state["covariance_1"], average, rtol=1e-12, atol=1e-12)
    assert (float(state["step"]), float(state["count"]), float(state["seen"])) == (3, 0, 3)
    Q, values = state["basis_1"], state["eigenvalues_1"]
    torch.testing.assert_close(Q @ torch.diag(values) @ Q.T, average, rtol=1e-5, atol=1e-5)  # EKFAC breaks ties
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert (float(state["count"]), float(state["seen"])) == (1, 3)
    torch.testing.assert_close(Q, state["basis_1"], rtol=0, atol=0)


def test_burn_in_counts_neither_for_the_model_nor_for_momentum():
    model, x, y = linear()
    before = cases.values(model.parameters())
    options = dict(quadratic_model="lr_and_momentum", loss="mse", adapt_damping=True, adapt_every=2)
    optimizer = optimize(model, burn_in=3, **options)
    judged = []
    for call, closure in enumerate([closure_of(optimizer, model, x, y)] * 7, 1):
        optimizer.step(closure)
        if "rho" in optimizer.diagnostics():
            judged.append(call)
        if call == 3:
            cases.assert_same_bits(model.parameters(), before)
            assert not optimizer.state[model.weight]["momentum"].any()
    assert judged == [5, 7]

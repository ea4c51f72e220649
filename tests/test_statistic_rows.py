"""`statistic_rows`: statistics of some rows stand for those of all."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from cases import assert_same_bits, labels, normal
from secondorder.curvature.site import evenly


@pytest.mark.parametrize("total", [1, 2, 7, 64, 96, 1000])
def test_rows_are_chosen_once_and_evenly(total):
    device = torch.device("cpu")
    assert sorted(evenly(total, total, device).tolist()) == list(range(total))
    some = sorted(evenly(total, max(1, total // 4), device).tolist())
    assert len(set(some)) == len(some)
    gaps = [b - a for a, b in zip(some, some[1:], strict=False)]
    assert max(gaps, default=0) <= 2 * math.ceil(total / len(some))


def test_rows_follow_neither_samples_nor_positions():
    some = evenly(32 * 16, 64, torch.device("cpu"))
    assert len(set((some % 16).tolist())) == 16  # positions of a sequence of 16
    assert len(set((some // 16).tolist())) == 32  # samples


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.first, self.out = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, ids):
        self.a = self.emb(ids)
        self.h = self.first(self.a)
        self.h.retain_grad()
        return self.out(self.h.tanh())


def backward(rows, sharing="expand"):
    torch.manual_seed(0)
    model = Net()
    optimizer = secondorder.KFAC(model.parameters(), module=model, statistic_rows=rows, sharing=sharing)
    ids = labels(8, 6, classes=9)
    F.cross_entropy(model(ids).flatten(0, 1), labels(48, seed=1, classes=4)).backward()
    optimizer.step()
    return model, optimizer


def test_all_rows_are_as_without_a_limit():
    (one, _), (other, _) = backward(None), backward(48)
    assert_same_bits(one.parameters(), other.parameters())


def test_factors_are_those_of_the_chosen_rows():
    model, optimizer = backward(12)
    some = evenly(48, 12, torch.device("cpu"))
    a = torch.cat([model.a.detach().flatten(0, 1), torch.ones(48, 1)], 1)[some]
    g = model.h.grad.flatten(0, 1)[some]
    seen = (g.abs().amax(1) != 0).double()
    state = optimizer.state[model.first.weight]
    torch.testing.assert_close(state["covariance_1"], a.T @ (a * seen[:, None]) / seen.sum())
    # of a mean over 48 terms: M Σ g gᵀ, of which 12 rows were seen
    torch.testing.assert_close(state["covariance_0"], 48 * (48 / 12) * g.T @ g)


def test_samples_are_chosen_where_positions_are_summed():
    model, optimizer = backward(3, sharing="reduce")
    g = model.h.grad.sum(1)[evenly(8, 3, torch.device("cpu"))]
    torch.testing.assert_close(optimizer.state[model.first.weight]["covariance_0"], 48 * (8 / 3) * g.T @ g)


@pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC, secondorder.SINGD, secondorder.IKFAC])
def test_convolutions_train_on_some_positions(cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)).double()
    optimizer = cls(model.parameters(), lr=0.02, module=model, statistic_rows=24)
    x, y = normal(32, 2, 6, 6), labels(32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.diagnostics()["refresh_failures"] == 0


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "many"])
def test_what_is_no_count_is_refused(rows):
    with pytest.raises(ValueError, match="statistic_rows"):
        secondorder.KFAC(nn.Linear(3, 2).parameters(), statistic_rows=rows)

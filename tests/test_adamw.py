"""AdamW against torch.optim.AdamW, on both of its paths: in place on the parameters, and end to end in a workspace."""

import pytest
import torch
from torch import nn

import cases
import secondorder


def net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def losses(model, optimizer, steps=30, maximize=False):
    generator = torch.Generator().manual_seed(4)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
        loss = model(x).square().mean() * (-1 if maximize else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# A limit that never acts leaves the multi-tensor kernel for the plain tensor operations.
PATHS = {"in place": {}, "flat": {"max_update_rms": 1e30}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_torch(path, maximize, tensor_lr, weight_decay):
    ours, theirs = net(), net()
    common = dict(betas=(0.8, 0.99), weight_decay=weight_decay, maximize=maximize)
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    losses(ours, secondorder.AdamW(ours.parameters(), lr=lr, **common, **PATHS[path]), maximize=maximize)
    losses(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, **common), maximize=maximize)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_state_holds_the_same_averages_as_torch(path):
    ours, theirs = net(), net()
    a = secondorder.AdamW(ours.parameters(), lr=0.01, **PATHS[path])
    b = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    losses(ours, a)
    losses(theirs, b)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][key], b.state[q][key], rtol=1e-11, atol=1e-14)
        assert a.state[p]["count"] == b.state[q]["step"] == 30


def test_parameters_of_half_precision_have_single_precision_state():
    """The oracle keeps the parameter in float32 and rounds it after each step, as we do."""
    params = cases.parameters([(6, 5), (7,)], dtype=torch.bfloat16)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    ours = secondorder.AdamW(params, lr=0.05)
    theirs = torch.optim.AdamW(twins, lr=0.05)
    for step in range(20):
        cases.feed(params, step)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        for q in twins:
            q.data.copy_(q.data.bfloat16())
    for p, q in zip(params, twins, strict=True):
        assert {ours.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "coupled"])
def test_other_kinds_of_decay(kind):
    """L2 decay is torch.optim.Adam's; decay in the update adds `weight_decay · p` to Adam's direction."""
    ours, theirs = net(), net()
    losses(ours, secondorder.AdamW(ours.parameters(), lr=0.01, weight_decay=0.2, weight_decay_kind=kind))
    if kind == "l2":
        losses(theirs, torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=0.2, betas=(0.9, 0.999)))
    else:  # (1 - lr wd) p - lr u: decoupled and coupled agree where nothing follows the direction
        losses(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.2))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_update_clip_bounds_the_root_mean_square():
    params = cases.parameters([(6, 5), (7,)], dtype=torch.float64)
    optimizer = secondorder.AdamW(params, lr=0.1, weight_decay=0.0, max_update_rms=0.25)
    for step in range(10):
        before = cases.values(params)
        cases.train(optimizer, params, [step])
        for p, q in zip(params, before, strict=True):
            assert (p - q).square().mean().sqrt() <= 0.1 * 0.25 * (1 + 1e-9)

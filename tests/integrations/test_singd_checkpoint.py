"""A checkpoint of the package singd: training goes on in ours where it stopped in theirs."""

import pytest
import torch
from torch import nn

from secondorder import IKFAC, SINGD
from secondorder.convert import load_singd

optimizers = pytest.importorskip("singd.optim.optimizer")

OURS = {
    "dense": "dense",
    "diagonal": "diagonal",
    "hierarchical15_15": "hierarchical(15,15)",
    "triltoeplitz": "tril_toeplitz",
    "triutoeplitz": "triu_toeplitz",
}


def network():
    torch.manual_seed(0)
    conv, middle, head = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(96, 20, bias=False), nn.Linear(20, 5)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), middle, nn.Tanh(), head)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 2, 4, 4, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.randint(5, (16,), generator=generator)).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Calling naive implementation")
@pytest.mark.parametrize(
    ("structures", "kfac_like"),
    [
        (("dense", "dense"), False),
        (("dense", "dense"), True),
        (("diagonal", "hierarchical15_15"), False),
        (("triltoeplitz", "triutoeplitz"), False),
    ],
)
def test_steps_between_two_statistics_are_theirs(structures, kfac_like, tmp_path):
    model, twin = network(), network()
    how = dict(lr=0.01, momentum=0.8, damping=0.1, alpha1=0.0, weight_decay=0.01, T=4, lr_cov=0.1)
    theirs = optimizers.SINGD(model, structures=structures, kfac_like=kfac_like, **how)
    train(model, theirs, range(5))
    torch.save(theirs.state_dict(), tmp_path / "singd.pt")
    twin.load_state_dict(model.state_dict())
    ours = (IKFAC if kfac_like else SINGD)(
        twin.parameters(),
        lr=0.01,
        betas=(0.8, 0.999),
        weight_decay=0.01,
        weight_decay_kind="coupled",
        module=twin,
        structures=tuple(OURS[name] for name in structures),
        momentum="update",
        nesterov=False,
        norm_clip=None,
        max_update_rms=None,
        statistics_every=4,
    )
    load_singd(ours, torch.load(tmp_path / "singd.pt", weights_only=False))
    train(model, theirs, range(5, 8))
    train(twin, ours, range(5, 8))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=2e-6)
    before = [p.detach().clone() for p in twin.parameters()]
    train(twin, ours, range(8, 12))  # new statistics: ours move the factors on
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(twin.parameters(), before, strict=True))

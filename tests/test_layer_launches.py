"""A step of a layer method launches as many operations for eight equal layers as for two: it costs launches per bucket.

Operations on lists of tensors (`torch.stack`, `torch.cat`, `torch._foreach_*`) count once, and so does a decomposition
of a stack. On the meta device nothing is decided by values; what stays on the host launches nothing and is left out.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import secondorder
from cases import Launches

STEPS, PERIOD = 6, 2  # the first calls, and then two periods: with statistics and without
CLASSES = [secondorder.KFAC, secondorder.EKFAC, secondorder.SINGD, secondorder.IKFAC]


class OnDevice(Launches):
    """Leaves out what reads and writes host memory alone."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves([out, args, kwargs]) if isinstance(t, torch.Tensor)]
        if not operation.is_view and any(t.device.type == "meta" for t in tensors):
            self.found[str(operation)] += 1
        return out


class Net(nn.Module):
    """`count` times a norm layer, a linear one and a grouped convolution; linear weights may be used in two layers."""

    def __init__(self, count, bias, tied):
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        self.linears = nn.ModuleList(nn.Linear(8, 8, bias=bias) for _ in range(count))
        self.convs = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1, groups=2, bias=bias) for _ in range(count))
        if tied:
            self.others = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
            for linear, other in zip(self.linears, self.others, strict=True):
                other.weight = linear.weight

    def forward(self, ids):
        x = self.emb(ids)
        for i, (norm, linear, conv) in enumerate(zip(self.norms, self.linears, self.convs, strict=True)):
            x = x + linear(norm(x)).tanh()
            x = x + conv(x.mT).mT.tanh()
            x = self.others[i](x) if hasattr(self, "others") else x
        return self.head(x)


def launches(cls, count, bias=False, tied=False, dtype=torch.float32, fisher=False, **options):
    """By operation, those of each of the last steps."""
    with torch.device("meta"):
        model = Net(count, bias, tied).to(dtype)
    if "refresh_every" in cls.shared_options:
        options |= {"refresh_every": 2 * PERIOD, "refresh": "together"}
    optimizer = cls(model.parameters(), module=model, statistics_every=PERIOD, **options)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = model(ids)
        if fisher:
            optimizer.fisher_backward(outputs.flatten(0, 1), "cross_entropy")
        F.cross_entropy(outputs.flatten(0, 1), ids.flatten()).backward()
        with OnDevice() as counting:
            optimizer.step()
        found.append(counting.found)
    return found[-2 * PERIOD :]


def more(cls, **options):
    """What eight layers of a kind launch in each step beyond what two do."""
    few, many = (launches(cls, count, **options) for count in (2, 8))
    assert min(few, key=Counter.total).total() < max(few, key=Counter.total).total()  # with statistics and without
    return [large - small for small, large in zip(few, many, strict=True)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_launches_do_not_grow_with_the_number_of_layers(cls):
    assert more(cls) == [Counter()] * 2 * PERIOD


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"tied": True},
        {"sides": "inputs"},
        {"fisher": True},
        {"dtype": torch.bfloat16},
        {"max_block_size": 4},
    ],
    ids=str,
)
def test_nor_do_they_otherwise(options):
    assert more(secondorder.KFAC, **options) == [Counter()] * 2 * PERIOD

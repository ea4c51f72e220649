"""CUDA graphs: of methods without a refresh schedule, one training step can be captured and replayed.

A graph repeats what was launched, on the same memory: what the host decided or computed for that step stays as it was.
Whether that matters the CPU can tell: `Recorded` repeats the operations of one step as a graph does. What remains is
that nothing is copied between host and device, which the meta device tells, and a device to see it (`-m gpu`).

Not replayed, since it lives on the host: the counter `step`. Numerics go by counters on the device, which are.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cases
from cases import assert_same_bits, values

# Once the first calls are over, every call of theirs does the same: no refreshes, and statistics in each call.
STEADY = ("InverseFreeKLShampoo", "SIRFShampoo", "SINGD", "IKFAC", "RFAdamW", "RFRMSProp", "AdamW")
CASES = {case.cls.__name__: case for case in cases.OPTIMIZERS}
steady = pytest.mark.parametrize("name", STEADY)
WARM = 4


def make(name, device="cpu"):
    """A small network, its optimizer, and the learning rate as a tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)
    ).to(device)
    case, lr = CASES[name], torch.tensor(0.02, device=device)
    options = dict(module=model, statistics_every=1) if case.layers else {}
    return model, case.make(model.parameters(), lr=lr, **options), lr


def batches(device="cpu"):
    return torch.randn(12, 16, 2, 3, 3, generator=torch.Generator().manual_seed(1)).to(device)


def update(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.flatten(1)[:, :3].sin()).square().mean().backward()
    optimizer.step()


def eager(name, device="cpu"):
    """Parameters and state of the run without a graph."""
    model, optimizer, lr = make(name, device)
    for i, x in enumerate(batches(device)):
        if i > WARM:
            lr.mul_(0.9)
        update(model, optimizer, x)
    return values(model.parameters()), device_state(optimizer)


def device_state(optimizer):
    return [t for entry in optimizer.state.values() for key, t in entry.items() if key != "step"]


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recorded(TorchDispatchMode):
    """Operations and their tensors; those on `host`'s memory are left out, as a graph leaves out the host's."""

    def __init__(self, host=()):
        super().__init__()
        self.host = {t.untyped_storage().data_ptr() for t in host}
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        if not any(t.untyped_storage().data_ptr() in self.host for t in tensors((args, kwargs, out))):
            self.operations.append((operation, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, out in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(name):
    """Parameters, state and host clocks of the run that is recorded after the warm-up, and replayed."""
    model, optimizer, lr = make(name)
    given, graph = batches()[0].clone(), None
    for i, x in enumerate(batches()):
        given.copy_(x)
        if i < WARM:
            update(model, optimizer, given)
        elif graph is None:
            with Recorded(host=[optimizer.state[model[0].weight]["step"]]) as graph:
                update(model, optimizer, given)
        else:
            lr.mul_(0.9)
            graph.replay()
    return values(model.parameters()), device_state(optimizer), {int(e["step"]) for e in optimizer.state.values()}


@steady
def test_replayed_step_is_the_step(name):
    """The same bits, as the data and a tensor lr change."""
    params, state, steps = recorded(name)
    expected = eager(name)
    assert_same_bits(params, expected[0])
    assert_same_bits(state, expected[1])
    assert steps == {WARM + 1}


def test_a_refresh_schedule_is_not_replayed():
    """When SOAP refreshes is for the host to decide: why it is not among them."""
    assert not torch.equal(recorded("SOAP")[0][0], eager("SOAP")[0][0])


@steady
def test_steady_step_copies_nothing_between_host_and_device(name):
    """A capture refuses such copies. The device is the meta device, which has no values to be read either."""
    model, optimizer, _ = make(name, "meta")
    for x in batches("meta")[:WARM]:
        with Recorded() as seen:
            update(model, optimizer, x)
    assert not [operation for operation, *tree in seen.operations if len({t.device for t in tensors(tree)}) > 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@steady
def test_captured_graph_is_the_eager_run(name):
    """Forward pass, backward pass and step in one graph, replayed as the data and a tensor lr change."""
    model, optimizer, lr = make(name, "cuda")
    given = batches("cuda")[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in batches("cuda")[:WARM]:
            given.copy_(x)
            update(model, optimizer, given)
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        update(model, optimizer, given)
    for i, x in enumerate(batches("cuda")[WARM:]):
        if i:
            lr.mul_(0.9)
        given.copy_(x)
        graph.replay()
    expected = eager(name, "cuda")
    for ours, theirs in zip((values(model.parameters()), device_state(optimizer)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

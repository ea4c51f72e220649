"""`torch.compile` around the step. The step is opaque to it: one graph break, nothing traced, nothing to recompile."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import cases
import secondorder
from cases import assert_same_bits, assert_same_state, flat_state, parameters, values

pytestmark = pytest.mark.filterwarnings("ignore:.*record function", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def breaks():
    return sum(counters["graph_break"].values())


def graphs():
    return counters["stats"].get("unique_graphs", 0)


SLOW = pytest.mark.slow
FEW = [case for case in cases.OPTIMIZERS if case.cls.__name__ in ("SOAP", "InverseFreeKLShampoo", "AdamW")]
few = pytest.mark.parametrize("case", FEW, ids=[case.cls.__name__ for case in FEW])


@pytest.mark.parametrize("backend", ["aot_eager", *(pytest.param(b, marks=SLOW) for b in ("eager", "inductor"))])
def test_compiled_step_is_the_eager_one_since_it_is_not_traced(case, backend):
    """Bits are equal past refreshes and as a tensor lr changes; after the first call nothing is recompiled."""
    runs = []
    for compiled in (True, False):
        params = parameters()
        optimizer = case.make(params, lr=torch.tensor(0.02))
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for t in range(9):
            cases.feed(params, t)
            with torch.compiler.set_stance("fail_on_recompile" if compiled and t else "default"):
                step()
            optimizer.param_groups[0]["lr"].mul_(0.9)
        runs.append((values(params), flat_state(optimizer)))
    assert_same_bits(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])
    assert (breaks(), graphs()) == (1, 0)


@few
def test_compiled_code_breaks_once_at_the_step(case):
    """What stands before and after the step in a compiled function is compiled: two graphs."""
    params, twins = parameters(), parameters()
    ours, plain = (case.make(p, lr=torch.tensor(0.02)) for p in (params, twins))

    def update(params, optimizer):
        torch._foreach_mul_([p.grad for p in params], 0.5)
        optimizer.step()
        return torch.stack([p.square().sum() for p in params]).sum()

    compiled = torch.compile(update, backend="aot_eager")
    for t in range(7):
        cases.feed(params, t)
        cases.feed(twins, t)
        with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
            found = compiled(params, ours)
        assert torch.equal(found, update(twins, plain))
        for group in (*ours.param_groups, *plain.param_groups):
            group["lr"].mul_(0.9)
    assert_same_bits(params, twins)
    assert graphs() == 2
    # The wrapper that torch puts around every step is a frame of its own, and breaks at the same place.
    assert breaks() == 2


@few
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_closure_is_compiled_though_the_step_is_not(case, backend):
    """A compiled closure runs compiled inside of the step."""
    losses = []
    for compiled in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = case.make(model.parameters())
        forward = torch.compile(model, backend=backend) if compiled else model

        def closure(forward=forward, optimizer=optimizer):
            optimizer.zero_grad()
            loss = forward(torch.ones(3, 4).cumsum(0)).square().mean()
            loss.backward()
            return loss

        losses.append(torch.stack([optimizer.step(closure).detach() for _ in range(6)]))
    assert graphs() == 1
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.SINGD])
def test_compiled_step_of_a_layer_method_takes_its_statistics(cls):
    """Network and step are compiled; what the taps left is used, and nothing is recompiled after two steps."""
    results = []
    for compiled in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = cls(model.parameters(), lr=torch.tensor(0.02), statistics_every=1, module=model)
        forward, step = model, optimizer.step
        if compiled:
            forward, step = torch.compile(model, backend="aot_eager"), torch.compile(step, backend="aot_eager")
        for t in range(8):
            with torch.compiler.set_stance("fail_on_recompile" if compiled and t > 1 else "default"):
                optimizer.zero_grad()
                forward(torch.randn(16, 4, generator=torch.Generator().manual_seed(t))).square().mean().backward()
                step()
            optimizer.param_groups[0]["lr"].mul_(0.9)
        results.append((values(model.parameters()), flat_state(optimizer)))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])
    assert breaks() == 1

"""Statistics of compiled networks are those of the network as it is: default, fullgraph, checkpointed, broken up."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import secondorder
from capturing import Net, assert_holds, batch, factors, loss_of, make, recorded, treatments, weights
from cases import values

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
slow = pytest.mark.slow
EAGER = dict(backend="aot_eager")  # the whole compiler but for the generation of kernels


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Broken(Net):
    """Activations in place, right after a break of the graph."""

    def __init__(self):
        super().__init__(inplace=True)

    def _middle(self, x):
        for layer in (self.second, self.third):
            z = layer(x)
            torch._dynamo.graph_break()
            x = F.relu(z, inplace=True)
        return x


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def steps(model, run, opt, count=2):
    for _ in range(count):
        opt.zero_grad()
        x, y = batch(shape=(5, 3))
        loss_of(run, x, y).backward()
        opt.step()


def assert_holds_truth(model, opt, shared=False):
    twin, (x, y) = Net(shared=shared), batch(shape=(5, 3))
    truth = recorded(twin, lambda m: loss_of(m, x, y).backward())
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, factors(truth[theirs], 15))


WAYS = {
    "default": (Net, EAGER),
    "fullgraph": (lambda: Net(inplace=True), dict(fullgraph=True, **EAGER)),
    "fullgraph, checkpoint": (lambda: Net(recompute=False), dict(fullgraph=True, **EAGER)),
    "graph break before an activation in place": (Broken, EAGER),
}
SLOW_WAYS = {
    "fullgraph, called twice": (lambda: Net(shared=True), dict(fullgraph=True, **EAGER)),
    "checkpoint, reentrant": (lambda: Net(recompute=True), EAGER),
    "inductor": (lambda: Net(inplace=True), dict(fullgraph=True)),
    "inductor, graph break before an activation in place": (Broken, {}),
    "dynamic shapes": (Net, dict(fullgraph=True, dynamic=True, **EAGER)),
}


@pytest.mark.parametrize(
    ("build", "options"),
    [pytest.param(*way, id=name) for name, way in WAYS.items()]
    + [pytest.param(*way, id=name, marks=slow) for name, way in SLOW_WAYS.items()],
)
def test_factors_of_a_compiled_network_are_those_of_recorded_rows(build, options):
    model = build()
    opt = make(secondorder.KFAC, model, lr=0.0)
    steps(model, torch.compile(model, **options), opt)
    assert_holds_truth(model, opt, shared=model.second is model.third)


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_may_be_compiled_one_by_one(inplace):
    """What a compiled layer returns may be changed in place."""
    model, twin = small(), small()
    model[1].inplace = inplace
    opt = make(secondorder.KFAC, model, lr=0.0)
    model[0].compile(**EAGER)
    x, y = batch(shape=(5, 3))
    loss_of(model, x, y).backward()
    opt.step()
    truth = recorded(twin, lambda m: loss_of(m, x, y).backward())
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, factors(truth[theirs], 15))


def test_compiled_network_is_taken_as_module():
    model = small()
    compiled = torch.compile(model, **EAGER)
    opt = secondorder.KFAC(compiled.parameters(), lr=0.0, module=compiled)
    assert list(treatments(opt)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    steps(model, compiled, opt, 1)
    assert opt.state[model[0].weight]["seen"] == 1


def test_training_a_compiled_network_compiles_a_bounded_number_of_times():
    """With and without statistics, before and after the first eigenbases; learning rates change nothing."""
    model, twin, counter = small(), small(), CompileCounterWithBackend("aot_eager")
    opts = [make(secondorder.EKFAC, m, statistics_every=3) for m in (model, twin)]
    compiled, seen = torch.compile(model, backend=counter, fullgraph=True), []
    for step in range(9):
        for run, opt in zip((compiled, twin), opts, strict=True):
            opt.param_groups[0]["lr"] = 0.05 / (1 + step)
            opt.zero_grad()
            loss_of(run, *batch(step, (5, 3))).backward()
            opt.step()
        seen.append(counter.frame_count)
    assert seen[0] == 1 and seen[-1] == seen[-5] <= 4
    for ours, theirs in zip(values(model.parameters()), values(twin.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@slow
def test_compiled_network_notices_frozen_and_thawed_parameters():
    model = Net()
    compiled = torch.compile(model, fullgraph=True, **EAGER)
    opt = make(secondorder.KFAC, model, lr=0.0)
    steps(model, compiled, opt)
    model.second.weight.requires_grad_(False)
    steps(model, compiled, opt, 3)
    model.second.weight.requires_grad_(True)
    steps(model, compiled, opt, 3)
    assert_holds_truth(model, opt)


def test_network_that_ran_compiled_before_there_was_an_optimizer_is_told_of():
    """A compiler looks for hooks once: training goes on in the fallback. A reset helps, before the next optimizer."""
    model = nn.Sequential(nn.Linear(6, 4)).double()
    compiled = torch.compile(model, **EAGER)
    loss_of(compiled, *batch(shape=(5, 3))).backward()
    opt = make(secondorder.KFAC, model)
    with pytest.warns(UserWarning, match="no statistics"):
        steps(model, compiled, opt, 3)
    how, why = treatments(opt)["0.weight"]
    assert how == "AdamW" and "compiled and run before the optimizer was made" in why
    torch.compiler.reset()
    opt = make(secondorder.KFAC, model)
    steps(model, compiled, opt, 3)
    assert treatments(opt)["0.weight"][0] == "KFAC" and opt.state[model[0].weight]["seen"] == 3


def test_derivatives_of_torch_func_inside_compiled_code_leave_no_trace():
    model, (x, y) = nn.Linear(6, 4).double(), batch()
    opt = make(secondorder.KFAC, model)

    def of_input(x):
        return loss_of(model, x, y)

    def of_parameters(params):
        return loss_of(lambda x: torch.func.functional_call(model, params, (x,)), x.detach(), y)

    params = {name: p.detach() for name, p in model.named_parameters()}
    for function, at in ((of_input, x.detach()), (of_parameters, params)):
        expected = torch.func.grad(function)(at)
        found = torch.compile(torch.func.grad(function), fullgraph=True, **EAGER)(at)
        torch.testing.assert_close(found, expected)
    assert not any(t.grad is not None for site in opt._capture.sites for t in site.flat)


@slow
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_ddp_splits_the_graph_between_its_buckets(inplace, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Net(inplace=inplace)
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        opt = make(secondorder.KFAC, wrapped, lr=0.0)
        steps(model, torch.compile(wrapped, **EAGER), opt)
        assert_holds_truth(model, opt)
    finally:
        torch.distributed.destroy_process_group()

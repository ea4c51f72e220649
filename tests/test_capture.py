"""Statistics are captured right however the network is run, and what cannot be captured is trained all the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import secondorder
from capturing import (
    C,
    D,
    H,
    Net,
    assert_holds,
    batch,
    factors,
    held,
    loss_of,
    make,
    one_step,
    recorded,
    treatments,
    weights,
)
from cases import assert_same_bits, values

pytestmark = pytest.mark.filterwarnings("ignore:.*create_graph=True", "ignore:.*torch.jit.script")
BOTH = pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])
CLIPPED = dict(lr=0.02, kl_clip=1e-4, norm_clip=None, momentum="update", damping=0.3)
SHAPES = pytest.mark.parametrize("shape", [(5,), (5, 3)], ids=["2d", "3d"])


def plain(model, x, y):
    loss_of(model, x, y).backward()


def after_no_grad(model, x, y):
    with torch.no_grad():
        model(10 * x)
    plain(model, x, y)


def after_inference(model, x, y):
    with torch.inference_mode():
        model(10 * x)
    plain(model, x, y)


def in_eval(model, x, y):
    model.eval()
    plain(model, x, y)


def after_input_gradient(model, x, y):
    torch.autograd.grad(loss_of(model, 3 * x, y), x)
    plain(model, x, y)


def after_forward_alone(model, x, y):
    loss_of(model, 3 * x, y)
    plain(model, x, y)


def with_graph(model, x, y):
    loss_of(model, x, y).backward(create_graph=True)


SCENARIOS = {
    "plain": ({}, plain),
    "in-place activation": (dict(inplace=True), plain),
    "in-place activation, no bias": (dict(inplace=True, bias=False), plain),
    "module called twice": (dict(shared=True), plain),
    "module called twice, in place": (dict(shared=True, inplace=True), plain),
    "checkpoint, reentrant": (dict(recompute=True), plain),
    "checkpoint, not reentrant": (dict(recompute=False), plain),
    "checkpoint, in place": (dict(recompute=False, inplace=True), plain),
    "by keyword": (dict(keyword=True), plain),
    "eval": ({}, in_eval),
    "no_grad before": ({}, after_no_grad),
    "inference before": ({}, after_inference),
    "autograd.grad of the input before": ({}, after_input_gradient),
    "forward without backward before": ({}, after_forward_alone),
    "create_graph": ({}, with_graph),
}
ALL = pytest.mark.parametrize(("options", "way"), SCENARIOS.values(), ids=SCENARIOS)


def twin_of(options):
    """The same network without tricks."""
    return Net(**{key: value for key, value in options.items() if key in ("shared", "bias")})


@ALL
@SHAPES
def test_factors_are_those_of_recorded_rows(options, way, shape):
    x, y = batch(shape=shape)
    model, twin = Net(**options), twin_of(options)
    truth = recorded(twin, lambda m: plain(m, x, y))
    opt = one_step(model, lambda m: way(m, x, y))
    bias = options.get("bias", True)
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, factors(truth[theirs], y.numel(), bias))


@ALL
def test_gradients_are_bitwise_those_without_taps(options, way):
    found = []
    for tapped in (False, True):
        model, (x, y) = Net(**options), batch(shape=(5, 3))
        opt = make(secondorder.EKFAC, model) if tapped else None
        way(model, x, y)
        found.append([x.grad, *(p.grad for p in model.parameters())])
        del opt
    assert_same_bits(*found)


@ALL
def test_training_is_that_of_the_plain_network(options, way):
    found = []
    for model, run in ((Net(**options), way), (twin_of(options), plain)):
        opt = make(secondorder.EKFAC, model)
        for step in range(4):
            x, y = batch(step, (5, 3))
            run(model, x, y)
            opt.step()
            opt.zero_grad()
        found.append(values(model.parameters()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------- what the network is wrapped in


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@SHAPES
@pytest.mark.parametrize("inplace", [False, True])
def test_network_in_ddp_is_seen_through(alone, inplace, shape):
    model, twin, (x, y) = Net(inplace=inplace), Net(), batch(shape=shape)
    truth = recorded(twin, lambda m: plain(m, x, y))
    wrapped = nn.parallel.DistributedDataParallel(model)
    opt = one_step(wrapped, lambda m: plain(m, x, y))
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, factors(truth[theirs], y.numel()))


def test_bfloat16_copy_of_an_input_is_what_counts():
    """The stream that fed a layer is changed in place after the layer has read it."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            for block in self.blocks:
                x += block(x)
            return x

    model, x, seen = Residual(), torch.randn(7, D), {}
    for block in model.blocks:  # a pre-hook: the input as it was when the layer read it
        block.register_forward_pre_hook(lambda m, args: seen.__setitem__(m.weight, args[0].detach().bfloat16().float()))

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.square().mean().backward()

    opt = one_step(model, run)
    for block in model.blocks:
        a = torch.cat([seen[block.weight], torch.ones(7, 1)], 1)
        torch.testing.assert_close(held(opt, block.weight)[0], a.T @ a / 7, rtol=1e-5, atol=1e-6)


def test_other_hooks_may_change_inputs_and_outputs():
    x, y = batch()
    model, twin = Net(), Net()
    for net in (model, twin):
        net.second.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    truth = recorded(twin, lambda m: loss_of(lambda x: 3 * m(x), x, y).backward())
    for layer in (model.second, model.last):
        layer.register_full_backward_hook(lambda module, gi, go: None)
        layer.register_full_backward_pre_hook(lambda module, go: None)
    model.last.register_forward_hook(lambda module, args, out: 3 * out)
    opt = one_step(model, lambda m: plain(m, x, y))
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, factors(truth[theirs], y.numel()))


# ---------------------------------------------------------------------- partly frozen, partly used


def trains(model, cls, steps=12, **options):
    """An optimizer that has lowered the loss of a batch."""
    opt, losses = make(cls, model, **{**CLIPPED, **options}), []
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model, *batch(shape=(16,)))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    return opt


FROZEN = {
    "weight": ("second.weight",),
    "bias": ("second.bias",),
    "both": ("second.weight", "second.bias"),
    "all weights": ("first.weight", "second.weight", "third.weight", "last.weight"),
    "last layer": ("last.weight", "last.bias"),
}


@BOTH
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_stay_and_the_others_train(cls, names):
    model, twin = Net(), Net()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = trains(model, cls)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in names), name
    assert {name for name, (how, _) in treatments(opt).items() if how == "frozen"} == set(names)
    assert {how for how, _ in treatments(opt).values()} == {"frozen", cls.__name__}
    x, y = batch()
    twin.load_state_dict(model.state_dict())
    truth = recorded(twin, lambda m: plain(m, x, y))
    opt = one_step(model, lambda m: plain(m, x, y))
    for name, p in model.named_parameters():
        layer, _, kind = name.partition(".")
        A, G = factors(truth[getattr(twin, layer).weight], 5, bias=f"{layer}.bias" not in names)
        if p.requires_grad and kind == "weight":
            assert_holds(opt, p, (A, G))
        elif p.requires_grad and f"{layer}.weight" in names:
            torch.testing.assert_close(opt.state[p]["covariance_0"], G, rtol=1e-12, atol=1e-14)


def test_layer_that_trains_its_bias_alone_keeps_no_input():
    """The network may overwrite that input, as without taps."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).double()
    model[1].weight.requires_grad_(False)
    opt = make(secondorder.KFAC, model)
    h = model[0](batch()[0])
    out = model[1](h)
    h.mul_(2)
    (out + h).square().mean().backward()
    opt.step()
    assert treatments(opt)["1.bias"][0] == "KFAC"


@BOTH
def test_low_rank_adapters_train_beside_frozen_layers(cls):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = nn.Linear(H, 2, bias=False), nn.Linear(2, H, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = Net().requires_grad_(False)
    model.second, model.third = Adapted(model.second).double(), Adapted(model.third).double()
    base = model.second.base.weight.clone()
    opt = trains(model, cls)
    assert torch.equal(model.second.base.weight, base)
    assert {how for how, _ in treatments(opt).values()} == {"frozen", cls.__name__}
    opt = one_step(model, lambda m: plain(m, *batch()))
    truth = recorded(model, lambda m: plain(m, *batch()))
    for weight in (model.second.down.weight, model.third.up.weight):
        assert_holds(opt, weight, factors(truth[weight], 5, bias=False))


@BOTH
def test_layers_that_are_not_used_are_left_alone(cls):
    model = Net()
    model.spare = nn.Linear(H, H).double()
    before = values(model.spare.parameters())
    opt = trains(model, cls)
    assert_same_bits(values(model.spare.parameters()), before)
    assert treatments(opt)["spare.weight"][0] == cls.__name__


def test_layer_that_is_skipped_in_a_step_keeps_its_factors():
    model, opt = Net(), None
    opt = make(secondorder.KFAC, model)
    plain(model, *batch(0))
    opt.step()
    kept = [t.clone() for t in held(opt, model.third.weight)]
    for zeros in (False, True):  # gradients None, gradients zero
        opt.zero_grad(set_to_none=not zeros)
        x, y = batch(1)
        F.cross_entropy(model.last(F.relu(model.second(F.relu(model.first(x))))), y).backward()
        opt.step()
        assert_same_bits(held(opt, model.third.weight), kept)
        assert treatments(opt)["third.weight"][0] == "KFAC"


def test_tied_weight_sums_over_the_modules_that_use_it():
    model, twin, (x, y) = Net(), Net(), batch()
    for net in (model, twin):
        net.third.weight = net.second.weight
    truth = recorded(twin, lambda m: plain(m, x, y))
    opt = one_step(model, lambda m: plain(m, x, y))
    uses = truth[twin.second.weight]
    assert len(uses) == 2
    assert_holds(opt, model.second.weight, factors(uses, 5, bias=False))
    for ours, use in ((model.second.bias, uses[0]), (model.third.bias, uses[1])):
        torch.testing.assert_close(opt.state[ours]["covariance_0"], factors([use], 5)[1], rtol=1e-12, atol=1e-14)
    trains(model, secondorder.EKFAC)


# ---------------------------------------------------------------------- what has no statistics


PARAMETRIZED = {
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm by hook": nn.utils.spectral_norm,
    "weight_norm by hook": nn.utils.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@BOTH
@pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*no statistics")
@pytest.mark.parametrize("wrap", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_weights_are_trained_by_the_fallback(cls, wrap):
    model = Net()
    model.second = wrap(model.second)
    before = values(model.second.parameters())
    opt = trains(model, cls)
    assert not any(map(torch.equal, before, values(model.second.parameters())))
    found = treatments(opt)
    for name, _ in model.second.named_parameters(prefix="second"):
        how, why = found[name]
        assert how == "AdamW"
        assert "parametrized" in why or "computed from others" in why
    assert found["first.weight"][0] == cls.__name__


@BOTH
@pytest.mark.filterwarnings("ignore:.*no statistics")
def test_weight_that_is_used_without_its_module_is_trained_by_the_fallback(cls):
    class Functional(Net):
        def forward(self, x):
            x = F.linear(F.relu(self.first(x)), self.second.weight, self.second.bias)
            return self.last(F.relu(x))

    model = Functional()
    before = values(model.second.parameters())
    opt = trains(model, cls)
    assert not any(map(torch.equal, before, values(model.second.parameters())))
    found = treatments(opt)
    for name in ("second.weight", "second.bias"):
        assert found[name][0] == "AdamW" and found[name][1].startswith("second: no statistics")
    assert found["first.weight"][0] == cls.__name__


def by_autograd(model, x, y):
    params = list(model.parameters())
    for p, g in zip(params, torch.autograd.grad(loss_of(model, x, y), params), strict=True):
        p.grad = g


def by_backward_to_parameters(model, x, y):
    loss_of(model, x, y).backward(inputs=list(model.parameters()))


def by_vmap(model, x, y):
    F.cross_entropy(torch.vmap(model)(x), y).backward()


@pytest.mark.filterwarnings("ignore:.*no statistics")
@pytest.mark.parametrize("way", [by_autograd, by_backward_to_parameters, by_vmap])
def test_gradients_that_bring_no_statistics_are_followed_by_the_fallback(way):
    model, (x, y) = Net(), batch()
    opt = make(secondorder.KFAC, model)
    for _ in range(4):
        opt.zero_grad()
        way(model, x, y)
        opt.step()
    assert all(how == "AdamW" and "no statistics" in why for how, why in treatments(opt).values())
    assert not any(map(torch.equal, model.parameters(), Net().parameters()))
    assert loss_of(model, x, y) < loss_of(Net(), x, y)


def test_own_forward_pass_is_named():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Net()
    model.second = Scaled(H, H).double()
    opt = trains(model, secondorder.KFAC)
    assert treatments(opt)["second.weight"] == ("AdamW", "Scaled has a forward pass of its own")


# ---------------------------------------------------------------------- more than one derivative


class Field(nn.Module):
    """A scalar function of one variable, with the residual of u'' = -sin."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, 1)).double()

    def loss(self):
        x = torch.linspace(0, 3.14, 20, dtype=torch.float64)[:, None].requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        ends = self.net(torch.tensor([[0.0], [3.14]], dtype=torch.float64))
        return (ddu + x.sin()).square().mean() + ends.square().mean()


@BOTH
def test_residuals_of_differential_equations_train(cls):
    model, twin = Field(), Field()
    twin.load_state_dict(model.state_dict())
    opt = make(cls, model, **CLIPPED)
    model.loss().backward()
    twin.loss().backward()
    assert_same_bits([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    first = model.loss().item()
    for _ in range(40):
        opt.zero_grad()
        model.loss().backward()
        opt.step()
    assert model.loss().item() < 0.5 * first
    assert {how for how, _ in treatments(opt).values()} == {cls.__name__}


def of_other_parameters(model, x, y):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(params, x, y):
        return loss_of(lambda x: torch.func.functional_call(model, params, (x,)), x[None], y[None])

    torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, x.detach(), y)
    fast = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss_of(lambda x: torch.func.functional_call(model, fast, (x,)), x, y).backward()


def of_inputs(model, x, y):
    x = x.detach()
    torch.func.vmap(torch.func.hessian(model))(x)
    torch.func.jvp(model, (x,), (x,))
    torch.func.vjp(model, x)[1](torch.ones(5, C, dtype=x.dtype))
    torch.func.jacrev(model)(x)


def of_graphs(model, x, y):
    torch.autograd.functional.hessian(lambda x: loss_of(model, x, y), x)
    torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.autograd.functional.jvp(model, x, x)
    torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
    torch.autograd.gradcheck(model, (x,), check_batched_grad=True, check_forward_ad=True)


def of_forward_mode(model, x, y):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        model(dual)


@pytest.mark.parametrize("elsewhere", [of_other_parameters, of_inputs, of_graphs, of_forward_mode])
def test_other_derivatives_work_and_leave_no_trace(elsewhere):
    model, twin, (x, y) = Net(), Net(), batch()
    opt = make(secondorder.EKFAC, model, lr=0.0)
    elsewhere(model, x, y)
    assert not any(t.grad is not None for site in opt._capture.sites for t in site.flat)
    plain(model, x, y)
    opt.step()
    truth = recorded(twin, lambda m: plain(m, x, y))
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, factors(truth[theirs], 5))

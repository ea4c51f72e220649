"""Taps belong to one network and one optimizer: copies, replaced parts, second optimizers, and what a step adds up."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from capturing import (
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
from cases import assert_same_bits, assert_same_state, flat_state, values

BOTH = pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])


class Attentive(nn.Module):
    """An attention layer between two linear ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)
        self.double()

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


NETWORKS = pytest.mark.parametrize("network", [Net, Attentive])


def backward(model, seed=0):
    x, y = batch(seed, (5, 3))
    loss_of(model, x, y).backward()


def train(model, opt, steps):
    for seed in steps:
        backward(model, seed)
        opt.step()
        opt.zero_grad()


def received(opt):
    """Whether anything reached the optimizer's leaves."""
    return any(t.grad is not None for site in opt._capture.sites for t in site.flat)


# ---------------------------------------------------------------------- copies


@NETWORKS
def test_copy_of_a_network_feeds_nothing_to_the_original(network):
    model = network()
    opt = make(secondorder.EKFAC, model)
    twin = copy.deepcopy(model)
    backward(twin)
    assert not received(opt)
    plain = network()
    plain.load_state_dict(model.state_dict())
    backward(plain)
    assert_same_bits([p.grad for p in twin.parameters()], [p.grad for p in plain.parameters()])


@NETWORKS
def test_copy_of_a_network_does_not_keep_the_original(network):
    model = network()
    opt = make(secondorder.KFAC, model)
    twin = copy.deepcopy(model)
    alive = [weakref.ref(p) for p in model.parameters()]
    del model, opt
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    backward(twin)


@NETWORKS
def test_average_of_weights_beside_training_changes_nothing(network):
    found = []
    for averaged in (False, True):
        torch.manual_seed(0)
        model = network()
        opt = make(secondorder.KFAC, model)
        ema = torch.optim.swa_utils.AveragedModel(model) if averaged else None
        for seed in range(4):
            train(model, opt, [seed])
            if ema is not None:
                ema.update_parameters(model)
                backward(ema, seed)
        found.append(values(model.parameters()))
    assert_same_bits(*found)


@NETWORKS
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_networks_are_saved_whole_with_their_taps(network, way):
    model = network()
    opt = make(secondorder.KFAC, model)
    backward(model)
    buffer = io.BytesIO()
    if way == "pickle":
        pickle.dump(model, buffer)
    else:
        torch.save(model, buffer)
    buffer.seek(0)
    loaded = pickle.load(buffer) if way == "pickle" else torch.load(buffer, weights_only=False)
    kept = [t.grad for site in opt._capture.sites for t in site.flat]
    backward(loaded)
    assert all(a is b for a, b in zip(kept, (t.grad for s in opt._capture.sites for t in s.flat), strict=True))
    train(loaded, make(secondorder.KFAC, loaded), range(2))


@BOTH
@NETWORKS
def test_copied_optimizer_asks_for_its_network_and_then_goes_on_with_the_same_bits(cls, network):
    model = network()
    opt = make(cls, model)
    train(model, opt, range(3))
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, other = copied((model, opt))
        with pytest.raises(RuntimeError, match=r"attach\(module\)"):
            other.step()
        with pytest.raises(RuntimeError, match=r"attach\(module\)"):
            other.state_dict()
        other.attach(twin)
        original = copy.deepcopy((model, opt))
        original[1].attach(original[0])
        for net, optimizer in ((twin, other), original):
            train(net, optimizer, range(3, 7))
        assert_same_bits(values(twin.parameters()), values(original[0].parameters()))
        assert_same_state(flat_state(other), flat_state(original[1]))
    alone = [copy.deepcopy(p) for p in model.parameters()]
    train(model, opt, range(3, 7))
    assert_same_bits(values(model.parameters()), values(twin.parameters()))
    assert not any(map(torch.equal, alone, model.parameters()))


# ---------------------------------------------------------------------- hooks


def hooks(model):
    taps = [m.__dict__["tap"] for m in model.modules() if m.__dict__.get("tap") is not None]
    return [hook for m in model.modules() for hook in m._forward_hooks.values()] + taps


@NETWORKS
def test_hooks_go_with_the_optimizer(network):
    model = network()
    assert not hooks(model)
    opt = make(secondorder.KFAC, model)
    assert hooks(model)
    train(model, opt, range(2))
    del opt
    gc.collect()
    assert not hooks(model)
    backward(model)


@NETWORKS
def test_hooks_are_set_once_however_often_the_network_is_attached(network):
    model = network()
    opt = make(secondorder.KFAC, model)
    before = len(hooks(model))
    opt.attach(model)
    opt.attach(nn.parallel.DataParallel(model).module)
    assert len(hooks(model)) == before


def test_network_does_not_live_on_in_its_optimizer():
    model = Net()
    opt = make(secondorder.KFAC, model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    opt.step()


@BOTH
def test_two_optimizers_share_a_network(cls):
    """One for the first two layers, one for the others: the same as one of two groups, momentum and clip apart."""
    model, twin = Net(), Net()
    parts = [[*m.first.parameters(), *m.second.parameters()] for m in (model, twin)]
    rest = [[*m.third.parameters(), *m.last.parameters()] for m in (model, twin)]
    one = make(cls, model, [{"params": parts[0]}, {"params": rest[0]}], refresh="together")
    two = [make(cls, twin, params, refresh="together") for params in (parts[1], rest[1])]
    third = make(cls, twin)  # one that is thrown away
    backward(twin)
    del third
    gc.collect()
    twin.zero_grad()
    for opt in two:
        opt.zero_grad()
    for seed in range(4):
        train(model, one, [seed])
        backward(twin, seed)
        for opt in two:
            opt.step()
            opt.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- replaced parts


@BOTH
def test_parameters_may_be_replaced_in_network_and_groups(cls):
    """As wrappers do that move or shard parameters: values stay, objects are new."""
    model, twin = Net(), Net()
    opt, other = make(cls, model), make(cls, twin)
    train(model, opt, range(3))
    train(twin, other, range(3))
    new = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            new[p] = module._parameters[name] = nn.Parameter(p.detach().clone())
    for group in opt.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    backward(model, 3)  # the taps do not know the new parameters before the step has seen them
    opt.step()
    train(model, opt, range(4, 8))
    train(twin, other, range(3, 8))
    assert {how for how, _ in treatments(opt).values()} == {cls.__name__}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert opt.state[p]["step"] == other.state[q]["step"] == 8
        if "seen" in opt.state[p]:
            assert opt.state[p]["seen"] == 7 and other.state[q]["seen"] == 8


@BOTH
@pytest.mark.filterwarnings("ignore:.*start afresh.*not a parameter of the module")
def test_replaced_layer_is_taken_up_with_its_group(cls):
    model = Net()
    opt = make(cls, model)
    train(model, opt, range(2))
    old, model.last = model.last, nn.Linear(16, 4).double()
    kept = values([*old.parameters(), *model.last.parameters()])
    train(model, opt, range(2, 5))
    assert_same_bits(values([*old.parameters(), *model.last.parameters()]), kept)
    assert treatments(opt)["third.weight"][0] == cls.__name__
    opt.add_param_group({"params": list(model.last.parameters())})
    train(model, opt, range(5, 8))
    assert not any(map(torch.equal, kept[2:], model.last.parameters()))
    assert opt.state[model.last.weight]["seen"] == 3
    assert all(how == cls.__name__ for how, _ in treatments(opt).values())


# ---------------------------------------------------------------------- what a step adds up


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulation_over_micro_batches_is_one_batch(parts):
    x, y = batch(shape=(10,))

    def run(model):
        for i in range(parts):
            (loss_of(model, x[i::parts], y[i::parts]) / parts).backward()

    whole, model = Net(), Net()
    expected = one_step(whole, lambda m: loss_of(m, x, y).backward())
    found = one_step(model, run)
    for ours, theirs in zip(weights(model), weights(whole), strict=True):
        assert_holds(found, ours, held(expected, theirs))


def test_gradients_that_are_dropped_take_their_statistics_along():
    model, twin = Net(), Net()
    opt = make(secondorder.KFAC, model, lr=0.0)
    backward(model, 1)
    opt.zero_grad()
    assert not received(opt)
    backward(model, 0)
    opt.step()
    expected = one_step(twin, backward)
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_same_bits(held(opt, ours), held(expected, theirs))


SCALE = 2.0**16


def by_hand(model, opt, x, y):
    (loss_of(model, x, y) * SCALE).backward()
    for p in model.parameters():
        p.grad /= SCALE
    opt.step()


def by_scaler(model, opt, x, y, clip=None):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, x, y)).backward()
    scaler.step(opt)
    scaler.update()


def with_clipping(model, opt, x, y):
    scaler = opt._grad_scaler
    scaler.scale(loss_of(model, x, y)).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(opt)
    scaler.update()


def in_micro_batches(model, opt, x, y):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for i in range(2):
        scaler.scale(loss_of(model, x[i::2], y[i::2]) / 2).backward()
    scaler.step(opt)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", [by_hand, by_scaler, with_clipping, in_micro_batches])
def test_loss_scale_leaves_no_trace(way, bias, dtype):
    x, y = batch(shape=(8,))
    x = x.detach().to(dtype)
    model, twin = Net(bias=bias).to(dtype), Net(bias=bias).to(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if way is with_clipping else None
    opt = make(secondorder.KFAC, model, lr=0.0, grad_scaler=scaler)
    way(model, opt, x, y)
    expected = one_step(twin, lambda m: loss_of(m, x, y).backward())
    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        assert_holds(opt, ours, held(expected, theirs), 1e-6)


def test_loss_scale_is_measured_where_the_last_layer_takes_no_part():
    """Two heads that take turns."""
    model = Net()
    model.other = nn.Linear(16, 4).double()
    twin = copy.deepcopy(model)
    x, y = batch(shape=(8,))

    def loss(m):
        h = F.relu(m.first(x))
        return F.cross_entropy(m.last(F.relu(m.third(F.relu(m.second(h))))), y)

    opt = make(secondorder.KFAC, model, lr=0.0)
    (loss(model) * SCALE).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= SCALE
    opt.step()
    truth = recorded(twin, lambda m: loss(m).backward())
    for name in ("first", "second", "third", "last"):
        assert_holds(opt, getattr(model, name).weight, factors(truth[getattr(twin, name).weight], 8), 1e-6)


@BOTH
def test_taps_are_off_between_statistics(cls):
    model = Net()
    opt = make(cls, model, statistics_every=3)
    for call in range(1, 8):
        backward(model, call)
        observes = opt._method(opt.param_groups[0]).observes(call, opt.param_groups[0])
        assert received(opt) == observes
        assert [type(out.grad_fn).__name__ for out in (model.first(torch.zeros(1, 6, dtype=torch.float64)),)] == [
            "TapBackward" if observes else "AddmmBackward0"
        ]
        opt.step()
        opt.zero_grad()
    assert opt.state[model.first.weight]["seen"] == 3


def test_head_whose_loss_has_weight_zero_takes_nothing_from_the_others():
    model = Net()
    model.other = nn.Linear(16, 4).double()
    twin = copy.deepcopy(model)
    x, y = batch(shape=(8,))

    def loss(m):
        h = F.relu(m.third(F.relu(m.second(F.relu(m.first(x))))))
        return F.cross_entropy(m.last(h), y) + 0.0 * F.cross_entropy(m.other(h), y)

    opt = one_step(model, lambda m: loss(m).backward())
    truth = recorded(twin, lambda m: loss(m).backward())
    for name in ("first", "second", "third", "last"):
        assert_holds(opt, getattr(model, name).weight, factors(truth[getattr(twin, name).weight], 8))

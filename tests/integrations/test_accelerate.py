"""Accelerate: what `prepare` does to an optimizer leaves it as it was, and the loop trains as a plain one does."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import cases
import secondorder

accelerate = pytest.importorskip("accelerate")

slow = pytest.mark.integrations
OPTIONS = dict(lr=1e-2, weight_decay=0.1, refresh_every=3, statistics_every=1)
CLASSES = [secondorder.SOAP, secondorder.KFAC, secondorder.SINGD, secondorder.SIRFShampoo]
every_class = pytest.mark.parametrize("cls", CLASSES)


@pytest.fixture(autouse=True)
def _no_accelerator_before():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def make(cls, model):
    """With those of the options that the class has."""
    known = inspect.signature(cls).parameters
    options = {name: value for name, value in OPTIONS.items() if name in known}
    return cls(model.parameters(), module=model, **options)


def batches(count, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count * 8, 6, generator=g)
    return DataLoader(TensorDataset(x.to(dtype), x[:, :3].argmax(1)), batch_size=8)


def loop(model, opt, data, accumulation=1, clip=None):
    """Written out, without Accelerate."""
    for i, (x, y) in enumerate(data, 1):
        (cross_entropy(model(x).float(), y) / accumulation).backward()
        if i % accumulation == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()


def accelerated(accelerator, model, opt, data, clip=None):
    """As a user writes it; returns the loss of every batch."""
    losses = []
    for x, y in data:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(x).float(), y)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    return losses


@slow
@every_class
@pytest.mark.parametrize(("accumulation", "clip"), [(2, 0.5), (1, None)])
def test_trains_as_a_plain_loop(cls, accumulation, clip):
    ours, theirs = net(), net()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, opt, data = accelerator.prepare(ours, make(cls, ours), batches(12))
    accelerated(accelerator, model, opt, data, clip)
    loop(theirs, make(cls, theirs), batches(12), accumulation, clip)
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
@every_class
def test_state_stays_in_float32_through_prepare(cls):
    """`prepare` saves and loads the state; torch's own loading casts it to the dtype of the parameters."""
    ours, theirs = net(torch.bfloat16), net(torch.bfloat16)
    mine, other = make(cls, ours), make(cls, theirs)
    loop(ours, mine, batches(4, torch.bfloat16))
    before = cases.flat_state(mine)
    assert {v.dtype for v in before.values() if v.is_floating_point()} == {torch.float32}
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt, data = accelerator.prepare(ours, mine, batches(4, torch.bfloat16))
    cases.assert_same_state(cases.flat_state(opt), before)
    accelerated(accelerator, model, opt, data)
    for _ in range(2):
        loop(theirs, other, batches(4, torch.bfloat16))
    cases.assert_same_state(cases.flat_state(opt), cases.flat_state(other))
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
@every_class
def test_autocast_trains(cls):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = net()
    prepared, opt, data = accelerator.prepare(model, make(cls, model), batches(80))
    losses = accelerated(accelerator, prepared, opt, data)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if issubclass(cls, (secondorder.KFAC, secondorder.SINGD)):
        assert {row.treatment for row in opt.optimizer.coverage()} == {cls.__name__}


@slow
@every_class
def test_save_state_and_load_state_go_on_with_the_same_bits(cls, tmp_path):
    def prepared():
        model = net()
        return accelerator.prepare(model, make(cls, model), batches(6))

    accelerator = accelerate.Accelerator(cpu=True)
    model, opt, data = prepared()
    accelerated(accelerator, model, opt, data)
    accelerator.save_state(str(tmp_path))
    accelerated(accelerator, model, opt, data)
    expected = cases.values(model.parameters()), cases.flat_state(opt)

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt, data = prepared()
    accelerator.load_state(str(tmp_path))
    accelerated(accelerator, model, opt, data)
    cases.assert_same_bits(model.parameters(), expected[0])
    cases.assert_same_state(cases.flat_state(opt), expected[1])


def test_prepared_network_is_a_module_too():
    """`prepare(model)` first, the optimizer after it."""
    ours, theirs = net(), net()
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(ours)
    opt, data = accelerator.prepare(make(secondorder.KFAC, model), batches(6))
    accelerated(accelerator, model, opt, data)
    loop(theirs, make(secondorder.KFAC, theirs), batches(6))
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
def test_scheduler_is_followed():
    model = net()
    opt = make(secondorder.SOAP, model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt, data, schedule = accelerator.prepare(model, opt, batches(3), schedule)
    for x, y in data:
        accelerator.backward(cross_entropy(model(x), y))
        opt.step()
        schedule.step()
        opt.zero_grad()
    assert opt.param_groups[0]["lr"] == OPTIONS["lr"] / 8


@slow
def test_example_learns(example):
    losses = example("accelerate_loop.py")["losses"]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])

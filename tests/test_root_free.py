"""RFAdamW and RFRMSProp against float64 transcripts of their doc-strings, and what the batch factor is for."""

import pytest
import torch
from torch import nn

import cases
from cases import gradient, parameters
from secondorder import RFAdamW, RFRMSProp

BOTH = pytest.mark.parametrize("cls", [RFAdamW, RFRMSProp])
PLAIN = dict(lr=0.02, betas=(0.9, 0.8), eps=1e-3)


def batches(step: int) -> float:
    """Uneven batches: every third one is smaller."""
    return 3.0 if step % 3 == 2 else 8.0


def transcript(cls, p, steps, *, lr, betas, eps, weight_decay=0.0, batch=None, initial=1.0):
    """The doc-strings read aloud; returns the parameter and s."""
    (b1, b2), p = betas, p.clone()
    m, s = torch.zeros_like(p), torch.full_like(p, initial or 0.0)
    for step in range(steps):
        g, t = gradient(tuple(p.shape), step, dtype=p.dtype), step + 1
        rate = 1 - b2 if initial is not None else (1 - b2) / (1 - b2**t)
        s = s + rate * ((batch(step) if batch else 1.0) * g**2 - s)
        p = p * (1 - lr * weight_decay)
        if cls is RFAdamW:
            m = b1 * m + (1 - b1) * g
            p = p - lr * m / (1 - b1**t) / (s + eps)
        else:
            m = b1 * m + g / (s + eps)
            p = p - lr * m
    return p, s


@BOTH
@pytest.mark.parametrize("initial", [None, 1.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 3), (5,), (), (2, 3, 2)], ids=str)
def test_each_is_its_docstring(cls, initial, shape):
    (p,) = parameters([shape], dtype=torch.float64)
    options = dict(PLAIN, weight_decay=0.1, initial=initial)
    wanted, s = transcript(cls, p.detach(), 15, batch=batches, **options)
    optimizer = cls([p], **options)

    def set_batch(step):
        optimizer.param_groups[0]["batch_size"] = batches(step)

    cases.train(optimizer, [p], range(15), before=set_batch)
    torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.curvature(p).diag(), s, rtol=1e-12, atol=0)


@BOTH
def test_batch_size_defaults_to_one(cls):
    bits = []
    for more in ({}, {"batch_size": None}, {"batch_size": 1}, {"batch_size": torch.tensor([1])}):
        params = parameters()
        cases.train(cls(params, **more), params, range(4))
        bits.append(params)
    for other in bits[1:]:
        cases.assert_same_bits(bits[0], other)


@BOTH
def test_batch_size_may_be_a_tensor_that_changes_in_place(cls):
    (p,) = parameters([(4, 3)], dtype=torch.float64)
    wanted, _ = transcript(cls, p.detach(), 9, batch=batches, **PLAIN)
    size = torch.ones(1)
    optimizer = cls([p], batch_size=size, weight_decay=0.0, **PLAIN)
    cases.train(optimizer, [p], range(9), before=lambda step: size.fill_(batches(step)))
    torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=1e-12)


@BOTH
def test_groups_have_batches_of_their_own(cls):
    params, twins = parameters([(4, 3), (4, 3)]), parameters([(4, 3), (4, 3)])
    optimizer = cls([{"params": params[:1], "batch_size": 4}, {"params": params[1:]}], **PLAIN)
    alone = cls(twins[:1], batch_size=4, **PLAIN), cls(twins[1:], **PLAIN)
    for step in range(5):
        cases.feed(params, step)
        cases.feed(twins, step)
        optimizer.step()
        for other in alone:
            other.step()
    cases.assert_same_bits(params, twins)


@BOTH
@pytest.mark.parametrize("bad", [0, -2.0, True, torch.tensor([1.0, 2.0]), torch.tensor(0.0)], ids=repr)
def test_bad_batch_size_is_refused(cls, bad):
    with pytest.raises(ValueError, match="batch_size"):
        cls(parameters(), batch_size=bad)


@BOTH
def test_no_step_reads_a_batch_size_that_lives_on_a_device(cls):
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(3, 2), (4,)]]
    optimizer = cls(params, batch_size=torch.tensor(8.0, device="meta"), initial=None)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@BOTH
def test_batch_size_survives_a_checkpoint(cls):
    params, twins = parameters(), parameters()
    a, b = cls(params, batch_size=torch.tensor(8.0)), cls(twins)
    cases.train(a, params, range(3))
    b.load_state_dict(a.state_dict())
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    cases.train(a, params, range(3, 6))
    cases.train(b, twins, range(3, 6))
    cases.assert_same_bits(params, twins)


@pytest.mark.parametrize("size", [1, 64])
def test_curvature_does_not_depend_on_the_batch(size):
    """Means over B independent gradients of variance v: B g² averages to v, whatever B is."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 5)
    p = nn.Parameter(torch.zeros(400, 5))
    optimizer = RFAdamW([p], lr=0.0, betas=(0.9, 0.98), batch_size=size, initial=None)
    for _ in range(100):
        p.grad = torch.randn(size, 400, 5, generator=generator).mean(0) * scales
        optimizer.step()
    found = optimizer.curvature(p).diag().view(400, 5).mean(0)
    torch.testing.assert_close(found, scales.square(), rtol=0.05, atol=0)


@BOTH
def test_scale_of_the_loss_is_taken_up_by_batch_damping_and_prior(cls):
    """With c·loss, s must be c·s: `B -> B/c`, `eps -> c·eps`, `initial -> c·initial` leave all steps as they were."""
    c = 7.0
    params, twins = (parameters(dtype=torch.float64) for _ in range(2))
    a = cls(params, lr=0.02, eps=1e-3, batch_size=8.0, initial=0.5)
    b = cls(twins, lr=0.02, eps=c * 1e-3, batch_size=8.0 / c, initial=c * 0.5)
    cases.train(a, params, range(10))
    cases.train(b, twins, range(10), before=lambda step: [q.grad.mul_(c) for q in twins])
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@BOTH
def test_steps_have_the_units_of_the_parameter(cls):
    """In coordinates `φ = θ/D`, where gradients are `D g`, steps are `1/D` times as long (no prior, no damping)."""
    shape = (4, 3)
    D = torch.logspace(-2, 2, 12, dtype=torch.float64).view(shape)
    (theta,) = parameters([shape], dtype=torch.float64)
    phi = nn.Parameter(theta.detach() / D)
    options = dict(lr=1e-3, eps=0.0, initial=None)
    a, b = cls([theta], **options), cls([phi], **options)
    for step in range(10):
        theta.grad = gradient(shape, step, dtype=torch.float64)
        phi.grad = D * theta.grad
        a.step()
        b.step()
    torch.testing.assert_close(phi.detach() * D, theta.detach(), rtol=1e-10, atol=1e-10)


@BOTH
def test_prior_is_worn_away_by_the_second_beta(cls):
    (p,) = parameters([(4, 3)], dtype=torch.float64)
    optimizer = cls([p], betas=(0.0, 0.5), initial=2.0)
    for _ in range(6):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(optimizer.curvature(p).diag(), torch.full((4, 3), 2.0 / 64, dtype=torch.float64))


def test_averages_are_float32_for_half_precision():
    """An average in bfloat16 would stand still: its rate is below half an ulp."""
    params = parameters([(4, 3)], dtype=torch.bfloat16)
    optimizer = RFAdamW(params, betas=(0.9, 0.999), initial=None)
    cases.train(optimizer, params, range(3))
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.float32

"""`param_rounding="stochastic"`: bfloat16 parameters that follow float32 ones on average, and lose no small update."""

import copy

import pytest
import torch
from torch import nn

import secondorder
from distributed import pool

LR, UNIT = 3e-4, 2**-8  # the latter in the last place, below 1
CLASSES = (secondorder.AdamW, secondorder.SOAP, secondorder.InverseFreeKLShampoo)


def run(cls, params, steps, seed=0, **options):
    optimizer = cls(params, lr=LR, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).add_(1.0).to(p.dtype)
        optimizer.step()
    return optimizer


def ones(*shapes):
    return [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_below_half_a_unit_add_up(cls, decay):
    shapes = ((24, 40), (300,))
    nearest, stochastic = ones(*shapes), ones(*shapes)
    whole = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for params, options in ((nearest, {}), (stochastic, {"param_rounding": "stochastic"}), (whole, {})):
        run(cls, params, 40, weight_decay=decay, **options)
    for near, random, exact in zip(nearest, stochastic, whole, strict=True):
        assert torch.equal(near, torch.ones_like(near))
        # A step of size u is rounded to 0 or to a unit: variance u (unit - u), in each of 40 steps and every entry.
        noise = (40 * 2 * LR * UNIT / exact.numel()) ** 0.5
        moved, off = float(1 - exact.mean()), float((random.float().mean() - exact.mean()).abs())
        assert moved > 3 * noise
        assert off < 2 * noise


def test_parameters_have_noise_of_their_own():
    params = ones((16, 16), (16, 16))
    run(secondorder.AdamW, params, 1, param_rounding="stochastic")
    first, second = ones((16, 16), (16, 16))
    for p in (first, second):
        p.grad = torch.ones_like(p)
    secondorder.AdamW([first, second], lr=1e-3, param_rounding="stochastic").step()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("cls", CLASSES)
def test_tiles_and_groups_do_not_change_the_bits_and_a_run_can_be_resumed(cls):
    options = {"param_rounding": "stochastic"}
    if cls is not secondorder.AdamW:
        options["max_block_size"] = 16
    together, apart = ones((24, 40), (24, 40), (30,)), ones((24, 40), (24, 40), (30,))
    run(cls, together, 6, **options)
    groups = cls([{"params": [p]} for p in apart], lr=LR, **options)
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        if t == 3:
            state = copy.deepcopy(groups.state_dict())
            groups = cls([{"params": [p]} for p in apart], lr=LR, **options)
            groups.load_state_dict(state)
        for p in apart:
            p.grad = torch.randn(p.shape, generator=generator).add_(1.0).to(p.dtype)
        groups.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_a_refused_step_changes_nothing():
    params = [nn.Parameter(torch.randn(9, 7).to(torch.bfloat16))]
    optimizer = run(secondorder.SOAP, params, 3, param_rounding="stochastic", weight_decay=0.1)
    before = params[0].clone()
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    assert torch.equal(params[0], before)


def test_float32_parameters_are_not_rounded():
    plain, asked = ([nn.Parameter(torch.ones(8, 8))] for _ in range(2))
    run(secondorder.SOAP, plain, 3)
    run(secondorder.SOAP, asked, 3, param_rounding="stochastic")
    assert torch.equal(plain[0], asked[0])


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="param_rounding"):
        secondorder.SOAP(ones((3, 3)), param_rounding="up")


def refuses(rank, world):
    params = ones((6, 4))
    params[0].grad = torch.ones_like(params[0])
    try:
        secondorder.SOAP(params, sharding="owners", param_rounding="stochastic").step()
    except ValueError as error:
        return str(error)
    return "nothing was said"


def test_parts_of_parameters_are_refused():
    for said in pool.run(2, refuses):
        assert "must be 'nearest' where blocks are shared" in said

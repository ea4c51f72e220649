"""SOAP against a dense float64 transcript of its doc-string, and the size of its updates."""

from itertools import product

import pytest
import torch

import cases
from cases import gradient, parameters
from dense import DenseSOAP
from secondorder import SOAP

SETTINGS = [
    dict(refresh_every=every, refresh_by=by, first=first, nesterov=nesterov)
    for every, by, (first, nesterov) in product((1, 10), ("qr", "eigh"), (("skip", False), ("apply", True)))
]


def assert_equals_dense(shape, tiles, modes, steps=25, **options):
    """Train one matrix with SOAP, its `tiles` with the transcript, on the same gradients."""
    hp = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor_beta=0.9, first="apply", nesterov=True)
    hp.update(refresh_by="qr", refresh_every=10)
    hp.update({k: v for k, v in options.items() if k in hp})
    (p,) = parameters([shape], dtype=torch.float64)
    dense = [(tile, DenseSOAP(p.detach()[tile].clone(), modes, hp)) for tile in tiles]
    optimizer = SOAP([p], refresh="together", **{**hp, **options})
    for step in range(steps):
        p.grad = gradient(shape, step, dtype=torch.float64)
        optimizer.step()
        for tile, block in dense:
            block.step(p.grad[tile])
    for tile, block in dense:
        torch.testing.assert_close(p.detach()[tile], block.W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o.values())))
def test_soap_is_its_docstring(options):
    assert_equals_dense((6, 6), [(slice(0, 6), slice(0, 6))], (0, 1), max_block_size=None, **options)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("by", ["qr", "eigh"])
def test_blocks_are_separate_problems(every, by):
    rows, columns = (slice(0, 5), slice(5, 10)), (slice(0, 5), slice(5, 10), slice(10, 15))
    tiles = list(product(rows, columns))
    assert_equals_dense((10, 15), tiles, (0, 1), max_block_size=5, refresh_every=every, refresh_by=by)


def test_uneven_sides_are_cut_evenly():
    rows, columns = (slice(0, 4), slice(4, 7)), (slice(0, 4), slice(4, 8), slice(8, 11))
    assert_equals_dense((7, 11), list(product(rows, columns)), (0, 1), max_block_size=5)


@pytest.mark.parametrize(("shape", "mode"), [((4, 20), 0), ((20, 4), 1)])
@pytest.mark.parametrize("every", [1, 10])
def test_wide_matrices_have_a_factor_on_the_small_side_only(shape, mode, every):
    everything = [(slice(0, shape[0]), slice(0, shape[1]))]
    assert_equals_dense(shape, everything, (mode,), one_sided_aspect=5.0, refresh_every=every)


def test_one_sided_matrices_are_cut_along_the_small_side():
    tiles = [(slice(a, a + 3), slice(0, 30)) for a in (0, 3)]
    assert_equals_dense((6, 30), tiles, (0,), max_block_size=5)


def test_convolution_is_a_matrix_of_its_output_channels():
    conv, matrix = parameters([(6, 2, 2, 2)], dtype=torch.float64), parameters([(6, 8)], dtype=torch.float64)
    for params in (conv, matrix):
        optimizer = SOAP(params, refresh_every=3)
        for step in range(10):
            params[0].grad = gradient((6, 8), step, dtype=torch.float64).view(params[0].shape)
            optimizer.step()
    torch.testing.assert_close(conv[0].detach().flatten(1), matrix[0].detach(), rtol=0, atol=0)


def test_factor_beta_defaults_to_the_second_beta():
    bits = []
    for options in (dict(), dict(factor_beta=0.8)):
        params = parameters([(6, 5)])
        cases.train(SOAP(params, betas=(0.9, 0.8), refresh_every=2, **options), params, range(12))
        bits.append(params[0].detach())
    assert torch.equal(*bits)


def test_fallback_has_its_own_betas_and_rate():
    (vector,), (twin,) = parameters([(7,)]), parameters([(7,)])
    ours = SOAP([vector], lr=0.1, fallback_betas=(0.8, 0.99), fallback_lr_scale=0.5, weight_decay=0.2)
    theirs = torch.optim.AdamW([twin], lr=0.05, betas=(0.8, 0.99), weight_decay=0.2)
    for step in range(10):
        for p, optimizer in ((vector, ours), (twin, theirs)):
            p.grad = gradient((7,), step)
            optimizer.step()
    torch.testing.assert_close(vector, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24)], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(refresh_by="eigh"), dict(first="skip", nesterov=False)], ids=str)
@pytest.mark.parametrize("every", [1, 10])
def test_no_update_is_a_spike(shape, every, options):
    """Root mean square of an update, in units of lr, over 300 anisotropic gradients: at most 1.5 (Adam: 1)."""
    generator = torch.Generator().manual_seed(1)
    turns = [torch.linalg.qr(torch.randn(d, d, generator=generator)).Q * torch.logspace(0, -1.5, d) for d in shape]
    (p,) = parameters([shape])
    whole = dict(max_block_size=None, one_sided_aspect=None)
    optimizer = SOAP([p], lr=1e-3, weight_decay=0.0, refresh_every=every, **whole, **options)
    worst = 0.0
    for _ in range(300):
        before = p.detach().clone()
        p.grad = turns[0] @ torch.randn(shape, generator=generator) @ turns[1].T
        optimizer.step()
        worst = max(worst, float((p.detach() - before).square().mean().sqrt()) / 1e-3)
    assert 0.5 < worst <= 1.5


@pytest.mark.parametrize("steps", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_basis_stays_orthogonal(steps):
    (p,) = parameters([(12, 9)])
    optimizer = SOAP([p], refresh_every=1)
    cases.train(optimizer, [p], range(steps))
    for mode, d in enumerate(p.shape):
        Q = optimizer.state[p][f"basis_{mode}"]
        assert (Q.T @ Q - torch.eye(d)).abs().max() < 1e-5

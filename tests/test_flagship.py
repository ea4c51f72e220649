"""InverseFreeKLShampoo beyond its recorded trajectories: what it converges to, and what it survives."""

import pytest
import torch
from torch import nn

import secondorder
from secondorder.layout.blocks import two_sided_blocks


def gaussian(generator, m, n, dtype=torch.float32):
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)


def conditioned(d, condition, generator):
    """A square matrix with singular values from 1 down to 1 / condition."""
    left = torch.linalg.qr(gaussian(generator, d, d, torch.float64)).Q
    right = torch.linalg.qr(gaussian(generator, d, d, torch.float64)).Q
    return (left * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)) @ right


def test_factors_find_the_inverse_covariance_of_kronecker_gaussians():
    g = torch.Generator().manual_seed(0)
    m, n, f64 = 6, 9, torch.float64
    L, R = conditioned(m, 10.0, g), conditioned(n, 10.0, g)
    p = nn.Parameter(torch.zeros(m, n, dtype=f64))
    optimizer = secondorder.InverseFreeKLShampoo([p], lr=1e-9, factor_rate=0.002, dense_steps=10**6)
    for _ in range(3000):
        p.grad = L @ gaussian(g, m, n, f64) @ R.mT
        optimizer.step()
    roots = [optimizer.state[p][f"root_{i}"] for i in range(2)]
    found = torch.kron(*(K @ K.mT for K in roots))
    truth = torch.linalg.inv(torch.kron(L @ L.mT, R @ R.mT))
    assert (found * truth).sum() / found.norm() / truth.norm() >= 0.99
    # The scale is fixed too: the whitened gradient has mean square 1.
    assert (found.diagonal().mean() / truth.diagonal().mean()).log().abs() < 0.2


def streams(m, n):
    """Gradients that broke the method's first form: `(name, function of step and generator)`."""
    fixed = torch.Generator().manual_seed(7)
    L8, R8, L4, R4 = (conditioned(d, c, fixed).float() for c in (1e8, 1e4) for d in (m, n))
    u, v = gaussian(fixed, m, 1), gaussian(fixed, 1, n)
    rows = (torch.arange(m) % 2)[:, None].float()

    def spike(t):
        return 1e3 if t % 100 == 50 else 1e-3 if t % 100 == 80 else 1.0

    return {
        "condition 1e8": lambda t, g: L8 @ gaussian(g, m, n) @ R8.mT,
        "condition 1e4": lambda t, g: L4 @ gaussian(g, m, n) @ R4.mT,
        "rank one": lambda t, g: gaussian(g, m, 1) @ gaussian(g, 1, n),
        "one fixed direction": lambda t, g: (u @ v) * torch.randn((), generator=g),
        "zeros for a while": lambda t, g: gaussian(g, m, n) * (0.0 if 40 <= t < 140 else 1.0),
        "zero rows": lambda t, g: gaussian(g, m, n) * rows if t < 200 else gaussian(g, m, n),
        "spikes": lambda t, g: gaussian(g, m, n) * spike(t),
        "a thousand times larger from then on": lambda t, g: gaussian(g, m, n) * (1e3 if t >= 100 else 1.0),
        "a thousand times smaller from then on": lambda t, g: gaussian(g, m, n) * (1e-3 if t >= 100 else 1.0),
    }


def survive(name, steps, shape=(32, 48)):
    gradient = streams(*shape)[name]
    g = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = secondorder.InverseFreeKLShampoo([p], lr=1.0)
    for t in range(steps):
        with torch.no_grad():
            p.zero_()
        p.grad = gradient(t, g)
        optimizer.step()
        size = p.detach().square().mean().sqrt()
        assert size <= 1.0 + 1e-5, f"step {t}: RMS of the update {size}"
        if t % 50 == 49 or t == steps - 1:
            for i in range(2):
                K = optimizer.state[p][f"root_{i}"].double()
                assert K.isfinite().all()
                assert torch.linalg.eigvalsh((K + K.mT) / 2)[0] > 0, f"step {t}: mode {i} is no longer definite"
                assert (K - K.mT).norm() <= 0.1 * K.norm(), f"step {t}: mode {i} is not symmetric"
    assert optimizer.diagnostics()["refresh_failures"] == 0


@pytest.mark.parametrize("name", streams(4, 4))
def test_roots_stay_definite_and_updates_bounded(name):
    survive(name, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", streams(4, 4))
def test_roots_stay_definite_for_thousands_of_steps(name):
    survive(name, 5000)


def test_factors_rest_between_statistics():
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer = secondorder.InverseFreeKLShampoo([p], statistics_every=4, dense_steps=3)
    g, moved = torch.Generator().manual_seed(0), []
    for _ in range(12):
        before = optimizer.state_dict()["state"][0]["root_0"].clone()
        p.grad = gaussian(g, 6, 5)
        optimizer.step()
        moved.append(not torch.equal(before, optimizer.state[p]["root_0"]))
    assert [t for t, m in enumerate(moved, 1) if m] == [1, 2, 3, 4, 8, 12]


def test_a_block_whose_whitened_gradient_overflows_sits_the_step_out():
    p, q = (nn.Parameter(torch.zeros(6, 5)) for _ in range(2))
    optimizer = secondorder.InverseFreeKLShampoo([p, q])
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        p.grad, q.grad = gaussian(g, 6, 5), gaussian(g, 6, 5)
        optimizer.step()
    optimizer.state[p]["root_0"].mul_(1e25)
    optimizer.state[p]["root_1"].mul_(1e25)
    kept = {key: value.clone() for key, value in optimizer.state[p].items()}
    values = p.detach().clone(), q.detach().clone()
    p.grad, q.grad = gaussian(g, 6, 5), gaussian(g, 6, 5)
    optimizer.step()
    assert all(torch.equal(value, optimizer.state[p][key]) for key, value in kept.items() if key != "step")
    assert torch.equal(p, values[0]) and not torch.equal(q, values[1])


def test_vocabulary_sides_are_diagonal_and_wide_hidden_sides_dense():
    hp = {"max_block_size": 512, "max_precond_dim": 16384}
    assert two_sided_blocks((64, 4096), hp, "hidden").modes == (0, 1)
    assert two_sided_blocks((256, 64), hp, "embedding").diagonal == (0,)
    assert two_sided_blocks((64, 20000), hp, None).diagonal == (1,)
    assert two_sided_blocks((64, 20000), hp, "hidden").diagonal == ()
    assert two_sided_blocks((1, 30), hp, None).fallback


@pytest.mark.parametrize("role", ["hidden", "embedding"])
def test_preconditioner_is_what_the_next_step_applies(role):
    """Up to the skew part of the roots; exactly so for a diagonal one."""
    g, f64 = torch.Generator().manual_seed(0), torch.float64
    p = nn.Parameter(torch.zeros(12, 5, dtype=f64))
    group = {"params": [p], "role": role}
    options = dict(lr=0.1, betas=(0.0, 0.9), nesterov=False, clip=None, max_update_rms=None)
    optimizer = secondorder.InverseFreeKLShampoo([group], **options)
    for _ in range(100):
        P, before = optimizer.preconditioner(p) if p in optimizer.state else None, p.detach().clone()
        p.grad = gaussian(g, 12, 5, f64)
        optimizer.step()
    wanted = 0.1 * (P @ p.grad)
    torch.testing.assert_close(before - p.detach(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item())
    curvature, squared = optimizer.curvature(p), optimizer.preconditioner(p).power(-2)
    torch.testing.assert_close(curvature.to_dense(), squared.to_dense())
    assert (role == "embedding") == (optimizer.state[p]["root_0"].ndim == 1)


def test_state_is_half_of_soaps():
    shapes = [(96, 96)] * 3
    ours, soaps = (
        cls([nn.Parameter(torch.zeros(s)) for s in shapes]).memory_report().state
        for cls in (secondorder.InverseFreeKLShampoo, secondorder.SOAP)
    )
    assert ours <= 0.51 * soaps

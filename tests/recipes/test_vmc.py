"""The example of variational Monte Carlo: the hydrogen atom's energy, and the local energy against its formula."""

import runpy
from functools import partial
from pathlib import Path

import torch
from torch import nn

import secondorder

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "recipes" / "examples" / "vmc.py"))


class Exponential(nn.Module):
    """ψ = exp(-a |x|), whose local energy is a / |x| - a² / 2 - 1 / |x|."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, x):
        return -self.a * x.square().sum(-1).sqrt()


def test_local_energy_is_that_of_the_formula():
    x = torch.randn(20, 3, dtype=torch.float64)
    r = x.norm(dim=1)
    for a in (0.5, 1.0):
        torch.testing.assert_close(EXAMPLE["local_energy"](Exponential(a), x), (a - 1) / r - a**2 / 2)


def test_walkers_are_samples_of_the_square():
    x = EXAMPLE["metropolis"](Exponential(1.0), torch.randn(4000, 3, dtype=torch.float64), moves=100)
    assert abs(x.norm(dim=1).mean() - 1.5) < 0.06  # four standard errors of 0.87 / √4000


def test_energy_is_found_to_a_thousandth(capsys):
    energy = EXAMPLE["train"]("SPRING", partial(secondorder.SPRING, lr=0.3, damping=1e-3, norm_constraint=1e-2), 45)
    assert abs(energy + 0.5) < 1e-3 * 0.5
    assert capsys.readouterr().out.count("SPRING") == 7

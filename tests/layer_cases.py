"""A network of every kind of layer, and how layer methods are trained on it in tests."""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secondorder

# Explicit, so that tests do not hang on the defaults that are shipped.
OPTIONS: dict[str, Any] = dict(
    lr=0.02,
    damping=0.3,
    kl_clip=1e-4,
    norm_clip=None,
    momentum="update",
    weight_decay=0.01,
    refresh_every=5,
    fallback_lr_scale=1.0,
)
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KFAC": (secondorder.KFAC, {}),
    "split": (secondorder.EKFAC, {"max_block_size": 6}),
    "gradient": (secondorder.EKFAC, {"moment": "gradient", "momentum": "gradient"}),
    "SINGD": (secondorder.SINGD, {"statistics_every": 1}),
    "structured": (secondorder.IKFAC, {"structures": ("hierarchical(2,2)", "diagonal"), "factor_momentum": 0.5}),
}
each_row = pytest.mark.parametrize("row", ["KFAC", "split", "SINGD"])
every_row = pytest.mark.parametrize("row", ROWS)


class Zoo(nn.Module):
    """Convolutions, one of them in groups, embedding, norm, attention, linear layers, a parameter of no layer."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.grouped = nn.Conv2d(6, 6, 2, groups=2, bias=False)
        self.embed = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(6))
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3) if head is None else head

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:  # (n, 2, 5, 5), (n, 4)
        x = self.grouped(torch.tanh(self.conv(images))).flatten(2).mT + self.embed(tokens)
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0] * self.scale
        return self.head(torch.tanh(self.hidden(x.mean(1))))


def zoo(dtype: torch.dtype = torch.float32, **more: Any) -> Zoo:
    """Parameters that depend on nothing else."""
    torch.manual_seed(0)
    return Zoo(**more).to(dtype)


def make(row: str, model: nn.Module, params: Any = None, **options: Any) -> Any:
    """Options that the class does not have are left out."""
    cls, own = ROWS[row]
    known = inspect.signature(cls).parameters
    options = {name: value for name, value in {**OPTIONS, **own, **options}.items() if name in known}
    return cls(model.parameters() if params is None else params, module=model, **options)


def factors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a flat state, what holds curvature: covariances and diagonals, or (inverse-free) roots."""
    return {key: value for key, value in state.items() if re.search(r"/(covariance|diagonal|root)_\d+$", key)}


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens and labels of a step."""
    g = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(size, 2, 5, 5, generator=g, dtype=torch.float64).to(dtype)
    return images, torch.randint(5, (size, 4), generator=g), torch.randint(3, (size,), generator=g)


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    """One backward pass of the mean cross-entropy of a step's batch, times a scale."""
    images, tokens, labels = batch(step, dtype=next(model.parameters()).dtype)
    (F.cross_entropy(model(images, tokens), labels) * scale).backward()


def train(model: nn.Module, optimizer: Any, steps: Iterable[int], before: Callable[[int], None] | None = None) -> None:
    """Ordinary training; `before` is called between a backward pass and the step."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        if before is not None:
            before(step)
        optimizer.step()

"""Compress images into a few numbers: the deep autoencoder on which K-FAC was introduced.

The loss is the binary cross-entropy of the pixels (scaled to [0, 1]), summed over a sample's pixels, less the pixels'
own entropy: a perfect reconstruction has 0, and the gradient is the cross-entropy's.

The benchmark is one of optimization: `val/loss`, which is compared, is taken on a fixed set of *training* images, as in
the literature. `val/held_out` is the same on images that are never trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import images
from config import knob, require

DIGITS_WIDTHS = (256, 128, 64, 16)
MNIST_WIDTHS = (1000, 500, 250, 30)  # Hinton and Salakhutdinov (2006); the benchmark of Martens and Grosse (2015)


@dataclass(frozen=True)
class Data:
    """Where the images come from."""

    source: str = knob("digits", "digits (8 x 8, shipped), or a folder: MNIST idx files, CIFAR-10 binary")


@dataclass(frozen=True)
class Model:
    """The encoder; the decoder mirrors it."""

    widths: tuple[int, ...] = knob((), "layers down to the code (empty: 256,128,64,16, or 1000,500,250,30 from 784 on)")

    def __post_init__(self) -> None:
        require(all(width >= 1 for width in self.widths), f"model.widths must be >= 1, got {self.widths}")


class Task:
    """Batches of flat images, and how far the network's output, taken as logits, is from them."""

    samples_unit, units_per_sample = "images", 1

    def __init__(self, data: Data, model: Model, seed: int) -> None:
        self.seed, self.dataset = seed, images.load(data.source)
        self.summary, self.fingerprint = self.dataset.summary, self.dataset.sha256
        pixels = math.prod(self.dataset.shape)
        self.widths = (pixels, *(model.widths or (DIGITS_WIDTHS if pixels < 784 else MNIST_WIDTHS)))

    def build_model(self) -> nn.Module:
        """A freshly initialised network, tanh between its layers but around the code; the caller has seeded torch."""
        model = nn.Sequential(*_stack(self.widths), *_stack(self.widths[::-1]))
        for parameter in model.parameters():
            # Variances kept through all layers (Glorot and Bengio): torch's default start leaves nothing of the signal.
            (nn.init.xavier_uniform_ if parameter.ndim == 2 else nn.init.zeros_)(parameter)
        return model

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor]:
        """Samples `first` … `first + count - 1` of the step's global batch."""
        return (_flat(self.dataset.draw(self.seed, step, first, count)[0]),)

    def validation(self, first: int, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Samples `first` … `first + count - 1` of `total`, spread evenly: training images, images held out."""
        parts = (self.dataset.train, self.dataset.val)
        return tuple(_flat(self.dataset.spread(part, first, count, total)[0]) for part in parts)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean over the samples of their divergence, in nats."""
        return self._divergence(model, batch[0])

    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """What validation reports."""
        training, held_out = batch
        return {"loss": self._divergence(model, training), "held_out": self._divergence(model, held_out)}

    def _divergence(self, model: nn.Module, pixels: Tensor) -> Tensor:  # (B, P) -> ()
        logits = model(pixels).float()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
        entropy = -(torch.xlogy(pixels, pixels) + torch.xlogy(1 - pixels, 1 - pixels)).sum()
        return (cross_entropy - entropy) / len(pixels)


def _stack(widths: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers with tanh between them; the last one is linear."""
    layers: list[nn.Module] = []
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return layers[:-1]


def _flat(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).flatten(1)  # (B, C H W)

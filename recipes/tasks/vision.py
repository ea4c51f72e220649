"""Image classification with a small convolutional network or a small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import images
from config import knob, require
from errors import RecipeError
from vision import ConvNet, ViT


@dataclass(frozen=True)
class Data:
    """Where the images come from."""

    source: str = knob("digits", "digits (8 x 8, shipped), or a folder: MNIST idx files, CIFAR-10 binary")


@dataclass(frozen=True)
class Model:
    """The network."""

    kind: Literal["conv", "vit"] = knob("conv", "three convolutions, or a vision transformer")
    width: int = knob(32, "channels of the first convolution; size of the residual stream")
    layers: int = knob(3, "vit: blocks")
    heads: int = knob(4, "vit: attention heads per block")
    patch: int = knob(2, "vit: side of a patch, in pixels")

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "patch"):
            require(getattr(self, name) >= 1, f"model.{name} must be >= 1, got {getattr(self, name)}")
        divides = self.kind == "conv" or self.width % self.heads == 0
        require(divides, f"model.width={self.width} is not a multiple of model.heads={self.heads}")


class Task:
    """Batches of (image, label), and their cross-entropy."""

    samples_unit, units_per_sample = "images", 1

    def __init__(self, data: Data, model: Model, seed: int) -> None:
        self.shape, self.seed, self.dataset = model, seed, images.load(data.source)
        self.summary, self.fingerprint = self.dataset.summary, self.dataset.sha256
        _, height, width = self.dataset.shape
        if model.kind == "vit" and (height % model.patch or width % model.patch):
            raise RecipeError(f"model.patch={model.patch} does not divide the images' {height} x {width} pixels")
        if model.kind == "conv" and min(height, width) < 4:
            raise RecipeError(f"model.kind=conv pools twice and needs 4 x 4 pixels, the images have {height} x {width}")
        # Per channel, over the training images.
        pixels = self.dataset.train.images.astype(np.float32) / self.dataset.white
        self.mean = torch.from_numpy(pixels.mean(axis=(0, 2, 3), keepdims=True))  # (1, C, 1, 1)
        self.deviation = torch.from_numpy(pixels.std(axis=(0, 2, 3), keepdims=True))

    def build_model(self) -> nn.Module:
        """A freshly initialised network; the caller has seeded torch."""
        shape, classes, model = self.dataset.shape, self.dataset.classes, self.shape
        if model.kind == "conv":
            return ConvNet(shape, classes, model.width)
        return ViT(shape, classes, model.patch, model.layers, model.heads, model.width)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples `first` … `first + count - 1` of the step's global batch."""
        return self._tensors(*self.dataset.draw(self.seed, step, first, count))

    def validation(self, first: int, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Samples `first` … `first + count - 1` of `total` images spread evenly over those held out."""
        return self._tensors(*self.dataset.spread(self.dataset.val, first, count, total))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy, in nats."""
        pixels, labels = batch  # (B, C, H, W), (B,)
        return F.cross_entropy(model(pixels).float(), labels)

    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """What validation reports: the loss, and the fraction of images whose label is the likeliest one."""
        pixels, labels = batch
        logits = model(pixels).float()  # (B, K)
        hits = logits.argmax(dim=1) == labels
        return {"loss": F.cross_entropy(logits, labels), "accuracy": hits.float().mean()}

    def _tensors(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(pixels) - self.mean) / self.deviation, torch.from_numpy(labels)

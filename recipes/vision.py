"""Two small image classifiers: a convolutional network and a vision transformer (ViT).

Shapes: B samples, C channels, H x W pixels, T patches, D width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt import Block


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions, the first two followed by a pool, then the mean over the places.

    Args:
        shape: (C, H, W) of an image.
        classes: Number of labels.
        width: Channels of the first convolution; the other two have twice as many.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(F.relu(self.third(x)).mean(dim=(2, 3)))


class ViT(nn.Module):
    """Patches as tokens, learned positions, pre-norm blocks, the mean over the tokens.

    Args:
        shape: (C, H, W) of an image; H and W are multiples of `patch`.
        classes: Number of labels.
        patch: Side of a square patch, in pixels.
        layers: Number of blocks.
        heads: Attention heads per block.
        width: Size of the residual stream.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, patch: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.project = nn.Linear(shape[0] * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList([Block(width, heads, dropout=0.0, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (B, T, C patch^2)
        x = self.project(patches) + self.position  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))

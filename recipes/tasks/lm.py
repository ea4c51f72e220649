"""Language modelling: predict the next byte, or the next token of a tokenised file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import knob, require
from data import Windows, load
from errors import RecipeError
from gpt import GPT

GPT2_VOCABULARY = 50304  # 50257 tokens, rounded up to a multiple of 64 for the matrix products


@dataclass(frozen=True)
class Data:
    """Where the text comes from."""

    source: str = knob(
        "stdlib",
        "stdlib (the sources of this Python's own standard library), a text file, a folder of text files, "
        "a .bin token file, or a folder of .bin files",
    )
    val_fraction: float = knob(0.1, "end of a single file that is kept for validation")

    def __post_init__(self) -> None:
        require(0.0 < self.val_fraction < 1.0, f"data.val_fraction must be in (0, 1), got {self.val_fraction}")


@dataclass(frozen=True)
class Model:
    """The shape of the GPT."""

    layers: int = knob(2, "blocks")
    heads: int = knob(4, "attention heads per block")
    width: int = knob(64, "size of the residual stream")
    context: int = knob(128, "tokens per sample")
    dropout: float = knob(0.0, "dropout probability")
    tied: bool = knob(False, "input embedding and output head share one matrix")
    vocab_size: int = knob(0, "0: 256 for bytes, 50304 (GPT-2) for token files")

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context"):
            require(getattr(self, name) >= 1, f"model.{name} must be >= 1, got {getattr(self, name)}")
        require(self.width % self.heads == 0, f"model.width={self.width} is not a multiple of model.heads={self.heads}")
        require(0.0 <= self.dropout < 1.0, f"model.dropout must be in [0, 1), got {self.dropout}")
        require(self.vocab_size >= 0, f"model.vocab_size must be >= 0, got {self.vocab_size}")


class Task:
    """Batches of (input, target) token windows, and their cross-entropy."""

    samples_unit = "tokens"

    def __init__(self, data: Data, model: Model, seed: int) -> None:
        self.shape, self.seed = model, seed
        self.units_per_sample = model.context
        corpus = load(data.source, data.val_fraction)
        self.vocab_size = model.vocab_size or (256 if corpus.is_bytes else GPT2_VOCABULARY)
        self.train = Windows(corpus.train, model.context + 1, "training")
        self.val = Windows(corpus.val, model.context + 1, "validation")
        self.summary, self.fingerprint = corpus.summary, corpus.sha256

    def build_model(self) -> nn.Module:
        """A freshly initialised GPT; the caller has seeded torch."""
        shape = self.shape
        return GPT(self.vocab_size, shape.context, shape.layers, shape.heads, shape.width, shape.dropout, shape.tied)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples `first` … `first + count - 1` of the step's global batch."""
        # One generator per step, drawn in order of the index: sample i is the same whoever asks for it.
        draws = np.random.default_rng((self.seed, step)).integers(len(self.train), size=first + count)
        return self._tensors(self.train.take(draws[first:]))

    def validation(self, first: int, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Samples `first` … `first + count - 1` of `total` windows spread evenly over the validation text."""
        index = np.arange(first, first + count, dtype=np.int64)
        return self._tensors(self.val.take(index * (len(self.val) - 1) // max(total - 1, 1)))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy per token, in nats."""
        tokens, targets = batch  # (B, T), (B, T)
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """What validation reports."""
        return {"loss": self.loss(model, batch)}

    def _tensors(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        if windows.max() >= self.vocab_size:
            raise RecipeError(
                f"the data holds token {windows.max()}, but model.vocab_size is {self.vocab_size}; "
                f"set model.vocab_size above the largest token"
            )
        tokens = torch.from_numpy(windows)  # (count, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

"""Second-order optimizers for PyTorch with the `torch.optim` interface."""

from secondorder import base as base
from secondorder.adamw import AdamW as AdamW
from secondorder.soap import SOAP as SOAP

__version__ = "0.1.0"

__all__ = ["SOAP", "AdamW"]

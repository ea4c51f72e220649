"""Second-order optimizers for PyTorch with the `torch.optim` interface."""

from secondorder import base as base
from secondorder.adamw import AdamW as AdamW
from secondorder.eigenvalue_corrected import EigenvalueCorrectedShampoo as EigenvalueCorrectedShampoo
from secondorder.ekfac import EKFAC as EKFAC
from secondorder.inverse_free_kl_shampoo import InverseFreeKLShampoo as InverseFreeKLShampoo
from secondorder.kfac import KFAC as KFAC
from secondorder.shampoo import Shampoo as Shampoo
from secondorder.soap import SOAP as SOAP

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "EKFAC",
    "EigenvalueCorrectedShampoo",
    "InverseFreeKLShampoo",
    "KFAC",
    "SOAP",
    "Shampoo",
]

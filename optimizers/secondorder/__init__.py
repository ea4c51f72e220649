"""Second-order optimizers for PyTorch with the `torch.optim` interface."""

from secondorder import base as base
from secondorder import taylor as taylor
from secondorder.adamw import AdamW as AdamW
from secondorder.eigenvalue_corrected import EigenvalueCorrectedShampoo as EigenvalueCorrectedShampoo
from secondorder.ekfac import EKFAC as EKFAC
from secondorder.engdw import ENGDW as ENGDW
from secondorder.if_shampoo import IFShampoo as IFShampoo
from secondorder.inverse_free_kl_shampoo import InverseFreeKLShampoo as InverseFreeKLShampoo
from secondorder.kfac import KFAC as KFAC
from secondorder.kl_shampoo import KLShampoo as KLShampoo
from secondorder.kl_soap import KLSOAP as KLSOAP
from secondorder.residual_kfac import ResidualKFAC as ResidualKFAC
from secondorder.residuals.generalized import convex_loss as convex_loss
from secondorder.residuals.generalized import vmc_energy as vmc_energy
from secondorder.residuals.terms import least_squares as least_squares
from secondorder.residuals.terms import term as term
from secondorder.rf_adamw import RFAdamW as RFAdamW
from secondorder.rf_rmsprop import RFRMSProp as RFRMSProp
from secondorder.shampoo import Shampoo as Shampoo
from secondorder.singd import IKFAC as IKFAC
from secondorder.singd import SINGD as SINGD
from secondorder.sirf_shampoo import SIRFShampoo as SIRFShampoo
from secondorder.soap import SOAP as SOAP
from secondorder.spectral_factorized import SpectralFactorized as SpectralFactorized
from secondorder.spring import SPRING as SPRING

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "EKFAC",
    "ENGDW",
    "EigenvalueCorrectedShampoo",
    "IFShampoo",
    "IKFAC",
    "InverseFreeKLShampoo",
    "KFAC",
    "KLSOAP",
    "KLShampoo",
    "RFAdamW",
    "RFRMSProp",
    "ResidualKFAC",
    "SINGD",
    "SIRFShampoo",
    "SOAP",
    "SPRING",
    "Shampoo",
    "SpectralFactorized",
    "convex_loss",
    "least_squares",
    "term",
    "vmc_energy",
]

"""Operations of the optimizers' inner loops: one function each, and the fastest path that takes its arguments.

Every operation has a reference in plain tensor operations (`reference/`), which is its specification and runs on any
device. `SECONDORDER_KERNELS=auto|reference|triton` and `use_kernels` choose between that and the faster paths;
`explain` and `explain_all` tell which path is taken, and why. Nothing here needs Triton or CUDA to be imported.
"""

from secondorder_kernels.adamw import adamw_ as adamw_
from secondorder_kernels.basis import adam_in_basis_ as adam_in_basis_
from secondorder_kernels.dispatch import explain as explain
from secondorder_kernels.dispatch import explain_all as explain_all
from secondorder_kernels.dispatch import fingerprint as fingerprint
from secondorder_kernels.dispatch import use_kernels as use_kernels
from secondorder_kernels.elementwise import adam_direction_ as adam_direction_
from secondorder_kernels.elementwise import root_free_ as root_free_
from secondorder_kernels.grafts import graft_ as graft_
from secondorder_kernels.grams import add_gram_ as add_gram_
from secondorder_kernels.grams import gram as gram
from secondorder_kernels.grams import symmetric_product as symmetric_product
from secondorder_kernels.group import multiply_update as multiply_update
from secondorder_kernels.group import symmetrise as symmetrise
from secondorder_kernels.orthogonal import cholesky_qr as cholesky_qr
from secondorder_kernels.orthogonal import orthogonalize as orthogonalize
from secondorder_kernels.products import ema_syrk_ as ema_syrk_
from secondorder_kernels.products import ema_syrk_pair_ as ema_syrk_pair_
from secondorder_kernels.rounding import mix as mix
from secondorder_kernels.rounding import row_keys as row_keys
from secondorder_kernels.rounding import stochastic_round as stochastic_round
from secondorder_kernels.structured import block_apply as block_apply
from secondorder_kernels.structured import diagonal_apply as diagonal_apply
from secondorder_kernels.structured import diagonal_moments as diagonal_moments
from secondorder_kernels.updates import apply_update_ as apply_update_

__all__ = [
    "adam_direction_",
    "adam_in_basis_",
    "adamw_",
    "add_gram_",
    "apply_update_",
    "block_apply",
    "cholesky_qr",
    "diagonal_apply",
    "diagonal_moments",
    "ema_syrk_",
    "ema_syrk_pair_",
    "explain",
    "explain_all",
    "fingerprint",
    "graft_",
    "gram",
    "mix",
    "multiply_update",
    "orthogonalize",
    "root_free_",
    "row_keys",
    "stochastic_round",
    "symmetric_product",
    "symmetrise",
    "use_kernels",
]

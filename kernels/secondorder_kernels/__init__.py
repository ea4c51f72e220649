"""Operations of the optimizers' inner loops: one function each, and the fastest path that takes its arguments.

Every operation has a reference in plain tensor operations (`reference.py`), which is its specification and runs on any
device. `SECONDORDER_KERNELS=auto|reference|triton` and `use_kernels` choose between that and the faster paths;
`explain` and `explain_all` tell which path is taken, and why. Nothing here needs Triton or CUDA to be imported.
"""

from secondorder_kernels.dispatch import explain as explain
from secondorder_kernels.dispatch import explain_all as explain_all
from secondorder_kernels.dispatch import use_kernels as use_kernels
from secondorder_kernels.elementwise import adam_direction_ as adam_direction_
from secondorder_kernels.elementwise import adamw_ as adamw_
from secondorder_kernels.products import ema_syrk_ as ema_syrk_

__all__ = ["adam_direction_", "adamw_", "ema_syrk_", "explain", "explain_all", "use_kernels"]

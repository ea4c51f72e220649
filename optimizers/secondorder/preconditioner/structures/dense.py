"""All matrices: `Π` is the identity, storage `(d, d)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.preconditioner.structures.protocol import Structure, accumulator
from secondorder_kernels import gram, multiply_update


@dataclass(frozen=True)
class Dense(Structure):
    """The general linear group."""

    def shape(self, d: int) -> tuple[int, ...]:
        """See `Structure`."""
        return (d, d)

    def eye(self, d: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """See `Structure`."""
        return torch.eye(d, dtype=dtype, device=device)

    def apply(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return K @ X

    def apply_t(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return K.mT @ X

    def project(self, M: Tensor) -> Tensor:
        """`M` itself, not a copy."""
        return M

    def project_gram(self, X: Tensor) -> Tensor:
        """See `Structure`."""
        return gram(X)

    def self_gram(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        return gram(K.mT)

    def product(self, K: Tensor, m: Tensor) -> Tensor:
        """See `Structure`."""
        return K @ m

    def step(self, K: Tensor, m: Tensor, size: Tensor) -> Tensor:
        """See `Structure`."""
        return multiply_update(K, m, size)[0]

    def average_trace(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        return K.diagonal(dim1=1, dim2=2).mean(1, dtype=accumulator(K))

    def spectral_bound(self, K: Tensor) -> Tensor:
        """The least of `‖K‖_F` and `√(‖K‖_1 ‖K‖_∞)`."""
        sizes = K.abs()
        lines = [sizes.sum(dim, dtype=accumulator(K)).amax(1) for dim in (1, 2)]
        return torch.minimum(self.frobenius(K), (lines[0] * lines[1]).sqrt())

    def to_dense(self, K: Tensor) -> Tensor:
        """`K` itself, not a copy."""
        return K

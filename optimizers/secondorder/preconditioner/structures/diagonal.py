"""Diagonal matrices: `Π(M) = diag(M)`, storage `(d,)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.preconditioner.structures.protocol import Structure, accumulator, squares


@dataclass(frozen=True)
class Diagonal(Structure):
    """Its state is smaller than that of Adam: d_in + d_out numbers for a matrix, instead of d_in · d_out."""

    def shape(self, d: int) -> tuple[int, ...]:
        """See `Structure`."""
        return (d,)

    def eye(self, d: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """See `Structure`."""
        return torch.ones(d, dtype=dtype, device=device)

    def apply(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return K.unsqueeze(2) * X

    def apply_t(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return K.unsqueeze(2) * X

    def project(self, M: Tensor) -> Tensor:
        """A view of the diagonal of `M`."""
        return M.diagonal(dim1=1, dim2=2)

    def project_gram(self, X: Tensor) -> Tensor:
        """See `Structure`."""
        return squares(X, dim=2)

    def self_gram(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        return K.square()

    def product(self, K: Tensor, m: Tensor) -> Tensor:
        """See `Structure`."""
        return K * m

    def average_trace(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        return K.mean(1, dtype=accumulator(K))

    def spectral_bound(self, K: Tensor) -> Tensor:
        """The norm itself."""
        return self.largest(K)

    def to_dense(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        return K.diag_embed()

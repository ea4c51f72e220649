"""Block-diagonal matrices with blocks b x b, the last one smaller where b does not divide d; `Π` cuts out the blocks.

Storage `(d, min(b, d))`: row i of the matrix within its block. For products rows are filled up with zeros to whole
blocks, a view where b divides d, so that every operation is one batched product however ragged the last block is. The
last block's columns beyond its size are padding: `[E 0; 0 0]`-blocks are closed under all operations here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secondorder.preconditioner.structures.protocol import Structure, accumulator
from secondorder_kernels import block_apply, gram, multiply_update


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Blocks along the diagonal.

    Attributes:
        size: Rows of a block, at least 1. A multiple of 16 suits matrix units.

    Raises:
        ValueError: `size` is below 1.
    """

    size: int = 32

    def __post_init__(self) -> None:
        if not self.size >= 1:
            raise ValueError(f"Invalid block size: {self.size}, must be at least 1")

    def shape(self, d: int) -> tuple[int, ...]:
        """See `Structure`."""
        return (d, min(self.size, d))

    def eye(self, d: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """See `Structure`."""
        b = min(self.size, d)
        return torch.eye(b, dtype=dtype, device=device).repeat(-(-d // b), 1)[:d]

    def apply(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._rows(block_apply(self._blocks(K), self._blocks(X)), X.shape[1])

    def apply_t(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._rows(block_apply(self._blocks(K), self._blocks(X), transposed=True), X.shape[1])

    def project(self, M: Tensor) -> Tensor:
        """See `Structure`."""
        d = M.shape[1]
        b = min(self.size, d)
        M = F.pad(M, (0, -d % b)) if d % b else M
        rows = self._blocks(M)  # (n, q, b, q b)
        return self._rows(rows.unflatten(3, (-1, b)).diagonal(dim1=1, dim2=3).movedim(3, 1), d)

    def project_gram(self, X: Tensor) -> Tensor:
        """See `Structure`."""
        rows = self._blocks(X)
        return self._rows(gram(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]), X.shape[1])

    def self_gram(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        blocks = self._blocks(K)
        return self._rows(gram(blocks.flatten(0, 1).mT).unflatten(0, blocks.shape[:2]), K.shape[1])

    def product(self, K: Tensor, m: Tensor) -> Tensor:
        """See `Structure`."""
        return self.apply(K, m)

    def step(self, K: Tensor, m: Tensor, size: Tensor) -> Tensor:
        """See `Structure`."""
        blocks = self._blocks(K)
        sizes = size.repeat_interleave(blocks.shape[1], output_size=len(blocks) * blocks.shape[1])
        moved, _ = multiply_update(blocks.flatten(0, 1), self._blocks(m).flatten(0, 1), sizes)
        return self._rows(moved.unflatten(0, blocks.shape[:2]), K.shape[1])

    def average_trace(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        diagonals = self._blocks(K).diagonal(dim1=2, dim2=3)
        return diagonals.sum((1, 2), dtype=accumulator(K)) / K.shape[1]

    def spectral_bound(self, K: Tensor) -> Tensor:
        """The largest Frobenius norm of a block."""
        return torch.linalg.vector_norm(self._blocks(K), dim=(2, 3), dtype=accumulator(K)).amax(1)

    def to_dense(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        d = K.shape[1]
        blocks = self._blocks(K).movedim(1, 3).diag_embed(dim1=1, dim2=3)  # (n, q, b, q, b)
        return blocks.flatten(3).flatten(1, 2)[:, :d, :d]

    def _blocks(self, X: Tensor) -> Tensor:
        """Rows `(n, d, m)` by block, `(n, q, b, m)`; missing rows are zero."""
        b = min(self.size, X.shape[1])
        missing = -X.shape[1] % b
        return (F.pad(X, (0, 0, 0, missing)) if missing else X).unflatten(1, (-1, b))

    def _rows(self, blocks: Tensor, d: int) -> Tensor:
        """The inverse of `_blocks`."""
        return blocks.flatten(1, 2)[:, :d]

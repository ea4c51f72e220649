"""Bordered diagonal matrices: k1 full rows above, k2 rows below, a diagonal between; or their transposes.

        [ A  B1 B2 ]      P = [A B1 B2], k1 rows
    L = [ 0  C  0  ]      C diagonal                    Π: A, C, E once, B and D twice
        [ 0  D  E  ]      R = [0 D E], k2 rows

"Hierarchical" where k1 and k2 > 0; the four "corner" classes have one border row or column. If d is small, A is filled
first, then E, then C: `k1 <- min(k1, d)`, `k2 <- min(k2, d - k1)`. Storage `(k1 + k2 + 1, d)`: the rows P and R of L,
and the diagonal c, zero outside C. The zeros below A and around C are padding. With "border" for the first k1 and last
k2 places, every operation is one thin product and one element by element:

    L X = [P; R] X, c ∘ X between       L^T X = [P; R]^T X_border + c ∘ X       L m = L_border m_(P;R) + L ∘ m_c
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secondorder.preconditioner.structures.protocol import Structure, accumulator, squares


@dataclass(frozen=True)
class Arrow(Structure):
    """Bordered diagonal matrices.

    Attributes:
        top: Full rows k1 at the top, at least 0.
        bottom: Full rows k2 at the bottom, at least 0; they have no entries in the first k1 columns.
        transposed: The group of the transposes: borders are columns. The storage is that of `K^T`.

    Raises:
        ValueError: `top` or `bottom` is negative.
    """

    top: int = 16
    bottom: int = 16
    transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("top", "bottom"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Invalid number of {name} rows: {getattr(self, name)}, must be at least 0")

    def shape(self, d: int) -> tuple[int, ...]:
        """See `Structure`."""
        k, end = self._border(d)
        return (k + d - end + 1, d)

    def eye(self, d: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """See `Structure`."""
        k, end = self._border(d)
        one = torch.zeros(self.shape(d), dtype=dtype, device=device)
        one[:k].diagonal().fill_(1)
        one[k:-1].diagonal(end).fill_(1)
        one[-1, k:end] = 1
        return one

    def apply(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._columns(K, X) if self.transposed else self._rows(K, X)

    def apply_t(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._rows(K, X) if self.transposed else self._columns(K, X)

    def project(self, M: Tensor) -> Tensor:
        """See `Structure`."""
        return self._weighted(self._take(M, 1), M.diagonal(dim1=1, dim2=2))

    def project_gram(self, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._weighted(self._take(X, 1) @ X.mT, squares(X, dim=2))

    def self_gram(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        if self.transposed:
            return self._weighted(self._rows(K, K[:, :-1].mT).mT, K[:, -1].square())
        return self._weighted(self._take(K[:, :-1], 2).mT @ K[:, :-1], squares(K, dim=1))

    def product(self, K: Tensor, m: Tensor) -> Tensor:
        """See `Structure`."""
        L, r = (m, K) if self.transposed else (K, m)
        return self._take(L, 2) @ r[:, :-1] + L * r[:, -1:]

    def average_trace(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        d = K.shape[2]
        k, end = self._border(d)
        parts = (K[:, :k].diagonal(dim1=1, dim2=2), K[:, k:-1].diagonal(end, 1, 2), K[:, -1])
        return torch.cat(parts, 1).sum(1, dtype=accumulator(K)) / d

    def to_dense(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        k, end = self._border(K.shape[2])
        L = torch.cat([K[:, :k], K[:, -1].diag_embed()[:, k:end], K[:, k:-1]], 1)
        return L.mT if self.transposed else L

    def _border(self, d: int) -> tuple[int, int]:
        """Where the diagonal C begins and ends."""
        k = min(self.top, d)
        return k, d - min(self.bottom, d - k)

    def _take(self, X: Tensor, dim: int) -> Tensor:
        """Entries at the border along a dimension of length d."""
        d = X.shape[dim]
        k, end = self._border(d)
        return torch.cat([X.narrow(dim, 0, k), X.narrow(dim, end, d - end)], dim)

    def _rows(self, K: Tensor, X: Tensor) -> Tensor:
        """`L X`."""
        k, end = self._border(K.shape[2])
        Y = K[:, :-1] @ X
        return torch.cat([Y[:, :k], K[:, -1, k:end, None] * X[:, k:end], Y[:, k:]], 1)

    def _columns(self, K: Tensor, X: Tensor) -> Tensor:
        """`L^T X`."""
        return K[:, :-1].mT @ self._take(X, 1) + K[:, -1].unsqueeze(2) * X

    def _weighted(self, border: Tensor, diagonal: Tensor) -> Tensor:
        """Storage of `Π(M)`, from M's rows at the border `(n, k1 + k2, d)`, which it overwrites, and its diagonal."""
        d = border.shape[2]
        k, end = self._border(d)
        border[:, :k, k:] *= 2
        border[:, k:, k:end] *= 2
        border[:, k:, :k] = 0
        between = F.pad(diagonal[:, k:end], (k, d - end))
        return torch.cat([border, between.unsqueeze(1)], 1)

"""What a structure is: a group of d x d matrices `K`, stored as a few of their entries, closed under products.

A factor `K` is moved inside its group along a symmetric matrix `M`: `K <- K (I - β Π(M))` (Lin et al. 2024, "Structured
inverse-free natural-gradient", arXiv:2312.05705). `Π(M)` is the element `N` of the structure with the nearest symmetric
part, the least one where several are:

    Π(M) = argmin ‖M - (N + N^T) / 2‖_F

So entries of M in the structure are taken over: twice where it lacks the mirror image, averaged where it ties them.

Elements of a group are not symmetric. `K^T` is in general none, hence `apply_t` beside `apply`; and `self_gram` is
`Π(K^T K)`, which is not `Π(K K^T)`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Structure(Protocol):
    """A group of structured matrices. Implementations are frozen dataclasses: hashable, and without tensors.

    An element is one tensor `(*shape(d))`; every method takes n of them, stacked, `(n, *shape(d))`, and treats the rows
    apart. Storage may contain entries that represent nothing (padding). They are zero in `eye` and in all that these
    methods return, and stay zero under linear combinations.

    `K` and `X` of one call have one dtype, and so has the result. Half precision is accumulated in float32 at least;
    `average_trace`, `frobenius`, `spectral_bound` and `largest` also return it.
    """

    def shape(self, d: int) -> tuple[int, ...]:
        """Shape of the storage of one element of dimension `d >= 1`."""
        ...

    def eye(self, d: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """The identity, `(*shape(d))`."""
        ...

    def apply(self, K: Tensor, X: Tensor) -> Tensor:
        """`K X`, for `X (n, d, m)`."""
        ...

    def apply_t(self, K: Tensor, X: Tensor) -> Tensor:
        """`K^T X`, for `X (n, d, m)`."""
        ...

    def project(self, M: Tensor) -> Tensor:
        """`Π(M)`, for symmetric dense `M (n, d, d)`."""
        ...

    def project_gram(self, X: Tensor) -> Tensor:
        """`Π(X X^T)`, for `X (n, d, m)`; forms d x d only where the structure is dense."""
        ...

    def self_gram(self, K: Tensor) -> Tensor:
        """`Π(K^T K)`."""
        ...

    def product(self, K: Tensor, m: Tensor) -> Tensor:
        """`K m` of two elements, again an element."""
        ...

    def step(self, K: Tensor, m: Tensor, size: Tensor) -> Tensor:
        """`K (I - size m)`, size `(n,)`, for float32 and float64."""
        return K - size.view(-1, *[1] * (K.ndim - 1)) * self.product(K, m)

    def average_trace(self, K: Tensor) -> Tensor:
        """`tr(K) / d`, `(n,)`."""
        ...

    def to_dense(self, K: Tensor) -> Tensor:
        """The represented matrices, `(n, d, d)`."""
        ...

    def frobenius(self, K: Tensor) -> Tensor:
        """Frobenius norm of the represented matrices, `(n,)`."""
        return torch.linalg.vector_norm(K.flatten(1), dim=1, dtype=accumulator(K))

    def spectral_bound(self, K: Tensor) -> Tensor:
        """An upper bound of the spectral norm of the represented matrices, `(n,)`."""
        return self.frobenius(K)

    def largest(self, K: Tensor) -> Tensor:
        """Largest absolute entry, `(n,)`."""
        return K.flatten(1).abs().amax(1).to(accumulator(K))


def accumulator(X: Tensor) -> torch.dtype:
    """The dtype in which sums are formed: that of `X`, but float32 at least."""
    return torch.promote_types(X.dtype, torch.float32)


def squares(X: Tensor, dim: int) -> Tensor:
    """Sums of squares along a dimension, without a squared copy of `X`; in the dtype of `X`."""
    return torch.linalg.vector_norm(X, dim=dim, dtype=accumulator(X)).square().to(X.dtype)

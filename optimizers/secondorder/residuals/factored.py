"""A Jacobian whose rows are sums of outer products, one a use of a parameter; never `(N, D)` in memory.

    J_n,p = Σ_s a_ns z_nsᵀ                     of weight p `(o, i)` at residual n: a `(N, S, o)`, z `(N, S, i)`
    J v   = Σ_p Σ_s a_nsᵀ V z_ns               Jᵀ u = Σ_n u_n Σ_s a_ns z_nsᵀ
    K     = Σ_blocks J_b J_bᵀ                  blocks of columns: some units o of some parameters

Parameters that are no matrices have i = 1 and z = 1; rows of a matrix that are known as they are have a = I, z = J_n.

The kernel by blocks over output units takes N · chunk + N² numbers and no recomputation (Guzmán-Cordero et al.,
*Improving Energy Natural Gradient Descent through Woodbury, Momentum, and Randomization*, 2025, arXiv:2505.12149, have
one block a layer, N · o · i numbers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**23  # numbers in a block of columns: 64 MiB in float64
TILE = 256  # rows of the kernel per product: only tiles on and below its diagonal are computed


@dataclass(frozen=True)
class Part:
    """J of one parameter at some rows: the sum over uses of outer products.

    Attributes:
        rows: Where they are among all N.
        a: For every use `(n, s, o)`; the s of uses may differ.
        z: `(n, s, i)`.
    """

    rows: slice
    a: list[Tensor]
    z: list[Tensor]


def units_of(p: Tensor) -> tuple[int, int]:
    """(o, i) of a parameter: its own shape if it is a matrix, else (numel, 1)."""
    return (p.shape[0], p.shape[1]) if p.ndim == 2 else (p.numel(), 1)


def dense(rows: Tensor, units: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows `(n, o i)` of one parameter's J as a use: a and z."""
    n, (o, i) = len(rows), units
    if i == 1:
        return rows.unsqueeze(1), rows.new_ones(1, 1, 1).expand(n, 1, 1)
    return torch.eye(o, dtype=rows.dtype, device=rows.device).expand(n, o, o), rows.reshape(n, o, i)


class Factored:
    """J of a residual by its uses; needs no graph, and stays valid when the parameters change.

    Attributes:
        backend: "expand".
        reason: Empty.
        residual: r `(N,)`.
    """

    backend = "expand"
    reason = ""

    def __init__(
        self, residual: Tensor, params: Sequence[Tensor], parts: Sequence[Sequence[Part]], chunk: int | None = None
    ) -> None:
        self.residual = residual
        self._shapes = [p.shape for p in params]
        self._dtypes = [p.dtype for p in params]
        self._parts = parts
        self._units = [units_of(p) for p in params]
        self._chunk = chunk or max(1, BLOCK // max(1, len(residual)))
        self._gradient: list[Tensor] | None = None

    @property
    def loss(self) -> Tensor:
        """½ |r|², 0-dim."""
        return self.residual.square().sum() / 2

    @property
    def gradient(self) -> list[Tensor]:
        """Jᵀ r, shaped like the parameters; computed once."""
        if self._gradient is None:
            self._gradient = self.vjp(self.residual)
        return self._gradient

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀ u of u `(N,)`, shaped like the parameters."""
        products = []
        for shape, dtype, units, parts in zip(self._shapes, self._dtypes, self._units, self._parts, strict=True):
            total = u.new_zeros(units, dtype=dtype)
            for part in parts:
                scale = u[part.rows, None, None].to(dtype)
                for a, z in zip(part.a, part.z, strict=True):
                    total.addmm_((a * scale).flatten(0, 1).mT, z.flatten(0, 1))
            products.append(total.reshape(shape))
        return products

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v `(N,)` of v shaped like the parameters."""
        product = torch.zeros_like(self.residual)
        for i in range(len(self._parts)):
            product += self.jvp_of(i, v[i])
        return product

    def jvp_of(self, i: int, v: Tensor) -> Tensor:
        """J v `(N,)` of a v that is zero but for parameter i."""
        product = torch.zeros_like(self.residual)
        matrix = v.reshape(self._units[i]).to(self._dtypes[i])
        for part in self._parts[i]:
            for a, z in zip(part.a, part.z, strict=True):
                product[part.rows] += (a * (z @ matrix.mT)).sum((1, 2))
        return product

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """K = J Jᵀ `(N, N)`.

        Args:
            dtype: In which rows are formed, multiplied and added up; None: that of the residual. float64 costs a
                float32 network little and keeps the small eigenvalues.
        """
        N = len(self.residual)
        K = self.residual.new_zeros(N, N, dtype=dtype)
        for _, J in self._blocks(K.dtype, used=True):
            for at in range(0, N, TILE):
                end = min(at + TILE, N)
                K[at:end, :end].addmm_(J[at:end], J[:end].mT)
        for at in range(0, N, TILE):  # the upper triangle of tiles, from the lower
            end = min(at + TILE, N)
            K[at:end, end:] = K[end:, at:end].mT
        return K

    def normal(self, dtype: torch.dtype | None = None) -> Tensor:
        """G = Jᵀ J `(D, D)`, parameters in their order, each flattened; for small D."""
        D = sum(shape.numel() for shape in self._shapes)
        G = self.residual.new_zeros(D, D, dtype=dtype)
        for left, J in self._blocks(G.dtype):
            here = slice(left, left + J.shape[1])
            G[here, here] = J.mT @ J
            for right, other in self._blocks(G.dtype, after=here.stop):
                G[here, right : right + other.shape[1]] = J.mT @ other
                G[right : right + other.shape[1], here] = G[here, right : right + other.shape[1]].mT
        return G

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """J `(N, D)`, parameters in their order, each flattened."""
        blocks = [J for _, J in self._blocks(dtype or self.residual.dtype)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    def _blocks(self, dtype: torch.dtype, after: int = 0, used: bool = False) -> Iterator[tuple[int, Tensor]]:
        """First column, and J `(N, c)` from there; c is at most `chunk`, but a unit's columns stay together.

        Args:
            dtype: Of the blocks.
            after: Begin at this column, which is where another block ended.
            used: Leave out parameters whose columns are zeros, frozen ones; columns are then not where they should be.
        """
        column, start, block = 0, 0, list[tuple[int, int, int]]()
        width = 0
        for i, (units, each) in enumerate(self._units):
            if used and not self._parts[i]:
                continue
            unit = 0
            while unit < units:
                if column < after:  # whole units, as blocks end at units
                    skipped = min(units - unit, (after - column) // each)
                    unit, column = unit + skipped, column + skipped * each
                    start = column
                    continue
                fitting = min(units - unit, (self._chunk - width) // each)
                if not fitting and block:
                    yield start, self._dense(block, width, dtype)
                    start, block, width = column, [], 0
                    continue
                fitting = max(fitting, 1)
                block.append((i, unit, unit + fitting))
                unit, column, width = unit + fitting, column + fitting * each, width + fitting * each
        if block:
            yield start, self._dense(block, width, dtype)

    def _dense(self, block: Sequence[tuple[int, int, int]], width: int, dtype: torch.dtype) -> Tensor:
        J = self.residual.new_zeros(len(self.residual), width, dtype=dtype)
        column = 0
        for i, first, last in block:
            each = self._units[i][1]
            columns = J[:, column : column + (last - first) * each]
            for part in self._parts[i]:
                a = torch.cat([a[..., first:last] for a in part.a], 1).to(dtype)
                z = torch.cat(part.z, 1).to(dtype)
                target = columns[part.rows].unflatten(1, (last - first, each))
                torch.baddbmm(target, a.mT, z, beta=0, out=target)
            column += (last - first) * each
        return J

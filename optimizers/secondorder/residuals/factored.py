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

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import linalg

BLOCK = 2**21  # numbers in a block of columns: 16 MiB in float64
TILE, WIDE = 128, 1024  # rows and columns of the kernel per product; what lies above its diagonal is left out
ELEMENTWISE = 32  # multiplications of a matrix product that take as long as one of two matrices, entry by entry
USES = 64  # in more of them, words of a text say, none are looked for that are alike


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


def merged(part: Part) -> Part:
    """The same J by fewer outer products: uses whose z, or a, are multiples of one another, sample by sample, are one.

    Nested derivatives use a weight once for every backward pass that crosses it, and meet the same tangents in several
    of them: a Laplacian in d dimensions has 2 d + 2 uses, and d + 2 are left.
    """
    a, z = _columns(part.a), _columns(part.z)
    if not 1 < len(z) <= USES or not len(z[0]):
        return part
    fewer_z, fewer_a = _summed(z, a)
    fewer_a, fewer_z = _summed(fewer_a, fewer_z)
    if len(fewer_z) == len(z):
        return part
    return Part(part.rows, [x.unsqueeze(1) for x in fewer_a], [x.unsqueeze(1) for x in fewer_z])


def _summed(by: list[Tensor], others: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`Σ by ⊗ other` with one outer product for all that have multiples of one `by`."""
    few = torch.stack([x[:: max(1, len(x) // 4)] for x in by], 1)  # most pairs differ in any sample
    products = few @ few.mT
    squares = products.diagonal(dim1=1, dim2=2)
    alike = (products**2 >= (1 - 1e-3) * squares[:, :, None] * squares[:, None, :]).all(0).tolist()
    kept, sums = list[int](), list(others)
    for k, x in enumerate(by):
        for j in kept:
            if alike[j][k] and (factor := _multiple(by[j], x)) is not None:
                sums[j] = sums[j] + factor * others[k]
                break
        else:
            kept.append(k)
    return [by[k] for k in kept], [sums[k] for k in kept]


def _multiple(z: Tensor, other: Tensor) -> Tensor | None:
    """The c `(n, 1)` with `other = c z` up to rounding, or None; both `(n, i)`."""
    factor = (z * other).sum(1, keepdim=True) / z.square().sum(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    error = torch.linalg.vector_norm(other - factor * z, dim=1)
    noise = 16 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(other, dim=1)
    return factor if bool((error <= noise).all()) else None


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
        groups: Numbers of parameters that are one layer, a weight with its bias.

    Args:
        residual: r `(N,)`, without a graph.
        params: That J is with respect to.
        parts: Of every parameter; rows may be in several parts, or in none.
        chunk: Columns of J that are held at once; None: 2^21 numbers.
        groups: See above; None: every parameter for itself.
        merged: The parts are those of another Jacobian's `uses`.
    """

    backend = "expand"
    reason = ""

    def __init__(
        self,
        residual: Tensor,
        params: Sequence[Tensor],
        parts: Sequence[Sequence[Part]],
        chunk: int | None = None,
        groups: list[list[int]] | None = None,
        merged: bool = False,
    ) -> None:
        self.residual = residual
        self.groups = [[i] for i in range(len(params))] if groups is None else groups
        self._params = params
        self._shapes = [p.shape for p in params]
        self._dtypes = [p.dtype for p in params]
        self._parts, self._merged = list(parts), merged
        self._units = [units_of(p) for p in params]
        self._chunk = chunk or max(1, BLOCK // max(1, len(residual)))
        self._gradient: list[Tensor] | None = None

    @property
    def uses(self) -> Sequence[Sequence[Part]]:
        """By parameter, what J is computed with: the recorded parts, `merged` when they are first asked for."""
        if not self._merged:
            self._merged = True
            for i, parts in enumerate(self._parts):  # one after the other: both of all would be too much
                self._parts[i] = [merged(part) for part in parts]
        return self._parts

    def restricted(self, params: Sequence[int]) -> Factored:
        """J of some parameters, by their numbers."""
        own = [self.uses[i] for i in params]
        return Factored(self.residual, [self._params[i] for i in params], own, self._chunk, merged=True)

    @property
    def recorded(self) -> Factored:
        """Itself."""
        return self

    @property
    def loss(self) -> Tensor:
        """½ |r|², 0-dim."""
        return self.residual.square().sum() / 2

    @property
    def gradient(self) -> list[Tensor]:
        """Jᵀ r, shaped like the parameters; computed once."""
        if self._gradient is None:
            parts = self.vjp(self.residual)
            self._gradient = [part.to(dtype) for part, dtype in zip(parts, self._dtypes, strict=True)]
        return self._gradient

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀ u of u `(N,)`, shaped like the parameters; computed in float64 if u is, whatever they are."""
        products = []
        for shape, dtype, units, parts in zip(self._shapes, self._dtypes, self._units, self._parts, strict=True):
            total = u.new_zeros(units, dtype=torch.promote_types(dtype, u.dtype))
            for part in parts:
                scale = u[part.rows, None, None].to(total.dtype)
                for a, z in zip(part.a, part.z, strict=True):
                    total.addmm_((a * scale).flatten(0, 1).mT, z.flatten(0, 1).to(total.dtype))
            products.append(total.reshape(shape))
        return products

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v `(N,)` of v shaped like the parameters."""
        product = torch.zeros_like(self.residual)
        for i, parts in enumerate(self._parts):
            matrix = v[i].reshape(self._units[i]).to(self._dtypes[i])
            for part in parts:
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
        by_grams = {i for i in range(len(self.uses)) if self._grams_are_cheaper(i)}
        for i in by_grams:
            self._add_grams(K, i)
        for _, J in self._blocks(K.dtype, used=True, without=by_grams):
            for at in range(0, N, TILE):
                end = min(at + TILE, N)
                K[at:end, :end].addmm_(J[at:end], J[:end].mT)
        return mirrored(K)

    def trace(self) -> Tensor:
        """|J|² = tr K, 0-dim in float64 or what the device has instead."""
        total = linalg.wide(self.residual.new_zeros(()))
        for parts in self.uses:
            for part in parts:
                a, z = (linalg.wide(torch.cat(uses, 1)) for uses in (part.a, part.z))
                total += ((a @ a.mT) * (z @ z.mT)).sum()
        return total

    def apply_kernel(self, X: Tensor) -> Tensor:
        """K X `(N, k)` of X `(N, k)`, in the dtype of X, by blocks of J and without K."""
        product = torch.zeros_like(X)
        for J in self.blocks(X.dtype):
            product.addmm_(J, J.mT @ X)
        return product

    def _grams_are_cheaper(self, i: int) -> bool:
        """Whether K of a parameter takes fewer multiplications from products of uses than from rows of J."""
        o, each = self._units[i]
        uses = sum(len(part.a[0]) * sum(a.shape[1] for a in part.a) for part in self.uses[i])
        return uses**2 * (o + each + ELEMENTWISE) < len(self.residual) ** 2 * o * each

    def _add_grams(self, K: Tensor, i: int) -> None:
        """Add one parameter's part of K, its lower triangle at least: `K_nm += Σ_st (a_ns · a_mt) (z_ns · z_mt)`."""
        columns = [[[x.to(K.dtype) for x in _columns(uses)] for uses in (part.a, part.z)] for part in self.uses[i]]
        at = [range(len(K))[part.rows] for part in self.uses[i]]
        for k, (a, z) in enumerate(columns):
            for m, (b, y) in enumerate(columns[: k + 1]):
                for top in range(0, len(at[k]), TILE):
                    rows = at[k][top : top + TILE]
                    end = top + len(rows) if m == k else len(at[m])
                    for left in range(0, end, WIDE):
                        others = at[m][left : min(left + WIDE, end)]
                        tile = K.new_zeros(len(rows), len(others))
                        for a_s, z_s in zip(a, z, strict=True):
                            a_s, z_s = a_s[top : top + TILE], z_s[top : top + TILE]
                            for b_t, y_t in zip(b, y, strict=True):
                                right = left + len(others)
                                tile.addcmul_(a_s @ b_t[left:right].mT, z_s @ y_t[left:right].mT)
                        K[_slice(rows), _slice(others)] += tile
                        if m != k:
                            K[_slice(others), _slice(rows)] += tile.mT

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
        everything = [(i, 0, units) for i, (units, _) in enumerate(self._units)]
        return self._dense(everything, sum(o * i for o, i in self._units), dtype or self.residual.dtype)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """J by blocks of columns `(N, c)`, in the order of the parameters; those whose J is zero are left out.

        Which columns a block has depends on the parameters that are used, their shapes and `chunk` alone.
        """
        return (J for _, J in self._blocks(dtype, used=True))

    def _blocks(
        self, dtype: torch.dtype, after: int = 0, used: bool = False, without: Container[int] = ()
    ) -> Iterator[tuple[int, Tensor]]:
        """First column, and J `(N, c)` from there; c is at most `chunk`, but a unit's columns stay together.

        Args:
            dtype: Of the blocks.
            after: Begin at this column, which is where another block ended.
            used: Leave out parameters whose columns are zeros, frozen ones; columns are then not where they should be.
            without: Parameters to leave out as well.
        """
        column, start, block = 0, 0, list[tuple[int, int, int]]()
        width = 0
        for i, (units, each) in enumerate(self._units):
            if i in without or (used and not self.uses[i]):
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
        N = len(self.residual)
        J = self.residual.new_empty(N, width, dtype=dtype)
        column = 0
        for i, first, last in block:
            each = self._units[i][1]
            columns = J[:, column : column + (last - first) * each]
            if sum(len(part.a[0]) for part in self.uses[i]) < N:
                columns.zero_()
            for part in self.uses[i]:
                a = torch.cat([a[..., first:last] for a in part.a], 1).to(dtype)
                z = torch.cat(part.z, 1).to(dtype)
                target = columns[part.rows].unflatten(1, (last - first, each))
                torch.baddbmm(target, a.mT, z, beta=0, out=target)
            column += (last - first) * each
        return J


def mirrored(K: Tensor) -> Tensor:
    """K `(N, N)` itself, its upper triangle now that of the lower one; tile by tile."""
    for at in range(0, len(K), TILE):
        end = min(at + TILE, len(K))
        K[at:end, end:] = K[end:, at:end].mT
        square = K[at:end, at:end]
        square.copy_(square.tril() + square.tril(-1).mT)
    return K


def _columns(uses: Sequence[Tensor]) -> list[Tensor]:
    """`(n, o)`, one for every s of every use."""
    return [column for use in uses for column in use.unbind(1)]


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)

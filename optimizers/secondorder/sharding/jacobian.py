"""J of residuals whose samples are spread over processes: its products and its kernel, the same on every process.

    r = [r of rank 0, r of rank 1, …]     J v the same; Jᵀ u and G = Jᵀ J are sums over ranks
    K = J Jᵀ                              by strips of its lower triangle, two a rank: J's columns are gathered block by
                                          block, or the uses of a weight, so that memory is that of one process

Whatever is compared or decomposed afterwards has the same bits on all ranks: it was gathered, or summed by one
all-reduce. So all of them take the same decisions, and no rank sends its solution to others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secondorder.curvature.capture import all_reduced
from secondorder.residuals.factored import BLOCK, ELEMENTWISE, TILE, WIDE, Factored, Part, mirrored, units_of
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.matvec import CHUNK, Products


@dataclass(frozen=True)
class Facts:
    """What processes agree on before they share J.

    Attributes:
        matvec: One of them cannot expand its closure.
        reason: Why, as this process knows it.
        uses: By parameter, the largest number of outer products in a row of J; 0: nobody uses it.
        groups: Numbers of parameters that are one layer, on some process.
    """

    matvec: bool
    reason: str
    uses: list[int]
    groups: list[list[int]]

    @classmethod
    def of(cls, linear: Linearization, reason: str, group: Any) -> Facts:
        """Ask all processes; one all-reduce."""
        leads = {i: layer[0] for layer in linear.groups for i in layer}
        own = [0] * len(leads)
        if isinstance(linear, Factored):
            own = [max([0, *_offsets(linear, i)[1]]) for i in range(len(own))]
        words = [int(not isinstance(linear, Factored)), *own, *(-leads[i] for i in range(len(own)))]
        told = torch.tensor(words, device=linear.residual.device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        matvec, *numbers = told.tolist()
        layers: list[list[int]] = [[] for _ in own]
        for i, lead in enumerate(numbers[len(own) :]):
            leads[i] = leads[-lead] if -lead < i and not matvec else i
            layers[leads[i]].append(i)
        reason = reason or "another process cannot expand its closure" if matvec else ""
        return cls(bool(matvec), reason, numbers[: len(own)], [layer for layer in layers if layer])

    def restricted(self, params: Sequence[int]) -> Facts:
        """Of some parameters, by their numbers."""
        return replace(self, uses=[self.uses[i] for i in params], groups=[[i] for i in range(len(params))])


class Gathered:
    """r and J of all processes, of which each has some rows. Whatever is asked for, all of them must ask for it.

    Args:
        local: This process's rows, scaled as they are in r.
        params: What J is with respect to.
        group: The processes.
        facts: What all of them agree on.

    Attributes:
        backend: That of all processes which have rows.
        reason: Why it is not "expand".
        residual: r `(N,)`.
        groups: Numbers of parameters that are one layer, on some process.
    """

    def __init__(self, local: Linearization, params: Sequence[Tensor], group: Any, facts: Facts) -> None:
        self._lengths = lengths(local.residual, group)
        if facts.matvec and not len(local.residual):
            local = Products(local.residual, params)  # this process has no samples, the others products alone
        if isinstance(local, Factored):
            local = _aligned(local, params, facts.uses, sum(self._lengths))
        assert isinstance(local, (Factored, Products))
        self.backend, self.reason = ("matvec" if facts.matvec else "expand"), facts.reason
        self._local, self._params, self._group, self._facts = local, list(params), group, facts
        self.groups = facts.groups
        self._rank = dist.get_rank(group)
        self._first = sum(self._lengths[: self._rank])
        self.residual = gathered(local.residual, self._lengths, group)
        self._gradient: list[Tensor] | None = None

    @property
    def recorded(self) -> Linearization:
        """This process's rows as they were recorded."""
        return self._local

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
        return all_reduced(self._local.vjp(self._own(u)), self._group)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v `(N,)` of v shaped like the parameters."""
        return gathered(self._local.jvp(v), self._lengths, self._group)

    def normal(self, dtype: torch.dtype | None = None) -> Tensor:
        """G = Jᵀ J `(D, D)`."""
        return all_reduced([self._local.normal(dtype)], self._group)[0]

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """J `(N, D)`, all of it on every process."""
        return gathered(self._local.rows(dtype), self._lengths, self._group)

    def trace(self) -> Tensor:
        """The trace of K, 0-dim in float64; by "matvec" an estimate."""
        return all_reduced([self._local.trace()], self._group)[0]

    def restricted(self, params: Sequence[int]) -> Gathered:
        """J of some parameters, by their numbers."""
        other = copy.copy(self)
        other._local, other._params = self._local.restricted(params), [self._params[i] for i in params]
        other._facts, other.groups = self._facts.restricted(params), [[i] for i in range(len(params))]
        other._gradient = None
        return other

    def apply_kernel(self, X: Tensor) -> Tensor:
        """K X `(N, k)` of X `(N, k)`, in the dtype of X."""
        own = self._own(X)
        product = torch.zeros_like(own)
        if isinstance(self._local, Factored):
            for J in self._local.blocks(X.dtype):
                product.addmm_(J, all_reduced([J.mT @ own], self._group)[0])
        else:
            for columns, some in zip(product.split(CHUNK, 1), own.split(CHUNK, 1), strict=True):
                columns.copy_(self._local.jvps(all_reduced(self._local.vjps(some.mT), self._group)).mT)
        return gathered(product, self._lengths, self._group)

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """K = J Jᵀ `(N, N)`, exactly symmetric."""
        dtype = dtype or self.residual.dtype
        if isinstance(self._local, Factored):
            return self._by_columns(self._local, dtype)
        return self._by_rows(self._local).to(dtype)

    def _own(self, u: Tensor) -> Tensor:
        return u[self._first :][: len(self._local.residual)]

    def _by_columns(self, local: Factored, dtype: torch.dtype) -> Tensor:
        """Of 2 W strips of rows, from the diagonal to the left, rank k computes the k-th from above and from below.

        All pairs are equally large, whoever has how many samples.
        """
        N, world = len(self.residual), len(self._lengths)
        edges = [N * k // (2 * world) for k in range(2 * world + 1)]
        shapes = [(end - begin, end) for begin, end in zip(edges, edges[1:], strict=False)]
        own = [self.residual.new_zeros(shapes[k], dtype=dtype) for k in self._strips(self._rank)]
        self._add_to_strips(local, own, dtype)
        sizes = [[shapes[k][0] * shapes[k][1] for k in self._strips(rank)] for rank in range(world)]
        numbers = gathered(torch.cat([strip.flatten() for strip in own]), [sum(pair) for pair in sizes], self._group)
        K = self.residual.new_zeros(N, N, dtype=dtype)
        parts = iter(numbers.split([size for pair in sizes for size in pair]))
        for rank in range(world):
            for k in self._strips(rank):
                K[edges[k] : edges[k + 1], : edges[k + 1]] = next(parts).view(shapes[k])
        return mirrored(K)

    def _add_to_strips(self, local: Factored, strips: Sequence[Tensor], dtype: torch.dtype) -> None:
        """What travels is J, or the uses that it is made of where their products are cheaper, as in one process."""
        by_rows = []
        for i, (p, uses) in enumerate(zip(self._params, self._facts.uses, strict=True)):
            o, each = units_of(p)
            if uses**2 * (o + each + ELEMENTWISE) >= o * each:
                by_rows.append(i)
            elif uses:
                a, z = (gathered(x, self._lengths, self._group).to(dtype) for x in _stacked(local, i, uses, p))
                for strip in strips:
                    _add_grams(strip, a.transpose(0, 1).contiguous(), z.transpose(0, 1).contiguous())
        for block in local.restricted(by_rows).blocks(dtype):
            J = gathered(block, self._lengths, self._group)
            for strip in strips:
                for rows, own in _tiles(strip):
                    own.addmm_(J[rows], J[: rows.stop].mT)

    def _strips(self, rank: int) -> tuple[int, int]:
        return rank, 2 * len(self._lengths) - 1 - rank

    def _by_rows(self, local: Products) -> Tensor:
        """Rows of J go around, some at a time; every rank multiplies them with its own."""
        sizes = [p.numel() for p in self._params]
        dtype = torch.cat([p.detach().flatten()[:0] for p in self._params]).dtype
        own = self.residual.new_zeros(len(local.residual), len(self.residual))
        column = 0
        for rank, length in enumerate(self._lengths):
            for at in range(0, length, CHUNK):
                count = min(CHUNK, length - at)
                rows = own.new_empty(count, sum(sizes), dtype=dtype)
                if rank == self._rank:
                    units = torch.eye(length, dtype=own.dtype, device=own.device)[at : at + count]
                    rows = torch.cat([part.flatten(1) for part in local.vjps(units)], 1)
                dist.broadcast(rows, group=self._group, group_src=rank)
                parts = zip(rows.split(sizes, 1), self._params, strict=True)
                v = [part.reshape(count, *p.shape) for part, p in parts]
                own[:, column : column + count] = local.jvps(v).mT
                column += count
        return mirrored(gathered(own, self._lengths, self._group))


def lengths(part: Tensor, group: Any) -> list[int]:
    """The length of the first axis on all ranks."""
    found = part.new_zeros(dist.get_world_size(group), dtype=torch.int64)
    dist.all_gather(list(found.split(1)), found.new_tensor([len(part)]), group=group)
    return found.tolist()


def gathered(part: Tensor, counts: Sequence[int], group: Any) -> Tensor:
    """Tensors that differ in the length of their first axis, one after the other.

    Args:
        part: `(n, …)`, without a graph.
        counts: n of all ranks.
        group: Those ranks.
    """
    most = max(counts)
    if most == 0:
        return part
    if len(part) < most:
        part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    found = part.new_empty(len(counts) * most, *part.shape[1:])
    dist.all_gather(list(found.split(most)), part.contiguous(), group=group)
    if min(counts) == most:
        return found
    return torch.cat([found[rank * most :][:n] for rank, n in enumerate(counts)])


def _aligned(J: Factored, params: Sequence[Tensor], uses: Sequence[int], N: int) -> Factored:
    """The same, by the blocks of columns that all ranks have.

    Where ranks differ in which parameters they use (one without samples uses none), the others get parts without rows.
    """
    every: list[list[Part]] = []
    for p, parts, somewhere in zip(params, J.uses, uses, strict=True):
        (o, i), nothing = units_of(p), slice(0, 0)
        absent = [Part(nothing, [p.new_zeros(0, 1, o)], [p.new_zeros(0, 1, i)])] if somewhere and not parts else []
        every.append([*parts, *absent])
    return Factored(J.residual, params, every, max(1, BLOCK // max(1, N)), merged=True)


def _offsets(J: Factored, i: int) -> tuple[list[int], list[int]]:
    """Of a parameter's parts, the first and the last of the uses in their rows; parts of other rows begin at 0."""
    taken = torch.zeros(len(J.residual), dtype=torch.int64)
    begins, ends = [], []
    for part in J.uses[i]:
        rows = taken[part.rows]
        begins.append(int(rows.amax()) if len(rows) else 0)
        ends.append(begins[-1] + sum(a.shape[1] for a in part.a))
        rows.fill_(ends[-1])
    return begins, ends


def _stacked(J: Factored, i: int, uses: int, p: Tensor) -> list[Tensor]:
    """All uses of the i-th parameter p `(n, uses, o)` and `(n, uses, i)`; zeros in rows that have fewer."""
    found = []
    for kind, size in enumerate(units_of(p)):
        x = J.residual.new_zeros(len(J.residual), uses, size, dtype=p.dtype)
        for part, begin, end in zip(J.uses[i], *_offsets(J, i), strict=True):
            x[part.rows, begin:end] = torch.cat((part.a, part.z)[kind], 1).to(p.dtype)
        found.append(x)
    return found


def _add_grams(strip: Tensor, a: Tensor, z: Tensor) -> None:
    """Add `Σ_st (a_ns · a_mt) (z_ns · z_mt)` to rows n of the kernel that end at its diagonal; a `(s, N, o)`."""
    for rows, own in _tiles(strip):
        for left in range(0, rows.stop, WIDE):
            columns = slice(left, min(left + WIDE, rows.stop))
            for a_s, z_s in zip(a[:, rows], z[:, rows], strict=True):
                for b_t, y_t in zip(a[:, columns], z[:, columns], strict=True):
                    own[:, columns].addcmul_(a_s @ b_t.mT, z_s @ y_t.mT)


def _tiles(strip: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the kernel, and what a strip that ends at its diagonal has of them up to there."""
    first = strip.shape[1] - len(strip)
    for at in range(0, len(strip), TILE):
        rows = slice(first + at, first + min(at + TILE, len(strip)))
        yield rows, strip[at : at + TILE, : rows.stop]

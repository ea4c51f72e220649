"""Raw sums of layers on their way: matrices to the owners of the blocks that are made of them, vectors to everybody.

One exchange a step; micro-batches were added up before, by autograd. A symmetric matrix travels as a triangle. An owner
adds up what came in one order, `(r0 + r1) + (r2 + r3)`: where the ranks' micro-batches are split among twice as many
ranks, the bits stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.curvature.capture import Capture
from secondorder.curvature.site import Site
from secondorder.sharding.tree import tree
from secondorder.sharding.wire import Segment, Wire

Leaf = tuple[Site, str, int]  # a site, the name of its statistic, which of them
Totals = dict[Site, dict[str, list[Any]]]

_MATRICES = ("inputs", "outputs", "moment")  # of these, owners alone have the sums


def packed(x: Tensor) -> Tensor:  # (k, d, d) -> (k, d (d + 1) / 2)
    """The lower triangle of symmetric matrices.

    The rows of the lower half, whole up to the middle; right of it their triangle, and where that is empty the triangle
    of the upper half, turned over.
    """
    h, b = _halves(x.shape[-1])
    below = torch.nn.functional.pad(x[..., h:, h:].tril(), (0, h + 1 - b))
    above = torch.nn.functional.pad(x[..., :h, :h].mT.triu(), (1, 0, 0, b - h))
    return torch.cat([x[..., h:, :h], below + above], -1).flatten(1)


def unpacked(x: Tensor) -> Tensor:  # (k, d (d + 1) / 2) -> (k, d, d)
    """The symmetric matrices whose lower triangles these are."""
    h, b = _halves(math.isqrt(2 * x.shape[-1]))
    x = x.view(-1, b, 2 * h + 1)
    corner, rest = x[..., :h], x[..., h:]
    below, above = rest[..., :b].tril(), rest[..., :h, 1:].triu()
    upper = torch.cat([above + above.triu(1).mT, corner.mT], -1)
    return torch.cat([upper, torch.cat([corner, below + below.tril(-1).mT], -1)], -2)


def _halves(d: int) -> tuple[int, int]:
    return d // 2, d - d // 2


def mirrored(totals: Mapping[Site, Mapping[str, Sequence[Tensor]]]) -> Totals:
    """Sums as they are after a journey: products `XᵀX` may differ from their transposes in the last bit."""
    leaves: list[Leaf] = []
    for site, found in totals.items():
        leaves += [(site, name, i) for name, parts in found.items() for i in range(len(parts))]
    values = [totals[site][name][i] for site, name, i in leaves]
    chosen = [n for n, leaf in enumerate(leaves) if _symmetric(leaf, values[n].shape)]
    _change(values, chosen, lambda x: unpacked(packed(x)))
    return _nested(leaves, values)


class Reduction:
    """The exchange of one layout's layer statistics.

    Attributes:
        sent: Bytes that the last exchange sent to others.
        exchanges: Exchanges so far.
    """

    def __init__(self, plan: Any, device: torch.device, readers: Mapping[Leaf, Collection[int]]) -> None:
        """Lay out nothing yet: which sites take part is known in a step.

        Args:
            plan: The sharded plan.
            device: Of all sums.
            readers: By leaf, the ranks whose blocks are made of it; every rank must give the same.
        """
        self._plan, self._device, self._readers = plan, device, readers
        self._course: _Course | None = None
        self.sent = self.exchanges = 0

    def totals(self, capture: Capture, applied: Mapping[Site, Tensor]) -> tuple[Totals, dict[Site, Tensor]]:
        """What the sites that are active received, by leaf, summed over the ranks; every rank must come.

        Sites that received nothing on any rank are missing. Of others, matrices that no block of this rank is made of
        are None.

        Args:
            capture: Sites and what reached them; its loss terms become those of all ranks.
            applied: By reference layer, what this rank has of the gradients that probes are compared with.

        Returns:
            The sums, and those of `applied`.
        """
        sites = [site for site in capture.sites if site.leaves and site.active]
        if not sites:
            return {}, {}
        if self._course is None or self._course.sites != sites:
            self._course = _Course(self._plan, self._device, self._readers, sites)
        course = self._course
        received = {site: capture.received(site) for site in sites}
        came = torch.tensor([float(received[site] is not None) for site in sites], dtype=torch.float64)
        terms = torch.zeros(()) if capture.terms is None else capture.terms
        words = torch.cat([came.to(self._device), terms.to(self._device, torch.float64)[None]])
        values = []
        for site, name, i in course.leaves:
            zeros, got = site.leaves["probe" if name == _APPLIED else name][i].detach(), received[site]
            found = applied.get(site) if name == _APPLIED else None if got is None else got[name][i]
            values.append(zeros if found is None else found.to(zeros.dtype).view(zeros.shape))
        said, summed = course.exchange(values, words)
        self.sent, self.exchanges = course.wire.sent, self.exchanges + 1
        if capture.terms is not None:
            capture.terms = said[:, -1].sum().to(capture.terms.dtype)
        anywhere = (said[:, :-1] > 0).any(0).tolist()
        every = _nested(course.leaves, summed)
        total = {site: every[site] for site, here in zip(sites, anywhere, strict=True) if here}
        return total, {site: parts.pop(_APPLIED)[0] for site, parts in total.items() if _APPLIED in parts}


_APPLIED = "applied"


class _Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool


class _Course:
    """The exchange for certain sites: what goes where, and the buffers."""

    def __init__(
        self, plan: Any, device: torch.device, readers: Mapping[Leaf, Collection[int]], sites: Sequence[Site]
    ) -> None:
        self.sites, self.rank, self.world = list(sites), plan.rank, plan.world
        self.leaves: list[Leaf] = []
        self.kinds: list[_Kind] = []
        going: list[list[int]] = [[] for _ in range(self.world)]  # by rank, the leaves whose sums it is to have
        for site in sites:
            named = {name: list(leaves) for name, leaves in site.leaves.items()}
            if "probe" in named:
                named[_APPLIED] = named["probe"]
            for name, leaves in named.items():
                for i, t in enumerate(leaves):
                    leaf = site, name, i
                    for to in readers.get(leaf, ()) if name in _MATRICES else range(self.world):
                        going[to].append(len(self.leaves))
                    self.leaves.append(leaf)
                    self.kinds.append(_Kind(tuple(t.shape), t.dtype, _symmetric(leaf, t.shape)))
        self.going, self.mine = going, going[self.rank]
        others = [[] if to == self.rank else numbers for to, numbers in enumerate(going)]
        sends = [[self._segment(n) for n in numbers] for numbers in others]
        mine = [self._segment(n) for n in self.mine]
        receives = [[] if source == self.rank else mine for source in range(self.world)]
        self.wire = Wire(plan.group, self.rank, device, sends, receives, len(sites) + 1)

    def _segment(self, number: int) -> Segment:
        shape, dtype, symmetric = self.kinds[number]
        d = shape[-1]
        return Segment((shape[0], d * (d + 1) // 2) if symmetric else shape, dtype)

    def exchange(self, values: Sequence[Tensor], words: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Send each value to its readers; `(processes, words)`, and the sums of what is read here."""
        triangles = [n for n, kind in enumerate(self.kinds) if kind.symmetric]
        light = list(values)
        _change(light, triangles, packed)
        targets, sources = [], []
        for to, views in enumerate(self.wire.outgoing):
            if to != self.rank:
                targets += views
                sources += [light[n] for n in self.going[to]]
        if targets:
            torch._foreach_copy_(targets, sources)
        said = self.wire.exchange(words)
        own = [light[n] for n in self.mine]
        parts = [own if source == self.rank else self.wire.incoming[source] for source in range(self.world)]
        summed: list[Any] = [None] * len(values)
        for n, total in zip(self.mine, tree(parts), strict=True):
            summed[n] = total
        _change(summed, [n for n in triangles if summed[n] is not None], unpacked)
        return said, summed


def _symmetric(leaf: Leaf, shape: Sequence[int]) -> bool:
    return leaf[1] in ("inputs", "outputs") and len(shape) == 3


def _change(values: list[Any], numbers: Sequence[int], change: Callable[[Tensor], Tensor]) -> None:
    """Put in the place of some values what a function makes of them: one call for all of one shape and dtype."""
    kinds = {n: (values[n].shape[1:], values[n].dtype) for n in numbers}
    for kind in dict.fromkeys(kinds.values()):
        chosen = [n for n in numbers if kinds[n] == kind]
        changed = change(torch.cat([values[n] for n in chosen]))
        for n, part in zip(chosen, changed.split([len(values[n]) for n in chosen]), strict=True):
            values[n] = part


def _nested(leaves: Sequence[Leaf], values: Sequence[Any]) -> Totals:
    out: Totals = {}
    for (site, name, _), value in zip(leaves, values, strict=True):
        out.setdefault(site, {}).setdefault(name, []).append(value)
    return out

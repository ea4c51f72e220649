"""What single steps do, measured in the calls that `track` asks for. Else nothing is measured, and nothing ever waits.

    Δ = p_new - p_old                      what the step did to a bucket's parameters, weight decay included
    update_ratio  |Δ| / |p_old|
    cosine        -<Δ, g> / (|Δ| |g|)      1: straight down the gradient

Layer statistics tell how far the gradients of a layer's N rows are apart. Row j adds u_j to the gradient ∇ = Σ u_j;
with q = Σ |u_j|², if rows are independent, two unbiased estimates are

    v = (N q - |∇|²) / (N - 1)             of the variance of ∇, summed over its entries
    s = |∇|² - v                           of the squared length of its mean

q is exact where moments are captured (EKFAC) and for blocks with one factor. Of two factors it is N mean|a|² mean|g|²,
which is exact where |a|² and |g|² are uncorrelated over the rows. Then tr Σ = N v is the variance of a row's gradient
in a mean loss, s / v the signal to noise ratio of this batch, and N v / s the simple noise scale: the batch at which
signal and noise are equal. McCandlish et al., *An Empirical Model of Large-Batch Training* (2018, arXiv:1812.06162),
section 2.2 and appendix A.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secondorder.curvature.layer import Sums
from secondorder.layout.buckets import BaseBucket, Bucket
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags, is_distributed

TOP = 5  # largest eigenvalues that are told
_KEEP = 0.9  # of the averages of v and s: single batches estimate s so badly that it may be negative


def bucket_names(buckets: Sequence[BaseBucket]) -> list[str]:
    """Names that a user can read, as `group0.256x128`; where several share one, `#2` and so on are appended."""
    used: Counter[str] = Counter()
    names = []
    for b in buckets:
        kind = "x".join(map(str, b.shape)) if isinstance(b, Bucket) else b.method.name if b.fallback else "elementwise"
        name = f"group{b.group}.{kind}"
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return names


@dataclass
class Watch:
    """Measurements of the last call that was measured, on the device.

    Attributes:
        every: Calls from one measurement to the next; 0: none.
        samples: Examples of every backward pass whose curvature is looked at.
        top: Largest eigenvalues of that, or None.
        moved: By bucket `(4,)`: |p|², |Δ|², |g|², -<Δ, g>.
        spread: By bucket `(3,)`: v, s, N.
        averages: By bucket `(2,)`: averages of v and s over measurements, not debiased: only their ratio is used.
    """

    every: int = 0
    samples: int = 0
    top: Tensor | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    _wanted: bool = False  # layer statistics do not come in every call: the next ones are measured

    def wants_statistics(self, call: int) -> bool:
        """Whether layer statistics of this call (from 1) will be measured."""
        return self.every > 0 and (self._wanted or call % self.every == 0)

    def before(self, params: Sequence[Tensor], call: int) -> list[Tensor] | None:
        """Copies of the parameters, if this call (from 1) is measured."""
        if not self.every or call % self.every or any(map(is_distributed, params)):
            return None
        self._wanted = True
        return [p.detach().clone() for p in params]

    def after(
        self,
        layout: Layout,
        flags: Flags,
        groups: Sequence[Mapping[str, Any]],
        before: Sequence[Tensor] | None,
        unclipped: Callable[[], Tensor | float],
        spectrum: Callable[[], Tensor | None],
    ) -> None:
        """Measure the step that was just taken.

        Args:
            layout: Where the parameters are.
            flags: Gradients and layer statistics of the step.
            groups: Hyper-parameters.
            before: Copies of the parameters; None: the step's movement is not measured.
            unclipped: By what the gradients must be multiplied to be those that the statistics saw.
            spectrum: Eigenvalues of the curvature on some examples.
        """
        names = bucket_names(layout.buckets)
        if before is not None:
            self.moved = {}
            for name, b in zip(names, layout.buckets, strict=True):
                if any(flags.grads[strand.index] is not None for _, strand in b.strands):
                    sign = 1 if groups[b.group]["maximize"] else -1
                    self.moved[name] = _movement(b, before, layout.params, flags.grads, sign)
        if self._wanted and flags.sums and not any(map(is_distributed, layout.params)):
            self._wanted, self.spread = False, {}
            found, factor = spectrum() if self.samples else None, unclipped()
            self.top = None if found is None else found.sort(descending=True).values[:TOP]
            for name, b in zip(names, layout.buckets, strict=True):
                found = _spread(b, flags, factor)
                if found is not None:
                    self.spread[name] = found
                    known = self.averages.get(name, torch.zeros_like(found[:2]))
                    good = found.isfinite().all() & flags.ok[b.device]
                    self.averages[name] = torch.where(good, _KEEP * known + (1 - _KEEP) * found[:2], known)


def _movement(
    b: BaseBucket, before: Sequence[Tensor], after: Sequence[Tensor], grads: Sequence[Tensor | None], sign: int
) -> Tensor:
    here = [strand for _, strand in b.strands if grads[strand.index] is not None]

    def joined(tensors: Sequence[Tensor | None]) -> Tensor:
        found = [(strand, tensors[strand.index]) for strand in here]
        return torch.cat([strand.cut(t).reshape(-1) for strand, t in found if t is not None]).to(b.dtype)

    p, g = joined(before), joined(grads)
    step = joined([t.detach() for t in after]) - p
    return torch.stack([p.dot(p), step.dot(step), g.dot(g), sign * step.dot(g)])


def _spread(b: BaseBucket, flags: Flags, unclipped: Tensor | float) -> Tensor | None:
    """`(v, s, N)` of a bucket; None where a piece with a gradient has no statistics, or they do not tell."""
    parts = []
    for piece in b.pieces:
        grads = [strand.cut(g) for strand in piece.strands if (g := flags.grads[strand.index]) is not None]
        if not grads:
            continue
        found = flags.sums.get(piece.index)
        squares = None if found is None or not found.rows else squared_rows(found, piece.at)
        if found is None or squares is None:
            return None
        N = torch.stack([rows.mean() for rows in found.rows]).sum()
        length = torch.stack(torch._foreach_norm(grads, 2, dtype=b.dtype)).square().sum() * unclipped**2
        v = torch.where(N > 1, (N * squares / found.scales["terms"] - length) / (N - 1), torch.nan)
        parts.append(torch.stack([v, length - v, N]))
    if not parts:
        return None
    every = torch.stack(parts)
    return torch.cat([every[:, :2].sum(0), every[:, 2].amin()[None]])


def squared_rows(found: Sums, at: tuple[int, ...]) -> Tensor | None:
    """`Σ |u_j|²` of the piece that begins at `at`, normalised as output factors are, 0-d; None where a side is missing.

    The trace of the moments, of the one factor, or the product of the traces of two.
    """
    if "moment" in found.raw:
        raw, scale = _of(found, "moment", at)
        return (raw.flatten(1).sum(1) * scale).sum()
    names = [name for name in found.scales if name.startswith("gram_")]
    if not names or any(name not in found.raw for name in names):
        return None
    traces = torch.ones(())
    for name in names:
        raw, scale = _of(found, name, at)
        traces = traces.to(raw) * ((raw.diagonal(dim1=-2, dim2=-1) if raw.ndim == 3 else raw).sum(-1) * scale)
    return traces.sum()


def _of(found: Sums, stream: str, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    value = found.of(stream, at)
    assert value is not None
    return value

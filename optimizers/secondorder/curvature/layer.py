"""Statistics of one layer in the normal form `a (k, n, s, d_in)`, `g (k, n, s, d_out)`: raw sums and counts.

    expand   A = Σ_{n,s} a aᵀ,         G = Σ_{n,s} g gᵀ,         rows = positions that count
    reduce   A = Σ_n ā āᵀ,  ā = mean_s a,   G = Σ_n ĝ ĝᵀ,  ĝ = Σ_s g,   rows = samples that count
    joint    a gets a trailing 1: a column sum and a count are the last column of A
    moment   Σ (Q_Gᵀ g aᵀ Q_A)², element by element, over rows (expand) or of the sums over positions (reduce)

A side of a block is covered by one factor, or cut into several, or has a diagonal one. Positions whose output gradient
is exactly zero are no observations where the layer says so: padded tokens and ignored targets leave no trace.

Expand and reduce: Eschenhagen et al., *Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures* (2023, arXiv:2311.00636), section 3. Moment: George et al. (2018, arXiv:1806.03884), equation 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secondorder.preconditioner.protocol import Context, State, Streams
from secondorder_kernels import gram

_CHUNK = 1 << 24  # elements of per-sample gradients that are held at a time


@dataclass(frozen=True)
class LayerStatistic:
    """Gram matrices that the plan brought: `gram_i (n, d_i, d_i)`, or `(n, d_i)` for modes with a diagonal factor."""

    def __call__(self, s: State, x: Streams, c: Context) -> dict[int, Tensor]:
        """By mode."""
        return {i: x[f"gram_{i}"] for i in (*c.modes, *c.diagonal)}


@dataclass(frozen=True)
class Side:
    """How one side of a block is covered by factors.

    Attributes:
        cuts: `(start, stop)` of every factor.
        diagonal: Factors are diagonals.
        joined: A trailing 1 (the bias) belongs to the last factor.
    """

    cuts: tuple[tuple[int, int], ...]
    diagonal: bool = False
    joined: bool = False

    def sizes(self) -> list[int]:
        """Size of every factor."""
        return [stop - start + (self.joined and stop == self.cuts[-1][1]) for start, stop in self.cuts]


@dataclass
class Sums:
    """Raw sums of one parameter's statistics in one step, and what normalises them.

    Attributes:
        raw: By stream and by where the piece begins: for `"gram_i"` along mode `i`, for `"moment"` in all modes.
        scales: By stream, 0-d or one number per group; a stream without raw sums is its scale.
        starts: By stream, the axes of a piece's position that matter.
        rows: For every use, its number of rows `(k,)`; empty where they are of the model's distribution, not of data.
    """

    raw: dict[str, dict[tuple[int, ...], Tensor]]
    scales: dict[str, Tensor]
    starts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rows: Sequence[Tensor] = ()

    def of(self, stream: str, at: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Raw sum and scale of a piece that begins at `at` in its parameter's view; None where there is none."""
        if stream not in self.raw:
            scale = self.scales.get(stream)
            return None if scale is None else (torch.ones_like(scale), scale)
        start = tuple(at[axis] for axis in self.starts[stream]) if at else (0,) * len(self.starts[stream])
        return self.raw[stream][start], self.scales[stream]


def output_sums(rows: Tensor, side: Side) -> list[Tensor]:  # rows (k, m, d)
    """`G` of every factor: `(k, d, d)`, or `(k, d)` where diagonal."""
    parts = [rows[..., start:stop] for start, stop in side.cuts]
    return [part.square().sum(1) if side.diagonal else gram(part.mT) for part in parts]


def input_sums(rows: Tensor, counts: Tensor | None, side: Side) -> list[Tensor]:  # rows (k, m, d)
    """`A` of every factor.

    Args:
        rows: Inputs.
        counts: `(k, m)`, 1 for rows that count, else 0; None: all of them do.
        side: The input side.
    """
    found = []
    for start, stop in side.cuts:
        part, joined = rows[..., start:stop], side.joined and stop == side.cuts[-1][1]
        if not side.diagonal:
            found.append(gram(part.mT, weight=counts, ones=joined))
            continue
        square = part.square() if counts is None else part.square() * counts[..., None]
        sums = square.sum(1)
        if joined:
            count = sums.new_full((len(sums),), rows.shape[1]) if counts is None else counts.sum(1)
            sums = torch.cat([sums, count[:, None]], -1)
        found.append(sums)
    return found


def moment_sums(
    a: Tensor,
    g: Tensor,
    sides: tuple[Side, Side],
    frames: Sequence[tuple[Tensor | None, Tensor | None]],
    by_sample: bool,
) -> list[Tensor]:
    """Squares of gradients in the factors' eigenbases, `(k, d_out, d_in)` for every tile, output cuts outermost.

    Args:
        a: `(k, n, s, d_in)`; rows that do not count need not be zero here, since their `g` is.
        g: `(k, n, s, d_out)`.
        sides: Input and output side.
        frames: For every tile `(Q_in, Q_out)`, each `(k, d, d)` or None for the identity.
        by_sample: Sum over positions before squaring.
    """
    inputs, outputs = sides
    tiles = [(out, cut) for out in outputs.cuts for cut in inputs.cuts]
    found = []
    for (out, cut), (Q_in, Q_out) in zip(tiles, frames, strict=True):
        left, right = g[..., out[0] : out[1]], a[..., cut[0] : cut[1]]
        left = left if Q_out is None else left @ Q_out[:, None]
        if inputs.joined and cut == inputs.cuts[-1]:
            right = torch.cat([right, right.new_ones(*right.shape[:-1], 1)], -1)
        right = right if Q_in is None else right @ Q_in[:, None]
        if not by_sample or g.shape[2] == 1:
            # contiguous, as after a turn: sums round by the layout, and frames may or may not be there in a first pass
            rows, columns = (t.flatten(1, 2).contiguous().square() for t in (left, right))
            found.append(rows.mT @ columns)
            continue
        at_once = max(1, _CHUNK // max(1, left.shape[0] * left.shape[-1] * right.shape[-1]))
        total = left.new_zeros(left.shape[0], left.shape[-1], right.shape[-1])
        for i in range(0, g.shape[1], at_once):
            total = total + (left[:, i : i + at_once].mT @ right[:, i : i + at_once]).square().sum(1)
        found.append(total)
    return found

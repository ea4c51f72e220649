"""One collective: everything that this process has for every other one, of whatever dtype, in one all-to-all of bytes.

Each part begins with the same few float64 *words*, which so reach everybody: decisions cost no collective of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Segment(NamedTuple):
    """A tensor on its way."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Wire:
    """Buffers and exact splits of an exchange that comes again in every step.

    Attributes:
        outgoing: For each process, views of what will be sent there, in the order of its segments.
        incoming: For each process, views of what came from there.
        sent: Bytes that an exchange sends to others.
        exchanges: Exchanges so far.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        device: torch.device,
        sends: Sequence[Sequence[Segment]],
        receives: Sequence[Sequence[Segment]],
        words: int,
    ) -> None:
        """Lay out the buffers.

        Args:
            group: Process group.
            rank: This process in it.
            device: Of the buffers.
            sends: For each process, what it is sent. The sender's and the receiver's lists must agree.
            receives: For each process, what comes from there.
            words: Number of words.
        """
        self._group, self._rank = group, rank
        self._send, self._in_splits, out_words, self.outgoing = _laid_out(sends, words, rank, device)
        self._recv, self._out_splits, self._words, self.incoming = _laid_out(receives, words, rank, device)
        self._own_words = out_words
        self.sent, self.exchanges = sum(self._in_splits), 0

    def clear(self) -> None:
        """Zeros for all that will be sent."""
        self._send.zero_()

    def exchange(self, words: Tensor) -> Tensor:
        """Send and receive.

        Args:
            words: `(k,)` float64, for everybody.

        Returns:
            `(processes, k)`, what each of them says.
        """
        if len(self._in_splits) == 1:
            return words[None].clone()
        others = [w for w in self._own_words if w is not None]
        torch._foreach_copy_(others, [words] * len(others))
        dist.all_to_all_single(self._recv, self._send, self._out_splits, self._in_splits, group=self._group)
        self.exchanges += 1
        return torch.stack([words if w is None else w for w in self._words])


def _laid_out(
    parts: Sequence[Sequence[Segment]], words: int, rank: int, device: torch.device
) -> tuple[Tensor, list[int], list[Tensor | None], list[list[Tensor]]]:
    """A buffer of bytes, the length of each process's part, views of its words and of its segments."""
    lengths, offsets, total = [], [], 0
    for process, segments in enumerate(parts):
        at = 0 if process == rank else 8 * words
        places = []
        for shape, dtype in segments:
            at += -at % dtype.itemsize
            places.append(at)
            at += dtype.itemsize * torch.Size(shape).numel()
        at += -at % 8
        lengths.append(at)
        offsets.append([total + place for place in places])
        total += at
    buffer = torch.zeros(total, dtype=torch.uint8, device=device)
    said: list[Tensor | None] = []
    start = 0
    for process, length in enumerate(lengths):
        said.append(None if process == rank else buffer[start : start + 8 * words].view(torch.float64))
        start += length
    views = []
    for segments, places in zip(parts, offsets, strict=True):
        views.append(
            [
                buffer[at : at + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
                for (shape, dtype), at in zip(segments, places, strict=True)
            ]
        )
    return buffer, lengths, said, views

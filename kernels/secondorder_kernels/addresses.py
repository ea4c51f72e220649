"""Tables of addresses, by which one kernel gets at many tensors of any shapes and strides.

A table has one line for each tensor of a list and what goes with it (its gradient, its averages):

    elements, columns, (address, row stride, column stride) for each of them

Tables lie on the device. They are made anew only where addresses or shapes changed, and are copied there without
waiting. A CUDA graph reads a table again at every replay: one that a graph captured is kept as long as the process
lives, and none can be made during a capture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from secondorder_kernels import strides

_MOST = 64  # tables of each kind that are held: gradients come back to some of the places where they have been
_VECTOR = 16  # bytes of the widest load

T = TypeVar("T")


class _Cache(Generic[T]):
    """What was last made for a device, each on the stream whose kernels read it: no other waits for the copy."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._captured: dict[int, T] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """What is held under a key; it is made where there is none."""
        made, stream = self._held.get(key, (None, None))
        if _capturing(device):  # whoever captures waits for all streams first, as torch.cuda.graph does
            if made is None:
                raise RuntimeError("a table of addresses cannot be made while a CUDA graph is captured")
            self._captured[id(made)] = made
            return made
        current = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if made is None or stream != current:
            made = make()
        self._held[key] = made, current
        self._held.move_to_end(key)
        if len(self._held) > _MOST:
            self._held.popitem(last=False)
        return made

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held


class Table:
    """Addresses on the device, and what all of them have in common.

    Attributes:
        lines: The table, int64 `(tensors, fields)`.
        sizes: Elements of each tensor.
        flat: Elements follow each other in memory, those of a tensor and of all that goes with it.
        aligned: All addresses are multiples of 16 bytes.
        wide: Some tensor has more elements than 32 bits can count.
    """

    def __init__(self, lines: Tensor, sizes: tuple[int, ...], *, flat: bool, aligned: bool) -> None:
        self.lines, self.sizes, self.flat, self.aligned = lines, sizes, flat, aligned
        self.wide = max(sizes, default=0) >= 2**31
        self._chunks: dict[int, Tensor] = {}

    def chunks(self, block: int) -> Tensor:
        """The tensors in pieces of `block` elements: int32 `(pieces, 2)`, a line's number and the piece's in it."""
        if block not in self._chunks:
            key = self.lines.device, self.sizes, block
            self._chunks[block] = _chunks.get(key, self.lines.device, lambda: _cut(self, block))
        return self._chunks[block]


_tables: _Cache[Table] = _Cache()
_chunks: _Cache[Tensor] = _Cache()


def table(operands: Sequence[Sequence[Tensor]], scalars: Sequence[Tensor] = ()) -> Table:
    """The table of lists of tensors, from the device where there is one.

    Args:
        operands: Lists of equal length; what goes together has one shape. At least one list, and one tensor.
        scalars: One more list, of 0-d tensors.

    Returns:
        A table whose triples are those of the operands, of the places of entries in their tensors (the address is 0),
        and of the scalars.
    """
    return _tables.get(_key(operands, scalars), operands[0][0].device, lambda: _made(operands, scalars))


def refuses(operands: Sequence[Sequence[Tensor]], scalars: Sequence[Tensor] = ()) -> str | None:
    """Why there can be no table of these tensors; arguments as for `table`."""
    if not all(t.is_contiguous() for operand in operands for t in operand):
        for group in zip(*operands, strict=True):
            if len(_merged(group)[0]) > 2:
                return f"strides {', '.join(str(t.stride()) for t in group)} are not those of rows and columns"
    if _capturing(operands[0][0].device) and _key(operands, scalars) not in _tables:
        return "a CUDA graph is captured, and addresses were not on the device before: take a step without it first"
    return None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _key(operands: Sequence[Sequence[Tensor]], scalars: Sequence[Tensor]) -> Hashable:
    tensors = [t for operand in operands for t in operand]
    geometry: Any = [t.numel() for t in operands[0]]
    if not all(t.is_contiguous() for t in tensors):
        geometry = [(t.shape, t.stride()) for t in tensors]
    addresses = [t.data_ptr() for t in (*tensors, *scalars)]
    return tensors[0].device, len(operands), tuple(geometry), tuple(addresses)


def _merged(group: Sequence[Tensor]) -> tuple[strides.Ints, tuple[strides.Ints, ...]]:
    """Axes of tensors of one shape, and of the places of their entries."""
    shape = group[0].shape
    return strides.merged(shape, (*(t.stride() for t in group), strides.row_major(shape)))


def _made(operands: Sequence[Sequence[Tensor]], scalars: Sequence[Tensor]) -> Table:
    lines, flat, aligned = [], True, True
    for number, group in enumerate(zip(*operands, strict=True)):
        sizes, steps = _merged(group)
        rows, columns = (1,) * (2 - len(sizes)) + sizes
        line = [rows * columns, columns]
        for address, step in zip((*(t.data_ptr() for t in group), 0), steps, strict=True):
            line += [address, *(0,) * (2 - len(step)), *step]
            flat = flat and rows == 1 and (columns == 1 or step[-1] == 1)
            aligned = aligned and address % _VECTOR == 0
        line += [scalars[number].data_ptr(), 0, 0] if scalars else []
        lines.append(line)
    sent = _sent(torch.tensor(lines), operands[0][0].device)
    return Table(sent, tuple(line[0] for line in lines), flat=flat, aligned=aligned)


def _cut(table: Table, block: int) -> Tensor:
    counts = torch.tensor([-(-size // block) for size in table.sizes])
    line = torch.repeat_interleave(counts)
    piece = torch.arange(len(line)) - (counts.cumsum(0) - counts)[line]
    return _sent(torch.stack([line, piece], dim=1).to(torch.int32), table.lines.device)


def _sent(made: Tensor, device: torch.device) -> Tensor:
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)

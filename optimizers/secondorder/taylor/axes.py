"""Rules of what moves, joins or sums entries along trailing axes. Axes are counted from the end: so they are the same
for all parts of a jet. The samples' axis stays where it is.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.taylor.jet import Jet, Part, Space, each, refuse, rule


def trailing(jet: Jet, dim: int, name: str, extra: int = 0) -> int:
    """An axis counted from the end; `extra`: of a result with so many axes more."""
    axes = jet.dim() + extra
    if not -axes <= dim < axes:
        raise IndexError(f"{name}: axis {dim} of a jet with {axes} axes")
    dim = dim - axes if dim >= 0 else dim
    if dim == -axes:
        refuse(f"{name} along axis 0 mixes samples")
    return dim


def _axes(jet: Jet, dim: Any, name: str) -> tuple[int, ...]:
    if dim is None:
        refuse(f"{name} over all axes mixes samples; name an axis of the features")
    return tuple(trailing(jet, d, name) for d in ((dim,) if isinstance(dim, int) else dim))


def constant(space: Space, like: Jet, value: Any) -> Jet:
    """A jet without derivatives."""
    n, *rest = value.shape
    zero = torch.zeros((), dtype=like.dtype, device=like.device).expand(n, like.first.shape[1], *rest)
    return Jet(value, zero, None, space)


@rule("sum")
def _sum(space: Space, a: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    axes = _axes(a, dim, "sum")
    return each(a, lambda part: part.sum(axes, keepdim))


@rule("mean")
def _mean(space: Space, a: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    axes = _axes(a, dim, "mean")
    return each(a, lambda part: part.mean(axes, keepdim))


@rule("prod")
def _prod(space: Space, a: Jet, dim: Any = None, keepdim: bool = False) -> Any:
    (axis,) = _axes(a, dim, "prod")
    factors = _unbind(space, a, axis)
    total: Any = factors[0]
    for factor in factors[1:]:
        total = total * factor
    return total.unsqueeze(axis) if keepdim else total


@rule("cat", "concat", "concatenate", "hstack")
def _cat(space: Space, tensors: Sequence[Any], dim: int | None = None) -> Jet:
    return _join(space, tensors, 1 if dim is None else dim, torch.cat, 0)


@rule("stack")
def _stack(space: Space, tensors: Sequence[Any], dim: int = 0) -> Jet:
    return _join(space, tensors, dim, torch.stack, 1)


def _join(space: Space, tensors: Sequence[Any], dim: int, join: Any, extra: int) -> Jet:
    like = next(x for x in tensors if space.owns(x))
    axis = trailing(like, dim, join.__name__, extra)
    jets = [x if space.owns(x) else constant(space, like, x) for x in tensors]
    second = None
    if any(jet.second is not None for jet in jets):
        second = join([torch.zeros_like(jet.value) if jet.second is None else jet.second for jet in jets], axis)
    return Jet(join([jet.value for jet in jets], axis), join([jet.first for jet in jets], axis), second, space)


@rule("unbind")
def _unbind(space: Space, a: Jet, dim: int = 0) -> tuple[Jet, ...]:
    axis = trailing(a, dim, "unbind")
    return tuple(_narrowed(a, axis, i) for i in range(a.shape[axis]))


@rule("select")
def _select(space: Space, a: Jet, dim: int, index: int) -> Jet:
    return _narrowed(a, trailing(a, dim, "select"), index)


def _narrowed(a: Jet, axis: int, index: int) -> Jet:
    return each(a, lambda part: part[(..., index, *(slice(None),) * (-axis - 1))])


@rule("narrow")
def _narrow(space: Space, a: Jet, dim: int, start: int, length: int) -> Jet:
    axis = trailing(a, dim, "narrow")
    return each(a, lambda part: part[(..., slice(start, start + length), *(slice(None),) * (-axis - 1))])


@rule("split")
def _split(space: Space, a: Jet, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Jet, ...]:
    sizes, total = split_size_or_sections, a.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(space, a, dim, start, size) for start, size in zip(starts, sizes, strict=True))


@rule("chunk")
def _chunk(space: Space, a: Jet, chunks: int, dim: int = 0) -> tuple[Jet, ...]:
    return _split(space, a, -(-a.shape[dim] // chunks), dim)


@rule("getitem")
def _getitem(space: Space, a: Any, index: Any) -> Jet:
    if not space.owns(a):
        refuse("no rule for an index that is a jet")
    index = index if isinstance(index, tuple) else (index,)
    if any(item is Ellipsis for item in index):
        at = next(i for i, item in enumerate(index) if item is Ellipsis)
        used = sum(item is not None for item in index) - 1
        index = (*index[:at], *(slice(None),) * (a.dim() - used), *index[at + 1 :])
    samples, rest = index[0], index[1:]
    if not (isinstance(samples, slice) and samples == slice(None)):
        refuse("an index into axis 0 chooses samples; begin it with ':' or '...'")
    if any(isinstance(item, (list, Tensor)) for item in rest) and sum(not _kept(item) for item in rest) > 1:
        refuse("more than one index beside slices may move the samples' axis; index one axis at a time")
    second = None if a.second is None else a.second[index]
    return Jet(a.value[index], a.first[(slice(None), slice(None), *rest)], second, space)


def _kept(item: Any) -> bool:
    return item is None or isinstance(item, slice)


@rule("unsqueeze")
def _unsqueeze(space: Space, a: Jet, dim: int) -> Jet:
    axis = trailing(a, dim, "unsqueeze", 1)
    return each(a, lambda part: part.unsqueeze(axis))


@rule("squeeze")
def _squeeze(space: Space, a: Jet, dim: int | None = None) -> Jet:
    if dim is None:
        refuse("squeeze of all axes may take that of the samples; name an axis")
    axis = trailing(a, dim, "squeeze")
    return each(a, lambda part: part.squeeze(axis))


@rule("transpose", "swapaxes")
def _transpose(space: Space, a: Jet, dim0: int, dim1: int) -> Jet:
    axes = trailing(a, dim0, "transpose"), trailing(a, dim1, "transpose")
    return each(a, lambda part: part.transpose(*axes))


@rule("flatten")
def _flatten(space: Space, a: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    axes = trailing(a, start_dim, "flatten"), trailing(a, end_dim, "flatten")
    return each(a, lambda part: part.flatten(*axes))


@rule("reshape", "view")
def _reshape(space: Space, a: Jet, *shape: Any) -> Jet:
    n, *rest = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    rest = [size if size != -1 else _inferred(a, n, rest) for size in rest]
    numel = 1
    for size in rest:
        numel *= size
    if n not in (-1, a.shape[0]) or numel != a.shape[1:].numel():
        refuse(f"reshape of {tuple(a.shape)} to {(n, *rest)} mixes samples")
    return _shaped(a, "reshape", tuple(rest))


def _inferred(a: Jet, n: int, rest: Sequence[int]) -> int:
    known = 1
    for size in rest:
        known *= size if size != -1 else 1
    return a.shape[1:].numel() // max(known, 1)


@rule("expand")
def _expand(space: Space, a: Jet, *shape: Any) -> Jet:
    n, *rest = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if n not in (-1, a.shape[0]) or len(rest) != a.dim() - 1:
        refuse(f"expand of {tuple(a.shape)} to {(n, *rest)}: it may not add axes before the samples")
    return _shaped(a, "expand", tuple(rest))


def _shaped(a: Jet, method: str, rest: tuple[int, ...]) -> Jet:
    def shaped(part: Part, *leading: int) -> Part:
        return getattr(part, method)(*leading, *rest)

    n, R = a.first.shape[:2]
    return Jet(shaped(a.value, n), shaped(a.first, n, R), None if a.second is None else shaped(a.second, n), a.space)


@rule("contiguous", "clone")
def _same(space: Space, a: Jet, **kwargs: Any) -> Jet:
    return a


@rule("to")
def _to(space: Space, a: Jet, *args: Any, **kwargs: Any) -> Jet:
    return each(a, lambda part: part.to(*args, **kwargs))


@rule("float")
def _float(space: Space, a: Jet) -> Jet:
    return each(a, lambda part: part.float())


@rule("double")
def _double(space: Space, a: Jet) -> Jet:
    return each(a, lambda part: part.double())


@rule("zeros_like")
def _zeros_like(space: Space, a: Jet, **kwargs: Any) -> Any:
    return torch.zeros(a.shape, **{"dtype": a.dtype, "device": a.device, **kwargs})


@rule("ones_like")
def _ones_like(space: Space, a: Jet, **kwargs: Any) -> Any:
    return torch.ones(a.shape, **{"dtype": a.dtype, "device": a.device, **kwargs})

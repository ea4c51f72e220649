"""Patches of convolutions over any number of spatial axes, and their means, without index tensors.

Along one axis, offset `j` of the kernel meets at output position `o` the input position

    o·stride + j·dilation - left,   0 <= o < out = (left + i + right - (k-1)·dilation - 1) // stride + 1,

and zero outside of `[0, i)`. So the patches are a strided view of the padded input, and their sum over output positions
is for each `j` the sum of one slice of the input. Windows are products over axes: axis after axis gives the sums of all
offsets in `k1·i1·i2 + k1·k2·i2` additions per channel, where patches need `k1·k2·o1·o2`.

A transposed convolution is a convolution of stride 1 with a reversed kernel over the input with `stride - 1` zeros
between its entries. In the sums the zeros need not exist: offset `j` meets a contiguous slice of the input.

`padding` is a pair `(left, right)` per axis; negative sides crop. Sources: patches as rows of the input factor, Grosse
and Martens (2016, arXiv:1602.01407); their mean (KFAC-reduce), Eschenhagen et al. (2023, arXiv:2311.00636).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

Sizes = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]


def pad(x: Tensor, padding: Pairs, mode: str = "constant") -> Tensor:
    """`x (n, c, *spatial)` with its spatial axes extended or cropped."""
    return F.pad(x, [side for pair in reversed(padding) for side in pair], mode) if any(map(any, padding)) else x


def patches(x: Tensor, kernel: Sizes, stride: Sizes, padding: Pairs, dilation: Sizes) -> Tensor:
    """What each output position of a convolution sees, `(n, c, *outputs, *kernel)`: a view of the padded input.

    Args:
        x: Input `(n, c, *spatial)`.
        kernel: Length of the kernel along each spatial axis.
        stride: Distance of neighbouring outputs along each spatial axis.
        padding: Zeros before and after each spatial axis.
        dilation: Distance of neighbouring kernel entries along each spatial axis.
    """
    view = pad(x, padding)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        view = view.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
    return view


def patch_means(x: Tensor, kernel: Sizes, stride: Sizes, padding: Pairs, dilation: Sizes) -> Tensor:
    """Mean of `patches` over the output positions, `(n, c, *kernel)`; arguments as there."""
    for axis, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True), start=2):
        windows, outputs = _windows(x.shape[axis], k, s, p, d)
        # Divided axis by axis: the sum of all positions can overflow in half precision.
        x = _slice_sums(x, axis, windows) / outputs
    return x


def transposed_patches(x: Tensor, kernel: Sizes, stride: Sizes, padding: Pairs, dilation: Sizes) -> Tensor:
    """What each output position of a transposed convolution sees, `(n, c, *outputs, *kernel)`.

    Args:
        x: Input `(n, c, *spatial)`.
        kernel: Length of the kernel along each spatial axis.
        stride: Distance of neighbouring inputs in the output, along each spatial axis.
        padding: Zeros before and after each axis of the spread input: `(k-1)·dilation - p`, and the same plus
            `output_padding`, for a layer with padding `p`.
        dilation: Distance of neighbouring kernel entries along each spatial axis.
    """
    spread = x.new_zeros(*x.shape[:2], *((i - 1) * s + 1 for i, s in zip(x.shape[2:], stride, strict=True)))
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    view = patches(spread, kernel, (1,) * len(kernel), padding, dilation)
    # No view has a negative stride, so reversing copies: one offset after the other, twice as fast as `flip`.
    first, last = tuple(range(len(kernel))), tuple(range(-len(kernel), 0))
    by_offset = view.transpose(0, 1).movedim(last, first)  # (*kernel, c, n, *outputs)
    offsets = product(*(range(k - 1, -1, -1) for k in kernel))
    columns = torch.stack([by_offset[offset] for offset in offsets], 1)  # (c, product of the kernel, n, *outputs)
    return columns.unflatten(1, kernel).movedim(tuple(1 + i for i in first), last).transpose(0, 1)


def transposed_patch_means(x: Tensor, kernel: Sizes, stride: Sizes, padding: Pairs, dilation: Sizes) -> Tensor:
    """Mean of `transposed_patches` over the output positions, `(n, c, *kernel)`; arguments as there."""
    for axis, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True), start=2):
        windows, outputs = _windows((x.shape[axis] - 1) * s + 1, k, 1, p, d)
        # Of the spread input only every s-th entry is not zero: ceil(start / s) is the first one of a window.
        entries = [slice(-(-w.start // s), -(-w.stop // s), 1) for w in reversed(windows)]
        x = _slice_sums(x, axis, entries) / outputs
    return x


def _windows(size: int, k: int, s: int, padding: tuple[int, int], d: int) -> tuple[list[slice], int]:
    """The slice of an axis that each kernel offset meets, without padding; and the number of outputs."""
    left, right = padding
    outputs = (left + size + right - (k - 1) * d - 1) // s + 1
    windows = []
    for start in range(-left, k * d - left, d):
        first = max(0, -(start // s))  # ceil(-start / s)
        last = min(outputs - 1, (size - 1 - start) // s)
        windows.append(slice(start + first * s, start + last * s + 1, s) if first <= last else slice(0, 0, s))
    return windows, outputs


def _slice_sums(x: Tensor, axis: int, windows: list[slice]) -> Tensor:
    """Sums of slices of one axis; the axis then counts the slices."""

    def total(window: slice) -> Tensor:
        return x[(slice(None),) * axis + (window,)].sum(axis)

    return torch.stack([total(window) for window in windows], axis)

"""Convolutions and transposed convolutions: positions are output positions, groups are the convolution's groups.

In group `j` an output position `s` is a linear layer, `z_s = W_j a_s (+ b_j)`, with

    W_j  (c_out/g, c_in/g·k1·…·kd)   the group's weight,
    a_s  (c_in/g·k1·…·kd)            what `s` sees of the group's channels (`patches`), columns in the order of W_j,
    g_s  (c_out/g)                   the group's channels of the output gradient,

so that the group's gradient is `Σ_s g_s a_sᵀ`. Groups share no weight and no channel, hence each has a pair of factors
of its own; one pair for all, averaged over groups, would not be exact. For the mean of `a` no patch is formed
(`patch_means`). Sources: Grosse and Martens, *KFC* (2016, arXiv:1602.01407); Eschenhagen et al. (2023,
arXiv:2311.00636) for the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from secondorder.curvature.layers.protocol import Unbound
from secondorder.curvature.patches import (
    Pairs,
    Sizes,
    pad,
    patch_means,
    patches,
    transposed_patch_means,
    transposed_patches,
)


@dataclass(frozen=True)
class ConvRule(Unbound):
    """Normal form of `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`; made by `conv_rule`. See `LayerRule`.

    Attributes:
        kernel: As in `patches`, like `stride`, `padding` and `dilation`.
        padding_mode: What is padded: `"constant"` (zeros), `"circular"`, `"reflect"` or `"replicate"`.
    """

    d_in: int
    d_out: int
    groups: int
    kernel: Sizes
    stride: Sizes
    padding: Pairs
    dilation: Sizes
    padding_mode: str = "constant"
    masks: bool = False
    tokens: bool = False
    pooled: bool = True

    @property
    def fold(self) -> tuple[Sizes, Sizes] | None:
        """The weight `(c_out, c_in/g, *kernel)` only needs a reshape."""
        return None

    def save(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The input, `(n, c_in, *spatial)` or without `n`."""
        return (x,)

    def inputs(self, x: Tensor) -> Tensor:
        """Patches, `(groups, n, s, d_in)`."""
        x, padding = self._padded(x)
        return self._rows(patches(x, self.kernel, self.stride, padding, self.dilation))

    def mean_inputs(self, x: Tensor) -> Tensor:
        """Patches averaged over output positions, `(groups, n, d_in)`."""
        x, padding = self._padded(x)
        return self._means(patch_means(x, self.kernel, self.stride, padding, self.dilation))

    def outputs(self, g: Tensor, x: Tensor) -> Tensor:
        """The output gradient `(n, c_out, *outputs)`, or without `n`, as `(groups, n, s, d_out)`."""
        return self._batched(g).flatten(2).unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.ndim == len(self.kernel) + 2 else x.unsqueeze(0)

    def _padded(self, x: Tensor) -> tuple[Tensor, Pairs]:
        """The batched input, and the zeros that are still to be padded."""
        x = self._batched(x)
        if self.padding_mode == "constant":
            return x, self.padding
        return pad(x, self.padding, self.padding_mode), ((0, 0),) * len(self.kernel)

    def _rows(self, view: Tensor) -> Tensor:
        """`(n, c_in, *outputs, *kernel)` as `(groups, n, s, d_in)`.

        In memory d_in comes first: runs are then as long as an axis of the output, not of the kernel, and the copy is
        two to twenty times faster (CPU, 3x3 kernels) than into rows; the Gram matrix costs the same.
        """
        n, d = view.shape[0], len(self.kernel)
        columns = view.permute(1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d))
        return columns.reshape(self.groups, self.d_in, n, math.prod(view.shape[2 : 2 + d])).permute(0, 2, 3, 1)

    def _means(self, means: Tensor) -> Tensor:
        """`(n, c_in, *kernel)` as `(groups, n, d_in)`."""
        return means.unflatten(1, (self.groups, -1)).flatten(2).transpose(0, 1)


@dataclass(frozen=True)
class ConvTransposeRule(ConvRule):
    """Normal form of `nn.ConvTranspose1d`, `2d`, `3d`; made by `conv_transpose_rule`. See `LayerRule`.

    Attributes:
        kernel: As in `transposed_patches`, like `stride`, `padding` and `dilation`.
    """

    @property
    def fold(self) -> tuple[Sizes, Sizes]:
        """The weight is `(c_in, c_out/g, *kernel)`."""
        split = (self.groups, self.d_in // math.prod(self.kernel), self.d_out, *self.kernel)
        return split, (0, 2, 1, *range(3, len(split)))

    def inputs(self, x: Tensor) -> Tensor:
        """Patches, `(groups, n, s, d_in)`."""
        x = self._batched(x)
        return self._rows(transposed_patches(x, self.kernel, self.stride, self.padding, self.dilation))

    def mean_inputs(self, x: Tensor) -> Tensor:
        """Patches averaged over output positions, `(groups, n, d_in)`."""
        x = self._batched(x)
        return self._means(transposed_patch_means(x, self.kernel, self.stride, self.padding, self.dilation))

    def bound(self, shape: Sequence[int], *saved: Tensor) -> ConvTransposeRule:
        """The rule for an output of this shape: a call with `output_size` pads more or less than `output_padding`."""
        sizes = (saved[0].shape[-len(self.kernel) :], shape[-len(self.kernel) :])
        axes = zip(*sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        padding = tuple((left, o + (k - 1) * d - (i - 1) * s - 1 - left) for i, o, k, s, (left, _), d in axes)
        return self if padding == self.padding else replace(self, padding=padding)


def conv_rule(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvRule:
    """The rule of a convolution."""
    padding: Pairs
    if not isinstance(module.padding, str):
        padding = tuple((p, p) for p in module.padding)
    elif module.padding == "valid":
        padding = tuple((0, 0) for _ in module.kernel_size)
    else:  # "same"
        spans = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        padding = tuple((span // 2, span - span // 2) for span in spans)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return ConvRule(*_sizes(module), module.kernel_size, module.stride, padding, module.dilation, mode)


def conv_transpose_rule(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> ConvTransposeRule:
    """The rule of a transposed convolution."""
    cropped: Sizes = module.padding  # type: ignore[assignment]  # never a str here
    margins = [(k - 1) * d - p for k, d, p in zip(module.kernel_size, module.dilation, cropped, strict=True)]
    padding = tuple((m, m + extra) for m, extra in zip(margins, module.output_padding, strict=True))
    return ConvTransposeRule(*_sizes(module), module.kernel_size, module.stride, padding, module.dilation)


def _sizes(module: nn.modules.conv._ConvNd) -> tuple[int, int, int]:
    """`d_in`, `d_out` and the number of groups."""
    groups = module.groups
    return module.in_channels // groups * math.prod(module.kernel_size), module.out_channels // groups, groups

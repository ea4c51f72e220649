"""The normal form of a layer, and what a kind of layer must say of itself.

A layer with weight `W`, input `x` and output gradient `g` is brought to

    a (k, n, s, d_in),   g (k, n, s, d_out),   dL/dW_j = Σ_{n,s} g_j a_jᵀ  for the groups j = 1..k,

with n samples and s weight-sharing positions (tokens, pixels). The weight is viewed as `(k, d_out, d_in)`. Everything
else (Gram matrices, expand and reduce, joint biases, masks, counts) is the same for all layers and written once, in
`curvature.site`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Groups = Tensor | tuple[Tensor, ...]  # (k, n, s, d), or k tensors (n, s_j, d) where the groups differ in positions


class Unbound:
    """A rule that is the same for outputs of every shape."""

    def bound(self, shape: Sequence[int], *saved: Any) -> Any:
        """See `LayerRule`."""
        return self


class LayerRule(Protocol):
    """How one kind of layer maps to the normal form. Frozen dataclasses of plain numbers, made from a module.

    Attributes:
        groups: k.
        d_in: Size of a row of `a`, 0 where there is no input factor (norm layers).
        d_out: Size of a row of `g`.
        masks: Rows without any output gradient are no observations (padded or ignored tokens).
        tokens: The input is an index into `d_in` rows: its factor is diagonal.
        fold: `(split, order)`: the weight is `weight.view(split).permute(order)`, reshaped to `(k, d_out, d_in)`; None
            where the reshape is enough.
        pooled: What `sharing="auto"` means: positions are reduced (convolutions), or expanded.
    """

    @property
    def groups(self) -> int: ...  # noqa: D102

    @property
    def d_in(self) -> int: ...  # noqa: D102

    @property
    def d_out(self) -> int: ...  # noqa: D102

    @property
    def masks(self) -> bool: ...  # noqa: D102

    @property
    def tokens(self) -> bool: ...  # noqa: D102

    @property
    def pooled(self) -> bool: ...  # noqa: D102

    @property
    def fold(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None: ...  # noqa: D102

    def bound(self, shape: Sequence[int], *saved: Any) -> LayerRule:
        """The rule for an output of this shape."""
        ...

    def save(self, module: nn.Module, x: Any) -> tuple[Tensor, ...]:
        """What the backward pass will need, from the (detached) input of the forward pass."""
        ...

    def inputs(self, *saved: Any) -> Groups:
        """`a`."""
        ...

    def mean_inputs(self, *saved: Any) -> Tensor:
        """`a` averaged over positions, `(k, n, d_in)`."""
        ...

    def outputs(self, g: Any, *saved: Any) -> Groups:
        """`g`."""
        ...

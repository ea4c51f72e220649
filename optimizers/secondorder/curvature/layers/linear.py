"""Linear layers, `z = W a + b` with any leading dimensions: axis 0 counts samples, the others are positions.

Martens and Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature* (2015, arXiv:1503.05671);
expand and reduce: Eschenhagen et al. (2023, arXiv:2311.00636), sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from secondorder.curvature.layers.protocol import Unbound


@dataclass(frozen=True)
class LinearRule(Unbound):
    """See `LayerRule`."""

    d_in: int
    d_out: int
    fold: tuple[tuple[int, int], tuple[int, int]] | None = None
    groups: int = 1
    masks: bool = True
    tokens: bool = False
    pooled: bool = False

    def save(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The input itself."""
        return (x,)

    def inputs(self, x: Tensor) -> Tensor:
        """`(1, n, s, d_in)`."""
        return _positions(x)

    def mean_inputs(self, x: Tensor) -> Tensor:
        """`(1, n, d_in)`."""
        return _positions(x).mean(2)

    def outputs(self, g: Tensor, x: Tensor) -> Tensor:
        """`(1, n, s, d_out)`."""
        return _positions(g)


def linear_rule(module: nn.Linear) -> LinearRule:
    """The rule of a linear layer."""
    return LinearRule(module.in_features, module.out_features)


def transposed_linear_rule(module: nn.Module) -> LinearRule:
    """The rule of a linear layer whose weight is `(d_in, d_out)`."""
    d_in, d_out = module.weight.shape  # type: ignore[misc]
    return LinearRule(d_in, d_out, fold=((d_in, d_out), (1, 0)))


def _positions(x: Tensor) -> Tensor:
    if x.ndim == 1:
        return x[None, None, None]
    return x.reshape(1, x.shape[0], -1, x.shape[-1])

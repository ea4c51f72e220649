"""Affine part of normalisation layers: a small dense block per feature.

    z_{nsj} = w_j x̂_{nsj} + b_j,   x̂ = (x - mean) · rstd (RMSNorm: x · rstd)

In the normal form every feature j is a group whose input is the constant 1, so there is no input factor, and whose
output gradient is the row `(x̂ g, g)_{nsj}`, of one column where there is no bias:

    Σ_{n,s} row = (∂L/∂w_j, ∂L/∂b_j),   G_j = Σ_n (Σ_s row)ᵀ(Σ_s row)    (1 x 1 or 2 x 2; expand: Σ_{n,s} rowᵀ row)

The reduce form is the exact empirical block of a feature: unit-wise natural gradient (Osawa et al. 2020,
arXiv:2002.06015). x̂ is recomputed from the input; `(z - b) / w` would divide by a weight that may be 0.
Batch normalisation in training couples the samples: rows still sum to the gradient, but a sample's row leaves out
what the sample did through mean and variance of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secondorder.curvature.layers.protocol import Unbound

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class NormRule(Unbound):
    """The normal form of one normalisation layer; made by `norm_rule`. See `LayerRule`.

    Attributes:
        groups: d, the number of features.
        d_out: 2, or 1 without a bias.
        pooled: True where features are channels, as in the convolutions around them.
        kind: Which statistics x̂ is made with. `"layer"` and `"rms"` have features on trailing axes, `"group"` and
            `"batch"` on axis 1.
        eps: As in the layer. None (RMSNorm): the machine epsilon of the dtype that x̂ is computed in, as torch does.
        axes: How many trailing axes are features (`"layer"`, `"rms"`).
        parts: Into how many parts channels are split to be normalised together (`"group"`).
    """

    groups: int
    d_out: int
    pooled: bool
    kind: Literal["layer", "rms", "group", "batch"]
    eps: float | None
    axes: int = 0
    parts: int = 1
    d_in: int = 0
    masks: bool = False
    tokens: bool = False
    fold: None = None

    def save(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """`(x,)`; for batch normalisation `(x, mean, rstd)`, those that this forward used."""
        if self.kind != "batch":
            return (x,)
        assert isinstance(module, _BATCH_NORMS) and self.eps is not None
        if module.training or module.running_mean is None or module.running_var is None:
            var, mean = torch.var_mean(_at_least_float32(x), dim=[0, *range(2, x.dim())], correction=0)
        else:
            # A later forward in training moves the running mean in place.
            var, mean = module.running_var, module.running_mean.clone()
        return x, mean, (var + self.eps).rsqrt()

    def inputs(self, x: Tensor, *statistics: Tensor) -> Tensor:  # (d, n, s, 0)
        """Rows without entries: the constant 1 is the column that a bias appends."""
        return x.new_empty((*self._features_first(x).shape, 0))

    def mean_inputs(self, x: Tensor, *statistics: Tensor) -> Tensor:  # (d, n, 0)
        """As `inputs`."""
        return x.new_empty((*self._features_first(x).shape[:2], 0))

    def outputs(self, g: Tensor, *saved: Tensor) -> Tensor:  # (d, n, s, d_out)
        """Rows `(x̂ g, g)`, in float32 at least.

        Args:
            g: Gradient of the layer's output, of its shape.
            saved: What `save` returned.
        """
        g = self._features_first(_at_least_float32(g))
        rows = [self._normalized(*saved) * g]
        if self.d_out == 2:
            rows.append(g)
        return torch.stack(rows, dim=-1)

    def _normalized(self, x: Tensor, *statistics: Tensor) -> Tensor:  # (d, n, s)
        x = self._features_first(_at_least_float32(x))
        if self.kind == "batch":
            mean, rstd = statistics
            return (x - mean[:, None, None]) * rstd[:, None, None]
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if self.kind == "rms":
            return x * (x.square().mean(dim=0) + eps).rsqrt()
        x = x.unflatten(0, (self.parts, -1))  # (parts, d / parts, n, s)
        over = [1] if self.kind == "layer" else [1, 3]
        var, mean = torch.var_mean(x, dim=over, correction=0, keepdim=True)
        return ((x - mean) * (var + eps).rsqrt()).flatten(0, 1)

    def _features_first(self, t: Tensor) -> Tensor:  # (d, n, s)
        if self.kind in ("group", "batch"):
            return t.reshape(t.shape[0], t.shape[1], t.shape[2:].numel()).transpose(0, 1)
        lead, features = t.shape[: t.dim() - self.axes], t.shape[t.dim() - self.axes :]
        samples = lead[0] if lead else 1
        return t.reshape(samples, lead[1:].numel(), features.numel()).permute(2, 0, 1)


def norm_rule(module: nn.Module) -> NormRule:
    """The rule of a LayerNorm, RMSNorm, GroupNorm or BatchNorm1d, 2d, 3d.

    Axis 0 of an input is the sample axis, except where a LayerNorm or RMSNorm gets features alone: one sample. All
    other axes that are not features are positions.

    Args:
        module: The layer.

    Raises:
        TypeError: Another kind of layer.
        ValueError: The layer has no weight.
    """
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH_NORMS)):
        raise TypeError(f"module must be a Layer-, RMS-, Group- or BatchNorm, but got {type(module).__name__}")
    if module.weight is None:
        raise ValueError(f"module must have a weight, but got {module}")
    d_out = 1 if getattr(module, "bias", None) is None else 2
    if isinstance(module, nn.RMSNorm):
        return NormRule(module.weight.numel(), d_out, False, "rms", module.eps, axes=len(module.normalized_shape))
    if isinstance(module, nn.LayerNorm):
        return NormRule(module.weight.numel(), d_out, False, "layer", module.eps, axes=len(module.normalized_shape))
    if isinstance(module, nn.GroupNorm):
        return NormRule(module.num_channels, d_out, True, "group", module.eps, parts=module.num_groups)
    return NormRule(module.num_features, d_out, True, "batch", module.eps)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))

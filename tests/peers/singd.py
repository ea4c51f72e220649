"""singd (f-dangel/singd) and the original INGD (yorkerlin/StructuredNGD-DL), as a row built from our vocabulary.

What differs from `secondorder.SINGD`, and why nobody should train so:

- factors start as identities, whatever the scale of the curvature, and move at a constant rate: they are far from the
  curvature for hundreds of steps;
- damping is absolute: what it is worth depends on the scale of the loss;
- the step is of first order and not bounded, or bounded by the largest *stored entry* of the momentum: with `d` equal
  entries its eigenvalue is `d` times that, and the factor changes sign;
- all groups of a convolution share one pair of factors, of inputs averaged over groups;
- weight decay is added to the preconditioned gradient, within the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._layers import LayerOptimizer
from secondorder.curvature.layers.conv import ConvRule, conv_rule
from secondorder.curvature.layers.protocol import LayerRule
from secondorder.curvature.layers.registry import KINDS, Kind
from secondorder.preconditioner.inverse_free import InverseFree
from secondorder.preconditioner.protocol import Context, Method, State, Streams
from secondorder.preconditioner.structures import structure
from secondorder.singd import OPTIONS


@dataclass(frozen=True)
class PeerInverseFree(InverseFree):
    """The update as published, `K <- K - β K m`."""

    normalised: bool = False

    def observe(self, s: State, x: Streams, c: Context) -> None:
        modes, alpha, damping = sorted((*c.modes, *c.diagonal)), c.hp["factor_momentum"], c.hp["damping"]
        kinds = {i: self.structure(i, c.diagonal) for i in modes}
        H, M = {}, {}
        for i, kind in kinds.items():
            K, S = s[f"root_{i}"], x[f"gram_{i}"]
            H[i] = K * S * K if i in c.diagonal else kind.project(kind.apply_t(K, kind.apply_t(K, S).mT))
            M[i] = kind.self_gram(K)
        traces = {i: (kind.average_trace(H[i]), kind.average_trace(M[i])) for i, kind in kinds.items()}
        for i, kind in kinds.items():
            K, share = s[f"root_{i}"], 0.5 * (1 - alpha) if self.normalised else 0.5
            others = [traces[j] for j in modes if j != i and self.coupled]
            one = torch.ones(len(K), dtype=K.dtype)
            h, m = (torch.stack([one, *found]).prod(0) for found in zip(*others, strict=True)) if others else (one, one)
            eye = kind.eye(x[f"gram_{i}"].shape[-1], dtype=K.dtype)
            N = c.expand(h, K) * H[i] + damping * c.expand(m, K) * M[i] - eye
            if alpha:
                N = s[f"velocity_{i}"].mul_(alpha).add_(N, alpha=share)
            else:
                N = share * N
            bound = kind.largest(N).clamp_min(1) if self.normalised else one
            K.sub_(kind.product(K, N) * c.expand(c.hp["factor_rate"] / bound, K))


class AveragedConv2d(nn.Conv2d):
    """A convolution whose groups are averaged."""


@dataclass(frozen=True)
class AveragedRule(ConvRule):
    """All output channels, and inputs averaged over groups before patches are cut."""

    averaged: int = 1

    def _batched(self, x: Tensor) -> Tensor:
        x = super()._batched(x)
        return x if x.shape[1] == self.d_out else x.unflatten(1, (self.averaged, -1)).mean(1)


def averaged_rule(module: AveragedConv2d) -> LayerRule:
    rule = conv_rule(module)
    of = (rule.kernel, rule.stride, rule.padding, rule.dilation, rule.padding_mode)
    return AveragedRule(rule.d_in, module.out_channels, 1, *of, averaged=module.groups)


KINDS.insert(0, Kind((AveragedConv2d,), averaged_rule))


class PeerSINGD(LayerOptimizer):
    """`SINGD`, with its constructor's names.

    Args:
        model: Its linear and convolutional layers.
        structures: Names, of K and of C.
        reduction: Of the loss.
        kfac_approx: `"expand"` or `"reduce"`.
        hyper: The other arguments.
    """

    own_options = {}
    shared_options = OPTIONS

    def __init__(
        self, model: nn.Module, structures: tuple[str, str], reduction: str, kfac_approx: str, hyper: Mapping[str, Any]
    ) -> None:
        own = dict(lr=hyper["lr"], betas=(hyper["momentum"], 0.0), eps=0.0, weight_decay=hyper["weight_decay"])
        own.update(damping=hyper["damping"], factor_rate=hyper["lr_cov"], factor_momentum=hyper["alpha1"])
        own["factor_dtype"] = "float32"
        options = dict(statistics_every=hyper["T"], sharing=kfac_approx, loss_reduction=reduction, module=model)
        options.update(max_block_size=None, weight_decay_kind="coupled", momentum="update", norm_clip=None)
        options.update(nesterov=False)
        self.named, self.hyper = structures, hyper
        super().__init__(model.parameters(), own, options, grad_scaler=None)

    def _method(self, group: dict[str, Any]) -> Method:
        inputs, outputs = (structure(name) for name in self.named)
        coupled, normalised = not self.hyper["kfac_like"], self.hyper["normalize_lr_cov"]
        return PeerInverseFree((outputs, inputs), coupled, "update", normalised)

    def _diagonal(self, group: dict[str, Any]) -> tuple[bool, bool]:
        inputs, outputs = (name == "diagonal" for name in self.named)
        return inputs, outputs

"""kfac-pytorch (gpauloski/kfac-pytorch) followed by torch's SGD, with its quirks, as a row built from our vocabulary.

What differs from `secondorder.KFAC`, and why nobody should train so:

- factors start as the identity and are averaged at a constant rate: G is more than 99 % identity for many steps;
- G is squared from gradients of the mean loss and divided by rows once more: 1/N² of the Fisher matrix for linear
  layers with N rows; for convolutions with S positions A and G are divided by S² more, so that the product is 1/(N²S⁵);
- for K accumulated batches of loss/K the same division makes G smaller by 1/K²;
- damping is absolute ("eigen") or added to each factor ("inverse");
- factors are decomposed in the first call and then every `inv_update_steps`.

Its `prediv` (damping frozen into the decomposition) shows only where damping changes; no recording does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secondorder._layers import LayerOptimizer
from secondorder._options import LAYERS
from secondorder.curvature.layer import LayerStatistic, Sums
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags
from secondorder.preconditioner.damped import DampedSpectrum, LayerKronecker
from secondorder.preconditioner.layer_basis import LayerBasis
from secondorder.preconditioner.protocol import Context, Method, Modes, Spec


@dataclass(frozen=True)
class PeerBasis(LayerBasis):
    """Averages from the identity on, at a constant rate."""

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        identities = {f"covariance_{i}": Spec((shape[i], shape[i]), "eye") for i in modes}
        return {**super().specs(shape, modes, hp, diagonal), **identities}

    def rate(self, c: Context) -> Tensor:
        return (1 - c.hp["betas"][1]) * c.seen_gate


class PeerKFAC(LayerOptimizer):
    """`KFACPreconditioner` and `torch.optim.SGD` in one, with their constructors' names.

    Args:
        model: Its linear and convolutional layers.
        pre: Arguments of the preconditioner.
        sgd: Arguments of SGD.
    """

    own_options = {}
    shared_options = LAYERS

    def __init__(self, model: nn.Module, pre: Mapping[str, Any], sgd: Mapping[str, Any]) -> None:
        own = dict(lr=sgd["lr"], betas=(sgd["momentum"], pre["factor_decay"]), eps=0.0, damping=pre["damping"])
        own.update(damping_kind={"eigen": "absolute", "inverse": "factor"}[pre["compute_method"]], refresh_by="eigh")
        own.update(weight_decay=sgd["weight_decay"])
        options = dict(statistics_every=pre["factor_update_steps"], refresh_every=pre["inv_update_steps"])
        options.update(refresh="together", nesterov=False, max_block_size=None, sharing="expand", module=model)
        options.update(kl_clip=pre["kl_clip"], norm_clip=None, max_update_rms=None)
        options.update(momentum="update", weight_decay_kind="coupled")
        self.areas: dict[int, int] = {}  # positions of every convolution's output, by `id` of its weight
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(self._measure)
        super().__init__(model.parameters(), own, options, grad_scaler=None)

    def _measure(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        self.areas[id(layer.weight)] = out.shape[2:].numel()

    def _method(self, group: dict[str, Any]) -> Method:
        basis = PeerBasis(follows_trace=False)
        return LayerKronecker(LayerStatistic(), basis, DampedSpectrum(basis))

    def _current(self) -> Layout:
        before = self._layout.buckets
        layout = super()._current()
        if layout.buckets is not before:
            for b in layout.buckets:  # the first call, and every period from there
                b.phases = {i: [1 % self.param_groups[0]["refresh_every"]] * len(b.pieces) for i in b.phases}
        return layout

    def _statistics(self, layout: Layout, flags: Flags) -> Mapping[int, Sums]:
        found = super()._statistics(layout, flags)
        for index, sums in found.items():
            per_row = sums.scales["gram_1"] / self.areas.get(id(layout.params[index]), 1) ** 2
            sums.scales.update(gram_0=per_row, gram_1=per_row)
        return found

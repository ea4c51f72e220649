"""AdaptiveLayerOptimizer: layer methods that may choose damping, learning rate and momentum by a model of the loss.

The mathematics is in `_quadratic`; here is what a step needs besides: the closure, once or twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secondorder._layers import LayerOptimizer
from secondorder._quadratic import Trial, evaluate_again
from secondorder._step import Held
from secondorder.curvature.capture import all_reduced
from secondorder.layout.faces import Layout


class AdaptiveLayerOptimizer(LayerOptimizer):
    """Base class of layer methods whose step may be chosen by a quadratic model (see `step`)."""

    _trial: Trial | None = None
    _chosen: dict[str, float] | None = None

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        With `quadratic_model` the closure returns `(loss, outputs)`: the outputs `(..., C)` have a row for every loss
        term, and their graph after `loss.backward(retain_graph=True)`. Learning rate (and momentum) then minimize a
        quadratic model of the loss over all layer blocks; `lr` is the fallback's alone, and the state's `momentum` is
        the last step's opposite. With `adapt_damping` every `adapt_every`-th call evaluates the closure once more:
        without gradients and statistics, its `backward()` doing nothing. Its loss must depend on the parameters alone
        (no dropout). The fallback's parameters take their own step, outside of the model.

        The device is waited for in every call with `quadratic_model`, and in those that evaluate the closure twice.

        Args:
            closure: As of every optimizer, also with residuals unless `quadratic_model` is set; these are evaluated
                with gradients enabled the second time too.

        Returns:
            The closure's loss (of residuals without a graph), or None.

        Raises:
            TypeError: If `adapt_damping` or `quadratic_model` lack the closure that they need.
            ValueError: If they do not go together with other options.
            RuntimeError: For sparse gradients; with `on_nonfinite="raise"`, for gradients that are not usable.
        """
        trial = Trial.of(type(self).__name__, self.param_groups, closure, self._over_ranks)
        if trial is None or closure is None:
            return super().step(closure)
        if self._chosen_plan(self._layout).group is not None:
            raise ValueError(
                "adapt_damping and quadratic_model need the directions of all blocks in every process: they do not go "
                "together with sharded parameters or sharding='owners'"
            )
        sites = self._capture.sites if self._capture is not None else []
        self._trial = trial
        try:
            loss = super().step(partial(trial.evaluate, closure, sites))
        finally:
            self._trial = None
        if trial.due:
            trial.judge(evaluate_again(closure, sites, self._layout.params, trial.residuals))
        self._chosen = trial.report
        return loss

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Averaged over the ranks whose gradients are."""
        ranks = self._ranks()
        if ranks is None:
            return values
        values = values.to(self._layout.params[0].device)
        return all_reduced([values], ranks)[0] / torch.distributed.get_world_size(ranks)

    def _before_settling(self, layout: Layout, held: Sequence[Held], call: int) -> None:
        if self._trial is not None:
            self._trial.steer(held, layout.params, call)

    def _before_commit(self, held: Sequence[Held]) -> None:
        if self._trial is not None:
            self._trial.foresee(held)

    def diagnostics(self, full: bool = False) -> dict[str, float]:
        """As of every optimizer; where a model chose or judged the last step, also what: see `_quadratic.Trial`."""
        return {**super().diagnostics(full), **(self._chosen or {})}

"""Inspection: what every optimizer shows of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder import _diagnostics, _fisher_export, _reports
from secondorder._roles import Label
from secondorder._watch import Watch
from secondorder.layout.blocks import Treatment
from secondorder.layout.faces import Layout
from secondorder.preconditioner.operators import KroneckerOperator
from secondorder.preconditioner.protocol import Method

Group = dict[str, Any]


class Inspection(torch.optim.Optimizer):
    """Coverage, memory, diagnostics, and the state as operators."""

    _layout: Layout
    _watch: Watch

    def _current(self) -> Layout:
        raise NotImplementedError

    def _groups(self) -> Sequence[Group]:
        raise NotImplementedError

    def _treat(self, p: Tensor, group: Group, group_index: int, index: int) -> tuple[Method, Treatment]:
        raise NotImplementedError

    def _label(self, group_index: int, index: int) -> Label:
        raise NotImplementedError

    def _warn(self, layout: Layout, wait: bool) -> None:
        raise NotImplementedError

    def _complete(self) -> Layout:
        """The layout, if all blocks are worked on here.

        Raises:
            RuntimeError: If other processes have some.
        """
        layout = self._current()
        if not layout.complete:
            raise RuntimeError(
                f"{type(self).__name__}: this process has a part of the blocks. Gather the state with "
                "secondorder.checkpoint.full_state_dict, and load it into an optimizer of one process"
            )
        return layout

    @property
    @torch.no_grad()
    def plan(self) -> Any:
        """Who works on which block, where parameters are sharded: `print(optimizer.plan.report())`."""
        return self._current().plan

    def coverage(self) -> _reports.Coverage:
        """Which parameter is treated how, and why; printable."""
        return _reports.coverage(self)

    def memory_report(self) -> _reports.MemoryReport:
        """What state and workspaces cost in bytes, per parameter and in all; works before the first step."""
        return _reports.memory_report(self)

    @torch.no_grad()
    def diagnostics(self, full: bool = False) -> dict[str, float]:
        """A flat dict of numbers, ready to be logged; waits for the device. nan for what is on the meta device.

        Of the whole, and of every bucket (all blocks of one shape in one group) as `bucket/group0.256x128/...`. What is
        marked * is told of the whole alone, + of buckets alone.

            parameters*, preconditioned_blocks*, fallback_parameters*, blocks+, elements+: how many
            state_bytes, workspace_bytes*: memory
            refused_steps*: steps that were skipped, because gradients were not finite or too large
            refresh_failures: refreshes and statistics that were refused, where a factor kept its last good value;
                updates of blocks that were not finite, and left out
            waiting_blocks* (waiting+): blocks without any update yet
            skipped_updates_max: most calls in which a parameter had a gradient and a block of it took no update
            steps_since_refresh_max: age of the oldest basis or root
            average_weight_min: least 1 - β^t of averages of t statistics; near 1 the start is forgotten
            gradient_norm: of the last step
            clipped_share: blocks whose last update `max_update_rms` scaled down
            norm_clip_factor*, kl_clip_factor*: by what the last step was scaled down as a whole

        Where `track` measured:

            parameter_norm, update_norm, update_ratio, cosine: of the step, and of it with the gradient's descent

        and of layer methods, a sample being a row of a layer's statistics (for the whole: of that with the fewest):

            sample_gradient_norm: root mean square over samples
            gradient_variance: of one sample's gradient, summed over its entries
            signal_to_noise: squared length of the mean gradient over the variance of its estimate by this batch
            batch_size_hint*: samples at which the two are equal (the simple noise scale), averaged over measurements

        These are exact for EKFAC where every sample has one row, or `sharing` is `"reduce"`, and gradients were clipped
        by their common norm if at all. KFAC's take lengths of inputs and of output gradients for uncorrelated.

        Args:
            full: Look at the factors' eigenvalues too, which may cost as much as refreshing them all:

                condition_max*, condition_median* (condition_i+: of mode i): condition numbers
                effective_rank_min* (effective_rank_i+): exponential of the eigenvalues' entropy
                damping_share: 0 undamped, 1 gradient descent
                curvature_top_1* to curvature_top_5*: largest eigenvalues of the curvature that is held, block by block

                With `fisher_backward` the last are estimates of the generalised Gauss-Newton matrix's. EKFAC's are
                averages of that matrix's values along single directions, which never exceed its largest eigenvalue.
        """
        layout = self._current()
        self._warn(layout, wait=True)
        return _diagnostics.diagnostics(layout, self._groups(), self._watch, full)

    def track(self, every: int = 1) -> None:
        """Measure what steps do, for `diagnostics()`: how far parameters move, and how far samples' gradients differ.

        Nothing waits for the device, and no step is changed. A measured step holds a copy of the parameters and reads
        parameters, gradients and copies once more. Nothing is measured where parameters are stored in parts.

        Args:
            every: Measure every so many steps; 0: none. Default: 1.

        Raises:
            ValueError: If it is no whole number >= 0.
        """
        if not isinstance(every, int) or every < 0:
            raise ValueError(f"every must be a whole number >= 0, got {every!r}")
        self._watch.every = int(every)

    @torch.no_grad()
    def fisher(self, kind: Literal["diag", "kronecker"] = "diag", batch_size: float | None = None) -> dict[str, Any]:
        """The Fisher information that the state has gathered, without another pass over the data.

        Copies in the state's dtype; averages are debiased; zero where nothing was observed yet. Their scale is that of
        the state, if `batch_size` is not given. Layer methods: squares of gradients of single loss terms, averaged
        (`loss_reduction="sum"`: summed over a batch). Others, and what the fallback trains (see `coverage()`): squares
        of the gradients that steps saw; times the option `batch_size`, where a method has it. Methods that learn their
        damping with the factors (`SINGD`, `SIRFShampoo` and their like) cannot take it out again.

        Args:
            kind: `"diag"` or `"kronecker"`. Default: `"diag"`.
            batch_size: Loss terms (samples, tokens) of a step, over all processes and accumulated passes. Everything is
                brought to the scale of single terms of a mean loss then: what is not is multiplied by it (divided,
                where the loss is a sum). Of squares of steps' gradients that makes the Fisher matrix as far as those
                gradients are noise. Default: None.

        Returns:
            `"diag"`: by name of every trained parameter, a tensor of its shape.
            `"kronecker"`: by name of every parameter with factors, a dict that says which blocks of the parameter they
            belong to: the keys `parameters`, `shape`, `view`, `fold`, `batched`, `bias_column` and `blocks` that
            `KFAC.factors()` documents. Every block has a `region` and `factors`: for each axis `(d, d)`, `(d,)` for a
            diagonal or None for the identity. Its Fisher matrix, flattened row by row, is `F_0 ⊗ F_1 ⊗ ...`; a block's
            factors are scaled alike, so that this has the trace that `curvature(p)` has there.

        Raises:
            RuntimeError: If other processes have some of the blocks.
            ValueError: If `kind` is another word, or the state holds nothing of this kind; if `batch_size` is not > 0.
        """
        return _fisher_export.fisher(self, kind, batch_size)

    @torch.no_grad()
    def curvature(self, p: Tensor) -> KroneckerOperator:
        """The curvature that the state of `p` holds, as a linear operator on `p`'s space.

        Raises:
            RuntimeError: If other processes have some of the blocks.
            ValueError: If `p` is not one of the trainable parameters.
        """
        return _reports.operator(self._complete(), self._groups(), p, "curvature")

    @torch.no_grad()
    def preconditioner(self, p: Tensor) -> KroneckerOperator:
        """What is applied to the gradient (or momentum) of `p`, as a linear operator on `p`'s space.

        Raises:
            RuntimeError: If other processes have some of the blocks.
            ValueError: If `p` is not one of the trainable parameters.
        """
        return _reports.operator(self._complete(), self._groups(), p, "preconditioner")

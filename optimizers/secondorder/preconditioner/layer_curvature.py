"""JᵀJ of a residual by blocks: two Kronecker products for a linear layer, the diagonal for any other parameter.

    [W | b]:    A_Ω ⊗ B_Ω + A_∂Ω ⊗ B_∂Ω        Ω: terms with differential operators, ∂Ω: all others
    other p:    diag(J_pᵀ J_p)

Of columns that were found in J (`residuals.columns`) nobody knows how a product divides into its factors: A has mean
eigenvalue 1, and A ⊗ B the trace of the block.

A layer's entries are kept with its weight. Nothing here changes a state: `observed` returns new entries, and who takes
the step keeps them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder.curvature.capture import all_reduced
from secondorder.preconditioner.kronecker_sum import Pencil, diagonalise, divided, solve
from secondorder.residuals.layers import Layer, Sharing
from secondorder.residuals.linearization import Linearization

FACTORS = ("A_operator", "B_operator", "A_plain", "B_plain")
KEPT = (*FACTORS, "diagonal", "observations")  # entries of a parameter's state
Init = Literal["debiased", "identity", "zero"]
State = Mapping[str, Tensor]


def agreed(layers: Sequence[Layer], params: Sequence[Tensor], group: Any) -> list[Layer]:
    """The layers of all processes, in the order of their weights; one without samples has called none.

    Args:
        layers: Those of this process.
        params: All parameters.
        group: The processes; None: this one alone.
    """
    known = {layer.weight: layer for layer in layers}
    if group is not None:
        own = torch.zeros(len(params), 2, dtype=torch.int64, device=params[0].device)
        for i, layer in known.items():
            own[i] = own.new_tensor([1, 0 if layer.bias is None else 1 + layer.bias])
        for i, (ranks, bias) in enumerate(all_reduced([own], group)[0].tolist()):
            if ranks and i not in known:
                known[i] = Layer(i, bias // ranks - 1 if bias else None)
    return [known[i] for i in sorted(known)]


def observed(
    layers: Sequence[Layer], linear: Linearization, params: Sequence[Tensor], sharing: Sharing, group: Any = None
) -> dict[int, dict[str, Tensor]]:
    """Factors and diagonals of one batch, by number of the parameter.

    Args:
        layers: With what they saw.
        linear: J, for the parameters of no layer.
        params: All parameters.
        sharing: How a sample's columns count (see `Layer.sums`).
        group: The processes over which factors are added up.
    """
    uses = [use for layer in layers for use in layer.uses]
    in_rows = {use.term for use in uses if use.found}
    jets = {use.term for use in uses if use.jet} - in_rows
    plain = {use.term for use in uses} - jets - in_rows
    sums: list[Tensor] = []
    for layer in layers:
        weight = params[layer.weight]
        for terms in (jets, plain, in_rows):
            sums += layer.sums(terms, weight, sharing)
        sums.append(layer.trace(in_rows, weight))
    every = iter(sums if group is None else all_reduced(sums, group))
    found: dict[int, dict[str, Tensor]] = {}
    for layer in layers:
        A, B, w, A_plain, B_plain, w_plain, A_rows, B_rows, w_rows, trace = itertools.islice(every, 10)
        A = A + A_rows * (w_rows * len(A) / _positive(A_rows.trace()))
        B = B + B_rows * (trace / len(A) / _positive(B_rows.trace()))
        factors = A / _positive(w + w_rows), B, A_plain / _positive(w_plain), B_plain
        found[layer.weight] = dict(zip(FACTORS, factors, strict=True))
    for i in sorted(set(range(len(params))) - {i for layer in layers for i in (layer.weight, layer.bias)}):
        rows = linear.restricted([i]).rows()
        found[i] = {"diagonal": rows.square().sum(0).reshape(params[i].shape)}
    return found


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def averaged(state: State, new: State, ema: float, init: Init) -> dict[str, Tensor]:
    """`ema · average + (1 - ema) · new`, from what `init` says; and the number of observations.

    Args:
        state: Of the parameter, with averages or without.
        new: This batch's.
        ema: Decay rate.
        init: "debiased": the first average is the first observation; "identity", "zero": from these matrices.
    """
    count = state.get("observations", torch.zeros((), dtype=torch.float64)) + 1
    rate = 1 - ema if init != "debiased" else (1 - ema) / (1 - ema ** float(count))
    found = {"observations": count}
    for name, x in new.items():
        start = torch.ones_like(x) if name == "diagonal" else torch.eye(len(x), dtype=x.dtype, device=x.device)
        found[name] = state.get(name, start * (init == "identity")).lerp(x, rate)
    return found


class Inverse:
    """The inverse of all blocks, damped; layers of one shape are stacked.

    Args:
        layers: Those whose weights have factors.
        states: Of all parameters.
        damping: λ; or by what the mean eigenvalue of each factor is multiplied.
        relative: Whether the latter.

    Attributes:
        ok: 0-dim boolean: all factors are finite and were decomposed.
    """

    def __init__(self, layers: Sequence[Layer], states: Sequence[State], damping: float, relative: bool) -> None:
        self._states, self._damping, self._relative = states, damping, relative
        stacks: dict[tuple[int, int], list[Layer]] = {}
        for layer in layers:
            factors = states[layer.weight]
            stacks.setdefault((len(factors["A_plain"]), len(factors["B_plain"])), []).append(layer)
        self._stacks = [(stack, self._pencil(stack, "A"), self._pencil(stack, "B")) for stack in stacks.values()]
        decomposed = [pencil.ok.all() for _, *pencils in self._stacks for pencil in pencils]
        self.ok = torch.stack(decomposed).all() if decomposed else torch.tensor(True)

    def __call__(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """Applied to one tensor a parameter; zero for parameters of which nothing is known."""
        found = [
            self._alone(g, state["diagonal"]) if "diagonal" in state else torch.zeros_like(g)
            for g, state in zip(gradient, self._states, strict=True)
        ]
        for stack, A, B in self._stacks:
            blocks = torch.stack([_joined(gradient, layer) for layer in stack])
            for layer, X in zip(stack, solve(A, B, blocks).to(blocks.dtype), strict=True):
                i = gradient[layer.weight].shape[1]
                found[layer.weight] = X[:, :i].contiguous()
                if layer.bias is not None:
                    found[layer.bias] = X[:, i].contiguous()
        return found

    def _alone(self, g: Tensor, diagonal: Tensor) -> Tensor:
        return divided(g, diagonal + self._shift(diagonal.mean(), diagonal.dtype))

    def _pencil(self, stack: Sequence[Layer], side: str) -> Pencil:
        first, second = (
            torch.stack([self._states[layer.weight][f"{side}_{terms}"] for layer in stack])
            for terms in ("operator", "plain")
        )
        return diagonalise(self._damped(first), self._damped(second))

    def _damped(self, stack: Tensor) -> Tensor:  # (n, d, d)
        shift = self._shift(stack.diagonal(dim1=1, dim2=2).mean(1), stack.dtype)
        return stack + shift[:, None, None] * torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)

    def _shift(self, mean: Tensor, dtype: torch.dtype) -> Tensor:
        # A relative damping below the factors' rounding is none.
        return mean * max(self._damping, torch.finfo(dtype).eps) if self._relative else mean * 0 + self._damping


def _joined(gradient: Sequence[Tensor], layer: Layer) -> Tensor:
    """`[∇W | ∇b]`."""
    W = gradient[layer.weight]
    return W if layer.bias is None else torch.cat([W, gradient[layer.bias][:, None]], 1)

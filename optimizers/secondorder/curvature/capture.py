"""Capture: the sites of a network, which parameters they serve, and the sums of a step.

Sums are keyed by parameter, not by module: the uses of a tied weight add up. A weight that is used in two orientations
(an embedding that is the output head as well) has one pair of factors, the marginals of the sum of both products.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secondorder.curvature.layers.attention import DecomposedMultiheadAttention
from secondorder.curvature.layers.registry import kind_of
from secondorder.curvature.samples import gram, same_examples
from secondorder.curvature.site import Site, Wants, is_distributed

_TENSOR_PARALLEL = "tensor-parallel: a process has a part of each row, or of the rows of each sample"


class Capture:
    """The sites of one network.

    Attributes:
        sites: In the order of definition.
        leads: By `id` of a weight, the sites at which it is used.
        biases: By `id` of a bias, the sites at which it is used.
        reasons: By `id` of a parameter that no site serves, why.
        pending: Fisher sums of this step.
        terms: Loss terms behind them, 0-d; None where there are none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.sites: list[Site] = []
        self.pending: dict[Site, dict[tuple[str, int], Tensor]] = {}
        self.terms: Tensor | None = None
        self._handles: list[Any] = []
        self.scan()

    def scan(self) -> bool:
        """Look at the network anew; returns whether parameters or layers are others than before."""
        module = self.module()
        found: list[Site] = []
        self.reasons: dict[int, str] = {}
        known = {(site.module(), site.rule): site for site in self.sites}
        sharded = _fully_sharded(module) if module is not None else set()
        for name, layer in module.named_modules() if module is not None else ():
            held = {key: p for key, p in layer._parameters.items() if p is not None}
            if not held:
                continue
            if any(map(is_lazy, held.values())):
                found_kind: Any = "not initialised yet"
            elif any(_shards(p) > (layer in sharded) for p in held.values()):
                found_kind = _TENSOR_PARALLEL
            else:
                found_kind = kind_of(layer)
            if isinstance(found_kind, str):
                for p in held.values():
                    self.reasons.setdefault(id(p), found_kind)
                continue
            kind, rule = found_kind
            for key, p in held.items():
                self.reasons.setdefault(id(p), f"{key} of {type(layer).__name__}")
            site = known.get((layer, rule))
            same = site is not None and site.owns(layer)
            found.append(site if same and site is not None else Site(name, layer, rule, kind.names))
        changed = [id(s) for s in found] != [id(s) for s in self.sites]
        self.sites = found
        self.leads: dict[int, list[Site]] = defaultdict(list)
        self.biases: dict[int, list[Site]] = defaultdict(list)
        for site in found:
            if site.weight is not None:
                self.leads[id(site.weight)].append(site)
            if site.bias is not None:
                self.biases[id(site.bias)].append(site)
        return changed

    def install(self, wants: Mapping[Site, Wants], dtypes: Mapping[Site, torch.dtype]) -> None:
        """Tap the sites that are wanted, and only those."""
        self.release()
        for site in self.sites:
            module = site.module()
            if site not in wants or module is None:
                site.leaves, site.flat, site.active = {}, [], False
                continue
            device = next(p.device for p in (site.weight, site.bias) if p is not None)
            site.configure(wants[site], dtypes[site], device)
            if isinstance(module, DecomposedMultiheadAttention):
                module.tap = AttentionTap(site)
                self._handles.append(module.tap)
            else:
                # First: what other hooks make of an output is not the layer's any more.
                self._handles.append(module.register_forward_hook(site, prepend=True, with_kwargs=True))
            trained = [p for p in (site.weight, site.bias) if p is not None and p.requires_grad and is_distributed(p)]
            self._handles += [p.register_post_accumulate_grad_hook(site.arrive) for p in trained]

    def release(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Drop what backward passes handed over; Fisher sums stay."""
        for site in self.sites:
            site.clear()

    def finish(self) -> None:
        """Drop everything: a step has used it."""
        self.clear()
        self.pending, self.terms = {}, None
        for site in self.sites:
            site.quiet = False

    def fisher(self, outputs: Tensor, vectors: Iterable[Tensor], terms: Tensor) -> None:
        """Back-propagate vectors to the leaves alone, and keep the sums until the next step.

        Input factors are taken in the first pass. Backward passes that follow add nothing.
        """
        sites = [site for site in self.sites if site.leaves and site.active]
        leaves = [t for site in sites for t in site.flat]
        first = True
        for v in vectors:
            for site in sites:
                site.quiet, site.with_inputs = False, first
            found = torch.autograd.grad(outputs, leaves, v, retain_graph=True, allow_unused=True)
            remaining = iter(found)
            for site in sites:
                kept = self.pending.setdefault(site, {})
                for name, group in site.leaves.items():
                    for i in range(len(group)):
                        value = next(remaining)
                        if value is not None and name not in ("terms", "probe"):
                            kept[name, i] = kept[name, i] + value if (name, i) in kept else value
            first = False
        self.terms = terms if self.terms is None else self.terms + terms
        for site in sites:
            site.quiet, site.with_inputs = True, True

    def received(self, site: Site) -> dict[str, list[Tensor]] | None:
        """What reached a site's leaves, Fisher sums before empirical ones; None where nothing did.

        Leaves that nothing reached stand for themselves: they are zeros of one element.
        """
        if self.terms is not None:
            kept = self.pending.get(site)
            if not kept:
                return None
            return {
                name: [kept.get((name, i), t.detach()) for i, t in enumerate(leaves)]
                for name, leaves in site.leaves.items()
            }
        if all(t.grad is None for t in site.flat):
            return None
        return {
            name: [t.detach() if t.grad is None else t.grad.detach() for t in leaves]
            for name, leaves in site.leaves.items()
        }

    def overlaps(self, trained: Container[int]) -> Tensor | None:
        """Mean over the examples whose rows were kept, as a matrix that has its eigenvalues (see `samples`).

        Args:
            trained: `id` of parameters that count.

        Returns:
            One row and column for each of them in each pass; None where what was kept does not fit together.
        """
        sites = [site for site in self.sites if site.leaves]
        if not same_examples([site.kept for site in sites]):
            return None
        parts = []
        for site in sites:
            weight, bias = (p is not None and p.requires_grad and id(p) in trained for p in (site.weight, site.bias))
            unseen = weight and site.wants.inputs is None and site.rule.d_in > 0
            if unseen or len(self.leads.get(id(site.weight), ())) > 1:
                return None
            parts.append(gram(site.kept, site.rule, weight, bias))
        K = torch.stack([part.to(parts[0]) for part in parts]).sum(0)
        return K / sum(kept.m for kept in sites[0].kept if kept.anew)

    def totals(self, group: Any) -> dict[Site, dict[str, list[Tensor]]]:
        """What the sites received, by leaf, summed over the ranks of a process group; None and one rank are the same.

        Sites that received nothing (with a group: nothing on any rank) are missing.
        """
        sites = [site for site in self.sites if site.leaves]
        found = {site: got for site in sites if (got := self.received(site)) is not None}
        if group is None or dist.get_world_size(group) == 1:
            return found
        flat = [torch.tensor([float(site in found) for site in sites], device=sites[0].flat[0].device)]
        for site in sites:
            got = found.get(site)
            for name, leaves in site.leaves.items():
                flat += [t.detach() if got is None else got[name][i] for i, t in enumerate(leaves)]
        if self.terms is not None:
            flat.append(self.terms)
        flat = all_reduced(flat, group)
        anywhere = (flat[0] > 0).tolist()
        remaining = iter(flat[1:])
        every = {site: {name: [next(remaining) for _ in t] for name, t in site.leaves.items()} for site in sites}
        if self.terms is not None:
            self.terms = next(remaining)
        return {site: every[site] for site, here in zip(sites, anywhere, strict=True) if here}


class AttentionTap:
    """A site as the `tap` of an attention layer."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def active(self) -> bool:
        """Whether the next forward pass is captured."""
        return self.site.active

    def __call__(self, module: nn.Module, inputs: Any, projections: Any) -> Any:
        """See `layers.attention.Tap`."""
        return self.site.attention(module, inputs, projections)

    def remove(self) -> None:
        """Take the tap away."""
        module = self.site.module()
        if module is not None and module.__dict__.get("tap") is self:
            del module.tap


def _fully_sharded(module: nn.Module) -> set[nn.Module]:
    """Modules whose parameters FSDP2 makes whole for their forward passes."""
    roots = [m for m in module.modules() if any(base.__name__ == "FSDPModule" for base in type(m).__mro__)]
    return {m for root in roots for m in root.modules()}


def _shards(p: Tensor) -> int:
    """Along how many axes of the mesh a parameter is split."""
    return sum(getattr(placement, "dim", None) is not None for placement in getattr(p, "placements", ()))


def all_reduced(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums over the ranks of a group: one collective per dtype and device."""
    out = list(tensors)
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        chosen = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
        packed = torch.cat([tensors[i].reshape(-1) for i in chosen])
        dist.all_reduce(packed, group=group)
        for i, part in zip(chosen, packed.split([tensors[i].numel() for i in chosen]), strict=True):
            out[i] = part.view(tensors[i].shape)
    return out

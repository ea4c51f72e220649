"""How a layer's parameters become blocks, what must be captured for them, and the sums that reach a block.

A weight and its bias are one block `[W | b]` (bias last) where both are trained in one group; apart, the bias has the
output factor alone. Groups of a convolution, q, k and v of an attention, and the features of a norm layer are batched
blocks with factors of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.capture import Capture
from secondorder.curvature.layer import Side, Sums
from secondorder.curvature.site import Site, Wants
from secondorder.layout.blocks import Fold, Treatment, even_cuts
from secondorder.layout.buckets import Candidate, Piece
from secondorder.layout.faces import Layout

Group = dict[str, Any]
Totals = Mapping[Site, dict[str, list[Any]]]  # a tensor, or None where other processes have it
Leaf = tuple[Site, str, int]  # a site, the name of its statistic, which of them
Found = Mapping[str, list[Any]]  # sums of one use, or of several, as in `Totals`
Way = tuple[int, int]  # axes of a weight's view on the input and on the output side


def weight_blocks(
    site: Site,
    hp: Mapping[str, Any],
    role: str | None,
    joined: int | None,
    diagonal: tuple[bool, bool] = (False, False),
) -> Treatment:
    """How a weight is cut. A vocabulary's side beyond `max_block_size` has a diagonal factor, other sides are cut.

    Args:
        site: Where it is used.
        hp: Options of its group: `max_block_size`, `sides`.
        role: `"embedding"`, `"head"` or `"hidden"`.
        joined: `id` of the bias that is one more column, or None.
        diagonal: Whether the input, the output side has a diagonal factor whatever its size.
    """
    rule, limit = site.rule, hp["max_block_size"]
    k, d_out, d_in = rule.groups, rule.d_out, rule.d_in
    bias = "[W | b] of " if joined is not None else ""
    if not d_in:
        size = 1 + (joined is not None)
        reason = f"{_kind(site)}: {k} features, a {size}x{size} factor each"
        return Treatment((k, 1), ((k,), (1,)), (0,), reason, batched=True, joined=joined)
    kind = f"{bias}{_kind(site)} {site.name}"
    if rule.tokens:
        reason = f"{kind}: diagonal over {d_in} tokens"
        if diagonal[1]:
            return Treatment((d_in, d_out), ((d_in,), (d_out,)), (), f"{reason} and over outputs", diagonal=(0, 1))
        return Treatment((d_in, d_out), ((d_in,), even_cuts(d_out, limit)), (1,), reason, diagonal=(0,))
    vocabulary = role == "head" and limit is not None and d_out > limit
    sides = (0, 1) if hp["sides"] == "both" else (1,)
    chosen = (vocabulary or diagonal[1], diagonal[0])
    diagonals = tuple(i for i in sides if chosen[i])
    modes = tuple(i for i in sides if not chosen[i])
    cuts = tuple(even_cuts(d, limit) if i in modes else (d,) for i, d in enumerate((d_out, d_in)))
    reason = f"{kind}: " + (f"{k} groups of " if k > 1 else "") + f"{d_out} x {d_in + (joined is not None)}"
    if vocabulary and 0 in diagonals:
        reason += f", diagonal on the side of {d_out} (a vocabulary)"
    elif diagonals:
        reason += ", diagonal on " + ("both sides" if len(diagonals) == 2 else ("outputs", "inputs")[diagonals[0]])
    count = len(cuts[0]) * len(cuts[1])
    if count > 1:
        reason += f", cut into {count} blocks of at most {limit}"
    fold = None if rule.fold is None else Fold(*rule.fold)
    more = dict(diagonal=diagonals, fold=fold, joined=joined)
    if k > 1:
        return Treatment((k, d_out, d_in), ((k,), *cuts), modes, reason, batched=True, **more)  # type: ignore[arg-type]
    return Treatment((d_out, d_in), cuts, modes, reason, **more)  # type: ignore[arg-type]


def bias_blocks(
    site: Site, hp: Mapping[str, Any], weight: Treatment | None, why: str, diagonal: bool = False
) -> Treatment:
    """How a bias is cut that is not joined to its weight: the output factor alone, in the form that the weight has.

    Args:
        site: Where it is used.
        hp: Options of its group.
        weight: How the weight is cut, if it is trained here and has an output factor.
        why: It is apart.
        diagonal: Whether its factor is diagonal where the weight has none on this side.
    """
    rule = site.rule
    reason = f"bias of {_kind(site)} {site.name}, apart: {why}"
    if not rule.d_in:
        return Treatment((rule.groups, 1), ((rule.groups,), (1,)), (0,), reason, batched=True)
    cuts, is_diagonal = ((rule.d_out,), True) if diagonal else (even_cuts(rule.d_out, hp["max_block_size"]), False)
    if weight is not None:
        _, axis = _axes(site, weight)
        mode = axis - weight.batched
        if mode in weight.diagonal:
            cuts, is_diagonal = (rule.d_out,), True
        elif mode in weight.modes:
            cuts, is_diagonal = weight.cuts[axis], False
    modes, diagonals = ((), (0,)) if is_diagonal else ((0,), ())
    if rule.groups > 1:
        view = (rule.groups, rule.d_out)
        return Treatment(view, ((rule.groups,), cuts), modes, reason, diagonal=diagonals, batched=True)
    return Treatment((rule.d_out,), (cuts,), modes, reason, diagonal=diagonals)


def _kind(site: Site) -> str:
    """The module's class as the user knows it: attention layers are given one of ours, and have one within."""
    for cls in type(site.module()).__mro__:
        if cls.__module__.split(".")[0] not in ("torch", "secondorder") or cls.__name__ in nn.__dict__:
            return cls.__name__
    return "Module"


def follower(site: Site, weight: int) -> Treatment:
    """A bias that is a column of its weight's block."""
    shape = tuple(site.bias.shape)  # type: ignore[union-attr]
    return Treatment(shape, tuple((d,) for d in shape), (), f"a column of {site.name}.{site.names[0]}", follows=weight)


def _spans(cuts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ends = [sum(cuts[: j + 1]) for j in range(len(cuts))]
    return tuple((end - size, end) for size, end in zip(cuts, ends, strict=True))


def wants(site: Site, weight: Treatment | None, bias: Treatment | None, moment: bool) -> Wants:
    """What must be captured at a site, from the treatments of its weight and of its bias (where it is apart)."""
    if not site.rule.d_in:
        first = 0 if weight is not None else 1
        last = 2 if bias is not None or (weight is not None and weight.joined is not None) else 1
        apart = ((0, 1), (1, 2)) if weight is not None and bias is not None else ((first, last),)
        return Wants(None, Side(apart))
    if weight is None:
        assert bias is not None
        return Wants(None, Side(_spans(bias.cuts[-1]), bool(bias.diagonal)))
    at_in, at_out = _axes(site, weight)

    def side(axis: int, joined: bool) -> Side | None:
        mode = axis - weight.batched
        if mode not in (*weight.modes, *weight.diagonal):
            return None
        return Side(_spans(weight.cuts[axis]), mode in weight.diagonal, joined)

    outputs = side(at_out, False)
    if outputs is None and bias is not None:
        outputs = Side(_spans(bias.cuts[-1]), bool(bias.diagonal))
    return Wants(side(at_in, weight.joined is not None), outputs, moment)


def _axes(site: Site, weight: Treatment) -> tuple[int, int]:
    """Axes of a weight's view on the input and on the output side."""
    last = len(weight.view) - 1
    return (0, 1) if site.rule.tokens else (last, last - 1)


class Scales:
    """What normalises the raw sums of one step.

    Attributes:
        outputs: Scale of output factors and moments, 0-d: M / c² for a loss that is a mean over M terms, captured times
            a loss scale c; 1 / M for Fisher sums; 1 for M where the loss is a sum.
        terms: M, 0-d; 1 where the loss is a sum.
        probed: Captured gradients of reference layers, what they are compared with, and the loss scale c in them; None
            where they were not asked.
    """

    def __init__(
        self,
        outputs: Tensor,
        terms: Tensor,
        probed: tuple[Mapping[Site, Tensor], Mapping[Site, Tensor], Tensor] | None = None,
    ) -> None:
        self.outputs, self.terms, self.probed = outputs, terms, probed

    def inputs(self, rows: Sequence[Tensor]) -> list[Tensor]:  # each (k,)
        """1 / rows, and 0 where there are none: of all layers as one vector."""
        out = list(rows)
        kinds = [(t.device, t.dtype) for t in rows]
        for kind in dict.fromkeys(kinds):
            chosen = [n for n, own in enumerate(kinds) if own == kind]
            every = torch.cat([rows[n] for n in chosen])
            scales = torch.where(every > 0, 1 / every.clamp_min(1), 0.0)
            for n, scale in zip(chosen, scales.split([len(rows[n]) for n in chosen]), strict=True):
                out[n] = scale
        return out


def all_sums(layout: Layout, capture: Capture, totals: Totals, scales: Scales) -> dict[int, Sums]:
    """Sums of all blocks, by position of the leading parameter; of those of other processes, what normalises them.

    Parameters without any are missing. What is computed for a layer is computed for all of them at once.
    """
    led = [(i, [site for site in uses if site in totals], t, is_bias) for i, uses, t, is_bias in _led(layout, capture)]
    led = [entry for entry in led if entry[1]]
    by_way = [_by_way(sites, t, is_bias, totals) for _, sites, t, is_bias in led]
    added = iter(_added([uses for ways in by_way for uses in ways.values()]))
    merged = [{way: next(added) for way in ways} for ways in by_way]
    inputs = iter(scales.inputs([found["rows"][0] for ways in merged for way, found in ways.items() if way]))
    out: dict[int, Sums] = {}
    for (i, sites, t, is_bias), ways in zip(led, merged, strict=True):
        if None not in ways:
            sums = weight_sums([(way, found, next(inputs)) for way, found in ways.items() if way], t, scales)
        elif sites[0].rule.d_in:
            sums = bias_sums(ways[None], t, scales)
        else:
            sums = vector_sums(ways[None], is_bias, scales)
        sums.scales["terms"] = scales.terms
        if capture.terms is None:
            sums.rows = [totals[site]["rows"][0] for site in sites]
        out[i] = sums
    return out


def _by_way(sites: Sequence[Site], t: Treatment, is_bias: bool, totals: Totals) -> dict[Way | None, list[Found]]:
    """What uses of a parameter received, by the way in which its weight is used; None: outputs alone are asked for."""
    if is_bias or not sites[0].rule.d_in:
        return {None: [{"outputs": totals[site]["outputs"]} for site in sites]}
    out: dict[Way | None, list[Found]] = {}
    for site in sites:
        out.setdefault(_axes(site, t), []).append(totals[site])
    return out


def _led(layout: Layout, capture: Capture) -> Iterator[tuple[int, list[Site], Treatment, bool]]:
    """Position, uses and treatment of every parameter with blocks of its own, and whether it is a bias apart."""
    for i, (p, (_, _, t)) in enumerate(zip(layout.params, layout.treatments, strict=True)):
        if not t.fallback and t.follows is None:
            leads = capture.leads.get(id(p))
            yield i, leads or capture.biases[id(p)], t, not leads


def readers(layout: Layout, capture: Capture, owner: Callable[[Candidate], int]) -> dict[Leaf, set[int]]:
    """By leaf, the owners of the blocks that are made of it."""
    out: dict[Leaf, set[int]] = {}
    led = {i: (uses, t, is_bias) for i, uses, t, is_bias in _led(layout, capture)}
    for c in layout.candidates:
        if c.piece.index in led:
            for leaf in _read(*led[c.piece.index], c.piece.at):
                out.setdefault(leaf, set()).add(owner(c))
    return out


def _read(uses: Sequence[Site], t: Treatment, is_bias: bool, at: tuple[int, ...]) -> list[Leaf]:
    """The leaves of which the block is made that begins at `at`: see `all_sums`."""
    at = at or (0,) * len(t.view)
    starts = [[start for start, _ in _spans(cuts)] for cuts in t.cuts]
    if not uses[0].rule.d_in:
        return [(site, "outputs", min(int(is_bias), len(site.leaves["outputs"]) - 1)) for site in uses]
    if is_bias:
        return [(site, "outputs", starts[-1].index(at[-1])) for site in uses]
    if len({_axes(site, t) for site in uses}) > 1:  # the marginals are made of all
        return [(site, name, i) for site in uses for name, leaves in site.leaves.items() for i in range(len(leaves))]
    found: list[Leaf] = []
    for site in uses:
        at_in, at_out = _axes(site, t)
        found.append((site, "inputs", starts[at_in].index(at[at_in])))
        if at_out - t.batched in (*t.modes, *t.diagonal):
            found.append((site, "outputs", starts[at_out].index(at[at_out])))
        if "moment" in site.leaves:
            row, column = starts[t.batched].index(at[t.batched]), starts[-1].index(at[-1])
            found.append((site, "moment", row * len(starts[-1]) + column))
    return found


def weight_sums(ways: Sequence[tuple[Way, Found, Tensor]], t: Treatment, scales: Scales) -> Sums:
    """Sums of a weight.

    Args:
        ways: Every way in which it is used, sums over these uses, and the scale of their inputs.
        t: How it is cut.
        scales: What normalises the rest.
    """
    axes = {f"gram_{axis - t.batched}": (axis,) for axis in range(t.batched, len(t.view))}
    parts = []
    for (at_in, at_out), found, inputs in ways:
        names = (f"gram_{at_in - t.batched}", f"gram_{at_out - t.batched}")
        raw = {names[0]: _placed(found["inputs"], t.cuts[at_in])}
        scale = {names[0]: inputs, names[1]: scales.outputs}
        if at_out - t.batched in (*t.modes, *t.diagonal):
            raw[names[1]] = _placed(found["outputs"], t.cuts[at_out])
        if "moment" in found:
            starts = [(r, c) for r, _ in _spans(t.cuts[t.batched]) for c, _ in _spans(t.cuts[-1])]
            raw["moment"] = dict(zip(starts, found["moment"], strict=True))
            scale["moment"] = scales.outputs
        parts.append(Sums(raw, scale, {**axes, "moment": tuple(range(t.batched, len(t.view)))}))
    if len(parts) == 1:
        return parts[0]
    here = all(value is not None for p in parts for raw in p.raw.values() for value in raw.values())
    return _both_ways(parts) if here else Sums({}, {})


def bias_sums(found: Found, t: Treatment, scales: Scales) -> Sums:
    """Sums of a bias that is apart."""
    raw = {"gram_0": _placed(found["outputs"], t.cuts[-1])}
    axis = (len(t.view) - 1,)
    return Sums(raw, dict.fromkeys(raw, scales.outputs), dict.fromkeys(raw, axis))


def vector_sums(found: Found, is_bias: bool, scales: Scales) -> Sums:
    """Sums of a norm layer's weight (and bias, where joined), or of its bias."""
    index = min(int(is_bias), len(found["outputs"]) - 1)
    raw: dict[str, dict[tuple[int, ...], Any]] = {"gram_0": {(0,): found["outputs"][index]}}
    return Sums(raw, dict.fromkeys(raw, scales.outputs), dict.fromkeys(raw, (1,)))


def _placed(values: Sequence[Any], cuts: Sequence[int]) -> dict[tuple[int, ...], Any]:
    return {(start,): value for (start, _), value in zip(_spans(cuts), values, strict=True)}


def _added(every: Sequence[Sequence[Found]]) -> list[Found]:
    """Sums over the uses of each parameter, leaf by leaf; None of those that other processes have."""
    out = [uses[0] for uses in every]
    for j in range(1, max(map(len, every), default=0)):  # the second use of all in one launch, then the third
        places: list[tuple[list[Any], int]] = []
        left: list[Tensor] = []
        right: list[Tensor] = []
        for n, uses in enumerate(every):
            if j < len(uses):
                a, b = out[n], uses[j]
                sums: dict[str, list[Any]] = {name: [None] * len(a[name]) for name in a if name in b}
                out[n] = sums
                for name, values in sums.items():
                    for i, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
                        if x is not None and y is not None:
                            places.append((values, i))
                            left.append(x)
                            right.append(y)
        if left:
            for (values, i), total in zip(places, torch._foreach_add(left, right), strict=True):
                values[i] = total
    return out


def _both_ways(parts: Sequence[Sums]) -> Sums:
    """The pair of factors of a sum of Kronecker products `D_j ⊗ V_j`, by its marginals.

    D = Σ_j tr(V_j) D_j,   V = Σ_j tr(D_j) V_j / Σ_j tr(D_j) tr(V_j).
    """
    names = [name for name in parts[0].raw if name.startswith("gram_")]
    scaled = [
        {name: {at: _times(raw, p.scales[name]) for at, raw in p.raw[name].items()} for name in names} for p in parts
    ]
    traces = [{name: torch.stack([_trace(v) for v in p[name].values()]).sum() for name in names} for p in scaled]
    total = torch.stack([torch.stack(list(t.values())).prod() for t in traces]).sum()
    raw: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for i, name in enumerate(names):
        other = [t[names[1 - i]] for t in traces]
        share = total.clamp_min(torch.finfo(total.dtype).tiny) if i else torch.ones_like(total)
        raw[name] = {
            at: torch.stack([p[name][at] * w for p, w in zip(scaled, other, strict=True)]).sum(0) / share
            for at in scaled[0][name]
        }
    if "moment" in parts[0].raw:
        raw["moment"] = {
            at: torch.stack([_times(p.raw["moment"][at], p.scales["moment"]) for p in parts]).sum(0)
            for at in parts[0].raw["moment"]
        }
    return Sums(raw, dict.fromkeys(raw, torch.ones_like(total)), parts[0].starts)


def _times(raw: Tensor, scale: Tensor) -> Tensor:
    return raw * scale.view(-1, *[1] * (raw.ndim - 1))


def _trace(x: Tensor) -> Tensor:
    """Of a stack of matrices, or of diagonals."""
    return x.sum() if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1).sum()


def sharing(group: Group, site: Site) -> Callable[[], str]:
    """What `sharing` means at a site, whenever it is asked."""

    def chosen() -> str:
        word = group["sharing"]
        return ("reduce" if site.rule.pooled else "expand") if word == "auto" else word

    return chosen


def limit(group: Group) -> Callable[[], int | None]:
    """Of how many rows statistics are taken, whenever it is asked."""
    return lambda: group["statistic_rows"]


def bind_frames(layout: Layout, capture: Capture, bases: Iterable[tuple[Piece, Mapping[int, Tensor]]]) -> None:
    """Show the sites the eigenbases of their blocks.

    Args:
        layout: Where the parameters are.
        capture: The sites.
        bases: By block, by mode, `(rows, d, d)`.
    """
    by_param: dict[int, list[tuple[tuple[int, ...], Mapping[int, Tensor]]]] = {}
    for piece, found in bases:
        by_param.setdefault(piece.index, []).append((piece.at, found))
    for i, p in enumerate(layout.params):
        tiles = sorted(by_param.get(i, []), key=lambda tile: tile[0])
        led = capture.leads.get(id(p))
        for site in led or capture.biases.get(id(p)) or ():
            if tiles and site.wants.moment and (led or site.weight is None or not site.weight.requires_grad):
                site.frames = frames(site, layout.treatments[i][2], [found for _, found in tiles])


def frames(
    site: Site, t: Treatment, bases: Sequence[Mapping[int, Tensor]]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """`(Q_in, Q_out)` of every tile, in the order of a site's moments."""
    if not site.rule.d_in or len(t.view) - t.batched == 1:
        return [(None, tile.get(0)) for tile in bases]
    at_in, at_out = _axes(site, t)
    return [(tile.get(at_in - t.batched), tile.get(at_out - t.batched)) for tile in bases]

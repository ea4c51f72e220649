"""Cells of a parameter's view: they tile what a process stores, whatever the view, the fold and the stored ranges.

The oracle is index arithmetic: a parameter whose entries are their own positions, cut by plain indexing.
"""

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from distributed import pool, worlds
from secondorder.layout.blocks import Fold
from secondorder.sharding.regions import cells, everything, holding
from secondorder.sharding.routes import Patch, faces

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
SIZES = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 12])


def positions(shape):
    return torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)


def indices(spans):
    return [i for start, stop in spans for i in range(start, stop)]


def stored(full, held):
    """The local tensor of a process that holds these ranges of every axis."""
    for axis, spans in enumerate(held):
        full = full.index_select(axis, torch.tensor(indices(spans), dtype=torch.int64))
    return full.contiguous()


@st.composite
def some_of(draw, n):
    """Indices of an axis that a process may store: all, none, a run, strided, any."""
    kind = draw(st.sampled_from(["all", "none", "run", "strided", "any"]))
    if kind == "run":
        start = draw(st.integers(0, n))
        return worlds.ranges(range(start, draw(st.integers(start, n))))
    if kind == "strided":
        return worlds.ranges(range(draw(st.integers(0, n)), n, draw(st.integers(1, 3))))
    if kind == "any":
        return worlds.ranges(i for i in range(n) if draw(st.booleans()))
    return worlds.ranges(range(n if kind == "all" else 0))


@st.composite
def whole_view(draw):
    """`(shape, view, fold)` as blocks are cut: trailing axes merged, size-1 axes dropped or kept, or neither."""
    shape = tuple(draw(st.lists(SIZES, max_size=4)))
    sides = tuple(n for n in shape if n != 1)
    views = [shape, sides]
    if len(sides) > 1 and 0 not in sides:
        views.append((sides[0], math.prod(sides[1:])))
    return shape, draw(st.sampled_from(views)), None


@st.composite
def split_view(draw):
    """The first axis counts groups: grouped convolutions, packed q, k and v, vectors of features."""
    groups, out, more = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 4), max_size=3))
    shape = (groups * out, *more)
    return shape, draw(st.sampled_from([(groups, out, math.prod(more)), (groups * out, math.prod(more)), shape])), None


@st.composite
def folded_view(draw):
    """A transposed convolution `(in, out / groups, *kernel)` as `(groups, out / groups, in / groups x kernel)`."""
    groups, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    fold = Fold((groups, inputs, outputs, *kernel), (0, 2, 1, *range(3, 3 + len(kernel))))
    columns = inputs * math.prod(kernel)
    view = (groups, outputs, columns) if groups > 1 else (outputs, columns)
    return (groups * inputs, outputs, *kernel), view, fold


@st.composite
def problems(draw):
    """Of axes that are merged into one, all but the first are stored whole, as placements along axes 0 and 1 do."""
    shape, view, fold = draw(st.one_of(whole_view(), split_view(), folded_view()))
    held = [draw(some_of(n)) if axis < 2 else ((0, n),) for axis, n in enumerate(shape)]
    return shape, view, fold, tuple(held)


def viewed(full, view, fold):
    return full.reshape(view) if fold is None else fold.apply(full, view)


def check_cells(shape, view, fold, held):
    full = positions(shape)
    local, expected = stored(full, held), viewed(full, view, fold)
    found = cells(shape, view, fold, held)
    written = torch.full_like(local, -1)
    for cell in found:
        inside = expected[tuple(slice(a, b) for a, b in cell.box)]
        assert cell.shape == inside.shape and inside.numel() > 0
        assert torch.equal(cell.face(local), inside)
        before = written.clone()
        cell.put(written, inside)
        assert (before[written != before] == -1).all(), "cells overlap"
        again = cell.face(written)
        assert torch.equal(again, inside)
        shares = torch.zeros_like(local)
        whole = tuple(slice(0, n) for n in cell.shape)
        with faces([(Patch(0, cell, whole, whole), shares)]) as (target,):
            target.fill_(1)
        assert shares.sum() == inside.numel()  # what is written to a face reaches the tensor, view or not
    assert torch.equal(written, local)
    assert sum(math.prod(cell.shape) for cell in found) == local.numel()


@SETTINGS
@given(problems())
def test_cells_tile_what_is_stored(problem):
    shape, view, fold, held = problem
    try:
        cells(shape, view, fold, held)
    except ValueError as error:
        # Loud, and only where a range of an inner one of merged axes is missing.
        assert "no range of an axis of the view" in str(error)
        assume(False)
    check_cells(shape, view, fold, held)


@SETTINGS
@given(st.one_of(whole_view(), split_view(), folded_view()), st.data())
def test_rows_of_any_view_have_cells(problem, data):
    shape, view, fold = problem
    held = [data.draw(some_of(n)) if axis == 0 else ((0, n),) for axis, n in enumerate(shape)]
    check_cells(shape, view, fold, tuple(held))


@SETTINGS
@given(st.lists(SIZES.filter(bool), min_size=2, max_size=4).map(tuple), st.data())
def test_columns_of_a_merged_matrix_have_cells(shape, data):
    """Tensor parallelism shards inputs, `Shard(1)`."""
    held = [data.draw(some_of(n)) if axis < 2 else ((0, n),) for axis, n in enumerate(shape)]
    view = (shape[0], math.prod(shape[1:]))
    check_cells(shape, view, None, tuple(held))


def test_example_of_groups_that_are_cut_across():
    """Rows 1 to 5 of 6, seen as 3 groups of 2: parts of the first and the last group, and one whole."""
    found = cells((6, 5), (3, 2, 5), None, (((1, 5),), ((0, 5),)))
    assert [cell.box for cell in found] == [
        ((0, 1), (1, 2), (0, 5)),
        ((1, 2), (0, 2), (0, 5)),
        ((2, 3), (0, 1), (0, 5)),
    ]


def test_what_has_no_boxes_is_refused():
    with pytest.raises(ValueError, match="no range of an axis of the view"):
        cells((4, 6), (24,), None, (((0, 4),), ((0, 3),)))
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(3, 8\) have no common refinement"):
        cells((4, 6), (3, 8), None, everything((4, 6)))


# ---------------------------------------------------------------------- of DTensors

SHAPES = [(), (0,), (1,), (5,), (7,), (8,), (1, 8), (8, 1), (3, 0), (3, 4), (0, 4), (8, 4), (9, 8), (5, 4, 3)]
SHAPES += [(2, 4, 1, 2)]
MESHES = [(layout, world) for layout, sizes in worlds.LAYOUTS.items() for world in sizes if world in (2, 4)]


def found_holdings(rank, world, layout):
    """Of every shape: what is said to be stored, what is, and the whole as torch puts it together."""
    flat = layout in ("rows", "columns")
    mesh = init_device_mesh("cpu", (world,) if flat else (2, world // 2))
    out = []
    for shape in SHAPES:
        full = positions(shape)
        p = distribute_tensor(full, mesh, worlds.placements(layout, full), src_data_rank=None)
        out.append((holding(p), p.to_local().contiguous(), p.full_tensor()))
    return out


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "world"), [mesh for mesh in MESHES if mesh[0] != "owners"])
def test_holdings_of_placements(layout, world):
    ranks = pool.run(world, found_holdings, layout)
    for number, shape in enumerate(SHAPES):
        full, seen = positions(shape), set()
        for held, local, gathered in (found[number] for found in ranks):
            assert torch.equal(gathered, full)
            assert len(held) == len(shape)
            assert torch.equal(stored(full, held), local)
            assert all(a < b for spans in held for a, b in spans)
            seen.update(product(*map(indices, held)))
        assert len(seen) == full.numel()


def test_a_plain_tensor_is_held_whole():
    assert holding(torch.zeros(3, 0, 1)) == (((0, 3),), ((0, 0),), ((0, 1),))

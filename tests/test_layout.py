"""Blocks cover a parameter exactly, and buckets, groups and the order of parameters do not show in results."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from cases import assert_same_bits, gradient, parameters
from secondorder import SOAP, AdamW
from secondorder.layout.blocks import even_cuts, matrix_blocks

SETTINGS = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.lists(st.integers(0, 13), max_size=4).map(tuple)
limits = st.one_of(st.none(), st.integers(1, 9))


def options(limit, aspect, largest=None):
    return dict(max_block_size=limit, one_sided_aspect=aspect, max_precond_dim=largest)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(size=st.integers(0, 5000), limit=limits)
def test_cuts_are_the_fewest_and_even(size, limit):
    pieces = even_cuts(size, limit)
    assert sum(pieces) == size
    assert max(pieces) - min(pieces) <= 1
    if limit is not None and size:
        assert max(pieces) <= limit
        assert len(pieces) == math.ceil(size / limit)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(shape=shapes, limit=limits, aspect=st.one_of(st.none(), st.floats(1, 8)))
def test_tiles_of_any_shape_reassemble_to_the_parameter(shape, limit, aspect):
    treatment = matrix_blocks(shape, options(limit, aspect), role=None)
    p = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    view = p.reshape(treatment.view)
    rebuilt = torch.full_like(view, -1.0)
    tiles = treatment.tiles()
    for _, region in tiles:
        assert (rebuilt[region] == -1).all(), "tiles overlap"
        rebuilt[region] = view[region]
    assert torch.equal(rebuilt.reshape(shape), p)
    assert len({key for key, _ in tiles}) == len(tiles)
    for mode, pieces in enumerate(treatment.cuts):
        if limit is not None and mode in treatment.modes and pieces != (0,):
            assert max(pieces) <= limit
        if mode not in treatment.modes:
            assert len(pieces) == 1


def test_the_default_rule_in_examples():
    def modes_and_view(shape, role=None, limit=512, aspect=4.0, largest=16384):
        treatment = matrix_blocks(shape, options(limit, aspect, largest), role)
        return treatment.view, treatment.modes, treatment.fallback

    assert modes_and_view((64, 32)) == ((64, 32), (0, 1), False)
    assert modes_and_view((64, 3, 3, 3)) == ((64, 27), (0, 1), False)
    assert modes_and_view((16, 64)) == ((16, 64), (0,), False)
    assert modes_and_view((64, 16)) == ((64, 16), (1,), False)
    assert modes_and_view((64, 17)) == ((64, 17), (0, 1), False)
    assert modes_and_view((1, 64, 1, 32)) == ((64, 32), (0, 1), False)
    assert modes_and_view((20000, 64))[2] and modes_and_view((64, 20000))[2]
    assert not modes_and_view((20000, 64), role="hidden")[2]
    for role in ("embedding", "head"):
        assert modes_and_view((20000, 64), role)[2] and not modes_and_view((16000, 64), role)[2]
    assert all(modes_and_view(shape)[2] for shape in [(), (7,), (1, 7), (0, 5), (5, 0)])


def train(make, shapes, order, steps=7):
    """Results by original position, for parameters handed over in some order."""
    params = parameters(shapes)
    optimizer = make([params[i] for i in order])
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(tuple(p.shape), step, i)
        optimizer.step()
    return [p.detach() for p in params]


def products_keep_their_bits() -> bool:
    """Whether this machine's batched products round the same wherever a matrix lies in memory; some do not."""
    g = torch.Generator().manual_seed(0)
    for d in range(2, 14):
        A, B = torch.randn(3, d, d, generator=g), torch.randn(3, d, d, generator=g)
        if not all(torch.equal(A @ C, (A.flip(0) @ C.flip(0)).flip(0)) for C in (B, B.mT)):
            return False
    return True


PRODUCTS_KEEP_THEIR_BITS = products_keep_their_bits()


def assert_same(a, b):
    """The same bits, where the machine's own products allow it."""
    if PRODUCTS_KEEP_THEIR_BITS:
        assert_same_bits(a, b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


matrices = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=2, max_size=6)


@cases.variants(blocks=dict(refresh="together", refresh_every=2, max_block_size=5), clipped=dict(max_update_rms=0.5))
@SETTINGS
@given(shapes=matrices, data=st.data())
def test_order_of_parameters_does_not_change_a_bit(case, options, shapes, data):
    shapes = [*shapes, (5,), (), (3, 3, 2)]
    order = data.draw(st.permutations(range(len(shapes))))
    together = {"refresh": "together"} if case.takes("refresh") else {}

    def make(params):
        return case.make(params, **{**together, **options})

    assert_same(train(make, shapes, range(len(shapes))), train(make, shapes, order))


@cases.variants(
    staggered=dict(refresh="staggered", max_block_size=5),
    together=dict(refresh="together", max_block_size=5),
    clipped=dict(max_update_rms=0.5),
    default={},
)
@SETTINGS
@given(shapes=matrices, data=st.data())
def test_splitting_into_groups_does_not_change_a_bit(case, options, shapes, data):
    shapes = [*shapes, (5,), (), (3, 3, 2)]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shapes) - 1))))

    def make(params):
        return case.make(params, **options)

    def make_split(params):
        ends = [0, *cuts, len(params)]
        return make([{"params": params[a:b]} for a, b in zip(ends, ends[1:], strict=False)])

    order = range(len(shapes))
    assert_same(train(make, shapes, order), train(make_split, shapes, order))


@pytest.mark.parametrize("size", [8, 33, 64])
def test_stacking_does_not_change_a_bit(size):
    """A parameter's result is the same alone and among others of its shape."""
    alone = parameters([(size, size)])
    cases.train(SOAP(alone, refresh_every=2, refresh="together"), alone, range(6))
    among = parameters([(size, size)] * 4)
    cases.train(SOAP(among, refresh_every=2, refresh="together"), among, range(6))
    assert_same_bits(alone, among[:1])


def test_many_absent_gradients_do_not_change_a_bit():
    """Beyond a few contiguous ranges, the rows that take part are gathered and scattered: to the same effect."""
    params, twins = parameters([(5, 4)] * 14), parameters([(5, 4)] * 14)
    optimizer = SOAP(params, refresh_every=3, refresh="together")
    single = [SOAP([p], refresh_every=3, refresh="together") for p in twins]
    for step in range(12):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = q.grad = gradient((5, 4), step, i) if (i * step) % 3 != 1 else None
            if q.grad is not None:
                single[i].step()
        optimizer.step()
    assert_same_bits(params, twins)
    for p, q, alone in zip(params, twins, single, strict=True):
        for key, value in alone.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key


def test_groups_keep_their_own_hyper_parameters():
    """Two groups with other values are two optimizers, bit for bit."""
    values = [dict(lr=0.1, betas=(0.8, 0.9), refresh_every=2), dict(lr=0.02, weight_decay=0.3, nesterov=False)]
    values[1].update(refresh_every=3, max_block_size=3, statistics_every=2)
    together = parameters([(6, 5), (6, 5)])
    cases.train(
        SOAP([{"params": [p], **v} for p, v in zip(together, values, strict=True)], refresh="together"),
        together,
        range(8),
    )
    for i, v in enumerate(values):
        alone = parameters([(6, 5), (6, 5)])
        optimizer = SOAP([alone[i]], refresh="together", **v)
        for step in range(8):
            cases.feed(alone, step)
            optimizer.step()
        assert_same_bits([alone[i]], [together[i]])


def test_a_large_number_of_element_wise_parameters_is_one_update_each():
    """Flat buckets are bounded in size: more than one of them must act as one."""
    from secondorder.layout import faces

    limit, faces._FLAT_LIMIT = faces._FLAT_LIMIT, 16
    try:
        params, twins = (parameters([(7,)] * 9) for _ in range(2))
        cases.train(AdamW(params, max_update_rms=1e9), params, range(4))
    finally:
        faces._FLAT_LIMIT = limit
    cases.train(AdamW(twins, max_update_rms=1e9), twins, range(4))
    assert_same_bits(params, twins)

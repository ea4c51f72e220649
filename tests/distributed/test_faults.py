"""Faults of one rank: all ranks take them alike, nothing is lost, and nobody waits for long."""

import time

import pytest
import torch

import cases
from distributed import fault_ranks as ranks
from distributed import pool

pytestmark = pytest.mark.dist

LAYOUTS = [("owners", 2), ("rows", 2), ("rows", 4)]
by_layout = pytest.mark.parametrize(("layout", "world"), LAYOUTS)


def same(results):
    """What all ranks have returned."""
    for found in results[1:]:
        assert found == results[0]
    return results[0]


# ---------------------------------------------------------------------- differences between ranks

NAMED = {
    "shape": "shape of parameter 'layer2.weight' differs: (24, 16) on process 0, (24, 17) on process 1",
    "dtype": "dtype of parameter 'layer0.weight' differs: 'torch.float32' on process 0, 'torch.float64' on process 1",
    "block size": "max_block_size of group 0 differs: '8' on process 0, '4' on process 1",
    "lr": "lr of group 0 differs: '0.01' on process 0, '0.02' on process 1",
    "tensor lr": "lr of group 0 differs: 0.0",
    "betas": "betas of group 0 differs: '(0.9, 0.95)' on process 0, '(0.8, 0.95)' on process 1",
    "method": "class differs: 'SOAP' on process 0, 'KLSOAP' on process 1",
    "missing": "process 0 has a parameter 'layer3.weight', process 1 has not",
    "more": "process 1 has a parameter 'layer4.weight', process 0 has not",
    "name": "process 1 has a parameter 'layer2.kernel', process 0 has not",
}


def test_what_differs_is_named_on_all_ranks():
    told = pool.run(2, ranks.options_that_differ)
    assert {name: found.partition(":")[0] for name, found in told[0].items()} == dict.fromkeys(NAMED, "ValueError")
    for name, message in NAMED.items():
        for found in told:
            assert message in found[name], (name, found[name])


def test_order_of_parameters_is_harmless():
    one = ranks.other_order(0, 1)
    for found in pool.run(3, ranks.other_order):
        cases.assert_same_bits(found, one)


# ---------------------------------------------------------------------- steps that all refuse


@by_layout
@pytest.mark.parametrize(
    ("cls", "options"),
    [("SOAP", {}), ("AdamW", {"max_update_rms": 0.5}), ("KLShampoo", {"weight_decay": 0.1})],
)
def test_a_step_that_one_rank_cannot_take_is_refused_by_all(layout, world, cls, options):
    found = pool.run(world, ranks.refused_steps, layout, cls, options)
    for seen in found:
        cases.assert_same_bits(seen["last"], found[0]["last"])
        assert len(seen["warnings"]) == 1
    # As one process that has the same bad gradients.
    params, optimizer = ranks.build("owners", 1, cls=cls, **options)
    with pytest.warns(UserWarning, match="a step was refused"):
        for number in range(6):
            bad = number in (2, 3, 4)
            ranks.step(params, optimizer, number, (lambda ps: ps[2].grad.fill_(torch.inf)) if bad else None)
    assert optimizer.diagnostics()["refused_steps"] == 3
    for seen in found:
        cases.assert_same_bits(seen["after bad gradients"], ranks.copies(params))


@by_layout
@pytest.mark.parametrize("cls", ["SOAP", "KLSOAP", "InverseFreeKLShampoo"])
def test_masks_that_differ_in_the_first_step(layout, world, cls):
    found = pool.run(world, ranks.first_step_with_other_masks, layout, cls)
    for values, refused in found:
        cases.assert_same_bits(values, found[0][0])
        assert refused == 1


@by_layout
def test_masks_that_differ_on_a_device(layout, world):
    found = pool.run(world, ranks.masks_that_nobody_asks_about, layout)
    for values, refused in found:
        cases.assert_same_bits(values, found[0][0])
        assert refused == 2


def test_raises_on_all_ranks():
    told = pool.run(2, ranks.raises_on_nonfinite)
    for found in told:
        for message in found:
            assert message.startswith("RuntimeError: SOAP: ")
            assert "unchanged" in message
    for number in (0, 2):
        assert "layer2.weight" in told[1][number] and "gradient norm nan" in told[1][number]
        assert "another process" in told[0][number]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_without_work(world):
    one = ranks.few_rows(0, 1)
    for found in pool.run(world, ranks.few_rows):
        for values, expected in zip(found, one, strict=True):
            cases.assert_same_bits(values, expected)


# ---------------------------------------------------------------------- owners that fail


@by_layout
def test_refresh_that_fails_on_one_owner(layout, world):
    found = pool.run(world, ranks.refresh_that_fails, layout, 1)
    sound = ranks.refresh_that_fails(0, 1, "owners", None)
    assert sound[1:] == (0, [])
    for values, failures, warned in found:
        cases.assert_same_bits(values, found[0][0])
        assert all(torch.isfinite(value).all() for value in values)
        assert failures == found[0][1] > 0
        assert len(warned) == 1
    # Blocks of other owners have not noticed.
    assert any(torch.equal(a[:8, :8], b[:8, :8]) for a, b in zip(found[0][0], sound[0], strict=True) if a.ndim > 1)


@by_layout
def test_update_that_is_nan_is_left_out(layout, world):
    """One block stays where it is on all ranks; the others move, and all ranks count the failure."""
    found = pool.run(world, ranks.update_that_is_nan, layout)
    for before, after, told in found:
        cases.assert_same_bits(after, found[0][1])
        assert all(torch.isfinite(p).all() for p in after)
        assert told["refresh_failures"] == found[0][2]["refresh_failures"] > 0
        still = sum(int((a == b).sum()) for a, b in zip(before, after, strict=True))
        assert 0 < still <= 64 * 4 < sum(p.numel() for p in after)


# ---------------------------------------------------------------------- loads that do not fit


def test_state_dict_that_is_wrong_on_one_rank():
    told = pool.run(2, ranks.loads_that_do_not_fit)
    for layout in ("owners", "rows"):
        one = ranks.build("owners", 1)
        for number in range(4):
            ranks.step(*one, number)
        for found in told:
            cases.assert_same_bits(found.pop((layout, "after")), ranks.copies(one[0]))
    for (layout, name), message in same(told).items():
        if name == "other_betas":
            assert message.startswith("ValueError: SOAP: betas of group 0 differs: '(0.9, 0.95)' on process 0, '(0.5,")
        else:
            assert message.startswith("ValueError: process 1: "), (layout, name, message)


# ---------------------------------------------------------------------- ranks that are gone


@by_layout
def test_exception_before_a_step(layout, world):
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        pool.run(world, ranks.raising_before_its_step, layout)
    message = str(caught.value)
    assert "rank 0 of" in message and "the loader has no more data" in message
    assert message.count("nothing has changed after") >= world - 1
    assert time.monotonic() - start < 15  # the pool's own limit is 20


@pytest.mark.parametrize("layout", ["owners", "rows"])
def test_death_between_the_collectives(layout):
    with pytest.raises(AssertionError) as caught:
        pool.run(3, ranks.killed_between_the_collectives, layout)
    message = str(caught.value)
    assert "rank 2 of 3 died by SIGKILL" in message
    assert "rank 0 of 3 raised" in message and "rank 1 of 3 raised" in message

"""The same parameters, bit for bit, for every number of processes and every layout of the parameters."""

import pytest

import cases
from distributed import pool, worlds

pytestmark = pytest.mark.dist

QUICK = ("SOAP", "SIRFShampoo", "AdamW")
CLASSES = [
    pytest.param(case, id=name, marks=[] if name in QUICK else pytest.mark.slow)
    for case in cases.OPTIMIZERS
    for name in [case.cls.__name__]
]
WORLDS = [(layout, world) for layout, sizes in worlds.LAYOUTS.items() for world in sizes]


def alone(case, options, **more):
    """One process, plain parameters."""
    return worlds.trained(0, 1, case.cls.__name__, "owners", options, **more)


@pytest.mark.parametrize("case", CLASSES)
@pytest.mark.parametrize(("layout", "world"), WORLDS, ids=lambda v: str(v).replace(" ", "_"))
def test_parameters_have_the_bits_of_one_process(case, layout, world):
    options = {"reproducible": True}
    if case.takes("max_block_size"):
        options["max_block_size"] = 8
    if world == 4 and case.takes("max_block_size"):
        options |= {"weight_decay": 0.1, "weight_decay_kind": "coupled", "max_update_rms": 0.5}
    one = alone(case, options)
    ranks = pool.run(world, worlds.trained, case.cls.__name__, layout, options)
    for found in ranks:
        cases.assert_same_bits(found["values"], one["values"])
        assert found["norm"] == pytest.approx(one["norm"], rel=1e-6)
        assert found["norm"] == ranks[0]["norm"]
        assert all(count == (8 if world > 1 else 0) for count in found["exchanges"])
    assert sum(found["bytes"] for found in ranks) == one["bytes"]
    assert set().union(*(found["state"] for found in ranks)) == set(one["state"])

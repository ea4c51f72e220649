"""A step launches as many operations for many parameters of a shape as for few: it costs launches per bucket."""

from collections import Counter

import cases
from cases import Launches


def launches(case, options, count: int) -> Counter[str]:
    """Of one step between refreshes, with `count` matrices, convolutions and vectors."""
    if case.takes("refresh_every"):  # decompositions run matrix by matrix on a CPU
        options = {**options, "refresh_every": 100, "refresh": "together"}
    params = cases.parameters([shape for shape in ((6, 5), (4, 3, 2, 2), (6,)) for _ in range(count)])
    optimizer = case.make(params, **options)
    cases.train(optimizer, params, range(3))
    cases.feed(params, 3)
    with Launches() as counting:
        optimizer.step()
    return counting.found


@cases.variants(
    default={},
    split={"max_block_size": 3},
    momentum={"momentum": "update"},
    coupled={"weight_decay_kind": "coupled", "weight_decay": 0.1},
    clipped={"max_update_rms": 1.0},
)
def test_launches_do_not_grow_with_the_number_of_parameters(case, options):
    few, many = launches(case, options, 3), launches(case, options, 11)
    assert many - few == Counter()

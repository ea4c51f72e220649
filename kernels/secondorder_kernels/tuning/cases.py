"""All cases, by how many are wanted."""

from __future__ import annotations

import itertools

from secondorder_kernels.tuning import elementwise, factors, products
from secondorder_kernels.tuning.case import Case

SIZES = ("quick", "all")  # and "tiny", for checks

_MAKERS = (
    products.ema_syrk,
    elementwise.adam_direction,
    products.ema_syrk_pair,
    factors.multiply_update,
    factors.adam_in_basis,
    products.gram,
    elementwise.root_free,
    products.symmetric_product,
    factors.symmetrise,
    elementwise.apply_update,
    elementwise.adamw,
    elementwise.graft,
    elementwise.stochastic_round,
    products.add_gram,
    factors.diagonal,
    factors.block_apply,
    factors.orthogonalize,
)


def cases(sizes: str) -> list[Case]:
    """Cases of all operations, in turn, so that a budget that is spent has left something for each.

    Args:
        sizes: "quick", "all", or "tiny": shapes that Triton's interpreter takes in a moment.
    """
    turns = itertools.zip_longest(*(make(sizes) for make in _MAKERS))
    return [case for turn in turns for case in turn if case is not None]

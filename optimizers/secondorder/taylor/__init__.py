"""Differential operators of models in their inputs, by collapsed Taylor mode: one pass forward.

    from secondorder import taylor

    u, laplacian = taylor.laplacian(model, x)

An unmodified model is called with a Taylor jet in place of its inputs. Rules exist for linear maps, element-wise
functions, sums, products, norms, layer normalisation, concatenation, indices and shapes of the features; anything else
is refused by a TypeError that names the function and the module that called it. Results are ordinary tensors with a
graph to the parameters, so a loss of them is differentiated as ever.

An operator whose model is, or contains, another operator gives mixed derivatives of any order; `biharmonic` is the
Laplacian of the Laplacian.
"""

from secondorder.taylor import arithmetic as _arithmetic  # noqa: F401  registers its rules
from secondorder.taylor import axes as _axes  # noqa: F401
from secondorder.taylor import elementwise as _elementwise  # noqa: F401
from secondorder.taylor.operators import (
    biharmonic,
    gradient,
    laplacian,
    laplacian_estimate,
    second_order,
    value,
    value_gradient_laplacian,
)

__all__ = [
    "biharmonic",
    "gradient",
    "laplacian",
    "laplacian_estimate",
    "second_order",
    "value",
    "value_gradient_laplacian",
]

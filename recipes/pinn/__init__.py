"""Partial differential equations for physics-informed networks, each with a solution to compare with.

One file per family of problems; `problem.py` says what a problem is, `points.py` where its residuals are taken. The
recipe that trains them is `tasks/pinn.py`, the benchmark is `benchmark_pinn.py`.
"""

from __future__ import annotations

from convert import suggestion
from errors import RecipeError
from pinn.burgers import Burgers
from pinn.fokker_planck import FokkerPlanck
from pinn.heat import HEAT1D, HEAT4D
from pinn.inverse import Transport
from pinn.plate import Plate
from pinn.poisson import POISSON2D, POISSON5D, POISSON100D
from pinn.problem import Problem

PROBLEMS: dict[str, Problem] = {
    "poisson2d": POISSON2D,
    "poisson5d": POISSON5D,
    "poisson100d": POISSON100D,
    "heat1d": HEAT1D,
    "heat4d": HEAT4D,
    "fokker_planck3d": FokkerPlanck(3),
    "fokker_planck9d": FokkerPlanck(9),
    "plate": Plate(),
    "transport": Transport(),
    "burgers": Burgers(),
}


def load(name: str) -> Problem:
    """A problem by its name.

    Raises:
        RecipeError: There is no such problem.
    """
    if name not in PROBLEMS:
        raise RecipeError(
            f"data.problem: expected one of {', '.join(PROBLEMS)}, got {name!r}{suggestion(name, PROBLEMS)}"
        )
    return PROBLEMS[name]

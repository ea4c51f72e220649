"""The picture of a solution: the exact one, the network's, and the error between them, on a slice of the domain."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pinn.problem import Problem
from runfolder import replacing

SIDE = 201


def draw(problem: Problem, model: nn.Module, title: str, path: Path) -> str:
    """Draw solution.png.

    Args:
        problem: What was solved.
        model: Its network.
        title: Of the picture.
        path: Where it goes.

    Returns:
        Where it is, or why it is not there.
    """
    try:
        import matplotlib
    except ImportError:
        return "none: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    x = problem.slice(SIDE)
    device = next(model.parameters()).device
    with torch.no_grad():
        exact, found = problem.solution(x), model(x.to(device)).cpu()
    error = (found - exact).abs()
    top = max(float(error.max()), 1e-16)
    same = {"cmap": "viridis", "vmin": float(exact.min()), "vmax": float(exact.max())}
    three_decades = {"cmap": "magma", "norm": LogNorm(top / 1e3, top)}
    panels = [
        ("exact", exact, same),
        ("network", found, same),
        (f"|network - exact|, at most {top:.1e}", error.clamp(min=top / 1e3), three_decades),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained", sharey=True)
    extent = (*problem.box[0], *problem.box[1])
    for axis, (name, field, scale) in zip(axes, panels, strict=True):
        # The first input runs along the rows of the slice, and is drawn from left to right.
        pixels = field.reshape(SIDE, SIDE).T.numpy()
        image = axis.imshow(pixels, origin="lower", extent=extent, aspect="auto", **scale)
        figure.colorbar(image, ax=axis, pad=0.02)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(problem.axes[0])
    axes[0].set_ylabel(problem.axes[1])
    others = "" if len(problem.axes) == 2 else f"; {', '.join(_shown(problem.axes[2:]))} in the middle"
    figure.suptitle(f"{title}{others}", fontsize=11)
    with replacing(path, "the picture") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)
    return str(path)


def _shown(names: tuple[str, ...]) -> tuple[str, ...]:
    return names if len(names) <= 3 else (names[0], "…", names[-1])

"""`python -m secondorder`: what is installed, what this machine offers, and whether the methods work on it.

Prints the versions, the devices, the optimizers and the path that each kernel takes here, then trains a small
ill-conditioned problem with every optimizer. The exit code is 1 if one of them does not bring the loss down.
"""

import importlib.metadata
import inspect
import math
import platform
import sys
import time

import torch

import secondorder
import secondorder_kernels

SECONDS = 2.0  # for the self-check of all methods together
STEPS = 100  # enough for every method to pass its first refreshes
LR = 0.02


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """One line for the CPU and one for each GPU."""
    lines = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        lines.append(f"cuda:{index} ({torch.cuda.get_device_name(index)})")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return lines


def methods() -> list[type[torch.optim.Optimizer]]:
    """The public optimizer classes, in the order of `secondorder.__all__`."""
    public = (getattr(secondorder, name) for name in secondorder.__all__)
    return [item for item in public if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer)]


def first_line(cls: type) -> str:
    """First line of a class's docstring, without the class's name."""
    return (inspect.getdoc(cls) or "").partition("\n")[0].removeprefix(f"{cls.__name__}: ")


def train(cls: type[torch.optim.Optimizer], seconds: float) -> tuple[float, float, int]:
    """Fits a linear layer to a teacher on correlated inputs (condition number of the Hessian: 1e4).

    Args:
        cls: The optimizer class; constructed with a learning rate and defaults.
        seconds: Stop after this time, at the latest after `STEPS` steps.

    Returns:
        The first and the last loss, and the number of steps taken.
    """
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    inputs = torch.linalg.qr(torch.randn(64, 16, generator=generator)).Q * torch.logspace(1, -1, 16) @ rotation
    targets = inputs @ torch.randn(16, 8, generator=generator)
    layer = torch.nn.Linear(16, 8)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = cls(layer.parameters(), lr=LR, module=layer)  # type: ignore[call-arg]

    losses: list[float] = []
    end = time.perf_counter() + seconds
    while len(losses) <= STEPS and (len(losses) < 2 or time.perf_counter() < end):
        optimizer.zero_grad()
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[0], losses[-1], len(losses) - 1


def self_check() -> bool:
    """Trains with every method and prints one line for each.

    Returns:
        Whether the loss fell for all of them.
    """
    classes = methods()
    passed = True
    for cls in classes:
        try:
            before, after, steps = train(cls, SECONDS / len(classes))
        except Exception as error:  # one broken method must not hide the verdict on the others
            print(f"  {cls.__name__:<28} FAILED: {type(error).__name__}: {error}")
            passed = False
            continue
        fell = math.isfinite(after) and after < before
        print(f"  {cls.__name__:<28} {'ok' if fell else 'FAILED'}: loss {before:.4g} -> {after:.4g} in {steps} steps")
        passed &= fell
    return passed


def main() -> int:
    """Prints the report and runs the self-check.

    Returns:
        The exit code: 0, or 1 if a method failed the self-check.
    """
    print("versions")
    print(f"  secondorder  {installed_version('secondorder')}")
    print(f"  torch        {torch.__version__}")
    print(f"  python       {platform.python_version()} ({sys.platform})")
    print(f"  triton       {installed_version('triton')}")

    print("devices")
    for line in devices():
        print(f"  {line}")

    print("methods")
    for cls in methods():
        print(f"  {cls.__name__:<28} {first_line(cls)}")

    print("kernels")
    for operation, path, reason in secondorder_kernels.explain_all():
        print(f"  {operation:<24} {path}: {reason}")

    print("self-check")
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main())

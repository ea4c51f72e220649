"""What a type checker says of users' code: `mypy --strict` knows every option of every class, and nothing else."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import secondorder

ROOT = Path(__file__).parents[2]
# As for an installed package: its types count, complaints about its own code do not.
CONFIG = """[mypy]
strict = true
mypy_path = {path}
[mypy-secondorder.*,secondorder_kernels.*]
follow_imports = silent
"""
PRELUDE = """import torch
from torch import Tensor, nn

import secondorder
from secondorder.base import PreconditionedOptimizer
from secondorder.convert import load_singd, load_soap
from secondorder.trainers import for_trainer

model = nn.Linear(3, 2)
params = list(model.parameters())
"""
RIGHT = """
soap = secondorder.SOAP(params, 3e-3, (0.9, 0.95), refresh_every=10, refresh="together", max_block_size=None)
kfac = secondorder.KFAC(model.parameters(), lr=torch.tensor(1e-2), module=model, sharing="reduce", kl_clip=1e-3)
groups = secondorder.AdamW([{"params": params, "lr": 1e-3}], weight_decay_kind="l2", on_nonfinite="raise")
singd = secondorder.SINGD(model.named_parameters(), structures=("dense", "block(32)"), module=model)
every: list[torch.optim.Optimizer] = [soap, kfac, groups, singd]
base: PreconditionedOptimizer = soap


def closure() -> Tensor:
    return model(torch.ones(1, 3)).sum()  # type: ignore[no-any-return]


soap.step()
soap.step(closure)
names: list[str] = [row.name for row in soap.coverage()]
total: int = soap.memory_report().total
numbers: dict[str, float] = soap.diagnostics()
moved: Tensor = soap.preconditioner(params[0]) @ torch.ones(6)
kfac.attach(model)
kfac.fisher_backward(model(torch.ones(1, 3)), "cross_entropy", kind="mc")
load_soap(soap, {}, rotated_momentum=False)
load_singd(singd, {}, strict=False)
made: secondorder.KFAC = for_trainer(secondorder.KFAC)()(model, lr=1e-2)
schedule = torch.optim.lr_scheduler.StepLR(soap, 10)
"""
WRONG = """
secondorder.SOAP(params, refresh_evry=10)  # E: call-arg
secondorder.SOAP(params, refresh="sometimes")  # E: arg-type
secondorder.SOAP(params, refresh_every="10")  # E: arg-type
secondorder.SOAP(params, betas=(0.9,))  # E: arg-type
secondorder.SOAP(params, 1e-3, (0.9, 0.95), 1e-8)  # E: call-arg
secondorder.AdamW(params, refresh_every=10)  # E: call-arg
secondorder.KFAC(params, sharing="all")  # E: arg-type
secondorder.KFAC(params, module="model")  # E: arg-type
secondorder.SINGD(params, structures=("dense",))  # E: arg-type
secondorder.Shampoo(params, foreach=True)  # E: call-arg
secondorder.SOAP(params).covrage()  # E: attr-defined
load_soap(secondorder.AdamW(params), {})  # E: arg-type
"""


CLASSES = [name for name in secondorder.__all__ if inspect.isclass(getattr(secondorder, name))]


def every_option() -> str:
    """One call per class that names each of its arguments, with a value of the default's type."""
    lines = []
    for name in CLASSES:
        parameters = list(inspect.signature(getattr(secondorder, name)).parameters.values())[1:]
        given = ", ".join(f"{p.name}={p.default!r}" for p in parameters)
        lines.append(f"secondorder.{name}(params, {given})\n")
    return "".join(lines)


@pytest.mark.slow
def test_mypy_strict_accepts_right_code_and_finds_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    source = PRELUDE + RIGHT + every_option() + WRONG
    (tmp_path / "user.py").write_text(source, encoding="utf-8")
    path = f"{ROOT / 'optimizers'}:{ROOT / 'kernels'}"
    (tmp_path / "mypy.ini").write_text(CONFIG.format(path=path), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=mypy.ini",
        "--hide-error-context",
        "--no-error-summary",
        "user.py",
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    told = {(int(line), code) for line, code in re.findall(r"user\.py:(\d+): error: .*\[([\w-]+)\]", found.stdout)}
    marked = ((i, re.search(r"# E: ([\w-]+)$", line)) for i, line in enumerate(source.splitlines(), 1))
    assert told == {(i, match[1]) for i, match in marked if match}, found.stdout + found.stderr


def test_each_class_has_its_algorithm_and_all_sections() -> None:
    """`help` reads like a paper's box: equations, source, arguments with shapes and defaults, errors."""
    for name in CLASSES:
        text = inspect.getdoc(getattr(secondorder, name)) or ""
        head, _, rest = text.partition("\nArgs:")
        assert re.search(r"^ {4}\S.*(<-|=)", head, flags=re.MULTILINE), f"{name} states no equation"
        assert "Source: " in head or "torch.optim" in head, f"{name} names no source"
        assert "\nRaises:" in rest, name


def test_documented_defaults_are_those_of_the_signature() -> None:
    """Every argument says `Default: ...`, and says the truth."""
    for name in CLASSES:
        cls = getattr(secondorder, name)
        args = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2].partition("\nRaises:")[0]
        entries = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", args, flags=re.MULTILINE | re.DOTALL))
        parameters = inspect.signature(cls).parameters
        assert entries.keys() == parameters.keys(), name
        for argument, parameter in parameters.items():
            found = re.search(r"Default:\s+(.+?)\.\s*$", entries[argument], flags=re.DOTALL)
            if argument in ("params", "process_group", "grad_scaler"):
                continue
            assert found, f"{name}({argument}) has no default in its doc-string"
            said = eval(found[1].strip("`"))  # noqa: S307 -- our own doc-strings
            assert said == parameter.default, f"{name}({argument}): {said!r}, but {parameter.default!r}"

"""Rules of the kernel package that no compiler holds: precision is named, tuning is explicit, imports need nothing."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secondorder_kernels
from secondorder_kernels import dispatch

PACKAGE = Path(__file__).parents[2] / "kernels" / "secondorder_kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
OPERATIONS = sorted(dispatch.operations())
OTHERS = {"explain", "explain_all", "fingerprint", "use_kernels", "cholesky_qr", "mix", "row_keys"}


def violations(source: str) -> list[str]:
    """What a file of the package must not contain, as found in `source`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.dot", "tl.dot_scaled", "triton.language.dot"):
            if not any(keyword.arg == "input_precision" for keyword in node.keywords):
                found.append(f"line {node.lineno}: a dot product whose input_precision is Triton's choice")
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("triton.autotune", "triton.heuristics")):
            found.append(f"line {node.lineno}: {ast.unparse(node)}, which times kernels in the middle of a step")
        elif isinstance(node, ast.Attribute) and node.attr.startswith("atomic_"):
            found.append(f"line {node.lineno}: {node.attr}, whose order of additions is any")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "triton":
            found.append(f"line {node.lineno}: names imported from {node.module}, which this test cannot follow")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_kernels_keep_the_rules(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "acc = tl.dot(a, b, acc)",
        "@triton.autotune(configs=[], key=[])\n@triton.jit\ndef kernel(): pass",
        "@triton.heuristics({})\n@triton.jit\ndef kernel(): pass",
        "tl.atomic_add(p, x)",
        "from triton.language import dot",
    ],
)
def test_each_violation_is_found(source: str) -> None:
    assert violations(source)


def test_what_is_permitted_is_no_violation() -> None:
    assert violations("import triton.language as tl\nacc = tl.dot(a, b, acc, input_precision=PRECISION)") == []


# imports

FORBID_TRITON = """
import importlib.machinery
import sys

class Forbid:  # what asks whether Triton is installed gets its answer, what imports it an error
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise AssertionError(f"{spec.name} is imported")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Forbid())
import torch
torch.cuda._lazy_init = lambda: 1 / 0
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_imports_and_calls_on_a_cpu_need_neither_triton_nor_cuda() -> None:
    code = FORBID_TRITON + (
        "import secondorder, secondorder_kernels as kernels\n"
        "kernels.ema_syrk_(torch.zeros(1, 2, 2), torch.ones(1, 2, 3), torch.ones(1))\n"
        "kernels.explain_all()\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    )
    result = run(code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


def test_an_unknown_mode_in_the_environment_is_an_error_at_import() -> None:
    result = run("import secondorder_kernels", SECONDORDER_KERNELS="nonsense")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: the environment variable SECONDORDER_KERNELS must be one of auto, reference")
    assert last.endswith("got 'nonsense'")


def test_every_kernel_module_can_be_imported() -> None:
    pytest.importorskip("triton")
    names = [f"secondorder_kernels.triton.{path.stem}" for path in (PACKAGE / "triton").glob("[!_]*.py")]
    result = run("".join(f"import {name}\n" for name in names))
    assert result.returncode == 0, result.stderr


# operations


def test_operations_are_what_the_package_offers() -> None:
    assert set(secondorder_kernels.__all__) == {*OPERATIONS, *OTHERS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_a_reference_and_the_schema_of_its_arguments(name: str) -> None:
    operation = dispatch.operations()[name]
    assert operation.reference.__name__ == name
    assert operation.reference.__module__.startswith("secondorder_kernels.reference.")
    schema = operation.registered._schema
    parameters = inspect.signature(operation.reference).parameters.values()
    assert [argument.name for argument in schema.arguments] == [parameter.name for parameter in parameters]
    for argument, parameter in zip(schema.arguments, parameters, strict=True):
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY), argument.name
        assert argument.has_default_value() == (parameter.default is not parameter.empty), argument.name
        if argument.has_default_value():
            assert argument.default_value == parameter.default, argument.name


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_changes_its_arguments_or_returns_results_and_its_name_tells_which(name: str) -> None:
    schema = dispatch.operations()[name].registered._schema
    changes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    assert changes == name.endswith("_") == (not schema.returns)
    assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_documented(name: str) -> None:
    function = getattr(secondorder_kernels, name)
    assert function.__doc__ and "Raises:" in function.__doc__
    assert torch.Tag.pt2_compliant_tag in dispatch.operations()[name].registered.tags

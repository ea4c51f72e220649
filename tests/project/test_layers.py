"""A method's file states mathematics: it knows no rank, hook or kernel, and the engine does not know it.

import-linter holds the arrows between the named floors (`pyproject.toml`). It cannot name a part of an external
package such as `torch.distributed`, nor a method that somebody adds later; this file finds the methods itself.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import secondorder

PACKAGE = Path(__file__).parents[2] / "optimizers" / "secondorder"
NOT_METHODS = {"checkpoint", "__init__", "__main__", "base", "linalg", "trainers", "convert"}
METHODS = sorted(path for path in PACKAGE.glob("*.py") if path.stem[0] != "_" and path.stem not in NOT_METHODS)
ABOVE_METHODS = [PACKAGE / name for name in ("__init__.py", "__main__.py", "convert.py")]
FORBIDDEN_IMPORTS = ("torch.distributed", "torch.utils.hooks", "secondorder_kernels", "triton")
FORBIDDEN_NAMES = {"DTensor", "DeviceMesh", "saved_tensors_hooks"}


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute dotted name of everything imported, wherever in the file; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(source: str) -> list[str]:
    """What a method's file must not contain, as found in `source`."""
    tree = ast.parse(source)
    found = [
        f"imports {name}"
        for name in imported(tree, "secondorder")
        if any(within(name, forbidden) for forbidden in FORBIDDEN_IMPORTS) or name.rpartition(".")[2] in FORBIDDEN_NAMES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node) == "torch.distributed" or node.attr in FORBIDDEN_NAMES:
                found.append(f"uses {ast.unparse(node)}")
            elif node.attr.startswith("register_") and node.attr.endswith("hook"):
                found.append(f"registers a hook: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_file_knows_no_rank_hook_or_kernel(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_file_defines_a_public_optimizer(path: Path) -> None:
    classes = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)}
    assert classes & set(secondorder.__all__), f"{path.name} is no method: give it an underscore or a place in a floor"


def test_methods_are_found() -> None:
    assert {"soap", "adamw"} <= {path.stem for path in METHODS}


def test_engine_imports_no_method() -> None:
    methods = [f"secondorder.{path.stem}" for path in METHODS]
    for path in PACKAGE.rglob("*.py"):
        if path in METHODS or path in ABOVE_METHODS:
            continue
        package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        names = imported(ast.parse(path.read_text(encoding="utf-8")), package)
        assert [name for name in names if any(within(name, method) for method in methods)] == [], path


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "def step():\n    from torch.distributed.tensor import DTensor",
        "from secondorder.layout import DTensor",
        "import torch\ntorch.distributed.get_rank()",
        "from secondorder_kernels import gram",
        "import triton.language as tl",
        "def attach(self, module):\n    module.register_full_backward_hook(self.tap)",
        "import torch\nwith torch.autograd.graph.saved_tensors_hooks(pack, unpack): pass",
    ],
)
def test_each_violation_is_found(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    ["import torch", "from secondorder._optimizer import PreconditionedOptimizer", "from .preconditioner import modes"],
)
def test_permitted_imports_are_no_violation(source: str) -> None:
    assert violations(source) == []


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from . import soap\nfrom .soap import SOAP\nfrom ..linalg import qr")
    assert list(imported(tree, "secondorder.layout")) == [
        "secondorder.layout.soap",
        "secondorder.layout.soap.SOAP",
        "secondorder.linalg.qr",
    ]

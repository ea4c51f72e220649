"""The README's commands, examples and tables hold."""

import inspect
import re
from pathlib import Path

import torch

import secondorder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_two_commands_of_one_line_each_do_their_own_setup() -> None:
    train, test = blocks("sh")
    for command in (train, test):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ")
    assert train.endswith(" && .venv/bin/torchrun --standalone recipes/train.py --config configs/lm_tiny.yaml\n")
    assert test.endswith(" && .venv/bin/python -m pytest -n 2\n")


def test_named_files_exist() -> None:
    paths = re.findall(r"\b(?:recipes|configs)/[\w./]*\w|\.ci/\w+", README)
    paths += re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(paths) > 4
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_python_example_runs(capsys) -> None:
    for example in blocks("python"):
        torch.manual_seed(0)
        exec(compile(example, "README.md", "exec"), {})
        assert capsys.readouterr().out


def test_table_names_every_public_optimizer() -> None:
    section = README.partition("\n## Methods\n")[2].partition("\n## ")[0]
    public = {name for name in secondorder.__all__ if inspect.isclass(getattr(secondorder, name))}
    assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == public

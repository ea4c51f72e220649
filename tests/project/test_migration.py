"""The README's migration section: its lines run, its names exist, its measured factors are those of the configs."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import secondorder
import secondorder.convert

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Migration\n")[2].partition("\n## ")[0]
PARTS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", SECTION, flags=re.MULTILINE | re.DOTALL))
TASKS = ("lm_tiny", "autoencoder", "vision_conv", "vision_vit")  # the table's columns
ROWS = {"SOAP` at": "soap_reference", "torch.optim.Muon": "torch.muon"}


@pytest.fixture
def checkpoints(monkeypatch):
    """`torch.load` finds checkpoints of the peers that fit the network of the examples."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False))
    shapes = [tuple(p.shape) for p in model.parameters()]

    class Dense:
        def __init__(self, d):
            self.d = d

        def to_dense(self):
            return torch.eye(self.d)

    def soap(shape):
        factors = [torch.eye(d) for d in shape]
        return {"step": 3, "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape), "GG": factors, "Q": factors}

    groups = [{"betas": (0.95, 0.95), "T": 2, "params": [0, 1]}]
    files = {
        "soap.pt": {"state": {i: soap(shape) for i, shape in enumerate(shapes)}, "param_groups": groups},
        "singd.pt": {
            "state": {},
            "param_groups": groups,
            "steps": 3,
            "Ks": {"0": Dense(4), "2": Dense(6)},
            "Cs": {"0": Dense(6), "2": Dense(5)},
        },
    }
    monkeypatch.setattr(torch, "load", lambda name, **how: files[name])
    return model


@pytest.mark.parametrize("part", PARTS)
def test_new_lines_run_and_train(part, checkpoints):
    lines = [
        line[2:]
        for block in re.findall(r"^```diff\n(.*?)^```$", PARTS[part], flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if line.startswith("+ ")
    ]
    assert lines
    names = {"torch": torch, "secondorder": secondorder, "model": checkpoints}
    exec("\n".join(lines), names)
    for _ in range(3):
        names["optimizer"].zero_grad()
        checkpoints(torch.randn(8, 4)).square().mean().backward()
        names["optimizer"].step()
    assert all(p.isfinite().all() for p in checkpoints.parameters())


@pytest.mark.parametrize("part", PARTS)
def test_names_in_the_right_column_exist(part):
    """Each `name` or `name=value` is an argument of the column's class, with a value that it takes."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PARTS[part].splitlines() if line[:1] == "|"]
    (head, _, *rows) = rows
    cls = getattr(secondorder, re.fullmatch(r"`secondorder\.(\w+)`", head[1])[1])
    known = inspect.signature(cls).parameters
    parameters = [nn.Parameter(torch.zeros(3, 2))]
    for _, ours in rows:
        for code in re.findall(r"`([^`]*)`", ours):
            name, equals, value = code.partition("=")
            if re.fullmatch(r"\w+", name) and name not in secondorder.__all__ and not name.startswith('"'):
                assert name in known, f"{part}: {code}"
                if equals:
                    cls(parameters, **{name: eval(value), "module": nn.ParameterList(parameters)})


def test_measured_factors_are_those_of_the_configs():
    """To the nearest step of the grid: 0.3, 1, 3, 10."""
    table = [line for line in SECTION.partition("\n### ")[0].splitlines() if line.startswith("| `")]
    assert len(table) == 7
    for line in table:
        name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        key = next((k for start, k in ROWS.items() if start in name), re.search(r"\w+", name)[0].lower())
        for task, cell in zip(TASKS, cells, strict=True):
            tuned = yaml.safe_load((ROOT / "configs" / f"{task}.yaml").read_text(encoding="utf-8"))["tuned_lr"]
            if key in tuned:
                steps = 2 * math.log10(float(tuned[key]) / float(tuned["adamw"]))
                assert {-1: "0.3", 0: "1", 1: "3", 2: "10"}[round(steps)] == cell, f"{name}, {task}"
            else:
                assert cell == "–" or "not searched" in cell or "likewise" in cell, f"{name}, {task}"

"""Replays recorded trajectories of reference implementations: gradients go in, parameters must come out.

Files are looked for in `tests/golden` and, recursively, in the folders of the environment variable GOLDEN_DIR
(`:`-separated). A file is replayed by the class that its metadata names, or by its own name (`golden_*.py`: recordings
of more than gradients and parameters). Parameters whose recorded trajectory depends on rounding (recorded sensitivity)
are counted as unchecked, never as passed.
"""

import importlib
import json
import math
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secondorder
from peers.flagship import PeerInverseFreeKLShampoo
from peers.meta import PeerShampoo
from peers.soap import PeerSOAP, inject

CORE = Path(__file__).parent / "golden"
FOLDERS = [CORE, *(Path(part) for part in os.environ.get("GOLDEN_DIR", "").split(os.pathsep) if part)]
FILES = {path.resolve(): path for folder in FOLDERS for path in sorted(folder.rglob("*.npz"))}

# By pattern of file names, of all modules `golden_*.py`: z -> {what was compared: (relative deviation, tolerance)}; the
# tolerance inf marks what is ill-posed.
BY_NAME: dict[str, Callable[[Any], dict[str, tuple[float, float]]]] = {}
for module in sorted(Path(__file__).parent.glob("golden_*.py")):
    BY_NAME.update(importlib.import_module(module.stem).REPLAYS)

# Methods that are not built yet: the first pattern that fits a file's name says which issue brings its replay.
DEFERRED = (
    ("*_peerbug*", "a peer's bug as shipped, never a target"),
    ("asdl_*", "deferred: named by an index, but no such file was ever seen"),
    ("*_problem_engdw", "replayed in tests/test_linearization.py and tests/test_residual_solve.py"),
    ("*_spring", "replayed in tests/test_residual_solve.py"),
    ("*_kfac", "replayed in tests/test_residual_layers.py and tests/test_residual_kfac.py"),
)


def by_name(name: str) -> str | None:
    """The pattern of the replay that takes a file by its name."""
    return next((pattern for pattern in BY_NAME if fnmatch(name, pattern)), None)


def deferral(name: str) -> str | None:
    if by_name(name) and "_peerbug" not in name:
        return None
    return next((reason for pattern, reason in DEFERRED if fnmatch(name, pattern)), None)


class Soap:
    """`cls: SOAP`: the reference's quirks, its first bases injected."""

    names = "soap_*"

    def __init__(self, z: Any, hp: dict[str, Any]) -> None:
        self.permuted = hp.pop("data_format", "channels_first") == "channels_last" and hp.get("merge_dims", False)
        self.bases: dict[str, dict[int, torch.Tensor]] = {}
        for key in z.files:
            if key.startswith("Qinit/"):
                _, name, axis = key.split("/")
                self.bases.setdefault(name, {})[int(axis)] = torch.from_numpy(z[key])
        self.hp = hp

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(0, 3, 1, 2) if self.permuted and tensor.ndim == 4 else tensor

    def start(self, params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return PeerSOAP(params.values(), **self.hp)

    def after(self, optimizer: Any, step: int, params: dict[str, nn.Parameter]) -> None:
        if step == 0:
            for name, bases in self.bases.items():
                inject(optimizer, params[name], bases)


class Meta:
    """`cls: DistributedShampoo`: Meta's quirks; parameters without a gradient age with their group."""

    names = "meta_*"

    def __init__(self, z: Any, hp: dict[str, Any]) -> None:
        self.hp = hp

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def start(self, params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return PeerShampoo(params.values(), **self.hp)

    def after(self, optimizer: Any, step: int, params: dict[str, nn.Parameter]) -> None:
        for p in params.values():
            if p.grad is None:
                optimizer.count_missed(p)


class Flagship:
    """`method: InverseFreeKLShampoo`: our class, every parameter one block of all its axes."""

    names = "ifkl_*"

    def __init__(self, z: Any, hp: dict[str, Any]) -> None:
        self.hp = hp

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def start(self, params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return PeerInverseFreeKLShampoo(params.values(), **self.hp)

    def after(self, optimizer: Any, step: int, params: dict[str, nn.Parameter]) -> None:
        pass


class AdamW:
    """`cls: torch.optim.AdamW`: our class as it is."""

    names = "torch_adamw_*"

    def __init__(self, z: Any, hp: dict[str, Any]) -> None:
        self.hp = hp

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def start(self, params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return secondorder.AdamW(params.values(), **self.hp)

    def after(self, optimizer: Any, step: int, params: dict[str, nn.Parameter]) -> None:
        pass


REPLAYS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "SOAP": Soap,
    "DistributedShampoo": Meta,
    "torch.optim.AdamW": AdamW,
    "InverseFreeKLShampoo": Flagship,
}


def described(z: Any) -> dict[str, Any] | None:
    """What a file says of itself: class, hyper-parameters, dtype, steps, and float32 tolerance; None if nothing."""
    if "hp" in z.files:
        return {"single": 1e-5, "lr": z["lr"], **json.loads(str(z["hp"]))}
    if "meta" not in z.files or "method" not in (meta := json.loads(str(z["meta"]))):
        return None
    lr = meta["hp"].pop("lr", 1e-2)
    rates = lr if isinstance(lr, list) else [lr] * meta["steps"]
    hp = {**meta["hp"], "longest_dense": meta["max_dense_dim"]} if "max_dense_dim" in meta else meta["hp"]
    return {**meta, "single": 1e-4, "lr": rates, "cls": meta["method"], "hp": hp}


def sensitivity(z: Any, name: str) -> float:
    if f"sens_q0/{name}" in z.files:
        return float(z[f"sens_q0/{name}"])
    return max(float(z[key]) for kind in ("eigh", "grad") if (key := f"sens_{kind}/{name}") in z.files)


def replay(z: Any, meta: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Largest deviation over all steps, and sensitivity, by parameter."""
    how = REPLAYS[meta["cls"]](z, dict(meta["hp"]))
    names = [str(n) for n in z["names"]]
    # numpy keeps 0-d entries; from_numpy of an indexed row would share memory with the file's array
    tensors = {kind: {n: torch.tensor(z[f"{kind}/{n}"]) for n in names} for kind in ("init", "grads", "traj")}
    params = {n: nn.Parameter(how.layout(tensors["init"][n])) for n in names}
    optimizer = how.start(params)
    deviation = dict.fromkeys(names, 0.0)
    for t in range(meta["steps"]):
        optimizer.param_groups[0]["lr"] = float(meta["lr"][t])
        for i, n in enumerate(names):
            here = "has_grad" not in z.files or z["has_grad"][t, i]
            params[n].grad = how.layout(tensors["grads"][n][t]) if here else None
        optimizer.step()
        how.after(optimizer, t, params)
        for n in names:
            off = (params[n].detach() - how.layout(tensors["traj"][n][t])).abs().max()
            deviation[n] = max(deviation[n], float(torch.nan_to_num(off, nan=torch.inf)))
    return deviation, {n: sensitivity(z, n) for n in names}


def compare(found: dict[str, tuple[float, float]], golden_counts: Any) -> None:
    """Judge what a replay by name has found."""
    checked = {what: pair for what, pair in found.items() if pair[1] < math.inf}
    golden_counts["files"] += 1
    golden_counts["checked"] += len(checked)
    golden_counts["unchecked"] += len(found) - len(checked)
    failures = [f"{what}: off by {off:.2e}, allowed {at:.1e}" for what, (off, at) in checked.items() if not off <= at]
    assert not failures, failures
    assert checked, "nothing was compared"


@pytest.mark.parametrize("path", FILES.values(), ids=lambda path: path.stem)
def test_recorded_trajectory_is_reproduced(path, golden_counts):
    reason = deferral(path.stem)
    if reason is not None:
        pytest.skip(reason)
    pattern = by_name(path.stem)
    if pattern is not None:
        with np.load(path, allow_pickle=False) as z:
            compare(BY_NAME[pattern](z), golden_counts)
        return
    with np.load(path, allow_pickle=False) as z:
        meta = described(z)
        assert meta is not None, f"{path.name} is of a kind that nobody replays or defers"
        assert meta.get("cls") in REPLAYS, f"{path.name} is of class {meta.get('cls')!r}: no replay, and not deferred"
        deviation, sensitivities = replay(z, meta)
    single = meta["dtype"].endswith("float32")
    checked, failures = 0, []
    for name, off in deviation.items():
        s = sensitivities[name]
        if s >= (1e-3 if single else 1e-5):
            golden_counts["unchecked"] += 1
            continue
        checked += 1
        tolerance = max(meta["single"], s) if single else max(1e-10, 10 * s)
        if not off <= tolerance:
            failures.append(f"{name}: off by {off:.2e}, allowed {tolerance:.1e}")
    golden_counts["files"] += 1
    golden_counts["checked"] += checked
    assert not failures, failures
    assert checked, f"every parameter of {path.name} is ill-posed"


def named_by(index: Path) -> set[str]:
    """File names (or patterns of names) that an INDEX mentions: `name.npz` in the text, first cells of its tables."""
    text = index.read_text(encoding="utf-8")
    found = set(re.findall(r"([\w<][\w<>|\[\]{},.*…-]*)\.npz", text))
    found |= set(re.findall(r"^\| ([A-Za-z][\w-]*_[\w-]*)", text, flags=re.MULTILINE))
    names = {re.sub(r"<[^>]*>|\{[^}]*\}", "*", name).partition("[")[0] for name in found}
    return {name for name in names if name.strip("*_…")}


def kind(name: str) -> str | None:
    """The pattern of the replay or deferral that takes this name."""
    if by_name(name) is not None:
        return by_name(name)
    if deferral(name) is not None:
        return next(pattern for pattern, _ in DEFERRED if fnmatch(name, pattern))
    return next((replay.names for replay in REPLAYS.values() if fnmatch(name, replay.names)), None)


def test_every_kind_that_an_index_names_is_covered():
    indices = [path for folder in FOLDERS for path in sorted(folder.rglob("INDEX.md"))]
    if not indices:
        pytest.skip("no INDEX.md beside golden data: set GOLDEN_DIR")
    replayed = {replay.names for replay in REPLAYS.values()} | BY_NAME.keys()
    for index in indices:
        names = named_by(index)
        assert names, f"{index} names no file"
        kinds = {name: kind(name) for name in names}
        assert not [name for name, k in kinds.items() if k is None], f"{index}: kinds that nobody replays or defers"
        present = {kind(path.stem) for path in index.parent.glob("*.npz")}
        missing = {k for k in kinds.values() if k in replayed} - present
        assert not missing, f"{index}: no file of the kinds {missing}"


def test_core_files_are_there():
    assert {path.stem for path in CORE.glob("*.npz")} >= {"soap_pf1_wd0_f64", "torch_adamw_f64"}


def test_unknown_file_would_fail():
    assert deferral("somebody_elses_method_f64") is None
    assert kind("somebody_elses_method_f64") is None

"""Layer methods under DDP, gloo on this machine: several ranks do what one process does on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layer_ranks

pytestmark = pytest.mark.dist

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory):
    """Results of every scenario, one dict per rank."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(HERE / "layer_ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_close(found, wanted, tolerance):
    """Relative to the largest entry of a tensor; eigenvectors are left out, whose signs are free."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor) and "basis" not in key:
            error = (found[key] - value).abs().max() / value.abs().max().clamp_min(1e-30)
            assert error < tolerance, f"{key}: {error:.1e}"


def assert_agree(ranks, scenario):
    """All ranks hold the same bits, and say the same of them."""
    for other in ranks[1:]:
        for key, value in ranks[0][scenario].items():
            same = torch.equal(value, other[scenario][key]) if torch.is_tensor(value) else value == other[scenario][key]
            assert same, key


@pytest.mark.parametrize(
    "scenario",
    ["mean", "inside", "ekfac", "singd", "total", "ikfac_total", "accumulation", "ikfac_accumulation", "fisher"],
)
def test_ranks_together_do_what_one_process_does_on_the_whole_batch(ranks, scenario):
    assert_agree(ranks, scenario)
    assert_close(ranks[0][scenario], getattr(layer_ranks, scenario)(0, 1), 1e-9)


@pytest.mark.parametrize(("scenario", "tolerance"), [("factors", 1e-12), ("factors_in_single_precision", 2e-6)])
def test_factors_differ_by_rounding_alone(ranks, scenario, tolerance):
    assert_agree(ranks, scenario)
    kept = [
        {key: value for key, value in run.items() if "covariance" in key or "/diagonal" in key}
        for run in (ranks[0][scenario], getattr(layer_ranks, scenario)(0, 1))
    ]
    assert len(kept[0]) == 15
    assert_close(*kept, tolerance)


def test_branch_that_some_ranks_leave_out_counts_what_the_others_saw(ranks, monkeypatch):
    monkeypatch.setattr(layer_ranks, "WORLD", len(ranks))
    assert_agree(ranks, "branches")
    assert_close(ranks[0]["branches"], layer_ranks.branches(0, 1), 1e-9)


def test_ranks_agree_on_layers_without_statistics(ranks):
    assert_agree(ranks, "shortcuts")
    treatments = {line.split()[0]: line.split()[2] for line in ranks[0]["shortcuts"]["coverage"].splitlines()[1:]}
    left = {name for name, treatment in treatments.items() if treatment == "AdamW"}
    assert left == {"unseen.weight", "unseen.bias"}


def test_without_a_wrapper_every_process_stands_alone(ranks):
    for rank, results in enumerate(ranks):
        assert_close(results["alone"], layer_ranks.alone(rank, 1), 1e-12)

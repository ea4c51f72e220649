"""The benchmark of steps: its tables say what they promise. Never a time: those are for people to read."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

import benchmark_step as benchmark

ABSENT = "no_such_package.SOAP"
HERE = [name for name, c in benchmark.CONTESTANTS.items() if c.package in ("", "torch")]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    mini = benchmark.Shapes("Mini", ((4, 3), (4, 3), (4, 2, 3, 3)), ((5,), (6, 3)))
    absent = benchmark.Contestant(ABSENT, "SOAP", benchmark._peer(ABSENT), "no_such_package")
    monkeypatch.setitem(benchmark.LISTS, "mini", mini)
    monkeypatch.setitem(benchmark.CONTESTANTS, ABSENT, absent)
    monkeypatch.setattr(benchmark, "PERIOD", 3)
    monkeypatch.setattr(benchmark, "WARM_UP", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tables(text):
    """Header and rows of every table, as lists of cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [line for line in lines if not line[0].startswith("---")]


def test_every_optimizer_has_a_row_and_absent_peers_are_named(capsys):
    benchmark.main(["--lists", "mini", "--rounds", "2", "--only", *HERE, ABSENT])
    printed = capsys.readouterr().out
    header, *rows = tables(printed)
    assert header[:5] == ["optimizer", "amortised, ms", "worst / median", "launched", "state, B"]
    assert len(header) == 7
    skipped = printed.split("skipped: ")[1]
    assert f"{ABSENT} (no module no_such_package)" in skipped
    assert "torch.Muon" in skipped  # takes no convolution
    assert [row[0] for row in rows] == [name for name in HERE if name != "torch.Muon"]
    for row in rows:
        assert len(row) == len(header)
        assert all(float(cell) > 0 for cell in row[1:6])
        assert float(row[2]) >= 1
    assert "Mini (" in printed and "5 tensors" in printed


def test_state_is_counted_once_and_without_parameters_and_gradients(capsys):
    benchmark.main(["--lists", "mini", "--rounds", "1", "--only", "torch.AdamW foreach", "SOAP"])
    _, adamw, soap = tables(capsys.readouterr().out)
    numel, tensors = 24 + 72 + 5 + 18, 5
    assert float(adamw[4]) == round((8 * numel + 4 * tensors) / numel, 1)  # two moments and a step
    factors = 2 * 2 * (16 + 9) + 2 * 16  # covariances and bases; the convolution (4, 18) has one side only
    assert float(soap[4]) >= round(4 * (2 * numel + factors) / numel, 1)


def test_operations_are_those_of_a_step_alone(capsys):
    benchmark.main(["--lists", "mini", "--rounds", "1", "--only", "torch.AdamW fused"])
    (_, row) = tables(capsys.readouterr().out)
    assert row[3] == "2"  # steps, and everything else


def test_ratios_are_to_adamw_and_to_the_best_peer_of_the_same_method():
    shapes = benchmark.LISTS["mini"]
    chosen = [benchmark.CONTESTANTS[name] for name in ("torch.AdamW foreach", "torch.AdamW fused", "AdamW", "SOAP")]
    runners, _ = benchmark.run(shapes, chosen, 1, torch.device("cpu"))
    for runner, seconds in zip(runners, (4.0, 2.0, 1.0, 8.0), strict=True):
        runner.seconds = [[seconds, seconds, 3 * seconds]] * 3
    rows = {row[0]: row[1:] for row in benchmark.rows(runners)}
    assert [rows[name][1] for name in rows] == ["3.00"] * 4
    assert [rows[name][-2] for name in rows] == ["1.00", "0.50", "0.25", "2.00"]
    assert [rows[name][-1] for name in rows] == ["2.00", "1.00", "0.50", ""]


def test_a_profile_is_shares_of_a_step(capsys):
    benchmark.main(["--lists", "mini", "--profile", "SOAP"])
    lines = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(lines) <= 8 and lines[0].startswith("SOAP, Mini")
    shares = {line.split("%")[1].strip(): float(line.split("%")[0]) for line in lines[1:]}
    assert {"products", "element-wise", "host"} <= set(shares)
    assert abs(sum(shares.values()) - 100) < 1

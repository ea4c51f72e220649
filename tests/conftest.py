"""Settings of every test: one thread, fixed seeds, where golden data and torch's own tests are found."""

import os
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at its first import whether kernels are interpreted, on tensors of the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases  # noqa: E402

GOLDEN_COUNTS = pytest.StashKey[Counter]()


def pytest_addoption(parser):
    parser.addoption(
        "--torch-tests",
        metavar="PATH",
        default=None,
        help="folder with torch's own test_optim.py and optim/: run its TestOptimRenewed on all our classes",
    )


def pytest_configure(config):
    config.stash[GOLDEN_COUNTS] = Counter()
    # Methods that step by residuals say so wherever a test trains them on gradients.
    config.addinivalue_line("filterwarnings", "ignore:.*AdamW takes the step")
    # One thread: results are then the same bits on every machine, and tests may run beside each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_generate_tests(metafunc):
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "case" in metafunc.fixturenames and not any("case" in names for names in given):
        metafunc.parametrize("case", cases.OPTIMIZERS, ids=[case.cls.__name__ for case in cases.OPTIMIZERS])


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash[GOLDEN_COUNTS]
    if counts:
        terminalreporter.write_line(
            f"golden data: {counts['files']} files replayed, {counts['checked']} parameters checked, "
            f"{counts['unchecked']} ill-posed parameters unchecked"
        )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def golden_counts(request):
    """Counters that are printed at the end of the run: `files`, `checked`, `unchecked`."""
    return request.config.stash[GOLDEN_COUNTS]

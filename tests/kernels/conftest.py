"""Kernels below this folder round as on a GPU, even if they are interpreted; modes and precisions of their tests."""

import sys
from pathlib import Path

import pytest
import torch

import interpreting
from secondorder_kernels import tables, use_kernels

interpreting.install()

# For `aot_findings.py`: where Hugging Face's `kernels` is installed, it could not be imported as a part of this folder.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def triton_mode(request, monkeypatch):
    """Operations run Triton's kernels with the `CONFIG` of the test's file; what is called is counted."""
    monkeypatch.setattr(tables, "family_config", lambda *key: request.module.CONFIG)
    with use_kernels("triton") as calls:
        yield calls


@pytest.fixture
def precision(request):
    """Sets the precision of float32 products that the test is parametrised by."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)

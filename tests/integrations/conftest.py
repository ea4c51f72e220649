"""For tests with the real packages: no network, a tiny GPT-2 from a config, rows of tokens that it can learn."""

import os
import runpy
import warnings
from pathlib import Path

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
try:
    import torchvision  # noqa: F401 -- these packages import it where it is installed
except ModuleNotFoundError:
    pass
except RuntimeError as error:
    collect_ignore_glob = ["test_*.py"]
    warnings.warn(f"integrations are not tested: uninstall torchvision, made for another torch ({error})", stacklevel=1)

VOCABULARY, LENGTH = 24, 12


@pytest.fixture
def gpt2():
    """Makes a GPT-2, always with the same parameters; its linear layers are `Conv1D`, its head is its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(**settings):
        torch.manual_seed(0)
        size = dict(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2)
        return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, **settings))

    return make


@pytest.fixture
def rows():
    """64 rows of tokens, each 5 more than the one before."""
    starts = torch.arange(64) * 7
    return [
        {"input_ids": row, "labels": row} for row in (starts[:, None] + 5 * torch.arange(LENGTH)).remainder(VOCABULARY)
    ]


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example, and returns its names."""
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).resolve().parents[2] / "recipes" / "examples"
    return lambda name: runpy.run_path(str(folder / name))

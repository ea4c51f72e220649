"""configs/lm_smoke.yaml through Triton's kernels, with every optimizer: the losses of plain tensor operations."""

from pathlib import Path

import pytest
import torch

import interpreting
import optimizer
import secondorder_kernels as kernels
import train

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "lm_smoke.yaml"
OURS = [name for name in optimizer.classes() if not name.startswith("torch.")]
QUICK = ("soap", "inversefreeklshampoo", "adamw")

# What may still be left to the reference: what has no kernel, or is asked for in float64.
NOT_IN_TRITON = {"orthogonalize", "symmetric_product"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OURS]
)
def test_twenty_steps_have_the_losses_of_the_reference(name, tmp_path):
    interpreting.install()
    losses = {}
    for mode in ("reference", "triton"):
        out = tmp_path / mode
        settings = [f"--config={CONFIG}", f"--optimizer.name={name}", "--compare=none", f"--out={out}", "--log.every=1"]
        with kernels.use_kernels(mode, strict=False) as calls:
            assert train.main(settings) == 0
        (folder,) = out.glob("*/*")
        records = train.runfolder.read_metrics(folder / name / "metrics.jsonl")
        losses[mode] = torch.tensor([record["train/loss"] for record in records if "train/loss" in record])
    assert len(losses["triton"]) == 20
    torch.testing.assert_close(losses["triton"], losses["reference"], rtol=1e-4, atol=0)
    taken = {operation for operation, path, _ in calls if path == "triton"}
    refused = sorted({(operation, reason) for operation, path, reason in calls if path != "triton"})
    print(f"{name}: by Triton {sorted(taken)}; refused {refused}")
    assert taken and {operation for operation, _ in refused} <= NOT_IN_TRITON, refused

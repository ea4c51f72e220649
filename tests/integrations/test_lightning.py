"""Lightning: automatic optimization puts forward and backward pass into `step`, manual optimization wraps the class."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import cases
import secondorder

lightning = pytest.importorskip("lightning")
precisions = pytest.importorskip("lightning.pytorch.plugins.precision")

slow = pytest.mark.integrations
OPTIONS = dict(lr=1e-2, weight_decay=0.1, refresh_every=3, statistics_every=1)
CLASSES = [secondorder.SOAP, secondorder.KFAC, secondorder.SINGD, secondorder.SIRFShampoo]
every_class = pytest.mark.parametrize("cls", CLASSES)


class Classifier(lightning.LightningModule):
    def __init__(self, cls, manual=False, accumulation=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
        self.cls, self.accumulation, self.losses = cls, accumulation, []
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        known = inspect.signature(self.cls).parameters
        options = {name: value for name, value in OPTIONS.items() if name in known}
        return self.cls(self.parameters(), module=self, **options)

    def training_step(self, batch, index):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            opt = self.optimizers()
            self.manual_backward(loss / self.accumulation)
            if (index + 1) % self.accumulation == 0:
                self.clip_gradients(opt, 0.5, "norm")
                opt.step()
                opt.zero_grad()
        return loss


def batches(count):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count * 8, 6, generator=g)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


def trainer(folder, **settings):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return lightning.Trainer(**{**dict(max_epochs=1, accelerator="cpu", default_root_dir=folder), **quiet, **settings})


def loop(model, opt, data, accumulation=1, clip=None):
    """Written out, without Lightning."""
    for i, (x, y) in enumerate(data, 1):
        (cross_entropy(model.net(x), y) / accumulation).backward()
        if i % accumulation == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()


def only(fitted):
    (opt,) = fitted.optimizers
    return opt


@slow
@every_class
@pytest.mark.parametrize(("accumulation", "clip"), [(2, 0.5), (1, None)])
def test_automatic_optimization_trains_as_a_plain_loop(cls, accumulation, clip, tmp_path):
    ours, theirs = Classifier(cls), Classifier(cls)
    settings = dict(accumulate_grad_batches=accumulation, gradient_clip_val=clip)
    trainer(tmp_path, **settings).fit(ours, batches(12))
    loop(theirs, theirs.configure_optimizers(), batches(12), accumulation, clip)
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
@every_class
def test_manual_optimization_trains_as_a_plain_loop(cls, tmp_path):
    ours, theirs = Classifier(cls, manual=True, accumulation=2), Classifier(cls)
    fitted = trainer(tmp_path)
    fitted.fit(ours, batches(12))
    opt = theirs.configure_optimizers()
    loop(theirs, opt, batches(12), 2, 0.5)
    cases.assert_same_bits(ours.parameters(), theirs.parameters())
    cases.assert_same_state(cases.flat_state(only(fitted)), cases.flat_state(opt))


@slow
@every_class
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(cls, precision, tmp_path):
    how = dict(precision=precision)
    if precision == "16-mixed":  # asked for by name, Lightning takes bfloat16 on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        how = dict(plugins=precisions.MixedPrecision(precision, "cpu", scaler=scaler))
    model, fitted = Classifier(cls), trainer(tmp_path, max_epochs=2, **how)
    fitted.fit(model, batches(40))
    assert sum(model.losses[-5:]) < 0.6 * sum(model.losses[:5])
    counters = ("step", "count", "seen", "failures")
    state = {key.rpartition("/")[2]: value.dtype for key, value in cases.flat_state(only(fitted)).items()}
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert {dtype for name, dtype in state.items() if name not in counters} == {expected}
    assert only(fitted).diagnostics()["refused_steps"] == 0


@slow
@pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.SINGD])
def test_gradient_scaler_leaves_no_trace_in_layer_statistics(cls, tmp_path):
    """Its scale is a power of two: float32 gradients times it, and back, have the same bits."""
    ours, theirs = Classifier(cls), Classifier(cls)
    scaled = precisions.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    scaled.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    trainer(tmp_path, plugins=scaled).fit(ours, batches(12))
    loop(theirs, theirs.configure_optimizers(), batches(12))
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
@every_class
def test_checkpoint_goes_on_with_the_same_bits(cls, tmp_path):
    whole, begun, resumed = Classifier(cls), Classifier(cls), Classifier(cls)
    straight, first, second = (trainer(tmp_path, max_epochs=epochs) for epochs in (2, 1, 2))
    straight.fit(whole, batches(7))
    first.fit(begun, batches(7))
    first.save_checkpoint(tmp_path / "last.ckpt")
    second.fit(resumed, batches(7), ckpt_path=tmp_path / "last.ckpt")
    assert len(resumed.losses) == 7
    cases.assert_same_bits(resumed.parameters(), whole.parameters())
    cases.assert_same_state(cases.flat_state(only(second)), cases.flat_state(only(straight)))


@slow
def test_example_learns(example):
    losses = example("lightning_module.py")["model"].losses
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

"""The image tasks: what their networks compute, what their losses are, and that they are learned."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import command
import images
import train
from errors import RecipeError
from tasks import autoencoder, vision
from vision import ConvNet, ViT


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_autoencoder_has_the_benchmarks_layers_for_each_size_of_image(monkeypatch):
    def widths(model):
        return [(m.in_features, m.out_features) for m in model if isinstance(m, torch.nn.Linear)]

    small = autoencoder.Task(autoencoder.Data(), autoencoder.Model(), 1).build_model()
    down = [(64, 256), (256, 128), (128, 64), (64, 16)]
    assert widths(small) == down + [(b, a) for a, b in reversed(down)]
    code = [index for index, m in enumerate(small) if getattr(m, "out_features", 0) == 16]
    assert isinstance(small[code[0] + 1], torch.nn.Linear), "the code is linear"
    blank = images.Labelled(np.zeros((2, 1, 28, 28), np.uint8), np.zeros(2, np.uint8))
    monkeypatch.setattr(images, "load", lambda source: images.Dataset(blank, blank, 255, "", ""))
    large = autoencoder.Task(autoencoder.Data(), autoencoder.Model(), 1).build_model()
    assert widths(large)[:4] == [(784, 1000), (1000, 500), (500, 250), (250, 30)]


def test_the_autoencoders_loss_is_zero_for_a_perfect_output_and_has_the_cross_entropys_gradient():
    task = autoencoder.Task(autoencoder.Data(), autoencoder.Model(), 1)
    (pixels,) = (tensor.double() for tensor in task.batch(0, 0, 8))
    perfect = torch.logit(pixels.clamp(1e-9, 1 - 1e-9))
    assert task.loss(lambda x: perfect, (pixels,)).item() == pytest.approx(0.0, abs=1e-4)
    logits = torch.randn_like(pixels, requires_grad=True)
    loss = task.loss(lambda x: logits, (pixels,))
    # Kullback-Leibler divergence between Bernoulli variables, pixel by pixel.
    q = torch.sigmoid(logits.detach().float())
    p = pixels.float()
    terms = torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
    assert loss.item() == pytest.approx(terms.sum().item() / 8, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (torch.sigmoid(logits) - pixels) / 8, rtol=1e-4, atol=1e-6)


def test_the_autoencoder_measures_images_that_it_trains_on_and_images_that_it_does_not():
    task = autoencoder.Task(autoencoder.Data(), autoencoder.Model(), 1)
    training, held_out = task.validation(0, 300, 300)
    torch.testing.assert_close(held_out * 16, torch.from_numpy(task.dataset.val.images).flatten(1).float())
    rows = {row.tobytes() for row in task.dataset.train.images.reshape(-1, 64)}
    assert all(row.tobytes() in rows for row in (training * 16).byte().numpy())
    model = task.build_model()
    measured = task.measure(model, (training, held_out))
    for name, pixels in (("loss", training), ("held_out", held_out)):
        torch.testing.assert_close(measured[name], task.loss(model, (pixels,)))


@pytest.mark.parametrize(("kind", "width", "parameters"), [("conv", 32, 56_394), ("vit", 48, 85_114)])
def test_the_networks_have_the_sizes_that_their_configs_tell(kind, width, parameters):
    model = vision.Task(vision.Data(), vision.Model(kind=kind, width=width), 1).build_model()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_vit_sees_all_patches_and_their_places():
    torch.manual_seed(0)
    model = ViT((3, 6, 4), classes=5, patch=2, layers=1, heads=2, width=8).double()
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    # The first product is a strided convolution with the same weights.
    kernel = model.project.weight.view(8, 3, 2, 2)
    expected = F.conv2d(x, kernel, model.project.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.project(F.unfold(x, 2, stride=2).transpose(1, 2)), expected)
    turned = model(x.flip(2))
    assert not torch.allclose(turned, model(x))
    with torch.no_grad():
        model.position.zero_()
    patches_swapped = torch.cat([x[:, :, 4:], x[:, :, 2:4], x[:, :, :2]], dim=2)
    torch.testing.assert_close(model(patches_swapped), model(x))


def test_the_conv_net_takes_images_of_other_sizes_and_colors():
    model = ConvNet((3, 32, 32), classes=7, width=4)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_accuracy_is_the_fraction_of_labels_that_are_the_likeliest():
    task = vision.Task(vision.Data(), vision.Model(), 1)
    pixels, labels = task.validation(0, 20, 300)
    logits = F.one_hot((labels + (torch.arange(20) < 5)) % 10, 10).float()  # the first five are wrong
    measured = task.measure(lambda x: logits, (pixels, labels))
    assert measured["accuracy"].item() == pytest.approx(0.75)
    assert measured["loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item())


def test_vision_pixels_have_mean_zero_and_variance_one_over_the_training_images():
    task = vision.Task(vision.Data(), vision.Model(), 1)
    whole = task._tensors(*task.dataset.spread(task.dataset.train, 0, 1497, 1497))[0]
    assert whole.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert whole.std().item() == pytest.approx(1.0, abs=1e-3)


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="model.patch=3 does not divide the images' 8 x 8 pixels"):
        vision.Task(vision.Data(), vision.Model(kind="vit", width=48, patch=3), 1)


@pytest.mark.parametrize(("config", "least_fall"), [("autoencoder", 0.5), ("vision_conv", 0.6), ("vision_vit", 0.15)])
def test_soap_lowers_the_loss_of_every_image_task_in_30_steps(config, least_fall, tmp_path):
    argv = [f"--config={command.CONFIGS / config}.yaml", "--compare=none", f"--out={tmp_path}", "--log.wandb=disabled"]
    assert train.main([*argv, "--train.steps=30", "--schedule.warmup=0", "--eval.every=30"]) == 0
    (folder,) = tmp_path.glob("*/*")
    result = train.results.read(folder, "soap")
    first, last = result.validation[0][2], result.final_loss
    assert math.isfinite(last)
    assert last < (1 - least_fall) * first
    assert (result.accuracy is None) == (config == "autoencoder")

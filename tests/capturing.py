"""What tests of capture share: a network that can be run in many ways, and its factors worked out by hand."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import secondorder

SETTINGS = dict(
    lr=0.05,
    damping=1e-2,
    kl_clip=None,
    norm_clip=None,
    momentum="update",
    refresh_every=2,
    weight_decay=0.0,
)
D, H, C = 6, 16, 4  # with 16 ReLUs, none has all units off


class Net(nn.Module):
    """Four linear layers with ReLU between; the options change how it is computed, never what.

    Args:
        inplace: Activations in place.
        shared: The third layer is the second one.
        recompute: None, or `use_reentrant` of activation checkpointing around the middle.
        keyword: Layers are fed by keyword.
    """

    def __init__(self, inplace=False, shared=False, recompute=None, keyword=False, bias=True):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(D, H, bias=bias), nn.Linear(H, H, bias=bias)
        self.third = self.second if shared else nn.Linear(H, H, bias=bias)
        self.last = nn.Linear(H, C, bias=bias)
        self.inplace, self.recompute, self.keyword = inplace, recompute, keyword
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)
        self.double()

    def forward(self, x):
        x = F.relu(self._layer(self.first, x), inplace=self.inplace)
        if self.recompute is None:
            x = self._middle(x)
        else:
            x = checkpoint(self._middle, x, use_reentrant=self.recompute)
        return self._layer(self.last, x)

    def _middle(self, x):
        x = F.relu(self._layer(self.second, x), inplace=self.inplace)
        return F.relu(self._layer(self.third, x), inplace=self.inplace)

    def _layer(self, layer, x):
        return layer(input=x) if self.keyword else layer(x)


def batch(seed=0, shape=(5,)):
    """Inputs `(*shape, D)` that want a gradient, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, D, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(0, C, shape, generator=generator)


def loss_of(model, x, y):
    """Mean cross-entropy over all rows."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def recorded(model, run):
    """What linear layers get and what comes back, `{weight: [(inputs, output gradients), ...]}`, rows in axis 0.

    Args:
        model: A network without taps, computed without tricks.
        run: Called with the model; does forward and backward passes.
    """
    seen = {}

    def hook(module, args, out):
        if out.requires_grad:
            out.retain_grad()
            seen.setdefault(module.weight, []).append((args[0].detach().clone(), out))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    run(model)
    for handle in handles:
        handle.remove()
    return {
        weight: [tuple(t.flatten(0, -2).double() for t in (a, out.grad)) for a, out in uses if out.grad is not None]
        for weight, uses in seen.items()
    }


def factors(uses, terms, bias=True):
    """`A`, the mean of `[a 1] [a 1]ᵀ`, and `G`, for a mean loss over so many terms: `terms Σ g gᵀ`."""
    a, g = (torch.cat(rows) for rows in zip(*uses, strict=True))
    if bias:
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
    return a.T @ a / len(a), terms * g.T @ g


def make(cls, model, params=None, **options):
    """An optimizer with layer statistics of the model."""
    params = model.parameters() if params is None else params
    return cls(params, module=model, **{**SETTINGS, **options})


def held(opt, weight):
    """`A` and `G` as the optimizer has them."""
    state = opt.state[weight]
    return state["covariance_1"], state["covariance_0"]


def assert_holds(opt, weight, expected, tolerance=1e-12):
    for ours, theirs, name in zip(held(opt, weight), expected, "AG", strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert ours.shape == theirs.shape and error < tolerance, f"{name}: {error:.1e}"


def weights(model):
    """Weights of linear layers, each once."""
    return list(dict.fromkeys(m.weight for m in model.modules() if isinstance(m, nn.Linear)))


def one_step(model, run, cls=secondorder.KFAC, **options):
    """The optimizer after one step that moves nothing."""
    opt = make(cls, model, lr=0.0, **options)
    run(model)
    opt.step()
    return opt


def treatments(opt):
    """`{name: (treatment, reason)}`."""
    return {row.name: (row.treatment, row.reason) for row in opt.coverage()}

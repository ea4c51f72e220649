"""Replays of recorded layer curvature: factors, preconditioned gradients, operators, all through KFAC and EKFAC.

Where our convention is another than the recorded one, the replay converts, as listed here. Updates that hang on the
basis of a null space (in the reduce form, corrected eigenvalues need not vanish there) are ill-posed: any deviation is
allowed.

- *Empirical factors of a mean over C outputs* (mse, bce): the recording multiplied output gradients by √C, we take them
  as they are. The replay trains with √C times the loss, so that factors grow by C, and gradients and updates by √C.
- *Forward-only*: the recording has an output factor I, which damping reaches too; with `sides="inputs"` there is none.
- *A bias apart, forward-only*: the recorded block is I. Ours would have its output factor, so only weights are trained.
- *Loss terms of empirical statistics* are counted where the last layer with a bias gets gradients. In a network that
  ends in convolutions these are its positions; the recording knows that its loss has one term per sample.
- *Corrected eigenvalues* always sum positions before they square, in whichever basis. That is sharing="reduce"; the
  replay goes over to it once the bases are there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder import EKFAC, KFAC

Found = dict[str, tuple[float, float]]  # by what was compared: relative deviation and tolerance
Data = dict[str, Tensor]

TOLERANCE = 1e-10
NEVER = 10**6
SCHEMES = {"factor": "factor", "pi": "pi", "exact": "absolute"}  # recorded name -> damping_kind
LOSSES = {"ce": "cross_entropy", "mse": "mse", "bce": "bce"}


class PlainEKFAC(EKFAC):
    """Without the graded diagonal by which the product settles null spaces; it shows at 1e-6."""

    def _method(self, group):
        method = super()._method(group)
        return replace(method, factor=replace(method.factor, settles_ties=False))


# ---------------------------------------------------------------------- networks


class Transformer(nn.Module):
    """One pre-norm block without affine norms; the pooled one averages tokens before its head."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6, bias=False)
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:  # (n, 5, 6)
        q, k, v = self.qkv(F.layer_norm(x, (6,))).reshape(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(F.layer_norm(x, (6,)))))
        return self.head(x.mean(1) if self.pooled else x)


class Tied(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(self.l1(self.l1(x).tanh()).tanh())


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.emb(ids).tanh().mean(1))


def mlp(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def small_cnn() -> nn.Module:
    first, second = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 4, 2, bias=False)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def wide_cnn() -> nn.Module:
    first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3))


def printed(text: str) -> nn.Module:
    """The layers that a printed `nn.Sequential` (or a single layer) shows."""
    known = {**vars(nn), "same": "same"}
    return nn.Sequential(*(eval(layer, known) for layer in re.findall(r"\(\d+\): (.+)", text) or [text]))


def filled(model: nn.Module, data: Data) -> nn.Module:
    model.double()
    for name, p in model.named_parameters():
        p.data = data[f"param/{name}"].clone()
    return model


# ---------------------------------------------------------------------- one recording


def read(z: Any) -> tuple[Data, dict[str, Any]]:
    return {key: torch.tensor(z[key]) for key in z.files if key != "meta"}, json.loads(str(z["meta"]))


def name_of(z: Any) -> str:
    return Path(z.fid.name).stem


def deviation(ours: Tensor, recorded: Tensor) -> float:
    assert ours.shape == recorded.shape, (ours.shape, recorded.shape)
    off = float((ours - recorded).norm() / recorded.norm().clamp_min(1e-300))
    return math.inf if math.isnan(off) else off


class Replay:
    """Runs a network under an optimizer as it was recorded, and collects what it compares.

    Args:
        model: The network, with its parameters.
        x: Its inputs.
        y: Targets.
        loss: `"ce"`, `"mse"` or `"bce"`.
        reduction: Of the loss.
        head: Output of the network -> outputs of the loss, with the class axis at `class_dim`.
        class_dim: See `fisher_backward`.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: str,
        reduction: str,
        head: Callable[[Tensor], Tensor] = lambda out: out,
        class_dim: int = -1,
    ) -> None:
        self.model, self.x, self.y, self.loss, self.reduction = model, x, y, loss, reduction
        self.head, self.class_dim = head, class_dim
        self.found: Found = {}

    def check(self, what: str, ours: Tensor, recorded: Tensor, allowed: float = TOLERANCE) -> None:
        assert what not in self.found, what
        self.found[what] = deviation(ours, recorded), allowed

    def params(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def optimizer(self, cls: type = KFAC, separate: bool = False, **options: Any) -> Any:
        params = self.params()
        parts = [[p for n, p in params.items() if n.endswith("bias") == bias] for bias in (False, True)]
        groups = [{"params": part} for part in parts if part] if separate else list(params.values())
        return cls(
            groups, lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, module=self.model,
            kl_clip=None, norm_clip=None, max_update_rms=None,
            momentum="update", refresh_every=1,
            refresh="together", loss_reduction=self.reduction, **options,
        )  # fmt: skip

    def backward(self, optimizer: Any, kind: str, boost: float = 1.0) -> Tensor:
        """Gradients and statistics of the recorded batch; returns the loss."""
        optimizer.zero_grad()
        f = self.head(self.model(self.x))
        if kind == "type-2":
            optimizer.fisher_backward(f, LOSSES[self.loss], "type-2", class_dim=self.class_dim)
        if self.loss == "ce":
            loss = F.cross_entropy(f.flatten(0, -2), self.y.flatten(), reduction=self.reduction)
        else:
            function = F.mse_loss if self.loss == "mse" else F.binary_cross_entropy_with_logits
            loss = function(f, self.y, reduction=self.reduction)
        (loss * boost).backward()
        return loss.detach()

    def stepped(self, kind: str, **options: Any) -> tuple[Any, Data]:
        """An optimizer after one step, and what it took away from the parameters; these are as they were."""
        optimizer = self.optimizer(**options)
        return optimizer, self._step(optimizer, kind)

    def corrected(self, kind: str, **options: Any) -> tuple[Any, Data]:
        """As `stepped`, with EKFAC: bases in a first step, moments in them and the update in a second one."""
        optimizer = self.optimizer(PlainEKFAC, moment="example", **options)
        self._step(optimizer, kind)
        for group in optimizer.param_groups:
            group.update(refresh_every=NEVER, sharing="reduce")
        return optimizer, self._step(optimizer, kind)

    def _step(self, optimizer: Any, kind: str) -> Data:
        before = {name: p.detach().clone() for name, p in self.params().items()}
        # √C: see the module's doc-string
        scaled = kind == "empirical" and self.loss != "ce" and self.reduction == "mean"
        boost = math.sqrt(self.y.shape[-1]) if scaled else 1.0
        self.backward(optimizer, kind, boost)
        optimizer.step()
        changes = {name: (before[name] - p.detach()) / boost for name, p in self.params().items()}
        for name, p in self.params().items():
            p.detach().copy_(before[name])
        return changes

    def gradients(self, data: Data) -> None:
        """The recorded loss and gradients: is it the same network?"""
        optimizer = self.optimizer()
        loss = self.backward(optimizer, "empirical")
        if "loss" in data:
            self.check("loss", loss, data["loss"])
        for name, p in self.params().items():
            if f"grad/{name}" in data:
                self.check(f"grad/{name}", p.grad, data[f"grad/{name}"])


def factors_of(entry: dict[str, Any]) -> dict[str, Tensor]:
    """`G` and `A` of an exported parameter that is one block."""
    (block,) = entry["blocks"]
    return {"GA"[side == "input"]: f for side, f in zip(entry["sides"], block["factors"], strict=True) if f is not None}


def with_groups(factor: Tensor) -> Tensor:
    """With a group axis, of length 1 where there are no groups."""
    return factor if factor.ndim == 3 else factor[None]


def diagonal_blocks(matrix: Tensor, k: int) -> Tensor:  # (k d, k d) -> (k, d, d)
    return matrix.unflatten(0, (k, -1)).unflatten(2, (k, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def leader_of(key: str) -> str:
    """`0.weight` of `0.weight+0.bias/A`."""
    return re.split("[+/]", key)[0]


# ---------------------------------------------------------------------- recordings in curvlinops' form


def recorded_settings(run: Replay, data: Data, damping: float = 1e-2) -> None:
    """Everything in a file that is filed under `kind[/sharing]/joint|separate`."""
    form = re.compile(r"((type-2|empirical|forward-only)(?:/(expand|reduce))?/(joint|separate))/")
    for prefix, kind, sharing, layout in dict.fromkeys(m.groups() for key in data if (m := form.match(key))):
        recorded_setting(run, data, damping, prefix, kind, sharing or "expand", layout == "separate")


def recorded_setting(
    run: Replay, data: Data, damping: float, prefix: str, kind: str, sharing: str, separate: bool
) -> None:
    """Everything that is recorded of one kind of factors."""
    options = dict(sharing=sharing, separate=separate, damping=damping)
    forward_only = kind == "forward-only"
    apart = [p for n, p in run.params().items() if forward_only and separate and n.endswith("bias")]
    for p in apart:
        p.requires_grad_(False)
    if forward_only:
        options["sides"] = "inputs"

    optimizer, _ = run.stepped(kind, damping_kind="absolute", **options)
    entries, params = optimizer.factors(), run.params()
    for key, recorded in under(data, prefix, ".+/[AG]"):
        leader, side = leader_of(key), key[-1]
        ours = factors_of(entries[leader]) if leader in entries else {}
        run.check(f"{prefix}/{key}", ours.get(side, torch.eye(len(recorded), dtype=torch.float64)), recorded)
    blocks = [optimizer.curvature(params[leader]) for leader in entries]
    ones = sum(p.numel() for p in apart)  # blocks I
    if f"{prefix}/pgrad/trace" in data:
        run.check(f"{prefix}/trace", sum(b.trace() for b in blocks) + ones, data[f"{prefix}/pgrad/trace"])
        squares = sum(b.frobenius() ** 2 for b in blocks) + ones
        run.check(f"{prefix}/fro", squares**0.5, data[f"{prefix}/pgrad/fro"])
    for scheme, damping_kind in SCHEMES.items():
        recorded = dict(under(data, f"{prefix}/pgrad/{scheme}", ".+"))
        if not recorded:
            continue
        if forward_only and scheme == "pi":
            changes = pi_with_identity(run, optimizer, damping)
        else:
            _, changes = run.stepped(kind, damping_kind=damping_kind, **options)
        scale = 1 + damping if forward_only and scheme == "factor" else 1.0
        for name in recorded.keys() & changes.keys():
            run.check(f"{prefix}/pgrad/{scheme}/{name}", changes[name] / scale, recorded[name])
    if recorded := dict(under(data, f"{prefix}/pgrad/ekfac", ".+")):
        optimizer, changes = run.corrected(kind, damping_kind="absolute", **options)
        settled = {}
        for entry in optimizer.factors().values():
            key = f"{prefix}/{'+'.join(entry['parameters'])}/ekfac_lam"
            (block,) = entry["blocks"]
            run.check(key, *(in_eigenspaces(m, block) for m in (ascending(block), data[key])))
            settled.update(dict.fromkeys(entry["parameters"], is_settled(block)))
        for name in recorded:
            key = f"{prefix}/pgrad/ekfac/{name}"
            run.check(key, changes[name], recorded[name], TOLERANCE if settled[name] else math.inf)
    for p in apart:
        p.requires_grad_(True)


def ascending(block: dict[str, Any]) -> Tensor:
    """Moments of an exported block, in the order of the factors' eigenvalues."""
    moment = block["moment"]
    for axis, values in enumerate(block["eigenvalues"]):
        moment = moment.index_select(axis, values.argsort())
    return moment


def null_sizes(block: dict[str, Any]) -> list[int]:
    return [int((values < 1e-12 * values.max()).sum()) for values in block["eigenvalues"]]


def in_eigenspaces(moment: Tensor, block: dict[str, Any]) -> Tensor:
    """Moments in ascending order, summed over every factor's null space, of which there is no one basis."""
    for axis, size in enumerate(null_sizes(block)):
        null, rest = moment.split([size, moment.shape[axis] - size], axis)
        moment = torch.cat([null.sum(axis, keepdim=True), rest], axis)
    return moment


def is_settled(block: dict[str, Any]) -> bool:
    """Whether no moment lies in a null space of two or more dimensions: else its basis decides on the update."""
    moment = ascending(block)
    inside = [moment.narrow(axis, 0, size).norm() for axis, size in enumerate(null_sizes(block)) if size > 1]
    return all(norm < 1e-10 * moment.norm() for norm in inside)


def under(data: Data, prefix: str, form: str) -> list[tuple[str, Tensor]]:
    """Entries whose key is the prefix and a rest of a form, by that rest."""
    found = re.compile(f"{re.escape(prefix)}/({form})")
    return [(m.group(1), value) for key, value in data.items() if (m := found.fullmatch(key))]


def pi_with_identity(run: Replay, optimizer: Any, damping: float) -> Data:
    """Changes under a π-split with an output factor I, by our operator `I ⊗ A`: (A + π√λ)⁻¹ / (1 + √λ/π)."""
    changes, params = {}, run.params()
    for leader, entry in optimizer.factors().items():
        curvature, names = optimizer.curvature(params[leader]), entry["parameters"]
        pi = (curvature.trace() / curvature.shape[0]).sqrt()
        columns = torch.cat([params[name].grad.reshape(len(params[leader]), -1) for name in names], 1)
        solved = curvature.inv(float(pi * damping**0.5)) @ columns / (1 + damping**0.5 / pi)
        widths = [params[name][0].numel() for name in names]
        for name, part in zip(names, solved.split(widths, 1), strict=True):
            changes[name] = part.reshape(params[name].shape)
    return changes


# ---------------------------------------------------------------------- files


def whole_networks(z: Any) -> Found:
    """Networks of which factors, operators and preconditioned gradients are recorded; GGN blocks where exact."""
    data, meta = read(z)
    models = {
        "mlp_bias": lambda: mlp(True),
        "mlp_nobias": lambda: mlp(False),
        "deep_linear": lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)),
        "conv2d": wide_cnn,
        "transformer_pooled": lambda: Transformer(True),
        "transformer_tokens": lambda: Transformer(False),
        "tied_linear": Tied,
    }
    kind, loss, reduction = name_of(z).rsplit("_", 2)
    run = Replay(filled(models[kind](), data), data["X"], data["y"], loss, reduction)
    run.gradients(data)
    recorded_settings(run, data, meta.get("damping", 1e-2))
    one = Replay(run.model, data["X"][:1], data["y"][:1], loss, reduction)
    for batch, prefix in ((run, "ggn"), (one, "single_datum/ggn")):
        for group, matrix in under(data, prefix, ".+"):
            optimizer, _ = batch.stepped("type-2")
            run.check(f"{prefix}/{group}", optimizer.curvature(run.params()[leader_of(group)]).to_dense(), matrix)
    for key, recorded in under(data, "single_datum/type-2", ".+/[AG]"):
        entries = one.stepped("type-2")[0].factors()
        run.check(f"single_datum/{key}", factors_of(entries[leader_of(key)])[key[-1]], recorded)
    return run.found


def printed_networks(z: Any) -> Found:
    """Networks of convolutions, trained with the cross entropy; factors have a group axis."""
    data, meta = read(z)
    run = Replay(filled(printed(meta["model"]), data), data["X"], data["y"], "ce", "mean")
    run.gradients(data)
    counted = 36 if isinstance(run.model[-2], nn.ConvTranspose2d) else 1  # positions of the last layer with a bias
    for kind in ("type-2", "empirical"):
        for sharing in ("expand", "reduce"):
            by_layer(run, data, f"{kind}/{sharing}", kind, sharing, counted if kind == "empirical" else 1)
    # A peer averages patches over groups, which is not exact, and has one output factor: ours are its diagonal blocks.
    entries = run.stepped("type-2", sharing="expand")[0].factors()
    for key, recorded in under(data, "curvlinops_group_averaged/type-2/expand", ".+/G"):
        ours = with_groups(factors_of(entries[leader_of(key)])["G"])
        run.check(f"averaged/{key}", ours, diagonal_blocks(recorded, len(ours)))
    return run.found


def by_layer(run: Replay, data: Data, prefix: str, kind: str, sharing: str, counted: int = 1) -> None:
    """Joint factors that are filed by layer: `0/A`; `counted` loss terms for a recorded one."""
    optimizer, _ = run.stepped(kind, sharing=sharing)
    entries = optimizer.factors()
    for key, recorded in data.items():
        if m := re.fullmatch(rf"{re.escape(prefix)}/?(\d+)/([AG])", key):
            ours = factors_of(entries[f"{m[1]}.weight"])[m[2]]
            ours = with_groups(ours) if recorded.ndim == 3 else ours
            run.check(f"{prefix}/{m[1]}/{m[2]}", ours / counted if m[2] == "G" else ours, recorded)


def single_layers(z: Any) -> Found:
    """Single convolutions: squared errors at every position (expand), or of the sum over positions (reduce)."""
    data, meta = read(z)
    found: Found = {}
    for here in ("expand/mean", "expand/sum", "reduce/mean", "reduce/sum"):
        sharing, _, reduction = here.partition("/")
        dims: dict[str, Callable[[Tensor], Tensor]] = {
            "expand": lambda out: out.flatten(2), "reduce": lambda out: out.flatten(2).sum(2)
        }  # fmt: skip
        model = filled(printed(meta["layer"]), data)
        run = Replay(model, data["X"], data[f"{here}/y"], "mse", reduction, dims[sharing], class_dim=1)
        optimizer, _ = run.stepped("type-2", sharing=sharing)
        (entry,) = optimizer.factors().values()
        for side, ours in factors_of(entry).items():
            run.check(f"{here}/{side}", with_groups(ours), data[f"{here}/{side}"])
        run.check(f"{here}/grad", viewed(entry, model[0].weight.grad), data[f"{here}/grad_matrix"])
        found.update(run.found)
    return found


def viewed(entry: dict[str, Any], weight: Tensor) -> Tensor:
    """`(k, d_out, d_in)` of a weight, as an exported entry describes it."""
    if entry["fold"] is not None:
        split, order = entry["fold"]
        weight = weight.reshape(split).permute(order)
    view = entry["view"] if entry["batched"] else (1, *entry["view"])
    return weight.reshape(*view[:-1], view[-1] - entry["bias_column"])


def peers_factors(z: Any) -> Found:
    """SINGD's statistics with K = C = I."""
    data, _ = read(z)
    _, _, kind, sharing = name_of(z).split("_")
    model = filled(mlp(True) if kind == "mlp" else small_cnn(), data)
    run = Replay(model, data["X"], data["y"], "ce", "mean")
    by_layer(run, data, "", "empirical", sharing)
    return run.found


def embedding(z: Any) -> Found:
    """An embedding is a linear layer on one-hot vectors; we keep the diagonal of its input factor."""
    data, _ = read(z)
    renamed = {"emb.weight": "emb_weight", "out.weight": "out_weight", "out.bias": "out_bias"}
    model = filled(Embedded(), {f"param/{ours}": data[theirs] for ours, theirs in renamed.items()})
    run = Replay(model, data["ids"], data["y"], "ce", "mean")
    for kind in ("type-2", "empirical"):
        for sharing in ("expand", "reduce"):
            optimizer, _ = run.stepped(kind, sharing=sharing)
            entries = optimizer.factors()
            for key, recorded in under(data, f"{kind}/{sharing}", ".+/[AG]"):
                ours = factors_of(entries[leader_of(key)])[key[-1]]
                run.check(f"{kind}/{sharing}/{key}", ours, recorded.diagonal() if ours.ndim == 1 else recorded)
    run.check("grad", model.emb.weight.grad, data["grad/emb"])
    return run.found


def norm_layers(z: Any) -> Found:
    """A small block per feature of a LayerNorm (weight and bias, joint or apart) and of an RMSNorm."""
    data, _ = read(z)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.RMSNorm(5), nn.Linear(5, 3))
    run = Replay(filled(model, data), data["X"], data["y"], "ce", "mean")
    ggn = data["ggn/full"].unflatten(0, (3, 5)).unflatten(2, (3, 5)).diagonal(dim1=1, dim2=3).movedim(-1, 0)
    empirical = [data[f"ef/diag_{key}"] for key in ("ln_weight", "ln_bias", "rms_weight")]
    for kind, joint, apart in (
        ("empirical", data["ef/unitwise_ln"], empirical),
        ("type-2", ggn[:, :2, :2], list(data["ggn/diag"].split(5))),
    ):
        entries = run.stepped(kind)[0].factors()
        run.check(f"{kind}/ln", factors_of(entries["1.weight"])["G"], joint)
        run.check(f"{kind}/rms", factors_of(entries["3.weight"])["G"].flatten(), apart[2])
        entries = run.stepped(kind, separate=True)[0].factors()
        for key, recorded in zip(("1.weight", "1.bias", "3.weight"), apart, strict=True):
            run.check(f"{kind}/apart/{key}", factors_of(entries[key])["G"].flatten(), recorded)
    return run.found


REPLAYS: dict[str, Callable[[Any], Found]] = {
    "conv*_net": printed_networks,
    "conv2d_*": whole_networks,
    "deep_linear_*": whole_networks,
    "embedding_*": embedding,
    "exact_conv*": single_layers,
    "mlp_*": whole_networks,
    "norm_layers_*": norm_layers,
    "singd_factors_*": peers_factors,
    "tied_linear_*": whole_networks,
    "transformer_*": whole_networks,
}

"""torch's Muon as a baseline for a whole model: it takes matrices only, so AdamW takes the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the hidden matrices; `torch.optim.AdamW` for embeddings, the head and vectors.

    One lr serves both: Muon's update is scaled to the RMS of AdamW's (`adjust_lr_fn="match_rms_adamw"`).

    Args:
        params: Groups of (name, parameter) pairs; embeddings and the head are known by their names.
        lr: Learning rate.
        momentum: Muon's momentum.
        betas: AdamW's averages.
        weight_decay: Decoupled weight decay of both.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        muon: list[dict[str, Any]] = []
        adamw: list[dict[str, Any]] = []
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            named = zip(names, group["params"], strict=True)
            hidden = [p.ndim == 2 and "embedding" not in name and "head" not in name for name, p in named]
            for groups, wanted in ((muon, True), (adamw, False)):
                chosen = [p for p, is_hidden in zip(group["params"], hidden, strict=True) if is_hidden is wanted]
                if chosen:
                    groups.append({"params": chosen, "lr": group["lr"], "weight_decay": group["weight_decay"]})
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if muon:
            self.parts["muon"] = torch.optim.Muon(muon, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        if adamw:
            self.parts["adamw"] = torch.optim.AdamW(adamw, betas=betas)
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = closure() if closure else None
        for part in self.parts.values():
            part.step()
            self.state.update(part.state)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, and hand each part its own."""
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for part in self.parts.values():
            part.param_groups = [next(groups) for _ in part.param_groups]
            own = [p for group in part.param_groups for p in group["params"]]
            part.state.clear()
            part.state.update({p: self.state[p] for p in own if p in self.state})

"""wandb, if it is there: lazily imported, on one process, and never in the way of training.

Without credentials a run is kept offline; without a network `online` falls back to offline within INIT_SECONDS.

What is logged are the records of metrics.jsonl. wandb shows them in groups, by the part of a name before the slash:

    train/, val/   losses, learning rate, gradient norm, what else the task measures
    optimizer/     what the optimizer's `diagnostics()` says
    loss/          parts of the training loss, of tasks with residuals
    time/          milliseconds per step: data, forward_backward, optimizer; cpu: of all cores in all of these
    memory/        bytes of the optimizer's state; on a GPU the peak of all
"""

from __future__ import annotations

import math
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import runfolder
from config import Log
from errors import RecipeError

INIT_SECONDS = 20.0  # with credentials but no network, wandb itself would try for two minutes
FINISH_SECONDS = 60.0
# What a run's row in wandb's table shows; of all others, the last value.
SUMMARIES = {"val/loss": "min,last", "train/loss": "min,last", "time/*": "mean", "memory/*": "max"}
LOWEST = "val/lowest_loss"  # a sweep's goal: wandb takes plain metrics for that, no summaries


class Tracker:
    """One wandb run for one optimizer, or nothing at all.

    Args:
        log: Mode and project; the environment's WANDB_MODE wins over the mode.
        folder: The optimizer's folder: wandb's files and the run's id are kept there, so that a resumed run continues.
        name: Name of the run; the group is its run folder.
        config: The resolved config.
    """

    unreachable = ""  # why online failed: the next optimizers of the command do not wait for it again

    def __init__(self, log: Log, folder: Path, name: str, config: dict[str, Any]) -> None:
        self.run: Any = None
        known = runfolder.read_metrics(folder / "metrics.jsonl")  # of a resumed run
        self.lowest = min((record["val/loss"] for record in known if "val/loss" in record), default=math.inf)
        mode = os.environ.get("WANDB_MODE") or log.wandb
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            if mode == "auto":
                print("wandb: not installed, metrics go to metrics.jsonl only", file=sys.stderr)
                return
            raise RecipeError(f"wandb mode {mode!r}, but wandb is not installed: pip install wandb") from error
        try:
            self.run, place = self._online_or_offline(wandb, mode, log.project, folder, name, config)
        except Exception as error:  # whatever wandb does, the training goes on
            place = f"failed ({_first_line(error)}), metrics go to metrics.jsonl only"
        print(f"wandb: {place}", file=sys.stderr)

    def _online_or_offline(
        self, wandb: Any, mode: str, project: str, folder: Path, name: str, config: dict[str, Any]
    ) -> tuple[Any, str]:
        """Start a run; returns it and where it is."""
        id_file = folder / "wandb_id.txt"

        def start(mode: Any) -> Any:
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:8])
            run = wandb.init(
                project=project,
                group=folder.parent.name,
                name=name,
                config=config,
                dir=str(folder),
                id=id_file.read_text(),
                resume="allow" if mode == "online" else None,
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off"
                ),
            )
            for metric, summary in SUMMARIES.items():
                run.define_metric(metric, summary=summary)
            for axis in ("step", "seconds"):  # to be chosen as x axes, not to be looked at
                run.define_metric(axis, hidden=True)
            return run

        reason = Tracker.unreachable
        if mode in ("auto", "online") and not reason:
            if wandb.login(prompt=False, verify=False):
                try:
                    run = start("online")
                    return run, run.url
                except Exception as error:  # no network, refused credentials, …: wandb has a dozen kinds
                    reason = f" ({_first_line(error)})"
                    Tracker.unreachable = reason
                    id_file.unlink()  # wandb holds the id of the failed start
            elif mode == "online":
                reason = " (no credentials)"
        run = start("offline")
        return run, f"offline{reason}; to upload: wandb sync {Path(run.dir).parent}"

    def log(self, record: dict[str, Any]) -> None:
        """Log one record of metrics.jsonl."""
        if self.run:
            more = {}
            if "val/loss" in record:
                self.lowest = min(self.lowest, record["val/loss"])
                more = {LOWEST: self.lowest}
            self.run.log({**record, **more}, step=record["step"])

    def finish(self) -> None:
        """Close the run."""
        if self.run:
            self.run.finish()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:100] or type(error).__name__

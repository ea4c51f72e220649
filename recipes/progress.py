"""What a person sees while the run goes on, and where the time of a step goes."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch


class Progress:
    """One line on stderr: rewritten on a terminal, else a plain line every few seconds.

    Args:
        label: What is being trained.
        steps: Number of the last step.
        start: Steps taken before (a resumed run).
        unit: What throughput is counted in.
        units_per_step: How many of them one step takes.
        silent: Print nothing (all processes but one).
    """

    PLAIN_SECONDS = 10.0  # between plain lines: a log of minutes stays readable
    TERMINAL_SECONDS = 0.2

    def __init__(self, label: str, steps: int, start: int, unit: str, units_per_step: int, silent: bool) -> None:
        self.label, self.steps, self.start = label, steps, start
        self.unit, self.units_per_step, self.silent = unit, units_per_step, silent
        self.rewrite = sys.stderr.isatty()
        self.began = self.printed = time.perf_counter()

    def show(self, step: int, text: str) -> None:
        """Show that `step` steps are done, if the last line is old enough or this is the last step."""
        now = time.perf_counter()
        wait = self.TERMINAL_SECONDS if self.rewrite else self.PLAIN_SECONDS
        if self.silent or (now - self.printed < wait and step < self.steps):
            return
        self.printed = now
        per_step = (now - self.began) / max(step - self.start, 1)
        left = round(per_step * (self.steps - step))
        line = (
            f"{self.label}  step {step}/{self.steps}  {text}  {self.units_per_step / per_step:,.0f} {self.unit}/s  "
            f"ETA {left // 60}:{left % 60:02d}"
        )
        end = "\n" if step >= self.steps or not self.rewrite else ""
        print(f"\r\x1b[2K{line}" if self.rewrite else line, end=end, file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds per phase of a step. On CUDA by events, so that measuring makes nothing wait until somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # (phase, seconds or event) of each end
        self.spent: dict[str, float] = {}  # per phase, since the last split
        self.total = 0.0
        self.cpu = 0.0  # of the process, at the last mark

    def mark(self, phase: str) -> None:
        """The phase ends here, and the next begins. Time that ends in phase "" is not counted."""
        now: Any = time.perf_counter()
        cpu = time.process_time()
        if phase:
            self.spent["cpu"] = self.spent.get("cpu", 0.0) + cpu - self.cpu
        self.cpu = cpu
        if self.on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((phase, now))

    def seconds(self) -> float:
        """Seconds of all phases since the run began."""
        if self.on_cuda:
            torch.cuda.synchronize()
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            if phase:
                passed = begin.elapsed_time(end) / 1e3 if self.on_cuda else end - begin
                self.spent[phase] = self.spent.get(phase, 0.0) + passed
                self.total += passed
        self.marks = self.marks[-1:]
        return self.total

    def split(self) -> dict[str, float]:
        """Seconds per phase since the last call, and CPU seconds of all of them, on all cores."""
        self.seconds()
        spent, self.spent = self.spent, {}
        return spent

"""How far a run is, as its checkpoints keep it, and what to say where it was not far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Counters:
    """How far a run is.

    Arguments:
        step: Steps done.
        samples: Samples seen.
        minutes: Minutes of training.
        best: The smallest validation loss.
        best_step: The step at which it was measured.
        stopped: Whether the run ended because the validation loss fell no further.
    """

    step: int = 0
    samples: int = 0
    minutes: float = 0.0
    best: float = math.inf
    best_step: int = 0
    stopped: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Counters:
        """Returns the counters of a checkpoint. Raises ValueError where they are no counts and times."""
        counters = cls(**{"best_step": state["step"], **state} if "step" in state else state)
        counts, times = (counters.step, counters.samples, counters.best_step), (counters.minutes, counters.best)
        counted = all(type(n) is int and n >= 0 for n in counts) and type(counters.stopped) is bool
        if not (counted and all(type(x) in (int, float) for x in times)):
            raise ValueError(f"counters must be whole numbers and times, got {dict(state)}")
        return counters

    def improve(self, loss: float) -> bool:
        """Takes in a validation loss and returns whether it is the smallest so far."""
        better = loss < self.best
        if better:
            self.best, self.best_step = loss, self.step
        return better

    def not_finite(self, last: Path) -> str:
        """Returns what to say where the loss is no number any more, and what to do; `last` is the last checkpoint."""
        kept = f"The last good checkpoint is kept: {last}" if last.exists() else "No checkpoint was kept"
        return (
            f"the loss is no longer finite at step {self.step}. {kept}. Lower optimizer.lr or trainer.grad_clip, or "
            "use trainer.precision=float32"
        )

    def untrained(self, steps: int) -> str:
        """Returns what to know of a run that ended before half of its `steps`, and what to do; empty for others."""
        if self.stopped or self.step >= steps / 2:
            return ""
        speed = self.step / max(self.minutes, 1e-9)
        return (
            f"{self.step} of {steps} steps were done in {self.minutes:.3g} minutes: the network is "
            f"not trained. All steps take about {steps / max(speed, 1e-9):.3g} minutes at this speed: run the "
            "same command again with a larger trainer.max_minutes, on a machine with free cores or a GPU, or train a "
            "smaller network"
        )

"""How far a run is, as its checkpoints keep it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Counters:
    """How far a run is."""

    step: int = 0
    samples: int = 0
    minutes: float = 0.0
    best: float = math.inf

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Counters:
        """Returns the counters of a checkpoint. Raises ValueError where they are no counts and times."""
        counters = cls(**state)
        counts, times = (counters.step, counters.samples), (counters.minutes, counters.best)
        if not (all(type(n) is int and n >= 0 for n in counts) and all(type(x) in (int, float) for x in times)):
            raise ValueError(f"counters must be whole numbers and times, got {dict(state)}")
        return counters

"""Observations that are used again: each of a pool at several noise levels, with noise of its own each time.

A Gaussian field in space and time (`models/product_modes.py`) solves for the measured values of an observation once,
and what follows serves all levels. The pool holds the samples of `pool` batches; batch k takes the observations of the
slot k mod `pool`, which are replaced after `uses` of them. The slots are replaced in turn, so that the work is spread
evenly. Batch k stays a function of the seed and k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vecfield_diffusion.training.batches import Batch, Batches


@dataclass(frozen=True)
class Reused:
    """Batches whose observations are used several times.

    Arguments:
        batches: Where they come from.
        pool: Batches that are in use at once.
        uses: How often each is used.

    Raises:
        ValueError: A number below 1.
    """

    batches: Batches
    pool: int = 4
    uses: int = 128

    def __post_init__(self) -> None:
        for name in ("pool", "uses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def source(self, k: int) -> int:
        """Returns the number of the batch whose observations batch k takes."""
        use, slot = divmod(k, self.pool)
        return (use + slot * self.uses // self.pool) // self.uses * self.pool + slot

    def __call__(self, k: int) -> Batch:
        """Returns batch k, on the CPU: levels and noise of its own, all else that of its source."""
        batch, generator = self.batches(self.source(k)), self.batches.generator(2, k)
        t = self.batches.diffusion.sample_times(self.batches.size, generator)
        return Batch(batch.x0, batch.measured, batch.observation, t, torch.randn(batch.x0.shape, generator=generator))

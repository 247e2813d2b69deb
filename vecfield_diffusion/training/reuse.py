"""What is solved for a Gaussian field, used again: training meets every system several times, with other noise.

Of a field of snapshots a system is that of a window's domain, a mask, an error and a level (`models/modes.py`): it is
factorised once, and serves whatever snapshots are seen so. A field in space and time (`models/product_modes.py`) solves
for the measured values of an observation, of several snapshots that are seen alike in little more time than of one, and
what follows serves all levels.

The pool holds what `pool` batches ask for; batch k takes that of the slot k mod `pool`, which is replaced after `uses`
batches. The slots are replaced in turn, so that the work is spread evenly. Batch k stays a function of the seed and k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.models.modes import Kept
from vecfield_diffusion.training.batches import Batch, Batches


@dataclass(frozen=True)
class Reused:
    """Batches of which something is used several times.

    Arguments:
        batches: Where they come from.
        pool: Batches that are in use at once.
        uses: How often each is used.
        keep: `observations`, snapshots and what is seen of them, each time at other levels; or `systems`, windows,
            masks, errors and levels, each time of other snapshots.
        together: Of `observations`, batches of other snapshots that are seen alike; each is used so often.
        prepare: Is told the observations of these before they are used.

    Raises:
        ValueError: A number below 1.
    """

    batches: Batches
    pool: int = 4
    uses: int = 64
    keep: Kept = "observations"
    together: int = 1
    prepare: Callable[[list[Observation]], None] = lambda alike: None
    _made: dict[int, list[Batch]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("pool", "uses", "together"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def source(self, k: int) -> int:
        """Returns the number of the batch whose observations or systems batch k takes."""
        (use, slot), uses = divmod(k, self.pool), self.uses * self.together
        return (use + slot * uses // self.pool) // uses * self.pool + slot

    def _source(self, k: int) -> Batch:
        """That batch, or one that is seen alike, made once: those in use are few."""
        number = self.source(k)
        # Those used last are last.
        self._made[number] = self._made.pop(number, None) or self._alike(number)
        for old in list(self._made)[: -self.pool]:
            del self._made[old]
        return self._made[number][k // self.pool % self.together]

    def _alike(self, number: int) -> list[Batch]:
        first = number * self.together
        made = [self.batches(k, first) for k in range(first, first + self.together)]
        self.prepare([batch.observation for batch in made])
        return made

    def __call__(self, k: int) -> Batch:
        """Returns batch k, on the CPU, with noise of its own and what is kept of its source."""
        if self.keep == "systems":
            return self.batches(k, self.source(k))
        batch, generator = self._source(k), self.batches.generator(3, k)
        t = self.batches.diffusion.sample_times(self.batches.size, generator)
        return Batch(batch.x0, batch.measured, batch.observation, t, torch.randn(batch.x0.shape, generator=generator))


def reused(batches: Batches, keep: Kept | None, prepare: Callable[[list[Observation]], None]) -> Batches | Reused:
    """Returns batches that a network with a Gaussian field trains on, by what of them is kept; others as they are."""
    if keep is None:
        return batches
    # Systems of 64 samples, at least those of a batch: a few hundred MB at most. Two flow maps ask for 22 of each.
    samples = 64 if batches.diffusion.gives_mean else 32
    count = max(1, samples // batches.size)
    if keep == "systems":
        return Reused(batches, pool=count, uses=32, keep=keep)
    return Reused(batches, together=count, prepare=prepare)

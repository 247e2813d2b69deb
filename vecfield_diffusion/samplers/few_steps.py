"""The sampler of networks that give the end of a path in one evaluation (`diffusion/few_steps.py`).

    x = f(s_0 eps, s_0),    then for each level r below:    x = f(x + r eps, r)

with fresh noise each time (Song et al., Consistency Models, ICML 2023, algorithm 1). The first evaluation makes a
field, each further one renews all that is finer than its level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.samplers.base import LevelDenoiser, NoiseFunction, Sampler


class Consistency(Sampler):
    """Jumps to the end of the path, goes back up to a lower level, and jumps again.

    Arguments:
        steps: The number of evaluations.
        last: The level that the last of several jumps starts from, in standard deviations of the data; those before it
            are even in ln s from the largest of the formulation on.

    Raises:
        ValueError: Fewer than one step, or a level that is not positive.
    """

    needs_mean = False

    def __init__(self, steps: int = 2, last: float = 0.5) -> None:
        super().__init__(steps)
        if last <= 0:
            raise ValueError(f"last must be > 0, got {last}")
        self.last = last

    @property
    def evaluations(self) -> int:
        return self.steps

    def ladder(self, levels: Tensor) -> list[float]:
        """Returns `steps` levels from the first of `levels` to `last`, which lies below it, and 0."""
        first = super().ladder(levels)[0]
        ratio = min(self.last / first, 0.5)
        return [first * ratio ** (k / max(self.steps - 1, 1)) for k in range(self.steps)] + [0.0]

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        x = denoise(z, s)
        return x if r == 0 else torch.add(x, noise(), alpha=r)

"""The loop that every sampler shares.

A sampler walks the levels `s_0 > s_1 > ... > s_n = 0` of a formulation down; a subclass writes a step from `s` to `r`.
The state is `z = x0 + s eps`, and the denoiser gives `D(z, s) = E[x0 | z]`. Noise is passed in as a function, so that
whoever calls owns the randomness. After each step an optional hook may change the state: `hook(z, r) -> z`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: `z (B, 2, H, W), s (B,) -> x_hat`: a denoiser whose observation is already bound.
BoundDenoiser = Callable[[Tensor, Tensor], Tensor]
#: `z, s -> x_hat` at one level, as a step calls it.
LevelDenoiser = Callable[[Tensor, float], Tensor]
#: `() -> (B, 2, H, W)` unit normal noise.
NoiseFunction = Callable[[], Tensor]
#: `(z, r) -> z` after a step to level r.
Hook = Callable[[Tensor, float], Tensor]


class Sampler(ABC):
    """Draws samples by walking the noise levels down.

    Arguments:
        steps: The number of steps, at least 1.

    Raises:
        ValueError: Fewer than one step.
    """

    def __init__(self, steps: int = 32) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        self.steps = steps

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How often a whole run calls the denoiser."""

    @abstractmethod
    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        """One step from level `s` to `r < s`; `memory` is empty at the first step and kept between steps."""

    def sample(
        self,
        denoiser: BoundDenoiser,
        levels: Tensor,
        noise: NoiseFunction,
        hook: Hook | None = None,
        progress: Callable[[int], None] = lambda evaluations: None,
    ) -> Tensor:
        """Samples `(B, 2, H, W)` from the levels `(steps + 1,)`, which fall to 0.

        `progress` is told the number of evaluations after each call of the denoiser.
        """
        z = levels[0].item() * noise()

        def denoise(z: Tensor, s: float) -> Tensor:
            x_hat = denoiser(z, torch.full((len(z),), s, dtype=z.dtype, device=z.device))
            progress(1)
            return x_hat

        memory: dict[str, Any] = {}
        ladder = levels.tolist()
        for s, r in zip(ladder[:-1], ladder[1:], strict=True):
            z = self.step(denoise, z, s, r, noise, memory)
            if hook is not None:
                z = hook(z, r)
        return z

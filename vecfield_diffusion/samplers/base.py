"""The loop that every sampler shares.

A sampler walks the levels `s_0 > s_1 > ... > s_n = 0` of a formulation down; a subclass writes a step from `s` to `r`.
The state is `z = x0 + s eps`, it starts from `z = start + s_0 eps`, and the denoiser gives `D(z, s) = E[x0 | z]`. Noise
is passed in as a function, so that whoever calls owns the randomness. After each step an optional hook may change the
state: `hook(z, r) -> z`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import ScheduleName

#: `z (B, 2, H, W), s (B,) -> x_hat`: a denoiser whose observation is already bound. One that has learned the variance
#: of an ancestral step also has a method `moments(z, s) -> (x_hat, fraction)`, see `LevelDenoiser.moments`.
BoundDenoiser = Callable[[Tensor, Tensor], Tensor]
#: `() -> (B, 2, H, W)` unit normal noise.
NoiseFunction = Callable[[], Tensor]
#: `(z, r) -> z` after a step to level r.
Hook = Callable[[Tensor, float], Tensor]
#: Takes the number of evaluations after each call of the denoiser.
Progress = Callable[[int], None]


def silent(evaluations: int) -> None:
    """A progress function that does nothing."""


class LevelDenoiser:
    """A denoiser as a step calls it, at one level for the whole batch. Each call is reported to `progress`."""

    def __init__(self, denoiser: BoundDenoiser, progress: Progress = silent) -> None:
        self.denoiser, self.progress = denoiser, progress

    def __call__(self, z: Tensor, s: float) -> Tensor:
        """Returns the posterior mean `(B, 2, H, W)` at level `s`."""
        x_hat = self.denoiser(z, z.new_full((len(z),), s))
        self.progress(1)
        return x_hat

    def moments(self, z: Tensor, s: float) -> tuple[Tensor, Tensor]:
        """Returns the posterior mean and the fraction in [0, 1], `(B, 2, H, W)` both, where the variance is learned.

        The fraction interpolates the logarithm of the variance of an ancestral step between its two closed forms
        (Nichol & Dhariwal, ICML 2021, equation 15).

        Raises:
            ValueError: A denoiser without a method `moments`.
        """
        moments = getattr(self.denoiser, "moments", None)
        if moments is None:
            raise ValueError(f"denoiser must have a learned variance (a method `moments`), got {self.denoiser!r}")
        x_hat, fraction = moments(z, z.new_full((len(z),), s))
        if fraction is None:
            raise ValueError("denoiser must have learned the variance, its formulation has not")
        self.progress(1)
        return x_hat, fraction


class Sampler(ABC):
    """Draws samples by walking the noise levels down.

    Arguments:
        steps: The number of steps, at least 1.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.

    Attributes:
        needs_variance: Whether the denoiser must have learned the variance of a step.
        needs_mean: Whether the denoiser must give E[x0 | z], and not the end of the path that z lies on.

    Raises:
        ValueError: Fewer than one step, or a schedule of another name.
    """

    needs_variance: bool = False
    needs_mean: bool = True

    def __init__(self, steps: int = 32, schedule: ScheduleName = "native") -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if schedule not in get_args(ScheduleName):
            raise ValueError(f"schedule must be one of {', '.join(get_args(ScheduleName))}, got {schedule}")
        self.steps, self.schedule = steps, schedule

    @property
    @abstractmethod
    def evaluations(self) -> int | None:
        """How often a whole run calls the denoiser; None where that is decided on the way."""

    @abstractmethod
    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        """Takes one step from level `s` to `r < s`; `memory` is empty at the first step and kept between steps."""

    def sample(
        self,
        denoiser: BoundDenoiser,
        levels: Tensor,
        noise: NoiseFunction,
        hook: Hook | None = None,
        progress: Progress = silent,
        start: Tensor | None = None,
        return_trajectory: bool = False,
        repeats: int = 1,
        repeat_above: float = 0.0,
        valid: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns samples `(B, 2, H, W)`, with `return_trajectory` also the states `(steps + 1, B, 2, H, W)`.

        Arguments:
            denoiser: E[x0 | z], the observation already bound.
            levels: `(steps + 1,)`, falling, as a rule to 0.
            noise: Unit normal noise, drawn anew at each call.
            hook: May change the state after each step.
            progress: Takes each evaluation of the denoiser.
            start: `(B, 2, H, W)`, the mean of the first state; 0 if None.
            return_trajectory: Whether to return the states, too: the first is the noise, the last the samples.
            repeats: How often each step is taken; fresh noise takes the state back up in between.
            repeat_above: Steps to this level and below are taken once.
            valid: The cells of the domain, boolean `(B, 1, H, W)`, where a sampler judges the state; all if None.

        Raises:
            ValueError: Levels of another number than the steps ask for, or that do not fall.
        """
        ladder = self.ladder(levels)
        z = first_state(ladder[0], noise, start)
        denoise, memory, states = LevelDenoiser(denoiser, progress), {}, [z]
        for s, r in pairwise(ladder):
            for left in reversed(range(repeats if r > repeat_above else 1)):
                z = self.step(denoise, z, s, r, noise, memory)
                if hook is not None:
                    z = hook(z, r)
                if left:
                    z = torch.add(z, noise(), alpha=math.sqrt(s**2 - r**2))
                    memory.clear()
            if return_trajectory:
                states.append(z)
        return (z, torch.stack(states)) if return_trajectory else z

    def ladder(self, levels: Tensor) -> list[float]:
        """Returns the levels as numbers, read once so that no step waits for the device."""
        ladder = levels.tolist()
        if len(ladder) != self.steps + 1:
            raise ValueError(f"levels must be steps + 1 = {self.steps + 1} in number, got {len(ladder)}")
        if ladder[-1] < 0 or any(s <= r for s, r in pairwise(ladder)):
            raise ValueError(f"levels must fall and be >= 0, got {ladder}")
        return ladder


def first_state(s: float, noise: NoiseFunction, start: Tensor | None) -> Tensor:
    """Returns `start + s eps`, the state that a run begins with."""
    return s * noise() if start is None else torch.add(start, noise(), alpha=s)

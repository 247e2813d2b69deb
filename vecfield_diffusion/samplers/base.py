"""The loop that every sampler shares.

A sampler walks the levels `s_0 > s_1 > ... > s_n = 0` of a formulation down; a subclass writes a step from `s` to `r`.
The state is `z = x0 + s eps`, it starts from `z = start + s_0 eps`, and the denoiser gives `D(z, s) = E[x0 | z]`. Noise
is passed in as a function, so that whoever calls owns the randomness. After each step an optional hook may change the
state: `hook(z, r) -> z`.

At a temperature T other than 1 all noise is multiplied by sqrt(T), and a sampler then follows the laws `p_s^(1/T)` down
to the tempered law of the data. For Gaussian data this is exact: N(m, S + s^2 I)^(1/T) is N(m, T S + T s^2 I), the
tempered data at the level sqrt(T) s, whose denoiser `m + T S (T S + T s^2 I)^-1 (z - m)` is D(z, s) itself. With J the
Jacobian of D at the level r of that noise it is `D_T(z, r) = z + (T J + I - J)^-1 (D(z, r) - z)`, which costs a system
of equations; D at the level `r / sqrt(T)` is the same and costs nothing. A sampler that is affine in its noise keeps
its mean, and each variance is T times as large. Beyond Gaussian data see `tempered.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.axes import total
from vecfield_diffusion.diffusion.base import ScheduleName
from vecfield_diffusion.samplers.record import Record

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


class Reference(Protocol):
    """A Gaussian law N(m, C) of clean fields, given what is observed; for states `(B, 2, H, W)`."""

    def centre(self, z: Tensor) -> Tensor:
        """Returns m for a batch like `z`."""

    def draw(self, noise: NoiseFunction) -> Tensor:
        """Returns a draw of N(0, C), linear in unit normal noise."""

    def denoise(self, z: Tensor, s: float) -> Tensor:
        """Returns `m + C (C + s^2 I)^-1 (z - m)`."""


#: Evaluations of the score along a move, by Gauss-Legendre quadrature: it is exact where the score is cubic.
NODES = 2


class LevelDenoiser:
    """A denoiser as a step calls it, at one level for the whole batch. Each call is reported to `progress`.

    Arguments:
        denoiser: The denoiser.
        progress: Takes the number of evaluations.
        valid: The cells of the domain, boolean `(B, 1, H, W)`; all if None.
        reference: A Gaussian law that resembles the data's; None where none is known.
    """

    def __init__(
        self,
        denoiser: BoundDenoiser,
        progress: Progress = silent,
        valid: Tensor | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.denoiser, self.progress, self.valid, self.reference = denoiser, progress, valid, reference

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

    def log_ratio(self, z: Tensor, z_new: Tensor, s: float, nodes: int = NODES) -> Tensor:
        """Returns `ln p_s(z_new) - ln p_s(z)`, `(B,)` in float64 nats, p_s the density of the states at level `s`.

        By the energy `-ln p_s` where the denoiser has one. Else by the integral of the score along the straight line
        between the two, in which a constant of the level has no part: exact for Gaussian data, and as good as the score
        is a gradient, and a polynomial of the degree `2 nodes - 1` along the line. Either counts as `nodes`
        evaluations.
        """
        if getattr(self.denoiser, "has_energy", False):
            level = z.new_full((len(z),), s)
            old, new = (self.denoiser.energy(state, level).double() for state in (z, z_new))
            self.progress(nodes)
            return old - new
        return line_integral(self, z, z_new, s, valid=self.valid, nodes=nodes)


def line_integral(
    denoise: Callable[[Tensor, float], Tensor],
    z: Tensor,
    z_new: Tensor,
    s: float,
    *,
    valid: Tensor | None = None,
    nodes: int = NODES,
) -> Tensor:
    """Returns the integral of the score `(D - z) / s^2` along the line from `z` to `z_new`, `(B,)` in float64.

    Only cells that are `valid` count; all if None.
    """
    move = (z_new - z).double()
    move = move if valid is None else torch.where(valid, move, 0.0)
    work = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for place, weight in gauss_legendre(nodes):
        between = torch.lerp(z, z_new, place)
        work = work + weight * total((denoise(between, s) - between).double() * move)
    return work / s**2


@cache
def gauss_legendre(nodes: int) -> list[tuple[float, float]]:
    """Returns the places and weights of Gauss-Legendre quadrature on [0, 1]."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float(1 + place) / 2, float(weight) / 2) for place, weight in zip(places, weights, strict=True)]


class Sampler(ABC):
    """Draws samples by walking the noise levels down.

    Arguments:
        steps: The number of steps, at least 1.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        temperature: T of the law p^(1/T) that is sampled; see the module.

    Attributes:
        needs_variance: Whether the denoiser must have learned the variance of a step.
        needs_mean: Whether the denoiser must give E[x0 | z], and not the end of the path that z lies on.
        own_walk: Why nothing but the sampler may change the state, in the words of the command line; empty where a hook
            may, and steps may be repeated.
        takes_reference: Whether it makes proposals of a Gaussian law that resembles the data's.
        differences: Whether small differences of the denoiser are taken, which then computes in float32.

    Raises:
        ValueError: Fewer than one step, a schedule of another name, or a temperature that is not positive.
    """

    needs_variance: bool = False
    needs_mean: bool = True
    own_walk: str = ""
    takes_reference: bool = False
    differences: bool = False

    def __init__(self, steps: int = 32, schedule: ScheduleName = "native", temperature: float = 1.0) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if schedule not in get_args(ScheduleName):
            raise ValueError(f"schedule must be one of {', '.join(get_args(ScheduleName))}, got {schedule}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.steps, self.schedule, self.temperature = steps, schedule, temperature
        #: What is to be said of the runs of this sampler.
        self.record = Record()

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
        reference: Reference | None = None,
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
            reference: A Gaussian law that resembles the data's, for samplers that make proposals of it.

        Raises:
            ValueError: Levels of another number than the steps ask for, or that do not fall.
        """
        ladder, noise = self.ladder(levels), self.heated(noise)
        z = first_state(ladder[0], noise, start)
        denoise, memory, states = LevelDenoiser(denoiser, progress, valid, reference), {}, [z]
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

    def heated(self, noise: NoiseFunction) -> NoiseFunction:
        """Returns noise of the variance T."""
        if self.temperature == 1:
            return noise
        scale = math.sqrt(self.temperature)
        return lambda: scale * noise()

    def ladder(self, levels: Tensor) -> list[float]:
        """Returns the levels as numbers, read once so that no step waits for the device."""
        ladder = levels.tolist()
        if len(ladder) != self.steps + 1:
            raise ValueError(f"levels must be steps + 1 = {self.steps + 1} in number, got {len(ladder)}")
        if ladder[-1] < 0 or any(s <= r for s, r in pairwise(ladder)):
            raise ValueError(f"levels must fall and be >= 0, got {ladder}")
        return ladder


class OwnWalk(Sampler):
    """A sampler that walks the levels in its own way, so that nothing else may change its states; a subclass writes it.

    `own_walk` says why.
    """

    @abstractmethod
    def walk(
        self, denoise: LevelDenoiser, ladder: list[float], noise: NoiseFunction, start: Tensor | None
    ) -> list[Tensor]:
        """Returns the states of the trajectory, `(B, 2, H, W)` each, the last of which are the samples.

        Arguments:
            denoise: The denoiser, at one level for the whole batch.
            ladder: The levels.
            noise: Unit normal noise.
            start: The mean of the first state; 0 if None.
        """

    def step(self, *arguments: object) -> Tensor:
        """Not by itself, see `walk`."""
        raise NotImplementedError(f"{self.own_walk}: there is no step of one level, call sample")

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
        reference: Reference | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `Sampler.sample`.

        Raises:
            ValueError: A hook or repeats, or levels of another number.
        """
        for name, value, only in (("hook", hook, None), ("repeats", repeats, 1)):
            if value != only:
                raise ValueError(f"{name} must be {only}, got {value}: {self.own_walk}")
        denoise = LevelDenoiser(denoiser, progress, valid, reference)
        states = self.walk(denoise, self.ladder(levels), noise, start)
        return (states[-1], torch.stack(states)) if return_trajectory else states[-1]


def first_state(s: float, noise: NoiseFunction, start: Tensor | None) -> Tensor:
    """Returns `start + s eps`, the state that a run begins with."""
    return s * noise() if start is None else torch.add(start, noise(), alpha=s)

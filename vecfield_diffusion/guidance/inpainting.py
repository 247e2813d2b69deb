"""Ways to make samples agree with an observation.

Each takes a denoiser and an observation and gives what a sampler needs: a denoiser of `(z, s)` alone and, where the
method changes the state between steps, a hook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import DenoiserFunction
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.samplers.base import BoundDenoiser, Hook, NoiseFunction

if TYPE_CHECKING:
    from vecfield_diffusion.guidance.linear import LinearObservation


@dataclass(frozen=True)
class Bound:
    """A denoiser that is told an observation."""

    denoiser: DenoiserFunction
    observation: Observation

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        return self.denoiser(z, s, self.observation)

    def moments(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """The estimate and the fraction of the variance; see `Denoiser.moments`."""
        return self.denoiser.moments(z, s, self.observation)


class Inpainting(ABC):
    """A way to make samples agree with an observation.

    Attributes:
        repeats: How often each step of the sampler is taken; see `Sampler.sample`.
        changes_state: Whether it has a hook, which needs one level for the whole batch.
        takes_rows: Whether it takes linear observations, such as those of a sensor.
        weighs_rows: Whether it gives each row the weight of its error, so that rows of physics may stand beside.
        differentiates: Whether it differentiates the denoiser, which then computes in float32.
        told: Whether the network is told the observation.
    """

    repeats: int = 1
    changes_state: bool = False
    takes_rows: bool = False
    weighs_rows: bool = False
    differentiates: bool = False
    told: bool = False

    @abstractmethod
    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """A denoiser of `(z, s)` given the observation and further linear observations."""

    def hook(
        self, observation: Observation, noise: NoiseFunction, bound: BoundDenoiser | None = None, steps: int = 1
    ) -> Hook | None:
        """What is done to the state after each step; None leaves it alone.

        Arguments:
            observation: What `bind` was given.
            noise: Unit normal noise.
            bound: What `bind` gave.
            steps: The number of steps of the sampler.
        """
        return None


class Conditional(Inpainting):
    """The network is told the observation: it was trained to give E[x0 | z, y]. No approximation but the training."""

    told = True

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """The denoiser with the observation as its condition."""
        return Bound(denoiser, observation)


class RePaint(Inpainting):
    """The unconditional prior, with the observed cells replaced by the observation at the level of the sample.

    After the step to a level r >= sigma_y, `z[observed] = y + sqrt(r^2 - sigma_y^2) eps`, so that the known cells carry
    the noise that the rest carries (Song et al., ICLR 2021, appendix I.2). The hidden cells see the known ones through
    the denoiser alone, and taken once the result is biased: half a standard deviation on sparse pixels. RePaint
    goes back up by fresh noise and takes each step `resamples` times (Lugmayr et al., CVPR 2022, algorithm 1), which
    tends to the posterior as they grow, with stochastic samplers such as `ddpm`.

    Arguments:
        resamples: How often each step is taken; 1 is the plain replacement.

    Raises:
        ValueError: Fewer than one.
    """

    changes_state = True

    def __init__(self, resamples: int = 10) -> None:
        if resamples < 1:
            raise ValueError(f"resamples must be >= 1, got {resamples}")
        self.repeats = resamples

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """The denoiser of the prior: it is told of no observation."""
        return Bound(denoiser, observation.nothing())

    def hook(
        self, observation: Observation, noise: NoiseFunction, bound: BoundDenoiser | None = None, steps: int = 1
    ) -> Hook:
        """The replacement after each step."""

        def replace(z: Tensor, r: float) -> Tensor:
            scale = (r**2 - observation.sigma_y**2).clamp(min=0).sqrt()
            # Below its own error the observation knows less than the sample.
            known = observation.known & (observation.sigma_y <= r)
            return torch.where(known, observation.y + scale * noise(), z)

        return replace

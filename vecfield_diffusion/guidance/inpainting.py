"""Ways to make samples agree with an observation.

Each takes a denoiser and an observation and gives what a sampler needs: a denoiser of `(z, s)` alone and, where the
method changes the state between steps, a hook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import DenoiserFunction
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.samplers.base import BoundDenoiser, Hook, NoiseFunction


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


class Conditional:
    """The network is told the observation: it was trained to give E[x0 | z, y]. No approximation but the training."""

    def bind(self, denoiser: DenoiserFunction, observation: Observation) -> BoundDenoiser:
        """The denoiser with the observation as its condition."""
        return Bound(denoiser, observation)

    def hook(self, observation: Observation, noise: NoiseFunction) -> Hook | None:
        """None: the state is left alone."""
        return None


class Replacement:
    """The unconditional prior, with the observed cells replaced by the observation at the level of the sample.

    After the step to a level r >= sigma_y, `z[observed] = y + sqrt(r^2 - sigma_y^2) eps`, so that the known cells carry
    the noise that the rest carries (Song et al., ICLR 2021, appendix I.2). The hidden cells see the known ones through
    the denoiser alone and the result is biased: a third of a standard deviation on sparse pixels. For comparison.
    """

    def bind(self, denoiser: DenoiserFunction, observation: Observation) -> BoundDenoiser:
        """The denoiser of the prior: it is told of no observation."""
        nothing = observation.forget(torch.ones(len(observation), dtype=torch.bool, device=observation.y.device))
        return Bound(denoiser, nothing)

    def hook(self, observation: Observation, noise: NoiseFunction) -> Hook:
        """The replacement after each step."""

        def replace(z: Tensor, r: float) -> Tensor:
            scale = (r**2 - observation.sigma_y**2).clamp(min=0).sqrt()
            # Below its own error the observation knows less than the sample.
            known = observation.observed & (observation.sigma_y <= r)
            return torch.where(known, observation.y + scale * noise(), z)

        return replace

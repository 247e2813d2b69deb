"""Ways to make samples agree with an observation.

Each takes a denoiser and an observation and gives what a sampler needs: a denoiser of `(z, s)` alone and, where the
method changes the state between steps, a hook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import DenoiserFunction
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import deviations
from vecfield_diffusion.guidance.linear import LinearObservation
from vecfield_diffusion.samplers.base import BoundDenoiser, Hook, NoiseFunction, Sampler
from vecfield_diffusion.samplers.stochastic import DDIM, Ancestral


@dataclass(frozen=True)
class Bound:
    """A denoiser with its observation, as a function of the state and the level alone."""

    denoiser: DenoiserFunction
    observation: Observation

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        return self.denoiser(z, s, self.observation)

    def moments(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the estimate and the fraction of the variance; see `Denoiser.moments`."""
        return self.denoiser.moments(z, s, self.observation)

    @property
    def has_energy(self) -> bool:
        """Whether the denoiser has an energy; what guidance makes of one has none."""
        return getattr(self.denoiser, "has_energy", False)

    def energy(self, z: Tensor, s: Tensor) -> Tensor:
        """Returns the energy `(B,)` in nats; see `Denoiser.energy`."""
        return self.denoiser.energy(z, s, self.observation)


class Inpainting(ABC):
    """A way to make samples agree with an observation.

    Attributes:
        name: The option of `inpainting=` that makes it.
        repeats: How often each step of the sampler is taken; see `Sampler.sample`.
        changes_state: Whether it has a hook, which needs one level for the whole batch.
        takes_rows: Whether it takes linear observations, such as those of an observation operator.
        weighs_rows: Whether it gives each linear observation the weight of its error, so that those of physics may
            stand beside.
        differentiates: Whether it differentiates the denoiser, which then computes in float32.
        conditions: Whether the network is conditioned on the observation, as in training.
        plain: Whether it is the network as trained and nothing else.
    """

    name: str = ""
    repeats: int = 1
    changes_state: bool = False
    takes_rows: bool = False
    weighs_rows: bool = False
    differentiates: bool = False
    conditions: bool = False
    plain: bool = False

    @abstractmethod
    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """Returns a denoiser of `(z, s)` given the observation and further linear observations."""

    def hook(
        self, observation: Observation, noise: NoiseFunction, bound: BoundDenoiser | None = None, steps: int = 1
    ) -> Hook | None:
        """Returns what is done to the state after each step; None leaves it alone.

        Arguments:
            observation: That of `bind`.
            noise: Unit normal noise.
            bound: What `bind` gave.
            steps: The number of steps of the sampler.
        """
        return None

    def start(self, observation: Observation) -> Tensor | None:
        """Returns the mean `(B, 2, H, W)` of the first state; None is 0, that of the prior without an observation."""
        return None

    def once_below(self, observation: Observation) -> Tensor:
        """Returns the level `(B,)` of each sample from which downward a step is taken once."""
        return observation.y.new_zeros(len(observation))

    def advice(self, sampler: Sampler) -> str | None:
        """Returns a warning about a sampler that this method works badly with, in the words of the command line."""
        return None

    def summary(self) -> str | None:
        """Returns what is to be said after the sampling; None for nothing."""
        return None


class Conditional(Inpainting):
    """The network is conditioned on the observation: it was trained to give E[x0 | z, y]."""

    name = "conditional"
    conditions = plain = True

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """Returns the denoiser with the observation as its condition."""
        return Bound(denoiser, observation)

    def start(self, observation: Observation) -> Tensor | None:
        """Returns the background, where the formulation is coupled to one."""
        return observation.background


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

    name = "repaint"
    changes_state = True

    def __init__(self, resamples: int = 10) -> None:
        if resamples < 1:
            raise ValueError(f"resamples must be >= 1, got {resamples}")
        self.repeats = resamples

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """Returns the denoiser of the prior, which has no observation."""
        return Bound(denoiser, observation.nothing())

    def hook(
        self, observation: Observation, noise: NoiseFunction, bound: BoundDenoiser | None = None, steps: int = 1
    ) -> Hook:
        """Returns the replacement after each step."""

        def replace(z: Tensor, r: float) -> Tensor:
            sigma = deviations(observation.sigma_y)
            scale = (r**2 - sigma**2).clamp(min=0).sqrt()
            # Below its own error the observation knows less than the sample.
            known = observation.known & (sigma <= r)
            return torch.where(known, observation.y + scale * noise(), z)

        return replace

    def once_below(self, observation: Observation) -> Tensor:
        """Returns the largest error of the observed values of each sample, in standard deviations of the data.

        Below it nothing holds the known cells, and repeated steps would forget them.
        """
        sigma = torch.where(observation.known, deviations(observation.sigma_y), 0.0)
        return sigma.flatten(1).amax(dim=1) if self.repeats > 1 else sigma.new_zeros(len(sigma))

    def advice(self, sampler: Sampler) -> str | None:
        """Warns of samplers that are not ancestral."""
        if self.repeats > 1 and not isinstance(sampler, Ancestral | DDIM):
            return "repaint tends to the posterior with sampler=ddpm, not with a deterministic sampler"
        return None

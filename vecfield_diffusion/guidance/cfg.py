"""Guidance of the denoiser itself: towards the condition, away from a weaker network, down an energy.

    classifier-free    D <- D_0 + w (D - D_0)        D_0 the same network without a condition
    autoguidance       D <- D_weak + w (D - D_weak)  D_weak another checkpoint, smaller or less trained
    energy             D <- D - w s^2 grad_z E(D)    E = -ln p of what is wanted, up to a constant

(Ho & Salimans, 2022, arXiv 2207.12598, whose w is 1 less; Karras et al., NeurIPS 2024, arXiv 2406.02507; Dhariwal &
Nichol, NeurIPS 2021, on the Tweedie estimate.) In the first two w = 1 is the conditional model and w = 0 the other one.
Only w = 1 samples the posterior: on exact Gaussian models w = 1.5 moves the mean by up to .06 standard deviations and
leaves .55 to .9 of the spread (benchmarks/posterior.py).

Each takes a denoiser of `(z, s, observation)` and is one: observations and physics are built upon it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfield_diffusion.axes import column
from vecfield_diffusion.diffusion.denoiser import Denoiser, DenoiserFunction
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.physics.grid import Grid


def positive(scale: float) -> float:
    """Returns the scale. Raises ValueError for a negative one."""
    if scale < 0:
        raise ValueError(f"scale must be >= 0 (1: the conditional model; below 0 it is pushed away from), got {scale}")
    return scale


class Guidance(ABC):
    """A change of the denoiser itself.

    Attributes:
        plain: Whether it leaves the denoiser as it is.
        stresses_condition: Whether it compares the network with itself without a condition, so that the network must
            be conditioned on the observation.
        ckpt: The run folder or checkpoint of a second network that it needs; None where it needs none.
    """

    plain: bool = False
    stresses_condition: bool = False
    ckpt: str | None = None

    @abstractmethod
    def wrap(self, denoiser: Denoiser) -> DenoiserFunction:
        """Returns the guided denoiser."""

    def loaded(self, weak: Denoiser) -> Guidance:
        """Returns the same guidance with the network that `ckpt` names."""
        return self

    def obstacle(self, grid: Grid) -> str | None:
        """Returns why it does not go with a grid, in the words of the command line; None where it does."""
        return None

    def summary(self) -> str | None:
        """Returns what is to be said after the sampling; None for nothing."""
        return None


class NoGuidance(Guidance):
    """No guidance."""

    plain = True

    def wrap(self, denoiser: Denoiser) -> DenoiserFunction:
        """Returns the denoiser itself."""
        return denoiser


class ClassifierFree(Guidance):
    """Stresses the condition: w = 1 is the conditional model, w = 0 the unconditional one.

    Arguments:
        scale: w.

    Raises:
        ValueError: A negative scale.
    """

    stresses_condition = True

    def __init__(self, scale: float = 1.5) -> None:
        self.scale = positive(scale)

    def wrap(self, denoiser: Denoiser) -> DenoiserFunction:
        """Returns the guided denoiser; both estimates come from one call with twice the batch."""
        if self.scale == 1:
            return denoiser

        def guided(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
            if self.scale == 0 or not observation.observed.any():
                return denoiser(z, s, observation.nothing())
            both = observation.concatenate(observation.nothing())
            conditional, prior = denoiser(torch.cat([z, z]), torch.cat([s, s]), both).chunk(2)
            return torch.lerp(prior, conditional, self.scale)

        return guided


class AutoGuidance(Guidance):
    """Away from the mistakes that a weaker network makes more of: w = 1 is the network, w = 0 the weaker one.

    Arguments:
        ckpt: The run folder or checkpoint of the weaker network.
        scale: w.

    Raises:
        ValueError: A negative scale.
    """

    def __init__(self, ckpt: str, scale: float = 1.5) -> None:
        self.ckpt, self.scale = ckpt, positive(scale)
        self.weak: Denoiser | None = None

    def loaded(self, weak: Denoiser) -> AutoGuidance:
        """Returns the same guidance with the weaker network."""
        ready = copy.copy(self)
        ready.weak = weak
        return ready

    def wrap(self, denoiser: Denoiser) -> DenoiserFunction:
        """Returns the guided denoiser. Raises ValueError where the weaker network has not been loaded."""
        if self.weak is None:
            raise ValueError("ckpt of the weaker network must be loaded before sampling")
        weak = self.weak.in_float32() if denoiser.autocast is None else self.weak
        weak = translated(weak, denoiser.normalizer)
        return lambda z, s, observation: torch.lerp(weak(z, s, observation), denoiser(z, s, observation), self.scale)


class Energy(Guidance):
    """Down the gradient of an energy of the clean field, through the network: -ln p of what is wanted, say.

    Arguments:
        energy: `velocity (B, 2, H, W) in physical units -> (B,)`, differentiable; cells outside the domain are 0.
            Velocities of sequences are `(B, T, 2, H, W)`.
        scale: w; 1 where the energy is a negative log-likelihood.
        below: The energy acts at noise levels below this one, in standard deviations of the data.

    Raises:
        ValueError: A negative scale, or an energy that cannot be called.
    """

    def __init__(self, energy: Callable[[Tensor], Tensor], scale: float = 1.0, below: float = 10.0) -> None:
        if not callable(energy):
            raise ValueError(f"energy must be a function of velocities, got {energy!r}")
        self.energy, self.scale, self.below = energy, positive(scale), below

    def wrap(self, denoiser: Denoiser) -> DenoiserFunction:
        """Returns the guided denoiser."""

        def guided(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
            if not (s < self.below).any():
                return denoiser(z, s, observation)
            # A method that differentiates the guided denoiser, such as mmps, needs the second derivative, too.
            again = torch.is_grad_enabled() and z.requires_grad
            with torch.enable_grad():
                z = z if again else z.detach().requires_grad_()
                x_hat = denoiser(z, s, observation)
                velocity = torch.where(observation.valid, denoiser.normalizer.denormalize(x_hat), 0.0)
                (gradient,) = torch.autograd.grad(self.energy(velocity).sum(), z, create_graph=again)
            step = column(torch.where(s < self.below, self.scale * s**2, 0.0), z) * gradient
            return torch.where(observation.valid, (x_hat if again else x_hat.detach()) - step, 0.0)

        return guided


def translated(weak: Denoiser, normalizer: Normalizer) -> DenoiserFunction:
    """Returns a denoiser of fields in the units of another normalizer."""
    ratio = normalizer.std / weak.normalizer.std
    shift = (normalizer.mean - weak.normalizer.mean) / weak.normalizer.std

    def denoise(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        here = replace(
            observation,
            y=observation.y * ratio + shift,
            sigma_y=observation.sigma_y * ratio,
            background=None if observation.background is None else observation.background * ratio + shift,
        )
        x_hat = weak(z * ratio + shift, s * ratio, here)
        return torch.where(observation.valid, (x_hat - shift) / ratio, 0.0)

    return denoise

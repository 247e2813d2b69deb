"""Paths that take the field away in step with time, alpha = 1 - t: flow matching and the stochastic interpolant."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import (
    Diffusion,
    Prediction,
    SigmaMax,
    cut_normal,
    geometric,
    levels_in_order,
    stratified,
)
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill


class Flow(Diffusion):
    """Flow matching on straight paths: alpha = 1 - t, sigma = t (Lipman et al., ICLR 2023; Liu et al., ICLR 2023).

    The network predicts the velocity `eps - x0`, in units of its standard deviation.

    Arguments:
        sigma_min: The smallest noise level, s = t / (1 - t).
        sigma_max: The largest; see `EDM`.
        times: The law of the training times: `uniform`, or `logit_normal` (Esser et al., ICML 2024, section 3.1).
        logit_mean: Mean of ln(t / (1 - t)) = ln s where `times` is `logit_normal`.
        logit_std: Standard deviation of it.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a scale that is not positive.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        times: Literal["uniform", "logit_normal"] = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        prediction: Prediction = "velocity",
        sigma_data: float = 1.0,
    ) -> None:
        low, high = levels_in_order(sigma_min, sigma_max)
        if logit_std <= 0:
            raise ValueError(f"logit_std must be > 0, got {logit_std}")
        super().__init__(low / (1 + low), high / (1 + high), prediction, sigma_data)
        self.times, self.logit_mean, self.logit_std = times, logit_mean, logit_std
        self.sample_times(1, torch.Generator())

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, s: Tensor) -> Tensor:
        return s / (1 + s)

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        if self.times == "uniform":
            return super().sample_times(n, generator)
        ends = (math.log(t / (1 - t)) for t in (self.t_min, self.t_max))
        return torch.sigmoid(cut_normal(stratified(n, generator), "logit_mean", self.logit_mean, self.logit_std, *ends))


class Interpolant(Diffusion):
    """The stochastic interpolant between the field and a first guess of it (Albergo et al., 2023, arXiv 2303.08797).

        x_t = (1 - t) x0 + t x1 + gamma sqrt(t (1 - t)) eps

    with x1 the harmonic fill of the observed cells, a smooth field through them (0 where nothing is observed). The
    network sees x1, and given x1 the difference `x_t - t x1` is a Gaussian path with alpha = 1 - t and
    sigma = gamma sqrt(t (1 - t)): it stands for x_t in all that follows, scaled to unit variance it is what the
    network sees, and every sampler serves it. The velocity that is predicted is its own, -x0 + gamma' eps, which is
    that of the interpolant less x1. Sampling starts from noise around x1.

    Arguments:
        gamma: The noise on the way.
        sigma_min: The smallest noise level, s = gamma sqrt(t / (1 - t)).
        sigma_max: The largest; see `EDM`.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a scale that is not positive.
    """

    coupled = True

    def __init__(
        self,
        gamma: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        prediction: Prediction = "velocity",
        sigma_data: float = 1.0,
    ) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be > 0, got {gamma}")
        low, high = (level**2 / (gamma**2 + level**2) for level in levels_in_order(sigma_min, sigma_max))
        super().__init__(low, high, prediction, sigma_data)
        self.gamma = gamma

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return self.gamma * (t * (1 - t)).sqrt()

    def level(self, t: Tensor) -> Tensor:
        return self.gamma * (t / (1 - t)).sqrt()

    def time(self, s: Tensor) -> Tensor:
        return s**2 / (self.gamma**2 + s**2)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Times 2 sqrt(t (1 - t)), which is finite at both ends.
        return -2 * (t * (1 - t)).sqrt(), self.gamma * (1 - 2 * t)

    def native(self, steps: int) -> Tensor:
        return geometric(self.sigma_min, self.sigma_max, steps)  # even steps in t leave out what lies below s = 0.2

    def with_background(self, observation: Observation, grid: Grid) -> Observation:
        cells = observation.observed, observation.valid
        return replace(observation, background=harmonic_fill(observation.y, *cells, grid.periodic, grid.dx, grid.dy))

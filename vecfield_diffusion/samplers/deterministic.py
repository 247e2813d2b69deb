"""Samplers of the probability-flow ODE `dz/ds = (z - D(z, s)) / s`.

The slope at `(z, s)` points away from D, so that an Euler step to `r` is an interpolation between D and z:

    z + (r - s)(z - D) / s = D + (r / s)(z - D) = lerp(D, z, r / s).

Every step below is a few of these, each one pass over the field.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import ScheduleName
from vecfield_diffusion.samplers.base import LevelDenoiser, NoiseFunction, Sampler


class Euler(Sampler):
    """First order: `z_r = D + (r / s)(z - D)`, which is DDIM (Song et al., ICLR 2021, equation 12 with eta = 0)."""

    def __init__(self, steps: int = 64, schedule: ScheduleName = "native", temperature: float = 1.0) -> None:
        super().__init__(steps, schedule, temperature)

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        return torch.lerp(denoise(z, s), z, r / s)


class Heun(Sampler):
    """Second order, with the optional churn of EDM (Karras et al., NeurIPS 2022, algorithm 2).

        gamma = min(S_churn / n, sqrt(2) - 1) for s in [S_min, S_max],    q = s (1 + gamma)
        z    <- z + S_noise sqrt(q^2 - s^2) eps
        d     = (z - D(z, q)) / q,    z' = z + (r - q) d
        d'    = (z' - D(z', r)) / r,    z_r = z + (r - q)(d + d') / 2        (the last step, r = 0, stays with z')

    which is the mean of z and of two Euler steps: `z_r = (z + z' + (r - q) d') / 2`.

    Arguments:
        steps: The number of steps n; a run costs 2 n - 1 evaluations.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        S_churn: The noise added back, over the whole run; 0 is the deterministic method.
        S_min: No noise below this level.
        S_max: No noise above this level.
        S_noise: The scale of the noise; above 1 it widens the spread, so 1 where calibration matters.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: A churn or a scale that is negative.
    """

    def __init__(
        self,
        steps: int = 18,
        schedule: ScheduleName = "native",
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float = math.inf,
        S_noise: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, temperature)
        for name, value in (("S_churn", S_churn), ("S_noise", S_noise)):
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.S_churn, self.S_min, self.S_max, self.S_noise = S_churn, S_min, S_max, S_noise

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        gamma = min(self.S_churn / self.steps, math.sqrt(2) - 1) if self.S_min <= s <= self.S_max else 0.0
        q = s * (1 + gamma)
        if gamma > 0:
            z = torch.add(z, noise(), alpha=self.S_noise * math.sqrt(q**2 - s**2))
        euler = torch.lerp(denoise(z, q), z, r / q)
        if r == 0:
            return euler
        return torch.lerp(euler, denoise(euler, r), (q - r) / r).lerp_(z, 0.5)


class Midpoint(Sampler):
    """Second order, the slope taken half way (Karras et al., NeurIPS 2022, algorithm 3 with alpha = 1 / 2).

        m = (s + r) / 2,    z_m = D(z, s) + (m / s)(z - D(z, s)),    z_r = z + (r - s)(z_m - D(z_m, m)) / m

    The last step, r = 0, is no exception. A run costs two evaluations a step.
    """

    def __init__(self, steps: int = 16, schedule: ScheduleName = "native", temperature: float = 1.0) -> None:
        super().__init__(steps, schedule, temperature)

    @property
    def evaluations(self) -> int:
        return 2 * self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        m = (s + r) / 2
        share = (r - s) / m
        middle = torch.lerp(denoise(z, s), z, m / s)
        return torch.sub(z, denoise(middle, m), alpha=share).add_(middle, alpha=share)


class DPMpp2M(Sampler):
    """DPM-Solver++(2M), second order at one evaluation a step (Lu et al., 2022, arXiv 2211.01095, algorithm 2).

        h = ln(s / r),    k = h_previous / h,    D' = (1 + 1 / (2 k)) D - 1 / (2 k) D_previous
        z_r = (r / s) z + (1 - r / s) D'

    The first step is of first order; so is the last, which returns D.
    """

    def __init__(self, steps: int = 32, schedule: ScheduleName = "log_snr", temperature: float = 1.0) -> None:
        super().__init__(steps, schedule, temperature)

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        x_hat = denoise(z, s)
        if r == 0:
            return x_hat
        h = math.log(s / r)
        if memory:
            new = torch.lerp(x_hat, memory["x_hat"], -h / (2 * memory["h"])).lerp_(z, r / s)
        else:
            new = torch.lerp(x_hat, z, r / s)
        memory.update(h=h, x_hat=x_hat)
        return new

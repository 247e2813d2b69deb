"""Samplers of the probability-flow ODE `dz/ds = (z - D(z, s)) / s`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vecfield_diffusion.samplers.base import LevelDenoiser, NoiseFunction, Sampler


class Euler(Sampler):
    """First order: `z_r = D + (r / s)(z - D)`, which is DDIM (Song et al., ICLR 2021, equation 12 with eta = 0)."""

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        x_hat = denoise(z, s)
        return x_hat + (r / s) * (z - x_hat)


class Heun(Sampler):
    """Second order, with the optional churn of EDM (Karras et al., NeurIPS 2022, algorithm 2).

        gamma = min(S_churn / n, sqrt(2) - 1) for s in [S_min, S_max],    q = s (1 + gamma)
        z    <- z + S_noise sqrt(q^2 - s^2) eps
        d     = (z - D(z, q)) / q,    z' = z + (r - q) d
        d'    = (z' - D(z', r)) / r,    z_r = z + (r - q)(d + d') / 2        (the last step, r = 0, stays with z')

    Arguments:
        steps: The number of steps n; a run costs 2 n - 1 evaluations.
        S_churn: The noise added back, over the whole run; 0 is the deterministic method.
        S_min: No noise below this level.
        S_max: No noise above this level.
        S_noise: The scale of the noise; above 1 it widens the spread, so 1 where calibration matters.

    Raises:
        ValueError: A churn that is negative.
    """

    def __init__(
        self,
        steps: int = 18,
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float = math.inf,
        S_noise: float = 1.0,
    ) -> None:
        super().__init__(steps)
        if S_churn < 0 or S_noise < 0:
            raise ValueError(f"S_churn and S_noise must be >= 0, got {S_churn} and {S_noise}")
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
            z = z + self.S_noise * math.sqrt(q**2 - s**2) * noise()
        d = (z - denoise(z, q)) / q
        euler = z + (r - q) * d
        if r == 0:
            return euler
        return z + (r - q) * (d + (euler - denoise(euler, r)) / r) / 2


class DPMpp2M(Sampler):
    """DPM-Solver++(2M), second order at one evaluation a step (Lu et al., 2022, arXiv 2211.01095, algorithm 2).

        h = ln(s / r),    k = h_previous / h,    D' = (1 + 1 / (2 k)) D - 1 / (2 k) D_previous
        z_r = (r / s) z + (1 - r / s) D'

    The first step is of first order; so is the last, which returns D.
    """

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        x_hat = denoise(z, s)
        if r == 0:
            return x_hat
        h, estimate = math.log(s / r), x_hat
        if memory:
            k = memory["h"] / h
            estimate = (1 + 1 / (2 * k)) * x_hat - 1 / (2 * k) * memory["x_hat"]
        memory.update(h=h, x_hat=x_hat)
        return (r / s) * z + (1 - r / s) * estimate

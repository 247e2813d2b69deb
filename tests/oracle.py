"""Exact answers: a Gaussian prior, whose denoiser, posterior and samples have closed forms.

For x0 ~ N(0, S): D(z, s) = S (S + s^2 I)^-1 z, and every sampler is an affine map of its noise, read off from one run
on the batch of all unit vectors (of all its draws, where it is stochastic): no Monte Carlo.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.linear import operator_rows, stack
from vecfield_diffusion.physics import operators
from vecfield_diffusion.samplers.base import BoundDenoiser, Sampler


class GaussianPrior:
    """A divergence-free Gaussian field on a periodic grid with energy spectrum of slope -3, unit variance."""

    def __init__(self, height: int = 6, width: int = 8) -> None:
        self.shape = (2, height, width)
        ky = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None]
        kx = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)[None, :]
        square = ky**2 + kx**2
        amplitude = torch.where(square > 0, square.clamp(min=1) ** -1.5, 0.0)
        noise = torch.eye(height * width, dtype=torch.float64).view(-1, height, width)
        psi = torch.fft.fft2(noise) * amplitude
        maps = torch.fft.ifft2(torch.stack([-1j * ky * psi, 1j * kx * psi], dim=1)).real.flatten(1)
        covariance = maps.T @ maps
        self.covariance = covariance / covariance.diagonal().mean()
        self.eigenvalues, self.vectors = torch.linalg.eigh(self.covariance)
        self.eigenvalues = self.eigenvalues.clamp(min=0)

    @property
    def size(self) -> int:
        """The number of values of a field."""
        return self.covariance.shape[0]

    def denoise(self, z: Tensor, s: Tensor, observation: Observation | None = None) -> Tensor:
        """The posterior mean of `(B, 2, H, W)` at levels `(B,)`."""
        gain = self.eigenvalues / (self.eigenvalues + s[:, None] ** 2)
        return ((z.flatten(1) @ self.vectors * gain) @ self.vectors.T).view_as(z)

    def posterior(self, observed: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Mean `(d,)` and covariance `(d, d)` given `y = x[observed] + sigma eps`."""
        cross = self.covariance[:, observed]
        gain = cross @ torch.linalg.inv(cross[observed] + sigma**2 * torch.eye(len(y), dtype=y.dtype))
        return gain @ y, self.covariance - gain @ cross.T

    def conditional(self, observed: Tensor, y: Tensor, sigma: float) -> GaussianConditional:
        """The exact conditional denoiser."""
        return GaussianConditional(*self.posterior(observed, y, sigma))


class GaussianConditional:
    """The denoiser of N(mean, covariance)."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance
        self.eigenvalues, self.vectors = torch.linalg.eigh(covariance)

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        gain = self.eigenvalues / (self.eigenvalues + s[:, None] ** 2)
        return (self.mean + ((z.flatten(1) - self.mean) @ self.vectors * gain) @ self.vectors.T).view_as(z)


class IndependentPrior:
    """Cells that are independent: x0 ~ N(mean, variance), `(2, H, W)` each. Samplers then map cell by cell."""

    def __init__(self, variance: Tensor, mean: float | Tensor = 0.0) -> None:
        self.variance, self.mean, self.shape = variance, mean, tuple(variance.shape)

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        """The posterior mean of `(B, 2, H, W)` at levels `(B,)`."""
        gain = self.variance / (self.variance + s[:, None, None, None] ** 2)
        return self.mean + (z - self.mean) * gain

    def spread(self, sampler: Sampler, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the samples, `(2, H, W)` each: one sample a draw, which gets 1 and the others 0."""
        draws = count_draws(sampler, self.denoise, levels, self.shape)
        unit = iter(torch.eye(draws + 1, draws, dtype=torch.float64).T)
        x = sampler.sample(self.denoise, levels, lambda: next(unit).view(-1, 1, 1, 1).expand(-1, *self.shape))
        return x[-1], (x[:-1] - x[-1]).square().sum(0)


def count_draws(sampler: Sampler, denoiser: BoundDenoiser, levels: Tensor, shape: tuple[int, ...]) -> int:
    """How often a run asks for noise."""
    draws = []

    def noise() -> Tensor:
        draws.append(torch.zeros(1, *shape, dtype=torch.float64))
        return draws[-1]

    sampler.sample(denoiser, levels, noise)
    return len(draws)


def gaussian_law(
    sampler: Sampler, denoiser: BoundDenoiser, levels: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mean `(d,)` and covariance `(d, d)` of the samples of a sampler that is affine in its noise, from one run.

    Draw k is the identity in the k-th of as many blocks of the batch as there are draws, and 0 elsewhere; a last sample
    has no noise at all.
    """
    size, draws = math.prod(shape), count_draws(sampler, denoiser, levels, shape)
    numbers = iter(range(draws))

    def noise() -> Tensor:
        block = torch.zeros(draws * size + 1, size, dtype=torch.float64)
        first = next(numbers) * size
        block[first : first + size] = torch.eye(size, dtype=torch.float64)
        return block.view(-1, *shape)

    x = sampler.sample(denoiser, levels, noise).flatten(1)
    maps = x[:-1] - x[-1]
    return x[-1], maps.T @ maps


def physics_rows(grid, normalizer, divergence, curl=None, divergence_target=0.0, curl_target=0.0):
    """Divergence and curl of the physical field as rows, each where it has a tolerance."""
    asked = (
        (operators.divergence, divergence_target, divergence),
        (operators.vorticity, curl_target, curl),
    )
    rows = [operator_rows(*operator, grid, normalizer) for operator in asked if operator[2] is not None]
    return stack(rows)

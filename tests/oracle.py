"""Exact answers: a Gaussian prior, whose denoiser, posterior and samples have closed forms.

For x0 ~ N(0, S): D(z, s) = S (S + s^2 I)^-1 z, and every linear sampler is an affine map of its noise, read off from
one run on the batch of all unit vectors: no Monte Carlo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.observation import Observation


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

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        level = s[0] ** 2 * torch.eye(len(self.mean), dtype=z.dtype)
        gain = torch.linalg.solve(self.covariance + level, self.covariance)
        return (self.mean + (z.flatten(1) - self.mean) @ gain).view_as(z)

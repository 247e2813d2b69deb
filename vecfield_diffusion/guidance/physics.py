"""Guidance by physics: a gradient step on the estimate of the clean field.

With `D` the denoiser and `E` an energy of the field in physical units, the guided denoiser is

    D <- D - w s^2 / (sd^2 + s^2) grad E(D),

below a threshold of the noise level, the step clipped to the length of `z - D`, each sample by itself (the gradient on
the Tweedie estimate of Chung et al., ICLR 2023, with the Jacobian s^2 / (sd^2 + s^2) of a white prior in its place;
used for partial differential equations by Huang et al., DiffusionPDE, NeurIPS 2024). The energy is a sum of squares,

    E = (h / std)^2 (w_div |div u - div_0|^2 + w_curl |curl u - curl_0|^2) / 2,    h^-2 = dx^-2 + dy^-2,

where h / std makes it independent of grid and units: with central differences a weight of 1 is one full Richardson step
for the shortest waves, and weights up to 2 are stable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import column
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, vorticity
from vecfield_diffusion.samplers.base import BoundDenoiser


class NoPhysics:
    """No guidance."""

    def guide(self, denoise: BoundDenoiser, normalizer: Normalizer, grid: Grid) -> BoundDenoiser:
        """The denoiser itself."""
        return denoise


class PhysicsGradient:
    """Pulls divergence and curl towards prescribed values.

    Arguments:
        divergence: The weight of the divergence.
        curl: The weight of the vertical component of the curl.
        divergence_target: The prescribed divergence in s^-1.
        curl_target: The prescribed curl in s^-1. The target 0 is for flows without rotation: it damps eddies.
        below: Guidance acts at noise levels below this one, in standard deviations of the data.

    Raises:
        ValueError: A negative weight, or one above 2, where the step overshoots and grows.
    """

    def __init__(
        self,
        divergence: float = 1.0,
        curl: float = 0.0,
        divergence_target: float = 0.0,
        curl_target: float = 0.0,
        below: float = 10.0,
    ) -> None:
        for name, value in (("divergence", divergence), ("curl", curl)):
            if not 0 <= value <= 2:
                raise ValueError(f"{name} must be in [0, 2] (a larger step overshoots), got {value}")
        self.divergence, self.curl = divergence, curl
        self.divergence_target, self.curl_target, self.below = divergence_target, curl_target, below

    def energy(self, velocity: Tensor, std: Tensor, grid: Grid) -> Tensor:
        """E of every sample `(B,)`, dimensionless, of velocities `(B, 2, H, W)` in physical units."""
        h = (grid.dx.to(velocity) ** -2 + grid.dy.to(velocity) ** -2).rsqrt()[:, None]
        total = torch.zeros(len(velocity), dtype=velocity.dtype, device=velocity.device)
        for weight, operator, target in (
            (self.divergence, divergence, self.divergence_target),
            (self.curl, vorticity, self.curl_target),
        ):
            if weight:
                excess = torch.where(grid.valid, (operator(velocity, grid) - target) * h / std, 0.0)
                total = total + weight / 2 * excess.square().sum(dim=(1, 2, 3))
        return total

    def guide(self, denoise: BoundDenoiser, normalizer: Normalizer, grid: Grid) -> BoundDenoiser:
        """The guided denoiser of normalised fields on `grid`."""

        def guided(z: Tensor, s: Tensor) -> Tensor:
            x_hat = denoise(z, s)
            if not (s < self.below).any():
                return x_hat
            with torch.enable_grad():
                x = x_hat.detach().requires_grad_()
                energy = self.energy(normalizer.denormalize(x), normalizer.std, grid)
                (gradient,) = torch.autograd.grad(energy.sum(), x)
            step = column(torch.where(s < self.below, s**2 / (1 + s**2), 0.0)) * gradient
            length = step.flatten(1).norm(dim=1).clamp(min=torch.finfo(step.dtype).tiny)
            limit = (z - x_hat).flatten(1).norm(dim=1)
            return x_hat - column((limit / length).clamp(max=1)) * step

        return guided

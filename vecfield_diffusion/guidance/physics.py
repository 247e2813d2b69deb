"""Guidance by physics: a gradient step on the estimate of the clean field.

With `D` the denoiser and `E` an energy of the field in physical units, the guided denoiser is

    D <- D - w s^2 / (sd^2 + s^2) grad E(D),

below a threshold of the noise level, the step clipped to the length of `z - D`, each sample by itself (the gradient on
the Tweedie estimate of Chung et al., ICLR 2023, with the Jacobian s^2 / (sd^2 + s^2) of a white prior in its place;
used for partial differential equations by Huang et al., DiffusionPDE, NeurIPS 2024). The energy is a sum of squares,

    E = (w_div |div u - div_0|^2 / |div|^2 + w_curl |curl u - curl_0|^2 / |curl|^2) / (2 std^2),

where |L|^2, the largest eigenvalue of L^T L on the grid, makes it independent of grid and units: a weight of 1 is one
full Richardson step for the shortest waves, and weights of up to 2 together are stable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import column
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.physics import operators
from vecfield_diffusion.physics.grid import Grid
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
        ValueError: A negative weight, or more than 2 together, where the step overshoots and grows.
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
                raise ValueError(f"{name} must be in [0, 2], a larger step overshoots, got {value}")
        if divergence + curl > 2:
            raise ValueError(f"curl must be at most 2 together with divergence={divergence}, got {curl}")
        self.terms = (
            (divergence, operators.divergence, divergence_target),
            (curl, operators.vorticity, curl_target),
        )
        self.below = below

    def energy(self, velocity: Tensor, std: Tensor, grid: Grid, norms: list[Tensor]) -> Tensor:
        """E of every sample `(B,)`, dimensionless, of velocities `(B, 2, H, W)` in physical units; see `norms`."""
        total = torch.zeros(len(velocity), dtype=velocity.dtype, device=velocity.device)
        for (weight, operator, target), norm in zip(self.terms, norms, strict=True):
            if weight:
                excess = torch.where(grid.valid, (operator(velocity, grid) - target) / std, 0.0)
                total = total + weight / 2 / norm * excess.square().sum(dim=(1, 2, 3))
        return total

    def norms(self, grid: Grid, like: Tensor) -> list[Tensor]:
        """|L|^2 of each operator on the grid, in m^-2; 1 for one without weight."""
        return [
            squared_norm(operator, grid, like) if weight else like.new_ones(()) for weight, operator, _ in self.terms
        ]

    def guide(self, denoise: BoundDenoiser, normalizer: Normalizer, grid: Grid) -> BoundDenoiser:
        """The guided denoiser of normalised fields on `grid`."""
        norms = self.norms(grid, normalizer.std)

        def guided(z: Tensor, s: Tensor) -> Tensor:
            x_hat = denoise(z, s)
            if not (s < self.below).any():
                return x_hat
            with torch.enable_grad():
                x = x_hat.detach().requires_grad_()
                energy = self.energy(normalizer.denormalize(x), normalizer.std, grid, norms)
                (gradient,) = torch.autograd.grad(energy.sum(), x)
            step = column(torch.where(s < self.below, s**2 / (1 + s**2), 0.0)) * gradient
            length = step.flatten(1).norm(dim=1).clamp(min=torch.finfo(step.dtype).tiny)
            limit = torch.where(grid.valid, z - x_hat, 0.0).flatten(1).norm(dim=1)
            return x_hat - column((limit / length).clamp(max=1)) * step

        return guided


def squared_norm(operator: Callable[[Tensor, Grid], Tensor], grid: Grid, like: Tensor, iterations: int = 50) -> Tensor:
    """The largest eigenvalue of L^T L of a linear operator on fields `(1, 2, H, W)`, by power iteration.

    The iteration comes from below, so five percent are added.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, *grid.shape, generator=generator, dtype=like.dtype).to(like.device)
    length = x.norm()
    for _ in range(iterations):
        with torch.enable_grad():
            x = (x / length).requires_grad_()
            energy = operator(x, grid).square().sum() / 2
            (x,) = torch.autograd.grad(energy, x)
        length = x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    return 1.05 * length

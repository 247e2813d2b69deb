"""The kinetic energy of a flow on a periodic domain, and how viscosity and forcing change it.

For `du/dt + (u . grad) u + grad p = -nu (-lap)^n u + f` without divergence, advection and pressure move energy about,
and neither make nor take any. With E = <|u|^2> / 2, the mean over the domain,

    dE/dt = F - nu <|(-lap)^(n/2) u|^2>,        F = <u . f>,

the input less the dissipation (Pope, Turbulent Flows, 2000, section 5.3). Derivatives are exact for what the grid
resolves, by Fourier transforms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid


def kinetic_energy(velocity: Tensor) -> Tensor:
    """Returns E of velocities `(..., 2, H, W)` in m s-1, `(...)` in m2 s-2."""
    return velocity.square().sum(dim=-3).mean(dim=(-2, -1)) / 2


def dissipation(velocity: Tensor, grid: Grid, viscosity: float, order: int = 1) -> Tensor:
    """Returns nu <|(-lap)^(n/2) u|^2> of velocities `(..., 2, H, W)` in m s-1, `(...)` in m2 s-3.

    Arguments:
        velocity: The flow.
        grid: A periodic one without land, of equal cells.
        viscosity: nu, in m^(2 n) s-1.
        order: The power n of the Laplacian, 1 for a Newtonian fluid.

    Raises:
        ValueError: Another grid.
    """
    if not is_torus(grid):
        raise ValueError("grid must be periodic along both axes, of equal cells and without land")
    height, width = grid.shape
    # The root of nu goes with the wavenumber: the powers of either leave float32.
    root = 2 * math.pi * viscosity ** (1 / (2 * order))
    like = {"dtype": velocity.dtype, "device": velocity.device}
    ky = torch.fft.fftfreq(height, abs(grid.dy[0].item()), **like) * root
    kx = torch.fft.rfftfreq(width, abs(grid.dx[0].item()), **like) * root
    rate = (ky.square()[:, None] + kx.square()) ** order
    # A wave of the half-complex transform stands for its conjugate as well, but for the first and the last.
    twice = torch.full_like(kx, 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    waves = torch.fft.rfft2(velocity, norm="forward").abs().square().sum(dim=-3)
    return (rate * twice * waves).sum(dim=(-2, -1))


def energy_budget(
    velocity: Tensor, grid: Grid, interval: float, *, viscosity: float, order: int = 1, forcing: float = 0.0
) -> Tensor:
    """Returns by how much E grows between frames beyond what viscosity and forcing make of it, in m2 s-2.

    Input and dissipation are those of both ends, by the trapezium rule: 0 for a flow that obeys them, but for the cube
    of the interval.

    Arguments:
        velocity: Sequences `(..., T, 2, H, W)` in m s-1; what is returned is `(..., T - 1)`.
        grid: See `dissipation`.
        interval: The seconds between two frames.
        viscosity: nu, in m^(2 n) s-1.
        order: The power n of the Laplacian.
        forcing: F, in m2 s-3.

    Raises:
        ValueError: See `dissipation`.
    """
    lost = dissipation(velocity, grid, viscosity, order)
    grown = kinetic_energy(velocity).diff(dim=-1)
    return grown + interval * ((lost[..., 1:] + lost[..., :-1]) / 2 - forcing)


def is_torus(grid: Grid) -> bool:
    """Returns whether a grid is periodic along both axes, of equal cells and without land."""
    equal = all(bool((spacing == spacing[0]).all()) for spacing in (grid.dx, grid.dy))
    return all(grid.periodic) and equal and bool(grid.valid.all())

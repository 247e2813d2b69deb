"""Linear observations: `y = A x + n`, `n ~ N(0, sigma^2)`, of normalised fields x.

One row is one number that was measured, or asked for: a component in a cell, its average over a footprint, the velocity
along the beam of a radar, the divergence of a cell. The methods of `posterior` need A as a linear function and its
transpose, which automatic differentiation gives. With the field in physical units `u = mean + std x`, an operator L
with target l and tolerance tau becomes the row

    L(std x) / tau = (l - L(mean)) / tau + n,      n ~ N(0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfield_diffusion.axes import by_frame, u_and_v
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import axes, deviations, turned
from vecfield_diffusion.physics.grid import Grid

#: A linear map of velocities `(B, 2, H, W)` on a grid.
Operator = Callable[[Tensor, Grid], Tensor]

#: The smallest error of a measurement, in standard deviations of the data: no instrument knows the field better, and
#: below it the equations of the posterior are too stiff to be solved in a few iterations.
FLOOR = 0.01

#: Components of a cell that were measured.
Components = Literal["both", "u", "v"]


@dataclass(frozen=True)
class LinearObservation:
    """Linear observations `y = A x + n`. What absent ones hold, NaN included, counts nowhere.

    Arguments:
        forward: A, from `(B, 2, H, W)` to the shape of `y`; linear, and every sample by itself.
        y: The values, `(B, ...)`, or `(1, ...)` for all samples.
        sigma: The standard deviation of the error of each row, positive; broadcasts to `y`.
        present: Which observations there are, boolean; broadcasts to `y`.
    """

    forward: Callable[[Tensor], Tensor]
    y: Tensor
    sigma: Tensor
    present: Tensor

    def flat(self) -> LinearObservation:
        """Returns the observations as `(B, K)`; absent ones have A = 0, y = 0 and sigma = 1."""
        shape = self.y.shape
        present = self.present.expand(shape).flatten(1)
        sigma = torch.where(present, self.sigma.expand(shape).flatten(1), 1.0)
        # Select, never multiply: 0 * NaN is NaN.
        y = torch.where(present, self.y.flatten(1), 0.0)
        return LinearObservation(lambda x: torch.where(present, self.forward(x).flatten(1), 0.0), y, sigma, present)

    def whitened(self) -> LinearObservation:
        """Returns the observations in units of their errors, so that `sigma = 1`."""
        one = torch.ones_like(self.sigma)
        return LinearObservation(lambda x: self.forward(x) / self.sigma, self.y / self.sigma, one, self.present)


def stack(observations: Sequence[LinearObservation]) -> LinearObservation:
    """Returns all observations together, as `(B, K)`, absent ones with A = 0, y = 0 and sigma = 1."""
    parts = [part.flat() for part in observations]
    batch = max(len(part.y) for part in parts)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name).expand(batch, -1) for part in parts], dim=1)

    def forward(x: Tensor) -> Tensor:
        return torch.cat([part.forward(x) for part in parts], dim=1)

    return LinearObservation(forward, joined("y"), joined("sigma"), joined("present"))


def floored(sigma: Tensor) -> Tensor:
    """Returns errors of at least `FLOOR`."""
    return sigma.clamp(min=FLOOR)


def cells(observation: Observation, components: Components = "both") -> LinearObservation:
    """Returns the measured cells of an observation: A is the identity on `(B, 2, H, W)`, errors are at least `FLOOR`.

    Arguments:
        observation: Values, errors and what was measured, single components included.
        components: Which of the two components count.

    Raises:
        ValueError: Components of another name.
    """
    chosen = {"both": (True, True), "u": (True, False), "v": (False, True)}.get(components)
    if chosen is None:
        raise ValueError(f"components must be both, u or v, got {components!r}")
    y = observation.y
    counted = torch.tensor(chosen, device=y.device).view(2, 1, 1)
    present = observation.known & observation.valid & counted
    if components != "both":
        return LinearObservation(lambda x: x, y, floored(deviations(observation.sigma_y)), present)
    return velocities(observation, LinearObservation(lambda x: x, y, observation.sigma_y, present))


def velocities(observation: Observation, rows: LinearObservation) -> LinearObservation:
    """Returns rows of both components of cells with the errors of an observation, at least `FLOOR`.

    Where the errors of both components are correlated, A turns the velocity to the axes of their ellipse.

    Arguments:
        observation: Has the errors.
        rows: What was measured, with any errors, `(B, 2, H, W)`.
    """
    angle, lengths = axes(observation.sigma_y)
    if angle is None:
        return replace(rows, sigma=floored(lengths))
    angle = torch.where(observation.observed, angle, 0.0)  # the error of a single component is its own
    sigma = torch.where(observation.observed, lengths, deviations(observation.sigma_y))
    y = torch.where(rows.present, rows.y, 0.0)  # a component that is missing would spoil the other: 0 * NaN is NaN
    return LinearObservation(lambda x: turned(rows.forward(x), angle), turned(y, angle), floored(sigma), rows.present)


def radial(bearing: Tensor, y: Tensor, sigma: Tensor, observed: Tensor) -> LinearObservation:
    """Returns velocities along a bearing, as a coastal radar measures: `A x = u sin(bearing) + v cos(bearing)`.

    Arguments:
        bearing: The direction towards which the velocity is positive, in degrees clockwise from north, `(H, W)` or
            `(B, 1, H, W)`. Two radars make two observations; what is NaN where nothing was measured does not matter.
        y: The velocities, normalised, `(B, 1, H, W)`.
        sigma: Their errors, at least `FLOOR` being taken; broadcasts to `y`.
        observed: The cells that were measured, boolean, broadcasts to `y`.
    """
    radians = torch.deg2rad(torch.where(observed, bearing, 0.0))
    east, north = radians.sin().to(y), radians.cos().to(y)

    def project(x: Tensor) -> Tensor:
        u, v = u_and_v(x)
        return u * east + v * north

    return LinearObservation(project, y, floored(sigma), observed)


def footprint(size: int, grid: Grid, y: Tensor, sigma: Tensor, observed: Tensor) -> LinearObservation:
    """Returns averages over the wet cells among the `size x size` cells around a centre, each cell of equal weight.

    A footprint goes on across a periodic boundary, and ends at any other.

    Arguments:
        size: The cells along a side, odd.
        grid: The grid: its valid cells and periodic axes count.
        y: The averages at their centres, normalised, `(B, 2, H, W)`.
        sigma: Their errors, at least `FLOOR` being taken; broadcasts to `y`.
        observed: The centres of the footprints that were measured, boolean; broadcasts to `y`.

    Raises:
        ValueError: A size that is not odd and positive, or larger than a periodic axis.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size must be odd and >= 1, got {size}")
    for length, periodic in zip(grid.shape, grid.periodic, strict=True):
        if periodic and size > length:
            raise ValueError(f"size must be <= {length}, the length of a periodic axis, got {size}")
    wet = grid.valid.to(y.device)
    share = _boxes(wet.to(y)[None, None], size, grid)

    def average(x: Tensor) -> Tensor:
        return _boxes(torch.where(wet, x, 0.0), size, grid) / share.clamp(min=0.5 / size**2)

    return LinearObservation(average, y, floored(sigma), observed & (share > 0))


def _boxes(x: Tensor, size: int, grid: Grid) -> Tensor:
    """Returns means over `size x size` cells around each cell, 0 beyond boundaries that are not periodic."""
    half = size // 2
    y_mode, x_mode = ("circular" if periodic else "constant" for periodic in grid.periodic)

    def average(x: Tensor) -> Tensor:
        x = F.pad(F.pad(x, (half, half, 0, 0), mode=x_mode), (0, 0, half, half), mode=y_mode)
        return F.avg_pool2d(x, size, stride=1)

    return by_frame(average, x)


def operator_rows(
    operator: Operator,
    target: Tensor | float,
    tau: Tensor | float,
    grid: Grid,
    normalizer: Normalizer,
    frames: int = 1,
    where: Tensor | None = None,
) -> LinearObservation:
    """Returns what a linear operator of the physical field should give, in units of its tolerance; see the module.

    Arguments:
        operator: L, from velocities `(B, 2, H, W)` and a grid to `(B, C, H, W)`, which counts in valid cells, or to
            `(B, C, 1, 1)`.
        target: l, a number or what broadcasts to the values; where it is NaN there is no row.
        tau: The tolerance, in the units of the values, a number or what broadcasts to them.
        grid: The grid.
        normalizer: The way to physical units.
        frames: The frames of a sample, each of which has these rows.
        where: The cells that have a row, boolean, `(H, W)` or as the values; all valid ones if None.
    """
    mean = normalizer.mean.expand(*((1,) if frames == 1 else (1, frames)), 2, *grid.shape)
    excess = target - operator(mean, grid)
    if isinstance(tau, Tensor):  # unknown ones would make gradients NaN
        tau = torch.where(excess.isfinite(), tau.to(mean), 1.0)
    y = excess / tau
    present = grid.valid.to(y.device) if y.shape[-2:] == grid.shape else torch.ones_like(y, dtype=torch.bool)
    present = present & y.isfinite() if where is None else present & y.isfinite() & where.to(y.device)
    return LinearObservation(lambda x: operator(normalizer.std.to(x) * x, grid) / tau, y, torch.ones_like(y), present)

"""Instruments that do not measure both components of single cells: what their values are as linear observations.

A sensor turns an `Observation` into rows. In a twin experiment, where the truth is known, `measure` gives what the
instrument would read.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.linear import Components, LinearObservation, cells, footprint, radial
from vecfield_diffusion.physics.grid import Grid


class Sensor(ABC):
    """What an instrument measures."""

    def place(self, x: Tensor, y: Tensor, geographic: bool) -> None:  # noqa: B027 (most need no place)
        """Tells the sensor the coordinates of columns `(W,)` and rows `(H,)`, in degrees where `geographic`."""

    def measure(self, truth: Tensor, grid: Grid) -> Tensor:
        """What it reads of fields `(N, 2, H, W)` in physical units, without error."""
        return truth

    def load(self, variable: Callable[[str], Tensor]) -> Tensor | None:
        """Reads what the instrument recorded itself.

        Arguments:
            variable: A variable of the file by name, `(N, 1, H, W)`, NaN where missing.

        Returns:
            The cells where it recorded anything, boolean `(N, 1, H, W)`; None for one that observes a field instead.
        """
        return None

    def keep(self, seen: Tensor) -> None:  # noqa: B027 (most recorded nothing)
        """Forgets what was recorded outside the cells `(N, 1, H, W)`."""

    def select(self, cases: Tensor) -> Sensor:
        """The sensor of the cases `(n,)` among those that were loaded."""
        return self

    @abstractmethod
    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """The observed values as linear observations of normalised fields."""


class Component(Sensor):
    """One component of the velocity.

    Arguments:
        component: `u`, along x, or `v`, along y.

    Raises:
        ValueError: A component of another name.
    """

    def __init__(self, component: Components = "u") -> None:
        if component not in ("u", "v", "both"):
            raise ValueError(f"component must be u, v or both, got {component}")
        self.component = component

    def measure(self, truth: Tensor, grid: Grid) -> Tensor:
        """The component that it reads; NaN in the other."""
        kept = torch.tensor([name in (self.component, "both") or self.component == "both" for name in "uv"])
        return torch.where(kept.view(1, 2, 1, 1), truth, torch.nan)

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Rows of the chosen component."""
        return [cells(observation, self.component)]


class Radial(Sensor):
    """Velocities away from radars: the projection of the velocity in a cell on the bearing from each site.

    Arguments:
        sites: The positions `[x, y]` of the radars, in the coordinates of the data (longitude and latitude, or metres).
        velocity: Variables of the file with what each radar measured; without them the truth is seen through it.
        bearing: Variables with the bearing of each cell from each radar, degrees clockwise from north; those of the
            sites without.
        error: Variables with the errors, in the units of the velocity; the error of the observation without.

    Raises:
        ValueError: Neither sites nor velocities, or lists of different lengths.
    """

    def __init__(
        self,
        sites: Sequence[list[float]] = (),
        velocity: Sequence[str] = (),
        bearing: Sequence[str] = (),
        error: Sequence[str] = (),
    ) -> None:
        if any(len(site) != 2 for site in sites) or not (sites or velocity):
            raise ValueError(f"sites must be a list of [x, y], such as [[18.1,-34.2]], got {list(sites)}")
        for name, given in (("bearing", bearing or sites), ("error", error)):
            if velocity and len(given) not in ({len(velocity)} if name == "bearing" else {0, len(velocity)}):
                raise ValueError(f"{name} must name one variable for each of velocity={list(velocity)}, got {given}")
        self.sites, self.velocity, self.bearing, self.error = sites, velocity, bearing, error
        self.bearings: list[Tensor] = []
        self.recorded: list[tuple[Tensor, Tensor | None]] = []

    def place(self, x: Tensor, y: Tensor, geographic: bool) -> None:
        """Computes the bearing of every cell from every site, `(H, W)`, in degrees clockwise from north."""
        self.bearings = []
        for east, north in self.sites:
            across, along = x[None, :] - east, y[:, None] - north
            if geographic:
                across = (across + 180) % 360 - 180
                across = across * torch.deg2rad(y).cos()[:, None]
            self.bearings.append(torch.rad2deg(torch.atan2(*torch.broadcast_tensors(across, along))))

    def load(self, variable: Callable[[str], Tensor]) -> Tensor | None:
        """Reads velocities, bearings and errors, where the file has them."""
        if not self.velocity:
            return None
        if self.bearing:
            self.bearings = [variable(name) for name in self.bearing]
        values = [variable(name) for name in self.velocity]
        errors = [variable(name) for name in self.error] or [None] * len(values)
        seen = []
        for k, (value, error, bearing) in enumerate(zip(values, errors, self.bearings, strict=True)):
            known = value.isfinite() & bearing.isfinite()
            known = known if error is None else known & error.isfinite()
            seen.append(known)
            values[k] = torch.where(known, value, torch.nan)
        self.recorded = list(zip(values, errors, strict=True))
        return torch.stack(seen).any(dim=0)

    def keep(self, seen: Tensor) -> None:
        """Forgets what was recorded outside the cells `(N, 1, H, W)`."""
        self.recorded = [(torch.where(seen, value, torch.nan), error) for value, error in self.recorded]

    def select(self, cases: Tensor) -> Radial:
        """The same with what was recorded of `cases` alone."""
        part, cases = copy.copy(self), cases.cpu()
        part.recorded = [(value[cases], None if error is None else error[cases]) for value, error in self.recorded]
        part.bearings = [each[cases] if each.ndim == 4 else each for each in self.bearings]
        return part

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """One observation for each radar. Raises ValueError before the sites have been placed."""
        if not self.bearings:
            raise ValueError("sites must be placed among the coordinates of the data first")
        bearings = [bearing.to(observation.y) for bearing in self.bearings]
        if not self.recorded:
            return [self.seen(bearing, observation) for bearing in bearings]
        found = []
        for bearing, (value, error) in zip(bearings, self.recorded, strict=True):
            sigma = observation.error if error is None else error.to(observation.y) / normalizer.std
            value = value.to(observation.y)
            present = value.isfinite() & observation.valid
            mean = radial(bearing, value, sigma, present).forward(normalizer.mean[None].to(value))
            found.append(radial(bearing, (value - mean) / normalizer.std, sigma, present))
        return found

    def seen(self, bearing: Tensor, observation: Observation) -> LinearObservation:
        """An observed field as one radar sees it."""
        radians = torch.deg2rad(bearing)
        y = observation.y[:, :1] * radians.sin() + observation.y[:, 1:] * radians.cos()
        return radial(bearing, y, observation.error, observation.observed)


class Footprint(Sensor):
    """Averages over the cells around each observed one, as of an instrument coarser than the grid.

    Arguments:
        size: The cells along a side of the footprint, odd.

    Raises:
        ValueError: A size that is not odd and positive.
    """

    def __init__(self, size: int = 3) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and >= 1, got {size}")
        self.size = size

    def measure(self, truth: Tensor, grid: Grid) -> Tensor:
        """Averages over the wet cells of each footprint; NaN where one of them is unknown."""
        zero = torch.zeros_like(truth)
        wet = torch.where(grid.valid, truth, 0.0)
        return footprint(self.size, grid, zero, zero[:, :1], zero[:, :1] == 0).forward(wet)

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """The averages of both components. The mean field is averaged, too."""
        given = footprint(self.size, grid, observation.y, observation.sigma_y, observation.observed)
        # y has had the mean of the single cell taken off; what counts is that of the footprint.
        mean = normalizer.mean[None].to(observation.y) / normalizer.std.to(observation.y)
        shifted = observation.y + mean - given.forward(mean)
        return [LinearObservation(given.forward, shifted, given.sigma, given.present)]

"""Instruments that do not measure both components of single cells: what their values are as linear observations.

A sensor turns an `Observation` into rows. In a twin experiment, where the truth is known, `measure` gives what the
instrument would read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

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

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Rows of the chosen component."""
        return [cells(observation, self.component)]


class Radial(Sensor):
    """Velocities away from radars: the projection of the velocity in a cell on the bearing from each site.

    Arguments:
        sites: The positions `[x, y]` of the radars, in the coordinates of the data (longitude and latitude, or metres).

    Raises:
        ValueError: No site.
    """

    def __init__(self, sites: list[list[float]]) -> None:
        if not sites or any(len(site) != 2 for site in sites):
            raise ValueError(f"sites must be a list of [x, y], such as [[18.1,-34.2]], got {sites}")
        self.sites, self.bearings = sites, []

    def place(self, x: Tensor, y: Tensor, geographic: bool) -> None:
        """Computes the bearing of every cell from every site, `(H, W)`, in degrees clockwise from north."""
        self.bearings = []
        for east, north in self.sites:
            across, along = x[None, :] - east, y[:, None] - north
            if geographic:
                across = (across + 180) % 360 - 180
                across = across * torch.deg2rad(y).cos()[:, None]
            self.bearings.append(torch.rad2deg(torch.atan2(*torch.broadcast_tensors(across, along))))

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """One observation for each site. Raises ValueError before the sites have been placed."""
        if not self.bearings:
            raise ValueError("sites must be placed among the coordinates of the data first")
        found = []
        for bearing in self.bearings:
            radians = torch.deg2rad(bearing).to(observation.y)
            y = observation.y[:, :1] * radians.sin() + observation.y[:, 1:] * radians.cos()
            found.append(radial(bearing.to(observation.y), y, observation.sigma_y, observation.observed))
        return found


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

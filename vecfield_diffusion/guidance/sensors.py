"""Observation operators of instruments that do not measure both components of single cells.

An operator turns an `Observation` into linear observations `y = A x + n`. In a twin experiment, where the truth is
known, `measure` gives what the instrument would read. An operator is never changed: `placed`, `recorded`, `within` and
`select` return another one.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.axes import u_and_v
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.linear import (
    FLOOR,
    Components,
    LinearObservation,
    cells,
    footprint,
    radial,
    velocities,
)
from vecfield_diffusion.physics.grid import Grid


class Sensor(ABC):
    """What an instrument measures.

    Attributes:
        name: The option of `sensor=` that makes it.
        cells: Where the instrument itself recorded anything, boolean `(N, 1, H, W)`; None for one that a field is
            observed through.
        magnitude: The largest absolute value that it recorded in each cell, `(N, 1, H, W)`, 0 where none; None
            likewise.
        velocity: Variables of the file that hold what it recorded; empty for one that a field is observed through.
        scalar: Whether it reads one number of a cell, which has one error.
    """

    name: str = ""
    scalar: bool = False
    cells: Tensor | None = None
    magnitude: Tensor | None = None
    velocity: Sequence[str] = ()

    def placed(self, x: Tensor, y: Tensor, geographic: bool) -> Sensor:
        """Returns the operator among columns at `x` `(W,)` and rows at `y` `(H,)`, in degrees where `geographic`."""
        return self

    def measure(self, truth: Tensor, grid: Grid) -> Tensor:
        """Returns what it reads of fields `(N, 2, H, W)` in physical units, without error."""
        return truth

    def recorded(self, variable: Callable[[str], Tensor]) -> Sensor:
        """Returns the operator with what the instrument recorded itself, where it records anything.

        Arguments:
            variable: Reads a variable of the file by name, `(N, 1, H, W)`, NaN where missing.
        """
        return self

    def readings(self, y: Tensor) -> dict[str, Tensor]:
        """Returns what each instrument reads, by name, as vectors along its lines of sight `(N, 2, H, W)`.

        They are NaN where it reads nothing. Empty where it reads components of the velocity, as `y` has them.

        Arguments:
            y: The observed values `(N, 2, H, W)` in physical units, NaN elsewhere.
        """
        return {}

    def within(self, cells: Tensor) -> Sensor:
        """Returns the operator with what was recorded inside the cells `(N, 1, H, W)` alone."""
        return self

    def select(self, cases: Tensor) -> Sensor:
        """Returns the operator of the cases `(n,)` among those that were recorded."""
        return self

    @abstractmethod
    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Returns the observed values as linear observations of normalised fields."""


class Component(Sensor):
    """One component of the velocity.

    Arguments:
        component: `u`, along x, or `v`, along y.

    Raises:
        ValueError: A component of another name.
    """

    name = "component"

    def __init__(self, component: Components = "u") -> None:
        if component not in ("u", "v", "both"):
            raise ValueError(f"component must be u, v or both, got {component}")
        self.component = component

    def measure(self, truth: Tensor, grid: Grid) -> Tensor:
        """Returns the component that it reads; NaN in the other."""
        kept = torch.tensor([name in (self.component, "both") or self.component == "both" for name in "uv"])
        return torch.where(kept.view(2, 1, 1), truth, torch.nan)

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Returns rows of the chosen component."""
        return [cells(observation, self.component)]


class Radial(Sensor):
    """Velocities away from radars: the projection of the velocity in a cell on the bearing from each site.

    The bearing is the direction in which the beam passes the cell, at the cell: on the sphere that of the great circle
    from the site, in degrees clockwise from the north of the cell. It differs from the direction in which the beam left
    the site by the convergence of the meridians, 1.8 degrees 200 km east of a site at 45 N.

    Arguments:
        sites: The positions `[x, y]` of the radars, in the coordinates of the data (longitude and latitude, or metres).
        velocity: Variables of the file with what each radar measured; without them the truth is seen through it.
        bearing: Variables with the bearing at each cell away from each radar, degrees clockwise from north; those of
            the sites without.
        error: Variables with the errors, in the units of the velocity; the error of the observation without.

    Raises:
        ValueError: Neither sites nor velocities, or lists of different lengths.
    """

    name = "radial"
    scalar = True

    def __init__(
        self,
        sites: Sequence[list[float]] = (),
        velocity: Sequence[str] = (),
        bearing: Sequence[str] = (),
        error: Sequence[str] = (),
    ) -> None:
        if any(len(site) != 2 for site in sites) or not (sites or velocity):
            raise ValueError(f"sites must be a list of [x, y], such as [[18.1,-34.2]], got {list(sites)}")
        for name, listed in (("bearing", bearing or sites), ("error", error)):
            if velocity and len(listed) not in ({len(velocity)} if name == "bearing" else {0, len(velocity)}):
                raise ValueError(f"{name} must name one variable for each of velocity={list(velocity)}, got {listed}")
        self.sites, self.velocity, self.bearing, self.error = sites, velocity, bearing, error
        self.bearings: list[Tensor] = []
        self.records: list[tuple[Tensor, Tensor | None]] = []

    def placed(self, x: Tensor, y: Tensor, geographic: bool) -> Radial:
        """Returns the operator with the bearing of every cell from every site, `(H, W)`."""
        bearing = great_circle_bearing if geographic else plane_bearing
        return self._with(bearings=[bearing(x[None, :], y[:, None], *site) for site in self.sites])

    def recorded(self, variable: Callable[[str], Tensor]) -> Radial:
        """Returns the operator with velocities, bearings and errors, where the file has them."""
        if not self.velocity:
            return self
        bearings = [variable(name) for name in self.bearing] or self.bearings
        values = [variable(name) for name in self.velocity]
        errors = [variable(name) for name in self.error] or [None] * len(values)
        records = []
        for value, error, bearing in zip(values, errors, bearings, strict=True):
            known = value.isfinite() & bearing.isfinite()
            known = known if error is None else known & error.isfinite()
            records.append((torch.where(known, value, torch.nan), error))
        return self._with(bearings=bearings, records=records)

    def readings(self, y: Tensor) -> dict[str, Tensor]:
        """Returns the velocity along the beams of each radar: what it recorded, else that of the observed field."""
        angles = [torch.deg2rad(bearing).to(y) for bearing in self.bearings]
        angles = [angle[None, None] if angle.ndim == 2 else angle for angle in angles]
        beams = [torch.cat([angle.sin(), angle.cos()], dim=-3) for angle in angles]
        if self.records:
            values = [value for value, _ in self.records]
            return {name: value * beam for name, value, beam in zip(self.velocity, values, beams, strict=True)}
        names = [f"seen from {x:g}, {y:g}" for x, y in self.sites]
        return {name: (y * beam).sum(dim=-3, keepdim=True) * beam for name, beam in zip(names, beams, strict=True)}

    @property
    def cells(self) -> Tensor | None:
        """Where any radar recorded a velocity, boolean `(N, 1, H, W)`."""
        return torch.stack([value.isfinite() for value, _ in self.records]).any(dim=0) if self.records else None

    @property
    def magnitude(self) -> Tensor | None:
        """The largest speed along a beam that any radar recorded, `(N, 1, H, W)`."""
        values = [value.abs().nan_to_num(0.0, torch.inf) for value, _ in self.records]
        return torch.stack(values).amax(dim=0) if values else None

    def within(self, cells: Tensor) -> Radial:
        """Returns the operator with what was recorded inside the cells `(N, 1, H, W)` alone."""
        return self._with(records=[(torch.where(cells, value, torch.nan), error) for value, error in self.records])

    def select(self, cases: Tensor) -> Radial:
        """Returns the operator with what was recorded of `cases` alone."""
        cases = cases.cpu()
        return self._with(
            records=[(value[cases], None if error is None else error[cases]) for value, error in self.records],
            bearings=[bearing if bearing.ndim == 2 else bearing[cases] for bearing in self.bearings],
        )

    def _with(self, **changes: Any) -> Radial:
        """Returns a copy with other bearings or records."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Returns one observation for each radar. Raises ValueError before the sites have been placed."""
        if not self.bearings:
            raise ValueError("sites must be placed among the coordinates of the data first")
        bearings = [bearing.to(observation.y) for bearing in self.bearings]
        if not self.records:
            return [self.projected(bearing, observation) for bearing in bearings]
        found = []
        for bearing, (value, error) in zip(bearings, self.records, strict=True):
            sigma = observation.error if error is None else error.to(observation.y) / normalizer.std
            value = value.to(observation.y)
            present = value.isfinite() & observation.valid
            mean = radial(bearing, value, sigma, present).forward(normalizer.mean[None].to(value))
            found.append(radial(bearing, (value - mean) / normalizer.std, sigma, present))
        return found

    def projected(self, bearing: Tensor, observation: Observation) -> LinearObservation:
        """Returns an observed field as one radar measures it."""
        radians = torch.deg2rad(bearing)
        u, v = u_and_v(observation.y)
        y = u * radians.sin() + v * radians.cos()
        return radial(bearing, y, observation.error, observation.observed)


class Footprint(Sensor):
    """Averages over the cells around each observed one, as of an instrument coarser than the grid.

    Arguments:
        size: The cells along a side of the footprint, odd.

    Raises:
        ValueError: A size that is not odd and positive.
    """

    name = "footprint"

    def __init__(self, size: int = 3) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and >= 1, got {size}")
        self.size = size

    def measure(self, truth: Tensor, grid: Grid) -> Tensor:
        """Returns averages over the wet cells of each footprint; NaN where one of them is unknown."""
        zero = torch.zeros_like(truth)
        one = zero.narrow(-3, 0, 1)
        wet = torch.where(grid.valid, truth, 0.0)
        return footprint(self.size, grid, zero, one, one == 0).forward(wet)

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Returns the averages of both components. The mean field is averaged, too."""
        averages = footprint(self.size, grid, observation.y, observation.sigma_y, observation.observed)
        # y has had the mean of the single cell taken off; what counts is that of the footprint.
        mean = normalizer.mean[None].to(observation.y) / normalizer.std.to(observation.y)
        shifted = observation.y + mean - averages.forward(mean)
        return [velocities(observation, replace(averages, y=shifted))]


class Continued(Sensor):
    """An instrument, and the first frames of sequences, which are known whole, whatever it reads of them.

    Arguments:
        sensor: The instrument.
        fields: The frames, `(N, K, 2, H, W)` in physical units, NaN where they are not known.
    """

    def __init__(self, sensor: Sensor, fields: Tensor) -> None:
        self.name, self.sensor, self.fields = sensor.name, sensor, fields

    def select(self, cases: Tensor) -> Continued:
        """See `Sensor`."""
        return Continued(self.sensor.select(cases), self.fields[cases.cpu()])

    def rows(self, observation: Observation, normalizer: Normalizer, grid: Grid) -> Sequence[LinearObservation]:
        """Returns the rows of the instrument, then the values of the frames."""
        y, frames = normalizer.normalize(self.fields.to(observation.y)), self.fields.shape[1]
        known = LinearObservation(lambda x: x[:, :frames], y, y.new_full((1,), FLOOR), y.isfinite())
        return [*self.sensor.rows(observation, normalizer, grid), known]


def plane_bearing(x: Tensor, y: Tensor, east: float, north: float) -> Tensor:
    """Returns the direction away from a site `(east, north)` in a plane, degrees clockwise from y, `(H, W)`.

    Arguments:
        x: The coordinate of the columns, `(1, W)`.
        y: The coordinate of the rows, `(H, 1)`.
        east: The x of the site.
        north: The y of the site.
    """
    return torch.rad2deg(torch.atan2(*torch.broadcast_tensors(x - east, y - north)))


def great_circle_bearing(lon: Tensor, lat: Tensor, east: float, north: float) -> Tensor:
    """Returns the direction away from a site along the great circle, at each cell, `(H, W)`.

    It is the azimuth from the cell to the site, turned by 180 degrees: degrees clockwise from the north of the cell.

    Arguments:
        lon: The longitude of the columns in degrees, `(1, W)`.
        lat: The latitude of the rows in degrees, `(H, 1)`.
        east: The longitude of the site.
        north: The latitude of the site.
    """
    here, there = torch.deg2rad(lat), torch.deg2rad(torch.tensor(north, dtype=lat.dtype))
    apart = torch.deg2rad(lon - east)
    across = apart.sin() * there.cos()
    along = here.sin() * there.cos() * apart.cos() - here.cos() * there.sin()
    return torch.rad2deg(torch.atan2(*torch.broadcast_tensors(across, along)))

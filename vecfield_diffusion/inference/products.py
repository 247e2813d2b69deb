"""What people read off an ensemble of filled fields: quantiles, chances, directions, energy, vorticity and strain.

Each product is computed of the members of a block of times and written beside them, in the units of the input. With x_i
the M members of a quantity in a cell:

    quantile       of probability p, between the order statistics about p (M + 1): below x_(k) the truth lies with
                   probability k / (M + 1) if it is one more draw; the outermost members stand for what is beyond
    exceedance     the share of members above a threshold, which has the expectation of the probability for every M
    direction      of the mean of the unit vectors, whose length R gives the circular deviation sqrt(-2 ln R), which is
                   the deviation of the angle where this is small (Mardia & Jupp 2000, section 2.3.4)
    energy         |x|^2 / 2: e, mean over the members; the part of the eddies, half the unbiased variance of both
                   components; the part of the mean, |mean|^2 / 2 less 1 / M of that of the eddies, which M members
                   leave in their mean. Both have the expectation of the law's, and e is their sum
    vorticity      and strain, sqrt((du/dx - dv/dy)^2 + (dv/dx + du/dy)^2): mean and unbiased deviation over the members
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.inference.template import Axis, Ensemble, Variable
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import strain, vorticity

#: What CF calls quantities of the fluid that standard names of components speak of. It has no names of others.
FLUIDS = {
    "sea_water": {
        "speed": "sea_water_speed",
        "direction": "sea_water_velocity_to_direction",
        "vorticity": "ocean_relative_vorticity",
        "energy": "specific_kinetic_energy_of_sea_water",
    },
    "wind": {
        "speed": "wind_speed",
        "direction": "wind_to_direction",
        "vorticity": "atmosphere_relative_vorticity",
        "energy": "specific_kinetic_energy_of_air",
    },
}
#: The long name and the function of members `(M, T, 2, H, W)` of a quantity.
Quantity = tuple[str, Callable[[NDArray], NDArray]]


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of both components and of the speed.

    Arguments:
        levels: Their probabilities, in ]0, 1[.
    """

    levels: Sequence[float]

    def axes(self, units: str) -> dict[str, Axis]:
        """See `Product`."""
        return {"quantile": (np.asarray(self.levels), {"long_name": "probability of less", "units": "1"})}

    def variables(self, drawn: Ensemble) -> Iterator[Variable]:
        """See `Product`."""
        for what in (*drawn.names, "speed"):
            words, quantity = quantity_of(what, drawn.names)
            values = np.quantile(quantity(drawn.members), self.levels, axis=0, method="weibull")
            labels = {"long_name": f"{words}, quantiles", "units": drawn.units}
            yield Variable(f"{what}_quantiles", ("quantile",), values, labels | _named(what, drawn))


@dataclass(frozen=True)
class Exceedance:
    """The probability that a quantity is more than thresholds.

    Arguments:
        thresholds: By quantity - `speed`, the name of a component, or `towards_<degrees>` - in the units of the output.
    """

    thresholds: Mapping[str, Sequence[float]]

    def axes(self, units: str) -> dict[str, Axis]:
        """See `Product`."""
        return {
            f"{what}_threshold": (
                np.asarray(values, dtype=float),
                {"long_name": f"threshold of {what}", "units": units},
            )
            for what, values in self.thresholds.items()
        }

    def variables(self, drawn: Ensemble) -> Iterator[Variable]:
        """See `Product`."""
        for what, thresholds in self.thresholds.items():
            words, quantity = quantity_of(what, drawn.names)
            found = quantity(drawn.members)
            chances = np.stack([(found > threshold).mean(axis=0) for threshold in thresholds])
            labels = {"long_name": f"probability that the {words} exceeds the threshold", "units": "1"}
            yield Variable(f"{what}_exceedance", (f"{what}_threshold",), chances, labels)


@dataclass(frozen=True)
class Direction:
    """Where the velocity points to, in degrees from the second component to the first one, and how sure that is."""

    def axes(self, units: str) -> dict[str, Axis]:
        """See `Product`."""
        return {}

    def variables(self, drawn: Ensemble) -> Iterator[Variable]:
        """See `Product`."""
        u, v = components(drawn.members)
        size = np.hypot(u, v)
        still = size == 0
        x, y = (np.where(still, 0.0, part / np.where(still, 1.0, size)).mean(axis=0) for part in (u, v))
        length = np.clip(np.hypot(x, y), np.finfo(float).tiny, 1.0)
        north = "northward" in drawn.standard_names[1]
        turn = "clockwise from north" if north else "from the axis of the second component"
        labels = {"units": "degree", "comment": f"towards, {turn}"}
        named = _named("direction", drawn) if north else {}
        angle = np.degrees(np.arctan2(x, y)) % 360
        yield Variable("direction", (), angle, {"long_name": "mean direction", **labels, **named})
        spread = np.degrees(np.sqrt(-2 * np.log(length)))
        labels["long_name"] = "circular deviation of the direction"
        yield Variable("direction_std", (), spread, labels | _of_error(named))


@dataclass(frozen=True)
class KineticEnergy:
    """Kinetic energy for each unit of mass: in all, of the mean and of the deviations from it."""

    def axes(self, units: str) -> dict[str, Axis]:
        """See `Product`."""
        return {}

    def variables(self, drawn: Ensemble) -> Iterator[Variable]:
        """See `Product`."""
        members = drawn.members.astype(np.float64)
        whole = 0.5 * np.square(members).sum(axis=-3).mean(axis=0)
        eddies = np.full_like(whole, np.nan)
        if len(members) > 1:
            eddies = 0.5 * members.var(axis=0, ddof=1).sum(axis=-3)
        units = "m2 s-2" if drawn.units == "m s-1" else f"({drawn.units})2"
        named = _named("energy", drawn)
        yield Variable("kinetic_energy", (), whole, {"long_name": "kinetic energy", "units": units, **named})
        for part, values in (("mean", whole - eddies), ("eddy", eddies)):
            labels = {"long_name": f"kinetic energy of the {'mean' if part == 'mean' else 'deviations from the mean'}"}
            yield Variable(f"kinetic_energy_{part}", (), values, {**labels, "units": units, **named})


@dataclass(frozen=True)
class Derivative:
    """A quantity of the derivatives in space: mean and deviation over the members.

    Arguments:
        name: `vorticity` or `strain`.
        grid: The grid.
        units: Of the derivatives.
    """

    name: str
    grid: Grid
    units: str = "s-1"

    def axes(self, units: str) -> dict[str, Axis]:
        """See `Product`."""
        return {}

    def variables(self, drawn: Ensemble) -> Iterator[Variable]:
        """See `Product`."""
        operator = {"vorticity": vorticity, "strain": strain}[self.name]
        grid = self.grid.to("cpu")
        found = np.stack([_scalar(operator, member, grid) for member in drawn.inner])
        spread = found.std(axis=0, ddof=1) if len(found) > 1 else np.full_like(found[0], np.nan)
        named = _named(self.name, drawn)
        labels = {"long_name": f"{self.name}, ensemble mean", "units": self.units}
        yield Variable(self.name, (), found.mean(axis=0), labels | named)
        labels["long_name"] = f"{self.name}, ensemble standard deviation"
        yield Variable(f"{self.name}_std", (), spread, labels | _of_error(named))


def _scalar(operator: Callable[[Tensor, Grid], Tensor], fields: NDArray, grid: Grid) -> NDArray:
    """A scalar `(T, H, W)` of fields `(T, 2, H, W)`."""
    return operator(torch.from_numpy(np.ascontiguousarray(fields)).double(), grid)[:, 0].numpy()


def _named(what: str, drawn: Ensemble) -> dict[str, str]:
    """The standard name of a quantity as an attribute; none where CF has none, or no name tells what moves."""
    known = {name: standard for name, standard in zip(drawn.names, drawn.standard_names, strict=True) if standard}
    known |= next((names for word, names in FLUIDS.items() if word in drawn.standard_names[0]), {})
    return {"standard_name": known[what]} if what in known else {}


def _of_error(named: dict[str, str]) -> dict[str, str]:
    """The same of its deviation."""
    return {key: f"{name} standard_error" for key, name in named.items()}


def components(members: NDArray) -> tuple[NDArray, NDArray]:
    """Returns both components `(M, T, H, W)` of members `(M, T, 2, H, W)` in double precision."""
    return members[..., 0, :, :].astype(np.float64), members[..., 1, :, :].astype(np.float64)


def quantity_of(what: str, names: Sequence[str]) -> Quantity:
    """Returns the words for a quantity, and the function of members `(M, T, 2, H, W)` that it is, `(M, T, H, W)`.

    Arguments:
        what: `speed`, the name of a component, or `towards_<degrees>`: the part of the velocity in a direction, counted
            from the second component (north) to the first one (east).
        names: Those of the components.

    Raises:
        ValueError: None of these.
    """
    if what == "speed":
        return "speed", lambda members: np.hypot(*components(members))
    if what in names:
        return what, lambda members: components(members)[list(names).index(what)]
    kind, _, degrees = what.partition("_")
    if kind != "towards":
        raise ValueError(f"expected speed, {', '.join(names)} or towards_<degrees>, got {what}")
    angle = np.radians(float(degrees))

    def towards(members: NDArray) -> NDArray:
        u, v = components(members)
        return np.sin(angle) * u + np.cos(angle) * v

    return f"velocity towards {float(degrees):g} degrees", towards

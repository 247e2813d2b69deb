"""What an ensemble of filled fields looks like as an `xr.Dataset`, in memory or in a file: one template for both.

With components `u` and `v` it holds their ensemble means `u`, `v` over (time, y, x), the unbiased standard deviations
`u_std`, `v_std` (NaN for one member), `u_members`, `v_members` with `member` in front, `u_truth`, `v_truth` where
known, and the flags `observed` and `valid`. Cells that are not valid are NaN. Means and deviations are those of the
members as they are written, in the units and along the axes of the input.

It keeps to CF 1.8 and ACDD 1.3. Mean, members and truth are one quantity and bear one standard name, the deviation has
the modifier `standard_error`; `ancillary_variables` lead from the mean to its deviation and flag; `member` is the axis
`realization`, and `ensemble` the number of members, which `cell_methods` are over. The mean comes first, for readers
that take the first variable of a standard name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from vecfield_diffusion.inference.work_items import Work

CONVENTIONS = {"Conventions": "CF-1.8, ACDD-1.3"}
TITLE = {"title": "Velocity fields filled by vecfield_diffusion"}
WORDS = ("velocity along x", "velocity along y")
METHODS = {"": "ensemble: mean", "_std": "ensemble: standard_deviation"}
KINDS = {"_std": "ensemble standard deviation", "_members": "members of the ensemble", "_truth": "known values"}
#: What ISO 19115 calls them.
CONTENTS = {
    "": "modelResult",
    "_std": "qualityInformation",
    "_members": "modelResult",
    "_truth": "referenceInformation",
}
#: The scalar coordinate that an ensemble was taken together over.
ENSEMBLE = "ensemble"
REALIZATION = {"standard_name": "realization", "long_name": "member of the ensemble", "units": "1"}
#: Attributes that say how the input stored its numbers, or that name variables which the output lacks.
PACKING = {"scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "bounds", "climatology"}
#: The same of the components, whose numbers are new.
LIMITS = {"valid_min", "valid_max", "valid_range", "actual_range"}
STORAGE = PACKING | LIMITS
STORAGE |= {"coordinates", "ancillary_variables", "cell_measures"}
Axis = tuple[NDArray | None, Mapping[str, Any]]
Coordinates = Mapping[str, Axis]


def unchanged(velocity: NDArray) -> NDArray:
    """Returns velocities as they are: the input has the units and axes that the network works in."""
    return velocity


@dataclass(frozen=True)
class Template:
    """What the output takes from the input.

    Arguments:
        names: The names of the components.
        dims: The names of the dimensions time, y and x.
        coordinates: Of these dimensions, for all times to be written: values (None where the source has none) and
            attributes. Units and calendar of `datetime64` values say how they are stored.
        units: The units of a component whose attributes name none.
        component_attrs: The attributes of the two components: standard_name, long_name, grid_mapping...
        extra_coords: Coordinates that are no dimension, such as 2-D latitude and longitude or the grid mapping: their
            dimensions, values and attributes.
        attributes: Global attributes, those of the source and the provenance; None is left out.
        restore: From velocities `(..., 2, H, W)` as the network works with them to the units and axes of the input.

    Raises:
        ValueError: Components of one name, or coordinates that are not those of the dimensions.
    """

    names: tuple[str, str] = ("u", "v")
    dims: tuple[str, str, str] = ("time", "y", "x")
    coordinates: Coordinates = field(default_factory=dict)
    units: str = "m s-1"
    component_attrs: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default_factory=lambda: ({}, {}))
    extra_coords: Mapping[str, tuple[tuple[str, ...], NDArray, Mapping[str, Any]]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    restore: Callable[[NDArray], NDArray] = unchanged

    def __post_init__(self) -> None:
        if self.names[0] == self.names[1]:
            raise ValueError(f"names must differ, got {self.names}")
        strange = set(self.coordinates) - set(self.dims)
        if strange:
            raise ValueError(f"coordinates must be of the dimensions {self.dims}, got {', '.join(sorted(strange))}")

    @property
    def component_units(self) -> str:
        """The units of the velocity in the output."""
        return str(self.component_attrs[0].get("units", self.units))


@dataclass(frozen=True)
class FilledTimes:
    """Filled fields of T times.

    Arguments:
        positions: The places of its times in the output, `(T,)`.
        members: The fields as the network works with them, `(M, T, 2, H, W)`.
        observed: The measured cells, `(T, H, W)`, `(T, 1, H, W)` or, for each component, `(T, 2, H, W)`.
        truth: The known fields `(T, 2, H, W)`, NaN where unknown; None where nothing is known.
    """

    positions: Sequence[int]
    members: NDArray
    observed: NDArray
    truth: NDArray | None = None

    def at(self, position: int) -> NDArray:
        """Returns the members of one of the times, `(M, 2, H, W)`."""
        return self.members[:, list(self.positions).index(position)]

    def check(self, members: int, cells: tuple[int, int], done: set[int]) -> None:
        """Raises ValueError where shapes do not belong together, or a position is among those that are `done`."""
        times = len(self.positions)
        flags = [(times, *cells), (times, 1, *cells), (times, 2, *cells)]
        if self.members.shape != (members, times, 2, *cells) or self.observed.shape not in flags:
            expected = f"members {(members, times, 2, *cells)} and observed {flags[1]}"
            raise ValueError(f"expected {expected}, got {self.members.shape} and {self.observed.shape}")
        if self.truth is not None and self.truth.shape != self.members.shape[1:]:
            raise ValueError(f"truth must be of shape {self.members.shape[1:]}, got {self.truth.shape}")
        if not times or min(self.positions) < 0 or len(set(self.positions) - done) < times:
            raise ValueError(f"positions must be >= 0, each written once, got {list(self.positions)}")


class Variable(NamedTuple):
    """A variable of the output: its name, its dimensions before time, y and x, its values and attributes.

    Values are `(T, H, W)`, with the further dimensions in front.
    """

    name: str
    leading: tuple[str, ...]
    values: NDArray
    attrs: dict[str, Any]


@dataclass(frozen=True)
class Ensemble:
    """What products are made of.

    Arguments:
        inner: The members as the network works with them, along the axes of the grid, `(M, T, 2, H, W)`.
        members: The same in the units and along the axes of the output.
        names: Of the components.
        units: Of the members.
        standard_names: Of the components; empty where there are none.
    """

    inner: NDArray
    members: NDArray
    names: tuple[str, str]
    units: str
    standard_names: tuple[str, str]


class Product(Protocol):
    """Something that is made of an ensemble and written beside it."""

    def axes(self, units: str) -> Mapping[str, Axis]:
        """Returns the dimensions that its variables have beside time, y and x, with velocities in `units`."""

    def variables(self, drawn: Ensemble) -> Iterator[Variable]:
        """Yields its variables, with the values of a block."""


@dataclass(frozen=True)
class FileLayout:
    """The output of a template on a domain `valid` `(H, W)`.

    Arguments:
        template: What it takes from the input.
        valid: The cells of the domain.
        members: M.
        products: What is written beside them.
        split: Whether each member has a file of its own, and the file of the mean none.
    """

    template: Template
    valid: NDArray
    members: int
    products: Sequence[Product] = ()
    split: bool = False

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members must be >= 1, got {self.members}")

    def length(self, done: int) -> int:
        """Returns the number of times, of which `done` are there."""
        time, _ = self.template.coordinates.get(self.template.dims[0], (None, {}))
        return done if time is None else len(time)

    def check_whole(self, done: set[int]) -> int:
        """Returns the number of times. Raises ValueError where some of them are missing among those that are `done`."""
        length = self.length(len(done))
        missing = sorted(set(range(length)) ^ done)
        if missing or not length:
            raise ValueError(f"positions must be 0 to {length - 1}, missing or beyond: {missing}")
        return length

    def frame(self) -> xr.Dataset:
        """Returns all but what depends on time: coordinates, domain, global attributes."""
        template = self.template
        extras = {name: variable_of(*extra) for name, extra in template.extra_coords.items()}
        labels = _flag_labels("cells of the domain", "outside", "inside") | self._references(0)
        valid = variable_of(template.dims[1:], self.valid.astype(np.int8), labels)
        axes = dict(template.coordinates)
        if not self.split:
            axes["member"] = (np.arange(self.members), REALIZATION)
        for each in self.products:
            axes |= each.axes(template.component_units)
        extras[ENSEMBLE] = variable_of((), self.members, {"long_name": "members of the ensemble", "units": "1"})
        coords = {name: variable_of((name,), *axis) for name, axis in axes.items() if axis[0] is not None}
        known = {key: value for key, value in template.attributes.items() if value is not None}
        return xr.Dataset({**extras, "valid": valid}, coords, TITLE | known | CONVENTIONS)

    def variables(self, block: FilledTimes) -> Iterator[Variable]:
        """Yields the variables that depend on time, with the values of a block."""
        members = self.template.restore(block.members)
        mean = members.mean(axis=0, dtype=np.float64)
        std = np.full_like(mean, np.nan) if len(members) == 1 else members.std(axis=0, dtype=np.float64, ddof=1)
        truth = None if block.truth is None else self.template.restore(block.truth)
        fields = {"": mean, "_std": std, "_members": None if self.split else members, "_truth": truth}
        for suffix, channel in product(fields, range(2)):
            if fields[suffix] is not None:
                name, values = self.template.names[channel] + suffix, fields[suffix][..., channel, :, :]
                leading = ("member",) if suffix == "_members" else ()
                yield Variable(name, leading, self._inside(values), self._describe(suffix, channel))
        yield self._observed(block)
        first, second = (str(attrs.get("standard_name", "")) for attrs in self.template.component_attrs)
        names, units = self.template.names, self.template.component_units
        drawn = Ensemble(block.members, members, names, units, (first, second))
        for made in (variable for each in self.products for variable in each.variables(drawn)):
            labels = {"coverage_content_type": "modelResult", **made.attrs, **self._references(0, over=True)}
            yield made._replace(values=self._inside(made.values), attrs=labels)

    def member_frame(self, number: int) -> xr.Dataset:
        """Returns all but what depends on time of the file of one member."""
        alone = replace(self, products=(), split=True).frame().drop_vars(ENSEMBLE)
        return alone.assign_attrs(realization_index=number)

    def member_variables(self, block: FilledTimes, number: int) -> Iterator[Variable]:
        """Yields the variables that depend on time of the file of one member: what a file of one field holds."""
        fields = self.template.restore(block.members[number])
        for channel, name in enumerate(self.template.names):
            title = self.template.component_attrs[channel].get("long_name", WORDS[channel])
            attrs = self._describe("_members", channel) | {"long_name": f"{title}, member {number}"}
            yield Variable(name, (), self._inside(fields[:, channel]), attrs | {"ancillary_variables": "observed"})
        yield self._observed(block)

    def dims(self, variable: Variable) -> tuple[str, ...]:
        """Returns the names of the dimensions of a variable."""
        return (*variable.leading, *self.template.dims)

    def _inside(self, values: NDArray) -> NDArray:
        """Returns values `(..., H, W)` as they are written: NaN outside the domain."""
        return np.where(self.valid, values, np.nan).astype(np.float32)

    def _observed(self, block: FilledTimes) -> Variable:
        """Returns the flag of what was measured."""
        meanings = ("hidden", "observed", *(f"only_{name}" for name in self.template.names))
        labels = _flag_labels("cells that were measured", *meanings) | self._references(0)
        return Variable("observed", (), flags(block.observed, self.valid), labels | {"standard_name": "status_flag"})

    def _describe(self, suffix: str, channel: int) -> dict[str, Any]:
        """Returns the attributes of one variable of the component `channel`."""
        attrs = {key: value for key, value in self.template.component_attrs[channel].items() if key not in STORAGE}
        title = attrs.setdefault("long_name", WORDS[channel])
        attrs |= {"units": attrs.get("units", self.template.units)} | self._references(channel, over=suffix in METHODS)
        attrs |= {"coverage_content_type": CONTENTS[suffix]}
        methods = str(attrs.pop("cell_methods", "")).replace(METHODS[""], "").split()
        if suffix == "":
            beside = {"ancillary_variables": f"{self.template.names[channel]}_std observed"}
            return attrs | beside | {"cell_methods": " ".join([*methods, METHODS[""]])}
        kept = ("units", "grid_mapping", "coordinates", "coverage_content_type", "standard_name")
        found = {"long_name": f"{title}, {KINDS[suffix]}"} | {key: attrs[key] for key in kept if key in attrs}
        if suffix != "_std":
            return found
        named = {"standard_name": f"{attrs['standard_name']} standard_error"} if "standard_name" in attrs else {}
        return found | named | {"cell_methods": METHODS[suffix]}

    def _references(self, channel: int, *, over: bool = False) -> dict[str, str]:
        """Returns the names of the grid mapping and of the coordinates that are no dimension, for every field.

        `over` is of what was taken together over the ensemble.
        """
        attrs = self.template.component_attrs[channel]
        mapping = {"grid_mapping": attrs["grid_mapping"]} if "grid_mapping" in attrs else {}
        names = [name for name in self.template.extra_coords if name not in (*mapping.values(), ENSEMBLE)]
        names += [ENSEMBLE] * over
        return mapping | ({"coordinates": " ".join(names)} if names else {})


class Buffer:
    """Takes blocks of filled fields and makes a Dataset of them, in memory.

    Arguments:
        layout: What the Dataset is like.
    """

    def __init__(self, layout: FileLayout) -> None:
        self.layout, self.work, self.members_of = layout, Work(), None
        self.blocks: list[FilledTimes] = []

    def done(self) -> set[int]:
        """Returns the positions of the times that are there."""
        return {position for block in self.blocks for position in block.positions}

    def members(self, position: int) -> NDArray:
        """Returns the members `(M, 2, H, W)` of a time that is there."""
        return next(block.at(position) for block in self.blocks if position in block.positions)

    def write(
        self, positions: Sequence[int], members: NDArray, observed: NDArray, truth: NDArray | None = None
    ) -> None:
        """Takes a block. Raises ValueError where it does not fit the layout, or a time is there already."""
        block = FilledTimes(positions, members, observed, truth)
        block.check(self.layout.members, self.layout.valid.shape, self.done())
        self.blocks.append(block)

    def finish(self) -> xr.Dataset:
        """Returns the Dataset. Raises ValueError where a time is missing."""
        length, out = self.layout.check_whole(self.done()), self.layout.frame()
        for block in self.blocks:
            for variable in self.layout.variables(block):
                if variable.name not in out:
                    shape = (*variable.values.shape[:-3], length, *variable.values.shape[-2:])
                    empty = np.full(shape, np.nan if variable.values.dtype.kind == "f" else 0, variable.values.dtype)
                    out[variable.name] = xr.Variable(self.layout.dims(variable), empty, variable.attrs)
                out[variable.name].values[..., block.positions, :, :] = variable.values
        return as_opened(out)


def as_opened(data: xr.Dataset) -> xr.Dataset:
    """Returns a Dataset as xarray opens its file: what `coordinates` names is one, without the attribute."""
    names: set[str] = set()
    for variable in data.variables.values():
        if "coordinates" in variable.attrs:
            named = variable.attrs.pop("coordinates")
            variable.encoding["coordinates"] = named
            names.update(named.split())
    return data.set_coords(names & set(data.data_vars))


def flags(observed: NDArray[np.bool_], valid: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Returns 0 hidden, 1 observed, 2 and 3 the first or the second component alone, `(T, H, W)`."""
    first, second = np.moveaxis(observed.reshape(len(observed), -1, *valid.shape)[:, [0, -1]] & valid, 1, 0)
    return np.select([first & second, first, second], [1, 2, 3], 0).astype(np.int8)


def _flag_labels(long_name: str, *meanings: str) -> dict[str, Any]:
    values = np.arange(len(meanings), dtype=np.int8)
    return {"long_name": long_name, "flag_values": values, "flag_meanings": " ".join(meanings)}


def variable_of(dims: tuple[str, ...], values: NDArray, attributes: Mapping[str, Any]) -> xr.Variable:
    """Returns a variable that is written whole; units and calendar of dates belong to their encoding.

    CF 1.8 knows no integers of 64 bits: they have 32, or are floating-point numbers where these do not hold them; the
    limits of valid values have the type of the values.
    """
    array = np.asarray(values)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 4:
        narrow = array.astype(np.int32)
        array = narrow if (narrow == array).all() else array.astype(np.float64)
    dates = np.issubdtype(array.dtype, np.datetime64)
    encoding = {key: attributes[key] for key in ("units", "calendar") if dates and key in attributes}
    labels = {key: value for key, value in attributes.items() if key not in PACKING | encoding.keys()}
    for key in LIMITS & labels.keys() if array.dtype.kind in "iuf" else ():
        labels[key] = np.asarray(labels[key]).astype(array.dtype)[()]
    return xr.Variable(dims, array, labels, encoding | {"_FillValue": None} | ({"dtype": np.float64} if dates else {}))

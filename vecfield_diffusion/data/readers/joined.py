"""Several files as one set: one after the other along time, or one component each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vecfield_diffusion.data.coordinates import Plane
from vecfield_diffusion.data.readers.found import Found, FoundComponent
from vecfield_diffusion.data.stored import Combined, Joined, Reader
from vecfield_diffusion.data.units import SPEED, factor, same_units
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError


def joined(parts: Sequence[Found]) -> Found:
    """Files one after the other, in the order of their times.

    Raises:
        UserError: Two files are on different grids or in units that do not go together.
    """
    if len(parts) == 1:
        return parts[0]
    times, kinds = None, {None if part.time.values is None else part.time.values.dtype.kind for part in parts}
    if len(kinds) == 1 and None not in kinds:
        parts = sorted(parts, key=lambda part: part.time.values[0])
        times = [part.time.values for part in parts]
    first, lengths = parts[0], [part.length for part in parts]
    for part in parts[1:]:
        _check_alike(first, part)
    common = [name for name in first.variables if all(name in part.variables for part in parts)]
    components = tuple(
        replace(own, reader=Joined([_in_units(part.components[place], own) for part in parts], lengths))
        for place, own in enumerate(first.components)
    )
    return replace(
        first,
        components=components,
        length=sum(lengths),
        time=replace(first.time, values=None if times is None else np.concatenate(times)),
        notes=first.notes + _overlaps(parts, times),
        layout=f"{len(parts)} files of {first.layout}",
        variables={name: Joined([part.variables[name] for part in parts], lengths) for name in common},
        groups=_numbered(parts, "groups"),
        runs=_numbered(parts, "runs"),
        closing=tuple(close for part in parts for close in part.closing),
    )


def _in_units(part: FoundComponent, own: FoundComponent) -> Reader:
    """The reader of a file in the units of the first."""
    if part.units == own.units or same_units(part.units, own.units):
        return part.reader
    ratio = factor(part.units, SPEED) / factor(own.units, SPEED)
    return Combined([part.reader], (ratio, ratio))


def _numbered(parts: Sequence[Found], name: str) -> np.ndarray | None:
    """The numbers that `groups` or `runs` give to snapshots, one file after the other; None where no file has any."""
    if all(getattr(part, name) is None for part in parts):
        return None
    numbers, start = [], 0
    for part in parts:
        own = getattr(part, name)
        lone = np.arange(part.length) if name == "groups" else np.zeros(part.length, dtype=int)
        numbers.append((lone if own is None else own) + start)
        start = numbers[-1].max(initial=start - 1) + 1
    return np.concatenate(numbers)


def _overlaps(parts: Sequence[Found], times: Sequence[np.ndarray] | None) -> tuple[str, ...]:
    """What there is to say of files whose times do not follow each other."""
    if times is None:
        return ("not all files have times of one kind: joined in the order of their names",)
    pairs = [(parts[k], parts[k + 1]) for k in range(len(parts) - 1) if times[k + 1][0] <= times[k][-1]]
    if not pairs or parts[0].runs is not None:
        return ()
    before, after = pairs[0]
    return (f"the times of {len(pairs)} files overlap, such as {before.source} and {after.source}",)


def merged(first: Found, second: Found) -> Found:
    """Two sets that hold one component each, at the same times.

    Raises:
        UserError: Their times differ.
    """
    times = [part.time.values for part in (first, second)]
    if first.length != second.length or (times[0] is None) != (times[1] is None) or not np.array_equal(*times):
        begin = ["" if time is None else f" from {str(time[0])[:16]}" for time in times]
        raise UserError(
            f"{' and '.join(dict.fromkeys((first.source, second.source)))}: the components {first.components[0].name} "
            f"and {second.components[0].name} are at different times ({first.length}{begin[0]} and "
            f"{second.length}{begin[1]}). Interpolate one to the times of the other, or name others: {components()}"
        )
    u, v = first.components[0], second.components[0]
    places = u.place(), v.place()
    if u.shape == v.shape and (places[0] is None) != (places[1] is None):
        raise UserError(_differ(first, second, "coordinates", *("some" if place else "none" for place in places)))
    groups = [part.groups for part in (first, second) if part.groups is not None]
    return replace(
        first,
        components=first.components + second.components,
        layout=f"{first.layout} and {second.layout}",
        variables={**second.variables, **first.variables},
        variable_units={**second.variable_units, **first.variable_units},
        closing=first.closing + second.closing,
        points={**dict.fromkeys(second.variables, "v"), **dict.fromkeys(first.variables, "u")},
        groups=groups[0] if groups else None,
    )


def _spans(places: Sequence[Plane]) -> list[str]:
    return [
        f"x {np.nanmin(place.x):g} to {np.nanmax(place.x):g}, y {np.nanmin(place.y):g} to {np.nanmax(place.y):g}"
        for place in places
    ]


def _check_alike(first: Found, second: Found) -> None:
    """Raises UserError where two files do not have one grid, one name for each component and units of one kind."""
    names = [", ".join(part.name for part in found.components) for found in (first, second)]
    if names[0] != names[1]:
        raise UserError(_differ(first, second, "components", *names))
    for parts in zip(first.components, second.components, strict=True):
        shapes, units = [part.shape for part in parts], [part.units for part in parts]
        if shapes[0] != shapes[1]:
            raise UserError(_differ(first, second, "cells", *shapes))
        if units[0] != units[1] and None in (factor(unit, SPEED) for unit in units):
            raise UserError(_differ(first, second, "units", *units))
        for role in ("x", "y"):
            lines = [getattr(part, role).values for part in parts]
            if not _near(*lines, rtol=1e-6):
                ends = [None if line is None else f"{line[0]:g} to {line[-1]:g}" for line in lines]
                raise UserError(_differ(first, second, role, *ends))
        planes = [part.plane if part.plane is not None else part.globe for part in parts]
        if None not in planes and not all(
            _near(*(getattr(plane, axis) for plane in planes), rtol=1e-5, atol=1e-5) for axis in ("x", "y")
        ):
            raise UserError(_differ(first, second, "the coordinates of the cells", *_spans(planes)))
    if (first.mask is None) != (second.mask is None) or not np.array_equal(first.mask, second.mask):
        raise UserError(_differ(first, second, "masks", "one", "another"))


def _near(one: np.ndarray | None, other: np.ndarray | None, **tolerance: float) -> bool:
    if one is None or other is None:
        return one is None and other is None
    return np.allclose(one, other, equal_nan=True, **tolerance)


def _differ(first: Found, second: Found, what: str, here: object, there: object) -> str:
    return (
        f"{first.source} and {second.source} cannot be joined: {what} {here} in the one, {there} in the other. Give "
        f"files on one grid and in one unit: {option('path')}"
    )

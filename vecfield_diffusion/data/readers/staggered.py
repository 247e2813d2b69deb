"""Components on the sides of the cells, half a cell apart (a C-grid: Arakawa and Lamb 1977), brought to the centres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vecfield_diffusion.data.coordinates import Axis, Plane
from vecfield_diffusion.data.readers.found import Found, FoundComponent
from vecfield_diffusion.data.stored import Combined
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError

#: How far u lies from v, in cells along x and y: on one grid, on the far and on the near sides of the cells.
TOGETHER, FAR, NEAR = (0.0, 0.0), (0.5, -0.5), (-0.5, 0.5)


def collocated(found: Found, source: str) -> Found:
    """The set with both components on the same points; a C-grid is brought to the centres, which is said.

    Raises:
        UserError: The components lie on points that do not belong together.
    """
    if len(found.components) == 1:
        return found
    u, v = found.components
    offset = _offset(u, v)
    if offset == TOGETHER and u.shape == v.shape:
        return found
    if offset not in (FAR, NEAR):
        raise UserError(
            f"{source}: '{u.name}' {u.shape} and '{v.name}' {v.shape} do not lie on the same points, nor on those of a "
            "C-grid (half a cell apart, each along its own axis). Expected two components on the same points: "
            f"interpolate them to the centres of the cells, or choose others: {components()}"
        )
    if found.mask is not None:
        raise UserError(
            f"{source}: a mask ({option('valid')}, {option('invalid')}) cannot be brought to the centres of a C-grid. "
            "Leave it out, mark land by NaN in the components, or bring all to the centres first."
        )
    # A centre lies between a point and the one before it where u is on the far side, else the one after it.
    first, beside = (1, 0) if offset == FAR else (0, 1)
    height = min(u.shape[0], v.shape[0] - beside) - first
    width = min(u.shape[1] - beside, v.shape[1]) - first
    if min(height, width) < 2:
        raise UserError(f"{source}: a C-grid of {u.shape} and {v.shape} points has no 2x2 cells with both components.")
    print(
        f"note: {source}: '{u.name}' and '{v.name}' lie half a cell apart (a C-grid): brought to the "
        f"{height}x{width} centres between them by means of two"
    )
    rows, columns = slice(first, first + height), slice(first, first + width)
    other_rows, other_columns = slice(beside, beside + height), slice(beside, beside + width)
    cuts = {"centre": [(rows, columns)]}
    cuts |= {"u": [(rows, columns), (rows, other_columns)], "v": [(rows, columns), (other_rows, columns)]}
    shared = {
        "shape": (height, width),
        "x": _part(v.x, columns),
        "y": _part(u.y, rows),
        "plane": _mean_plane(u.plane, cuts["u"]),
        "globe": _mean_plane(u.globe, cuts["u"]),
        "angle": None if u.angle is None else np.angle(sum(np.exp(1j * u.angle[cut]) for cut in cuts["u"])),
    }
    return replace(
        found,
        components=tuple(
            replace(part, reader=Combined([part.reader], cuts=[cuts[name]]), **shared)
            for name, part in (("u", u), ("v", v))
        ),
        extra_coords={name: extra for name, extra in found.extra_coords.items() if not extra[0]},
        variables={name: Combined([item], cuts=[cuts[found.points[name]]]) for name, item in found.variables.items()},
        dims=None if found.dims is None else (found.dims[0], u.y.label or "y", v.x.label or "x"),
    )


def _offset(u: FoundComponent, v: FoundComponent) -> tuple[float, float] | None:
    """How far u lies from v; None where that varies, or nothing tells it."""
    here, there = places = u.place(), v.place()
    if None not in places and here.degrees == there.degrees:
        return TOGETHER if here.same(there) else stagger(here, there)
    if u.shape == v.shape or None not in places:
        return TOGETHER if u.shape == v.shape else None
    # Without coordinates the sizes tell: ROMS has u and v between the centres, WRF on either side of them.
    longer = u.shape[0] - v.shape[0], v.shape[1] - u.shape[1]
    return {(1, 1): FAR, (-1, -1): NEAR}.get(longer)


def stagger(first: Plane, second: Plane) -> tuple[float, float] | None:
    """How far the points of `first` lie from those of `second`, in cells along x and y; None where that varies."""
    height, width = (min(sizes) for sizes in zip(first.x.shape, second.x.shape, strict=True))
    here, there = (Plane(p.x[:height, :width], p.y[:height, :width], p.degrees) for p in (first, second))
    (ax, ay), (bx, by) = ((part[: height - 1, : width - 1] for part in here.steps(axis)) for axis in (1, 0))
    dx, dy = here.x - there.x, here.y - there.y
    if here.degrees:
        dx = ((dx + 180.0) % 360.0 - 180.0) * np.cos(np.deg2rad(here.y))
    dx, dy = dx[: height - 1, : width - 1], dy[: height - 1, : width - 1]
    area = ax * by - ay * bx
    shares = np.stack([(dx * by - dy * bx) / area, (ax * dy - ay * dx) / area])
    shares = shares[:, np.isfinite(shares).all(axis=0)]
    if not shares.size:
        return None
    middle = np.median(shares, axis=1)
    even = np.median(np.abs(shares - middle[:, None]), axis=1).max() < 0.05
    near = np.round(2 * middle) / 2
    return (float(near[0]), float(near[1])) if even and np.abs(near - middle).max() < 0.1 else None


def _part(axis: Axis, part: slice) -> Axis:
    return axis if axis.values is None else replace(axis, values=np.asarray(axis.values)[part])


def _mean_plane(plane: Plane | None, cuts: Sequence[tuple[slice, slice]]) -> Plane | None:
    if plane is None:
        return None
    (x, other), y = (plane.x[cut] for cut in cuts), sum(plane.y[cut] for cut in cuts) / 2
    step = (other - x + 180.0) % 360.0 - 180.0 if plane.degrees else other - x
    return Plane(x + step / 2, y, plane.degrees)

"""How east lies on the grid of a projection, from its grid mapping: exact, and without the places of the cells.

Snyder, J. P. (1987). Map projections: a working manual. U.S. Geological Survey Professional Paper 1395.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vecfield_diffusion.data.coordinates import Axis
from vecfield_diffusion.physics.grid import EARTH_RADIUS

#: Where the columns run east everywhere.
STRAIGHT = ("latitude_longitude", "mercator", "lambert_cylindrical_equal_area")


def angle_of(mapping: Mapping[str, Any], x: Axis, y: Axis) -> np.ndarray | None:
    """The angle from east to the axis x, anticlockwise in radians `(H, W)`; None where they are one.

    `mapping` are the attributes of the grid mapping, as CF has them.

    Raises:
        LookupError: A projection that is not known here, or lacks a parameter or coordinates.
    """
    name = mapping.get("grid_mapping_name", "no grid_mapping_name")
    if name in STRAIGHT:
        return None
    if name not in ANGLES:
        raise LookupError(f"{name}; known are {', '.join((*STRAIGHT, *ANGLES))}")
    if x.values is None or y.values is None:
        raise LookupError("the file has no coordinates x and y")
    metres = 1.0 if x.degrees else x.metres
    offsets = (float(mapping.get(f"false_{way}", 0.0)) for way in ("easting", "northing"))
    lines = (np.asarray(line.values, float) - offset for line, offset in zip((x, y), offsets, strict=True))
    return ANGLES[name](mapping, *(metres * plane for plane in np.meshgrid(*lines)))


def _polar(mapping: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Meridians run from the pole straight outward, where east is a quarter of a turn from them."""
    pole = _number(mapping, "latitude_of_projection_origin")
    if abs(pole) != 90.0:
        raise LookupError(f"a projection about {pole:g} degrees north, expected a pole")
    return -np.arctan2(x, -y) if pole > 0 else np.arctan2(x, y)


def _conic(mapping: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Lambert's conformal cone (Snyder 1987, eq. 15-1 to 15-9), whose meridians run from its tip."""
    origin = np.deg2rad(_number(mapping, "latitude_of_projection_origin"))
    parallels = np.deg2rad(np.ravel(_number(mapping, "standard_parallel")))
    radius = float(mapping.get("semi_major_axis", mapping.get("earth_radius", EARTH_RADIUS)))
    flattening = float(mapping.get("inverse_flattening", 0.0))
    flat = 1.0 / flattening if flattening else 1.0 - float(mapping.get("semi_minor_axis", radius)) / radius
    e = np.sqrt(flat * (2.0 - flat))

    def distance(lat: np.ndarray | float) -> np.ndarray | float:
        return np.tan(np.pi / 4 - lat / 2) / ((1 - e * np.sin(lat)) / (1 + e * np.sin(lat))) ** (e / 2)

    across = np.cos(parallels) / np.sqrt(1 - (e * np.sin(parallels)) ** 2)
    cone = np.sin(parallels[0])
    if np.ptp(parallels) > 0:
        cone = np.log(across[0] / across[-1]) / np.log(distance(parallels[0]) / distance(parallels[-1]))
    tip = radius * across[0] / cone * (distance(origin) / distance(parallels[0])) ** cone
    return -np.arctan2(np.sign(cone) * x, np.sign(cone) * (tip - y))


def _rotated(mapping: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The rotated grid's own east in the frame of the Earth, x and y in degrees of the grid."""
    x, y, pole = np.deg2rad(x), np.deg2rad(y), np.deg2rad(_number(mapping, "grid_north_pole_latitude"))
    place = np.cos(y) * np.cos(x) * np.sin(pole) - np.sin(y) * np.cos(pole), np.cos(y) * np.sin(x)
    east = -np.sin(x) * np.sin(pole), np.cos(x), -np.sin(x) * np.cos(pole)
    return np.arctan2(east[2], place[0] * east[1] - place[1] * east[0])


def _number(mapping: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401
    if key not in mapping or np.asarray(mapping[key]).dtype.kind not in "fiu":
        raise LookupError(f"its grid mapping has no number {key}")
    return mapping[key]


ANGLES: dict[str, Callable[[Mapping[str, Any], np.ndarray, np.ndarray], np.ndarray]] = {
    "polar_stereographic": _polar,
    "stereographic": _polar,
    "lambert_azimuthal_equal_area": _polar,
    "azimuthal_equidistant": _polar,
    "lambert_conformal_conic": _conic,
    "rotated_latitude_longitude": _rotated,
}

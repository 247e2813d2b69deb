"""East on the grids of projections: as the forward formulas of Snyder (1987) move a point that goes east."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from vecfield_diffusion.data.coordinates import Axis
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.readers.projections import angle_of
from vecfield_diffusion.errors import UserError

RADIUS, STEP = 6_371_229.0, 1e-6
Forward = Callable[[float, float], tuple[float, float]]


def stereographic(south: bool) -> tuple[Forward, dict]:
    """The sphere with 30 W (or E) straight below (or above) the pole, eq. 21-5 to 21-12."""
    sign = -1 if south else 1

    def forward(lon: float, lat: float) -> tuple[float, float]:
        rho = 2 * RADIUS * np.tan(np.pi / 4 - sign * lat / 2)
        return rho * np.sin(lon - 0.5), -sign * rho * np.cos(lon - 0.5)

    attrs = {"latitude_of_projection_origin": 90.0 * sign, "standard_parallel": 90.0 * sign}
    return forward, {"grid_mapping_name": "polar_stereographic", **attrs}


def conic(parallels: tuple[float, ...], origin: float, flattening: float = 0.0) -> tuple[Forward, dict]:
    """The cone through two parallels (or one) of an ellipsoid, eq. 15-1 to 15-4, 15-7 to 15-11."""
    flat = 1 / flattening if flattening else 0.0
    e = np.sqrt(2 * flat - flat**2)

    def t(lat: float) -> float:
        return np.tan(np.pi / 4 - lat / 2) * ((1 + e * np.sin(lat)) / (1 - e * np.sin(lat))) ** (e / 2)

    def m(lat: float) -> float:
        return np.cos(lat) / np.sqrt(1 - e**2 * np.sin(lat) ** 2)

    first, last = np.deg2rad(parallels[0]), np.deg2rad(parallels[-1])
    n = np.sin(first) if first == last else (np.log(m(first)) - np.log(m(last))) / (np.log(t(first)) - np.log(t(last)))
    size = RADIUS * m(first) / (n * t(first) ** n)

    def forward(lon: float, lat: float) -> tuple[float, float]:
        rho, rho_0, theta = size * t(lat) ** n, size * t(np.deg2rad(origin)) ** n, n * (lon - 0.5)
        return rho * np.sin(theta), rho_0 - rho * np.cos(theta)

    attrs = {"latitude_of_projection_origin": origin, "standard_parallel": np.array(parallels)}
    attrs |= {"semi_major_axis": RADIUS} | ({"inverse_flattening": flattening} if flattening else {})
    return forward, {"grid_mapping_name": "lambert_conformal_conic", **attrs}


@pytest.mark.parametrize(
    ("projection", "lat"),
    [
        *((stereographic(False), 75.0), (stereographic(True), -70.0), (conic((38.5,), 38.5), 45.0)),
        *((conic((33.0, 45.0), 23.0, 298.257), 30.0), (conic((-20.0, -50.0), -30.0, 298.257), -40.0)),
    ],
)
@pytest.mark.parametrize("lon", [-2.0, 0.3, 0.9])
@pytest.mark.parametrize("unit", ["m", "km"])
def test_east_is_where_a_point_goes_that_goes_east(
    projection: tuple[Forward, dict], lat: float, lon: float, unit: str
) -> None:
    forward, attrs = projection
    scale = {"m": 1.0, "km": 1e-3}[unit]
    here, there = (np.array(forward(lon + step, np.deg2rad(lat))) for step in (0.0, STEP))
    attrs = {**attrs, "false_easting": 2e5 * scale, "false_northing": -1e5 * scale}
    x, y = here * scale + (2e5 * scale, -1e5 * scale)
    axes = [Axis(name, at + np.arange(-2.0, 3.0), {"units": unit}) for name, at in (("x", x), ("y", y))]
    found = angle_of(attrs, *axes)[2, 2]
    expected = -np.arctan2(*(there - here)[::-1])
    assert np.abs(np.exp(1j * found) - np.exp(1j * expected)) < 2e-6


@pytest.mark.parametrize(("lon", "lat"), [(0.1, 0.9), (-0.6, 0.7), (0.5, 1.2)])
def test_east_on_a_rotated_grid(lon: float, lat: float) -> None:
    pole_lon, pole_lat = np.deg2rad([-162.0, 39.25])

    def rotated(lon: float) -> np.ndarray:
        along, away = np.cos(lat) * np.cos(lon - pole_lon), np.cos(lat) * np.sin(lon - pole_lon)
        height = np.sin(lat) * np.sin(pole_lat) + along * np.cos(pole_lat)
        return np.array(
            [np.arctan2(-away, np.sin(lat) * np.cos(pole_lat) - along * np.sin(pole_lat)), np.arcsin(height)]
        )

    here, there = rotated(lon), rotated(lon + STEP)
    attrs = {"grid_mapping_name": "rotated_latitude_longitude", "grid_north_pole_latitude": 39.25}
    axes = [Axis(name, np.rad2deg(at) + np.arange(-2.0, 3.0), {}, True) for name, at in zip("xy", here, strict=True)]
    step = (there - here) * (np.cos(here[1]), 1.0)
    assert abs(angle_of(attrs, *axes)[2, 2] + np.arctan2(step[1], step[0])) < 2e-6


def data_on(attrs: dict, title: str = "eastward") -> xr.Dataset:
    """East everywhere, on 8 x 9 cells of 25 km."""
    names = {"eastward": ("eastward", "northward"), "x": ("x", "y")}[title]
    x, y = (("x", 1e6 + 25e3 * np.arange(9)), ("y", -1e6 + 25e3 * np.arange(8)[::-1]))
    coords = {name: (name, line, {"units": "m"}) for name, line in (x, y)}
    data = {
        name: (("time", "y", "x"), np.full((3, 8, 9), value), {"units": "m/s", "standard_name": f"{way}_wind"})
        for name, value, way in zip("uv", (1.0, 0.0), names, strict=True)
    }
    data = xr.Dataset(data, coords).assign(crs=((), 0, attrs))
    for name in "uv":
        data[name].attrs["grid_mapping"] = "crs"
    return data


def test_eastward_on_a_stereographic_grid_is_turned_and_restored(capsys: pytest.CaptureFixture[str]) -> None:
    attrs = stereographic(False)[1]
    fields = open_fields(data_on(attrs))
    x, y = np.meshgrid(fields.x, fields.y)
    # East is a quarter of a turn to the left of the way out of the pole.
    expected = np.stack([-y, x]) / np.hypot(x, y)
    np.testing.assert_allclose(fields.read([1])[0].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(fields.restore(fields.read([1]).numpy())[0, 0], 1.0, atol=1e-6)
    assert "point east and north: turned to the axes of the grid, by -" in capsys.readouterr().out
    assert open_fields(data_on(attrs, "x")).turn is None
    assert "taken as along the axes of the grid" in capsys.readouterr().out
    relative = data_on(attrs)
    for name in "uv":
        relative[name].attrs["GRIB_uvRelativeToGrid"] = 1
    assert open_fields(relative).turn is None


@pytest.mark.parametrize(
    ("attrs", "why"),
    [
        ({"grid_mapping_name": "transverse_mercator"}, "told: transverse_mercator; known are"),
        ({"grid_mapping_name": "lambert_conformal_conic"}, "has no number latitude_of_projection_origin"),
        ({"crs_wkt": "PROJCS"}, "told: no grid_mapping_name"),
        ({"grid_mapping_name": "stereographic", "latitude_of_projection_origin": 60.0}, "about 60 degrees north"),
    ],
)
def test_eastward_on_a_projection_that_is_not_known_is_refused(attrs: dict, why: str) -> None:
    with pytest.raises(UserError, match=f"'u' points east or north on a projection.*{why}.*Add longitude and latitude"):
        open_fields(data_on(attrs))
    assert open_fields(data_on(attrs, "x")).turn is None


def test_eastward_on_a_mercator_grid_runs_along_it() -> None:
    assert open_fields(data_on({"grid_mapping_name": "mercator"})).turn is None

"""Points in cells: means and errors worked out by hand, every way off the grid, and what is said of a bad table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.points import open_points
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid

LON, LAT = np.arange(10.0, 14.0), np.array([52.0, 51.0, 50.0])  # rows run from north to south
VALID = np.ones((3, 4), dtype=bool)
VALID[0, 0] = False


def on_grid(x: np.ndarray, y: np.ndarray, degrees: bool, valid: np.ndarray, periodic: bool, metres: float) -> Fields:
    x, y = np.asarray(x), np.asarray(y)
    dx, dy = (1e5, 1e5) if degrees else (metres * np.diff(line).mean() for line in (x, y))
    grid = Grid(torch.from_numpy(valid), dx, dy, boundary_x="periodic" if periodic else "open")
    names = {"x_name": "lon", "y_name": "lat"} if degrees else {}
    nothing = np.full((1, 2, *valid.shape), np.nan, dtype=np.float32)
    return Fields(MemoryReader(nothing), 1, grid, x, y, "training", ("u", "v"), **names)


def points(
    tmp_path: Path, text: str, bin: float | None = None, scales: Sequence[float] | None = None, **options: object
) -> Fields:  # fmt: skip
    path = tmp_path / "points.csv"
    path.write_text(text, encoding="utf-8")
    usual = {"x": LON, "y": LAT, "degrees": True, "valid": VALID, "periodic": False, "metres": 1.0}
    return open_points(path, on_grid(**usual | options), bin, scales)


def values(found: Fields) -> np.ndarray:
    """u, v, error and count, `(N, 4, H, W)`."""
    every = np.arange(len(found))
    parts = [found.read(every, partial=True).numpy(), *(found.variable(name)(every) for name in ("error", "count"))]
    assert all(part.dtype == np.float32 for part in parts)
    return np.concatenate(parts, axis=1)


def filled(found: Fields) -> dict[tuple[int, ...], tuple[float, float, float, float]]:
    """u, v, error and count of the cells (snapshot, row, column) that have a point."""
    stack = values(found)
    places = zip(*np.nonzero(stack[:, 3]), strict=True)
    return {tuple(map(int, at)): tuple(stack[at[0], :, at[1], at[2]].tolist()) for at in places}


def test_weighted_means_and_errors(tmp_path: Path) -> None:
    """Errors 1 and 2 weigh 4 to 1: u = (4 * 1 + 6) / 5, and 1 / sqrt(1 + 1/4) is left of them."""
    text = "lon,lat,u,v,error\n11.2,51.4,1,10,1\n10.6,50.6,6,0,2\n13,50,-3,4,0.5\n"
    found = points(tmp_path, text)
    assert values(found).shape == (1, 4, 3, 4)
    assert found.time is None and found.names == ("u", "v")
    assert filled(found) == {
        (0, 1, 1): (2.0, 8.0, pytest.approx(1.25**-0.5, rel=1e-7), 2.0),
        (0, 2, 3): (-3.0, 4.0, 0.5, 1.0),
    }
    assert np.isfinite(values(found)).sum(axis=(0, 2, 3)).tolist() == [2, 2, 2, 12]


def test_plain_means_where_a_component_is_missing(tmp_path: Path) -> None:
    """Each component has its own points; without errors the error is unknown."""
    found = points(tmp_path, "lon,lat,u,v\n11,51,1,8\n11,51,2,\n11,51,6,NaN\n12,51,,5\n12,50,,\n")
    cell, alone = filled(found)[0, 1, 1], filled(found)[0, 1, 2]
    np.testing.assert_array_equal(cell, (3, 8, np.nan, 3))
    np.testing.assert_array_equal(alone, (np.nan, 5, np.nan, 1))
    assert len(filled(found)) == 2 and "1 without values" in found.layout


def test_the_error_is_that_of_the_component_known_less_well(tmp_path: Path) -> None:
    """Two points of error 1 know u to 1 / sqrt(2), one of them v to 1."""
    found = filled(points(tmp_path, "lon,lat,u,v,err\n11,51,2,4,1\n11,51,4,,1\n12,51,,7,3\n"))
    assert found[0, 1, 1] == (3.0, 4.0, 1.0, 2.0)
    np.testing.assert_array_equal(found[0, 1, 2], (np.nan, 7, 3, 1))


def test_cells_reach_half_a_spacing(tmp_path: Path) -> None:
    rows = ((9.4, 51), (9.6, 51), (13.4, 51), (13.6, 51), (11, 49.4), (11, 49.6), (11, 52.4), (11, 52.6), (10, 52))
    found = points(tmp_path, "lon,lat,u,v\n" + "".join(f"{x},{y},1,2\n" for x, y in rows))
    assert set(filled(found)) == {(0, 1, 0), (0, 1, 3), (0, 2, 1), (0, 0, 1)}
    assert found.layout == "u, v of 9 points (4 used, 4 outside the grid, 1 on land; speeds up to 2.24, errors unknown)"


def test_rows_of_uneven_spacing(tmp_path: Path) -> None:
    """Centres 0, 1, 3, 7: the borders lie at 0.5, 2 and 5."""
    rows = (0.4, 0.6, 1.9, 2.1, 4.9, 5.1, 8.9, 9.1)
    text = "lon,lat,u,v\n" + "".join(f"11,{y},{y},0\n" for y in rows)
    lat = np.array([0.0, 1.0, 3.0, 7.0])
    found = points(tmp_path, text, y=lat, valid=np.ones((4, 4), dtype=bool))
    np.testing.assert_array_equal(values(found)[0, 3, :, 1], [1, 2, 2, 2])
    found = points(tmp_path, text, y=lat[::-1], valid=np.ones((4, 4), dtype=bool))
    np.testing.assert_array_equal(values(found)[0, 3, :, 1], [2, 2, 2, 1])


@pytest.mark.parametrize(("start", "columns"), [(0.0, (0, 0, 719, 0)), (-180.0, (360, 360, 359, 360))])
def test_the_seam_of_the_circle(tmp_path: Path, start: float, columns: tuple[int, ...]) -> None:
    """On columns 0, 0.5, ... 359.5 the longitude 359.9 belongs to the first."""
    lon = start + 0.5 * np.arange(720)
    valid = np.ones((3, 720), dtype=bool)
    for value, column in zip((359.9, -0.1, 359.7, 720.2), columns, strict=True):
        found = points(tmp_path, f"lon,lat,u,v\n{value},51,1,2\n", x=lon, valid=valid, periodic=True)
        assert set(filled(found)) == {(0, 1, column)}


def test_rounding_at_the_seam_loses_no_point(tmp_path: Path) -> None:
    """A longitude just below 0 is rounded to 360, which is the border of the first column."""
    lon, valid = 0.25 + 0.5 * np.arange(720), np.ones((3, 720), dtype=bool)
    found = points(tmp_path, "lon,lat,u,v\n-1e-20,51,1,2\n", x=lon, valid=valid, periodic=True)
    assert set(filled(found)) == {(0, 1, 0)}


def test_longitudes_of_a_region_in_another_count(tmp_path: Path) -> None:
    """West is 350 or -10; a region may lie across the date line; columns may run from east to west."""
    text = "lon,lat,u,v\n-9,51,1,2\n351.9,51,3,4\n"
    for lon in (np.arange(350.0, 354.0), np.arange(-10.0, -6.0)):
        assert set(filled(points(tmp_path, text, x=lon))) == {(0, 1, 1), (0, 1, 2)}
        assert set(filled(points(tmp_path, text, x=lon[::-1]))) == {(0, 1, 2), (0, 1, 1)}
    text = "lon,lat,u,v\n178.9,51,1,2\n-179.2,51,3,4\n"
    assert set(filled(points(tmp_path, text, x=np.array([178.0, 179, -180, -179])))) == {(0, 1, 1), (0, 1, 3)}


def test_metres(tmp_path: Path) -> None:
    """A periodic box of 4 columns of 100 m: 380 m is left of the first centre, 870 m the same as 70 m."""
    box = {"x": 100.0 * np.arange(4), "y": 100.0 * np.arange(3), "degrees": False, "valid": np.ones((3, 4), dtype=bool)}
    text = "X;Y;u;v\n380;140;1;2\n870,5;-40,0;3;4,25\n"
    assert set(filled(points(tmp_path, text, **box, periodic=True))) == {(0, 1, 0), (0, 0, 1)}
    found = points(tmp_path, "x\ty\tu\tv\n340\t0\t1\t2\n360\t0\t3\t4\n", **box)
    assert set(filled(found)) == {(0, 0, 3)} and "1 outside the grid" in found.layout
    with pytest.raises(UserError, match=r"no column of x in the header 'lon, lat, u, v'. Expected one of: x, easting"):
        points(tmp_path, "lon,lat,u,v\n11,51,1,2\n", **box)


@pytest.mark.parametrize(
    "text",
    [
        "# drifters\n\nTime,LON,Latitude,ve,vn,Sigma\n3,11,51,1,2,.5\n",
        "\ufeffdate;longitude [deg];lat;U_East (m/s);v_north;error\n3;11;51;1,0;2;0,5\n",
        '"t"\t"x"\t"y"\t"uo"\t"vo"\t"err"\n# a comment\n3\t11\t51\t1\t2\t.5\n',
        "t, quality, lat, lon, err, v, u, x\n3, good, 51, 11, .5, 2, 1, 999\n",
    ],
)
def test_names_and_separators(tmp_path: Path, text: str) -> None:
    found = points(tmp_path, text)
    assert filled(found) == {(0, 1, 1): (1.0, 2.0, 0.5, 1.0)} and found.time.tolist() == [3.0]
    assert found.names in {("ve", "vn"), ("U_East", "v_north"), ("uo", "vo"), ("u", "v")}


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ("u [cm/s],v (m s-1),error [mm/s]", 0.005),
        ("u (cm s-1),v [m/s],error", 0.05),
        ("u [knots],v [km/h],err (m/s)", 5.0),
    ],
)
def test_units_in_the_header_are_converted(tmp_path: Path, header: str, error: float) -> None:
    scale = {"u [k": (0.514444, 1 / 3.6)}.get(header[:4], (0.01, 1.0))
    cell = filled(points(tmp_path, f"lon,lat,{header}\n11,51,10,20,5\n"))[0, 1, 1]
    assert cell == pytest.approx((10 * scale[0], 20 * scale[1], error, 1.0), rel=1e-5)


def test_positions_in_other_units(tmp_path: Path) -> None:
    """Of a grid in millimetres, points in centimetres; of one in degrees, points in radians; and what is neither."""
    path = tmp_path / "a.csv"
    path.write_text("x [cm],y [mm],u,v\n0.2,1,3,4\n")
    x = y = np.arange(4.0)
    valid = np.ones((4, 4), dtype=bool)
    lengths, angles = (on_grid(x, y, degrees, valid, periodic=False, metres=1e-3) for degrees in (False, True))
    points = open_points(path, lengths)
    assert np.argwhere(np.isfinite(values(points)[0, 0])).tolist() == [[1, 2]]
    path.write_text(f"lon [rad],lat [degrees north],u,v\n{np.deg2rad(2.0)},1,3,4\n")
    points = open_points(path, angles)
    assert np.argwhere(np.isfinite(values(points)[0, 0])).tolist() == [[1, 2]]
    path.write_text("lon [degrees west],lat [deg S],u,v\n-2,-1,3,4\n")
    points = open_points(path, angles)
    assert np.argwhere(np.isfinite(values(points)[0, 0])).tolist() == [[1, 2]]
    path.write_text("x [px],y [mm],u,v\n2,1,3,4\n")
    with pytest.raises(UserError, match=r"column 'x \[px\]' has units 'px', which are not a length as the grid has"):
        open_points(path, lengths)


def test_times(tmp_path: Path) -> None:
    """Each time is a snapshot, in order; a time without a point on the grid is none. Dates are UTC."""
    text = "lon,lat,u,v,time\n11,51,1,2,2020-01-02T03:00\n11,51,3,4,2020-01-01\n12,51,5,6,2020-01-02T05:00+02:00\n"
    found = points(tmp_path, text + "99,51,7,8,2020-01-03\n")
    np.testing.assert_array_equal(found.time, np.array(["2020-01-01T00", "2020-01-02T03"], "datetime64[ns]"))
    assert found.time.dtype == "datetime64[ns]"
    assert {at: cell[:2] for at, cell in filled(found).items()} == {
        (0, 1, 1): (3, 4),
        (1, 1, 1): (1, 2),
        (1, 1, 2): (5, 6),
    }


def test_bins(tmp_path: Path) -> None:
    """Half-open intervals from 0 (or midnight), at whose middle the snapshot is."""
    rows = ((-0.5, 1), (0, 2), (5.9, 4), (6, 8))
    text = "lon,lat,u,v,time\n" + "".join(f"11,51,{u},0,{time}\n" for time, u in rows)
    found = points(tmp_path, text, bin=6)
    np.testing.assert_array_equal(found.time, [-3, 3, 9])
    np.testing.assert_array_equal(values(found)[:, 0, 1, 1], [1, 3, 8])
    rows = (("1969-12-31T23:00Z", 1), ("2020-01-01T00:00Z", 2), ("2020-01-01T23:59Z", 4), ("2020-01-02T00:00Z", 8))
    text = "lon,lat,u,v,time\n" + "".join(f"11,51,{u},0,{time}\n" for time, u in rows)
    found = points(tmp_path, text, bin=24)
    assert found.time.astype("datetime64[h]").astype(str).tolist() == [
        "1969-12-31T12",
        "2020-01-01T12",
        "2020-01-02T12",
    ]
    np.testing.assert_array_equal(values(found)[:, 0, 1, 1], [1, 3, 8])
    with pytest.raises(ValueError, match="bin must be > 0, got 0"):
        points(tmp_path, text, bin=0)
    with pytest.raises(UserError, match="bin=24 needs a column of times, called time, date"):
        points(tmp_path, "lon,lat,u,v\n11,51,1,2\n", bin=24)


def test_fields(tmp_path: Path) -> None:
    """The snapshots with their gaps, and error and count as further variables."""
    fields = points(tmp_path, "lon,lat,ve,vn,sigma,time\n11,51,1,2,.5,6\n12,51,3,,.5,6\n13,50,5,6,.5,3\n")
    partial = fields.read([1, 0], partial=True).numpy()
    assert partial[0, 0, 1, 2] == 3 and fields.read([1])[0, 0, 1, 2].isnan() and partial[1, 1, 2, 3] == 6
    assert (
        fields.variable("error")(np.array([1])).shape == fields.variable("count")(np.array([0])).shape == (1, 1, 3, 4)
    )
    assert fields.coordinates([1])["time"][0].tolist() == [6.0] and fields.x_attrs["units"] == "degrees_east"
    assert "ve, vn of 3 points (3 used; speeds up to 7.81, errors given) -> N=2 fields 2x3x4" in fields.summary()


HEADER = "# from a ship\nlon,lat,u,v,error,time\n"
GOOD = "11,51,1,2,.1,2020-01-01\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lon,lat,u,w\n", r"points.csv: no column of v in the header 'lon, lat, u, w'. Expected one of: v, vn"),
        ("11,51,1,2\n", "no column of x in the header '11, 51, 1, 2'. Expected one of: lon, longitude"),
        ("# lon,lat,u,v\n", "is empty. Expected a header such as lon,lat,u,v"),
        (HEADER + GOOD + "\n11,51,fast,2,.1,2020-01-01\n", "line 5: 'fast' in column 'u' is not a number"),
        (HEADER + GOOD + "11,51N,1,2,.1,2020-01-01\n", "line 4: '51N' in column 'lat' is not a number"),
        (HEADER + GOOD + "11,51,1,2,0,2020-01-01\n", "line 4: '0' in column 'error' is not a positive error"),
        (HEADER + GOOD + "11,51,1,2,,2020-01-01\n", "line 4: '' in column 'error' is not a positive error"),
        (HEADER + GOOD + "11,51,1,2,.1,1/2/2020\n", "line 4: '1/2/2020' in column 'time' is neither a number nor a"),
        (HEADER + "11,51,1,2,.1,\n" + GOOD, "line 3: '' in column 'time' is neither"),
        (HEADER + GOOD + "11,51,1,2,.1\n", "line 4: 5 values, expected 6 as in the header"),
        (HEADER + '"11,51,1,2,.1,2020-01-01\n' + GOOD, "line 3: 1 values, expected 6"),
        ("lon,lat,u,v,u\n11,51,1,2,3\n", "2 columns are called 'u', expected one u"),
        (
            "lon,lat,u [psu],v\n11,51,1,2\n",
            "column 'u [psu]' has units 'psu', which are no speed. Expected such",
        ),
        ("lon,lat,u,v\n", "no point lies on a valid cell of the grid: the table has no row"),
        (
            "lon,lat,u,v\n20,51,1,2\n30,53,1,2\n10,52,1,2\n11,51,,\n",
            "of the grid: 2 outside the grid, 1 on land, 1 without values; x 10 to 30, of the grid 10 to 13; "
            "y 51 to 53, of the grid 50 to 52. Give points of this region",
        ),
    ],
)
def test_messages(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        points(tmp_path, text)
    assert message in str(caught.value)


def test_rows_that_are_not_used_may_lack_error_and_time(tmp_path: Path) -> None:
    found = points(tmp_path, HEADER + "99,51,1,2,,\n" + GOOD + "11,51,,,,\n")
    assert len(filled(found)) == 1 and found.time.astype("datetime64[D]").astype(str).tolist() == ["2020-01-01"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "drifters.csv").write_bytes(b"lon,lat,u,v\n\xff\xfe\n")
    for name, message in (("drifter.csv", "Did you mean 'drifters.csv'"), ("drifters.csv", "as text in UTF-8")):
        with pytest.raises(UserError, match=message):
            open_points(tmp_path / name, on_grid(LON, LAT, True, VALID, periodic=False, metres=1.0))


def test_more_times_than_memory_holds(tmp_path: Path) -> None:
    text = "lon,lat,u,v,time\n" + "".join(f"11,51,1,2,{time}\n" for time in range(300))
    valid = np.ones((1000, 1000), dtype=bool)
    axis = {"x": np.arange(1000.0) / 10, "y": np.arange(1000.0) / 10, "valid": valid}
    with pytest.raises(UserError, match="300 times on 1000x1000 cells are too many .* bin=24"):
        points(tmp_path, text, **axis)


# Super-observations.

LON_T, LAT_T = (11.0, 11.1, 11.1, 12.0), (51.0, 51.0, 51.2, 50.0)
HOURS, ERRORS = (0.0, 3.0, 9.0, 1.0), (0.1, 0.2, 0.15, 0.3)


def drifters(extra: str = "") -> str:
    """Three points in one cell within a day, one in another."""
    rows = zip(LON_T, LAT_T, (0.3, 0.5, 0.2, 1.0), (0.1, -0.2, 0.0, 0.4), ERRORS, HOURS, strict=True)
    return "lon,lat,u,v,error,time\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n" + extra


def test_a_mean_has_the_posterior_of_its_points(tmp_path: Path) -> None:
    """Of any Gaussian field, where errors are independent: mean and variance of the dense system of all points."""
    at = filled(points(tmp_path, drifters(), bin=24.0))
    prior = np.array([[0.5, 0.2], [0.2, 0.4]])  # of both cells

    def posterior(y: np.ndarray, rows: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gain = prior @ rows.T @ np.linalg.inv(rows @ prior @ rows.T + np.diag(np.square(errors)))
        return gain @ y, prior - gain @ rows @ prior

    several = posterior(np.array([0.3, 0.5, 0.2, 1.0]), np.eye(2)[[0, 0, 0, 1]], np.array(ERRORS))
    cells = at[0, 1, 1], at[0, 2, 2]
    one = posterior(np.array([cell[0] for cell in cells]), np.eye(2), np.array([cell[2] for cell in cells]))
    for found, wanted in zip(one, several, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("degrees", [True, False])
def test_correlated_errors_widen_that_of_the_mean(tmp_path: Path, degrees: bool) -> None:
    """w^T C w / (sum w)^2 with C_ij = e_i e_j exp(-r_ij / L - |t_i - t_j| / T), r on the sphere and in the plane."""
    length, hours = 20.0, 12.0
    text, options = (
        (drifters(), {}) if degrees else (drifters().replace("lon,lat", "x,y"), {"degrees": False, "metres": 7e4})
    )
    found = filled(points(tmp_path, text, bin=24.0, scales=(length, hours), **options))
    x, y = np.array(LON_T[:3]), np.array(LAT_T[:3])
    e, w = np.array(ERRORS[:3]), np.array(ERRORS[:3]) ** -2.0
    if degrees:  # haversines
        lon, lat = np.deg2rad(x), np.deg2rad(y)
        square = np.sin(np.subtract.outer(lat, lat) / 2) ** 2
        square += np.outer(np.cos(lat), np.cos(lat)) * np.sin(np.subtract.outer(lon, lon) / 2) ** 2
        away = 2 * 6371.0 * np.arcsin(np.sqrt(square))
    else:
        away = 70.0 * np.hypot(np.subtract.outer(x, x), np.subtract.outer(y, y))
    c = np.outer(e, e) * np.exp(-away / length - np.abs(np.subtract.outer(HOURS[:3], HOURS[:3])) / hours)
    wanted = np.sqrt(w @ c @ w) / w.sum()
    plain = filled(points(tmp_path, text, bin=24.0, **options))
    assert found[0, 1, 1][2] == pytest.approx(wanted, rel=1e-6)
    assert found[0, 1, 1][2] > 1.2 * plain[0, 1, 1][2]
    assert found[0, 1, 1][:2] == plain[0, 1, 1][:2] and found[0, 2, 2] == plain[0, 2, 2]
    # Errors that are one for all points are those of the mean of equal ones; independent ones are as before.
    same = text.replace(",0.2,", ",0.1,").replace(",0.15,", ",0.1,")
    whole = filled(points(tmp_path, same, bin=24.0, scales=(1e9, 1e9), **options))
    apart = filled(points(tmp_path, text, bin=24.0, scales=(1e-6, 1e-6), **options))
    assert whole[0, 1, 1][2] == pytest.approx(0.1, rel=1e-5) and apart == plain


def test_what_became_of_the_points_is_said(tmp_path: Path) -> None:
    """A row that is there twice counts once; without times it may be a second reading."""
    again = drifters().splitlines()[1] + "\n"
    found = points(tmp_path, drifters(again), bin=24.0, scales=(20, 12))
    assert "4 used, 1 repeated as 2 means of up to 3, 1 of one alone" in found.layout
    assert "errors taken as correlated over 20 in space and 12 in time" in found.layout
    assert filled(found)[0, 1, 1][3] == 3
    assert filled(points(tmp_path, "lon,lat,u,v\n11,51,1,8\n11,51,1,8\n"))[0, 1, 1][3] == 2


def test_scales_that_are_none(tmp_path: Path) -> None:
    for scales in ((20.0,), (0.0, 12.0)):
        with pytest.raises(ValueError, match="error_scales must be a length and a time above 0"):
            points(tmp_path, drifters(), bin=24.0, scales=scales)

"""Inputs as real archives have them: each is read right, or refused in one line that says what to do."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
import xarray as xr

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.readers import files_of, open_fields
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import EARTH_RADIUS
from vecfield_diffusion.programs.accuracy import errors

TRIALS = Path(__file__).parents[2] / "shared" / "trials" / "make.py"
N, H, W, RMS, WEST, SOUTH = 12, 9, 11, 0.3, 10.0, 30.0
RIGHT = {"N": N, "H": H, "W": W, "missing": 0.0, "rms_speed": RMS, "west": WEST, "south": SOUTH}
RADIAN = np.pi / 180


def flow(n: int = N, h: int = H, w: int = W) -> tuple[np.ndarray, np.ndarray]:
    """A smooth flow without divergence of RMS speed 0.3, `(n, h, w)` each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w] / 6.0
    phases = rng.uniform(0, 6.3, (n, 1, 1))
    u, v = np.cos(y + 2 * x + phases), -0.5 * np.cos(y + 2 * x + phases)
    scale = RMS / np.sqrt((u**2 + v**2).mean())
    return (u * scale).astype("f4"), (v * scale).astype("f4")


def base(dims: tuple[str, str, str] = ("time", "lat", "lon"), u: str = "u", v: str = "v", **units: str) -> xr.Dataset:
    """The flow as a plain CF data set."""
    names = ("eastward_sea_water_velocity", "northward_sea_water_velocity")
    values = dict(zip((u, v), flow(), strict=True))
    data = {
        name: (dims, array, {"standard_name": title, "units": units.get("units", "m s-1")})
        for (name, array), title in zip(values.items(), names, strict=True)
    }
    coords = {
        dims[0]: (dims[0], np.arange(N), {"units": "days since 2020-01-01"}),
        dims[1]: (dims[1], SOUTH + 0.1 * np.arange(H), {"units": "degrees_north"}),
        dims[2]: (dims[2], WEST + 0.1 * np.arange(W), {"units": "degrees_east"}),
    }
    return xr.Dataset(data, coords)


def bare(*names: str) -> xr.Dataset:
    """The same without attributes, its components called `names`."""
    data = base().rename(dict(zip("uv", names or ("u", "v"), strict=True)))
    for name in data.data_vars:
        data[name].attrs = {"units": "m s-1"}
    return data


def facts(fields: Fields) -> dict[str, float]:
    """What a trial compares."""
    velocity = fields.read(range(len(fields))).double()
    known = velocity[:, 0].isfinite()
    return {
        "N": len(fields),
        "H": fields.shape[0],
        "W": fields.shape[1],
        "missing": 1 - known.double().mean().item(),
        "rms_speed": velocity.square().sum(1)[known].mean().sqrt().item(),
        "west": float(np.min(fields.x)),
        "south": float(np.min(fields.y)),
        "dx": fields.grid.dx[0].item(),
    }


def check(fields: Fields, right: dict[str, float], speed: float = 1e-3) -> None:
    found = facts(fields)
    expected = {key: value for key, value in right.items() if key in found}
    tolerance = {"rms_speed": speed}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=tolerance.get(key, 1e-4), abs=1e-6), (key, found)
    if "sigma_obs" in right:
        assert fields.variable("err")(np.array([0])).mean() == pytest.approx(right["sigma_obs"])


def saved(tmp_path: Path, data: xr.Dataset, name: str = "a.nc", **options: object) -> str:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data.to_netcdf(path, engine="h5netcdf", **options)
    return str(path)


# The trials that are shared, where they are.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not TRIALS.exists():
        pytest.skip("the shared trials are not on this machine; those below are of the same kinds")
    spec = importlib.util.spec_from_file_location("make_trials", TRIALS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("trials")
    module.Trials(folder).all()
    return folder


def test_the_shared_trials(shared: Path) -> None:
    expected = json.loads((shared / "expected.json").read_text())
    assert len(expected) >= 19
    for name, trial in expected.items():
        if "reads" in trial:
            # Means of neighbours on a C-grid lose a little of the speed.
            check(open_fields(str(shared / name)), trial["reads"], speed=0.03 if "c_grid" in name else 5e-3)
        else:
            with pytest.raises(UserError) as caught:
                open_fields(str(shared / name))
            assert all(word in str(caught.value) for word in trial["refused"]), name
            assert "\n" not in str(caught.value)


# A1: the pair.


def test_what_has_no_units_of_speed_is_no_velocity(tmp_path: Path) -> None:
    data = bare()
    shape = ("lat", "lon")
    metric = np.full((H, W), 3e-5)
    for way in "xy":
        data[f"p{way}"] = (shape, metric, {"standard_name": f"inverse_of_cell_{way}_size", "units": "meter-1"})
        data[f"tau{way}"] = data["u" if way == "x" else "v"] * 10
        data[f"tau{way}"].attrs = {"standard_name": f"surface_downward_{way}_stress", "units": "N m-2"}
        data[f"distance_{way}"] = (shape, metric * 1e9, {"units": "m"})
    path = saved(tmp_path, data)
    check(open_fields(path), RIGHT)
    assert open_fields(path, u="taux", v="tauy").names == ("taux", "tauy")
    with pytest.raises(UserError, match="no pair of velocity"):
        open_fields(data.drop_vars(["u", "v"]))


@pytest.mark.parametrize(
    "names",
    [
        *(("u10", "v10"), ("uo", "vo"), ("water_u", "water_v"), ("U10", "V10"), ("vozocrtx", "vomecrty")),
        *(
            ("ugos", "vgos"),
            ("UVEL", "VVEL"),
            ("uas", "vas"),
            ("EWCT", "NSCT"),
            ("u_surf", "v_surf"),
            ("Uwind", "Vwind"),
        ),
    ],
)
def test_the_names_of_archives(names: tuple[str, str]) -> None:
    assert open_fields(bare(*names)).names == names


def test_amplitudes_and_errors_are_no_velocity() -> None:
    data = bare("u_amplitude", "v_amplitude").assign(bare("u_err", "v_err"))
    with pytest.raises(UserError, match="no pair of velocity"):
        open_fields(data)
    data = bare("Ua", "Va")
    for name in data.data_vars:
        data[name].attrs["long_name"] = "amplitude of the tidal current"
    with pytest.raises(UserError, match="no pair of velocity"):
        open_fields(data)


@pytest.mark.parametrize(("letter", "units"), [("g", "degrees"), ("p", "degree GMT")])
def test_an_amplitude_is_known_by_its_phase(letter: str, units: str) -> None:
    data = base().isel(time=0, drop=True).rename(u="ua", v="va")
    for way in "uv":
        data[f"{way}a"].attrs = {"units": "cm/s"}
        data[way + letter] = data[f"{way}a"] * 1
        data[way + letter].attrs = {"units": units}
    with pytest.raises(UserError, match="no pair of velocity"):
        open_fields(data)
    assert open_fields(data.drop_vars([f"u{letter}", f"v{letter}"])).names == ("ua", "va")


# A2: packing.


@pytest.mark.parametrize(
    ("dtype", "attrs"),
    [
        ("u2", {"valid_range": np.array([0, 65534], "u2")}),
        ("i2", {"valid_range": np.array([0, -6], "i2"), "_Unsigned": "true"}),
        ("i2", {"valid_min": np.int16(0), "valid_max": np.int16(-6), "_Unsigned": "true", "_FillValue": np.int16(-1)}),
    ],
)
def test_packed_without_sign(tmp_path: Path, dtype: str, attrs: dict) -> None:
    data = bare()
    for name in "uv":
        numbers = np.round((data[name].values + 5) / 2e-4).astype("u2").view(dtype)
        data[name] = (data[name].dims, numbers, {"units": "m s-1", **attrs, "scale_factor": 2e-4, "add_offset": -5.0})
    encoding = {} if "_FillValue" in attrs else {name: {"_FillValue": None} for name in "uv"}
    check(open_fields(saved(tmp_path, data, encoding=encoding)), RIGHT)


def test_bytes_of_a_radar_with_unsigned_and_fill() -> None:
    data = bare()
    for name in "uv":
        numbers = np.round((data[name].values + 1) / 0.01).astype("u1")
        numbers[:, 2, 3] = 255
        attrs = {
            "_Unsigned": "true",
            "_FillValue": np.int8(-1),
            "scale_factor": 0.01,
            "add_offset": -1.0,
            "units": "m/s",
        }
        data[name] = (data[name].dims, numbers.view("i1"), attrs)
    check(open_fields(data), {**RIGHT, "missing": 1 / (H * W)}, speed=0.02)


def test_a_scale_factor_that_is_text_is_refused() -> None:
    data = bare()
    data["u"].attrs["scale_factor"] = "0.0002"
    with pytest.raises(UserError, match="'u' has scale_factor='0.0002', which is text. Expected a number"):
        open_fields(data)


@pytest.mark.parametrize("value", ["-999.", " -999 ", b"-999"])
def test_a_fill_value_that_is_text_is_its_number(tmp_path: Path, value: str | bytes) -> None:
    data = base()
    for name in "uv":
        data[name].values[:, 0, 0] = -999.0
        data[name].attrs["missing_value"] = value
    check(open_fields(data), {"N": N, "missing": 1 / (H * W)})
    assert data.u.attrs["missing_value"] == value
    data.u.attrs["missing_value"] = "none"
    with pytest.raises(UserError, match="'u' has missing_value='none', which is text. Expected a number"):
        open_fields(data)


def test_slope_and_intercept_of_old_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = base()
    for name in "uv":
        numbers = np.round((data[name].values - 0.5) / 1e-4).astype("i2")
        data[name] = (data[name].dims, numbers, {**data[name].attrs, "slope": 1e-4, "Intercept": 0.5})
    fields = open_fields(saved(tmp_path, data))
    check(fields, RIGHT)
    np.testing.assert_allclose(fields.read([3]).numpy()[0], np.stack(flow(), 1)[3], atol=6e-5)
    assert "'u' is packed by slope and intercept: taken as slope * number" in capsys.readouterr().out
    assert not {"slope", "Intercept"} & fields.component_attrs[0].keys()
    data.u.attrs = {"units": "m s-1", "scale": 1e-4}
    with pytest.raises(UserError, match="'u' holds integers with the attribute scale=0.0001, which nothing says"):
        open_fields(data)


# A3: axes.


def test_x_before_y_is_known_by_the_coordinates(tmp_path: Path) -> None:
    data = base().rename(lon="ni", lat="nj").transpose("time", "ni", "nj")
    check(open_fields(saved(tmp_path, data)), RIGHT)
    check(open_fields(saved(tmp_path, base().transpose("time", "lon", "lat"), "b.nc", group="data")), RIGHT)
    check(open_fields(base().transpose("lon", "lat", "time")), RIGHT)


def test_groups_are_found_or_named(tmp_path: Path) -> None:
    path = saved(tmp_path, base(), group="forecast")
    check(open_fields(path), RIGHT)
    base().to_netcdf(path, engine="h5netcdf", group="analysis", mode="a")
    with pytest.raises(UserError, match=r"2 groups. Choose one: dataset.group=\w+ \| dataset.group="):
        open_fields(path)
    check(open_fields(path, group="analysis"), RIGHT)
    with pytest.raises(UserError, match="no group 'anlysis'.*It has: "):
        open_fields(path, group="anlysis")


@pytest.mark.parametrize("kind", ["mat", "npz", "h5"])
@pytest.mark.parametrize("first", ["y", "x"])
def test_squares_are_read_by_their_coordinates_or_it_is_said(
    tmp_path: Path, kind: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    u, v = flow(5, 8, 8)
    x, y = np.meshgrid(2.0 * np.arange(8), 3.0 * np.arange(8))
    order = (0, 1, 2) if first == "y" else (0, 2, 1)
    arrays = {"u": u.transpose(order), "v": v.transpose(order)}
    planes = {"x": x, "y": y} if first == "y" else {"x": x.T, "y": y.T}
    path = str(tmp_path / f"a.{kind}")

    def write(content: dict[str, np.ndarray]) -> None:
        if kind == "mat":
            scipy.io.savemat(
                path, {name: np.moveaxis(item, 0, -1) if item.ndim == 3 else item for name, item in content.items()}
            )
        elif kind == "npz":
            np.savez(path, **content)
        else:
            with h5py.File(path, "w") as file:
                for name, item in content.items():
                    file[name] = item

    write({**arrays, "x": planes["x"], "y": planes["y"]})
    fields = open_fields(path)
    np.testing.assert_array_equal(fields.read(range(5)).numpy(), np.stack([u, v], 1))
    assert fields.grid.dx[0] == 2.0 and fields.grid.dy[0] == 3.0 and "apart" not in capsys.readouterr().out
    write(arrays)
    open_fields(path)
    assert "do not tell its axes apart: taken as" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cells", "structure"])
def test_matlab_cells_and_structures(tmp_path: Path, kind: str) -> None:
    u, v = flow()
    x, y = np.meshgrid(0.5 * np.arange(W), 0.7 * np.arange(H))
    arrays = {"u": np.moveaxis(u, 0, -1), "v": np.moveaxis(v, 0, -1), "x": x, "y": y}
    if kind == "structure":
        arrays = {"piv": arrays}
    else:
        series = {"u_original": u, "v_original": v, "x": [x] * N, "y": [y] * N}
        arrays = {name: np.empty((N, 1), object) for name in series}
        for name, cells in series.items():
            for k in range(N):
                arrays[name][k, 0] = cells[k]
    scipy.io.savemat(tmp_path / "a.mat", arrays)
    fields = open_fields(str(tmp_path / "a.mat"))
    np.testing.assert_array_equal(fields.read(range(N)).numpy(), np.stack([u, v], 1))
    assert (fields.grid.dx[0], fields.grid.dy[0]) == (0.5, pytest.approx(0.7))


def test_outliers_and_pixels_of_piv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    u, v = flow()
    x, y = np.meshgrid(16.0 * np.arange(W), 16.0 * np.arange(H))
    series = {"u_original": 2 * u, "v_original": 2 * v, "u_filtered": u, "v_filtered": v, "x": [x] * N, "y": [y] * N}
    arrays = {name: np.empty((N, 1), object) for name in series}
    for name, cells in series.items():
        for k in range(N):
            arrays[name][k, 0] = cells[k]
    path = str(tmp_path / "a.mat")
    scipy.io.savemat(path, {**arrays, "units": "[px] respectively [px/frame]"})
    with pytest.raises(UserError, match="the coordinate x has units 'px', which are no length.*dataset.dx="):
        open_fields(path)
    fields = open_fields(path, dx=0.01, dy=0.01)
    assert fields.units == "px/frame" and "others: dataset.u=u_original" in capsys.readouterr().out
    np.testing.assert_array_equal(fields.read(range(N)).numpy(), np.stack([u, v], 1))
    scipy.io.savemat(path, {**arrays, "units": "[mm] respectively [cm/s]"})
    fields = open_fields(path)
    assert fields.grid.dx[0].item() == pytest.approx(0.016)
    np.testing.assert_allclose(fields.read(range(N)).numpy(), np.stack([u, v], 1) / 100, rtol=1e-6)


@pytest.mark.parametrize("matlab", [True, False])
@pytest.mark.parametrize("options", [{}, {"group": "data"}, {"u": "data/u", "v": "data/v"}])
@pytest.mark.parametrize("first", ["y", "x"])
def test_a_structure_of_matlab_73(tmp_path: Path, first: str, options: dict[str, str], matlab: bool) -> None:
    u, v = flow()
    order = (0, 1, 2) if first == "y" else (0, 2, 1)
    arrays = {"u": u.transpose(order), "v": v.transpose(order), "time": np.arange(N)[None]}
    arrays |= {"lon": WEST + 0.1 * np.arange(W)[None], "lat": SOUTH + 0.1 * np.arange(H)[None]}
    path = str(tmp_path / "a.mat")
    with h5py.File(path, "w", userblock_size=512) as file:
        group = file.create_group("data")
        for name, array in arrays.items():
            group[name] = array
            if matlab:
                group[name].attrs["MATLAB_class"] = np.bytes_("double")
    fields = open_fields(path, **options)
    check(fields, RIGHT)
    np.testing.assert_array_equal(fields.read(range(N)).numpy(), np.stack([u, v], 1))


@pytest.mark.parametrize("sizes", [(N, H, W), (5, 8, 8)])
def test_arrays_without_names_of_dimensions(sizes: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    u, v = flow(*sizes)
    for source in ((xr.DataArray(u), xr.DataArray(v)), xr.Dataset({"u": xr.DataArray(u), "v": xr.DataArray(v)})):
        fields = open_fields(source)
        np.testing.assert_array_equal(fields.read(range(sizes[0])).numpy(), np.stack([u, v], 1))
        assert ("do not tell its axes apart" in capsys.readouterr().out) == (sizes[1] == sizes[2])


# A4: units.


@pytest.mark.parametrize(
    ("units", "scale"),
    [
        *(("cm/s", 100), ("cm s-1", 100), ("ms-1", 1), ("m.s-1", 1), ("m s^{-1}", 1), ("meters/second", 1)),
        *(("knots", 1 / 0.5144444), ("km/h", 3.6), ("mm/s", 1000), ("metersecond-1", 1), ("m/sec", 1)),
        *(("0.01 m s-1", 100), ("1e-2 m s-1", 100), ("10-2 m/s", 100), ("10^-2 m/s", 100), ("m s-1 * 0.1", 10)),
    ],
)
def test_velocities_are_in_metres_per_second_inside_and_restored_outside(units: str, scale: float) -> None:
    data = base(units=units)
    data["v"].attrs["units"] = "m s-1"
    u, v = flow()
    data["u"] = (data.u.dims, data.u.values * scale, data.u.attrs)
    fields = open_fields(data)
    assert fields.units == "m s-1"
    check(fields, RIGHT)
    np.testing.assert_allclose(fields.restore(fields.read([3]).numpy())[0], [data.u.values[3], v[3]], rtol=1e-5)
    np.testing.assert_allclose(fields.read([3]).numpy()[0, 0], u[3], rtol=1e-5, atol=1e-7)


def test_an_error_in_other_units_is_in_those_of_the_fields() -> None:
    data = base().assign(err=(("time", "lat", "lon"), np.full((N, H, W), 5.0), {"units": "cm s-1"}))
    check(open_fields(data), {**RIGHT, "sigma_obs": 0.05})


def test_fields_in_the_units_of_an_older_network() -> None:
    data = base().assign(err=(("time", "lat", "lon"), np.full((N, H, W), 5.0), {"units": "mm s-1"}))
    fields = open_fields(data)
    older = fields.converted("cm s-1")
    assert older.units == "cm s-1" and fields.converted("m/s") is fields
    np.testing.assert_allclose(older.read([3]), 100 * fields.read([3]), rtol=1e-6)
    np.testing.assert_allclose(older.variable("err")(np.array([0])), 0.5, rtol=1e-6)
    np.testing.assert_allclose(older.restore(older.read([3]).numpy())[0], np.stack(flow(), 1)[3], rtol=1e-5)
    with pytest.raises(UserError, match="in m s-1, which cannot be converted to mm/frame"):
        fields.converted("mm/frame")


def test_what_has_no_units_stays_as_it_is_and_two_kinds_are_refused() -> None:
    data = bare()
    for name in "uv":
        data[name].attrs = {}
    assert open_fields(data).units == "m s-1"
    data["u"].attrs["units"], data["v"].attrs["units"] = "mm/frame", "m s-1"
    with pytest.raises(UserError, match="units 'mm/frame' and 'm s-1', which cannot be converted"):
        open_fields(data, u="u", v="v")
    data["v"].attrs["units"] = "mm/frame"
    assert open_fields(data).units == "mm/frame"


@pytest.mark.parametrize("units", ["0.1 knock", "9**9**9**9", "10 mm/frame"])
def test_units_with_a_factor_that_is_not_understood_are_refused(units: str) -> None:
    with pytest.raises(UserError, match="begin with a number and are not understood. Mend the attribute `units`"):
        open_fields(base(units=units))


@pytest.mark.parametrize("units", ["%", "1", "degC"])
def test_an_error_whose_units_are_no_speed_is_refused(units: str) -> None:
    data = base().assign(err=(("time", "lat", "lon"), np.full((N, H, W), 10.0), {"units": units}))
    fields = open_fields(data)
    with pytest.raises(UserError, match=f"'err' in memory has units '{units}'. Expected an error in units of speed"):
        errors({"sigma_obs": "err"}, fields, [0])
    data.err.attrs["units"] = "cm s-1"
    assert errors({"sigma_obs": "err"}, open_fields(data), [0]).unique().item() == pytest.approx(0.1)


# A5: what is no time.


@pytest.mark.parametrize(
    ("dim", "attrs", "key"),
    [
        *(("depthu", {"units": "m", "positive": "down"}, "level"), ("lev", {}, "level"), ("s_rho", {}, "level")),
        *(("isobaric", {"units": "hPa"}, "level"), ("pressure_level", {}, "level"), ("sigma", {}, "level")),
        *(
            ("member", {"standard_name": "realization"}, "member"),
            ("number", {}, "member"),
            ("realization", {}, "member"),
        ),
        *(("k", {}, "level"), ("mystery", {}, "level")),
    ],
)
def test_levels_and_members_are_chosen_not_read_as_times(dim: str, attrs: dict, key: str) -> None:
    data = base().rename(time=dim).assign_coords({dim: (dim, 5.0 * np.arange(N), attrs)})
    with pytest.raises(UserError, match=f"dataset.{key}=0") as caught:
        open_fields(data)
    assert f"{dim}" in str(caught.value)
    fields = open_fields(data, **{key: 3})
    assert len(fields) == 1
    np.testing.assert_array_equal(fields.read([0]).numpy()[0], np.stack(flow(), 1)[3])


def test_an_ensemble_with_times_and_levels() -> None:
    data = base().expand_dims({"number": np.arange(3), "depth": [0.5, 10.0]})
    data = data.assign(u=data.u * (1 + data.number), v=data.v * (1 + data.number))
    check(open_fields(data, member=0, level=1), RIGHT)
    check(open_fields(data, member=2, level=0), {**RIGHT, "rms_speed": 3 * RMS})


def test_points_tracks_and_meshes_are_refused() -> None:
    u, v = flow(4, 20, 1)
    for dims in (("trajectory", "obs"), ("time", "node"), ("time", "station"), ("time", "nMesh2D_face")):
        with pytest.raises(UserError, match="has the dimensions.*Expected time, y and x"):
            open_fields(xr.Dataset({"u": (dims, u[..., 0]), "v": (dims, v[..., 0])}))


def test_runs_in_several_places_are_no_series() -> None:
    runs = xr.concat([base(), base()], "run", data_vars="all", coords="minimal", compat="override", join="override")
    place = ("run", "lon"), np.stack([base().lon.values, base().lon.values + 40]), {"units": "degrees_east"}
    runs = runs.drop_vars("lon").assign_coords(longitude=place)
    with pytest.raises(UserError, match="'run' lie in different places.*no series. Choose one: dataset.member=0"):
        open_fields(runs)


# A6: grids that do not belong together, and C-grids.


def curvilinear(data: xr.Dataset, west: float, south: float, turn: float) -> xr.Dataset:
    """The same with longitude and latitude `(y, x)` of a grid that is turned anticlockwise by `turn` radians."""
    j, i = np.mgrid[: data.sizes["lat"], : data.sizes["lon"]] * 0.1
    east, north = np.cos(turn) * i - np.sin(turn) * j, np.sin(turn) * i + np.cos(turn) * j
    data = data.drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
    lon = west + east / np.cos(np.deg2rad(south))
    data["nav_lon"] = (("y", "x"), lon, {"standard_name": "longitude", "units": "degrees_east"})
    data["nav_lat"] = (("y", "x"), south + north, {"standard_name": "latitude", "units": "degrees_north"})
    return data


@pytest.mark.parametrize("turn", [0.0, 0.3])
def test_two_areas_are_no_series(tmp_path: Path, turn: float) -> None:
    saved(tmp_path, curvilinear(base().isel(time=slice(0, 6)), 10, 30, turn), "a.nc")
    saved(tmp_path, curvilinear(base().isel(time=slice(6, 12)), -60, 55, turn), "b.nc")
    with pytest.raises(UserError, match=r"a.nc and .*b.nc cannot be joined"):
        open_fields(str(tmp_path))


def test_u_of_one_area_and_v_of_another(tmp_path: Path) -> None:
    saved(tmp_path, curvilinear(base()[["u"]], 10, 30, 0.3), "u.nc")
    saved(tmp_path, curvilinear(base()[["v"]], -60, 55, 0.3), "v.nc")
    with pytest.raises(UserError, match=r"u.nc and .*v.nc cannot be joined|do not lie on the same points"):
        open_fields(str(tmp_path))


def linear(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A flow whose means of two neighbours are exact."""
    return 0.1 + 0.01 * x + 0.02 * y, 0.2 - 0.03 * x + 0.01 * y


def c_grid(kind: str) -> tuple[xr.Dataset, np.ndarray, np.ndarray]:
    """A linear flow on the C-grid of a model, and the columns and rows of the centres that have both components."""
    h, w = 7, 9
    shift = 0.5 if kind in ("roms", "nemo", "plain") else -0.5
    width_u, height_v = (w - 1, h - 1) if kind in ("roms", "plain") else (w, h)
    xu, yu = np.meshgrid(np.arange(width_u) + shift, np.arange(h, dtype=float))
    xv, yv = np.meshgrid(np.arange(w, dtype=float), np.arange(height_v) + shift)
    u, v = linear(xu, yu)[0][None], linear(xv, yv)[1][None]
    x, y = (np.arange(w)[1:-1], np.arange(h)[1:-1]) if kind in ("roms", "plain") else (np.arange(1, w), np.arange(1, h))
    if kind == "mitgcm":
        x, y = np.arange(w - 1), np.arange(h - 1)
        coords = {
            "XG": np.arange(w) - 0.5,
            "YC": np.arange(h) * 1.0,
            "XC": np.arange(w) * 1.0,
            "YG": np.arange(h) - 0.5,
        }
        coords = {name: (name, 1000 * values, {"units": "m"}) for name, values in coords.items()}
        data = {
            "UVEL": (("time", "YC", "XG"), u, {"units": "m/s"}),
            "VVEL": (("time", "YG", "XC"), v, {"units": "m/s"}),
        }
        return xr.Dataset(data, coords), x, y
    if kind == "plain":
        coords = {"x_u": xu[0], "y": yu[:, 0], "x": xv[0], "y_v": yv[:, 0]}
        coords = {name: (name, 1000 * values, {"units": "m"}) for name, values in coords.items()}
        data = {"u": (("time", "y", "x_u"), u, {"units": "m/s"}), "v": (("time", "y_v", "x"), v, {"units": "m/s"})}
        return xr.Dataset(data, coords), x, y
    if kind == "roms":
        dims = ("ocean_time", "eta_u", "xi_u"), ("ocean_time", "eta_v", "xi_v")
        names = ("u", "v"), ("lon_u", "lat_u"), ("lon_v", "lat_v")
    else:
        dims = (("time_counter", "y", "x"), ("time_counter", "y", "x"))
        names = ("vozocrtx", "vomecrty"), ("glamu", "gphiu"), ("glamv", "gphiv")
    degrees = [0.01 * plane for plane in (xu, yu, xv, yv)]
    data = {
        name: (d, values, {"units": "m s-1", "coordinates": " ".join(place)})
        for name, d, values, place in zip(names[0], dims, (u, v), names[1:], strict=True)
    }
    planes = zip((*names[1], *names[2]), (dims[0], dims[0], dims[1], dims[1]), degrees, strict=True)
    for name, d, plane in planes:
        east = name.startswith(("lon", "glam"))
        attrs = {
            "standard_name": "longitude" if east else "latitude",
            "units": f"degrees_{'east' if east else 'north'}",
        }
        data[name] = (d[1:], plane, attrs)
    return xr.Dataset(data), x, y


@pytest.mark.parametrize("kind", ["plain", "roms", "nemo", "mitgcm"])
def test_other_variables_of_a_c_grid_are_brought_to_the_centres(tmp_path: Path, kind: str) -> None:
    data, x, y = c_grid(kind)
    names = [name for name in data if data[name].ndim == 3]
    for name, source, units in zip(("err_u", "err_v"), names, ("cm s-1", "m s-1"), strict=True):
        data[name] = data[source] * 1
        data[name].attrs = {**data[source].attrs, "long_name": "uncertainty", "units": units}
    centre = {"plain": ("y", "x"), "mitgcm": ("YC", "XC"), "roms": ("eta_rho", "xi_rho"), "nemo": ("y", "x")}[kind]
    columns, rows = np.meshgrid(np.arange(9), np.arange(7))
    data["ssh"] = ((data[names[0]].dims[0], *centre), (columns + 10.0 * rows)[None], {"units": "m"})
    fields = open_fields(saved(tmp_path, data))
    expected = np.stack(linear(*np.meshgrid(x, y)))
    errors = [fields.variable(name)(np.array([0]))[0, 0] for name in ("err_u", "err_v")]
    np.testing.assert_allclose([100 * errors[0], errors[1]], expected, atol=1e-6)
    if kind == "nemo":  # nothing says which of the points of a cell it has
        with pytest.raises(UserError, match="'ssh' has shape"):
            fields.variable("ssh")
    else:
        expected = np.add(*np.meshgrid(x, 10 * y))
        np.testing.assert_array_equal(fields.variable("ssh")(np.array([0]))[0, 0], expected)


@pytest.mark.parametrize("places", [True, False])
def test_the_c_grid_of_wrf(tmp_path: Path, places: bool) -> None:
    """Sides of the cells all around: one more column of u, one more row of v, and the mass points for centres."""
    sides = {
        "_U": (("south_north", "west_east_stag"), np.meshgrid(np.arange(W + 1) - 0.5, np.arange(H))),
        "_V": (("south_north_stag", "west_east"), np.meshgrid(np.arange(W), np.arange(H + 1) - 0.5)),
    }
    data = xr.Dataset()
    for component, (name, (dims, (x, y))) in enumerate(sides.items()):
        values = np.stack([linear(x, y)[component]] * 2)[:, None]
        attrs = {"units": "m s-1"} | ({"coordinates": f"XLONG{name} XLAT{name} XTIME"} if places else {})
        data[name[1]] = (("Time", "bottom_top", *dims), values, attrs)
        for title, plane, way in (("XLONG", x, "east"), ("XLAT", y, "north")) if places else ():
            data[title + name] = (("Time", *dims), np.stack([0.1 * plane] * 2), {"units": f"degree_{way}"})
    fields = open_fields(saved(tmp_path, data))
    expected = np.stack(linear(*np.meshgrid(np.arange(W), np.arange(H))))
    np.testing.assert_allclose(fields.read([1])[0].numpy(), expected, atol=1e-6)
    assert fields.grid.dx[0].item() == pytest.approx(0.1 * RADIAN * EARTH_RADIUS if places else 1.0)


@pytest.mark.parametrize("kind", ["plain", "roms", "nemo", "mitgcm"])
def test_c_grids_are_brought_to_the_centres(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, x, y = c_grid(kind)
    fields = open_fields(saved(tmp_path, data))
    assert (
        fields.shape == (len(y), len(x)) and "half a cell apart (a C-grid): brought to the" in capsys.readouterr().out
    )
    expected = np.stack(linear(*np.meshgrid(x, y)))
    np.testing.assert_allclose(fields.read([0])[0].numpy(), expected, rtol=1e-6, atol=1e-8)
    spacing = 1000.0 if kind in ("plain", "mitgcm") else 0.01 * RADIAN * EARTH_RADIUS
    assert fields.grid.dx[0].item() == pytest.approx(spacing, rel=1e-4)
    assert fields.grid.dy[0].item() == pytest.approx(spacing, rel=1e-4)
    unit = 1000.0 if kind in ("plain", "mitgcm") else 0.01
    assert (float(fields.x[0]), float(fields.y[0])) == pytest.approx((unit * x[0], unit * y[0]), abs=1e-9)


def test_a_mask_is_not_dropped_on_a_c_grid() -> None:
    data, _, _ = c_grid("nemo")
    data["wet"] = (("y", "x"), np.ones((7, 9)))
    with pytest.raises(UserError, match="a mask .dataset.valid=.* cannot be brought to the centres of a C-grid"):
        open_fields(data, valid="wet")


def test_a_c_grid_in_two_files(tmp_path: Path) -> None:
    data, x, y = c_grid("nemo")
    rename = {"glamu": "nav_lon", "gphiu": "nav_lat"}, {"glamv": "nav_lon", "gphiv": "nav_lat"}
    for name, names, part in zip(("U", "V"), rename, ("vozocrtx", "vomecrty"), strict=True):
        half = data[[part, *names]].rename(names)
        half[part].attrs["coordinates"] = "nav_lon nav_lat"
        saved(tmp_path, half, f"grid_{name}.nc")
    fields = open_fields(str(tmp_path))
    np.testing.assert_allclose(fields.read([0])[0].numpy(), np.stack(linear(*np.meshgrid(x, y))), rtol=1e-6, atol=1e-8)


def test_components_that_are_a_third_of_a_cell_apart_are_refused() -> None:
    data, _, _ = c_grid("plain")
    data = data.assign_coords(x_u=("x_u", data.x_u.values + 160.0, {"units": "m"}))
    with pytest.raises(UserError, match="do not lie on the same points.*interpolate them to the centres"):
        open_fields(data)


@pytest.mark.parametrize("name", ["time_v", "t2"])
def test_components_of_other_times_are_refused(tmp_path: Path, name: str) -> None:
    data = base()
    late = data.v.rename(time=name)
    late[name] = (name, np.arange(N) + 0.5, data.time.attrs)
    apart = data.drop_vars("v").assign(v=late)
    with pytest.raises(
        UserError, match=r"u and v are at different times \(12 from 2020-01-01T00:00 and 12 from .*T12:00"
    ):
        open_fields(saved(tmp_path, apart))
    late[name] = (name, np.arange(N), data.time.attrs)
    fields = open_fields(data.drop_vars("v").assign(v=late))
    np.testing.assert_array_equal(fields.read(range(N)).numpy(), np.stack(flow(), 1))


# A7: coordinates.


@pytest.mark.parametrize(("axis", "units"), [("lon", "degrees_west"), ("lat", "degrees_south"), ("lon", "degree_W")])
def test_degrees_that_count_the_other_way(axis: str, units: str) -> None:
    data = base()
    data[axis] = (axis, 0.0 - data[axis].values, {"units": units})
    check(open_fields(data), {**RIGHT, "dx": open_fields(base()).grid.dx[0].item()})
    fields, plain = open_fields(data), open_fields(base())
    np.testing.assert_allclose(fields.grid.dy, plain.grid.dy)
    assert fields.x_attrs == plain.x_attrs and fields.y_attrs == plain.y_attrs
    turned = curvilinear(base(), 10, 30, 0.3)
    other = turned.copy(deep=True)
    plane = f"nav_{axis}"
    other[plane] = (("y", "x"), 0.0 - turned[plane].values, {**turned[plane].attrs, "units": units})
    np.testing.assert_array_equal(open_fields(other).turn, open_fields(turned).turn)


def test_longitudes_of_every_cell_with_latitudes_of_every_row() -> None:
    data = curvilinear(base(), 10, 30, 0.0).drop_vars("nav_lat")
    data = data.assign_coords(latitude=("y", SOUTH + 0.1 * np.arange(H), {"units": "degrees_north"}))
    with pytest.raises(UserError, match="latitude is in degrees along one dimension.*Expected longitude and latitude"):
        open_fields(data)


@pytest.mark.parametrize(
    ("units", "metres"), [("mm", 1e-3), ("cm", 1e-2), ("km", 1e3), ("m", 1.0), ("Km", 1e3), ("", 1.0)]
)
def test_lengths_in_any_unit(units: str, metres: float) -> None:
    data = base().rename(lon="x", lat="y")
    data = data.assign_coords(
        x=("x", 2.5 * np.arange(W), {"units": units}), y=("y", -2.5 * np.arange(H), {"units": units})
    )
    fields = open_fields(data)
    assert fields.grid.dx.tolist() == pytest.approx([2.5 * metres] * H)
    assert fields.grid.dy.tolist() == pytest.approx([-2.5 * metres] * H)


@pytest.mark.parametrize("units", ["pixel", "px", "counts", "radian", "s"])
def test_units_that_are_no_length_need_the_spacing(units: str) -> None:
    data = base().rename(lon="x", lat="y")
    data = data.assign_coords(
        x=("x", 1.0 * np.arange(W), {"units": units}), y=("y", 1.0 * np.arange(H), {"units": units})
    )
    with pytest.raises(UserError, match=f"the coordinate x has units '{units}', which are no length.*dataset.dx="):
        open_fields(data)
    assert open_fields(data, dx=5.0, dy=6.0).grid.dx[0] == 5.0


def test_longitudes_that_are_none() -> None:
    data = base().assign_coords(lon=2000.0 * np.arange(W), lat=2000.0 * np.arange(H))
    with pytest.raises(UserError, match="the coordinate lon runs from 0 to 20000, which are no degrees.*dataset.x="):
        open_fields(data)
    with pytest.raises(UserError, match="are no numbers"):
        open_fields(base().assign_coords(lon=("lon", np.full(W, np.nan), {"units": "degrees_east"})))


def test_zeros_in_the_coordinates_of_unused_land() -> None:
    data = curvilinear(base(), 10, 30, 0.0)
    for name in "uv":
        data[name][:, 2:5, 3:6] = np.nan
    data.nav_lon[2:5, 3:6], data.nav_lat[2:5, 3:6] = 0, 0
    dx = 0.1 * RADIAN * EARTH_RADIUS
    check(open_fields(data), {**RIGHT, "missing": 9 / (H * W), "dx": dx}, speed=0.1)
    turned = curvilinear(base(), 10, 30, 0.4)
    whole = open_fields(turned).grid
    turned.nav_lon[2:5, 3:6], turned.nav_lat[2:5, 3:6] = 0, 0
    torch.testing.assert_close(open_fields(turned).grid.dx, whole.dx, rtol=5e-3, atol=0)


@pytest.mark.parametrize("fill", [-1.0, 9.96921e36, 0.0, 999.0])
def test_places_that_repeat_are_fill(fill: float) -> None:
    data = curvilinear(base(), 10, 0, 0.4)
    whole = open_fields(data)
    data.nav_lon[2:5, 3:6], data.nav_lat[2:5, 3:6] = fill, fill
    fields = open_fields(data)
    torch.testing.assert_close(fields.grid.dx, whole.grid.dx, rtol=5e-3, atol=0)
    np.testing.assert_allclose(fields.turn, whole.turn, atol=1e-3)


def test_planes_of_lengths_say_what_the_dimensions_are() -> None:
    """Delft3D: M and N, x first, with the places of the cells as projected coordinates."""
    x, y = np.meshgrid(100.0 * np.arange(W), 50.0 * np.arange(H))
    data = {
        name: (("time", "K", "M", "N"), part.transpose(0, 2, 1)[:, None])
        for name, part in zip("uv", flow(), strict=True)
    }
    planes = {name: (("M", "N"), plane.T) for name, plane in (("XZ", x), ("YZ", y))}
    data = xr.Dataset(data | planes)
    for name, way in (("XZ", "x"), ("YZ", "y")):
        data[name].attrs = {"units": "m", "standard_name": f"projection_{way}_coordinate"}
    fields = open_fields(data)
    np.testing.assert_array_equal(fields.read([3]).numpy()[0], np.stack(flow(), 1)[3])
    assert (fields.grid.dx[0], fields.grid.dy[0]) == (100.0, 50.0)


def test_longitude_and_latitude_in_radians() -> None:
    data = base()
    for name in ("lon", "lat"):
        title = {"lon": "longitude", "lat": "latitude"}[name]
        data = data.assign_coords(
            {name: (name, np.deg2rad(data[name].values), {"units": "radian", "standard_name": title})}
        )
    check(open_fields(data), RIGHT)


def test_coordinates_that_are_unknown_on_a_side() -> None:
    data = curvilinear(base(), 10, 30, 0.0)
    data.nav_lon[:, -3:] = np.nan
    check(open_fields(data), RIGHT)
    turned = curvilinear(base(), 10, 0, 0.3)
    turned.nav_lon[:, -3:] = np.nan
    np.testing.assert_allclose(open_fields(turned).turn, 0.3, atol=1e-3)


@pytest.mark.parametrize("dims", [("row", "cell"), ("num_lines", "num_pixels"), ("M", "N"), ("N", "M")])
def test_longitude_and_latitude_say_what_the_dimensions_are(dims: tuple[str, str]) -> None:
    data = curvilinear(base().isel(time=0, drop=True), 10, 0, 0.2).rename(y=dims[0], x=dims[1])
    data["scan"] = (dims[0], np.arange(H), {"units": "seconds since 2020-01-01"})
    for given in (data, data.transpose(*dims[::-1])):
        fields = open_fields(given)
        assert len(fields) == 1 and fields.shape == (H, W)
        np.testing.assert_allclose(fields.restore(fields.read([0]).numpy())[0], np.stack(flow(), 1)[0], atol=1e-6)


# A8: times.


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "gregorian"])
def test_files_with_epochs_of_their_own_are_in_order(tmp_path: Path, calendar: str) -> None:
    for name, year, part in (("a", 2021, slice(6, 12)), ("b", 2020, slice(0, 6))):
        data = base().isel(time=part)
        data["time"] = ("time", 28.0 * np.arange(6), {"units": f"days since {year}-02-20", "calendar": calendar})
        saved(tmp_path, data, f"{name}.nc")
    fields = open_fields(str(tmp_path))
    np.testing.assert_array_equal(fields.read(range(N)).numpy()[:, 0], flow()[0])
    assert np.all(np.diff(fields.time) > np.zeros(1, np.diff(fields.time).dtype))
    assert fields.time.dtype.kind == ("f" if calendar == "360_day" else "M")


@pytest.mark.filterwarnings("ignore:Ambiguous reference date")
@pytest.mark.parametrize("units", ["days since 0001-01-01", "days since 1-1-1 00:00:00", "hours since 1900-01-01"])
def test_far_epochs(units: str) -> None:
    numbers = xr.coding.times.encode_cf_datetime(np.array(["2020-01-01"], "M8[ns]"), units, "standard")[0]
    step = 24.0 if units.startswith("hours") else 1.0
    data = base()
    data["time"] = ("time", numbers[0] + step * np.arange(N), {"units": units})
    assert open_fields(data).time[3] == np.datetime64("2020-01-04")


def test_months_and_years_are_those_of_the_calendar(tmp_path: Path) -> None:
    for name, year, part in (("a", 2021, slice(6, 12)), ("b", 2020, slice(0, 6))):
        data = base().isel(time=part)
        data["time"] = ("time", 2 * np.arange(6), {"units": f"months since {year}-01-01 00:00:00"})
        saved(tmp_path, data, f"{name}.nc")
    fields = open_fields(str(tmp_path))
    np.testing.assert_array_equal(fields.read(range(N)).numpy()[:, 0], flow()[0])
    assert fields.time[1] == np.datetime64("2020-03-01") and fields.time[7] == np.datetime64("2021-03-01")
    data["time"] = ("time", np.arange(6) + 0.5, {"units": "years since 2000-1-1"})
    # Half a year is six months of it.
    assert open_fields(data).time[1] == np.datetime64("2001-07-01")


def test_dates_as_digits() -> None:
    days = 20200129 + np.array([0, 1, 2, 72, 73, 74, 75, 76, 77, 78, 79, 80]) + 0.25
    fields = open_fields(base().assign_coords(time=("time", days, {"units": "day as %Y%m%d.%f"})))
    assert fields.time[3] == np.datetime64("2020-02-01T06") and len(set(np.diff(fields.time))) == 1


def test_times_as_text_and_of_a_model(tmp_path: Path) -> None:
    texts = np.array([f"2020-01-{day + 1:02d}_06:00:00" for day in range(N)], dtype="S19")
    data = bare("U10", "V10").drop_vars("time").rename(time="Time", lat="south_north", lon="west_east")
    data = data.drop_vars(["south_north", "west_east"])
    lon, lat = np.meshgrid(WEST + 0.1 * np.arange(W), SOUTH + 0.1 * np.arange(H))
    for name, plane, way in (("XLONG", lon, "east"), ("XLAT", lat, "north")):
        data[name] = (
            ("Time", "south_north", "west_east"),
            np.broadcast_to(plane, (N, H, W)),
            {"units": f"degree_{way}"},
        )
    data["Times"] = ("Time", texts)
    fields = open_fields(saved(tmp_path, data))
    check(fields, RIGHT)
    assert fields.time[2] == np.datetime64("2020-01-03T06")


def test_times_that_stand_still_or_run_backward_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    days = np.arange(N)
    days[4], days[7] = 3, 2
    open_fields(base().assign_coords(time=("time", days, {"units": "days since 2020-01-01"})))
    said = capsys.readouterr().out
    assert "2 times are not after the one before them, such as 2020-01-04" in said and "sortby('time')" in said


def test_year_first_with_a_year_beside_the_time() -> None:
    data = base().expand_dims(depth=[15.0], axis=1).assign(year=("time", np.full(N, 2020.0)))
    data["time"] = ("time", np.arange(N) + 10000, {"units": "days since 1992-10-05"})
    fields = open_fields(data)
    check(fields, RIGHT)
    assert fields.time[0] == np.datetime64("1992-10-05") + np.timedelta64(10000, "D")


# A9: turned grids.


@pytest.mark.parametrize("turn", [0.3, -1.2, 2.5])
def test_eastward_on_a_turned_grid_is_turned_and_restored(turn: float, capsys: pytest.CaptureFixture[str]) -> None:
    data = curvilinear(base(), 10, 0, turn)
    u, v = flow()
    fields = open_fields(data)
    assert f"turned to the axes of the grid, by {np.rad2deg(turn):.3g}" in capsys.readouterr().out
    east = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    np.testing.assert_allclose(fields.read([4])[0].numpy(), [east[0][4], east[1][4]], atol=2e-4)
    np.testing.assert_allclose(fields.restore(fields.read([4]).numpy())[0], [u[4], v[4]], atol=1e-6)
    check(fields, {key: RIGHT[key] for key in ("N", "H", "W", "missing", "rms_speed")})
    along = data.copy()
    for name, way in (("u", "x"), ("v", "y")):
        along[name].attrs["standard_name"] = f"sea_water_{way}_velocity"
    fields = open_fields(along)
    np.testing.assert_array_equal(fields.read([4])[0].numpy(), [u[4], v[4]])
    assert "taken as along the axes of the grid" in capsys.readouterr().out


def test_a_rotated_pole() -> None:
    """Rotated coordinates give the spacing, longitude and latitude the turn, exactly as by their definition."""
    rlat, rlon = np.deg2rad(-2 + 0.2 * np.arange(H)), np.deg2rad(5 + 0.2 * np.arange(W))
    grid_lon, grid_lat = np.meshgrid(rlon, rlat)
    pole = np.deg2rad(40.0)  # latitude of the rotated pole, at longitude 180
    z = np.sin(grid_lat) * np.sin(pole) + np.cos(grid_lat) * np.cos(grid_lon) * np.cos(pole)
    x = np.cos(grid_lat) * np.cos(grid_lon) * np.sin(pole) - np.sin(grid_lat) * np.cos(pole)
    lon, lat = np.arctan2(np.cos(grid_lat) * np.sin(grid_lon), x), np.arcsin(z)
    data = base(("time", "rlat", "rlon"))
    data = data.assign_coords(
        rlat=("rlat", np.rad2deg(rlat), {"units": "degrees", "standard_name": "grid_latitude"}),
        rlon=("rlon", np.rad2deg(rlon), {"units": "degrees", "standard_name": "grid_longitude"}),
        lon=(("rlat", "rlon"), np.rad2deg(lon), {"units": "degrees_east", "standard_name": "longitude"}),
        lat=(("rlat", "rlon"), np.rad2deg(lat), {"units": "degrees_north", "standard_name": "latitude"}),
    )
    fields = open_fields(data)
    np.testing.assert_allclose(fields.grid.dx, EARTH_RADIUS * 0.2 * RADIAN * np.cos(rlat), rtol=1e-6)
    # By spherical trigonometry: the sine of the angle at the cell between the two poles.
    sine = -np.cos(pole) * np.sin(grid_lon) / np.cos(lat)
    np.testing.assert_allclose(np.abs(np.sin(fields.turn)), np.abs(sine), atol=2e-3)
    np.testing.assert_allclose(fields.restore(fields.read([4]).numpy())[0], np.stack(flow(), 1)[4], atol=1e-6)


def test_a_rotated_pole_that_only_the_grid_mapping_tells() -> None:
    """The angle by spherical trigonometry, as above, with a pole at another longitude."""
    rlat, rlon = np.deg2rad(-2 + 0.2 * np.arange(H)), np.deg2rad(5 + 0.2 * np.arange(W))
    pole = np.deg2rad(39.25)
    data = base(("time", "rlat", "rlon"))
    for axis, line, title in (("rlat", rlat, "latitude"), ("rlon", rlon, "longitude")):
        data[axis] = (axis, np.rad2deg(line), {"units": "degrees", "standard_name": f"grid_{title}"})
    attrs = {"grid_north_pole_latitude": 39.25, "grid_north_pole_longitude": -162.0}
    data["rotated_pole"] = ((), 0, {"grid_mapping_name": "rotated_latitude_longitude", **attrs})
    for name in "uv":
        data[name].attrs["grid_mapping"] = "rotated_pole"
    fields = open_fields(data)
    grid_lon, grid_lat = np.meshgrid(rlon, rlat)
    lat = np.arcsin(np.sin(grid_lat) * np.sin(pole) + np.cos(grid_lat) * np.cos(grid_lon) * np.cos(pole))
    sine = -np.cos(pole) * np.sin(grid_lon) / np.cos(lat)
    np.testing.assert_allclose(np.abs(np.sin(fields.turn)), np.abs(sine), atol=2e-3)
    np.testing.assert_allclose(fields.restore(fields.read([4]).numpy())[0], np.stack(flow(), 1)[4], atol=1e-6)


# A12: zeros.


def test_zeros_as_gaps() -> None:
    data = base()
    data.u[:, 1, 1], data.v[:, 1, 1] = 0, 0  # always
    data.u[3, 4, 5], data.v[3, 4, 5] = 0, 0  # once
    data.u[3, 6, 6] = 0  # in one component
    fields = open_fields(data, land="gap")
    assert fields.grid.valid.all()
    missing = ~fields.read(range(N))[:, 0].isfinite()
    assert missing.sum() == N + 1 and missing[3, 4, 5] and missing[:, 1, 1].all()


# C: files that change, and# C: files that change, and sizes that are declared.


@pytest.mark.parametrize("chunks", [None, (1, 2, H, W)])
def test_a_file_that_is_cut_or_rewritten_while_it_is_read(tmp_path: Path, chunks: tuple | None) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("velocity", data=np.stack(flow(), 1), chunks=chunks)
    fields = open_fields(str(path), preload_gb=0.0, land="nan")
    fields.read([0])
    with path.open("r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(UserError, match="has changed since it was opened"):
        fields.read([N - 1])


@pytest.mark.parametrize("chunks", [None, (1, 2, H, W)])
def test_a_cut_between_the_check_and_the_reading_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: tuple | None
) -> None:
    """The libraries give zeros where a file ends too early."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("velocity", data=np.stack(flow(), 1), chunks=chunks)
    fields = open_fields(str(path), preload_gb=0.0, land="nan")
    whole = type(fields.reader)._part

    def cut(*arguments: object) -> np.ndarray:
        os.truncate(path, 3000)
        return whole(*arguments)

    monkeypatch.setattr(type(fields.reader), "_part", cut)
    with pytest.raises(UserError, match="has changed since it was opened|is damaged"):
        fields.read([N - 1])


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("velocity", (1, 2, 200_000, 200_000), "f4", chunks=(1, 1, 1000, 1000))
    with pytest.raises(UserError, match="a grid of 200000x200000 cells needs .* GB"):
        open_fields(str(tmp_path / "a.h5"))


def test_an_archive_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", velocity=np.zeros((40, 2, 64, 64), np.float32))
    scipy.io.savemat(tmp_path / "a.mat", {"u": np.zeros((64, 64, 40))}, do_compression=True)
    monkeypatch.setattr("vecfield_diffusion.data.readers.reader.available", lambda: 1_000_000)
    for name in ("a.npz", "a.mat"):
        with pytest.raises(UserError, match="what it holds unpacked needs .* GB"):
            open_fields(str(tmp_path / name))


def test_no_message_shows_what_a_file_begins_with(tmp_path: Path) -> None:
    for name in ("secret.nc", "secret.h5", "secret.npz", "secret.txt"):
        (tmp_path / name).write_bytes(b"root:x:0:0")
        with pytest.raises(UserError) as caught:
            open_fields(str(tmp_path / name))
        assert "root" not in str(caught.value).replace(str(tmp_path), "")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["velocity"] = np.stack(flow(), 1)
        file.create_dataset(b"\xff\xfe", data=np.zeros((H, W)))
        file[b"group \xff/\xfe"] = np.zeros((H, W))
    fields = open_fields(str(tmp_path / "a.h5"), preload_gb=0.0)
    with pytest.raises(UserError, match="no variable 'speed'.*It has: "):
        fields.variable("speed")
    assert fields.variable("\ufffd\ufffd")(np.array([1])).shape == (1, 1, H, W)


def test_spacing_that_is_text_and_two_cells() -> None:
    with pytest.raises(UserError, match="its attribute dx is 'nan', expected metres: dataset.dx="):
        open_fields(bare().assign_attrs(dx=np.nan))
    with pytest.raises(UserError, match="its attribute dx is 'wide', expected metres: dataset.dx="):
        open_fields(bare().assign_attrs(dx="wide"))
    with pytest.raises(UserError, match="at least 3 x 3 cells and one time, found 2 x 2"):
        open_fields(base().isel(lat=slice(2), lon=slice(2)))


# Every source is one thing.


def sources() -> dict[str, Callable[[Path], object]]:
    def zarr(folder: Path) -> str:
        pytest.importorskip("zarr")
        base().to_zarr(folder / "a.zarr", zarr_format=2, consolidated=True)
        return str(folder / "a.zarr")

    return {
        "data set": lambda folder: base(),
        "lazy data set": lambda folder: xr.open_dataset(saved(folder, base())),
        "pair": lambda folder: (base().u, base().v),
        "netCDF-4": lambda folder: saved(folder, base()),
        "netCDF-3": lambda folder: [base().to_netcdf(folder / "a.nc", engine="scipy"), str(folder / "a.nc")][1],
        "zarr": zarr,
    }


def test_the_files_behind_a_source(tmp_path: Path) -> None:
    path = saved(tmp_path, base())
    with xr.open_dataset(path) as data:
        assert files_of(data) == files_of((data.u, data.v)) == files_of(path) == [Path(path)]
    assert files_of(base()) == []


@pytest.mark.parametrize("preload_gb", [2.0, 0.0])
@pytest.mark.parametrize("name", sources())
def test_every_source_gives_the_same_fields(tmp_path: Path, name: str, preload_gb: float) -> None:
    fields = open_fields(sources()[name](tmp_path), preload_gb=preload_gb)
    check(fields, RIGHT)
    np.testing.assert_array_equal(fields.read([5, 2]).numpy(), np.stack(flow(), 1)[[5, 2]])
    assert fields.names == ("u", "v") and fields.time[3] == np.datetime64("2020-01-04")
    inner = fields.within(torch.eye(H, W, dtype=torch.bool))
    assert inner.grid.valid.sum() == 9 and fields.grid.valid.all() and inner.read([0]).isfinite().sum() == 18


def test_a_lazy_source_is_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set that is not preloaded, no more is read than the blocks that are asked for."""
    monkeypatch.setattr("vecfield_diffusion.data.fields.BLOCK_BYTES", 2**22)
    shape = (64, 128, 128)
    data = {name: (("time", "y", "x"), np.ones(shape, "f4")) for name in "uv"}
    path = saved(
        tmp_path, xr.Dataset(data), encoding={name: {"zlib": True, "chunksizes": (1, 128, 128)} for name in "uv"}
    )
    fields = open_fields(path, preload_gb=0.0, land="nan")
    assert len(np.unique(fields.groups)) == 2 and (fields.groups == 0).sum() == 32
    fields.read([0])
    assert fields.reader._kept.sum() == 32

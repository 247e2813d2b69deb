"""netCDF: packed values decoded as by hand, the right pair chosen or refused, axes and gaps as the READMEs say."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

from vecfield_diffusion.data.coordinates import Plane
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.stored import Cached
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import EARTH_RADIUS

DATA = Path(__file__).parents[2] / "shared" / "data"
TRUTH = np.random.default_rng(0).uniform(-2.0, 2.0, (4, 2, 5, 7))
LAT, LON = np.linspace(50.0, 46.0, 5), np.linspace(-3.0, 3.0, 7)


def real(name: str) -> str:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the set {path.parent.name} is not on this machine")
    return str(path)


def write(path: Path, variables: dict, coords: dict | None = None, encoding: dict | None = None) -> str:
    coords = {"lat": ("lat", LAT), "lon": ("lon", LON)} if coords is None else coords
    xr.Dataset(variables, coords).to_netcdf(path, engine="h5netcdf", encoding=encoding)
    return str(path)


def pair(u: str = "u", v: str = "v", dims: tuple = ("time", "lat", "lon"), names: tuple = ("", "")) -> dict:
    attrs = [{"standard_name": name} if name else {} for name in names]
    return {u: (dims, TRUTH[:, 0], attrs[0]), v: (dims, TRUTH[:, 1], attrs[1])}


def matches(fields: Fields) -> bool:
    return torch.equal(fields.read(range(4)), torch.from_numpy(TRUTH.astype(np.float32)))


def test_packed_integers_with_a_negative_scale_and_a_fill_value(tmp_path: Path) -> None:
    truth = TRUTH.copy()
    truth[1, 0, 2, 3] = np.nan
    variables = {"u": (("time", "lat", "lon"), truth[:, 0]), "v": (("time", "lat", "lon"), truth[:, 1])}
    packing = {"dtype": "int16", "scale_factor": -1e-4, "add_offset": 0.5, "_FillValue": -32767}
    path = write(tmp_path / "a.nc", variables, encoding={"u": packing, "v": packing})
    read = open_fields(path).read(range(4))
    with h5py.File(path) as file:
        raw = {name: file[name][()].astype(float) for name in ("u", "v")}
    assert raw["u"][1, 2, 3] == -32767 and abs(raw["u"][0]).max() > 1000
    expected = np.stack([raw["u"] * -1e-4 + 0.5, raw["v"] * -1e-4 + 0.5], 1)
    expected[1, :, 2, 3] = np.nan
    np.testing.assert_allclose(read.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(read[0].numpy(), TRUTH[0], atol=6e-5)


def test_values_outside_the_valid_range_are_missing(tmp_path: Path) -> None:
    variables = pair()
    variables["u"][2].update(valid_min=np.int16(-10000), valid_max=np.int16(10000))
    variables["v"][2].update(valid_range=np.array([-1.5, 1.5]))
    packing = {"u": {"dtype": "int16", "scale_factor": 1e-4, "_FillValue": -32767}}
    measured = open_fields(write(tmp_path / "a.nc", variables, encoding=packing)).read(range(4))[:, 0].isfinite()
    near = np.abs(np.abs(TRUTH[:, 0]) - 1.0) < 1e-4
    expected = (np.abs(TRUTH[:, 0]) <= 1.0) & (np.abs(TRUTH[:, 1]) <= 1.5)
    np.testing.assert_array_equal(measured.numpy()[~near], expected[~near])


def test_a_descending_latitude_keeps_its_order_and_turns_the_sign_of_dy(tmp_path: Path) -> None:
    fields = open_fields(write(tmp_path / "a.nc", pair()))
    radian = math.pi / 180.0
    assert matches(fields)
    assert fields.grid.dy.tolist() == pytest.approx([-EARTH_RADIUS * radian] * 5)
    assert fields.grid.dx.tolist() == pytest.approx([EARTH_RADIUS * radian * math.cos(phi * radian) for phi in LAT])
    assert (fields.x_name, fields.y_name, fields.grid.boundary_x) == ("lon", "lat", "open")


def test_axes_in_any_order_and_singleton_levels(tmp_path: Path) -> None:
    variables = {
        name: (("lon", "depth", "time", "lat"), TRUTH[:, k].transpose(2, 0, 1)[:, None]) for k, name in enumerate("uv")
    }
    assert matches(open_fields(write(tmp_path / "a.nc", variables)))
    single = {name: (("lat", "lon"), TRUTH[0, k]) for k, name in enumerate("uv")}
    fields = open_fields(write(tmp_path / "b.nc", single))
    assert len(fields) == 1 and torch.equal(fields.read([0])[0], torch.from_numpy(TRUTH[0].astype(np.float32)))


def test_one_of_several_levels_is_chosen(tmp_path: Path) -> None:
    levels = np.stack([TRUTH - 9.0, TRUTH], axis=2)
    variables = {name: (("time", "depth", "lat", "lon"), levels[:, k]) for k, name in enumerate("uv")}
    path = write(tmp_path / "a.nc", variables)
    assert matches(open_fields(path, level=1))
    for level in (None, 2):
        with pytest.raises(UserError, match="2 levels along depth.*dataset.level=0"):
            open_fields(path, level=level)


def test_projected_coordinates_in_kilometres_and_auxiliary_degrees(tmp_path: Path) -> None:
    coords = {
        "x": ("x", np.arange(7) * 2.5, {"units": "km", "standard_name": "projection_x_coordinate"}),
        "y": ("y", np.arange(5) * 2.5, {"units": "km"}),
        "latitude": (("y", "x"), np.ones((5, 7)), {"units": "degrees_north"}),
        "longitude": (("y", "x"), np.ones((5, 7)), {"units": "degrees_east"}),
    }
    fields = open_fields(write(tmp_path / "a.nc", pair(dims=("time", "y", "x")), coords))
    assert fields.grid.dx.tolist() == [2500.0] * 5 and fields.grid.dy.tolist() == [2500.0] * 5
    assert fields.x.tolist() == (np.arange(7) * 2.5).tolist() and fields.x_attrs["units"] == "km"


def test_a_coordinate_that_is_not_named_like_its_dimension(tmp_path: Path) -> None:
    coords = {"lat": ("j", LAT, {"units": "degrees_north"}), "lon": ("i", LON, {"units": "degrees_east"})}
    fields = open_fields(write(tmp_path / "a.nc", pair(dims=("time", "j", "i")), coords))
    assert fields.x_name == "lon" and fields.x.tolist() == LON.tolist() and matches(fields)


def test_time_is_decoded_or_kept_as_numbers(tmp_path: Path) -> None:
    coords = {"lat": LAT, "lon": LON, "time": ("time", [0, 1, 2, 3], {"units": "hours since 2020-01-01"})}
    fields = open_fields(write(tmp_path / "a.nc", pair(), coords))
    assert fields.time[3] == np.datetime64("2020-01-01T03") and fields.time_attrs["units"] == "hours since 2020-01-01"
    coords["time"] = ("time", [0, 1, 2, 3], {"units": "fortnights since the flood"})
    assert open_fields(write(tmp_path / "b.nc", pair(), coords)).time.tolist() == [0, 1, 2, 3]


def test_standard_names_go_before_usual_names_and_absolute_before_anomaly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sea = ("eastward_sea_water_velocity", "northward_sea_water_velocity")
    variables = pair("first", "second", names=sea) | pair("u", "v")
    assert open_fields(write(tmp_path / "a.nc", variables)).names == ("first", "second")
    long = tuple(f"surface_geostrophic_{way}_sea_water_velocity" for way in ("eastward", "northward"))
    short = (long[0] + "_assuming_sea_level_for_geoid"[:-15], long[1] + "_assuming_sea_level_for_geoid"[:-16])
    variables = pair("ugosa", "vgosa", names=short) | pair("ugos", "vgos", names=long)
    assert open_fields(write(tmp_path / "b.nc", variables)).names == ("ugos", "vgos")
    note = f"chose ugos, vgos ({long[0]}); others: dataset.u=ugosa dataset.v=vgosa\n"
    assert capsys.readouterr().out.endswith(note)


def test_errors_and_flags_of_the_components_are_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("eastward_wind", "northward_wind")
    errors = tuple(f"{name} standard_error" for name in names)
    variables = pair("u_err", "v_err", names=errors) | pair("u", "v", names=names)
    assert open_fields(write(tmp_path / "a.nc", variables)).names == ("u", "v")
    assert capsys.readouterr().out == ""


def test_a_mask_that_has_gaps_itself(tmp_path: Path) -> None:
    wet = np.ones((5, 7))
    wet[1, 2], wet[3, 4] = 0.0, np.nan
    variables = pair() | {"wet": (("lat", "lon"), wet), "land_mask": (("lat", "lon"), 1.0 - wet)}
    packing = {name: {"dtype": "int8", "_FillValue": -1} for name in ("wet", "land_mask")}
    path = write(tmp_path / "a.nc", variables, encoding=packing)
    for keys in ({"valid": "wet"}, {"invalid": "land_mask"}):
        assert open_fields(path, **keys).grid.valid.numpy().tolist() == (wet == 1).tolist()
    moving = np.ones((4, 5, 7))
    moving[2, 1, 2], moving[3, 3, 4] = 0.0, np.nan
    variables = pair() | {"wet": (("time", "lat", "lon"), moving)}
    moved = open_fields(write(tmp_path / "b.nc", variables), valid="wet")
    np.testing.assert_array_equal(moved.read(range(4))[:, 1].isfinite().numpy(), moving == 1)
    assert moved.grid.valid.all()
    match = r"the mask 'lat' has shape \(5,\). Expected \(5, 7\) or \(4, 5, 7\).*dataset.valid="
    with pytest.raises(UserError, match=match):
        open_fields(path, valid="lat")


def test_several_pairs_are_refused_with_their_list(tmp_path: Path) -> None:
    wind = ("eastward_wind", "northward_wind")
    path = write(tmp_path / "a.nc", pair("u10", "v10", names=wind) | pair("u850", "v850", names=wind))
    listing = "2 pairs.*dataset.u=u10 dataset.v=v10 | dataset.u=u850 dataset.v=v850"
    with pytest.raises(UserError, match=listing.replace("|", r"\|")):
        open_fields(path)
    assert open_fields(path, u="u850", v="v850").names == ("u850", "v850")
    with pytest.raises(UserError, match=r"no variable 'u85' \(dataset.u=u85\).*Did you mean 'u850'.*It has: u10"):
        open_fields(path, u="u85", v="v850")
    with pytest.raises(UserError, match="name both"):
        open_fields(path, u="u850")


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        (pair("speed", "depth"), "no pair of velocity components.*out of: speed .4, 5, 7., depth"),
        (pair() | {"v": (("time", "lat", "half"), TRUTH[:, 1, :, 1:])}, "components on the same points"),
        ({name: (("time", "lat", "lon"), TRUTH[:, 0] * np.nan) for name in "uv"}, "all values are NaN"),
        (
            {name: (("a", "b", "lat", "lon"), TRUTH) for name in "uv"},
            "nothing says what the dimension 'a'.*level=0 to 3",
        ),
        ({name: (("time", "lon"), TRUTH[0, 0]) for name in "uv"}, "has the dimensions"),
        ({name: (("lat", "line"), TRUTH[0, 0, :, :1]) for name in "uv"}, "at least 3 x 3 cells"),
    ],
)
def test_variables_that_do_not_fit(tmp_path: Path, variables: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        open_fields(write(tmp_path / "a.nc", variables, {}))


def test_files_that_are_not_netcdf4(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    with pytest.raises(UserError, match="no file"):
        open_fields(str(path))
    path.write_bytes(b"CDF\x05" + bytes(64))
    with pytest.raises(UserError, match="netCDF-3.*nccopy -k nc4 in.nc out.nc"):
        open_fields(str(path))
    path.write_text("u v")
    with pytest.raises(UserError, match="no file that can be read here: .*Expected .*netCDF"):
        open_fields(str(path))
    whole = Path(write(tmp_path / "b.nc", pair())).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is truncated"):
        open_fields(str(path))
    header = bytearray(whole)
    header[header.find(b"OHDR", header.find(b"OHDR") + 4) + 20] ^= 1
    path.write_bytes(header)
    with pytest.raises(UserError, match="is damaged: .*Copy or download it again"):
        open_fields(str(path))
    with h5py.File(path, "w") as file:
        file["u"], file["v"] = TRUTH[:, 0], TRUTH[:, 1]
    assert matches(open_fields(str(path)))  # plain HDF5 by its contents, whatever its ending


def test_a_lazy_file_is_read_as_a_preloaded_one_and_each_chunk_once(tmp_path: Path) -> None:
    truth = TRUTH.copy()
    truth[1, 0, 2, 3] = np.nan
    variables = {"u": (("time", "lat", "lon"), truth[:, 0]), "v": (("time", "lat", "lon"), truth[:, 1])}
    packing = {"dtype": "int16", "scale_factor": -1e-4, "_FillValue": -32767, "zlib": True, "chunksizes": (2, 5, 7)}
    path = write(tmp_path / "a.nc", variables, encoding={"u": packing, "v": packing})
    whole, lazy = open_fields(path), open_fields(path, preload_gb=0.0)
    assert isinstance(whole.reader, MemoryReader) and isinstance(lazy.reader, Cached)
    assert lazy.groups.tolist() == [0, 0, 0, 0]
    for _ in range(2):
        torch.testing.assert_close(lazy.read([3, 1, 1]), whole.read([3, 1, 1]), equal_nan=True, rtol=0, atol=0)
    Path(path).unlink()
    assert lazy.read([0, 2]).isfinite().all()  # all chunks are decoded by now


def curvilinear() -> tuple[np.ndarray, np.ndarray]:
    row, column = np.meshgrid(np.arange(5.0), np.arange(7.0), indexing="ij")
    return 10.0 + 0.5 * column - 0.2 * row, 60.0 + 0.4 * row + 0.1 * column


@pytest.mark.parametrize("turned", [False, True])
def test_latitude_and_longitude_of_every_cell_give_the_spacing(tmp_path: Path, turned: bool) -> None:
    lon, lat = curvilinear()
    order = slice(None, None, -1 if turned else 1)
    dims = ("y", "x")[order]
    coords = {
        "nav_lon": (dims, lon.T if turned else lon, {"units": "degrees_east"}),
        "nav_lat": (dims, lat.T if turned else lat, {"units": "degrees_north"}),
        "x": ("x", np.arange(7)),
    }
    fields = open_fields(write(tmp_path / "a.nc", pair(dims=("time", "y", "x")), coords))
    dx, dy = Plane(lon, lat, True).spacing()
    assert fields.grid.dx.tolist() == dx.tolist() and fields.grid.dy.tolist() == dy.tolist()
    assert (fields.x_name, fields.dims) == ("x", ("time", "y", "x"))
    names, values, attrs = fields.extra_coords["nav_lon"]
    assert names == ("y", "x") and np.array_equal(values, lon) and attrs == {"units": "degrees_east"}
    straight = {"nav_lon": (dims, np.meshgrid(LON, LAT)[0]), "nav_lat": (dims, np.meshgrid(LON, LAT)[1])}
    if not turned:
        fields = open_fields(write(tmp_path / "b.nc", pair(dims=("time", "y", "x")), straight))
        assert fields.x_name == "lon" and fields.y.tolist() == LAT.tolist()


def test_what_a_writer_needs_to_give_the_same_kind_of_file_back(tmp_path: Path) -> None:
    variables = pair("ua", "va", dims=("ocean_time", "depth", "latitude", "longitude"))
    variables = {name: (dims, values[:, None], attrs) for name, (dims, values, attrs) in variables.items()}
    variables["ua"][2].update(standard_name="eastward_wind", units="m/s", grid_mapping="crs", valid_max=99.0)
    variables["crs"] = ((), np.int32(0), {"grid_mapping_name": "latitude_longitude"})
    coords = {
        "latitude": ("latitude", LAT, {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": ("longitude", LON, {"units": "degrees_east"}),
        "depth": ("depth", [5.0], {"units": "m", "positive": "down"}),
    }
    path = tmp_path / "a.nc"
    packing = {"ua": {"scale_factor": 1e-4, "dtype": "int32", "_FillValue": -9}}
    attrs = {"title": "winds", "Conventions": "CF-1.8", "history": "made", "license": "CC0"}
    data = xr.Dataset(variables, coords, attrs)
    data.to_netcdf(path, encoding=packing, engine="h5netcdf")
    fields = open_fields(str(path))
    assert fields.names == ("ua", "va") and fields.dims == ("ocean_time", "latitude", "longitude")
    assert fields.component_attrs == (
        {"standard_name": "eastward_wind", "units": "m/s", "grid_mapping": "crs"},
        {},
    )
    assert fields.global_attrs == attrs
    assert fields.attrs == {"title": "winds", "licence": "CC0"}
    assert fields.y_attrs == {"units": "degrees_north", "standard_name": "latitude"}
    depth, crs = fields.extra_coords["depth"], fields.extra_coords["crs"]
    assert depth[0] == () and depth[1] == 5.0 and depth[2] == {"units": "m", "positive": "down"}
    assert crs[0] == () and crs[2] == {"grid_mapping_name": "latitude_longitude"}


def test_other_variables_are_read_as_snapshots_of_the_same_level(tmp_path: Path) -> None:
    dims = ("time", "depth", "lat", "lon")
    levels = np.stack([TRUTH - 9.0, TRUTH], axis=2)
    variables = {name: (dims, levels[:, k]) for k, name in enumerate("uv")}
    variables["salt"] = (dims, levels[:, 0] + 30.0)
    variables["bathymetry"] = (("lon", "lat"), TRUTH[0, 0].T)
    variables["tide"], variables["part"] = (("time",), np.arange(4.0)), (("time", "lat", "half"), TRUTH[:, 0, :, 1:])
    packing = {"salt": {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 30.0, "_FillValue": -1}}
    path = write(tmp_path / "a.nc", variables, {"lat": LAT, "lon": LON}, encoding=packing)
    for limit in (2.0, 0.0):
        fields = open_fields(path, level=1, preload_gb=limit)
        chosen = np.array([3, 0])
        np.testing.assert_allclose(fields.variable("salt")(chosen), TRUTH[chosen, :1] + 30.0, atol=6e-4)
        np.testing.assert_array_equal(fields.variable("bathymetry")(chosen)[1, 0], TRUTH[0, 0].astype(np.float32))
        assert fields.variable("tide")(chosen)[:, 0, 4, 6].tolist() == [3.0, 0.0]
        assert fields.variable("lat")(chosen)[1, 0, :, 3].tolist() == LAT.tolist()
        with pytest.raises(UserError, match=r"'part' has shape \(4, 5, 6\), which is not that"):
            fields.variable("part")
        with pytest.raises(UserError, match="no variable 'salty'.*Did you mean 'salt'"):
            fields.variable("salty")


def test_longitudes_from_0_to_360_across_the_meridian(tmp_path: Path) -> None:
    lon = np.arange(7) * 360.0 / 7.0
    for shift, name in ((0.0, "a"), (200.0, "b")):
        coords = {"lat": ("lat", LAT), "lon": ("lon", (lon + shift) % 360.0)}
        fields = open_fields(write(tmp_path / f"{name}.nc", pair(), coords))
        assert fields.grid.boundary_x == "periodic" and (fields.grid.dx > 0).all() and matches(fields)


def test_globcurrent() -> None:
    fields = open_fields(real("globcurrent_agulhas/globcurrent_agulhas_2002.nc"))
    velocity = fields.read(range(365))
    assert (len(fields), fields.shape, fields.units) == (365, (41, 81), "m s-1")
    assert fields.grid.valid.double().mean().item() == pytest.approx(1.0 - 0.232, abs=5e-4)
    assert torch.equal(velocity[:, 0].isfinite(), fields.grid.valid.expand(365, -1, -1))
    spread = [velocity[:, k][velocity[:, k].isfinite()].std().item() for k in range(2)]
    assert spread == pytest.approx([0.42, 0.41], abs=0.006)
    assert fields.y[0] == -40.125 and fields.y[-1] == -30.125 and (fields.grid.dy > 0).all()
    assert fields.grid.dy.mean().item() == pytest.approx(27.8e3, rel=1e-3)
    assert 21.2e3 < fields.grid.dx.min() < fields.grid.dx.max() < 24.1e3
    assert fields.time[0] == np.datetime64("2002-01-01") and fields.time[-1] == np.datetime64("2002-12-31")


def test_the_storm_has_a_snapshot_without_any_measured_cell() -> None:
    fields = open_fields(real("ncep_storm_500hPa/ncep_storm_500hPa_199601.nc"))
    velocity = fields.read(range(64))
    measured = velocity[:, 0].isfinite().flatten(1).sum(1)
    assert measured[36] == 0 and (measured > 0).sum() == 63
    assert 1.0 - fields.grid.valid.double().mean().item() == pytest.approx(0.189, abs=5e-4)
    for k, (low, high) in enumerate([(-25, 64), (-46, 60)]):
        assert velocity[:, k].nan_to_num().min().item() == pytest.approx(low, abs=1)
        assert velocity[:, k].nan_to_num().max().item() == pytest.approx(high, abs=1)
    assert fields.grid.dx[0] == pytest.approx(2 * fields.grid.dy[0] * math.cos(math.radians(20.0)))


def test_the_norwegian_wind_is_decoded_with_its_negative_scale() -> None:
    path = real("arome_wind_norway/AROME_MetCoOp_00_DEF_20160202_subset.nc")
    fields = open_fields(path)
    assert fields.names == ("x_wind_10m", "y_wind_10m") and (len(fields), fields.shape) == (49, (201, 171))
    assert fields.grid.valid.all() and fields.x_name == "x"
    assert fields.grid.dx.tolist() == pytest.approx([2500.0] * 201) and fields.grid.dy[0] == pytest.approx(2500.0)
    read = fields.read([7])[0].double().numpy()
    with h5py.File(path) as file:
        for k, name in enumerate(fields.names):
            scale, offset = (file[name].attrs[attr].item() for attr in ("scale_factor", "add_offset"))
            assert scale < 0
            np.testing.assert_allclose(read[k], file[name][7].astype(float) * scale + offset, atol=1e-5)


def test_the_black_sea_is_chosen_by_standard_name_and_says_so() -> None:
    path = real("duacs_blacksea_1day/dt_blacksea_allsat_phy_l4_20160707_20200801.nc")
    fields = open_fields(path)
    assert fields.names == ("ugos", "vgos") and (len(fields), fields.shape) == (1, (56, 120))
    assert 1.0 - fields.grid.valid.double().mean().item() == pytest.approx(0.59, abs=5e-3)
    with h5py.File(path) as file:
        raw = file["ugos"][0].astype(float)
    u = fields.read([0])[0, 0].numpy()
    np.testing.assert_allclose(u[np.isfinite(u)], raw[np.isfinite(u)] * 1e-4, atol=1e-7)
    assert not torch.equal(open_fields(path, u="ugosa", v="vgosa").read([0]), fields.read([0]))


def test_the_radar_has_a_level_and_decoys() -> None:
    fields = open_fields(real("maracoos_hfr_1hour/hfr_rtv_midatl_6km_oi_maracoos_2022_02_21_1200.nc"))
    assert fields.names == ("u", "v") and (len(fields), fields.shape) == (1, (187, 196))
    velocity = fields.read([0])
    assert 1.0 - velocity[:, 0].isfinite().double().mean().item() == pytest.approx(0.85, abs=5e-3)
    assert velocity.abs().nan_to_num().max().item() == pytest.approx(1.7, abs=0.05)


def test_the_original_globcurrent_file_is_netcdf3() -> None:
    first, second = sorted(Path(real("globcurrent_agulhas/original_sample")).glob("*.nc"))
    joined = open_fields(real("globcurrent_agulhas/globcurrent_agulhas_2002.nc"))
    for index, path in enumerate((first, second)):
        fields = open_fields(str(path))
        assert fields.names == tuple(f"{way}_eulerian_current_velocity" for way in ("eastward", "northward"))
        assert fields.time == joined.time[index] and fields.units == "m s-1"
        torch.testing.assert_close(fields.read([0]), joined.read([index]), equal_nan=True, rtol=0, atol=0)
        np.testing.assert_allclose(fields.grid.dx, joined.grid.dx, rtol=1e-9)


@pytest.mark.parametrize("far", [True, False])
def test_a_turned_c_grid_across_the_date_line_is_brought_to_its_centres(far: bool) -> None:
    """A linear flow on an affine grid: means of two points, and of their places, are exact."""

    def place(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lon, lat = 179.9 + 0.1 * (0.8 * x - 0.6 * y), 0.1 * (0.6 * x + 0.8 * y)
        return (lon + 180.0) % 360.0 - 180.0, lat

    shapes = {"u": (5, 6), "v": (4, 7)} if far else {"u": (5, 8), "v": (6, 7)}
    half, data = 0.5 if far else -0.5, {}
    for name, along in (("u", (0.0, half)), ("v", (half, 0.0))):
        y, x = (index + step for index, step in zip(np.indices(shapes[name]), along, strict=True))
        dims, (lon, lat) = (f"y_{name}", f"x_{name}"), place(y, x)
        flow = 1.0 + 2.0 * x - 3.0 * y
        attrs = {"standard_name": f"sea_water_{'x' if name == 'u' else 'y'}_velocity"}
        data[name] = (("time", *dims), np.stack([flow, 2 * flow]), attrs)
        data |= {f"lon_{name}": (dims, lon), f"lat_{name}": (dims, lat)}
    y, x = np.mgrid[1:4, 1:6] if far else np.mgrid[:5, :7]
    fields = open_fields(xr.Dataset(data))
    assert fields.shape == x.shape
    flow = 1.0 + 2.0 * x - 3.0 * y
    np.testing.assert_allclose(fields.read([0, 1]).numpy(), np.stack([[flow] * 2, [2 * flow] * 2]), rtol=1e-6)
    dx, dy = Plane.of(*place(y, x), degrees=True).spacing()
    np.testing.assert_allclose(fields.grid.dx.numpy(), dx, rtol=1e-6)
    np.testing.assert_allclose(fields.grid.dy.numpy(), dy, rtol=1e-6)

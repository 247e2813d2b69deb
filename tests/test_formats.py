"""Formats: what a file holds is read the same whatever the format; files of a folder are one set."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
import xarray as xr
from xarray.backends.file_manager import FILE_CACHE

from vecfield_diffusion.data import stored
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.readers import hdf5, open_fields
from vecfield_diffusion.data.stored import Cached
from vecfield_diffusion.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
TRUTH = np.random.default_rng(0).uniform(-2.0, 2.0, (6, 2, 4, 7)).astype(np.float32)
X, Y, TIME = np.arange(7) * 2.0, 30.0 - np.arange(4) * 3.0, np.arange(6) * 0.5
LON, LAT = np.linspace(-3.0, 3.0, 7), np.linspace(50.0, 47.0, 4)


def matches(fields: Fields, truth: np.ndarray = TRUTH) -> bool:
    return torch.equal(fields.read(range(len(truth))), torch.from_numpy(truth))


def plane(fields: Fields) -> bool:
    return fields.grid.dx.tolist() == [2.0] * 4 and fields.grid.dy.tolist() == [-3.0] * 4


def write_well(path: Path, **changes: object) -> str:
    """2 runs of 3 times, x before y, component 0 along x."""
    given = {"dims": ["x", "y"], "x_type": "PERIODIC", "y_type": "WALL"} | changes
    runs = TRUTH.reshape(2, 3, 2, 4, 7).transpose(0, 1, 4, 3, 2)
    varying = {"sample_varying": True, "time_varying": True, "dim_varying": [True, True]}
    with h5py.File(path, "w") as file:
        file.attrs.update({"dataset_name": "made up", "grid_type": "cartesian", "n_spatial_dims": 2})
        contents = {
            "dimensions/x": (X, {}),
            "dimensions/y": (Y, {}),
            "dimensions/time": (np.arange(3.0), {}),
            "t1_fields/velocity": (runs, varying),
            "t0_fields/pressure": (runs[..., 0] + 1.0, varying),
            "t0_fields/depth": (Y[None] + X[:, None], varying | {"sample_varying": False, "time_varying": False}),
            "t0_fields/force": (
                runs[0, :, 0, 0, 0],
                varying | {"sample_varying": False, "dim_varying": [False, False]},
            ),
            "scalars/Ra": (np.array([5.0, 7.0]), {"sample_varying": True, "time_varying": False}),
        }
        for name, (array, attrs) in contents.items():
            file[name] = array
            file[name].attrs.update(attrs)
        file["dimensions"].attrs["spatial_dims"] = given["dims"]
        for axis in "xy":
            group = file.create_group(f"boundary_conditions/{axis}_{given[f'{axis}_type'].lower()}")
            group.attrs.update({"associated_dims": [axis], "bc_type": given[f"{axis}_type"]})
    return str(path)


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_the_well_has_x_before_y_and_several_runs(tmp_path: Path, limit: float) -> None:
    fields = open_fields(write_well(tmp_path / "a.hdf5"), preload_gb=limit)
    assert matches(fields) and plane(fields)
    assert torch.equal(fields.read([5, 0, 3, 3]), torch.from_numpy(TRUTH[[5, 0, 3, 3]]))
    assert (fields.grid.boundary_x, fields.grid.boundary_y) == ("periodic", "wall")
    assert fields.runs.tolist() == [0, 0, 0, 1, 1, 1] and fields.time.tolist() == [0, 1, 2, 0, 1, 2]
    assert "The Well, t1_fields/velocity (2,3,7,4,2) -> N=6 fields 2x4x7 (2 runs)" in fields.summary()
    chosen = np.array([4, 1])
    np.testing.assert_array_equal(fields.variable("pressure")(chosen), TRUTH[chosen, :1] + 1.0)
    np.testing.assert_array_equal(fields.variable("depth")(chosen)[1, 0], Y[:, None] + X[None])
    assert fields.variable("Ra")(chosen)[:, 0, 2, 3].tolist() == [7.0, 5.0]
    assert fields.variable("force")(chosen)[:, 0, 2, 3].tolist() == TRUTH[[1, 1], 0, 0, 0].tolist()


def test_runs_in_chunks_are_decoded_chunk_by_chunk(tmp_path: Path) -> None:
    write_well(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        runs = file["t1_fields/velocity"][()]
        del file["t1_fields/velocity"]
        file.create_dataset("t1_fields/velocity", data=runs, chunks=(1, 2, 7, 4, 2), compression="gzip")
    fields = open_fields(str(tmp_path / "a.h5"), preload_gb=0.0)
    assert fields.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(fields.read([2, 4, 3]), torch.from_numpy(TRUTH[[2, 4, 3]]))


def test_boundaries_and_dimensions_of_the_well(tmp_path: Path) -> None:
    assert open_fields(write_well(tmp_path / "a.h5", x_type="OPEN")).grid.boundary_x == "open"
    assert open_fields(str(tmp_path / "a.h5"), boundary_x="wall").grid.boundary_x == "wall"
    with pytest.raises(UserError, match="dimensions are theta, phi.*Expected x, y"):
        open_fields(write_well(tmp_path / "b.h5", dims=["theta", "phi"]))
    with pytest.raises(UserError, match="no array 't1_fields/momentum'.*Did you mean"):
        open_fields(str(tmp_path / "a.h5"), velocity="t1_fields/momentum")


def test_pdebench_has_the_edges_of_the_time_steps(tmp_path: Path) -> None:
    runs = TRUTH.reshape(2, 3, 2, 4, 7).transpose(2, 0, 1, 4, 3)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["Vx"], file["Vy"], file["density"] = runs[0], runs[1], runs[0] * 2
        file["x-coordinate"], file["y-coordinate"], file["t-coordinate"] = X, Y, np.arange(4.0)
    fields = open_fields(str(tmp_path / "a.hdf5"))
    assert matches(fields) and plane(fields) and fields.names == ("Vx", "Vy")
    assert fields.time.tolist() == [0, 1, 2, 0, 1, 2] and fields.runs.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(fields.variable("density")(np.array([4])), 2 * TRUTH[[4], :1])


def test_npz_by_sizes_with_dates_and_without_objects(tmp_path: Path) -> None:
    path, days = str(tmp_path / "a.npz"), np.datetime64("2020-01-01") + np.arange(6)
    valid = np.ones((4, 7), dtype=bool)
    valid[1, 2] = False
    bomb = np.array([print], dtype=object)
    np.savez(path, velocity=TRUTH.transpose(0, 2, 3, 1), x=X, y=Y, time=days, valid=valid, notes=bomb)
    fields = open_fields(path)
    torch.testing.assert_close(
        fields.read(range(6)), torch.from_numpy(np.where(valid, TRUTH, np.nan)), equal_nan=True, rtol=0, atol=0
    )
    assert plane(fields) and fields.time[5] == np.datetime64("2020-01-06")
    np.savez_compressed(path, u=TRUTH[:, 0].transpose(2, 1, 0), v=TRUTH[:, 1].transpose(2, 1, 0), x=X, y=Y, t=TIME)
    assert matches(open_fields(path)) and plane(open_fields(path))
    np.savez(path, u=TRUTH[:, 0], v=TRUTH[:, 1], mask=valid)
    assert matches(open_fields(path))
    assert open_fields(path, valid="mask").grid.valid.numpy().tolist() == valid.tolist()
    np.savez(path, speed=TRUTH[:, 0])
    with pytest.raises(UserError, match="no pair of velocity components.*out of: speed"):
        open_fields(path)


@pytest.mark.filterwarnings("ignore:.*decoded anew")
def test_what_is_read_is_a_copy_of_what_lies_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecfield_diffusion.data.readers.found.room_for", lambda _: False)
    np.savez(tmp_path / "a.npz", velocity=TRUTH)
    fields = open_fields(str(tmp_path / "a.npz"), preload_gb=0.0)
    fields.read(range(6)).zero_()
    assert matches(fields)


def matlab_arrays() -> dict[str, np.ndarray]:
    """As MATLAB shows them: (y, x, t), coordinates by meshgrid."""
    mesh_x, mesh_y = np.meshgrid(X, Y)
    u, v = (TRUTH[:, k].transpose(1, 2, 0) for k in (0, 1))
    return {"u": u, "v": v, "x": mesh_x, "y": mesh_y, "t": TIME[None], "label": np.array([ord("a")], dtype=np.uint16)}


def test_matlab_old_and_new_are_turned_alike(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "old.mat", matlab_arrays())
    with h5py.File(tmp_path / "new.mat", "w", userblock_size=512) as file:
        for name, array in matlab_arrays().items():
            file[name] = array.T
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
        file["#refs#/a"] = np.zeros((6, 7, 4))
    new = tmp_path / "new.mat"
    new.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + new.read_bytes()[512:])
    for path in (tmp_path / "old.mat", new):
        for limit in (2.0, 0.0):
            fields = open_fields(str(path), preload_gb=limit)
            assert matches(fields) and plane(fields) and fields.time.tolist() == TIME.tolist()
            assert "MATLAB, u, v (6,7,4) -> N=6 fields 2x4x7" in fields.summary()
            assert "#refs#/a" not in fields.variables
    scipy.io.savemat(tmp_path / "one.mat", {name: TRUTH[0, k] for k, name in enumerate("uv")})
    assert matches(open_fields(str(tmp_path / "one.mat")), TRUTH[:1])


def write_nc(
    path: Path, times: slice, names: str = "uv", lat: np.ndarray = LAT, units: str = "m s-1", **more: object
) -> str:
    variables = {
        name: (("time", "lat", "lon"), TRUTH[times, "uv".index(name)], {"units": units, "long_name": name})
        for name in names
    }
    variables["level"] = (("time",), TIME[times] * 10)
    hours = ("time", np.arange(6)[times] * 6, {"units": "hours since 2020-01-01"})
    coords = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", LON, {"units": "degrees_east"})}
    xr.Dataset(variables, coords | {"time": hours}).to_netcdf(path, **more)
    return str(path)


@pytest.mark.parametrize("limit", [2.0, 0.0])
@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_files_of_a_folder_are_joined_in_the_order_of_their_times(tmp_path: Path, engine: str, limit: float) -> None:
    for name, times in (("c", slice(0, 1)), ("a", slice(1, 4)), ("b", slice(4, 6))):
        write_nc(tmp_path / f"{name}.nc", times, engine=engine)
    (tmp_path / "README.md").write_text("not data")
    for path in (tmp_path, tmp_path / "[abc].nc"):
        fields = open_fields(str(path), preload_gb=limit)
        assert matches(fields) and len(fields) == 6 and "3 files of netCDF" in fields.summary()
        for chosen in ([5, 0, 3, 3, 1], [], [2]):
            assert torch.equal(fields.read(chosen), torch.from_numpy(TRUTH[chosen]))
        hours = (fields.time - fields.time[0]) / np.timedelta64(1, "h")
        assert hours.tolist() == [0, 6, 12, 18, 24, 30]
        assert fields.variable("level")(np.array([5, 0]))[:, 0, 1, 1].tolist() == [25.0, 0.0]
    copy = pickle.loads(pickle.dumps(fields))
    assert matches(copy)


def test_more_files_than_may_be_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for k in range(6):
        with h5py.File(tmp_path / f"{k}.h5", "w") as file:
            file.create_dataset("velocity", data=TRUTH[k : k + 1], chunks=True)
            file["time"] = [k]
    monkeypatch.setattr(hdf5, "open_file", lambda path: opened.append(path) or h5py.File(path))
    with xr.set_options(file_cache_maxsize=2):
        fields = open_fields(str(tmp_path), preload_gb=0.0, land="nan")
        assert matches(fields) and matches(fields) and len(opened) > 12
        assert len(FILE_CACHE) == 2


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_nc(tmp_path / "a.nc", slice(0, 2))
    for change, match in (
        ({"lat": LAT + 1.0}, r"a.nc and .*b.nc cannot be joined: y 50 to 47 in the one, 51 to 48 in the other"),
        ({"units": "mm/frame"}, r"a.nc and .*b.nc cannot be joined: units m s-1 in the one, mm/frame in the other"),
    ):
        write_nc(tmp_path / "b.nc", slice(2, 4), **change)
        with pytest.raises(UserError, match=match):
            open_fields(str(tmp_path))
    write_nc(tmp_path / "b.nc", slice(2, 4), units="cm s-1")
    read = open_fields(str(tmp_path)).read(range(4))
    torch.testing.assert_close(read[:2], torch.from_numpy(TRUTH[:2]), rtol=0, atol=0)
    torch.testing.assert_close(read[2:], torch.from_numpy(TRUTH[2:4] * np.float32(0.01)), rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="no file matches the pattern"):
        open_fields(str(tmp_path / "*.h5"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file with one of the endings"):
        open_fields(str(tmp_path / "empty"))


def test_overlapping_times_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nc(tmp_path / "a.nc", slice(0, 3))
    write_nc(tmp_path / "b.nc", slice(2, 4))
    fields = open_fields(str(tmp_path))
    note = capsys.readouterr().out
    assert len(fields) == 5 and "the times of 1 files overlap, such as" in note
    assert "1 snapshots are copies of earlier ones to the last bit: 3 = 2" in note


def test_two_files_of_one_component_each_are_merged(tmp_path: Path) -> None:
    for half, times in enumerate((slice(0, 3), slice(3, 6))):
        for name in "uv":
            write_nc(tmp_path / f"{name}{half}.nc", times, name)
    for limit in (2.0, 0.0):
        fields = open_fields(str(tmp_path), preload_gb=limit)
        assert matches(fields) and fields.names == ("u", "v") and len(fields) == 6
        assert [attrs["long_name"] for attrs in fields.component_attrs] == ["u", "v"]
    assert matches(open_fields(str(tmp_path), u="u", v="v"))
    (tmp_path / "v1.nc").unlink()
    with pytest.raises(UserError, match=r"components u and v are at different times \(6 from \S+ and 3 from"):
        open_fields(str(tmp_path))


def test_plain_and_unknown_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["run/vx"], file["run/vy"], file["flow"] = TRUTH[:, 0], TRUTH[:, 1], np.zeros(3)
    assert matches(open_fields(str(tmp_path / "a.h5")))
    assert matches(open_fields(str(tmp_path / "a.h5"), u="run/vx", v="vy"))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["other/vx"], file["other/vy"] = TRUTH[:, 0], TRUTH[:, 1]
    with pytest.raises(UserError, match="2 pairs could be the velocity.*run/vx.*other/vx|2 pairs.*other/vx.*run/vx"):
        open_fields(str(tmp_path / "a.h5"))
    for name, content in (("a.grb", b"GRIB\x00\x00\x00\x02"), ("a.csv", b"lon,lat,u,v\n"), ("a.nc", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="no file that can be read here: .*Expected .*netCDF.*HDF5"):
            open_fields(str(tmp_path / name))
    for name, content in (("a.npz", b"PK\x03\x04oops"), ("a.mat", b"MATLAB 5.0 MAT-file".ljust(200))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            open_fields(str(tmp_path / name))


def counting(truth: np.ndarray, calls: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    def reader(indices: np.ndarray) -> np.ndarray:
        calls.extend(indices.tolist())
        return truth[indices]

    return reader


def test_a_cache_decodes_every_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    cached = Cached(counting(TRUTH, calls), np.arange(6) // 2)
    for chosen in ([5, 0, 5], [1, 4], [3], []):
        np.testing.assert_array_equal(cached(np.array(chosen, dtype=int)), TRUTH[chosen])
    assert sorted(calls[1:]) == [0, 1, 2, 3, 4, 5]  # the first call asks for the size
    values = cached(np.array([0]))
    values[:] = 7.0
    np.testing.assert_array_equal(cached(np.array([0])), TRUTH[:1])
    monkeypatch.setattr(stored.os, "getpid", lambda: -1)  # another process keeps its own
    np.testing.assert_array_equal(cached(np.array([2])), TRUTH[2:3])
    assert calls[-3:] == [2, 2, 3]


def test_a_full_disk_ends_the_keeping_and_not_the_reading(capsys: pytest.CaptureFixture[str]) -> None:
    cached = Cached(counting(TRUTH, []), np.arange(6))
    cached(np.array([0]))

    class Full:
        def seek(self, _: int) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    cached._file = Full()
    np.testing.assert_array_equal(cached(np.array([3, 0])), TRUTH[[3, 0]])
    np.testing.assert_array_equal(cached(np.array([4])), TRUTH[[4]])
    assert capsys.readouterr().out.count("No space left on device; decoded fields are kept no longer") == 1


@pytest.mark.parametrize(
    ("path", "keys", "expected"),
    [
        ("globcurrent_agulhas/globcurrent_agulhas_2002.nc", {}, (365, (41, 81), ("u", "v"))),
        ("pinball_wake_dns/pinball_wake_re130.h5", {"invalid": "obstacle_mask"}, (400, (51, 102), ("u", "v"))),
        ("ncep_storm_500hPa/ncep_storm_500hPa_199601.nc", {}, (64, (33, 36), ("u", "v"))),
        ("ncep_storm_500hPa/original", {}, (64, (33, 36), ("u", "v"))),
        (
            "arome_wind_norway/AROME_MetCoOp_00_DEF_20160202_subset.nc",
            {},
            (49, (201, 171), ("x_wind_10m", "y_wind_10m")),
        ),
        (
            "duacs_blacksea_1day/dt_blacksea_allsat_phy_l4_20160707_20200801.nc",
            {},
            (1, (56, 120), ("ugos", "vgos")),
        ),
        (
            "maracoos_hfr_1hour/hfr_rtv_midatl_6km_oi_maracoos_2022_02_21_1200.nc",
            {},
            (1, (187, 196), ("u", "v")),
        ),
    ],
)
def test_the_real_sets_open_by_their_path_alone(path: str, keys: dict, expected: tuple) -> None:
    if not (DATA / path).exists():
        pytest.skip(f"the set {path.partition('/')[0]} is not on this machine")
    fields = open_fields(str(DATA / path), **keys)
    assert (len(fields), fields.shape, fields.names) == expected
    lazy = open_fields(str(DATA / path), **keys, preload_gb=0.0)
    chosen = np.linspace(0, len(fields) - 1, 9).astype(int)[::-1]
    torch.testing.assert_close(lazy.read(chosen), fields.read(chosen), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(lazy.grid.valid, fields.grid.valid)


def test_the_storm_in_two_files_is_the_storm_in_one() -> None:
    folder = DATA / "ncep_storm_500hPa"
    if not folder.exists():
        pytest.skip("the set ncep_storm_500hPa is not on this machine")
    one, two = open_fields(str(folder)), open_fields(str(folder / "original"))
    torch.testing.assert_close(two.read(range(64)), one.read(range(64)), equal_nan=True, rtol=0, atol=0)
    assert one.read([36]).isnan().all()
    partial = two.read([36], partial=True)
    assert partial[0, 0].isfinite().equal(one.grid.valid) and partial[0, 1].isnan().all()

"""What is written comes back in the kind of file it came from, block by block; what is cut short can go on."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.files import FieldsWriter, Template

M, T, H, W = 4, 8, 5, 7
UNITS = {"units": "hours since 1990-01-01", "calendar": "proleptic_gregorian"}
TIME = np.datetime64("2002-01-01T06:00", "ns") + np.arange(T) * np.timedelta64(24, "h")
TEMPLATE = Template(coordinates={"time": (TIME, UNITS), "y": (None, {}), "x": (None, {})})


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((T, 2, H, W))
    truth[0, :, 4, 4] = np.nan
    return {
        "members": rng.standard_normal((M, T, 2, H, W)),
        "observed": rng.random((T, 2, H, W)) < 0.5,
        "truth": truth,
    }


@pytest.fixture
def valid() -> np.ndarray:
    cells = np.ones((H, W), dtype=bool)
    cells[:2, :3] = False
    return cells


def block(arrays: dict[str, np.ndarray], positions: Sequence[int]) -> dict[str, np.ndarray]:
    chosen = {name: array[positions] for name, array in arrays.items() if name != "members"}
    return {"positions": positions, "members": arrays["members"][:, positions], **chosen}


def whole(path: Path, template: Template, valid: np.ndarray, arrays: dict[str, np.ndarray], size: int = 2) -> None:
    writer = FieldsWriter(path, template, valid, len(arrays["members"]), "key")
    for start in range(0, arrays["members"].shape[1], size):
        writer.write(**block(arrays, list(range(start, min(start + size, arrays["members"].shape[1])))))
    writer.finish()


def contents(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system really refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_source(path: Path) -> None:
    """A file as altimetry and ocean models have it: packed, rows from north to south, 2-D coordinates, a projection."""
    rng = np.random.default_rng(1)
    packed = {"dtype": "int16", "scale_factor": -1e-4, "add_offset": 0.5, "_FillValue": -32768}
    component = {"units": "m/s", "grid_mapping": "crs", "valid_min": -30000, "cell_methods": "area: mean"}
    dims = ("ocean_time", "latitude", "longitude")
    times = np.datetime64("2019-05-01T00:20", "ns") + np.arange(T) * np.timedelta64(8, "h")
    xr.Dataset(
        {
            f"{letter}gos": xr.Variable(
                dims,
                rng.uniform(-1, 1, (T, H, W)),
                {"standard_name": f"sea_water_{letter}", "long_name": f"current {letter}", **component},
                packed,
            )
            for letter in "uv"
        },
        {
            "ocean_time": ("ocean_time", times, {"axis": "T"}, {"units": "days since 1950-01-01", "dtype": "float64"}),
            "latitude": ("latitude", np.linspace(42, 40, H).astype("f4"), {"units": "degrees_north"}),
            "longitude": ("longitude", np.linspace(357, 363, W), {"units": "degrees_east", "valid_max": 363.0}),
            "nav_lat": (dims[1:], rng.random((H, W)), {"standard_name": "latitude"}),
            "crs": ((), np.int32(0), {"grid_mapping_name": "latitude_longitude"}),
            "depth": ((), 0.5, {"units": "m", "positive": "down"}),
        },
    ).to_netcdf(path, engine="h5netcdf")


def template_of(source: xr.Dataset) -> Template:
    dims = source.ugos.dims
    encoding = {key: source[dims[0]].encoding[key] for key in ("units", "calendar")}
    attrs = [source[dim].attrs | (encoding if dim == dims[0] else {}) for dim in dims]
    extras = {
        name: (source[name].dims, source[name].values, source[name].attrs) for name in ("nav_lat", "crs", "depth")
    }
    extras["depth"] = (*extras["depth"][:2], extras["depth"][2] | {"_FillValue": -1.0, "bounds": "depth_bounds"})
    return Template(
        names=("ugos", "vgos"),
        dims=dims,
        coordinates={dim: (source[dim].values, attr) for dim, attr in zip(dims, attrs, strict=True)},
        units="m/s",
        component_attrs=tuple(source[name].attrs | {"scale_factor": -1e-4} for name in ("ugos", "vgos")),
        extra_coords=extras,
        attributes={"title": "mine", "history": "then\nnow", "seed": 3, "licence": None},
    )


def test_the_output_is_a_file_like_the_input(tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray) -> None:
    make_source(tmp_path / "in.nc")
    with xr.open_dataset(tmp_path / "in.nc", engine="h5netcdf") as source:
        whole(tmp_path / "out.nc", template_of(source), valid, arrays, size=3)
        with xr.open_dataset(tmp_path / "out.nc", engine="h5netcdf") as data:
            for name in (*source.ugos.dims, "nav_lat", "crs", "depth"):
                xr.testing.assert_identical(data[name].variable, source[name].variable)
                assert data[name].dtype == source[name].dtype and "_FillValue" not in data[name].encoding
            assert data.ocean_time.encoding["units"].startswith("days since 1950-01-01")
            assert set(data.ugos.coords) == set(source.ugos.coords) - {"crs"} | {"ensemble"}
            assert data.ensemble == M
            for name in ("ugos", "vgos"):
                kept = {key: value for key, value in source[name].attrs.items() if key != "valid_min"}
                assert data[name].attrs == kept | {
                    "cell_methods": "area: mean ensemble: mean",
                    "ancillary_variables": f"{name}_std observed",
                    "coverage_content_type": "modelResult",
                }
                assert data[name].dims == source[name].dims and data[name].dtype == np.float32
                assert "nav_lat" in data[f"{name}_std"].coords and data.observed.attrs["grid_mapping"] == "crs"
            named = {name: data[name].attrs["standard_name"] for name in data.data_vars if name[:4] in ("ugos", "vgos")}
            for name in ("ugos", "vgos"):
                plain = source[name].attrs["standard_name"]
                assert named[name] == named[f"{name}_members"] == named[f"{name}_truth"] == plain
                assert named[f"{name}_std"] == f"{plain} standard_error"
            assert list(named)[:2] == ["ugos", "vgos"]
            assert {key: data.attrs[key] for key in data.attrs} == {
                "title": "mine",
                "history": "then\nnow",
                "seed": 3,
                "Conventions": "CF-1.8, ACDD-1.3",
            }
    assert contents(tmp_path) == ["in.nc", "out.nc"]


def test_values(tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray) -> None:
    whole(tmp_path / "new" / "f.nc", TEMPLATE, valid, arrays)
    members, observed = arrays["members"].astype(np.float32), arrays["observed"]
    expected = {
        "": members.mean(0, dtype=float),
        "_std": members.std(0, dtype=float, ddof=1),
        "_members": members,
        "_truth": arrays["truth"],
    }
    with xr.open_dataset(tmp_path / "new" / "f.nc", engine="h5netcdf") as data:
        for suffix, field in expected.items():
            for channel, letter in enumerate("uv"):
                variable = data[letter + suffix]
                assert variable.dims == ("member",) * (suffix == "_members") + ("time", "y", "x")
                assert variable.attrs["units"] == "m s-1" and np.isnan(variable.encoding["_FillValue"])
                assert variable.encoding["zlib"] and variable.encoding["chunksizes"][-3:] == (1, H, W)
                np.testing.assert_allclose(variable, np.where(valid, field[..., channel, :, :], np.nan), rtol=1e-7)
        assert data.u_std.attrs["cell_methods"] == "ensemble: standard_deviation"
        assert data.u_std.attrs["long_name"] == "velocity along x, ensemble standard deviation"
        assert data.member.attrs["standard_name"] == "realization"
        flags = np.where(observed.all(1), 1, np.where(observed[:, 0], 2, np.where(observed[:, 1], 3, 0)))
        np.testing.assert_array_equal(data.observed, flags * valid)
        assert data.observed.attrs["flag_meanings"] == "hidden observed only_u only_v"
        assert data.observed.attrs["flag_values"].tolist() == [0, 1, 2, 3] and data.observed.dtype == np.int8
        np.testing.assert_array_equal(data.valid, valid)


@pytest.mark.parametrize("shape", [(T, H, W), (T, 1, H, W)])
def test_one_member_without_truth_or_times(
    tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray, shape: tuple[int, ...]
) -> None:
    one = {"members": arrays["members"][:1], "observed": arrays["observed"][:, 0].reshape(shape)}
    whole(tmp_path / "f.nc", Template(), valid, one)
    with xr.open_dataset(tmp_path / "f.nc", engine="h5netcdf") as data:
        assert "u_truth" not in data and "time" not in data.coords and np.isnan(data.u_std).all()
        np.testing.assert_array_equal(data.observed, arrays["observed"][:, 0] & valid)
        np.testing.assert_array_equal(data.v.values[:, valid], one["members"][0, :, 1, valid].T.astype(np.float32))


def test_truth_that_some_blocks_lack(tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray) -> None:
    writer = FieldsWriter(tmp_path / "f.nc", Template(), valid, M, "key")
    for start in range(0, T, 2):
        writer.write(**block(arrays, [start, start + 1]) | ({} if start == 4 else {"truth": None}))
    writer.finish()
    with xr.open_dataset(tmp_path / "f.nc", engine="h5netcdf") as data:
        expected = np.full((T, H, W), np.nan)
        expected[4:6] = np.where(valid, arrays["truth"][4:6, 1], np.nan)
        np.testing.assert_array_equal(data.v_truth, expected.astype(np.float32))


def test_times_that_are_no_whole_number_of_their_unit(
    tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray
) -> None:
    """Thirds of an hour come back to the nanosecond; numbers with a unit stay numbers."""
    thirds = xr.decode_cf(xr.Dataset({"time": ("time", 105000 + np.arange(T) / 3, UNITS)})).time.values
    for name, values in (("dates", thirds), ("numbers", np.arange(T) / 3)):
        whole(tmp_path / name, replace(TEMPLATE, coordinates={"time": (values, UNITS)}), valid, arrays)
        with xr.open_dataset(tmp_path / name, engine="h5netcdf", decode_times=name == "dates") as data:
            np.testing.assert_array_equal(data.time, values)


def test_interruption(
    tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second writer goes on where the first one stopped, and the file is the same to the byte."""
    whole(tmp_path / "whole" / "f.nc", TEMPLATE, valid, arrays)
    path = tmp_path / "cut" / "f.nc"
    first = FieldsWriter(path, TEMPLATE, valid, M, "key")
    first.write(**block(arrays, [2, 3]))
    first.write(**block(arrays, [6, 7]))
    assert first.done() == {2, 3, 6, 7}
    second = FieldsWriter(path, TEMPLATE, valid, M, "key")
    assert second.done() == {2, 3, 6, 7}
    with pytest.raises(ValueError, match=r"missing or beyond: \[0, 1, 4, 5\]"):
        second.finish()
    with pytest.raises(ValueError, match="each written once"):
        second.write(**block(arrays, [1, 2]))
    assert not path.exists()
    second.write(**block(arrays, [4, 5]))
    second.write(**block(arrays, [0, 1]))
    second.finish()
    assert path.read_bytes() == (tmp_path / "whole" / "f.nc").read_bytes()
    assert contents(path.parent) == ["f.nc"] and capsys.readouterr().out == ""


def test_parts_of_another_run_are_discarded(
    tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.nc"
    FieldsWriter(path, TEMPLATE, valid, M, "old").write(**block(arrays, [0, 1]))
    FieldsWriter(tmp_path / "other.nc", TEMPLATE, valid, M, "old").write(**block(arrays, [0, 1]))
    writer = FieldsWriter(path, TEMPLATE, valid, M, "new")
    assert writer.done() == set() and "discarded 1 unfinished block(s)" in capsys.readouterr().out
    writer.write(**block(arrays, [4]))
    (writer.folder / "00000007.npz").write_bytes(b"damaged")
    assert FieldsWriter(path, TEMPLATE, valid, M, "new").done() == {4}
    assert FieldsWriter(tmp_path / "other.nc", TEMPLATE, valid, M, "old").done() == {0, 1}


def test_memory_does_not_grow_with_the_number_of_times(tmp_path: Path) -> None:
    def peak(blocks: int) -> int:
        valid = np.ones((64, 64), dtype=bool)
        writer = FieldsWriter(tmp_path / "f.nc", Template(), valid, 2, str(blocks))
        tracemalloc.start()
        for position in range(blocks):
            members = np.full((2, 1, 2, 64, 64), position, dtype=np.float32)
            writer.write([position], members, valid[None])
        writer.finish()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # what is imported and cached once
    few, many = peak(20), peak(200)
    assert many < few + 300_000 < 3_000_000  # 180 more blocks of members are 11.8 MB


@pytest.mark.parametrize("limit", [1_000, 20_000, 60_000, -1])
def test_a_disk_that_fills_keeps_the_old_file_and_the_parts(tmp_path: Path, limit: int) -> None:
    """Refused in a part, in the frame, in the midst of the fields, or with the last byte, when the file is closed."""
    path, cells = tmp_path / "f.nc", np.ones((24, 32), dtype=bool)
    members = np.random.default_rng(0).standard_normal((1, 10, 2, 24, 32))
    fields = {"members": members, "observed": np.broadcast_to(cells, (10, 24, 32))}
    whole(path, Template(), cells, fields, size=1)
    limit, complete = limit % path.stat().st_size, path.read_bytes()
    path.write_bytes(b"old")
    writer = FieldsWriter(path, Template(), cells, 1, "key")
    message = f"cannot write f.nc into {tmp_path}: File too large.*is kept"
    if limit == 1_000:
        with limited(limit), pytest.raises(UserError, match=message):
            writer.write(**block(fields, [0]))
        assert contents(writer.folder) == [] and writer.done() == set()
    for position in range(10):
        writer.write(**block(fields, [position]))
    with limited(limit), pytest.raises(UserError, match=message):
        writer.finish()
    assert path.read_bytes() == b"old" and contents(tmp_path) == [".parts", "f.nc"]
    again = FieldsWriter(path, Template(), cells, 1, "key")
    assert again.done() == set(range(10))
    again.finish()
    assert path.read_bytes() == complete


def test_full_disk_at_the_last_moment(
    tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.nc"
    path.write_bytes(b"old")
    writer = FieldsWriter(path, TEMPLATE, valid, M, "key")
    writer.write(**block(arrays, list(range(T))))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write f.nc into {tmp_path}: No space left on device"):
        writer.finish()
    assert path.read_bytes() == b"old" and contents(tmp_path) == [".parts", "f.nc"]


def test_what_does_not_belong_together(tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray) -> None:
    writer = FieldsWriter(tmp_path / "f.nc", TEMPLATE, valid, M, "key")
    good = block(arrays, [0, 1])
    for wrong, message in (
        ({"members": good["members"][:2]}, "expected members"),
        ({"observed": good["observed"][:1]}, "expected members"),
        ({"truth": good["truth"][:1]}, "truth must be"),
        ({"positions": [0, 0]}, "positions must be"),
        ({"positions": [-1, 0]}, "positions must be"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(**good | wrong)
    writer.write(**good | {"positions": [T - 1, T]})
    with pytest.raises(ValueError, match="positions must be 0 to 7"):
        writer.finish()
    with pytest.raises(ValueError, match="members must be >= 1, got 0"):
        FieldsWriter(tmp_path / "f.nc", TEMPLATE, valid, 0, "key")
    with pytest.raises(ValueError, match="names must differ"):
        FieldsWriter(tmp_path / "f.nc", Template(names=("u", "u")), valid, M, "key")
    with pytest.raises(ValueError, match=r"coordinates must be of the dimensions .*, got lat"):
        FieldsWriter(tmp_path / "f.nc", Template(coordinates={"lat": (None, {})}), valid, M, "key")


def test_folder_that_is_a_file(tmp_path: Path, arrays: dict[str, np.ndarray], valid: np.ndarray) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(UserError, match=f"into {tmp_path}/run: .*choose another folder"):
        FieldsWriter(tmp_path / "run" / "f.nc", TEMPLATE, valid, M, "key").write(**block(arrays, [0]))
    with pytest.raises(UserError, match="cannot write metrics.json"):
        write_text_atomic(tmp_path / "run" / "metrics.json", "{}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        write_text_atomic(tmp_path / "metrics.json", "{}")


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text_atomic(path, '{"rmse": 1}')
    write_text_atomic(path, '{"name": "día"}')
    assert path.read_text(encoding="utf-8") == '{"name": "día"}'
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask() and list(tmp_path.iterdir()) == [path]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""What is written comes back, and a failed write leaves what was there."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.files import write_fields, write_text_atomic

M, T, H, W = 4, 2, 5, 7
TIME = np.array(["2002-01-01T06:00", "2002-01-02T06:00"], dtype="datetime64[ns]")
COORDINATES = {
    "time": (TIME, {"units": "hours since 1990-01-01", "calendar": "gregorian", "long_name": "day of the map"}),
    "lat": (np.linspace(40, 42, H), {"units": "degrees_north", "standard_name": "latitude"}),
    "lon": (np.linspace(-3, 3, W), {"units": "degrees_east", "standard_name": "longitude"}),
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    valid = np.ones((H, W), dtype=bool)
    valid[:2, :3] = False
    truth = rng.standard_normal((T, 2, H, W))
    truth[0, :, 4, 4] = np.nan
    observed = rng.random((T, H, W)) < 0.5
    return {"members": rng.standard_normal((M, T, 2, H, W)), "observed": observed, "valid": valid, "truth": truth}


def write(path: Path, arrays: dict[str, np.ndarray], **options: object) -> None:
    arguments = {"coordinates": COORDINATES, **arrays, **options}
    write_fields(path, **arguments)


def test_round_trip(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    seeds, config = [3, 5, 8, 2**62], "diffusion: edm\nname: día\n"
    origin = {"source": "altimetry", "licence": None}
    write(tmp_path / "new" / "fields.nc", arrays, seeds=seeds, config=config, ckpt="best.pt", attributes=origin)
    with xr.open_dataset(tmp_path / "new" / "fields.nc", engine="h5netcdf") as data:
        members, valid = arrays["members"], arrays["valid"]
        assert data.u.dims == ("member", "time", "lat", "lon") and data.u.dtype == np.float32
        for name, expected in {
            "": members,
            "_mean": members.mean(0),
            "_std": members.std(0, ddof=1),
            "_truth": arrays["truth"],
        }.items():
            for channel, letter in enumerate("uv"):
                values = data[letter + name].values
                np.testing.assert_allclose(values, np.where(valid, expected[..., channel, :, :], np.nan), rtol=1e-6)
                assert data[letter + name].attrs["units"] == "m s-1"
        np.testing.assert_array_equal(data.observed, arrays["observed"] & valid)
        np.testing.assert_array_equal(data.valid, valid)
        assert data.observed.dtype == np.int8
        assert data.observed.attrs["flag_values"].tolist() == [0, 1]
        assert data.observed.attrs["flag_meanings"] == "hidden observed"
        np.testing.assert_array_equal(data.time, TIME)
        assert data.time.encoding["units"].startswith("hours since 1990-01-01")
        assert data.time.attrs["long_name"] == "day of the map"
        for name in ("lat", "lon"):
            np.testing.assert_array_equal(data[name], COORDINATES[name][0])
            assert data[name].attrs == COORDINATES[name][1]
        assert data.attrs["Conventions"] == "CF-1.10" and data.attrs["source"] == "altimetry"
        assert data.attrs["seeds"].tolist() == seeds and data.attrs["config"] == config
        assert data.attrs["ckpt"] == "best.pt" and "licence" not in data.attrs
        assert data.u_mean.encoding["zlib"] and data.u_mean.encoding["complevel"] == 1
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["fields.nc"]


def test_minimal(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """One member, nothing known, no coordinate values, numeric time with units of its own."""
    days = {"units": "days since 2000-01-01"}
    coordinates = {"time": (np.array([0.0, 1.5]), days), "y": (None, {}), "x": (None, {})}
    one = arrays["members"][:1].astype(np.float32)
    write(
        tmp_path / "f.nc",
        arrays,
        members=one,
        truth=None,
        coordinates=coordinates,
        observed=arrays["observed"][:, None],
    )
    with xr.open_dataset(tmp_path / "f.nc", engine="h5netcdf") as data:
        assert "u_truth" not in data and "x" not in data.coords
        assert np.isnan(data.u_std).all() and data.attrs["seeds"].size == 0
        inside = data.valid.values == 1
        np.testing.assert_array_equal(data.v_mean.values[:, inside], one[0, :, 1][:, inside])
        assert data.time.values[1] == np.datetime64("2000-01-02T12:00")


def test_wrong_shapes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="expected members"):
        write(tmp_path / "f.nc", arrays, valid=arrays["valid"].T)
    with pytest.raises(ValueError, match="expected members"):
        write(tmp_path / "f.nc", arrays, truth=arrays["truth"][:1])


def test_full_disk_keeps_the_old_file(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fields.nc"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write fields.nc into {tmp_path}: No space left on device"):
        write(path, arrays)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_cut_short_keeps_the_old_file(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """The system really refuses the bytes: files may not grow beyond 1 kB here."""
    path = tmp_path / "fields.nc"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            write(path, arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_folder_that_is_a_file(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(UserError, match=f"into {tmp_path}/run: .*choose another folder"):
        write(tmp_path / "run" / "fields.nc", arrays)
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

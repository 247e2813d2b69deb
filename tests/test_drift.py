"""`vecfield-drift` on members that flow evenly: where each drifter ends is known, and so are chances and messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from programs import is_message

from vecfield_diffusion import commands
from vecfield_diffusion.config.ending import guarded
from vecfield_diffusion.inference.files import FieldsWriter
from vecfield_diffusion.inference.template import FileLayout, Template
from vecfield_diffusion.programs import drift as program
from vecfield_diffusion.programs.drift import drift

M, T, H, W = 12, 5, 20, 24
LAT, LON = np.linspace(10, 12, H), np.linspace(-1, 1.3, W)
DX, DY = 6_371_000 * np.deg2rad(LON[1] - LON[0]), 6_371_000 * np.deg2rad(LAT[1] - LAT[0])
#: Metres per second that members flow to the east and to the north.
EAST, NORTH = np.linspace(0.2, 0.75, M), np.linspace(-0.2, 0.3, M) ** 2
UNITS = {"units": "hours since 2020-01-01", "calendar": "standard"}


def filled(path: Path, *, split: bool = False, truth: bool = True, step: int = 6, scale: float = 1.0) -> Path:
    """A file as `infer.py` writes it, of even flows, rows from south to north, with a corner of land."""
    velocity = np.stack([EAST, NORTH], axis=1)[:, None, :, None, None] * np.ones((M, T, 2, H, W)) * scale
    time = np.datetime64("2020-01-01", "ns") + np.arange(T) * np.timedelta64(step, "h")
    axes = {
        "time": (time, UNITS),
        "lat": (LAT, {"units": "degrees_north"}),
        "lon": (LON, {"units": "degrees_east"}),
    }
    names = ({"standard_name": "eastward_sea_water_velocity"}, {"standard_name": "northward_sea_water_velocity"})
    template = Template(dims=("time", "lat", "lon"), coordinates=axes, component_attrs=names)
    valid = np.ones((H, W), dtype=bool)
    valid[:3, :3] = False
    writer = FieldsWriter.of(path, FileLayout(template, valid, M, (), split), "key")
    known = velocity.mean(axis=0) if truth else None
    writer.write(list(range(T)), velocity.astype(np.float32), np.zeros((T, H, W), dtype=bool), known)
    writer.finish()
    return path


def run(folder: Path, *overrides: str, draw: bool = False) -> dict:
    """The metrics of the program, which draws where that is what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(program, "picture", lambda *given: None)
        drift(commands.drift.config(*overrides, "figure=figure.svg"), folder)
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.usefixtures("rendered")
def test_drifters_end_where_their_members_carry_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 0.1 E 10.5 N, for twelve hours; 5 of 12 come within reach of a place that lies on their way."""
    path, hours = filled(tmp_path / "f.nc"), 12
    at = np.array([0, 21600, 43200])[:, None]
    away = np.hypot(EAST * at - EAST[3] * 43200, NORTH * at - NORTH[3] * 43200).min(axis=0)
    radius = float(np.sort(away)[4:6].mean()) / 1000
    row = 6_371_000 * np.cos(np.deg2rad(10.5)) * np.pi / 180
    goal = [0.1 + EAST[3] * 43200 / row, 10.5 + NORTH[3] * 43200 / (6_371_000 * np.pi / 180)]
    place = f"place=[{goal[0]:.6f},{goal[1]:.6f},{radius:.4f}]"
    found = run(tmp_path, f"input={path}", "at=[0.1,10.5]", f"hours={hours}", place, draw=True)
    with xr.open_dataset(tmp_path / "drift.nc") as data:
        assert data.sizes == {"trajectory": M + 1, "obs": 3} and data.attrs["featureType"] == "trajectory"
        assert data.member.values.tolist() == [*range(M), -1]
        np.testing.assert_allclose(data.lon[:, 0], 0.1, atol=1e-9)
        step = np.append(EAST, EAST.mean()) * 21600 / row
        np.testing.assert_allclose(data.lon[:, 1] - 0.1, step, rtol=2e-4)  # rows differ in width by so much
        north = np.append(NORTH, NORTH.mean()) * 43200 / (6_371_000 * np.pi / 180)
        np.testing.assert_allclose(data.lat[:, 2] - 10.5, north, atol=1e-6)
        assert data.time.values[0, 2] == np.datetime64("2020-01-01T12") and not data.lost.any()
    assert found["arrival"] == pytest.approx(5 / 12) and found["lost"] == 0 and found["hours"] == 12
    assert found["held_by_0.9"] == 1 and found["true_drifters"] == 1
    assert found["places"][0]["area_0.5_km2"] < found["places"][0]["area_0.9_km2"]
    out = capsys.readouterr().out
    assert "12 drifters from each in 12 members, 12 hours from 2020-01-01" in out and "come within" in out
    assert (tmp_path / "figure.svg").stat().st_size > 10_000


def test_files_of_members_are_drifted_in_as_one(tmp_path: Path) -> None:
    whole, split = filled(tmp_path / "a" / "f.nc"), filled(tmp_path / "b" / "fields.nc", split=True)
    first = run(tmp_path / "one", f"input={whole}", "starts=5")
    second = run(tmp_path / "two", f"input={split.parent}", "starts=5")
    assert first == second and first["starts"] == 5 and first["hours"] == 24


def test_drifters_start_around_their_place_and_walk(tmp_path: Path) -> None:
    """All within the radius, as far apart as a disc is, the same in all members; the walk is the same for one seed."""
    path = filled(tmp_path / "f.nc", truth=False)
    options = [f"input={path}", "at=[0.1,11]", "radius=8", "drifters=60", "hours=6"]
    run(tmp_path / "one", *options)
    with xr.open_dataset(tmp_path / "one" / "drift.nc") as data:
        assert data.sizes["trajectory"] == M * 60 and (data.member >= 0).all()
        east = (data.lon[:, 0] - 0.1) * 111.195 * np.cos(np.deg2rad(11))
        far = np.hypot(east, (data.lat[:, 0] - 11) * 111.195).values.reshape(M, 60)
        assert (far == far[:1]).all() and far[0, 0] < 1e-9 and 7.5 < far.max() <= 8.05
        assert np.mean(far[0] ** 2) == pytest.approx(32, rel=0.25)
    walks = []
    for name, seed in (("two", 0), ("three", 0), ("four", 1)):
        run(tmp_path / name, f"input={path}", "at=[0.1,11]", "hours=6", "diffusivity=20", f"seed={seed}")
        with xr.open_dataset(tmp_path / name / "drift.nc") as data:
            walks.append(data.lat.values[:, -1])
    np.testing.assert_array_equal(walks[0], walks[1])
    assert np.abs(walks[0] - walks[2]).min() > 0


def test_lost_drifters_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "f.nc", scale=4.0)
    found = run(tmp_path, f"input={path}", "at=[0.9,11]", "hours=24")
    assert found["lost"] == 1 and "distance_km" not in found
    out = capsys.readouterr().out
    assert "100 % lost at land or an edge" in out and "there are no regions" in out


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["at=[0.1,15]"], ["at: lat 15 is outside the field, whose lat goes from 10 to 12"]),
        (["at=[-0.95,10.05]"], ["this is land"]),
        (["at=[1,2,3]"], ["expected [x,y]"]),
        (["hours=7"], ["whole steps of 6 hours", "at most 4"]),
        (["hours=48"], ["at most 4"]),
        (["time=4"], ["no snapshot follows 2020-01-02"]),
        (["time=2021-01"], ["time=2021-01: no snapshot has this date"]),
        (["levels=[0.5,1]"], ["between 0 and 1"]),
        (["drifters=0"], ["drifters must be >= 1"]),
        (["place=[0.1,11]"], ["place=[0.1, 11.0]", "[lon,lat,km]"]),
        (["place=[0.1,11,0.3,15]"], ["place: lat 15 is outside"]),
        (["figure=map.gif"], [".png, .pdf or .svg"]),
        (["input=none.nc"], ["there is no such file"]),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, overrides: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"input={filled(tmp_path / 'f.nc')}"] if not overrides[0].startswith("input") else []

    def work() -> int:
        drift(commands.drift.config(*given, *overrides), tmp_path / "out")
        return 0

    is_message((guarded(work), *capsys.readouterr()), *parts)
    assert not (tmp_path / "out").exists()


def test_a_result_is_not_replaced_and_a_file_without_members_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path / "f.nc")
    options = [f"input={path}", "starts=2"]
    run(tmp_path / "out", *options)
    for given, part in (
        (options, "overwrite=true"),
        ([f"input={tmp_path / 'g.nc'}", "overwrite=true"], "it has no members"),
    ):
        with xr.open_dataset(path) as data:
            data.drop_vars(["u_members", "v_members"]).to_netcdf(tmp_path / "g.nc", engine="h5netcdf")
        code = guarded(lambda given=given: drift(commands.drift.config(*given), tmp_path / "out") and 0)
        is_message((code, *capsys.readouterr()), part)
    run(tmp_path / "out", *options, "overwrite=true")

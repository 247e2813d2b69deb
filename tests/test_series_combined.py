"""Sequences with what stands beside a network: physics, instruments, errors of variables, and all in the past alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from programs import FEW, Call
from test_series_public import hours

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import Pixels
from vecfield_diffusion.guidance.sensors import Radial
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.library import open as open_fields


def radar() -> xr.Dataset:
    """Hours with gaps, what a radar in a corner recorded of them, its errors and the bearing of each cell."""
    data = hours(frames=12)
    angle = np.arctan2(data["east"].values[None, :] + 500.0, data["north"].values[:, None] + 500.0)
    bearing = np.broadcast_to(np.rad2deg(angle), data["ueast"].shape).astype(np.float32)
    along = data["ueast"].values * np.sin(angle) + data["vnorth"].values * np.cos(angle)
    dims = data["ueast"].dims
    return data.assign(vr=(dims, along.astype(np.float32)), head=(dims, bearing))


@pytest.fixture(scope="module")
def trained(place: Path) -> str:
    """A run of sequences of three frames that was trained with a penalty on divergence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        hours(gaps=False).to_netcdf("clean.nc", engine="h5netcdf")
        radar().to_netcdf("radar_hours.nc", engine="h5netcdf")
    return "outputs/train/penalty"


@pytest.fixture
def net(run: Call, place: Path, trained: str) -> str:
    """The same, trained once."""
    if not (place / trained).exists():
        split = ["splits.train=0.6", "splits.validation=0.2", "splits.test=0.2", "splits.guard=0"]
        options = ["dataset=file", "dataset.path=clean.nc", "dataset.frames=3", "debug=fast", "physics=divergence"]
        small = ["model.channels=[8,8]", "model.embedding=16", "trainer.score_cases=2", "trainer.max_steps=4"]
        code, _, err = run("train", *options, *small, *split, "name=penalty")
        assert code == 0, err
    return trained


FILLED = [
    "physics=divergence inpainting=mmps",
    "physics=divergence physics.mode=hard",
    "physics=divergence physics.mode=gradient time_context=past",
    "physics=divergence_curl inpainting=mmps time=2:6",
    "sensor=component sensor.component=v sigma_obs=0.1",
    "sensor=radial sensor.velocity=[vr] sensor.bearing=[head] sensor.error=[err]",
    "sensor=radial sensor.velocity=[vr] sensor.bearing=[head] sigma_obs=0.1 horizon=1 hide=0.2",
    "sensor=radial sensor.velocity=[vr] sensor.sites=[[-500,-500]] sigma_obs=err time_context=past",
    "sensor=footprint mask=pixels sigma_obs=0.1",
    "sigma_obs=err hide=0.2",
    "sigma_obs=[err,err] inpainting=mmps time_context=past horizon=2",
    "inpainting=pigdm sigma_obs=err",
    "inpainting=dps",
    "inpainting=repaint",
    "guidance=cfg inpainting=conditional",
]


@pytest.mark.parametrize("options", FILLED)
def test_a_series_is_filled_with_all_that_stands_beside_a_network(net: str, run: Call, options: str) -> None:
    code, _, err = run("infer", f"ckpt={net}", "input=radar_hours.nc", "name=beside", *FEW, *options.split())
    assert code == 0, err
    with xr.open_dataset("outputs/infer/beside/fields.nc") as filled:
        name = "u_members" if "sensor.velocity" in options else "ueast_members"  # an instrument reads no component
        assert bool(filled[name].notnull().all()) and float(filled[name].std("member").max()) > 0


@pytest.mark.parametrize(
    "options",
    [
        "sensor=radial sensor.sites=[[-500,-500],[12e3,0]] sigma_obs=0.1",
        "sensor=footprint sigma_obs=0.1 time_context=past",
        "sensor=component sigma_obs=err",
        "sigma_obs=err physics=divergence horizon=[0,2]",
    ],
)
def test_a_series_is_scored_with_them(net: str, run: Call, options: str) -> None:
    common = [f"ckpt={net}", "masks=[pixels]", "cases=3", "baselines=[climatology,persistence,last_observed]"]
    code, _, err = run("evaluate", *common, *FEW, "name=beside", *options.split())
    assert code == 0, err


def test_what_a_radar_recorded_of_frames_is_that_of_their_snapshots(place: Path, trained: str) -> None:
    """Selected by frame from sequences, a missing one among them."""
    fields = open_fields(place / "radar_hours.nc")
    sequences = np.array([[0, 1, -1], [4, 5, 6]])
    variables = radar()

    def reader(of: np.ndarray):
        def variable(name: str) -> torch.Tensor:
            values = torch.from_numpy(variables[name].values)[of.clip(min=0)].unsqueeze(-3)
            return values.masked_fill(torch.from_numpy(of < 0)[..., None, None, None], torch.nan)

        return variable

    sensor = Radial(velocity=["vr"], bearing=["head"], error=["err"])
    cases = cases_of(fields, sequences, sensor.recorded(reader(sequences)))
    chosen = torch.tensor([[True, False, False], [False, True, True]])
    some, alone = cases.snapshots(chosen), cases_of(fields, np.array([0, 5, 6]), None)
    each = sensor.recorded(reader(np.array([0, 5, 6])))
    for one, other in zip(some.sensor.records, each.records, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    y = torch.ones_like(alone.truth)
    torch.testing.assert_close(some.sensor.readings(y)["vr"], each.readings(y)["vr"], equal_nan=True, rtol=0, atol=0)


def cases_of(fields: Fields, chosen: np.ndarray, sensor: Radial | None):
    cases = make_cases(fields, chosen, Pixels(0.5), seed=0)
    return cases if sensor is None else cases.seen_through(sensor)

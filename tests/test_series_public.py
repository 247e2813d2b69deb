"""A network of sequences by the public face: trained, shipped, filled and foretold as by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from programs import FEW, Call, is_message
from test_library import alike

import vecfield_diffusion as vf
from vecfield_diffusion import commands
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.inference.export import PROGRAM_FILE
from vecfield_diffusion.programs.export import export
from vecfield_diffusion.programs.trained import load_trained

T, SHAPE = 36, (16, 16)


def hours(gaps: bool = True, frames: int = T) -> xr.Dataset:
    """A wave that travels, in noise, with a corner that comes and goes, and errors by cell."""
    angle = np.arange(16) * 2 * np.pi / 16 - 0.3 * np.arange(frames)[:, None, None] + np.zeros((1, 16, 1))
    values = np.stack((np.sin(angle), np.cos(angle)), axis=1)
    values += 0.3 * np.random.default_rng(0).standard_normal(values.shape)
    if gaps:
        values[::3, :, :5, :6] = np.nan
    dims, units, sea = ("hour", "north", "east"), {"units": "m s-1"}, "sea_water_velocity"
    length = {"units": "m"}
    return xr.Dataset(
        {
            "ueast": (dims, values[:, 0].astype(np.float32), units | {"standard_name": f"eastward_{sea}"}),
            "vnorth": (dims, values[:, 1].astype(np.float32), units | {"standard_name": f"northward_{sea}"}),
            "err": (dims, np.full(values[:, 0].shape, 0.1, dtype=np.float32), units),
        },
        {
            "hour": ("hour", np.datetime64("2022-02-01", "ns") + np.arange(frames) * np.timedelta64(1, "h")),
            "north": ("north", np.arange(16) * 1000.0, length),
            "east": ("east", np.arange(16) * 1000.0, length),
        },
    )


@pytest.fixture(scope="module")
def series(place: Path) -> Path:
    """The folder of a run of sequences of three frames, trained by `vf.train` on a Dataset, and the file `gaps.nc`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        hours(frames=10).to_netcdf("gaps.nc", engine="h5netcdf")
        run = vf.train(
            hours(gaps=False), name="hours", debug="fast", dataset=dict(frames=3),
            splits=dict(train=0.6, validation=0.2, test=0.2, guard=0),
            model=("unet_tiny", dict(channels=[8, 8], embedding=16)),
            trainer=dict(max_steps=3, batch_size=4, score_cases=0),
        )  # fmt: skip
        assert run.load().trained.frames == 3
    return place


@pytest.mark.parametrize(
    "options",
    [
        ["horizon=2", "hide=0.2", "sigma_obs=err"],
        ["time_context=past", "time=5:8", "inpainting=mmps"],
        ["mask=track", "seed=3", "time=2"],
    ],
)
def test_the_command_line_is_the_same_function(series: Path, run: Call, options: list[str]) -> None:
    """Of a path and a Dataset: equal bytes, names, dimensions and attributes."""
    code, _, err = run("infer", "ckpt=outputs/train/hours", "input=gaps.nc", "name=hours", *FEW, *options)
    assert code == 0, err
    typed = {"hide": float, "horizon": int, "seed": int}
    pairs = (option.split("=") for option in [*FEW, *options])
    keywords = {key: typed.get(key, str)(value) for key, value in pairs}
    with xr.open_dataset("outputs/infer/hours/fields.nc") as data:
        expected = data.load()
    alike(vf.fill("gaps.nc", "outputs/train/hours", **keywords), expected)
    model = vf.load("outputs/train/hours")
    with xr.open_dataset("gaps.nc") as lazy:
        alike(model.fill(lazy, **keywords), expected)
    assert len(expected["hour"]) == {"horizon=2": 12, "time_context=past": 3, "mask=track": 1}[options[0]]
    assert np.isfinite(expected["ueast_members"]).all()


def test_shipped_weights_fill_the_same(series: Path, run: Call) -> None:
    export(commands.export.config("ckpt=outputs/train/hours", "out=hours.safetensors"), Path("outputs/export"))
    export(commands.export.config("from=hours.safetensors", "out=outputs/train/shipped"), Path("outputs/export"))
    options = {"members": 2, "time": "3:6", "sampler.steps": 2, "horizon": 1}
    with xr.open_dataset("gaps.nc") as data:
        members = [
            vf.fill(data, ckpt, **options)["ueast_members"].values
            for ckpt in ("outputs/train/hours", "hours", "outputs/train/shipped")
        ]
    np.testing.assert_array_equal(members[0], members[1])
    np.testing.assert_array_equal(members[0], members[2])


def test_a_program_takes_sequences(series: Path, run: Call) -> None:
    config = commands.export.config("ckpt=outputs/train/hours", "format=program", "out=hours.pt2")
    export(config, Path("outputs/export"))
    files = {PROGRAM_FILE: ""}
    program = torch.export.load("hours.pt2", extra_files=files).module()
    assert json.loads(files[PROGRAM_FILE])["frames"] == 3
    denoiser = load_trained("outputs/train/hours", torch.device("cpu")).denoiser.in_float32()
    z, y = torch.randn(2, 2, 3, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    observed, valid = (torch.ones(2, 3, 1, *SHAPE, dtype=torch.bool) for _ in range(2))
    given = (y, observed, torch.full(observed.shape, 0.1), valid)
    s = torch.tensor([0.2, 4.0])
    with torch.no_grad():
        torch.testing.assert_close(program(z, s, *given), denoiser(z, s, Observation(*given)), rtol=1e-5, atol=1e-5)


def test_samples_of_nothing_are_of_the_prior(series: Path, run: Call) -> None:
    """And a network of snapshots, which cannot foretell, says so."""
    prior = vf.load("outputs/train/hours").sample(members=2, **{"sampler.steps": 2})
    assert prior["u_members"].shape == (2, 1, *SHAPE) and np.isfinite(prior["u_members"]).all()
    is_message(run("infer", "ckpt=outputs/train/run", "horizon=2", "mask=block"), "horizon=2", "dataset.frames")

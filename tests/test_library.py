"""The public face: Datasets in, Datasets out, the same numbers as the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from programs import FEW, ROOT, SMALL, Call, trained_in

import vecfield_diffusion as vf
from vecfield_diffusion import commands, library
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.library import overrides

PUBLIC = ["evaluate", "fill", "inspect", "load", "open", "train"]


def test_names_are_public_and_nothing_else() -> None:
    assert vf.__all__ == PUBLIC and dir(vf) == sorted([*PUBLIC, "__version__"])
    for name in PUBLIC:
        assert callable(getattr(vf, name)) and getattr(vf, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'filling'"):
        vf.filling  # noqa: B018


def test_importing_takes_no_time_and_no_torch() -> None:
    script = (
        "import time; begun = time.perf_counter(); import vecfield_diffusion, sys; "
        "print(time.perf_counter() - begun, 'torch' in sys.modules, 'xarray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, torch, xarray = done.stdout.split()
    assert float(seconds) < 0.3 and (torch, xarray) == ("False", "False")


def test_keywords_are_what_one_would_type() -> None:
    given = {"members": 4, "sampler": ("heun", {"steps": 3}), "time": [0, 1], "input": "a b.nc", "domain": None}
    given |= {"calibrate": True, "sigma_obs": 1e-3, "physics.tau": np.float64(0.5), "names": ("u", "v")}
    found = overrides(given)
    assert found == [
        *("members=4", "sampler=heun", "time=[0,1]", 'input="a b.nc"', "domain=null", "calibrate=true"),
        *("sigma_obs=0.001", "names=[u,v]", "sampler.steps=3", "physics.tau=0.5"),
    ]
    assert overrides({"trainer": {"max_minutes": 10}}) == ["trainer.max_minutes=10"]


def gappy(n: int = 5, **attrs: str) -> xr.Dataset:
    """Fields of the kind that TINY trains on, with gaps, errors and names of their own."""
    rng = np.random.default_rng(0)
    values = 0.05 * rng.standard_normal((2, n, 16, 16)).astype(np.float32)
    values[:, :, 4:9, 2:8] = np.nan
    x = np.arange(16) * 6250.0
    dims, units = ("hour", "north", "east"), {"units": "m s-1"}
    return xr.Dataset(
        {
            "ueast": (dims, values[0], units | {"standard_name": "eastward_sea_water_velocity"}),
            "vnorth": (dims, values[1], units | {"standard_name": "northward_sea_water_velocity"}),
            "u_err": (dims, np.full_like(values[0], 0.01), units),
        },
        {
            "hour": ("hour", np.datetime64("2022-02-01", "ns") + np.arange(n) * np.timedelta64(12, "h"), {"axis": "T"}),
            "north": ("north", x, {"units": "m", "axis": "Y"}),
            "east": ("east", x, {"units": "m", "axis": "X"}),
        },
        {"title": "by hand", **attrs},
    )


@pytest.fixture(scope="module")
def net(place: Path) -> Path:
    """A network of files of the kind of `gappy`, and one file."""
    rng = np.random.default_rng(1)
    data = gappy(30)
    for name in ("ueast", "vnorth"):
        data[name] = (data[name].dims, 0.05 * rng.standard_normal((30, 16, 16)).astype(np.float32), data[name].attrs)
    data.to_netcdf(place / "whole.nc", engine="h5netcdf")
    gappy().to_netcdf(place / "radar.nc", engine="h5netcdf")
    options = ["debug=fast", "dataset=file", "dataset.path=whole.nc", "splits.guard=0", "mean_field=false"]
    small = ["model.channels=[8,8]", "model.embedding=16", "trainer.score_cases=0", "trainer.max_steps=2"]
    trained_in(place, *options, *small, "name=net", "trainer.batch_size=2")
    return place


def alike(first: xr.Dataset, second: xr.Dataset) -> None:
    """Fails unless two Datasets are equal to the last bit, and in all but the history and what names the source."""
    assert set(first.variables) == set(second.variables)
    for name in first.variables:
        one, two = first[name], second[name]
        assert one.dims == two.dims and one.dtype == two.dtype, name
        assert one.values.tobytes() == two.values.tobytes(), name
        assert set(one.attrs) == set(two.attrs), name
        for key in one.attrs:
            np.testing.assert_array_equal(one.attrs[key], two.attrs[key])
    assert set(first.attrs) == set(second.attrs)
    free = {"history", "config", "source", "vecfield_diffusion_key", "id", "date_created"}
    assert {k: v for k, v in first.attrs.items() if k not in free} == {
        k: v for k, v in second.attrs.items() if k not in free
    }


@pytest.mark.parametrize(
    "options",
    [
        ["inpainting=mmps", "physics=divergence", "sigma_obs=u_err", "hide=0.2"],
        ["time=2022-02-02", "seed=3", "mask=pixels", "sampler=heun"],
        [],
    ],
)
def test_the_command_line_is_the_same_function(net: Path, run: Call, options: list[str]) -> None:
    """A file at both ends, a path, and a Dataset in memory: equal bytes, names, dimensions and attributes."""
    code, _, err = run("infer", "ckpt=outputs/train/net", "input=radar.nc", "name=same", *FEW, *options)
    assert (code, err) == (0, ""), err
    keywords = dict(option.split("=") for option in [*FEW, *options])
    if "hide" in keywords:
        keywords["hide"] = 0.2
    with xr.open_dataset("outputs/infer/same/fields.nc") as data:
        expected = data.load()
    model = vf.load("outputs/train/net")
    from_path = model.fill("radar.nc", **keywords)
    alike(from_path, expected)
    with xr.open_dataset("radar.nc") as lazy:
        alike(model.fill(lazy, **keywords), expected)
    assert list(expected["ueast"].dims) == ["hour", "north", "east"] and expected.attrs["title"] == "by hand"


#: The public face as it was asked for, with names and a mask in place of dots.
CODE = """
import vecfield_diffusion as vf

ds = xr.open_dataset("radar.nc")
filled = vf.fill(ds, "pretrained/mine", members=16, seed=0)
model = vf.load("outputs/train/mine")
again = model.fill(ds, mask=mask, sigma_obs="u_err", hide=0.2, inpainting="mmps", physics="divergence", time="2022-02")
prior = model.sample(members=16)
run = vf.train("my.nc", diffusion="edm", sampler="heun", trainer=dict(max_minutes=10))
scores = vf.evaluate(model, masks=["track", "block"])
fields = vf.open("radar/*.nc")
found = vf.inspect(ds)
"""


def test_the_code_of_the_first_page(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would write it; only the network that it trains is smaller and stops sooner."""
    train, tiny = library.training.train, commands.train.config("model=unet_tiny", *SMALL[:2])["model"]

    def small(config: dict[str, Any], folder: Path) -> dict[str, float]:
        assert (config["diffusion"]["_target_"][-3:], config["trainer"]["max_minutes"]) == ("EDM", 10)
        quick = {"max_steps": 2, "batch_size": 2, "score_cases": 0, "validation_batches": 1}
        splits = config["splits"] | {"guard": 0}
        return train(config | {"model": tiny, "splits": splits, "trainer": config["trainer"] | quick}, folder)

    monkeypatch.setattr(library.training, "train", small)
    monkeypatch.chdir(tmp_path)
    for copy in ("outputs/train/mine", "pretrained/mine"):
        shutil.copytree(net / "outputs/train/net", copy)
    Path("radar").mkdir()
    for file, copy in (("radar", "radar"), ("radar", "radar/hours"), ("whole", "whole"), ("whole", "my")):
        shutil.copy(net / f"{file}.nc", f"{copy}.nc")
    mask = np.zeros((16, 16), dtype=bool)
    mask[::2] = True
    made: dict[str, Any] = {"xr": xr, "mask": mask}
    exec(CODE, made)

    ds, filled = made["ds"], made["filled"]
    for name in ("ueast", "ueast_std", "ueast_members", "observed", "valid"):
        assert name in filled
    assert filled["ueast_members"].sizes["member"] == 16 and np.isfinite(filled["ueast"]).all()
    members = filled["ueast_members"].astype(float)
    np.testing.assert_allclose(filled["ueast"], members.mean("member"), atol=1e-7)
    np.testing.assert_allclose(filled["ueast_std"], members.std("member", ddof=1), atol=1e-7)

    again = made["again"]
    observed, measured = again["observed"].values == 1, np.isfinite(ds["ueast"].values)
    assert again.sizes["hour"] == 5 and not (observed & ~(mask & measured)).any()
    assert observed[0].sum() == (mask & measured[0]).sum() - round(0.2 * (mask & measured[0]).sum())

    prior = made["prior"]
    assert prior["u_members"].shape == (16, 1, 16, 16) and not prior["observed"].any()
    assert np.isfinite(prior["u_members"]).all()

    assert made["run"].path == Path("outputs/train/run") and made["run"].load().trained.step == 2

    scores = made["scores"]
    assert isinstance(scores, pd.DataFrame) and set(scores["mask"]) == {"track", "block"}
    assert {"diffusion", "climatology", "optimal interpolation"} <= set(scores["method"])
    assert scores["value"].notna().any() and "crps" in set(scores["metric"])

    fields = made["fields"]
    assert len(fields) == 5 and fields.shape == (16, 16) and fields.units == "m s-1"
    assert fields.read([0, 1]).shape == (2, 2, 16, 16) and fields.time.dtype.kind == "M"
    assert len(fields.x) == len(fields.y) == 16
    assert float(fields.grid.dx.mean()) == pytest.approx(6250.0)

    found = made["found"]
    assert "5" in repr(found) and found.text() == repr(found) and found.to_html().startswith("<div>")


def test_two_arrays_are_a_source(net: Path, run: Call) -> None:
    ds = xr.open_dataset("radar.nc")
    model = vf.load("outputs/train/net")
    options = {"members": 2, "time": 0, "sampler.steps": 2}
    both = model.fill([ds["ueast"], ds["vnorth"]], **options)
    np.testing.assert_array_equal(both["ueast"], model.fill(ds, **options)["ueast"])


def test_a_dataset_is_kept_beside_the_run_that_it_trained(net: Path, run: Call) -> None:
    with xr.open_dataset("whole.nc") as data:
        trained = vf.train(
            data, name="memory", debug="fast", splits=dict(guard=0),
            model=("unet_tiny", dict(channels=[8, 8], embedding=16)),
            trainer=dict(max_steps=2, batch_size=2, score_cases=0),
        )  # fmt: skip
    model = trained.load()
    assert (trained.path / "data.nc").exists()
    assert np.isfinite(model.fill(mask="block", members=2, **{"sampler.steps": 2})["ueast"]).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda model: model.fill(3), "expected a path, a pattern, an xarray.Dataset"),
        (lambda model: model.fill("radar.nc", membres=3), "Did you mean 'members'"),
        (lambda model: model.fill("radar.nc", mask=np.ones(4)), r"mask: expected the observed cells as \(H, W\)"),
        (lambda model: model.fill("radar.nc", mask=np.ones((3, 3))), r"mask: it has shape \(3, 3\), the field"),
        (lambda model: model.fill("radar.nc", mask=np.zeros((16, 16))), "observes no valid cell"),
        (lambda model: vf.load("nowhere"), "no checkpoint there"),
        (lambda model: vf.fill("radar.nc", "nowhere"), "no checkpoint there"),
    ],
)
def test_what_does_not_fit_is_one_message(net: Path, run: Call, call: object, match: str) -> None:
    with pytest.raises(UserError, match=match):
        call(vf.load("outputs/train/net"))

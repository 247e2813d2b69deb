"""The programs as a user runs them: train, infer, evaluate, sweep; and what each says of something bad."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from programs import FEW, ROOT, SMALL, TINY, Call, is_message, process

from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence
from vecfield_diffusion.programs import infer as inference
from vecfield_diffusion.programs import train as training
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

DATA = ROOT.parent / "shared" / "data"
PINBALL = DATA / "pinball_wake_dns" / "pinball_wake_re130.h5"
AGULHAS = DATA / "globcurrent_agulhas" / "globcurrent_agulhas_2002.nc"


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the hash of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def filled(place: Path, run: Call, name: str, *overrides: str) -> xr.Dataset:
    code, _, err = run("infer", "ckpt=outputs/train/run", f"name={name}", *FEW, *overrides)
    assert (code, err) == (0, "")
    with xr.open_dataset(place / "outputs" / "infer" / name / "fields.nc") as data:
        return data.load()


def members(data: xr.Dataset) -> np.ndarray:
    return np.stack([data["u_members"], data["v_members"]], axis=2)


def check_observed(data: xr.Dataset, letter: str, truth: np.ndarray | None = None) -> None:
    """Every member has the value that was observed."""
    seen = data["observed"].values == 1
    known = (data[f"{letter}_truth"].values if truth is None else truth)[seen]
    got = data[f"{letter}_members"].values[:, seen]
    np.testing.assert_allclose(got, np.broadcast_to(known, got.shape), rtol=1e-5, atol=1e-6)


# The main path.


def test_training_leaves_what_the_design_names(place: Path) -> None:
    folder = place / "outputs" / "train" / "run"
    names = set(contents(folder))
    assert {"config.yaml", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"} <= names
    assert {"samples/0000005.png", "samples/0000010.png"} <= names
    assert not any("tmp" in name or "partial" in name for name in names)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["diffusion"]["sigma_max"] > 10 and config["dataset"]["resolution"] == 16
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 5, 10, 10]
    assert {"loss", "lr", "samples", "minutes"} <= records[0].keys()
    assert {"val/loss", "val/crps", "val/rmse_component", "val/spread_skill"} <= records[1].keys()
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["counters"]["samples"] == 40 and yaml.safe_load(state["config"]) == config


@pytest.mark.usefixtures("rendered")
def test_inference_writes_fields_scores_and_a_picture(place: Path, run: Call) -> None:
    code, out, err = run("infer", "ckpt=outputs/train/run", "mask=block", "name=first", "time=[0,2]", *FEW)
    assert (code, err) == (0, "")
    folder = place / "outputs" / "infer" / "first"
    assert set(contents(folder)) == {"fields.nc", "metrics.json", "figure.png"}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores.keys() == {"hidden", "observed", "all"} and scores["hidden"]["rmse_component"] > 0
    assert scores["observed"]["rmse_component"] < 1e-6 and "hidden" in out
    with xr.open_dataset(folder / "fields.nc") as data:
        assert dict(data.sizes) == {"time": 2, "y": 16, "x": 16, "member": 2}
        names = {f"{letter}{end}" for letter in "uv" for end in ("", "_members", "_std", "_truth")}
        assert names | {"observed", "valid"} == set(data.data_vars)
        config = yaml.safe_load(data.attrs["config"])
        assert config["time"] == [0, 2] and config["mask"]["_target_"].endswith("Block")
        assert data.attrs["ckpt"] == "outputs/train/run/checkpoints/best.pt" and data.attrs["seed"] == 0
        assert "turbulence" in data.attrs["source"] and data.attrs["licence"] == "CC0-1.0"
        assert data["u"].attrs["units"] == "m s-1" and (data["valid"] == 1).all()
        seen = data["observed"].values == 1
        assert 0.7 < seen.mean() < 0.8
        for letter in "uv":
            members_of = data[f"{letter}_members"]
            np.testing.assert_allclose(data[letter], members_of.mean("member"), atol=1e-6)
            np.testing.assert_allclose(data[f"{letter}_std"], members_of.std("member", ddof=1), atol=1e-6)
            check_observed(data, letter)
        np.testing.assert_allclose(data["x"], (np.arange(16) + 0.5) * 40e3)
        with h5py.File(next((place / "outputs" / "data").glob("*.h5"))) as file:
            np.testing.assert_array_equal(data["u_truth"], file["velocity"][[43, 45], 0])


def test_evaluation_scores_beside_the_baselines(place: Path, run: Call) -> None:
    few = ["cases=3", "name=scores", *FEW]
    code, out, err = run("evaluate", "ckpt=outputs/train/run", "masks=[pixels,block]", *few)
    assert (code, err) == (0, "")
    with (place / "outputs" / "evaluate" / "scores" / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    methods = {"diffusion", "climatology", "nearest", "linear", "biharmonic", "optimal interpolation"}
    assert {(row["mask"], row["method"]) for row in rows} == {(a, b) for a in ("pixels", "block") for b in methods}
    errors = [row for row in rows if (row["metric"], row["region"]) == ("rmse_component", "hidden")]
    assert len(errors) == 12 and all(0 < float(row["low"]) <= float(row["high"]) for row in errors)
    assert {(row["cases"], row["units"]) for row in errors} == {("3", "m s-1")}
    assert "rmse / OI" in out and "biharmonic" in out
    assert "persistence is left out" in out  # the snapshots of the turbulence are independent
    report = (place / "outputs" / "evaluate" / "scores" / "report.html").read_text()
    assert report.count("data:image/png") == 22 and "outputs/train/run" in report


def test_seed_members_and_batch(place: Path, run: Call) -> None:
    """One seed gives one field: more members, more snapshots and other batches do not change it."""
    base = members(filled(place, run, "base", "time=1"))
    more = members(filled(place, run, "more", "time=[3,1]", "members=3", "batch=1"))
    np.testing.assert_allclose(more[:2, 1], base[:, 0], atol=0.01)  # the network may compute in bf16
    other = members(filled(place, run, "other", "time=1", "seed=1"))
    assert np.abs(other - base).max() > 0.05


def test_a_mask_of_a_file_says_what_is_observed(place: Path, run: Call) -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[3:9, 5:7] = 1
    np.save(place / "mask.npy", mask)
    data = filled(place, run, "from_file", "mask=mask.npy")
    np.testing.assert_array_equal(data["observed"][0], mask)


def test_nothing_observed_is_generation(place: Path, run: Call) -> None:
    data = filled(place, run, "free", "mask=none", "time=-1")
    assert (data["observed"] == 0).all() and np.isfinite(members(data)).all()


def test_one_member_has_no_spread(place: Path, run: Call) -> None:
    data = filled(place, run, "single", "members=1", "colour=vorticity")
    assert np.isnan(data["u_std"]).all() and np.isfinite(data["u"]).all()
    text = (place / "outputs" / "infer" / "single" / "metrics.json").read_text()
    scores = json.loads(text, parse_constant=pytest.fail)
    assert scores["hidden"]["spread"] is None and scores["hidden"]["crps"] > 0


def test_physics_lowers_the_divergence(place: Path, run: Call) -> None:
    steps = ("mask=none", "sampler.steps=16")
    found = [members(filled(place, run, f"div_{name}", *steps, f"physics={name}")) for name in ("none", "divergence")]
    rms = [
        divergence(
            torch.from_numpy(array).flatten(0, 1).double(),
            Grid(torch.ones(16, 16, dtype=torch.bool), 40e3, 40e3, "periodic", "periodic"),
        ).square().mean().sqrt().item()
        for array in found
    ]  # fmt: skip
    assert rms[1] < 0.9 * rms[0]
    recorded = json.loads((place / "outputs/infer/div_divergence/metrics.json").read_text())
    assert recorded["all"]["divergence_rms"] == pytest.approx(rms[1], rel=1e-3)


def test_replacement_keeps_what_is_observed(place: Path, run: Call) -> None:
    data = filled(place, run, "replaced", "mask=track", "inpainting=replacement", "sampler=heun", "sampler.steps=3")
    check_observed(data, "u")
    check_observed(data, "v")


@pytest.fixture(scope="module")
def gaps(place: Path) -> Path:
    """A file of the size of the network, with gaps."""
    rng = np.random.default_rng(0)
    velocity = 0.2 * rng.standard_normal((3, 2, 16, 16))
    velocity[:, :, 4:9, 2:8] = np.nan
    velocity[0, :, 0, 0] = np.nan
    days = np.arange(3.0)
    write_hdf5(place / "radar.h5", velocity, 40e3, 40e3, "periodic", "periodic", source="a radar", time=days)
    return place / "radar.h5"


def test_the_gaps_of_a_file_are_filled(place: Path, run: Call, gaps: Path) -> None:
    data = filled(place, run, "gaps", "input=radar.h5", "time=[0,1]")
    with h5py.File(gaps) as file:
        truth = np.array(file["velocity"][:2])
    np.testing.assert_array_equal(data["observed"], np.isfinite(truth[:, 0]))
    check_observed(data, "u", truth[:, 0])
    assert "u_truth" not in data  # nothing that is known was hidden
    assert data.attrs["source"] == "a radar" and data["time"].values.tolist() == [0.0, 1.0]
    # The domain is that of the network, not what the file happens to measure.
    assert (data["valid"] == 1).all() and np.isfinite(members(data)).all()
    scores = json.loads((place / "outputs" / "infer" / "gaps" / "metrics.json").read_text())
    assert "hidden" not in scores


def test_more_of_a_file_can_be_hidden(place: Path, run: Call, gaps: Path) -> None:
    data = filled(place, run, "hidden", "input=radar.h5", "mask=pixels", "time=0")
    assert 0 < data["observed"].sum() < 60
    scores = json.loads((place / "outputs" / "infer" / "hidden" / "metrics.json").read_text())
    assert scores["hidden"]["rmse_component"] > 0


# Going on, and stopping.


def test_the_same_name_goes_on_and_another_configuration_is_refused(place: Path, run: Call) -> None:
    options = [*TINY, *SMALL, "name=again"]
    assert run("train", *options, "trainer.max_steps=2")[0] == 0
    code, out, _ = run("train", *options, "trainer.max_steps=4", "trainer.log_every=2")
    assert code == 0 and "outputs/train/again: going on from step 2" in out and "4 steps" in out
    before = contents(place / "outputs" / "train" / "again")
    made = contents(place / "outputs" / "data")
    for override in ("optimizer.lr=1e-4", "diffusion=ddpm", "dataset.resolution=8", "model.channels=[16,8]", "seed=1"):
        is_message(run("train", *options, override), "outputs/train/again holds a run with", "another name=")
    assert contents(place / "outputs" / "train" / "again") == before
    assert contents(place / "outputs" / "data") == made, "data were made for a run that was refused"


def test_a_signal_saves_and_ends(place: Path) -> None:
    options = [*TINY, *SMALL, "name=stopped", "trainer.max_steps=1000000", "trainer.validate_every=1000000"]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True) as child:
        log = place / "outputs" / "train" / "stopped" / "metrics.jsonl"
        for _ in wait_for(child):
            if log.exists() and log.read_text().count("\n") > 1:
                break
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and "Traceback" not in err
    last = "outputs/train/stopped/checkpoints/last.pt"
    assert err == f"stopped by SIGTERM: saved {last}; the same command goes on\n"
    assert load_checkpoint(place / last)["counters"]["step"] >= 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_data_are_made_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setattr(training, "prepare", lambda *given: signal.raise_signal(number))
    monkeypatch.setattr(inference, "opened", lambda *given: signal.raise_signal(number))
    for program, said in ((training.train, "nothing to save yet"), (inference.infer, "nothing is filled yet")):
        with pytest.raises(SystemExit) as stop:
            program({"trainer": {"devices": 1, "strategy": "auto"}}, tmp_path)
        err = capsys.readouterr().err
        assert stop.value.code == code and err.endswith(f": {said}; the same command goes on\n")


def wait_for(child: subprocess.Popen[str]) -> Iterator[None]:
    end = time.monotonic() + 90
    while child.poll() is None and time.monotonic() < end:
        yield
        time.sleep(0.1)
    pytest.fail(f"the program ended too early or did not begin: {child.poll()}")


def test_a_sweep_makes_a_folder_each_and_one_table(place: Path) -> None:
    options = [*TINY, "name=sweep", "trainer.max_steps=2", "trainer.score_cases=1", "model.channels=[8,8]"]
    done = process(place, "train", "-m", "diffusion=ddpm,edm", "sampler=euler,heun", "sampler.steps=2", *options)
    assert (done.returncode, done.stderr) == (0, "")
    folder = place / "outputs" / "train" / "sweep"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1", "2", "3"]
    with (folder / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["diffusion"], row["sampler"]) for row in rows} == {
        (a, b) for a in ("ddpm", "edm") for b in ("euler", "heun")
    }
    scores = [float(row["val/crps"]) for row in rows]
    assert scores == sorted(scores) and all(row["status"] == "done" for row in rows)
    assert done.stdout.count("\njob  diffusion  sampler") == 1
    for job in range(4):
        state = load_checkpoint(folder / str(job) / "checkpoints" / "last.pt")
        assert state["counters"]["step"] == 2


# Real data.


@pytest.mark.skipif(not PINBALL.exists(), reason="the pinball set is not at hand")
def test_plain_hdf5_of_odd_size_with_solids(place: Path, run: Call) -> None:
    arrays = [f"dataset.path={PINBALL}", "dataset.u=u", "dataset.v=v", "dataset.invalid=obstacle_mask"]
    options = ["debug=fast", *SMALL, "trainer.max_steps=2", "trainer.batch_size=2", "name=pinball"]
    assert run("train", "dataset=hdf5", *arrays, *options)[::2] == (0, "")
    code, _, err = run("infer", "ckpt=outputs/train/pinball", "name=wake", "mask=pixels", *FEW)
    assert (code, err) == (0, "")
    with h5py.File(PINBALL) as file:
        solid = file["obstacle_mask"][()] == 1
    check_land(place / "outputs" / "infer" / "wake" / "fields.nc", solid)
    # The file itself as input: its arrays are found under the names of the training.
    code, out, err = run(
        "infer", "ckpt=outputs/train/pinball", "name=wake2", f"input={PINBALL}", "mask=swath", "time=3", *FEW
    )
    assert (code, err) == (0, "") and "N=400 fields 2x51x102" in out


@pytest.mark.skipif(not AGULHAS.exists(), reason="the Agulhas set is not at hand")
def test_netcdf_with_land(place: Path, run: Call) -> None:
    options = ["debug=fast", "trainer.score_cases=1", "trainer.max_steps=2", "trainer.batch_size=2", "name=agulhas"]
    code, out, err = run("train", "dataset=netcdf", f"dataset.path={AGULHAS}", *options)
    assert (code, err) == (0, "") and "augmentation: none" in out
    code, _, err = run("infer", "ckpt=outputs/train/agulhas", "name=current", "mask=track", *FEW)
    assert (code, err) == (0, "")
    with xr.open_dataset(AGULHAS) as source:
        land = np.isnan(source["u"].values).all(axis=0)
        check_land(place / "outputs" / "infer" / "current" / "fields.nc", land)
        with xr.open_dataset(place / "outputs" / "infer" / "current" / "fields.nc") as data:
            np.testing.assert_array_equal(data["lat"], source["lat"])
            assert data["time"].values[0] in source["time"].values


def check_land(path: Path, land: np.ndarray) -> None:
    """NaN on land, and there alone, in every float variable; nothing observed there."""
    assert 0 < land.sum() < land.size / 2
    with xr.open_dataset(path) as data:
        floats = [name for name, variable in data.data_vars.items() if variable.dtype.kind == "f"]
        assert len(floats) == 8
        for name in floats:
            missing = np.isnan(data[name].values)
            assert (missing == np.broadcast_to(land, missing.shape)).all(), name
        assert (data["valid"].values == ~land).all() and not data["observed"].values[:, land].any()


# What is bad. Files, in a folder of their own.


def native(path: Path, **changes: object) -> None:
    velocity = np.random.default_rng(0).standard_normal((30, 2, 16, 16))
    write_hdf5(path, **({"velocity": velocity} | changes))


def plain(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


@pytest.fixture(scope="module")
def bad(place: Path) -> Path:
    folder = place / "bad"
    folder.mkdir()
    native(folder / "good.h5")
    (folder / "truncated.h5").write_bytes((folder / "good.h5").read_bytes()[:9000])
    (folder / "text.h5").write_text("u,v\n1,2\n")
    (folder / "text.nc").write_text("u,v\n1,2\n")
    native(folder / "nan.h5", velocity=np.full((30, 2, 16, 16), np.nan))
    native(folder / "still.h5", velocity=np.full((30, 2, 16, 16), 2.0))
    native(folder / "dry.h5", valid=np.zeros((16, 16), dtype=bool))
    native(folder / "size.h5", velocity=np.random.default_rng(0).standard_normal((30, 2, 16, 12)))
    native(folder / "south.h5", dy=-1.0)
    native(folder / "few.h5", velocity=np.random.default_rng(0).standard_normal((2, 2, 16, 16)))
    plain(folder / "other.h5", speed=np.zeros((30, 16, 16)), u=np.zeros((30, 16, 16)), v=np.zeros((30, 16, 15)))
    plain(folder / "shape.h5", velocity=np.zeros((30, 16, 16, 3)))
    np.save(folder / "small.npy", np.ones((4, 4)))
    np.save(folder / "zeros.npy", np.zeros((16, 16)))
    np.save(folder / "ones.npy", np.ones((16, 16)))
    (folder / "text.npy").write_text("0 1 0")
    (folder / "empty").mkdir()
    return folder


TRAIN_FILES = [
    ("hdf5", "dataset.path=bad/missing.h5", ("no file 'bad/missing.h5'", "dataset.path=")),
    ("hdf5", "dataset.path=bad", ("that can be read here", "dataset.path=")),
    ("hdf5", "dataset.path=bad/truncated.h5", ("'bad/truncated.h5' is truncated",)),
    ("hdf5", "dataset.path=bad/text.h5", ("no file that can be read here", "dataset.path=")),
    ("netcdf", "dataset.path=bad/text.nc", ("no file that can be read here", "dataset.path=")),
    ("hdf5", "dataset.path=bad/other.h5", ("(30, 16, 16)", "(30, 16, 15)", "same points")),
    ("hdf5", "dataset.path=bad/other.h5 dataset.u=u dataset.v=v", ("(30, 16, 16)", "(30, 16, 15)", "dataset.v=")),
    ("hdf5", "dataset.path=bad/shape.h5", ("(30, 16, 16, 3)", "xpected")),
    ("hdf5", "dataset.path=bad/nan.h5", ("all values are NaN", "dataset.path=")),
    ("hdf5", "dataset.path=bad/still.h5", ("bad/still.h5: the", "training snapshots do not vary")),
    ("hdf5", "dataset.path=bad/dry.h5", ("no cell as valid", "dataset.valid=")),
    ("hdf5", "dataset.path=bad/few.h5", ("2 snapshots with a guard of 0 leave none",)),
    ("hdf5", "dataset.path=bad/good.h5 mask=file mask.path=bad/small.npy", ("(4, 4)", "(16, 16)")),
]


@pytest.mark.parametrize(("kind", "overrides", "parts"), TRAIN_FILES, ids=[case[1] for case in TRAIN_FILES])
def test_training_on_a_bad_file(
    place: Path, bad: Path, run: Call, kind: str, overrides: str, parts: tuple[str, ...]
) -> None:
    before = contents(bad)
    is_message(run("train", "debug=fast", *SMALL, "name=bad", f"dataset={kind}", *overrides.split(" ")), *parts)
    assert contents(bad) == before
    assert not (place / "outputs" / "train" / "bad" / "checkpoints" / "last.pt").exists()


INFER = [
    ("mask=bad/small.npy", ("mask 'bad/small.npy' has shape (4, 4), the field (16, 16)",)),
    ("mask=bad/zeros.npy", ("observes no valid cell", "mask=none")),
    ("mask=bad/ones.npy", ("nothing to fill", "mask=block")),
    ("mask=bad/text.npy", ("cannot read the mask 'bad/text.npy'",)),
    ("mask=bad/nothing.npy", ("no mask file 'bad/nothing.npy'", "mask=FILE")),
    ("mask=gaps", ("nothing to fill: every cell is observed",)),
    ("input=bad/good.h5", ("nothing to fill: every cell is observed",)),
    ("input=bad/missing.h5", ("no file 'bad/missing.h5'", "input=")),
    ("input=bad/missing.nc", ("no file 'bad/missing.nc'", "input=")),
    ("input=bad/text.nc", ("no file that can be read", "input=")),
    ("input=bad/truncated.h5", ("is truncated", "input=")),
    ("input=bad/nan.h5", ("all values are NaN", "input=")),
    ("input=bad/other.h5", ("two components on the same points", "input=", "names=[U,V]")),
    ("input=bad/size.h5", ("bad/size.h5 has fields of 16x12", "16x16", "window=")),
    ("input=bad/south.h5", ("rows of bad/south.h5 run the other way",)),
    ("time=99", ("time=99: there are 5 snapshots, 0 to 4",)),
    ("time=-6", ("time=-6: there are 5 snapshots, 0 to 4",)),
    ("time=[]", ("time=[]: there are 5 snapshots",)),
    ("members=0", ("members must be >= 1, got 0",)),
    ("batch=0", ("batch must be >= 1, got 0",)),
    ("seed=-1", ("seed must be >= 0, got -1",)),
    ("sigma_obs=-1", ("sigma_obs must be >= 0", "-1")),
    ("sampler.steps=0", ("sampler.steps", "must be >= 1, got 0")),
    ("physics=divergence physics.divergence=3", ("physics.divergence", "[0, 2]")),
    ("ckpt=bad/empty", ("bad/empty/checkpoints/last.pt: no checkpoint there",)),
    ("ckpt=bad/nothing.pt", ("bad/nothing.pt: no checkpoint there",)),
    ("ckpt=bad/good.h5", ("bad/good.h5: not a checkpoint that can be read",)),
]


@pytest.mark.parametrize(("overrides", "parts"), INFER, ids=[case[0] for case in INFER])
def test_inference_with_something_bad(
    place: Path, bad: Path, run: Call, overrides: str, parts: tuple[str, ...]
) -> None:
    ckpt = [] if overrides.startswith("ckpt") else ["ckpt=outputs/train/run"]
    is_message(run("infer", *ckpt, "name=bad", *FEW, *overrides.split(" ")), *parts)
    assert not (place / "outputs" / "infer" / "bad").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("program", ["train", "infer", "evaluate"])
def test_a_gpu_that_is_not_there(run: Call, program: str) -> None:
    more = [*TINY, *SMALL, "name=gpu"] if program == "train" else ["ckpt=outputs/train/run", "name=gpu"]
    is_message(run(program, "device=cuda", *more), "device=cuda: torch sees no GPU here")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("cases=0", ("cases must be >= 1, got 0",)),
        ("masks=[]", ("masks=[]", "such as masks=[block]")),
        ("masks=[auto]", ("masks=['auto']", "such as masks=[block]")),
        ("masks=[full]", ("there is no such option", "Options:")),
        ("masks=[gaps]", ("gaps hides no cell",)),
        ("masks=[blok]", ("Did you mean 'block'?",)),
        ("members=0", ("members must be >= 1",)),
    ],
)
def test_evaluation_with_something_bad(place: Path, run: Call, overrides: str, parts: tuple[str, ...]) -> None:
    is_message(run("evaluate", "ckpt=outputs/train/run", "name=bad", *FEW, *overrides.split(" ")), *parts)
    assert not (place / "outputs" / "evaluate" / "bad").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("seed=-1", ("seed must be >= 0",)),
        ("trainer.accumulate=3", ("trainer.accumulate", "batch_size")),
        ("trainer.max_steps=0", ("trainer.max_steps", ">= 1")),
        ("dataset.resolution=7", ("dataset.resolution", "even")),
        ("dataset.solver_resolution=8", ("dataset.solver_resolution", ">= resolution=16")),
        ("splits.train=2", ("train",)),
        ("splits.guard=40", ("48 snapshots with a guard of 40 leave none", "splits.guard=0")),
        ("augment.transforms=[flip]", ("transforms", "flip_x")),
        ("diffusion.sigma_max=0.001", ("diffusion.sigma_min", "below sigma_max=0.001")),
        ("model.channels=[]", ("channels",)),
        ("optimizer.lr=-1", ("optimizer", "learning rate")),
    ],
)
def test_training_with_something_bad(place: Path, run: Call, overrides: str, parts: tuple[str, ...]) -> None:
    is_message(run("train", *TINY, "trainer.score_cases=0", "name=odd", *overrides.split(" ")), *parts)
    assert not (place / "outputs" / "train" / "odd" / "checkpoints").exists()


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


def test_checkpoints_that_do_not_fit_or_do_harm(place: Path, bad: Path, run: Call) -> None:
    state = load_checkpoint(place / "outputs" / "train" / "run" / "checkpoints" / "last.pt")
    config = yaml.safe_load(state["config"])
    good = (place / "outputs" / "train" / "run" / "checkpoints" / "last.pt").read_bytes()
    harm = {"_target_": "os.system", "command": "touch pwned"}
    changed = {
        "width.pt": {**config, "model": {**config["model"], "channels": [8, 8]}},
        "model.pt": {**config, "model": harm},
        "dataset.pt": {**config, "dataset": harm},
        "gone.pt": {**config, "dataset": {"_target_": "vecfield_diffusion.data.hdf5.open_hdf5", "path": "gone.h5"}},
        "nested.pt": {**config, "model": {**config["model"], "channels": harm}},
    }
    for name, other in changed.items():
        save_checkpoint(bad / name, {**state, "config": yaml.safe_dump(other)})
    (bad / "cut.pt").write_bytes(good[: len(good) // 3])
    (bad / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"format": "vecfield-checkpoint", "version": 1, "config": Malicious()}, bad / "torch.pt")
    for name in (*changed, "cut.pt", "pickle.pt", "torch.pt"):
        is_message(run("infer", f"ckpt=bad/{name}", "name=bad", *FEW))
    is_message(run("evaluate", "ckpt=bad/dataset.pt", "name=bad"), "may name only")
    refused = "dataset.path=gone.h5: a checkpoint does not choose what is opened here"
    is_message(run("infer", "ckpt=bad/gone.pt", "name=bad"), refused, "infer.py also takes input=FILE")
    is_message(run("infer", "ckpt=bad/gone.pt", "data=gone.h5", "name=bad"), "no file 'gone.h5'")
    assert not (place / "pwned").exists() and not (place / "outputs" / "infer" / "bad").exists()


# The same endings as processes.


def test_a_message_of_a_process(place: Path, bad: Path) -> None:
    before = contents(place)
    is_message(process(place, "infer", "ckpt=bad/good.h5", "name=p"), "not a checkpoint that can be read")
    assert contents(place) == before and not (place / "outputs" / "infer" / "p").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "parts"),
    [
        ("evaluate", "", ("ckpt= is missing: python evaluate.py ckpt=",)),
        ("train", "name=../up", ("name=../up", "expected letters, digits")),
        ("infer", "ckpt=x sampler=hune", ("Did you mean 'heun'?",)),
    ],
)
def test_messages_that_need_no_data(tmp_path: Path, program: str, arguments: str, parts: tuple[str, ...]) -> None:
    is_message(process(tmp_path, program, *arguments.split()), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_file_stands_where_a_folder_should_be(place: Path, run: Call, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("mine")
    is_message(process(tmp_path, "train", *TINY), "the folder outputs/train/run cannot be made")
    assert (tmp_path / "outputs").read_text() == "mine"
    for name in ("checkpoints", "samples"):
        folder = place / "outputs" / "train" / f"blocked_{name}"
        folder.mkdir(parents=True)
        (folder / name).write_text("mine")
        is_message(run("train", *TINY, *SMALL, f"name=blocked_{name}"), f"blocked_{name}/{name} cannot be made")
        assert (folder / name).read_text() == "mine"


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a disk that fills."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_leaves_old_files(place: Path, run: Call) -> None:
    filled(place, run, "full")
    options = [*TINY, *SMALL, "name=full"]
    assert run("train", *options, "trainer.max_steps=2")[0] == 0
    folders = (place / "outputs" / "train" / "full" / "checkpoints", place / "outputs" / "infer" / "full")
    before = [contents(folder) for folder in folders]
    with limited(20_000):
        done = run("train", *options, "trainer.max_steps=4")
    is_message(done, "the checkpoint could not be written", "an older one is as it was")
    with limited(10_000):
        done = run("infer", "ckpt=outputs/train/run", "name=full", "members=8", "sampler.steps=2")
    is_message(done, "cannot write fields.nc")
    assert [contents(folder) for folder in folders] == before


def test_a_disk_that_fills_while_data_are_made(place: Path, run: Call) -> None:
    before = contents(place / "outputs" / "data")
    with limited(40_000):
        done = run("train", *TINY, "dataset.seed=1", "name=nodata")
    is_message(done, "cannot write")
    assert contents(place / "outputs" / "data") == before


@pytest.fixture(scope="module")
def basin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Snapshots of a closed basin."""
    path = tmp_path_factory.mktemp("basin") / "basin.h5"
    x = math.pi * (np.arange(16) + 0.5) / 16
    psi = np.random.default_rng(0).standard_normal((48, 3)) @ np.stack([np.sin(k * x) for k in (1, 2, 3)])
    with h5py.File(path, "w") as file:
        file.attrs.update(format="vecfield", version=1, dx=1e3, dy=1e3, boundary_x="wall", boundary_y="periodic")
        u, v = psi[:, None, :] * np.cos(2 * x)[:, None], psi[:, None, :] * np.sin(2 * x)[:, None]
        file["velocity"] = np.stack((u, v), axis=1).astype(np.float32)
    return str(path)


def test_walls_come_from_the_data(run: Call, basin: str) -> None:
    given = ["debug=fast", *SMALL, "splits.guard=0", "model.walls=mirror"]
    data = ["dataset=file", f"dataset.path={basin}"]
    code, _, err = run("train", *given, *data, "name=basin")
    assert code == 0, err
    code, _, err = run("infer", "ckpt=outputs/train/basin", "members=2", "sampler.steps=2", "mask=block")
    assert code == 0, err
    is_message(run("train", *given, "name=a", "dataset.snapshots=48", "dataset.resolution=16"), "boundary_x=periodic")
    is_message(run("train", *given, *data, "window=[8,8]", "name=a"), "model.walls=zero")
    turns = "model.equivariant=[turn]"
    is_message(run("train", *given, *data, turns, "model.channels=[6,8]", "name=a"), "model.channels", "equivariant=")
    is_message(run("train", *given, *data, "model.equivariant=[left]", "name=a"), "flip_x", "left")

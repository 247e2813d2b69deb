"""A run that begins with the weights of another, of the same frames or of snapshots."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from programs import SMALL, Call, is_message
from trajectories import frames_of, seen

from vecfield_diffusion import commands
from vecfield_diffusion.models.layers import TimeAttention
from vecfield_diffusion.programs.train import prepare
from vecfield_diffusion.programs.trained import load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """48 hours of a wave that travels, in noise."""
    path = tmp_path_factory.mktemp("start") / "waves.h5"
    angle = np.arange(16) * 2 * np.pi / 16 - 0.3 * np.arange(48)[:, None, None] + np.zeros((1, 16, 1))
    noise = 0.3 * np.random.default_rng(0).standard_normal((48, 2, 16, 16))
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "vecfield", "version": 1, "dx": 1000.0, "dy": 1000.0})
        file["velocity"] = (np.stack((np.sin(angle), np.cos(angle)), axis=1) + noise).astype(np.float32)
        file["time"] = np.arange(48)
        file["time"].attrs["units"] = "hours since 2024-01-01"
        file["x"], file["y"] = 1000.0 * np.arange(16), 1000.0 * np.arange(16)
    split = ["splits.train=0.5", "splits.validation=0.25", "splits.test=0.25", "splits.guard=0"]
    return [
        "dataset=file",
        f"dataset.path={path}",
        "debug=fast",
        *SMALL,
        "mean_field=true",
        "optimizer.lr=0.02",
        *split,
    ]


def series(data: list[str], *more: str) -> list[str]:
    return [*data, "dataset.frames=3", "model.time=attention", *more]


def test_before_any_step_each_frame_is_estimated_as_a_snapshot(run: Call, place: Path, data: list[str]) -> None:
    """With everything that is observed, and after a step no longer."""
    assert run("train", *data, "name=single")[0] == 0
    given = series(data, "start=outputs/train/single", "name=several")
    denoiser = prepare(commands.train.config(*given), Path("outputs/train/several")).denoiser.in_float32().eval()
    single = load_trained("outputs/train/single", CPU).denoiser.in_float32().eval()
    observation = seen(2, (3, 2, 16, 16))
    observation = observation.apply(lambda part: part.float() if part.is_floating_point() else part)
    z, s = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 5.0])
    with torch.no_grad():
        whole = denoiser(z, s, observation).flatten(0, 1)
        each = single(z.flatten(0, 1), s.repeat_interleave(3), frames_of(observation))
        fresh = prepare(commands.train.config(*given[:-2], "name=fresh"), Path("outputs/train/fresh")).denoiser
        assert (fresh.in_float32().eval()(z, s, observation).flatten(0, 1) - each).abs().max() > 1e-2
        torch.testing.assert_close(whole, each, atol=1e-5, rtol=0)
        for layer in denoiser.network.modules():
            if isinstance(layer, TimeAttention):
                for weight in layer.parameters():
                    weight += 1.0
        assert (denoiser(z, s, observation).flatten(0, 1) - each).abs().max() > 1e-3
    code, out, err = run("train", *given)
    assert code == 0 and "begins with the weights of outputs/train/single/checkpoints/" in out, err
    code, out, err = run("train", *given, "trainer.max_steps=12")  # goes on from its own state
    assert code == 0 and "going on from step 10" in out and "begins with" not in out, err


def test_of_the_same_frames_it_is_that_network(run: Call, place: Path, data: list[str]) -> None:
    """Snapshots and sequences, before any step."""
    assert run("train", *series(data), "name=of-three")[0] == 0
    for given, start in ((data, "single"), (series(data), "of-three")):
        network = prepare(commands.train.config(*given, f"start=outputs/train/{start}", "name=on"), Path("on"))
        ours = network.denoiser.network.state_dict()
        theirs = load_trained(f"outputs/train/{start}", CPU).denoiser.network.state_dict()
        assert theirs and all(ours[name].equal(value) for name, value in theirs.items())


def test_the_gaussian_field_is_learnt_anew(run: Call, place: Path, data: list[str]) -> None:
    gaussian = [part for part in data if not part.startswith("model.")]
    gaussian = [gaussian[0], "model=gaussian", *gaussian[1:], "model.channels=[8,8]", "model.embedding=16"]
    assert run("train", *gaussian, "name=gauss")[0] == 0
    given = series(gaussian, "start=outputs/train/gauss", "name=gausses")
    network = prepare(commands.train.config(*given), Path("outputs/train/gausses")).denoiser.network
    before = load_trained("outputs/train/gauss", CPU).denoiser.network
    ours, theirs = network.state_dict(), before.state_dict()
    shared = [name for name in theirs if name.startswith("network.")]
    assert shared and all(ours[name].equal(theirs[name]) for name in shared)
    assert type(network.field) is not type(before.field)


def test_what_does_not_fit_is_said(run: Call, data: list[str]) -> None:
    given = "start=outputs/train/single"
    is_message(run("train", *series(data, "start=outputs/train/nothing", "name=a")), "outputs/train/nothing")
    is_message(run("train", *data, "dataset.frames=3", given, "name=a"), given, "model.time=attention")
    is_message(run("train", *series(data, given, "name=a"), "model.embedding=8"), given, "size")
    is_message(run("train", *series(data, given, "diffusion=vp", "name=a")), given, "another diffusion=")
    is_message(run("train", *data, "start=outputs/train/of-three", "name=a"), "sequences of 3 frames")

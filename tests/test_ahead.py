"""Forecasts in an evaluation: what the methods see of the frames before, and the closed form of their law."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from programs import SMALL, Call, is_message
from test_series_baselines import prepared
from test_spacetime import H, W

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Ahead, Full, Pixels
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baselines import Persistence
from vecfield_diffusion.evaluation.series import ObservedSeries, TimeInterpolation
from vecfield_diffusion.evaluation.spacetime import Stationary
from vecfield_diffusion.guidance.physics import NoPhysics
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs import filling
from vecfield_diffusion.programs.ahead import earlier, foretellable, foretold, silent, view, views
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.in_time import AROUND, series_fill
from vecfield_diffusion.programs.series import Plan

RATE = 0.2


def ornstein_uhlenbeck() -> Stationary:
    """Waves that forget at one rate: given the last frame wholly, none before it says anything more."""
    y, x = np.meshgrid(np.fft.fftfreq(2 * H, 1 / (2 * H)), np.fft.fftfreq(2 * W, 1 / (2 * W)), indexing="ij")
    space = np.fft.ifft2(1 / (2 + x**2 + y**2) ** 1.5).real
    lags = np.zeros((60, 2, 2, 2 * H, 2 * W))
    lags[:, 0, 0] = lags[:, 1, 1] = 20 * np.exp(-RATE * np.arange(60))[:, None, None] * space
    mean = np.random.default_rng(7).standard_normal((2, H, W))
    return Stationary(lags, mean, np.ones((H, W), dtype=bool))


@pytest.mark.parametrize("ahead", [1, 3, 7])
def test_forecasts_are_those_of_an_ornstein_uhlenbeck_process(ahead: int) -> None:
    """Mean and variance in closed form; the last value is the last observed frame; each frame is foretold by itself."""
    prior = ornstein_uhlenbeck()
    truth = prior.mean + prior.draw(20, np.random.default_rng(1)).astype(np.float64)
    given = ObservedSeries(truth, np.zeros_like(truth), [11, 14, 19])
    cut = list(foretold([given], ahead, AROUND))
    assert all(np.isnan(one.y[-ahead:]).all() and np.isfinite(one.y[:-ahead]).all() for one in cut)
    law = series_fill(prepared(prior), cut)(slice(0, 3))
    fade, variance = np.exp(-RATE * ahead), prior.covariance.variance().numpy()
    for place, frame in enumerate(given.frames):
        want = prior.mean + fade * (truth[frame - ahead] - prior.mean)
        np.testing.assert_allclose(law.members[0, place], want, atol=1e-8)
        np.testing.assert_allclose(law.std[place].square(), (1 - fade**2) * variance, rtol=1e-7)
    held = TimeInterpolation(past=True).fit(truth, Grid(torch.ones(H, W, dtype=torch.bool)))
    last = series_fill(held, cut)(slice(0, 3)).members[0]
    np.testing.assert_array_equal(last, truth[np.array(given.frames) - ahead])


def test_the_beginning_of_a_series_has_nothing_before_it() -> None:
    truth = np.ones((4, 2, H, W))
    (one,) = foretold([ObservedSeries(truth, truth, [1])], 3, 5)
    assert np.isnan(one.y).all() and list(one.frames) == [1]
    (far,) = foretold([ObservedSeries(truth, truth, [3])], 1, 1)
    assert len(far.y) == 3 and list(far.frames) == [2]


def fields_of(hours: list[int]) -> Fields:
    values = np.arange(len(hours), dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.float32)
    time = np.datetime64("2024-01-01", "h") + np.array(hours)
    axes = {"x": np.arange(3.0), "y": np.arange(2.0)}
    grid = Grid(torch.ones(2, 3, dtype=torch.bool))
    return Fields(MemoryReader(values), len(hours), grid, **axes, source="hours", names=("u", "v"), time=time)


def test_which_snapshots_can_be_foretold_and_from_which() -> None:
    """Hour 3 is missing; a second run begins at hour 900."""
    fields = fields_of([0, 1, 2, 4, 5, 900, 901, 902])
    assert foretellable(fields, range(1, 8), 0) == range(1, 8)
    assert foretellable(fields, range(1, 8), 2) == [3, 4, 7]
    assert earlier(fields, [3, 4, 7, 5], 2).tolist() == [2, -1, 5, -1]
    field = np.full((2, 2, 3), 5.0)
    last = Persistence().fit(np.zeros((3, 2, 2, 3)), fields.grid).fill(field * np.nan, field[0] > 9, 0.0, field)
    np.testing.assert_array_equal(last, field)


@pytest.mark.parametrize(("ahead", "stride", "length"), [(1, 1, 4), (3, 1, 6), (3, 2, 5), (4, 2, 5)])
def test_sequences_of_a_forecast_end_at_the_case(ahead: int, stride: int, length: int) -> None:
    """As many frames as the network looks back lie before those that are foretold, and nothing after."""
    options = dict(frames=4, stride=stride, past=False, length=100, offered=range(20), ahead=ahead)
    (piece,) = Plan(fields_of(list(range(20))), **options).pieces([16])
    line = piece.snapshots[0].tolist()
    assert line == [16 - stride * back for back in range(length)][::-1]
    assert piece.snapshots[piece.kept].tolist() == [16]
    hidden = [number for number in line if number > 16 - ahead]
    assert len(line) - len(hidden) == 3


def test_blind_cases_keep_what_is_known() -> None:
    cases = make_cases(fields_of(list(range(6))), np.array([[0, 1, 2], [3, 4, -1]]), Full(), seed=0)
    ahead = cases.blind(torch.tensor([False, False, True]).view(-1, 1, 1, 1))
    assert ahead.observed[:, :2].equal(cases.observed[:, :2]) and not ahead.observed[:, 2].any()
    assert ahead.y[:, 2].isnan().all() and ahead.truth.nan_to_num(-1).equal(cases.truth.nan_to_num(-1))


@pytest.mark.parametrize(("ahead", "stride", "hidden"), [(0, 1, 0), (2, 1, 2), (3, 2, 2)])
def test_a_network_sees_nothing_of_what_is_foretold(
    monkeypatch: pytest.MonkeyPatch, ahead: int, stride: int, hidden: int
) -> None:
    """Of the last frames of a sequence, whatever the data hold there."""
    monkeypatch.setattr(filling, "absurd", lambda cases, trained: torch.zeros_like(cases.observed))
    fields, config = fields_of(list(range(12))), dict(members=2, seed=0, sigma_obs=0.1, hide=0.0, history="masked")
    normalizer = SimpleNamespace(normalizer=None)
    trained = SimpleNamespace(frames=3, stride=stride, grid=fields.grid, context=None, denoiser=normalizer)
    method = SimpleNamespace(sensor=None, physics=NoPhysics())
    given = config | {"time_context": "both"}, trained, fields, [11], Full(), method
    cases = Filling(*given, twin=True, ahead=ahead).known(np.arange(12 - 4 * stride, 12, stride)[None])
    seen = cases.observed.flatten(2).any(dim=2)[0].tolist()
    assert seen == [True] * (4 - hidden) + [False] * hidden
    assert (cases.y.isfinite() == cases.observed).all() and cases.truth.isfinite().all()


def test_masks_and_horizons_have_names() -> None:
    whole, seen = Ahead(3), Ahead(2, mask=Pixels(0.1))
    assert (view("ahead", whole, 0).name, view("ahead", whole, 0).ahead, view("ahead", whole, 0).whole) == (
        "ahead_3", 3, True,
    )  # fmt: skip
    assert view("ahead", whole, 6).name == "ahead_6" and not view("ahead", seen, 0).whole
    pixels = Pixels(0.1)
    assert (view("pixels", pixels, 0).name, view("pixels", pixels, 2).name) == ("pixels", "pixels_ahead_2")
    with pytest.raises(UserError, match="horizon=-1"):
        views({"horizon": -1, "masks": []})
    assert silent(["climatology", "persistence", "last_observed", "oi_spacetime"]) == {}
    assert set(silent(["oi", "linear_in_time", "dineof_spacetime", "regression"])) == {
        "oi", "linear_in_time", "dineof_spacetime",
    }  # fmt: skip


def wave(hour: int) -> np.ndarray:
    """`(2, 16, 16)`."""
    y, x = np.mgrid[:16, :16] * 2 * np.pi / 16
    angle = x - 0.3 * hour
    return np.stack((np.sin(angle) * np.cos(y), -np.cos(angle) * np.sin(y)))


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 hours of a wave that travels and noise that fades."""
    path = tmp_path_factory.mktemp("ahead") / "drifting.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "vecfield", "version": 1, "dx": 1000.0, "dy": 1000.0})
        field = np.stack([wave(hour) for hour in range(60)])
        file["velocity"] = (field + 0.1 * np.random.default_rng(0).standard_normal(field.shape)).astype(np.float32)
        file["time"] = np.arange(60)
        file["time"].attrs["units"] = "hours since 2024-01-01"
        file["x"], file["y"] = 1000.0 * np.arange(16), 1000.0 * np.arange(16)
    return path


def test_forecasts_are_scored_by_lead(run: Call, place: Path, drifting: Path) -> None:
    """Beside persistence and the Gaussian forecast, on the same cases at every lead; networks of snapshots are none."""
    data = ["dataset=file", f"dataset.path={drifting}", "debug=fast", *SMALL, "model.time=attention"]
    split = ["splits.train=0.5", "splits.validation=0.2", "splits.test=0.3", "splits.guard=0"]
    for name, frames in (("series", 3), ("single", 1)):
        code, _, err = run("train", *data, *split, f"dataset.frames={frames}", f"name=ahead-{name}")
        assert code == 0, err
    common = ["masks=[ahead,pixels]", "cases=4", "members=2", "sampler.steps=2"]
    common += ["baselines=[climatology,persistence,linear,last_observed,linear_in_time,oi_spacetime]"]
    runs = "ckpt=[outputs/train/ahead-series,outputs/train/ahead-single]"
    code, out, err = run("evaluate", runs, *common, "horizon=[1,4]", "name=ahead")
    assert code == 0, err
    for words in (
        "note: ahead-single is left out of forecasts",
        "linear is left out of forecasts",
        "it is last_observed",
    ):
        assert words in out, out
    table = pd.read_csv(place / "outputs/evaluate/ahead/scores.csv")
    assert set(table["mask"]) == {"ahead_1", "ahead_4", "pixels_ahead_1", "pixels_ahead_4"}
    rmse = table[(table["metric"] == "rmse_component") & (table["region"] == "hidden")].set_index(["mask", "method"])[
        "value"
    ]
    assert "ahead-single" not in set(table["method"])
    last, cell = rmse["ahead_4", "persistence (the last observed)"], rmse["ahead_4", "last value of the cell"]
    assert last == cell and rmse["ahead_1", "OI in space and time"] < rmse["ahead_4", "OI in space and time"] < last
    own = np.sqrt(np.square(wave(4) - wave(0)).mean() + 2 * 0.1**2)  # of a wave four hours old, and two errors
    assert abs(last / own - 1) < 0.02
    assert np.isfinite(rmse["pixels_ahead_4", "ahead-series"])
    assert (place / "outputs/evaluate/ahead/report.html").is_file()
    code, out, err = run("evaluate", "ckpt=outputs/train/ahead-series", *common, "horizon=0", "name=ahead-own")
    assert code == 0, err
    assert set(pd.read_csv(place / "outputs/evaluate/ahead-own/scores.csv")["mask"]) == {"ahead_1", "pixels"}
    is_message(
        run("evaluate", "ckpt=outputs/train/ahead-single", "masks=[ahead]", "cases=4"), "takes a network of sequences"
    )
    given = ("ckpt=outputs/train/ahead-series", "masks=[ahead]", "cases=4")
    is_message(run("evaluate", *given, "horizon=40"), "horizon=40: none of the 18 snapshots", "a shorter one")
    is_message(run("evaluate", *given, "horizon=[]"), "horizon=[]", "horizon=[1,3,6]")

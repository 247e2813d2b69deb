"""`ckpt=none`: series filled by the Gaussian field in space and time that they are drawn from."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from programs import Call, is_message

import vecfield_diffusion as vf
from vecfield_diffusion import commands
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.sequences import LAGS, Timeline, lengthened
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.estimation import SHAPES, Estimator, taper
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.plots import Moment, figure_animation
from vecfield_diffusion.evaluation.series import along_time
from vecfield_diffusion.evaluation.spacetime import Stationary
from vecfield_diffusion.evaluation.trial import pieces
from vecfield_diffusion.models.stationary import Values
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs import gaussian, pictures
from vecfield_diffusion.programs.gaussian import PLAIN, open_series

T, H, W = 60, 6, 7
DAY = np.timedelta64(1, "D")


def drawn(frames: int = T, seed: int = 0) -> np.ndarray:
    """Waves that forget, in an Ornstein-Uhlenbeck way, `(T, 2, H, W)`."""
    y, x = np.meshgrid(np.fft.fftfreq(2 * H, 1 / (2 * H)), np.fft.fftfreq(2 * W, 1 / (2 * W)), indexing="ij")
    power = 1 / (2 + x**2 + y**2) ** 1.5
    decay = np.exp(-0.15 * np.arange(30))[:, None, None] * (1 - np.arange(30) / 30)[:, None, None]
    lags = np.zeros((30, 2, 2, 2 * H, 2 * W))
    lags[:, 0, 0] = lags[:, 1, 1] = 20 * np.fft.ifft2(decay * power).real
    prior = Stationary(lags, np.zeros((2, H, W)), np.ones((H, W), dtype=bool))
    return prior.draw(frames, np.random.default_rng(seed)).astype(np.float64)


def series(frames: int = T, **changes: float) -> xr.Dataset:
    """A file with gaps: a corner that comes and goes, and a day without anything."""
    values = drawn(frames)
    rng = np.random.default_rng(1)
    for frame in range(frames):
        if rng.random() < 0.6:
            top, left = rng.integers(H - 2), rng.integers(W - 2)
            values[frame, :, top : top + 3, left : left + 3] = np.nan
    values[20:21] = np.nan
    dims, units = ("day", "lat", "lon"), {"units": "m s-1"}
    day = np.datetime64("2022-02-01", "ns") + np.arange(frames) * DAY
    return xr.Dataset(
        {
            "ueast": (dims, values[:, 0], units | {"standard_name": "eastward_sea_water_velocity"}),
            "vnorth": (dims, values[:, 1], units | {"standard_name": "northward_sea_water_velocity"}),
            "err": (dims, np.full((frames, H, W), 0.2), units),
        },
        {"day": day, "lat": np.arange(H) * 0.1 + 40, "lon": np.arange(W) * 0.1 + 5},
        {"title": "by hand"},
    )


def pair(data: xr.Dataset, ending: str = "") -> np.ndarray:
    """Both components, `(..., 2, H, W)`."""
    return np.stack([data[f"ueast{ending}"].values, data[f"vnorth{ending}"].values], axis=-3)


def config(**keywords: object) -> dict:
    return commands.infer.config("ckpt=none", *(f"{key}={value}" for key, value in keywords.items()))


def test_a_mask_that_is_told_to_goes_through_time() -> None:
    """It is drawn anew for each day otherwise, as a forecast's, which knows no other way, cannot be."""
    whole = series().fillna(0.1)

    def observed(**options: str) -> np.ndarray:
        return open_series(config(**options), source=whole).cases(range(T)).observed.numpy()

    anew, fixed = observed(mask="block"), observed(mask="block", **{"mask.time": "fixed"})
    assert (fixed == fixed[:1]).all() and not fixed.all() and not (anew == anew[:1]).all()
    ahead = observed(mask="ahead", **{"mask.horizon": "2"})
    assert ahead[:-2].all() and not ahead[-2:].any()


def test_zeros_are_land_or_gaps_as_is_said() -> None:
    still = series()
    for name in ("ueast", "vnorth"):
        still[name][:, 2, 3] = 0.0
    for zeros, cells in (("land", H * W - 1), ("gaps", H * W)):
        assert int(open_series(config(zeros=zeros), source=still).grid.valid.sum()) == cells


def fields_of(time: np.ndarray | None, runs: np.ndarray | None = None, n: int = 6) -> Fields:
    grid = Grid(torch.ones(2, 3, dtype=torch.bool))
    reader = MemoryReader(np.ones((n, 2, 2, 3), dtype=np.float32))
    return Fields(reader, n, grid, np.arange(3.0), np.arange(2.0), "here", ("u", "v"), time=time, runs=runs)


# What it fills.


def test_mean_and_spread_are_those_of_the_dense_posterior() -> None:
    """Members of the program, without the correction of the spread, against all values of all frames at once."""
    data, members = series(24), 400
    job = open_series(config(members=members, sigma_obs=0.2), source=data)
    observed, noise = job._observed()
    assert noise == pytest.approx(0.04) and np.isnan(observed[20]).all()
    prior = Estimator(lags=8, noise=noise).stationary(observed, np.ones((H, W), dtype=bool), "separable")
    everything = Values.where(torch.ones(observed.shape))
    dense, seen = prior.covariance.between(everything, everything).numpy(), np.isfinite(observed).ravel()
    gain = dense[:, seen] @ np.linalg.inv(dense[np.ix_(seen, seen)] + noise * np.eye(seen.sum()))
    anomaly = (observed - prior.mean).ravel()[seen]
    mean = (gain @ anomaly).reshape(observed.shape) + prior.mean
    variance = (np.diag(dense) - np.einsum("ij,ji->i", gain, dense[seen])).reshape(observed.shape)
    whole = Interpolation(prior, before=24, after=24, block=24)
    filled = whole.fill(observed, noise, members=members, with_variance=True)
    np.testing.assert_allclose(filled.mean, mean, atol=1e-9)
    np.testing.assert_allclose(filled.variance, variance, atol=1e-9)
    error = (filled.members.mean(axis=0) - mean) / np.sqrt(variance / members)
    assert 0.9 < np.square(error).mean() < 1.1 and np.abs(error).max() < 6
    assert 0.97 < (filled.members.var(axis=0, ddof=1) / variance).mean() < 1.03


def test_the_factor_of_the_spread_is_about_the_exact_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    data = series()
    once = vf.fill(data, members=3, seed=2)
    learn = gaussian.Series._learn
    monkeypatch.setattr(
        gaussian.Series, "_learn", lambda *given: (lambda how, factor, rows: (how, 2 * factor, rows))(*learn(*given))
    )
    twice = vf.fill(data, members=3, seed=2)
    mean = 2 * pair(once, "_members") - pair(twice, "_members")  # m + 2 f (x - m) and m + f (x - m)
    np.testing.assert_allclose(mean[0], mean[1], atol=1e-5)
    hidden = ~np.isfinite(pair(data))
    assert np.abs(pair(twice, "_members")[0] - pair(once, "_members")[0])[hidden].max() > 0.05


def test_a_dataset_is_filled_and_keeps_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    data = series()
    out = vf.fill(data, members=4, seed=1)
    printed = capsys.readouterr().out
    for words in ("60 times, 24 h apart", "field in space and time: ", "the gaps of other times", "linear in time"):
        assert words in printed
    assert out["ueast"].dims == ("day", "lat", "lon") and out.attrs["title"] == "by hand"
    assert out["ueast"].attrs["standard_name"] == "eastward_sea_water_velocity" and out.attrs["ckpt"] == "none"
    seen = np.isfinite(pair(data))
    for member in pair(out, "_members"):
        np.testing.assert_array_equal(member[seen], pair(data).astype(np.float32)[seen])
        assert np.isfinite(member).all()
    truth = drawn()
    error, climate = (pair(out) - truth)[~seen], truth[~seen].std()
    assert np.sqrt(np.square(error).mean()) < 0.6 * climate
    spread = np.stack([out["ueast_std"], out["vnorth_std"]], axis=1)[~seen]
    assert 0.7 < np.sqrt(np.square(spread).mean() / np.square(error).mean() * 5 / 4) < 1.4


def test_fill_values_that_nobody_declared_are_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    data = series()
    asked = {"members": 2, "time": "30:33"}
    filled, expected = vf.fill(data.fillna(-999.0), **asked), vf.fill(data, **asked)
    assert "321 values such as -999 m s-1 in 32 of 60 snapshots are left out" in capsys.readouterr().out
    np.testing.assert_array_equal(pair(filled, "_members"), pair(expected, "_members"))


def test_one_seed_gives_one_trajectory_whatever_is_filled_of_it() -> None:
    data = series()
    whole, part = vf.fill(data, members=2, seed=3), vf.fill(data, members=2, seed=3, time="20:30")
    np.testing.assert_allclose(pair(part, "_members"), pair(whole, "_members")[:, 20:30], atol=1e-6)
    more = vf.fill(data, members=3, seed=3, time="20:30")
    np.testing.assert_allclose(pair(more, "_members")[:2], pair(part, "_members"), atol=1e-6)
    other = vf.fill(data, members=2, seed=4, time="20:21")
    assert np.abs(pair(other, "_members") - pair(part, "_members")[:, :1]).max() > 0.1


def test_the_past_alone_knows_nothing_of_what_comes_later() -> None:
    data, other = series(), series()
    for name in ("ueast", "vnorth"):
        other[name][50:] = 3 - 2 * other[name][50:]
    keywords = {"members": 2, "time": "44:50", "sigma_obs": "err"}
    past = [pair(vf.fill(each, time_context="past", **keywords), "_members") for each in (data, other)]
    np.testing.assert_array_equal(*past)
    both = [pair(vf.fill(each, **keywords), "_members") for each in (data, other)]
    assert np.abs(both[0] - both[1]).max() > 0.01


def test_a_forecast_follows_the_last_time() -> None:
    data = series()
    out = vf.fill(data, members=100, horizon=3, time="-2:60")
    np.testing.assert_array_equal(out["day"].values[-4:], data["day"].values[-1] + np.arange(4) * DAY)
    spread = out["ueast_std"].mean(("lat", "lon")).values
    assert len(spread) == 5 and (np.diff(spread[-4:]) > 0).all()
    assert not out["observed"][-3:].any()


def test_errors_of_a_variable_and_hidden_values(tmp_path: Path) -> None:
    data = series()
    number = vf.fill(data, members=2, sigma_obs=0.2, time="0:4")
    variable = vf.fill(data, members=2, sigma_obs="err", time="0:4")
    np.testing.assert_allclose(pair(variable, "_members"), pair(number, "_members"), atol=1e-5)
    seen = np.isfinite(pair(data)[:4])
    assert np.abs(pair(number)[seen] - pair(data)[:4][seen]).max() > 0.01
    hidden = vf.fill(data, members=2, hide=0.3, time="0:4")
    assert np.isfinite(hidden["ueast_truth"]).any()
    mask = np.ones((H, W))
    mask[0] = 0
    masked = vf.fill(data, members=2, mask=mask, time="0:4")
    assert not masked["observed"][:, 0].any()


# The command.


def test_the_command_goes_on_where_it_was_stopped(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series().to_netcdf(tmp_path / "my.nc")
    given = ("ckpt=none", f"input={tmp_path / 'my.nc'}", "members=2", "hide=0.2", "seed=5")
    code, out, err = run("infer", *given, f"output={tmp_path / 'whole.nc'}")
    assert code == 0, err
    assert all(each in out for each in ("snapshot alone", "spread times", "hidden")), out
    scores = json.loads((tmp_path / "whole.json").read_text())
    assert scores["trial: space and time"]["rmse_component"] < scores["trial: linear in time"]["rmse_component"]
    assert scores["trial"]["spread_factor"] > 0 and scores["hidden"]["crps"] > 0
    assert (tmp_path / "whole.png").is_file()
    part, count = Interpolation._part, []

    def stopped(*arguments: object) -> object:
        wanted = arguments[-2]
        count.append(not wanted.any())
        if sum(count) > 5:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        return part(*arguments)

    monkeypatch.setattr(Interpolation, "_part", stopped)
    with pytest.raises(SystemExit, match=r"^130$"):
        run("infer", *given, f"output={tmp_path / 'parts.nc'}")
    monkeypatch.setattr(Interpolation, "_part", part)
    code, out, err = run("infer", *given, f"output={tmp_path / 'parts.nc'}")
    assert code == 0 and "going on: " in out, err
    with xr.open_dataset(tmp_path / "whole.nc") as whole, xr.open_dataset(tmp_path / "parts.nc") as parts:
        np.testing.assert_allclose(pair(parts, "_members"), pair(whole, "_members"), atol=1e-6)


def test_a_series_is_drawn_time_by_time(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values that were measured and the members that were written, forecast included."""
    given = series(16)
    given.to_netcdf(tmp_path / "my.nc")
    moments: dict[int, Moment] = {}

    def drawn(path: Path, moment: Callable[[int], Moment], count: int, *rest: object, **options: object) -> list[int]:
        moments.update({number: moment(number) for number in reversed(range(count))})
        return figure_animation(path, moment, count, *rest, **options)

    monkeypatch.setattr(pictures, "figure_animation", drawn)
    command = ("ckpt=none", f"input={tmp_path / 'my.nc'}", "members=3", "horizon=1", "figure=anim.gif")
    code, out, err = run("infer", *command, f"output={tmp_path / 'a.nc'}")
    assert code == 0 and "a.gif" in out, err
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 17
    with xr.open_dataset(tmp_path / "a.nc") as filled:
        members = np.moveaxis(np.stack([filled["ueast_members"], filled["vnorth_members"]]), 0, 2)
    assert moments[3].date == "2022-02-04" and moments[16].date == "2022-02-17"
    for number in (0, 3, 15):
        np.testing.assert_array_equal(moments[number].members, members[:, number])
        np.testing.assert_array_equal(moments[number].measured, pair(given)[number].astype(np.float32))
    assert np.isnan(moments[16].measured).all() and not (tmp_path / "a.png").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    is_message(run("infer", *command[:4], "figure=a.mp4", f"output={tmp_path / 'b.nc'}"), "figure=a.mp4", "a .gif")


def test_what_it_cannot_do_is_said(run: Call, tmp_path: Path) -> None:
    path = tmp_path / "my.nc"
    series(8).to_netcdf(path)
    given = ("ckpt=none", f"input={path}")
    is_message(run("infer", f"input={path}"), "ckpt= is missing", "ckpt=none input=my.nc")
    is_message(run("infer", "ckpt=none"), "ckpt=none learns from the file", "input=FILE")
    is_message(run("infer", *given, "physics=divergence"), "physics: takes a network")
    is_message(run("infer", *given, "sampler=heun", "calibrate=true"), "sampler, calibrate: takes a network")
    is_message(run("infer", *given, "inpainting=mmps"), "inpainting: takes a network")
    is_message(run("infer", *given, "guidance=autoguidance", "guidance.ckpt=x"), "guidance: takes a network")
    is_message(run("infer", *given, "horizon=-1"), "horizon must be >= 0, got -1")
    is_message(run("infer", *given, "mask=none"), "only 0 of its times measured anything")
    is_message(run("infer", "ckpt=outputs/train/run", "horizon=2"), "horizon=2", "Give ckpt=none, or a network")
    with pytest.raises(UserError, match="points in a table have no grid"):
        vf.fill("points.csv")


def test_defaults_are_what_is_left_out() -> None:
    """What counts as not asked for is what the configuration says when nothing is asked for."""
    found = config()
    assert {key: found[key] or {} if PLAIN[key] == {} else found[key] for key in PLAIN} == PLAIN


# Its parts.


def test_times_become_frames() -> None:
    day = np.datetime64("2020-01-01", "ns")
    line = Timeline.of(fields_of(day + np.array([0, 1, 2, 4, 5, 6]) * DAY))
    assert line.frames.tolist() == [0, 1, 2, 4, 5, 6] and "24 h apart, 1 missing" in line.words
    line = Timeline.of(fields_of(np.array([0.0, 1.0, 2.0, 3.0, 7.5, 8.5])))
    assert line.frames.tolist() == [0, 1, 2, 3, 5, 6] and line.lags == 2 and "cut into 2 runs" in line.words
    line = Timeline.of(fields_of(np.arange(6.0), runs=np.array([0, 0, 0, 1, 1, 1])))
    assert line.frames.tolist() == [0, 1, 2, 4, 5, 6] and "2 runs" in line.words
    assert Timeline.of(fields_of(None)).frames.tolist() == list(range(6))
    assert Timeline.of(fields_of(np.arange(600.0), n=600)).lags == LAGS
    jumps = np.cumsum(np.where(np.arange(300) % 2, 1.0, 1.3))
    jumps[:120] = np.arange(120)
    with pytest.raises(UserError, match=r"jump \d\d times in 300 snapshots, too often"):
        Timeline.of(fields_of(jumps, n=300))
    later = lengthened(fields_of(np.arange(6.0)), 2)
    assert (
        later.time.tolist() == list(range(8)) and torch.isnan(later.read([6, 7])).all() and (later.read([5]) == 1).all()
    )
    with pytest.raises(UserError, match="^horizon=1: here has no times"):
        lengthened(fields_of(None), 1)


def test_a_tenth_is_hidden_in_the_shape_of_the_gaps() -> None:
    valid = np.ones((H, W), dtype=bool)
    measured = np.isfinite(pair(series(200))).all(axis=1)
    hidden, words = pieces(measured, valid, 0)
    assert words == "the gaps of other times" and not (hidden & ~measured).any()
    assert 0.1 <= hidden.sum() / measured.sum() < 0.12
    lacking = {(~frame).tobytes() for frame in measured}
    for frame in np.flatnonzero(hidden.any(axis=(1, 2))):
        assert any(
            (np.frombuffer(gap, dtype=bool).reshape(H, W) & measured[frame] == hidden[frame]).all() for gap in lacking
        )
    whole, words = pieces(np.ones_like(measured), valid, 0)
    assert words == "blocks" and set(whole.sum(axis=(1, 2))) == {0, (H // 2) * (W // 2)}
    np.testing.assert_array_equal(hidden, pieces(measured, valid, 0)[0])


def test_interpolation_in_time_is_linear() -> None:
    known = np.full((6, 2, 1, 1), np.nan)
    known[1], known[4, 0] = 2.0, 8.0
    assert along_time(known, 2)[:, 0, 0].tolist() == [4.0, 2.0]
    assert along_time(known, 5)[:, 0, 0].tolist() == [8.0, 2.0] and along_time(known, 0)[1, 0, 0] == 2.0
    assert np.isnan(along_time(np.full((3, 2, 1, 1), np.nan), 1)).all()


def test_small_scales_are_not_made_rougher() -> None:
    """A smooth field: the structure function at the smallest distance is that of the field, gaps or none."""
    size, frames = 24, 400
    y = np.fft.fftfreq(2 * size, 1 / (2 * size))
    power = np.exp(-(y[:, None] ** 2 + y[None] ** 2) / 40)
    lags = np.zeros((2, 2, 2, 2 * size, 2 * size))
    lags[0, 0, 0] = lags[0, 1, 1] = np.fft.ifft2(power).real / np.fft.ifft2(power).real[0, 0]
    valid = np.ones((size, size), dtype=bool)
    values = Stationary(lags, np.zeros((2, size, size)), valid).draw(frames, np.random.default_rng(0)).astype(float)
    exact = 1 - lags[0, 0, 0, 0, 1]
    for missing in (0.0, 0.4):
        gone = np.random.default_rng(1).random((frames, 1, size, size)) < missing
        shown = np.where(gone, np.nan, values)
        for shape in SHAPES:
            found = Estimator(lags=2, nugget=0.0).stationary(shown, valid, shape).lags[0, 0, 0]
            assert 1 - found[0, 1] / found[0, 0] == pytest.approx(exact, rel=0.35)
    assert taper(valid, (True, True)).min() == 1

"""What is said of a file, on fields whose every number is known; and on the files of the data folder."""

from __future__ import annotations

import base64
import html
import math
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import ROOT, is_message

from vecfield_diffusion import commands
from vecfield_diffusion.config.overrides import Composer
from vecfield_diffusion.config.program import CONF
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.data.sequences import duration
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.inspection import (
    Inspection,
    inspect,
    largest_region,
)
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.parts import fullest_part, largest_rectangle
from vecfield_diffusion.programs import inspect as program
from vecfield_diffusion.programs.findings import doubts, outliers, physics, report
from vecfield_diffusion.programs.recipe import experiment_name, override, recipe, window_for

DATA = ROOT.parent / "shared" / "data"
FILES = {
    "arome_wind_norway/AROME_MetCoOp_00_DEF_20160202_subset.nc": [],
    "duacs_blacksea_1day/dt_blacksea_allsat_phy_l4_20160707_20200801.nc": [],
    "globcurrent_agulhas/globcurrent_agulhas_2002.nc": [],
    "maracoos_hfr_1hour/hfr_rtv_midatl_6km_oi_maracoos_2022_02_21_1200.nc": [],
    "ncep_storm_500hPa/ncep_storm_500hPa_199601.nc": [],
    "pinball_wake_dns/pinball_wake_re130.h5": ["invalid=obstacle_mask"],
}
H, W, N, PERIOD = 8, 16, 100, 20
DX = 1000.0


def wave(along: float, across: float, phase: float = 0.0) -> np.ndarray:
    """u = along sin(k x - w t), v = across sin(k x - w t + phase), `(N, 2, H, W)`: a wave that runs along x."""
    x, t = np.arange(W), np.arange(N)[:, None]
    angle = 2 * math.pi * (x / W - t / PERIOD)
    field = np.stack([along * np.sin(angle), across * np.sin(angle + phase)], axis=1)[:, :, None]
    return np.broadcast_to(field, (N, 2, H, W)).astype(np.float32)


def fields(velocity: np.ndarray, boundary: str = "periodic", valid: torch.Tensor | None = None, **options) -> Fields:
    """Fields in memory, a day apart."""
    n, _, height, width = velocity.shape
    valid = torch.ones(height, width, dtype=torch.bool) if valid is None else valid
    grid = Grid(valid, dx=options.pop("dx", DX), dy=DX, boundary_x=boundary, boundary_y=boundary)
    time = options.pop("time", np.datetime64("2020-01-01") + np.arange(n) * np.timedelta64(1, "D"))
    place = {"x": np.arange(width) * DX, "y": np.arange(height) * DX, "source": "my.nc", "names": ("u", "v")}
    return Fields(MemoryReader(velocity), n, grid, **place, time=time, **options)


def said(found: Inspection) -> str:
    return "\n".join(doubts(found))


def test_every_number_of_a_wave() -> None:
    """Along x the component u is a gradient and v a rotation: their energies are the shares, to rounding."""
    a, b = 0.2, 0.5
    found = inspect(fields(wave(a, b)))
    statistics, flow = found.statistics, found.flow
    assert statistics.std == pytest.approx(math.sqrt((a**2 + b**2) / 4), rel=1e-5)
    assert statistics.lambda_max == pytest.approx(H * W, rel=1e-5)  # two modes, a quarter period apart, share 2 H W
    assert statistics.sigma_max >= 10 * math.sqrt(H * W) > 0.9 * statistics.sigma_max
    assert flow.divergent == pytest.approx(a**2 / (a**2 + b**2), rel=1e-5)
    assert flow.rotational == pytest.approx(b**2 / (a**2 + b**2), rel=1e-5)
    assert flow.harmonic == pytest.approx(0.0, abs=1e-9)
    slope = math.sin(2 * math.pi / W) / DX / math.sqrt(2)  # of the central difference
    assert (flow.divergence, flow.vorticity) == (pytest.approx(a * slope, rel=1e-5), pytest.approx(b * slope, rel=1e-5))
    assert found.inside == flow and found.rectangle == (slice(0, H), slice(0, W))
    rho = np.cos(2 * math.pi * np.arange(N) / PERIOD)
    np.testing.assert_allclose(found.autocorrelation, rho, atol=1e-5)
    assert found.independent == pytest.approx(2.0, rel=1e-4)  # two modes
    assert statistics.divergent == pytest.approx(a / b, rel=1e-5) and found.leading == pytest.approx(0.5, rel=1e-5)
    assert found.guard == 5  # cos(4 pi / 10) = 0.31, cos(5 pi / 10) = 0
    assert (found.times.step, found.times.irregular) == ("1 day", 0)
    assert set(found.augmentation) == {"flip_x", "flip_y", "roll"}
    assert not found.gappy and found.values.zeros.sum() == (wave(a, b) == 0).all(axis=1).sum()


def test_speed_range_and_variance() -> None:
    """Components a quarter period apart turn a vector of constant length."""
    velocity = wave(0.4, 0.4, phase=math.pi / 2) + np.float32([0.1, 0.2])[:, None, None]
    found = inspect(fields(velocity, boundary="open"))
    speed = np.hypot(*velocity.astype(np.float64).swapaxes(0, 1))
    values = found.values
    assert (values.mean_speed, values.max_speed) == (pytest.approx(speed.mean()), pytest.approx(speed.max()))
    np.testing.assert_allclose(values.deviation, 0.4, rtol=1e-5)
    np.testing.assert_allclose(values.mean, np.broadcast_to(velocity.mean(axis=0), (2, H, W)), atol=1e-6)
    np.testing.assert_allclose(values.speed, np.sqrt((speed**2).mean(axis=(1, 2))), rtol=1e-6)
    assert tuple(values.low) == pytest.approx((-0.3, -0.2)) and tuple(values.high) == pytest.approx((0.5, 0.6))
    assert found.augmentation == ()


def test_gaps_are_counted() -> None:
    velocity = wave(0.1, 0.5).copy()
    velocity[3, 0, 2:4, 5:8] = np.nan  # one component is enough
    velocity[10:17, :, 0, 0] = np.nan
    velocity[12, :, 0, W - 1] = np.nan  # across the seam, one gap with the cell above
    velocity[40] = np.nan
    found = inspect(fields(velocity))
    missing = np.array(found.gaps.missing) * H * W
    expected = np.zeros(N)
    expected[3], expected[10:17], expected[12], expected[40] = 6, 1, 2, H * W
    np.testing.assert_allclose(missing, expected)
    assert (found.gaps.hole, found.gaps.hole_at, found.gaps.drought) == (H * W, 40, 7)
    assert found.values.counts[0, 0] == N - 8 and found.values.counts[7, 7] == N - 1
    assert np.isnan(found.values.speed[40]) and "nothing is measured in snapshot 40" in said(found)
    assert found.flow.divergent == pytest.approx(0.01 / 0.26, rel=1e-4)  # of complete snapshots


def test_gaps_everywhere_are_filled_and_named() -> None:
    velocity = wave(0.1, 0.5).copy()
    velocity[:, :, 2, 3] = np.where(np.arange(N) % 2, np.nan, 0.1)[:, None]
    velocity[:, :, 4, 3] = np.where(np.arange(N) % 2, 0.1, np.nan)[:, None]
    text = report(inspect(fields(velocity)))
    assert "gaps filled smoothly" in text and "0.8% / 0.8% / 0.8%" in text


def test_regions_join_over_periodic_seams() -> None:
    cells = np.zeros((5, 6), dtype=bool)
    cells[1, [0, 1, 5]] = cells[4, 2] = cells[0, 2] = True
    assert [largest_region(cells, periodic) for periodic in ((False, False), (False, True), (True, False))] == [2, 3, 2]
    assert largest_region(np.zeros_like(cells), (True, True)) == 0
    assert largest_region(np.eye(4, dtype=bool), (False, False)) == 1  # corners do not join


def test_the_largest_rectangle_is_that_of_a_search() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        cells = generator.random((6, 7)) < 0.7
        rows, columns = largest_rectangle(cells)
        best = max(
            (bottom - top) * (right - left)
            for top in range(6)
            for bottom in range(top, 7)
            for left in range(7)
            for right in range(left, 8)
            if cells[top:bottom, left:right].all()
        )
        assert cells[rows, columns].all() and cells[rows, columns].size == best


def test_flow_through_the_edge_of_the_data_is_no_divergence_inside() -> None:
    """A shear flow has no divergence; where it meets an edge that is closed, the edge makes one."""
    valid = torch.ones(H, W, dtype=torch.bool)
    valid[:, 4:] = False
    velocity = np.zeros((N, 2, H, W), dtype=np.float32)
    velocity[:, 0] = np.sin(np.arange(H) + np.arange(N)[:, None])[:, :, None]
    found = inspect(fields(velocity, boundary="open", valid=valid))
    assert found.rectangle == (slice(0, H), slice(0, 4))
    assert found.inside.divergent == pytest.approx(0.0, abs=1e-9) and found.flow.divergent > 0.1
    assert "crosses the edge of the valid cells" in said(found)
    assert "physics=divergence" in physics(found)


def changed(velocity: np.ndarray, place: tuple, value: float) -> np.ndarray:
    velocity = velocity.copy()
    velocity[place] = value
    return velocity


DAYS = np.datetime64("2020-01-01") + np.arange(N) * np.timedelta64(1, "D")
SPEEDS = wave(0.2, 0.5)
LATE = SPEEDS * np.where(np.arange(N) >= 90, 5, 1)[:, None, None, None].astype(np.float32)


@pytest.mark.parametrize(
    ("velocity", "options", "doubt"),
    [
        (SPEEDS, {"units": "cm/s"}, "the velocity is in 'cm/s'"),
        (100 * SPEEDS, {"names": ("uo", "vo")}, "speeds up to 53.9 m s-1"),
        (changed(SPEEDS, (5, 0, 1, 1), 999.0), {}, "1 values such as 999 m s-1 in 1 of 100 snapshots are left out"),
        (changed(changed(SPEEDS, (5, 0, 1, 1), 8.0), (6, 0, 1, 1), 3.0), {}, "21 times the RMS of"),
        (SPEEDS[:, ::-1], {}, "divergence is 2.50 of the vorticity"),
        (
            LATE,
            {},
            "the test snapshots are unlike those of training: their RMS about its mean is 1.36 m s-1, 5.1",
        ),
        (SPEEDS, {}, "the test snapshots, 9, are worth 2 independent fields, too few to tell"),
        (changed(SPEEDS, (slice(None), slice(None), 3, slice(2, 6)), 0.0), {}, "4 valid cells are 0 in every snapshot"),
        (changed(SPEEDS, 7, SPEEDS[6]), {}, "snapshot 7: a copy of the one before"),
        (changed(SPEEDS, 30, 1.0), {}, "the RMS speed of snapshot 30 stands out"),
        (SPEEDS, {"time": np.delete(np.append(DAYS, DAYS[-1] + 1), 50)}, "1 of 99 steps are not 1 day"),
        (SPEEDS, {"time": np.concatenate([DAYS[:50], DAYS[49:-1]])}, "1 times stand twice in a row and 0 run backward"),
        (SPEEDS, {"dx": 3 * DX}, "cells are 3 times as wide as high"),
        (SPEEDS, {}, "the correlation comes back to 1.00 at lag 20"),
        (SPEEDS[:60], {}, "60 snapshots are few"),
        (SPEEDS[:1], {}, "one snapshot"),
        (SPEEDS[:9], {}, "the correlation is still 0.77 after a tenth of the snapshots, 0"),
        (SPEEDS[:3], {}, "3 snapshots with a guard of 0 leave none for validation"),
        (SPEEDS[:30], {}, "the correlation is still 0.58 after a tenth of the snapshots, 3"),
    ],
)
def test_doubts(velocity: np.ndarray, options: dict, doubt: str) -> None:
    data = fields(velocity, **options) if "names" not in options else fields(velocity)
    if "names" in options:
        object.__setattr__(data, "names", options["names"])
    assert doubt in report(inspect(data))


def solenoidal(n: int) -> np.ndarray:
    """Independent fields of a random stream function, periodic, without divergence in central differences."""
    psi = np.random.default_rng(0).standard_normal((n, H, W))
    u = -(np.roll(psi, -1, 1) - np.roll(psi, 1, 1))
    v = np.roll(psi, -1, 2) - np.roll(psi, 1, 2)
    return np.stack([u, v], axis=1).astype(np.float32)


def test_sound_data_leave_no_doubts() -> None:
    """Independent fields without divergence: no correlation, no guard, nothing odd."""
    found = inspect(fields(solenoidal(200)))
    assert (said(found), found.guard) == ("", 0) and set(found.split) == {"train", "validation", "test"}
    assert "no guard between the splits" in report(found) and report(found).endswith("doubts\n  none")
    assert found.independent == pytest.approx(199, rel=0.02)  # one is lost to the mean
    assert "physics=divergence" in physics(found)


def test_noise_is_a_doubt() -> None:
    """Errors that are independent from cell to cell have as much divergence as vorticity."""
    found = inspect(fields(np.random.default_rng(0).standard_normal((200, 2, H, W), dtype=np.float32)))
    assert found.statistics.divergent == pytest.approx(1.0, abs=0.02)
    assert "of the vorticity, of white noise it is 1" in said(found) and physics(found).startswith("none")


def test_a_large_domain_is_measured_in_its_fullest_part() -> None:
    valid = np.zeros((40, 50), dtype=bool)
    valid[10:30, 20:45] = True
    valid[:5, :5] = True
    rows, columns = fullest_part(valid, 16)
    assert valid[rows, columns].all() and valid[rows, columns].shape == (16, 16)
    assert fullest_part(valid, 64) == (slice(0, 40), slice(0, 50))
    generator = np.random.default_rng(0)
    for _ in range(5):
        cells = generator.random((9, 12)) < 0.5
        best = max(cells[i : i + 4, j : j + 4].sum() for i in range(6) for j in range(9))
        assert cells[fullest_part(cells, 4)].sum() == best


def noisy(shape: tuple[int, int], n: int = 100, boundary: str = "open") -> Inspection:
    velocity = np.random.default_rng(0).standard_normal((n, 2, *shape), dtype=np.float32)
    return inspect(fields(velocity, boundary=boundary))


@pytest.mark.parametrize(
    ("found", "window"),
    [
        (noisy((41, 81)), [32, 48]),  # few, and room
        (noisy((33, 36)), None),  # no room
        (noisy((41, 81), boundary="periodic"), None),  # waves
        (inspect(fields(np.repeat(np.repeat(wave(0.2, 0.5), 6, 2), 3, 3), boundary="open")), None),  # one piece
        (noisy((24, 800), n=20), [16, 48]),  # too large
    ],
)
def test_a_set_that_trains_whole_gets_no_window(found: Inspection, window: list[int] | None) -> None:
    assert window_for(found) == window
    assert ("window" in recipe(found, "mine", {"path": "my.nc"}).settings) == (window is not None)


def test_outliers_stand_out_from_both_neighbours() -> None:
    smooth = 1 + 0.5 * np.sin(np.arange(100) / 5)
    assert outliers(smooth.tolist()).size == 0
    smooth[[20, 70]] += [1.0, -0.4]
    smooth[40] = np.nan
    assert outliers(smooth.tolist()).tolist() == [20, 70]


def test_words() -> None:
    assert [duration(s) for s in (86400.0, 21600.0, 90.0, 5.0)] == ["1 day", "6 hours", "1.5 minutes", "5 s"]
    assert [experiment_name(p) for p in ("a/b.c=d.nc", "data/*.nc", "x y.h5")] == ["b_c_d", "data", "x_y"]


@pytest.mark.parametrize("path", ["my.nc", "a b/it's (1),x=2.nc", 'data/"q\\"\\*.nc'])
def test_the_recipe_works_as_pasted(tmp_path: Path, path: str) -> None:
    """The file and the command compose to one configuration, with the path whatever it is called."""
    found = inspect(fields(wave(0.2, 0.5)))
    assert recipe(found, "mine", {}).options == {"dataset": "file", "model": "gaussian"}
    given = {"path": path, "u": "uo", "context": ["depth", "season"], "dx": 2.5}
    plan = recipe(found, "mine", given)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(plan.yaml())
    composer = Composer(CONF, "train", str(tmp_path))
    pasted = commands.train._check(composer.compose(["experiment=mine"]), composer, True)
    command = shlex.split(plan.command())
    assert command[:2] == ["python", "train.py"]
    typed = commands.train.config(*command[2:])
    assert pasted == typed
    assert {key: typed["dataset"][key] for key in given} == given
    assert (typed["splits"]["guard"], typed["name"]) == (5, "mine")


def test_a_series_is_trained_on_as_sequences() -> None:
    """Long ones where snapshots four apart resemble each other, short ones where the next alone does; else none."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((300, 2, H, W), dtype=np.float32)

    def fading(share: float) -> Inspection:
        series = [noise[0]]
        for now in noise[1:]:
            series.append(share * series[-1] + np.float32(math.sqrt(1 - share**2)) * now)
        return inspect(fields(np.stack(series)))

    for share, frames in ((0.9, 9), (0.4, 5), (0.0, 1)):
        found = fading(share)
        plan, text = recipe(found, "mine", {"path": "my.nc"}), report(found)
        assert plan.settings["dataset"].get("frames", 1) == frames
        assert (f"dataset.frames={frames}" in plan.command()) == (frames > 1) and "dropout" not in plan.yaml()
        assert plan.options["model"] == "gaussian" and f"{found.following:.2f} from one snapshot to the next" in text
        assert ("infer.py ckpt=none" in text) == (frames > 1)
    own = recipe(fading(0.9), "mine", {"path": "my.nc", "frames": 3})
    assert own.settings["dataset"]["frames"] == 3
    assert recipe(inspect(fields(wave(0.2, 0.5)[:12])), "mine", {}).settings.get("dataset", {}).get("frames", 1) == 1


def test_overrides_keep_plain_words_plain() -> None:
    assert override("a.b", "x/y-1.nc") == "a.b=x/y-1.nc" and override("a", 3) == "a=3"


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "inspect_data.py"), run_name="__main__")
    return end.value.code


def test_the_guard_says_the_correlation_that_it_is() -> None:
    """A drift is still correlated where the longest guard ends; a wave is not."""
    drift = np.linspace(0, 1, N)[:, None, None, None] * np.ones((1, 2, H, W), dtype=np.float32)
    found = inspect(fields(drift.astype(np.float32), boundary="open"))
    rho = float(found.autocorrelation[10])
    assert (
        f"guard: 10              # snapshots; the correlation is still {rho:.2f} there" in recipe(found, "a", {}).yaml()
    )
    assert f"{rho:.2f} after a guard of 10 snapshots, the longest" in report(found)
    plan = recipe(inspect(fields(wave(0.2, 0.5))), "a", {})
    assert "guard: 5               # snapshots; the correlation is 0.00 there" in plan.yaml()


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("file", FILES)
def test_the_files_of_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"the data folder {DATA.name} is not beside the repository")
    assert call(monkeypatch, tmp_path, str(DATA / file), *FILES[file]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "outputs" / "inspect" / Path(file).stem
    assert (folder / "figure.png").stat().st_size > 20_000
    assert "doubts" in out and ("to train" in out) == (folder / "experiment" / f"{folder.name}.yaml").exists()


def test_the_command_trains_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands compose to one configuration, in the folder where they were printed."""
    write_hdf5(tmp_path / "a.h5", solenoidal(100), dx=DX, dy=DX, boundary_x="periodic", boundary_y="periodic")
    assert call(monkeypatch, tmp_path, "a.h5", "history=[1]") == 0
    out = capsys.readouterr().out
    file = tmp_path / "outputs" / "inspect" / "a" / "experiment" / "a.yaml"
    assert f"or by the file {file.relative_to(tmp_path)}" in out and file.exists()
    commands_ = [shlex.split(line) for line in out.splitlines() if line.startswith("  python train.py")]
    assert commands_[1] == ["python", "train.py", "--config-dir", "outputs/inspect/a", "experiment=a"]
    typed = commands.train.config(*commands_[0][2:])
    composer = Composer(CONF, "train", commands_[1][3])
    assert commands.train._check(composer.compose(commands_[1][4:]), composer, True) == typed
    assert typed["dataset"]["path"] == "a.h5" and typed["dataset"]["history"] == [1]


def test_one_map_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No experiment, and commands that a set of one snapshot can be filled by."""
    (tmp_path / "sub").mkdir()
    write_hdf5(tmp_path / "sub" / "a.h5", SPEEDS[:1])
    assert call(monkeypatch, tmp_path, "sub/a.h5") == 0
    out = capsys.readouterr().out
    assert "nothing can be trained on it alone" in out and "to train" not in out
    train, infer, other = (shlex.split(line) for line in out.splitlines() if line.startswith("  python"))
    config = commands.train.config(*train[2:])
    assert config["window"] == (32, 32) and config["dataset"]["_target_"].endswith("open_turbulence")
    filled = commands.infer.config(*infer[2:])
    assert filled["hide"] == 0.2  # without gaps that are known to be gaps, there is nothing else to fill
    assert filled["input"] == "sub/a.h5" and filled["ckpt"] == f"outputs/train/{config['name']}"
    assert other == ["python", "scripts/inspect_data.py", "sub/*.h5"]
    assert not (tmp_path / "outputs" / "inspect" / "a" / "experiment").exists()


def test_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what the object is printed as; its HTML holds all of it, and the picture."""
    write_hdf5(tmp_path / "a.h5", solenoidal(100), dx=DX, dy=DX, boundary_x="periodic", boundary_y="periodic")
    assert call(monkeypatch, tmp_path, "a.h5") == 0
    found = program.inspect("a.h5")
    assert capsys.readouterr().out.startswith(repr(found) + "\n") and found.text() == repr(found)
    page = found.to_html()
    assert html.escape(found.text()) in page and found._repr_html_() == page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    figure = (tmp_path / "outputs" / "inspect" / "a" / "figure.png").read_bytes()
    assert base64.b64decode(data) == figure and 'src="http' not in page
    assert found.recipe is not None and found.found.statistics.solenoidal
    with pytest.raises(UserError, match="b.h5"):
        program.inspect("b.h5")


def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hdf5(tmp_path / "a.h5", wave(0.2, 0.5))
    write_hdf5(tmp_path / "still.h5", np.ones((20, 2, H, W), dtype=np.float32))
    for arguments, parts in (
        (["b.h5"], ["b.h5", "Did you mean"]),
        (["a.h5", "uu=x"], ["unknown key dataset.uu", "Did you mean"]),
        (["a.h5", "dx=wide"], ["dataset.dx=wide: expected a number"]),
        (["a.h5", "u=x", "v=y"], ["dataset.u=x"]),
        (["u=x", "a.h5"], ["the file comes first"]),
        (["still.h5"], ["do not vary"]),
    ):
        is_message((call(monkeypatch, tmp_path, *arguments), *capsys.readouterr()), *parts)


def test_a_global_map_gives_no_warning_and_is_measured_in_a_part() -> None:
    """720x1440 cells with ragged land: what costs more than reading is measured in 128x128 cells at most."""
    generator = np.random.default_rng(0)
    valid = torch.nn.functional.interpolate(
        torch.from_numpy(generator.random((1, 1, 90, 180))), size=(720, 1440), mode="bilinear"
    )[0, 0]
    velocity = generator.standard_normal((1, 2, 720, 1440), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = inspect(fields(velocity, boundary="open", valid=valid > 0.4))
    assert [part.stop - part.start for part in found.part] == [128, 128]
    for inner, outer in zip(found.rectangle, found.part, strict=True):
        assert outer.start <= inner.start < inner.stop <= outer.stop
    assert found.fields.grid.valid[found.rectangle].all()
    assert f"in rows {found.part[0].start}-{found.part[0].stop - 1}" in report(found)

"""The turbulence solver against exact solutions of the Navier-Stokes equations, its twin, and the files they make."""

import hashlib
import json
import math
import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from vecfield_diffusion.data import turbulence
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Runs, Sequences
from vecfield_diffusion.data.turbulence import Turbulence, coarsen, generator, open_turbulence
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.spectra import spectra


def spectral(solver, function):
    """The spectral vorticity of a function of (x, y) on the square of side 2 pi, in float64."""
    axis = torch.arange(solver.resolution, dtype=torch.float64) * 2 * math.pi / solver.resolution
    return torch.fft.rfft2(function(axis[None, :], axis[:, None]))[None]


def test_velocity_of_a_known_vorticity():
    """w = cos(3 x) cos(2 y) has psi = -w / 13, u = -psi_y, v = psi_x: an axis swap or a sign would show."""
    solver = Turbulence(32)
    axis = torch.arange(32, dtype=torch.float64) * 2 * math.pi / 32
    x, y = axis[None, :], axis[:, None]
    u, v = solver.velocity(spectral(solver, lambda x, y: torch.cos(3 * x) * torch.cos(2 * y)))[0]
    torch.testing.assert_close(u, -2 / 13 * torch.cos(3 * x) * torch.sin(2 * y))
    torch.testing.assert_close(v, 3 / 13 * torch.sin(3 * x) * torch.cos(2 * y))


def test_advection_of_a_known_vorticity():
    """-u . grad w, by hand, for w = cos x + cos 2 y: psi = -cos x - cos 2 y / 4, so -(sin x)(2 sin 2 y)(1 - 1/4) ..."""
    solver = Turbulence(32)
    axis = torch.arange(32, dtype=torch.float64) * 2 * math.pi / 32
    x, y = axis[None, :], axis[:, None]
    w = spectral(solver, lambda x, y: torch.cos(x) + torch.cos(2 * y))
    u = -torch.sin(2 * y) / 2
    v = torch.sin(x)
    expected = -(u * -torch.sin(x) + v * -2 * torch.sin(2 * y))
    torch.testing.assert_close(torch.fft.irfft2(solver.advection(w))[0], expected.expand(32, 32))


def test_taylor_green_vortices_decay_exactly():
    """One shell of wavenumbers advects nothing: w decays as exp(-nu k^(2 p) t)."""
    solver = Turbulence(32, viscosity=0.01, order=2)
    w = spectral(solver, lambda x, y: torch.cos(3 * x) + torch.sin(3 * y))
    torch.testing.assert_close(solver.decay(w, time=0.5, steps=7), w * math.exp(-0.01 * 81 * 0.5), rtol=1e-9, atol=1e-9)


def test_time_stepping_is_of_fourth_order():
    solver = Turbulence(32, k_peak=4.0, viscosity=1e-4, order=1)
    w = solver.start([generator(0, 0)]).to(torch.complex128)
    ends = [solver.decay(w, time=0.5, steps=n) for n in (20, 40, 320)]
    errors = [(end - ends[-1]).abs().max().item() for end in ends[:2]]
    assert 3.7 < math.log2(errors[0] / errors[1]) < 4.3


def test_energy_and_enstrophy_are_kept_without_viscosity():
    solver = Turbulence(32, k_peak=4.0, viscosity=0.0)
    w = solver.start([generator(0, 1)]).to(torch.complex128)
    end = solver.decay(w, time=1.0, steps=200)
    for quantity in (lambda w: solver.velocity(w).square().sum(), lambda w: torch.fft.irfft2(w).square().sum()):
        assert quantity(end).item() == pytest.approx(quantity(w).item(), rel=1e-6)


def test_coarse_fields_keep_the_long_waves_and_stay_divergence_free():
    axis = torch.arange(32, dtype=torch.float64) * 2 * math.pi / 32
    wave = torch.cos(3 * axis[None, :] + 5 * axis[:, None] + 0.3)
    short = torch.cos(9 * axis[None, :] + 0 * axis[:, None])
    fine = torch.stack([wave + short, 2 * wave])[None]
    torch.testing.assert_close(coarsen(fine, 16)[0, 0], wave[::2, ::2])
    torch.testing.assert_close(coarsen(fine, 16)[0, 1], 2 * wave[::2, ::2])
    assert coarsen(fine, 32) is fine
    velocity = coarsen(Turbulence(32, k_peak=4.0).velocity(Turbulence(32, k_peak=4.0).start([generator(0, 0)])), 16)
    ky, kx = Turbulence(16).wavenumbers()
    spectrum = torch.fft.rfft2(velocity)
    assert (kx * spectrum[:, 0] + ky * spectrum[:, 1]).abs().max() < 1e-3 * spectrum.abs().max()


def test_decayed_flows_have_coherent_vortices():
    """The kurtosis of the vorticity, 3 for random phases, rises well above it."""
    solver = Turbulence(64)
    w = solver.start([generator(3, i) for i in range(6)])

    def kurtosis(w):
        field = torch.fft.irfft2(w)
        return (field**4).mean().item() / field.square().mean().item() ** 2

    assert kurtosis(w) == pytest.approx(3, abs=0.3)
    assert kurtosis(solver.decay(w)) > 5


QUICK = dict(resolution=16, solver_resolution=32, viscosity=1e-6, order=2, duration=5.0)


def test_file_is_made_once_and_a_flow_depends_on_its_seed_alone(tmp_path):
    first = open_turbulence(snapshots=9, folder=str(tmp_path), **QUICK)
    stamp = first.source
    more = open_turbulence(snapshots=10, folder=str(tmp_path), **QUICK)
    torch.testing.assert_close(first.read(range(9)), more.read(range(9)), rtol=1e-5, atol=1e-6)
    other = open_turbulence(snapshots=9, folder=str(tmp_path), **{**QUICK, "seed": 1})
    assert not torch.allclose(first.read([0]), other.read([0]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert open_turbulence(snapshots=9, folder=str(tmp_path), **QUICK).source == stamp
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_file_says_what_it_holds(tmp_path):
    fields = open_turbulence(snapshots=3, folder=str(tmp_path), side=160e3, **QUICK)
    assert fields.grid.periodic == (True, True) and fields.grid.dx[0].item() == pytest.approx(10e3)
    assert fields.x[0] == pytest.approx(5e3) and fields.units == "m s-1" and bool(fields.grid.valid.all())
    ky, kx = Turbulence(16).wavenumbers()
    spectrum = torch.fft.rfft2(fields.read(range(3)))
    assert (kx * spectrum[:, 0] + ky * spectrum[:, 1]).abs().max() < 1e-5 * spectrum.abs().max()
    with h5py.File(fields.source) as file:
        assert file.attrs["licence"] == "CC0-1.0" and '"seed": 0' in file.attrs["source"]


# The Gaussian twin.


def test_vorticity_undoes_velocity():
    solver = Turbulence(16)
    w = solver.start([generator(0, 0)]).to(torch.complex128)
    torch.testing.assert_close(solver.vorticity(solver.velocity(w)), w)


def test_covariance_of_the_twin_is_that_of_all_shifts_of_the_flows():
    """The twin is linear in white noise: the matrix of that map times its transpose, against pairs of values."""
    solver = Turbulence(8, k_peak=2.0)
    w = solver.start([generator(0, i) for i in range(5)]).to(torch.complex128)
    flows = solver.velocity(w)
    power = solver.vorticity(flows).abs().square().mean(dim=0)
    unit = torch.eye(64, dtype=torch.float64).view(64, 8, 8)
    fields = solver.velocity(solver.gaussian(power, unit)).flatten(1)
    shifts = torch.stack([flows.roll((y, x), (2, 3)) for y in range(8) for x in range(8)]).flatten(0, 1).flatten(1)
    torch.testing.assert_close(fields.mT @ fields, shifts.mT @ shifts / len(shifts))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Flows with coherent vortices and their twin, `(48, 2, 32, 32)` each."""
    given = dict(resolution=32, solver_resolution=64, snapshots=48, folder=str(tmp_path_factory.mktemp("twins")))
    return [open_turbulence(**given, twin=twin) for twin in (False, True)]


def test_twin_has_the_spectrum_but_not_the_vortices(pair):
    """Mean energies of 48 fields scatter by 1 / sqrt(48) over the root of the independent waves of a shell."""
    flows, twin = (fields.read(range(48)).double() for fields in pair)
    found = [spectra(fields, pair[0].grid) for fields in (flows, twin)]
    assert found[0].energy[:, 0].abs().max() + found[1].energy[:, 0].abs().max() < 1e-12 * found[0].energy.max()
    ky, kx = torch.fft.fftfreq(32)[:, None] * 32, torch.fft.fftfreq(32) * 32
    waves = torch.bincount(torch.hypot(kx, ky).round().long().flatten())[1:16]
    means = [spectrum.energy.mean(dim=0)[1:16] for spectrum in found]
    assert (((means[1] / means[0] - 1) * (48 * waves / 2).sqrt()).abs() < 5).all()  # powers in a shell differ
    solver = Turbulence(32)
    kurtosis = []
    for fields in (flows, twin):
        curl = torch.fft.irfft2(solver.vorticity(fields))
        kurtosis.append(curl.pow(4).mean().item() / curl.square().mean().item() ** 2)
    assert kurtosis[0] > 4.5 and kurtosis[1] == pytest.approx(3, abs=0.15)


def test_waves_of_the_twin_have_random_amplitudes(pair):
    """|w|^2 over its mean is exponential, of variance 1; with the amplitude of the mean it would be 0."""
    power = Turbulence(32).vorticity(pair[1].read(range(48)).double()).abs().square()[:, 1:15, 1:15]
    assert (power / power.mean(dim=0)).square().mean().item() == pytest.approx(2, abs=0.1)


def test_twin_has_no_divergence_and_says_what_it_is(pair):
    ky, kx = Turbulence(32).wavenumbers()
    spectrum = torch.fft.rfft2(pair[1].read(range(48)))
    assert (kx * spectrum[:, 0] + ky * spectrum[:, 1]).abs().max() < 1e-5 * spectrum.abs().max()
    flows, twin = pair
    assert (len(twin), twin.grid.shape, twin.units) == (len(flows), flows.grid.shape, flows.units)
    assert torch.equal(twin.grid.dx, flows.grid.dx) and twin.grid.periodic == (True, True)
    assert flows.source != twin.source
    with h5py.File(twin.source) as file:
        assert "Gaussian twin" in file.attrs["source"] and '"twin": true' in file.attrs["source"]


def test_twin_is_made_once_and_new_for_every_seed(tmp_path):
    given = dict(snapshots=9, folder=str(tmp_path), twin=True, **QUICK)
    first = open_turbulence(**given)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert open_turbulence(**given).source == first.source and len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    other = open_turbulence(**{**given, "seed": 1})
    both = torch.stack([fields.read(range(9)) for fields in (first, other)]).flatten(1)
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.2


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("resolution", 15, "resolution must be even"),
        ("solver_resolution", 8, "solver_resolution"),
        ("snapshots", 0, "snap"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(tmp_path, key, value, match):
    with pytest.raises(ValueError, match=match):
        open_turbulence(**{**QUICK, "folder": str(tmp_path), "snapshots": 1, key: value})


def test_more_than_the_disk_holds_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"1000000000 fields of 4096x4096 cells take 1.34e\+08 GB, but .* fewer dataset"
    ):
        open_turbulence(4096, 10**9, solver_resolution=4096, folder=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


# Trajectories.

RUNS = dict(resolution=16, solver_resolution=32, viscosity=1e-6, order=2, duration=5.0, trajectory=6, interval=0.5)


def spectral_divergence(velocity: torch.Tensor) -> float:
    ky, kx = Turbulence(velocity.shape[-1]).wavenumbers()
    spectrum = torch.fft.rfft2(velocity)
    return float((kx * spectrum[:, 0] + ky * spectrum[:, 1]).abs().max() / spectrum.abs().max())


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Fields:
    return open_turbulence(snapshots=57, folder=str(tmp_path_factory.mktemp("runs")), frames=3, stride=2, **RUNS)


def test_trajectories_are_runs_at_equal_steps_from_the_flows_that_snapshots_are_of(
    trajectories: Fields, tmp_path: Path
) -> None:
    assert len(trajectories) == 57 and trajectories.runs.tolist() == (np.arange(57) // 6).tolist()
    found = Runs.of(trajectories)
    turnover = 640e3 / (2 * math.pi * 0.3 * 8) / 3600  # side / 2 pi over RMS is the unit of time, in hours
    assert found.step == pytest.approx(0.5 * turnover) and found.unit == "h"
    assert found.lengths.tolist() == [6] * 9 + [3] and "cut into 10 runs" in found.words
    assert len(Sequences.of(trajectories)) == 9 * 2
    alone = open_turbulence(snapshots=10, folder=str(tmp_path), **{**QUICK})
    torch.testing.assert_close(trajectories.read(range(0, 57, 6)), alone.read(range(10)), rtol=1e-5, atol=1e-6)
    assert spectral_divergence(trajectories.read(range(57))) < 1e-5


def test_a_trajectory_goes_on_as_the_flow_does(trajectories: Fields) -> None:
    """The last snapshot of a run is the flow after the decay and all intervals in one go."""
    solver = Turbulence(32, viscosity=1e-6, order=2, duration=5.0)
    w = solver.decay(solver.start([generator(0, i) for i in range(2)]))
    end = coarsen(solver.velocity(solver.decay(w, time=2.5 / 8)), 16) * 0.3
    torch.testing.assert_close(trajectories.read([5, 11]), end, rtol=0, atol=2e-4)


def test_neighbours_are_alike_runs_have_nothing_in_common_and_statistics_stay(trajectories: Fields) -> None:
    values = trajectories.read(range(54)).view(9, 6, -1).double()
    unit = values / values.norm(dim=2, keepdim=True)
    within = [(unit[:, :-lag] * unit[:, lag:]).sum(dim=2).mean().item() for lag in (1, 2, 5)]
    assert within[0] > 0.97 and within[0] > within[1] > within[2] > 0.5
    across = (unit[:-1, -1] * unit[1:, 0]).sum(dim=1)
    assert across.abs().mean() < 0.25 and abs(across.mean().item()) < 0.2
    rms = values.square().mean(dim=(0, 2)).sqrt()
    assert (rms / rms[0] - 1).abs().max() < 0.1


def test_snapshots_are_kept_under_the_name_and_with_the_bits_that_they_had(tmp_path: Path) -> None:
    """The recipe is what names a file: without trajectories it is the one of before there were any."""
    fields = open_turbulence(snapshots=9, folder=str(tmp_path), **QUICK)
    recipe = dict(resolution=32, k_peak=8.0, viscosity=1e-6, order=2, duration=5.0, courant=1.0, stored=16)
    recipe |= dict(snapshots=9, seed=0, side=640e3, speed=0.3)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    assert Path(fields.source).name == f"turbulence_16_9_{key}.h5" and fields.runs is None and fields.time is None
    solver = Turbulence(32, viscosity=1e-6, order=2, duration=5.0)
    flows = [solver.velocity(solver.decay(solver.start([generator(0, i) for i in r]))) for r in (range(8), range(8, 9))]
    torch.testing.assert_close(fields.read(range(9)), torch.cat([coarsen(v, 16) * 0.3 for v in flows]))


def test_twin_of_trajectories_has_their_covariance_in_time(tmp_path: Path) -> None:
    """Mean products of snapshots a lag apart, over all places, runs and pairs, are those of the flows."""
    given = {**RUNS, "snapshots": 240, "trajectory": 8, "interval": 2.0, "folder": str(tmp_path)}
    flows, twin = (open_turbulence(**given, twin=chosen).read(range(240)).view(30, 8, -1) for chosen in (False, True))
    for lag in range(5):
        means = [(v[:, : 8 - lag] * v[:, lag:]).mean().item() / v.square().mean().item() for v in (flows, twin)]
        assert means[1] == pytest.approx(means[0], abs=0.06)
    assert twin.square().mean().item() == pytest.approx(flows.square().mean().item(), rel=0.1)
    assert spectral_divergence(twin.view(-1, 2, 16, 16)) < 1e-5
    assert abs(torch.corrcoef(torch.stack([twin.flatten(), flows.flatten()]))[0, 1].item()) < 0.1


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [("interval", 0.0, "interval must be > 0"), ("trajectory", 4, "trajectory must be >= 5, which one sequence takes")],
)
def test_trajectories_that_make_no_sense(tmp_path: Path, key: str, value: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        open_turbulence(snapshots=8, folder=str(tmp_path), **{**RUNS, "frames": 3, "stride": 2, key: value})


def test_sequences_are_of_trajectories_without_more_words(tmp_path: Path) -> None:
    fields = open_turbulence(snapshots=20, folder=str(tmp_path), frames=2, **QUICK)
    assert np.bincount(fields.runs).tolist() == [16, 4] and fields.frames == 2


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_made_and_the_same_command_goes_on(
    number: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(snapshots=40, folder=str(tmp_path / "stopped"), **QUICK)
    whole = open_turbulence(**{**given, "folder": str(tmp_path / "whole")}).read(range(40))
    blocks = []

    def counted(velocity: torch.Tensor, resolution: int) -> torch.Tensor:
        blocks.append(len(velocity))
        if len(blocks) == 3:
            os.kill(os.getpid(), number)
        return coarsen(velocity, resolution)

    monkeypatch.setattr(turbulence, "coarsen", counted)
    with pytest.raises(SystemExit) as stopped:
        open_turbulence(**given)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == code and "16 of 40 fields are kept in" in said and said.endswith("goes on")
    assert [path.suffixes for path in (tmp_path / "stopped").iterdir()] == [[".part", ".npy"]]
    assert torch.equal(open_turbulence(**given).read(range(40)), whole)
    assert sum(blocks[3:]) == 24 and "going on: 16 of 40" in capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / "stopped").iterdir()] == [".h5"]


def test_a_signal_before_anything_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbulence, "coarsen", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or given[0])
    with pytest.raises(SystemExit):
        open_turbulence(snapshots=9, folder=str(tmp_path / "none"), **QUICK)
    assert list((tmp_path / "none").iterdir()) == []

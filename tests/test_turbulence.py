"""The turbulence solver against exact solutions of the Navier-Stokes equations, its twin, and the files they make."""

import math
from pathlib import Path

import h5py
import pytest
import torch

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

"""The energy budget of flows: closed forms of single waves, Parseval, and generated turbulence."""

from __future__ import annotations

import math

import pytest
import torch

from vecfield_diffusion.data.turbulence import mean_power, open_turbulence, twins
from vecfield_diffusion.physics.energetics import dissipation, energy_budget, kinetic_energy
from vecfield_diffusion.physics.grid import Grid

DX, DY, SHAPE = 2e3, 5e3, (10, 12)
GRID = Grid(torch.ones(SHAPE, dtype=torch.bool), DX, -DY, "periodic", "periodic")


def wave(amplitude, my, mx, shape=SHAPE, grid=GRID):
    """A wave without divergence, `(2, H, W)`, and its wavenumber."""
    y, x = (torch.arange(n, dtype=torch.float64) for n in shape)
    phase = 2 * math.pi * (my * y[:, None] / shape[0] + mx * x / shape[1]) + 0.3
    ky, kx = 2 * math.pi * my / (shape[0] * DY), 2 * math.pi * mx / (shape[1] * DX)
    k = math.hypot(kx, ky)
    return amplitude * phase.cos() * torch.tensor([ky, kx], dtype=torch.float64).view(2, 1, 1) / k, k


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("waves", [(1, 0), (0, 1), (3, 2), (-2, 5)])
def test_a_single_wave_loses_twice_nu_k_to_the_2n_of_its_energy(waves, order):
    u, k = wave(0.4, *waves)
    energy = kinetic_energy(u)
    assert energy.item() == pytest.approx(0.4**2 / 4)
    nu = 0.01 / k ** (2 * order)
    assert dissipation(u, GRID, nu, order).item() == pytest.approx(2 * 0.01 * energy.item(), rel=1e-12)
    single = dissipation(u.float(), GRID, nu, order)  # powers of k and nu leave the range of float32 by themselves
    assert single.item() == pytest.approx(2 * 0.01 * energy.item(), rel=1e-4)


@pytest.mark.parametrize("width", [11, 12])
def test_the_half_complex_transform_counts_every_wave(width):
    grid = Grid(torch.ones(10, width, dtype=torch.bool), DX, DY, "periodic", "periodic")
    u = torch.randn(3, 2, 10, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ky, kx = (2 * math.pi * torch.fft.fftfreq(n, d, dtype=torch.float64) for n, d in ((10, DY), (width, DX)))
    square = (ky[:, None] ** 2 + kx**2) * torch.fft.fft2(u, norm="forward").abs().square().sum(1)
    torch.testing.assert_close(dissipation(u, grid, 7.0), 7.0 * square.sum((-2, -1)))


def test_the_budget_of_a_decaying_wave_closes_with_the_cube_of_the_interval():
    """E = E0 exp(-2 r t): over one interval the trapezium rule is off by (2 r)^3 E0 dt^3 / 12."""
    u, k = wave(0.4, 2, 3)
    rate = 1e-5
    residuals = []
    for interval in (4e3, 2e3):
        times = interval * torch.arange(4, dtype=torch.float64)
        flow = torch.exp(-rate * times).view(4, 1, 1, 1) * u
        residuals.append(energy_budget(flow[None], GRID, interval, viscosity=rate / k**2)[0])
    assert residuals[0].shape == (3,)
    assert residuals[1][0].item() == pytest.approx((2 * rate * 2e3) ** 3 / 12 * kinetic_energy(u).item(), rel=0.03)
    assert math.log2(residuals[0][0] / residuals[1][0]) == pytest.approx(3, abs=0.05)


def test_forcing_keeps_a_flow_that_loses_as_much():
    u, k = wave(0.4, 2, 3)
    nu = 1e-5 / k**2
    steady = u.expand(1, 3, *u.shape)
    kept = energy_budget(steady, GRID, 3600.0, viscosity=nu, forcing=2e-5 * kinetic_energy(u).item())
    assert kept.abs().max() < 1e-12
    assert energy_budget(steady, GRID, 3600.0, viscosity=nu)[0, 0].item() == pytest.approx(0.072 * 0.04, rel=1e-9)


@pytest.mark.parametrize("grid", [Grid(GRID.valid, DX, DY, "open", "periodic"), Grid(GRID.valid ^ True, DX, DY)])
def test_borders_are_refused(grid):
    with pytest.raises(ValueError, match="periodic"):
        dissipation(torch.zeros(2, *SHAPE), grid, 1.0)


def test_generated_flows_obey_their_viscosity_and_no_other(tmp_path):
    options = dict(resolution=32, solver_resolution=32, viscosity=1e-4, order=1, duration=2, interval=0.5)
    fields = open_turbulence(snapshots=8, trajectory=4, frames=4, folder=str(tmp_path), **options)
    flow = fields.read(range(8)).double().view(2, 4, 2, 32, 32)
    interval = 3600 * float(fields.time[1] - fields.time[0])
    change = kinetic_energy(flow).diff(dim=-1)
    for factor, share in ((1.0, 0.0), (0.5, 0.5), (2.0, -1.0)):
        nu = factor * fields.law.viscosity
        found = energy_budget(flow, fields.grid, interval, viscosity=nu, order=fields.law.order)
        torch.testing.assert_close(found / change, torch.full_like(change, share), rtol=0, atol=0.005)


def test_the_spectrum_of_a_twin_is_the_covariance_of_its_fields(tmp_path, monkeypatch):
    """The twin is linear in its noise: unit noise in every cell gives its covariance without chance."""
    fields = open_turbulence(16, 24, solver_resolution=16, viscosity=1e-4, order=1, duration=2, folder=str(tmp_path))
    twin = open_turbulence(
        16, 24, solver_resolution=16, viscosity=1e-4, order=1, duration=2, twin=True, folder=str(tmp_path)
    )
    assert fields.law.spectrum is None and twin.law.viscosity is None
    units = torch.eye(256).view(256, 16, 16)
    blocks = iter(units.split(8))
    monkeypatch.setattr("vecfield_diffusion.data.turbulence.Turbulence.noise", lambda self, generators: next(blocks))
    monkeypatch.setattr("vecfield_diffusion.data.turbulence.mean_power", lambda given: mean_power(fields))
    monkeypatch.setattr("vecfield_diffusion.data.turbulence.generator", lambda seed, i: None)
    made = torch.cat(list(twins(Long(), {"stored": 16, "seed": 0}))).double()
    waves = torch.fft.fft2(made, norm="ortho")
    covariance = torch.einsum("nayx,nbyx->abyx", waves, waves.conj())
    torch.testing.assert_close(covariance, twin.law.spectrum(), rtol=1e-4, atol=1e-7)


class Long:
    """As many fields as there are cells."""

    shape = (16, 16)

    def __len__(self):
        return 256

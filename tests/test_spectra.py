"""Spectra of single waves and of fields with a known law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.comparison import scales
from vecfield_diffusion.evaluation.spectra import (
    cut_off,
    largest_rectangle,
    resolved,
    spectra,
    spectrum_error,
)
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import vorticity

H, W, DX, DY = 24, 32, 2.0, -3.0


def torus(dx: float = DX, dy: float = DY) -> Grid:
    return Grid(torch.ones(H, W, dtype=torch.bool), dx, dy, "periodic", "periodic")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(grid: Grid) -> tuple[Tensor, Tensor]:
    height, width = grid.shape
    x, y = torch.arange(width) * grid.dx[0], torch.arange(height) * grid.dy[0]
    return torch.meshgrid(x, y, indexing="xy")


def test_a_wave_is_a_line_of_its_energy_and_enstrophy() -> None:
    """w = (a, b) cos(k x + m y): energy (a^2 + b^2)/4 and enstrophy (k b - m a)^2/4 in the shell of |(k, m)|."""
    grid = torus()
    x, y = places(grid)
    k, m, a, b = 2 * math.pi * 3 / (W * DX), 2 * math.pi * 2 / (H * DY), 0.7, -0.4
    wave = torch.cos(k * x + m * y + 0.3)
    found = spectra(torch.stack((a * wave, b * wave)), grid)
    assert found.windowed == (False, False) and found.width == pytest.approx(2 * math.pi / 64)
    shell = round(math.hypot(k, m) / found.width)
    for density, total in ((found.energy, (a**2 + b**2) / 4), (found.enstrophy, (k * b - m * a) ** 2 / 4)):
        assert density[shell] * found.width == pytest.approx(total)
        assert density.sum() * found.width == pytest.approx(total)


def test_parseval() -> None:
    fields = normal(3, 4, 2, H, W) + 0.5
    found = spectra(fields, torus())
    assert found.energy.shape == (3, 4, len(found.wavenumber))
    torch.testing.assert_close(found.energy.sum(-1) * found.width, fields.square().sum(2).mean((2, 3)) / 2)
    mean = fields.mean((3, 4)).square().sum(2) / 2
    torch.testing.assert_close(found.energy[..., 0] * found.width, mean)


def test_enstrophy_is_that_of_the_vorticity() -> None:
    """Long waves, which the differences of the grid resolve to (k dx)^2 / 6."""
    x, y = places(torus(dx=0.05, dy=-0.05))
    k, m = 2 * math.pi / (W * 0.05), 2 * math.pi / (H * 0.05)
    field = torch.stack((torch.cos(k * x - m * y), torch.sin(k * x + m * y) + torch.cos(k * x)))
    found, grid = spectra(field, torus(0.05, -0.05)), torus(0.05, -0.05)
    assert found.enstrophy.sum() * found.width == pytest.approx(
        vorticity(field[None], grid).square().mean().item() / 2, rel=0.05
    )


def test_the_shells_that_are_whole() -> None:
    """White noise has |u|^2 / 2 = 1 spread evenly over H W waves: the density is 2 pi k / (area of the wave plane)."""
    found = spectra(normal(400, 2, H, W), torus())
    assert found.whole == 11  # the Nyquist wavenumber along y is pi / 3, 10.7 times the width of 2 pi / 64
    k = found.wavenumber[4:11]
    flat = found.energy.mean(0)[4:11] * (2 * math.pi) / (DX * -DY) / k
    torch.testing.assert_close(flat, torch.ones_like(flat), rtol=0.3, atol=0)
    assert flat.mean().item() == pytest.approx(1, abs=0.05)


def test_a_bounded_rectangle_is_windowed_without_its_plane() -> None:
    """A plane adds nothing, a wave keeps its energy within three shells, noise keeps its own."""
    grid = Grid(torch.ones(60, 64, dtype=torch.bool), 1.0, 1.0)
    x, y = places(grid)
    plane = torch.stack((3 + 0.5 * x - y, 0.2 * y - 4))
    assert spectra(plane, grid).energy.abs().max() < 1e-20
    wave = torch.cos(2 * math.pi * (8 * x / 64 + 6 * y / 60))
    found = spectra(torch.stack((wave, 0 * wave)) + plane, grid)
    assert found.windowed == (True, True)
    assert found.energy[7:14].sum() * found.width == pytest.approx(0.25, rel=0.01)
    noise = normal(300, 2, 60, 64)
    assert (spectra(noise, grid).energy.sum(-1) * found.width).mean().item() == pytest.approx(1, abs=0.02)


def test_a_closed_axis_has_no_window() -> None:
    grid = Grid(torch.ones(H, W, dtype=torch.bool), 1.0, 1.0, "periodic", "open")
    x, _ = places(grid)
    found = spectra(torch.stack((torch.cos(2 * math.pi * 5 * x / W), 0 * x)), grid)
    assert found.windowed == (True, False)
    one = spectra(torch.stack((torch.cos(2 * math.pi * 5 * x / W), 0 * x)), torus(1.0, 1.0))
    assert found.energy.sum() * found.width == pytest.approx(one.energy.sum().item() * one.width)


def test_land_and_gaps_are_outside_the_rectangle() -> None:
    grid = torus(1.0, 1.0)
    grid.valid[3, 5] = False
    fields = normal(2, 2, H, W)
    fields[1, 0, 20, 30] = math.nan
    found = spectra(fields, grid)
    valid = grid.valid & fields.isfinite().all(0).all(0)
    assert valid[found.rows, found.columns].all() and found.windowed == (True, True)
    cropped = fields[..., found.rows, found.columns]
    bounded = Grid(torch.ones(cropped.shape[-2:], dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(found.energy, spectra(cropped, bounded).energy)
    grid.valid[:, ::3] = False
    with pytest.raises(ValueError, match=r"fields must hold a rectangle of 4 x 4 cells without land, the largest is"):
        spectra(fields, grid)


def test_largest_rectangle_is_that_of_all() -> None:
    for seed in range(30):
        valid = np.random.default_rng(seed).random((7, 9)) < 0.8
        rows, columns = largest_rectangle(valid)
        assert valid[rows, columns].all()
        areas = [
            (b - a) * (d - c)
            for a in range(7)
            for b in range(a + 1, 8)
            for c in range(9)
            for d in range(c + 1, 10)
            if valid[a:b, c:d].all()
        ]
        assert valid[rows, columns].size == max(areas, default=0)


def resolution(estimate: Tensor, truth: Tensor, grid: Grid) -> float:
    error, signal = spectra(estimate - truth, grid), spectra(truth, grid)
    k, *energies = (values[..., : error.whole] for values in (error.wavenumber, signal.energy, error.energy))
    return scales(k, energies[0], energies[1], energies[0])["effective_resolution"].value


def test_resolution_of_a_field_that_lost_its_short_waves() -> None:
    """All waves beyond shell 6 are gone: the error jumps from 0 to all of the signal between the shells 6 and 7."""
    grid = torus(1.0, 1.0)
    truth = normal(5, 2, H, W)
    kx, ky = torch.fft.fftfreq(W) * W, torch.fft.fftfreq(H)[:, None] * W
    kept = torch.hypot(kx, ky) * (H / W) < 6.5
    smooth = torch.fft.ifft2(torch.fft.fft2(truth) * kept).real
    assert H / 7 <= resolution(smooth, truth, grid) <= H / 6
    assert resolution(truth, truth, grid) == pytest.approx(2.0)
    assert resolution(-truth, truth, grid) == math.inf


def test_resolution_is_interpolated_between_shells() -> None:
    """Errors of k^2 times the truth's energy at shell k / 10 (ratio 1/2 at k = sqrt(50), exact in the logarithms)."""
    grid = torus(1.0, 1.0)
    shell = (torch.hypot(torch.fft.fftfreq(W) * H, torch.fft.fftfreq(H)[:, None] * H)).round()
    truth = normal(2, 2, H, W)
    error = torch.fft.ifft2(torch.fft.fft2(truth) * shell / 10).real
    assert resolution(truth + error, truth, grid) == pytest.approx(H / math.sqrt(50))


def test_spectra_are_resolved_one_by_one() -> None:
    """Quotients 1/8 and 2 at wavenumbers 2 and 4: 1/2 is passed half-way in the logarithms."""
    signal = torch.ones(4).double()
    noise = torch.tensor([[9, 0.125, 2, 0], [9, 0.7, 0, 0], [9, 0, 0.1, 0.4], [0, 0.1, 0.5, 8]]).double()
    k = resolved(torch.tensor([0.0, 2, 4, 6]).double(), noise, signal)
    assert k.tolist() == pytest.approx([math.sqrt(8), 0, 6, 4])
    assert float(resolved(torch.tensor([0.0, 2, 4, 6]), noise[0], signal, 1.0)) == pytest.approx(2 * 2**0.75)


def test_where_a_spectrum_ends() -> None:
    """A wave more than a millionth of the peak counts, the mean does not; nor does an empty shell in between."""
    assert cut_off(torch.tensor([1e9, 1, 0.5, 0, 2e-6, 5e-7, 0]).double()) == 4
    assert cut_off(torch.arange(8).double()) == 7


def test_error_of_a_spectrum_is_that_of_the_worst_shell() -> None:
    truth = torch.tensor([1.0, 4, 2, 1]).double()
    members = torch.tensor([[5.0, 5, 1.8, 1], [1, 4, 1, 1.2], [1, 4, 2, 9]]).double()
    assert spectrum_error(members, truth, 2).tolist() == pytest.approx([0.25, 0.5, 0])
    assert spectrum_error(members, truth, 3).tolist() == pytest.approx([0.25, 0.5, 8])

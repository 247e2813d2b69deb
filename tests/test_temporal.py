"""Statistics in time against closed forms: rotating vectors, AR(1), and energies that add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.temporal import increments, lag_correlation, rotary_spectrum

PHI, T = 0.8, 32


def ar1(frames: int, cells: int = 200, members: int = 20, phi: float = PHI) -> Tensor:
    """Stationary first-order autoregression of unit variance, independent in cells and components."""
    generator = torch.Generator().manual_seed(0)
    shocks = torch.randn(frames, members, 2, 1, cells, dtype=torch.float64, generator=generator)
    x = [shocks[0]]
    for shock in shocks[1:]:
        x.append(phi * x[-1] + math.sqrt(1 - phi**2) * shock)
    return torch.stack(x, dim=1)


def turning(cycles: int, frames: int = T, size: float = 3.0) -> Tensor:
    """A vector that turns `cycles` times in all frames, counterclockwise where this is positive; land in one cell."""
    angle = 2 * math.pi * cycles * torch.arange(frames, dtype=torch.float64) / frames
    series = size * torch.stack((angle.cos(), angle.sin()), dim=1)[:, :, None, None].expand(frames, 2, 3, 4).clone()
    series[..., 1, 2] = math.nan
    return series


@pytest.mark.parametrize("cycles", [3, -5])
def test_a_turning_vector_has_its_energy_on_its_side(cycles: int) -> None:
    dt = 3600.0
    frequency, energy = rotary_spectrum(turning(cycles), dt, window=False)
    peak = int(energy.argmax())
    assert float(frequency[peak]) == pytest.approx(cycles / (T * dt), rel=1e-12)
    step = 1 / (T * dt)
    assert float(energy[peak]) * step == pytest.approx(3.0**2 / 2, rel=1e-12)
    assert float(energy.sum() - energy[peak]) < 1e-20 * float(energy[peak])


@pytest.mark.parametrize("frames", [31, 32])
def test_energies_add_up_to_that_of_the_anomalies(frames: int) -> None:
    series = ar1(frames, 7, 3)
    spectrum = rotary_spectrum(series, 0.5, window=False)
    anomaly = series - series.mean(dim=1, keepdim=True)
    want = anomaly.square().sum(dim=2).mean() / 2
    assert float(spectrum.energy.sum() / (frames * 0.5)) == pytest.approx(float(want), rel=1e-12)
    levels, energy = spectrum.folded()
    assert len(levels) == frames // 2 + 1 and float(energy.sum()) == pytest.approx(float(spectrum.energy.sum()))
    windowed = rotary_spectrum(series, 0.5)
    assert float(windowed.energy.sum()) == pytest.approx(float(spectrum.energy.sum()), rel=0.2)


def test_the_spectrum_of_an_autoregression() -> None:
    """The expected periodogram is the transform of (1 - |l| / T) phi^|l|: sum over lags, both senses alike."""
    frames = 32
    spectrum = rotary_spectrum(ar1(frames), 1.0, window=False)
    lag = torch.arange(-frames + 1, frames, dtype=torch.float64)
    covariance = (1 - lag.abs() / frames) * PHI ** lag.abs()
    want = (covariance * torch.cos(2 * math.pi * spectrum.frequency[:, None] * lag)).sum(dim=1)
    other = spectrum.frequency != 0  # the mean is taken off
    torch.testing.assert_close(spectrum.energy[other], want[other], rtol=0.06, atol=0)
    assert float(spectrum.energy[~other]) < 1e-20


def test_increments_of_an_autoregression() -> None:
    lags = (1, 2, 5)
    found = increments(ar1(64), lags)
    want = torch.tensor([2 * (1 - PHI**lag) for lag in lags], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0.01, atol=0)


def test_increments_by_hand() -> None:
    """u = t^2, v = 0: increments 2 t + 1 over 1, of which a component has half the mean square."""
    t = torch.arange(4.0)
    series = torch.stack((t**2, 0 * t), dim=1)[:, :, None, None]
    assert float(increments(series, [1])) == pytest.approx((1 + 9 + 25) / 6)


def test_lag_correlation_of_an_autoregression_falls_as_a_power() -> None:
    found = lag_correlation(ar1(64), [0, 1, 3])
    torch.testing.assert_close(found.real, torch.tensor([1, PHI, PHI**3], dtype=torch.float64), rtol=0, atol=0.01)
    assert float(found.imag.abs().max()) < 0.01


def test_lag_correlation_tells_the_turning() -> None:
    """A vector of three turns in 32 frames is fully correlated, and turned by 360 * 3 / 32 degrees a frame."""
    found = lag_correlation(turning(3), [1, 4])
    angle = 2 * math.pi * 3 / T
    torch.testing.assert_close(found, torch.polar(torch.ones(2).double(), torch.tensor([angle, 4 * angle]).double()))
    mean = torch.tensor([5.0, -2.0], dtype=torch.float64)[:, None, None].expand(2, 3, 4)
    torch.testing.assert_close(lag_correlation(turning(3) + mean, [1], mean), found[:1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 4 frames, got 3"):
        rotary_spectrum(turning(1)[:3], 1.0)
    with pytest.raises(ValueError, match=r"between 0 and 31 frames, got \[32\]"):
        increments(turning(1), [32])
    with pytest.raises(ValueError, match="no cell"):
        lag_correlation(turning(1) * math.nan, [1])
    with pytest.raises(ValueError, match=r"\(\.\.\., T, 2, H, W\)"):
        increments(torch.zeros(4, 3, 5, 5), [1])

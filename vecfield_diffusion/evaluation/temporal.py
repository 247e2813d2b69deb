"""How fields change in time: rotary spectra, increments and lag correlation of series at fixed cells.

A series is `(..., T, 2, H, W)`, T frames a step `dt` apart, and w = u + i v. With W(f) its Fourier transform in time at
one cell, the rotary spectrum |W(f)|^2 tells turning counterclockwise (f > 0) from clockwise (f < 0; Gonella 1972,
Mooers 1973). Everything is averaged over the cells that are finite in all frames of all members, and over the leading
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RotarySpectrum(NamedTuple):
    """A spectrum of kinetic energy over frequency.

    Attributes:
        frequency: In cycles per unit of time, increasing, `(T,)`; counterclockwise above 0.
        energy: Density `(T,)` of |w|^2 / 2; its sum times the step of the frequency is the energy of the anomalies.
    """

    frequency: Tensor
    energy: Tensor

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns the frequencies from 0 upwards and the energy of both senses of rotation together."""
        size = self.frequency.abs()
        levels, index = size.unique(return_inverse=True)
        return levels, self.energy.new_zeros(len(levels)).index_add_(0, index, self.energy)


def rotary_spectrum(series: Tensor, dt: float, window: bool = True) -> RotarySpectrum:
    """Returns the rotary spectrum of a series, about its mean in time at each cell.

    Arguments:
        series: `(..., T, 2, H, W)`, NaN outside the domain.
        dt: The time between frames.
        window: Whether to multiply by a Hann window that keeps the energy, against the leakage of what does not close.

    Raises:
        ValueError: Fewer than four frames, or no cell that is finite in all of them.
    """
    w = _complex(series)
    frames = w.shape[-2]
    if frames < 4:
        raise ValueError(f"a spectrum in time needs 4 frames, got {frames}")
    w = w - w.mean(dim=-2, keepdim=True)
    if window:
        middle = (torch.arange(frames, dtype=torch.float64, device=w.device) + 0.5) / frames
        w = w * (torch.sin(math.pi * middle).square() * math.sqrt(8 / 3))[:, None]
    power = (torch.fft.fft(w, dim=-2) / frames).abs().square().mean(dim=-1) / 2
    power = power.view(-1, frames).mean(dim=0)
    frequency = torch.fft.fftfreq(frames, dt, dtype=torch.float64, device=w.device)
    order = frequency.argsort()
    return RotarySpectrum(frequency[order], power[order] * frames * dt)


def increments(series: Tensor, lags: Sequence[int]) -> Tensor:
    """Returns the mean square of u(t + lag) - u(t) over both components, `(L,)`.

    Arguments:
        series: `(..., T, 2, H, W)`, NaN outside the domain.
        lags: In frames.

    Raises:
        ValueError: A lag that the series does not hold.
    """
    values = torch.view_as_real(_complex(series))
    return torch.stack(
        [
            (values[..., lag:, :, :] - values[..., : values.shape[-3] - lag, :, :]).square().mean()
            for lag in _checked(lags, values.shape[-3])
        ]
    )


def lag_correlation(series: Tensor, lags: Sequence[int], mean: Tensor | None = None) -> Tensor:
    """Returns the complex correlation of w(t) with w(t + lag), `(L,)`: its modulus, and by its angle the mean turning.

    Arguments:
        series: `(..., T, 2, H, W)`, NaN outside the domain.
        lags: In frames.
        mean: The field `(2, H, W)` that anomalies are taken about; 0 if not given. The mean of the series itself would
            lower the correlation of short ones.

    Raises:
        ValueError: A lag that the series does not hold.
    """
    w = _complex(series if mean is None else series - mean)
    found = []
    for lag in _checked(lags, w.shape[-2]):
        now, later = w[..., : w.shape[-2] - lag, :], w[..., lag:, :]
        size = now.abs().square().sum().sqrt() * later.abs().square().sum().sqrt()
        found.append((now.conj() * later).sum() / size)
    return torch.stack(found)


def _checked(lags: Sequence[int], frames: int) -> Sequence[int]:
    if not all(0 <= lag < frames for lag in lags):
        raise ValueError(f"lags must be between 0 and {frames - 1} frames, got {list(lags)}")
    return lags


def _complex(series: Tensor) -> Tensor:
    """u + i v `(..., T, K)` in the K cells that are finite everywhere, in double precision."""
    if series.ndim < 4 or series.shape[-3] != 2:
        raise ValueError(f"expected a series (..., T, 2, H, W), got {tuple(series.shape)}")
    flat = series.double()
    known = flat.isfinite().flatten(0, -3).all(dim=0)
    if not known.any():
        raise ValueError("no cell of the series is finite in all frames")
    inside = flat[..., known]
    return torch.complex(inside[..., 0, :], inside[..., 1, :])

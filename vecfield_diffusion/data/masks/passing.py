"""Masks of what passes over a domain: the swaths of satellites, and clouds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.data.masks.base import Mask, Time, integers, interval, uniform, velocities


class Swath(Mask):
    """Parallel inclined bands are observed, as a satellite sees them.

    Moving, they are shifted across by the same step from each frame to the next, and what leaves the domain on one side
    comes in on the other, as orbits follow each other.

    Arguments:
        width: The width of a band in cells, or a range of it.
        count: The number of bands across the domain, or a range of it.
        slope: The inclination against the columns in degrees, or a range of it.
        shift: The step across the bands in cells, or a range of it; by default their width: side by side.
        time: How it goes through a sequence; `auto` is `moving`.

    Raises:
        ValueError: A width or count below 1, a slope outside [-90, 90], or a shift that is not finite.
    """

    ways = ("anew", "fixed", "moving")
    natural = "moving"

    def __init__(
        self,
        width: float | list[float] = 8.0,
        count: int | list[int] = 2,
        slope: float | list[float] | tuple[float, float] = (-30.0, 30.0),
        shift: float | list[float] | None = None,
        time: Time = "auto",
    ) -> None:
        super().__init__(time)
        self.width = interval("width", width, 1.0, math.inf)
        self.count = interval("count", count, 1, 1000)
        self.slope = interval("slope", slope, -90.0, 90.0)
        self.shift = None if shift is None else interval("shift", shift, -1e6, 1e6)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        place, spacing, band = self._bands(n, valid, generator)
        return place % spacing < band

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        place, spacing, band = (part.unsqueeze(1) for part in self._bands(n, valid[0], generator))
        shift = band if self.shift is None else uniform(n, self.shift, generator).view(n, 1, 1, 1)
        frame = torch.arange(len(valid), device=valid.device).view(-1, 1, 1)
        return (place - frame * shift) % spacing < band

    def _bands(self, n: int, valid: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Where the cells lie across the bands, `(n, H, W)`, how far these are apart, and how wide, `(n, 1, 1)`."""
        height, width = valid.shape
        angle = torch.deg2rad(uniform(n, self.slope, generator))
        band = uniform(n, self.width, generator).view(n, 1, 1)
        count = integers(n, self.count, generator)
        cos, sin = angle.cos().view(n, 1, 1), angle.sin().view(n, 1, 1)
        spacing = (width * cos.abs() + height * sin.abs()) / count.view(n, 1, 1)
        offset = torch.rand(n, 1, 1, generator=generator, device=generator.device) * spacing
        x = torch.arange(width, device=valid.device).view(1, 1, -1)
        y = torch.arange(height, device=valid.device).view(1, -1, 1)
        return x * cos - y * sin + offset, spacing, band


class Clouds(Mask):
    """Clouds hide what lies under them: the highest values of a smooth random field with spectrum k^-3.

    Moving, they drift with a velocity of their own, over an edge of the domain and in at the other, and change slowly.

    Arguments:
        fraction: The share of the valid cells that is hidden.
        size: The size of the largest clouds, as a share of the longer side of the domain.
        speed: Of the drift, in cells per frame, or a range; in any direction.
        change: The share of the variance of the field that is new in each frame.
        time: How it goes through a sequence; `auto` is `moving`.

    Raises:
        ValueError: A fraction or a change outside [0, 1], a size that is not in (0, 1], or a negative speed.
    """

    ways = ("anew", "fixed", "moving")
    natural = "moving"

    def __init__(
        self,
        fraction: float | list[float] | tuple[float, float] = (0.3, 0.7),
        size: float = 0.4,
        speed: float | list[float] | tuple[float, float] = (0.0, 2.0),
        change: float = 0.1,
        time: Time = "auto",
    ) -> None:
        super().__init__(time)
        self.fraction = interval("fraction", fraction, 0.0, 1.0)
        if not 0.0 < size <= 1.0:
            raise ValueError(f"size must be in (0, 1], got {size}")
        self.size = size
        self.speed = interval("speed", speed, 0.0, math.inf)
        self.change = interval("change", change, 0.0, 1.0)[0]

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        smooth = self._smooth(torch.fft.rfft2(_white(n, valid, generator)), valid)
        hidden = (uniform(n, self.fraction, generator) * valid.sum()).round().long()
        return _lowest(smooth, hidden, valid)

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        domain = valid.any(dim=0)
        hidden = (uniform(n, self.fraction, generator) * domain.sum()).round().long()
        x, y = (part.view(n, 1, 1) for part in velocities(n, self.speed, generator))
        kx, ky = _frequencies(domain)
        drift = torch.exp(-2j * math.pi * (kx * x + ky * y))
        waves = torch.fft.rfft2(_white(n, domain, generator))
        frames = [_lowest(self._smooth(waves, domain), hidden, domain)]
        for _ in valid[1:]:
            new = torch.fft.rfft2(_white(n, domain, generator))
            waves = math.sqrt(1.0 - self.change) * drift * waves + math.sqrt(self.change) * new
            frames.append(_lowest(self._smooth(waves, domain), hidden, domain))
        return torch.stack(frames, dim=1)

    def _smooth(self, waves: Tensor, valid: Tensor) -> Tensor:
        """The field `(n, H, W)` of the waves of white noise."""
        kx, ky = _frequencies(valid)
        gentle = 1.0 / (self.size * max(valid.shape))
        amplitude = (kx.square() + ky.square() + gentle**2) ** -1.5
        return torch.fft.irfft2(waves * amplitude, s=tuple(valid.shape))


def _frequencies(valid: Tensor) -> tuple[Tensor, Tensor]:
    """The wavenumbers of the columns and of the rows of a domain, in cycles per cell, `(W // 2 + 1,)` and `(H, 1)`."""
    height, width = valid.shape
    kx = torch.fft.rfftfreq(width, device=valid.device)
    return kx, torch.fft.fftfreq(height, device=valid.device).unsqueeze(1)


def _white(n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(n, *valid.shape, generator=generator, device=generator.device)


def _lowest(smooth: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
    """The cells of fields `(n, H, W)` that are left when the highest `hidden (n,)` of the valid ones are taken away."""
    n = len(smooth)
    ranked = smooth.flatten(1)[:, valid.flatten()].sort(dim=1, descending=True).values
    limit = torch.cat([ranked, ranked.new_full((n, 1), -math.inf)], dim=1).gather(1, hidden.view(n, 1))
    return smooth <= limit.view(n, 1, 1)

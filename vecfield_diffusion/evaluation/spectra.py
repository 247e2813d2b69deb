"""How energy is spread over scales: isotropic spectra, and up to where they are resolved.

Where the domain is doubly periodic without land, the spectrum is that of the whole field, mean included, and Parseval's
identity is exact: the sum over shells of energy * width is the mean of |u|^2 / 2. Elsewhere it is that of the largest
rectangle that has no land; a plane is subtracted from each component by least squares, and the rest is multiplied by a
Hann window of mean square 1, both along axes that do not close only. Wavenumbers are in radians per unit of length,
with the mean spacing of the rectangle.

A spectrum is taken of members, never of their mean: the mean of an ensemble is smooth where the ensemble is unsure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.physical import measured
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.parts import largest_rectangle

#: The share of the energy of its peak below which a spectrum has ended, and the share of the shells before to compare.
EMPTY, SHARE = 1e-6, 0.75


@dataclass(frozen=True)
class Spectra:
    """Isotropic spectra: the sum over shells of a density times `width` is the mean over space.

    Attributes:
        wavenumber: The centres of the shells, `(K,)`, evenly spaced from 0.
        energy: Kinetic energy density `(..., K)`, in m3 s-2 for m and s.
        enstrophy: Enstrophy density (half the squared vorticity), `(..., K)`, in m s-2.
        whole: How many shells, from 0, are centred within both Nyquist wavenumbers; the rest are corners.
        rows: The rows of the rectangle.
        columns: Its columns.
        windowed: Whether a plane was subtracted and a window used along y and along x.
    """

    wavenumber: Tensor
    energy: Tensor
    enstrophy: Tensor
    whole: int
    rows: slice
    columns: slice
    windowed: tuple[bool, bool]

    @property
    def width(self) -> float:
        """The width of a shell."""
        return float(self.wavenumber[1])


def spectra(fields: Tensor, grid: Grid) -> Spectra:
    """Returns the spectra of each of `fields` `(..., 2, H, W)`; NaN cells of any field count as land.

    Raises:
        ValueError: No rectangle of 4 x 4 cells is without land.
    """
    flat, grid = measured(fields, grid)
    rows, columns = largest_rectangle(grid.valid.cpu().numpy())
    part = flat[..., rows, columns]
    height, width = part.shape[-2:]
    if min(height, width) < 4:
        raise ValueError(f"fields must hold a rectangle of 4 x 4 cells without land, the largest is {height} x {width}")
    closed = zip((height, width), grid.shape, grid.periodic, strict=True)
    windowed = tuple(not (close and size == full) for size, full, close in closed)
    waves = torch.fft.fft2(_windowed(part, windowed)) / (height * width)
    dx, dy = grid.dx[rows].mean().item(), grid.dy[rows].mean().item()
    kx = 2 * math.pi * torch.fft.fftfreq(width, dx, dtype=part.dtype, device=part.device)
    ky = 2 * math.pi * torch.fft.fftfreq(height, dy, dtype=part.dtype, device=part.device)[:, None]
    energy = waves.abs().square().sum(dim=1) / 2
    enstrophy = (kx * waves[:, 1] - ky * waves[:, 0]).abs().square() / 2
    step = 2 * math.pi / min(width * abs(dx), height * abs(dy))
    shell = (torch.hypot(kx, ky) / step).round().long().flatten()
    count = int(shell.max()) + 1
    energy, enstrophy = (
        part.new_zeros(len(part), count).index_add_(1, shell, values.flatten(1)).view(*fields.shape[:-3], count) / step
        for values in (energy, enstrophy)
    )
    whole = int(math.pi / max(abs(dx), abs(dy)) / step + 1e-9) + 1
    wavenumber = step * torch.arange(count, dtype=part.dtype, device=part.device)
    return Spectra(wavenumber, energy, enstrophy, min(whole, count), rows, columns, windowed)


def _windowed(part: Tensor, windowed: tuple[bool, bool]) -> Tensor:
    """`(B, 2, h, w)` without its plane and under a Hann window along the axes that do not close."""
    if not any(windowed):
        return part
    y, x = (torch.arange(size, dtype=part.dtype, device=part.device) - (size - 1) / 2 for size in part.shape[-2:])
    slopes = [axis for axis, open_end in zip((y[:, None], x[None]), windowed, strict=True) if open_end]
    for shape in (torch.ones_like(part[0, 0]), *(slope.expand(part.shape[-2:]) for slope in slopes)):
        part = part - (part * shape).sum(dim=(-2, -1), keepdim=True) / shape.square().sum() * shape
    for axis, size, open_end in zip((-2, -1), part.shape[-2:], windowed, strict=True):
        if open_end:
            middle = (torch.arange(size, dtype=part.dtype, device=part.device) + 0.5) / size
            hann = torch.sin(math.pi * middle).square() * math.sqrt(8 / 3)
            part = part * (hann[:, None] if axis == -2 else hann)
    return part


def cut_off(energy: Tensor) -> int:
    """Returns the shell at which a spectrum `(K,)` ends: the last with a share `EMPTY` of the peak after 0."""
    return int((energy >= EMPTY * energy[1:].max()).nonzero().max())


def spectrum_error(energy: Tensor, signal: Tensor, last: int) -> Tensor:
    """Returns the largest deviation `(...)` |E / E_truth - 1| of spectra `(..., K)` over the shells 1 to `last`.

    Arguments:
        energy: Mean energies of members, not of their mean.
        signal: Mean energies of the truth.
        last: `SHARE` of the `cut_off` of the truth: beyond, little energy falls off so steeply that ratios say nothing
            of the flow. On the generated turbulence of 64 cells the truth ends where its solver truncates, at shell 24,
            and the last shell is 18; on spectra as flat as those of the mesoscale, the truth ends at the Nyquist
            wavenumber.
    """
    return (energy / signal - 1)[..., 1 : last + 1].abs().amax(dim=-1)


def resolved(wavenumber: Tensor, noise: Tensor, signal: Tensor, ratio: float = 0.5) -> Tensor:
    """Returns the wavenumber `(...)` up to which the energy of the error stays below `ratio` of that of the truth.

    The crossing is interpolated in the logarithms. The last wavenumber if the error stays below, 0 if it is above
    already at the first after 0.

    Arguments:
        wavenumber: `(K,)` from 0.
        noise: The energy of the error, `(..., K)`.
        signal: That of the truth, `(..., K)`.
        ratio: Noise to signal (0.5: Ballarotta et al. 2019).
    """
    k = wavenumber[1:].log()
    excess = (noise / signal / ratio)[..., 1:].clamp(min=1e-300).log()
    above = excess > 0
    first = above.int().argmax(dim=-1, keepdim=True)
    before = (first - 1).clamp(min=0)
    low, high = excess.gather(-1, before), excess.gather(-1, first)
    crossing = torch.exp(k[before] - low / (high - low) * (k[first] - k[before]))
    found = torch.where(first > 0, crossing, 0.0).where(above.any(dim=-1, keepdim=True), wavenumber[-1])
    return found.squeeze(-1)

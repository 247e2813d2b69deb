"""Cases: fields with gaps, and the observation that a sampler is given of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.training.batches import MaskFunction, seeded


@dataclass(frozen=True)
class Cases:
    """N cases on one grid.

    Arguments:
        numbers: The snapshot that each is made of.
        truth: The fields `(N, 2, H, W)` in physical units, NaN where unknown.
        observed: The cells that are observed, boolean `(N, 1, H, W)`.
        y: The observed values `(N, 2, H, W)` in physical units, NaN elsewhere.
        sigma_obs: The standard deviation of their error, in physical units.
        grid: The grid.
    """

    numbers: list[int]
    truth: Tensor
    observed: Tensor
    y: Tensor
    sigma_obs: float
    grid: Grid

    def observation(self, normalizer: Normalizer, device: torch.device) -> Observation:
        """What a denoiser is told, normalised, on its device."""
        n = len(self.y)
        y = torch.where(self.observed, normalizer.normalize(self.y.to(normalizer.std.device)).cpu(), 0.0)
        sigma = torch.full((n, 1, 1, 1), self.sigma_obs / normalizer.std.item())
        return Observation(y, self.observed, sigma, self.grid.valid.expand(n, 1, -1, -1)).to(device)

    @property
    def hidden(self) -> Tensor:
        """The cells to score: known, and not observed."""
        return self.truth[:, :1].isfinite() & ~self.observed


def make_cases(
    fields: Fields,
    indices: Sequence[int],
    mask: MaskFunction,
    seed: int,
    sigma_obs: float = 0.0,
    add_error: bool = False,
    grid: Grid | None = None,
    sensor: Sensor | None = None,
) -> Cases:
    """Hides what `mask` does not observe of the snapshots `indices`; a case depends on the seed and its snapshot alone.

    Arguments:
        fields: The data.
        indices: The snapshots, one case each.
        mask: What is observed of the cells that are measured.
        seed: Of masks and errors.
        sigma_obs: The error of the observations in physical units.
        add_error: Whether the observations are to be given this error; those of an instrument have it already.
        grid: The domain; that of the fields if None.
        sensor: The instrument, where the truth is to be seen through one.
    """
    grid = fields.grid if grid is None else grid
    truth = fields.read(indices).masked_fill(~grid.valid, torch.nan)
    measured = truth[:, :1].isfinite()
    observed = torch.zeros_like(measured)
    for cells, seen, i in zip(measured, observed, indices, strict=True):
        if cells.any():  # a snapshot that measured nothing has nothing to observe
            seen |= mask(1, cells[0], seeded(seed, int(i), 0))[0] & cells
    error = torch.stack([torch.randn(truth.shape[1:], generator=seeded(seed, int(i), 1)) for i in indices])
    seen = truth if sensor is None or not add_error else sensor.measure(truth, grid)
    observed &= seen[:, :1].isfinite()
    y = torch.where(observed, seen + (sigma_obs if add_error else 0.0) * error, torch.nan)
    return Cases([int(i) for i in indices], truth, observed, y, sigma_obs, grid)

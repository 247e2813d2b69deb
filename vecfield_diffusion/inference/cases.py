"""Cases: fields with gaps, and the observation that a sample is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import MaskFunction, seeded
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.physics.grid import Grid


@dataclass(frozen=True)
class Cases:
    """N cases on one grid.

    Arguments:
        numbers: The snapshot that each is made of.
        truth: The fields `(N, 2, H, W)` in physical units, NaN where unknown.
        observed: The cells that are observed, boolean `(N, 1, H, W)`.
        single: Observed values of cells where the other component is missing, boolean `(N, 2, H, W)`.
        y: The observed values `(N, 2, H, W)` in physical units, NaN elsewhere.
        sigma_obs: The standard deviation of their error in physical units, `(N, 1, 1, 1)`, `(N, 1, H, W)` or
            `(N, 2, H, W)`.
        grid: The grid.
        context: What a network is conditioned on beside, `(N, C, H, W)`, in its units.
        sensor: The observation operator with what it recorded of these cases, where it recorded anything.
    """

    numbers: list[int]
    truth: Tensor
    observed: Tensor
    single: Tensor
    y: Tensor
    sigma_obs: Tensor
    grid: Grid
    context: Tensor | None = None
    sensor: Sensor | None = None

    def observation(self, normalizer: Normalizer, device: torch.device) -> Observation:
        """Returns what a denoiser is conditioned on, normalised, on its device."""
        known = self.observed | self.single
        y = torch.where(known, normalizer.normalize(self.y.to(normalizer.std.device)).cpu(), 0.0)
        valid = self.grid.valid.expand(len(self.y), 1, -1, -1)
        single = self.single if self.single.any() else None
        sigma = torch.where(self.sigma_obs.isfinite(), self.sigma_obs, 0.0) / normalizer.std.item()
        return Observation(y, self.observed, sigma, valid, single=single, context=self.context).to(device)

    def seen_through(self, sensor: Sensor) -> Cases:
        """Returns the same cases observed by an instrument alone, where it recorded: no velocity is known."""
        nan, none = torch.full_like(self.y, torch.nan), torch.zeros_like(self.single)
        return replace(self, truth=nan, y=nan, observed=sensor.cells, single=none, sensor=sensor)

    def without(self, cells: Tensor) -> Cases:
        """Returns the same cases with the values in some cells `(N, 1, H, W)` neither observed nor known."""
        return replace(
            self,
            truth=self.truth.masked_fill(cells, torch.nan),
            y=self.y.masked_fill(cells, torch.nan),
            observed=self.observed & ~cells,
            single=self.single & ~cells,
            sensor=None if self.sensor is None else self.sensor.within(~cells),
        )

    def __getitem__(self, chosen: Sequence[int] | slice) -> Cases:
        """Returns some of the cases."""
        places = list(range(len(self.numbers))[chosen]) if isinstance(chosen, slice) else list(chosen)
        index = torch.tensor(places, dtype=torch.long)
        return replace(
            self,
            numbers=[self.numbers[place] for place in places],
            truth=self.truth[index],
            observed=self.observed[index],
            single=self.single[index],
            y=self.y[index],
            sigma_obs=self.sigma_obs[index],
            context=None if self.context is None else self.context[index],
            sensor=None if self.sensor is None else self.sensor.select(index),
        )

    @property
    def hidden(self) -> Tensor:
        """The cells to score: known, and not observed."""
        return self.truth.isfinite().all(dim=1, keepdim=True) & ~self.observed


def make_cases(
    fields: Fields,
    indices: Sequence[int],
    mask: MaskFunction,
    *,
    seed: int,
    sigma_obs: float | Tensor = 0.0,
    add_error: bool = False,
    grid: Grid | None = None,
    sensor: Sensor | None = None,
    hide: float = 0.0,
) -> Cases:
    """Returns a case for each snapshot, with what `mask` does not observe hidden.

    A case depends on the seed and its snapshot alone.

    Arguments:
        fields: The data.
        indices: The snapshots, one case each.
        mask: What is observed of the cells that are measured.
        seed: Of masks and errors.
        sigma_obs: The error of the observations in physical units, a number or see `Cases`; cells where it is not known
            are not observed.
        add_error: Whether the observations are to be given this error; those of an instrument have it already.
        grid: The domain; that of the fields if None.
        sensor: The observation operator of an instrument, through which the truth is measured.
        hide: The share of the observed cells that is hidden, to be scored.
    """
    grid = fields.grid if grid is None else grid
    truth = fields.read(indices, partial=True).masked_fill(~grid.valid, torch.nan)
    sigma = torch.as_tensor(sigma_obs, dtype=truth.dtype)
    sigma = sigma.expand(len(truth), 1, 1, 1) if sigma.ndim == 0 else sigma
    measured = truth if sensor is None or not add_error else sensor.measure(truth, grid)
    known = measured.isfinite() & sigma.isfinite()
    pairs = zip(known, indices, strict=True)
    chosen = torch.stack([observed_cells(values, mask, seed, int(i), hide) for values, i in pairs])
    observed = known.all(dim=1, keepdim=True) & chosen
    single = known & ~known.all(dim=1, keepdim=True) & chosen
    y = torch.where(observed | single, measured, torch.nan)
    if add_error:
        y = y + sigma * torch.stack([torch.randn(truth.shape[1:], generator=seeded(seed, int(i), 1)) for i in indices])
    return Cases([int(i) for i in indices], truth, observed, single, y, sigma, grid)


def observed_cells(known: Tensor, mask: MaskFunction, seed: int, number: int, hide: float) -> Tensor:
    """Returns the cells `(1, H, W)` that are observed of those where a value `(2, H, W)` is known."""
    cells = known.any(dim=0, keepdim=True)
    if not cells.any():  # a snapshot that measured nothing has nothing to observe
        return cells
    observed = mask(1, cells[0], seeded(seed, number, 0))[0] & cells
    if hide > 0:
        places = observed.flatten().nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=seeded(seed, number, 2))
        dropped = places[order[: round(hide * len(places))]]
        observed = observed.flatten().index_fill(0, dropped, False).view(observed.shape)
    return observed


def with_context(
    cases: Cases,
    fields: Fields,
    context: Context | None,
    normalizer: Normalizer,
    *,
    seed: int,
    past: MaskFunction | None = None,
    twin: bool = False,
) -> Cases:
    """Returns the same cases with what the network is conditioned on beside the observation.

    Arguments:
        cases: The cases.
        fields: The data, earlier snapshots included.
        context: What the network was trained with; None for nothing.
        normalizer: Of the velocities, on any device.
        seed: Of masks and errors of earlier fields; those of the present differ.
        past: In a twin experiment, the mask that hides cells of earlier fields; None hides none.
        twin: Whether known fields are hidden: then earlier ones have the error of the observations, too.
            Those of a file are as they are.
    """
    if context is None:
        return cases
    parts = [part.masked_fill(~cases.grid.valid, torch.nan) for part in context.parts(fields, cases.numbers)]
    shown = [torch.ones(1, 1, 1, 1, dtype=torch.bool)] * len(parts)
    for k, lag in enumerate(context.history if twin else ()):
        earlier = [number - lag for number in cases.numbers]
        # Snapshots before the first are unknown, and have no generator.
        draws = [torch.randn(parts[k].shape[1:], generator=seeded(seed, max(n, 0), 1)) for n in earlier]
        parts[k] = parts[k] + cases.sigma_obs * torch.stack(draws)
        if past is not None:
            pairs = zip(parts[k].isfinite(), earlier, strict=True)
            shown[k] = torch.stack([observed_cells(known, past, seed, max(n, 0), 0.0) for known, n in pairs])
    scale = Normalizer(normalizer.mean.cpu(), normalizer.std.item())
    return replace(cases, context=context.channels(parts, scale, shown))

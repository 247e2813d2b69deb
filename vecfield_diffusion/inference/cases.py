"""Cases: fields with gaps, and the observation that a sample is conditioned on.

A case is a snapshot, or a sequence of T frames of one run with one more axis, `(N, T, ...)`. What a frame of a sequence
observes, and with what error, depends on the seed and its snapshot alone, whatever sequence it is seen in. A mask that
is fixed or moves in time depends on the seed and the run, and goes on along all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import MaskFunction, goes_on, seeded
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import Mask
from vecfield_diffusion.data.sequences import Integers, frame_numbers, read_sequences
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import correlated, is_known
from vecfield_diffusion.guidance.physics import NoPhysics
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.inference.run_masks import masks_of_runs
from vecfield_diffusion.physics.grid import Grid


@dataclass(frozen=True)
class Cases:
    """N cases on one grid.

    Arguments:
        numbers: The snapshot that each is made of; of sequences those of the frames, `(N, T)`, -1 for a missing one.
        truth: The fields `(N, 2, H, W)` in physical units, NaN where unknown.
        observed: The cells that are observed, boolean `(N, 1, H, W)`.
        single: Observed values of cells where the other component is missing, boolean `(N, 2, H, W)`.
        y: The observed values `(N, 2, H, W)` in physical units, NaN elsewhere.
        sigma_obs: Their errors in physical units, `(N, 1, 1, 1)`, or `(N, C, H, W)` as `ellipses.py` has them.
        grid: The grid.
        context: What a network is conditioned on beside, `(N, C, H, W)`, in its units.
        sensor: The observation operator with what it recorded of these cases, where it recorded anything.
        frames: Of sequences, the numbers of their frames in the series, `(N, T)`, each its own; see `frame_numbers`.
        physics: What is known of these cases beside, where that differs from one to the other.

    Shapes are those of snapshots; those of sequences have T after N.
    """

    numbers: list[int] | list[list[int]]
    truth: Tensor
    observed: Tensor
    single: Tensor
    y: Tensor
    sigma_obs: Tensor
    grid: Grid
    context: Tensor | None = None
    sensor: Sensor | None = None
    frames: list[list[int]] | None = None
    physics: NoPhysics | None = None

    @property
    def noise_numbers(self) -> list[int] | list[list[int]]:
        """The numbers that the noise of a case is made of: its snapshot's, or those of its frames."""
        return self.numbers if self.frames is None else self.frames

    def observation(self, normalizer: Normalizer, device: torch.device) -> Observation:
        """Returns what a denoiser is conditioned on, normalised, on its device."""
        known = self.observed | self.single
        y = torch.where(known, normalizer.normalize(self.y.to(normalizer.std.device)).cpu(), 0.0)
        valid = self.grid.valid.expand(*self.y.shape[:-3], 1, -1, -1)
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

    def blind(self, cells: Tensor) -> Cases:
        """Returns the same cases with nothing observed in some cells, boolean `(..., 1, H, W)`: what is known stays."""
        return replace(
            self,
            observed=self.observed & ~cells,
            single=self.single & ~cells,
            y=self.y.masked_fill(cells, torch.nan),
            sensor=None if self.sensor is None else self.sensor.within(~cells),
        )

    def snapshots(self, chosen: Tensor) -> Cases:
        """Returns some of the frames of sequences, boolean `(N, T)`, or of snapshots, `(N,)`, as cases of snapshots.

        None of them may be missing.
        """
        numbers = np.asarray(self.numbers)[chosen.numpy()].tolist()
        shape = self.truth.shape[:-3]

        def pick(values: Tensor) -> Tensor:
            return values.expand(*shape, *values.shape[-3:])[chosen]

        return replace(
            self,
            numbers=numbers,
            frames=None,
            truth=pick(self.truth),
            observed=pick(self.observed),
            single=pick(self.single),
            y=pick(self.y),
            sigma_obs=pick(self.sigma_obs),
            context=None if self.context is None else pick(self.context),
            sensor=None if self.sensor is None else self.sensor.select(chosen),
            physics=None if self.physics is None else self.physics.select(chosen),
        )

    def given(self, fields: Tensor) -> Cases:
        """Returns the same sequences with their first frames observed without error where finite, `(N, K, 2, H, W)`."""
        known, frames = fields.isfinite().all(dim=-3, keepdim=True), slice(fields.shape[1])
        y, observed, single = self.y.clone(), self.observed.clone(), self.single.clone()
        sigma = self.sigma_obs.expand(*self.y.shape[:-3], *self.sigma_obs.shape[-3:-2], *self.grid.shape).clone()
        y[:, frames] = torch.where(known, fields, y[:, frames])
        observed[:, frames] |= known
        single[:, frames] &= ~known
        sigma[:, frames] = torch.where(known, 0.0, sigma[:, frames])
        return replace(self, y=y, observed=observed, single=single, sigma_obs=sigma)

    def __getitem__(self, chosen: Sequence[int] | slice) -> Cases:
        """Returns some of the cases."""
        places = list(range(len(self.numbers))[chosen]) if isinstance(chosen, slice) else list(chosen)
        index = torch.tensor(places, dtype=torch.long)
        return replace(
            self,
            numbers=[self.numbers[place] for place in places],
            frames=None if self.frames is None else [self.frames[place] for place in places],
            truth=self.truth[index],
            observed=self.observed[index],
            single=self.single[index],
            y=self.y[index],
            sigma_obs=self.sigma_obs[index],
            context=None if self.context is None else self.context[index],
            sensor=None if self.sensor is None else self.sensor.select(index),
            physics=None if self.physics is None else self.physics.select(index),
        )

    @property
    def hidden(self) -> Tensor:
        """The cells to score: known, and not observed."""
        return self.truth.isfinite().all(dim=-3, keepdim=True) & ~self.observed


def make_cases(
    fields: Fields,
    indices: Sequence[int] | Integers,
    mask: MaskFunction,
    *,
    seed: int,
    sigma_obs: float | Tensor = 0.0,
    add_error: bool = False,
    grid: Grid | None = None,
    sensor: Sensor | None = None,
    hide: float = 0.0,
    along: bool = True,
    through: bool = False,
) -> Cases:
    """Returns a case for each snapshot or sequence, with what `mask` does not observe hidden.

    A case depends on the seed and its snapshots alone, and on the run where the mask goes through time.

    Arguments:
        fields: The data.
        indices: The snapshots, one case each, or the snapshots of sequences, `(N, T)`, -1 where a frame is missing.
        mask: What is observed of the cells that are measured.
        seed: Of masks and errors.
        sigma_obs: The error of the observations in physical units, a number or see `Cases`; cells where it is not known
            are not observed.
        add_error: Whether the observations are to be given this error; those of an instrument have it already.
        grid: The domain; that of the fields if None.
        sensor: The observation operator of an instrument, through which the truth is measured.
        hide: The share of the observed cells that is hidden, to be scored.
        along: Whether a mask that goes through time does so along the whole run; else it begins with each sequence,
            as it must where the last frames of each are to be foretold.
        through: Whether snapshots, too, are seen through what such a mask observes along their run.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    series, numbers = chosen.ndim == 2, chosen.ravel().tolist()
    read = partial(read_sequences, fields) if series else fields.read
    grid = fields.grid if grid is None else grid
    truth = read(chosen, partial=True).masked_fill(~grid.valid, torch.nan)
    sigma = torch.as_tensor(sigma_obs, dtype=truth.dtype)
    sigma = sigma.expand(len(truth), *(1,) * (truth.ndim - 1)) if sigma.ndim == 0 else sigma
    measured = truth if sensor is None or not add_error else sensor.measure(truth, grid)
    known = measured.isfinite() & is_known(sigma)
    drawn = {"valid": grid.valid, "seed": seed, "hide": hide, "along": along, "through": through}
    shown = shown_cells(fields, chosen, mask, known, **drawn)
    observed = known.all(dim=-3, keepdim=True) & shown
    single = known & ~known.all(dim=-3, keepdim=True) & shown
    y = torch.where(observed | single, measured, torch.nan)
    if add_error:
        # A missing frame has no number of its own, and nothing that an error could be added to.
        draws = [torch.randn(truth.shape[-3:], generator=seeded(seed, max(number, 0), 1)) for number in numbers]
        y = y + correlated(sigma, torch.stack(draws).view(truth.shape))
    frames = frame_numbers(fields, chosen).tolist() if series else None
    return Cases(chosen.tolist(), truth, observed, single, y, sigma, grid, frames=frames)


def shown_cells(
    fields: Fields,
    chosen: Integers,
    mask: MaskFunction,
    known: Tensor,
    *,
    valid: Tensor,
    seed: int,
    hide: float = 0.0,
    along: bool = True,
    through: bool = False,
) -> Tensor:
    """Returns the cells that are observed of those where any value is known, boolean `(N, 1, H, W)`.

    Arguments:
        fields: The data.
        chosen: The snapshots `(N,)`, or those of sequences `(N, T)`, -1 where a frame is missing.
        mask: What is observed.
        known: Where values are known, boolean `(N, C, H, W)`, of sequences with T after N.
        valid: The domain `(H, W)`.
        seed: See `make_cases`, as the others.
        hide: See there.
        along: See there.
        through: See there.
    """
    offered, numbers = known.any(dim=-3, keepdim=True), chosen.ravel().tolist()
    if not (goes_on(mask) and (through or chosen.ndim == 2)):
        pairs = zip(known.flatten(0, -4), numbers, strict=True)
        cells = [observed_cells(values, mask, seed, number, hide) for values, number in pairs]
    else:
        masks = (
            masks_of_runs(fields, chosen.reshape(len(chosen), -1), mask, valid, seed=seed)
            if along
            else masks_of_sequences(chosen, mask, offered, seed=seed)
        )
        pairs = zip(masks.flatten(0, 1) & offered.flatten(0, -4), numbers, strict=True)
        cells = [without_some(values, seed, number, hide) for values, number in pairs]
    return torch.stack(cells).view(offered.shape)


def masks_of_sequences(sequences: Integers, mask: Mask, offered: Tensor, *, seed: int) -> Tensor:
    """Returns what a mask that goes through time anew from the first frame of each sequence observes of it.

    Arguments:
        sequences: The snapshots of each, `(N, T)`, -1 where a frame is missing.
        mask: What is observed.
        offered: The cells where a value is known, boolean `(N, T, 1, H, W)`.
        seed: With the first snapshot of a sequence it makes the masks of its frames.
    """
    observed = torch.zeros_like(offered)
    for row, numbers in enumerate(sequences):
        if offered[row].any():
            own = seeded(seed, int(numbers[numbers >= 0][0]), 4)
            observed[row] = mask.sequence(1, len(numbers), offered[row, :, 0], own)[0]
    return observed


def observed_cells(known: Tensor, mask: MaskFunction, seed: int, number: int, hide: float) -> Tensor:
    """Returns the cells `(1, H, W)` that are observed of those where a value `(2, H, W)` is known."""
    cells = known.any(dim=0, keepdim=True)
    if not cells.any():  # a snapshot that measured nothing has nothing to observe
        return cells
    return without_some(mask(1, cells[0], seeded(seed, number, 0))[0] & cells, seed, number, hide)


def without_some(observed: Tensor, seed: int, number: int, hide: float) -> Tensor:
    """Returns the observed cells `(1, H, W)` of snapshot `number` but for a share of them."""
    if hide > 0 and observed.any():
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
        parts[k] = parts[k] + correlated(cases.sigma_obs, torch.stack(draws))
        if past is not None:
            pairs = zip(parts[k].isfinite(), earlier, strict=True)
            shown[k] = torch.stack([observed_cells(known, past, seed, max(n, 0), 0.0) for known, n in pairs])
    scale = Normalizer(normalizer.mean.cpu(), normalizer.std.item())
    return replace(cases, context=context.channels(parts, scale, shown))

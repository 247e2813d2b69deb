"""Batches for training and validation. Batch k is a function of the seed and k: to resume is to go on counting.

A sample is a snapshot `(2, H, W)` or, where the fields are to be seen as sequences (`dataset.frames`), T frames of one
run `(T, 2, H, W)`. What is random about a sample - its window, its symmetry, its level of noise, the error of its
observation - is the same in all of its frames; only masks go through time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.augment import Augmentation
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import MaskFunction, draw, draw_sequence, seeded, window_grid, windows
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Integers, Sequences, read_sequences
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.physics.grid import Grid


@dataclass(frozen=True)
class Batch:
    """What one evaluation of the loss needs; see `denoising_loss`.

    Attributes:
        drawn: The noise of all samples of the batch that this is a part of; None of a whole batch.
        first: The number of the first sample in that batch.
    """

    x0: Tensor
    measured: Tensor
    observation: Observation
    t: Tensor
    noise: Tensor
    drawn: Tensor | None = None
    first: int = 0

    def to(self, device: torch.device) -> Batch:
        """Returns the same on `device`; from pinned memory, so that the copy waits for nothing."""
        if device.type != "cuda":
            return self

        def move(value: Tensor) -> Tensor:
            return value.contiguous().pin_memory().to(device, non_blocking=True)

        x0, measured, t, noise = (move(value) for value in (self.x0, self.measured, self.t, self.noise))
        drawn = None if self.drawn is None else move(self.drawn)
        return Batch(x0, measured, self.observation.apply(move), t, noise, drawn, self.first)

    def __getitem__(self, index: slice) -> Batch:
        """The samples that `index`, of step 1, selects; their part of the whole batch is remembered."""
        parts = (getattr(self, name)[index] for name in ("x0", "measured", "observation", "t", "noise"))
        drawn = self.noise if self.drawn is None else self.drawn
        return Batch(*parts, drawn, self.first + index.indices(len(self.t))[0])

    def lent(self, members: int) -> Tensor:
        """Returns the noise of each sample and of those before it in the whole batch, `(members, B, ...)`.

        So it is the same in whatever parts a batch is worked on, by one process or by many.
        """
        drawn = self.noise if self.drawn is None else self.drawn
        own = self.first + torch.arange(len(self.t), device=drawn.device)
        return torch.stack([drawn[(own - k) % len(drawn)] for k in range(members)])


@dataclass(frozen=True)
class Batches:
    """Batches from the snapshots `indices`, in an order that is shuffled anew after each pass through all of them.

    Where the fields are to be seen as sequences, those that lie wholly within the snapshots are passed through.

    Arguments:
        fields: The data.
        indices: The snapshots to draw from.
        normalizer: Physical to normalised units.
        diffusion: Draws the training times and completes the observation.
        mask: Draws what is observed.
        augmentation: Transforms what a network sees, the anomalies of its windows; None leaves them as they are.
        size: Samples in a batch.
        seed: One seed gives one sequence of batches.
        sigma_obs: The error of an observation is uniform up to this, in standard deviations of the data.
        dropout: The share of samples without observations, so that the network is the unconditional prior as well;
            each part of a context is left out as often, by itself.
        window: `(h, w)`: samples are windows of this size, anywhere in the fields; None takes the fields whole.
        context: What the network is conditioned on beside the observation.

    Raises:
        UserError: No sequence lies within the snapshots.
    """

    fields: Fields
    indices: Sequence[int]
    normalizer: Normalizer
    diffusion: Diffusion
    mask: MaskFunction
    augmentation: Augmentation | None
    size: int
    seed: int
    sigma_obs: float = 0.1
    dropout: float = 0.1
    window: tuple[int, int] | None = None
    context: Context | None = None

    def __post_init__(self) -> None:
        len(self.samples)  # found out before the first batch

    @cached_property
    def samples(self) -> Sequence[int] | Integers:
        """What there is to draw from: the snapshots `(N,)`, or the snapshots of all sequences `(K, T)`."""
        return self.indices if self.fields.frames == 1 else Sequences.of(self.fields, self.indices).indices

    @property
    def grid(self) -> Grid:
        """The grid of the samples: that of the fields, or one of a window, with mean spacings."""
        return self.fields.grid if self.window is None else window_grid(self.fields.grid, self.window)

    def generator(self, stream: int, k: int) -> torch.Generator:
        """Returns the random numbers of batch k (stream 0) or of the order of pass k (stream 1)."""
        return seeded(self.seed, stream, k)

    def chosen(self, k: int) -> Tensor:
        """Returns the snapshots of batch k, `(size,)`, or `(size, T)` with -1 for a missing frame."""
        count = len(self.samples)
        positions = torch.arange(k * self.size, (k + 1) * self.size)
        passes = positions.div(count, rounding_mode="floor")
        orders = {p: torch.randperm(count, generator=self.generator(1, p)) for p in passes.unique().tolist()}
        places = zip(passes.tolist(), (positions % count).tolist(), strict=True)
        return torch.as_tensor(np.asarray([self.samples[int(orders[p][i])] for p, i in places], dtype=np.int64))

    def __call__(self, k: int, source: int | None = None) -> Batch:
        """Returns batch k, on the CPU.

        Where it has a source, a batch of that number gives it windows, symmetries, masks, errors and levels: it has
        snapshots and noise of its own.
        """
        generator, chosen = self.generator(0, k if source is None else source), self.chosen(k)
        own = generator if source is None else self.generator(2, k)
        read = self.fields.read if chosen.ndim == 1 else partial(read_sequences, self.fields)
        x0, valid = self.normalizer.normalize(read(chosen)), self.fields.grid.valid
        context = None if self.context is None else self.context_channels(chosen, generator)
        if self.window is not None:
            cut = windows(self.fields.grid, self.window, self.size, generator)
            x0, valid = cut(x0), cut(valid.expand(self.size, 1, -1, -1))
            context = None if context is None else cut(context)
        if self.augmentation is not None:
            move = partial(self.augmentation.apply, parameters=self.augmentation.draw(self.size, generator))
            x0, valid = move(x0), valid if valid.ndim == 2 else move(valid)
            context = None if context is None else self.context.moved(context, move)
        valid = valid if valid.ndim == 2 else valid[:, 0]
        measured = x0[..., :1, :, :].isfinite()
        x0 = torch.where(measured, x0, 0.0)
        observed = self.masks(self.size, valid, generator) & measured
        sigma_y = self.sigma_obs * torch.rand(self.size, *(1,) * (x0.ndim - 1), generator=generator)
        y = x0 + sigma_y * torch.randn(x0.shape, generator=own)
        # A cell that was not measured has no noisy value either: to the network it lies outside the domain.
        observation = self.diffusion.with_background(Observation(y, observed, sigma_y, measured), self.grid)
        silent = torch.rand(self.size, generator=generator) < self.dropout
        t = self.diffusion.sample_times(self.size, generator)
        observation = replace(observation.forget(silent), context=context)
        return Batch(x0, measured, observation, t, torch.randn(x0.shape, generator=own))

    def masks(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Returns masks of n samples, `(n, 1, H, W)` or `(n, T, 1, H, W)`, on one domain or one a sample."""
        frames = self.fields.frames
        if frames == 1:
            return draw(self.mask, n, valid, generator)
        return draw_sequence(self.mask, n, frames, valid=valid, generator=generator)

    def context_channels(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the channels of a context, each part left out now and then.

        Half of the earlier fields through a mask.
        """
        land = ~self.fields.grid.valid
        parts = [part.masked_fill(land, torch.nan) for part in self.context.parts(self.fields, chosen)]
        ones = (1,) * (chosen.ndim + 2)
        shown = [torch.rand(self.size, *ones, generator=generator) >= self.dropout for _ in parts]
        for lag in range(len(self.context.history)):
            whole = torch.rand(self.size, 1, 1, 1, generator=generator) < 0.5
            shown[lag] = shown[lag] & (whole | self.mask(self.size, self.fields.grid.valid, generator))
        return self.context.channels(parts, self.normalizer, shown)


@contextmanager
def prefetched(batches: Batches, first: int, device: torch.device) -> Iterator[Iterator[Batch]]:
    """The batches from number `first` on; beside a GPU a thread makes the next while one is worked on."""
    if device.type == "cpu":
        yield (batches(k) for k in itertools.count(first))
        return
    with ThreadPoolExecutor(1) as pool:

        def stream() -> Iterator[Batch]:
            ahead = pool.submit(batches, first)
            for k in itertools.count(first + 1):
                batch, ahead = ahead.result(), pool.submit(batches, k)
                yield batch.to(device)

        yield stream()

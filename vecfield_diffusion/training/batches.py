"""Batches for training and validation. Batch k is a function of the seed and k: to resume is to go on counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.augment import Augmentation
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation

#: `(n, valid (H, W), generator) -> observed (n, 1, H, W)`
MaskFunction = Callable[[int, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Batch:
    """What one evaluation of the loss needs; see `denoising_loss`."""

    x0: Tensor
    measured: Tensor
    observation: Observation
    t: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; from pinned memory, so that the copy waits for nothing."""
        if device.type != "cuda":
            return self

        def move(value: Tensor) -> Tensor:
            return value.contiguous().pin_memory().to(device, non_blocking=True)

        x0, measured, t, noise = (move(value) for value in (self.x0, self.measured, self.t, self.noise))
        return Batch(x0, measured, self.observation.apply(move), t, noise)

    def __getitem__(self, index: slice) -> Batch:
        """The samples that `index` selects."""
        return Batch(*(getattr(self, name)[index] for name in ("x0", "measured", "observation", "t", "noise")))


@dataclass(frozen=True)
class Batches:
    """Batches from the snapshots `indices`, in an order that is shuffled anew each time all have been seen.

    Arguments:
        fields: The data.
        indices: The snapshots to draw from.
        normalizer: Physical to normalised units.
        diffusion: Draws the training times and completes the observation.
        mask: Draws what is observed.
        augmentation: Transforms the fields; None leaves them as they are.
        size: Samples in a batch.
        seed: One seed gives one sequence of batches.
        sigma_obs: The error of an observation is uniform up to this, in standard deviations of the data.
        dropout: The share of samples that are told nothing, so that the network is the unconditional prior as well.
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

    def generator(self, stream: int, k: int) -> torch.Generator:
        """The random numbers of batch k (stream 0) or of the order of pass k (stream 1)."""
        return seeded(self.seed, stream, k)

    def chosen(self, k: int) -> Tensor:
        """The snapshots of batch k, `(size,)`."""
        count = len(self.indices)
        positions = torch.arange(k * self.size, (k + 1) * self.size)
        passes = positions.div(count, rounding_mode="floor")
        orders = {p: torch.randperm(count, generator=self.generator(1, p)) for p in passes.unique().tolist()}
        places = zip(passes.tolist(), (positions % count).tolist(), strict=True)
        return torch.tensor([self.indices[int(orders[p][i])] for p, i in places])

    def __call__(self, k: int) -> Batch:
        """Batch k, on the CPU."""
        generator = self.generator(0, k)
        velocity = self.fields.read(self.chosen(k))
        if self.augmentation is not None:
            velocity = self.augmentation.apply(velocity, self.augmentation.draw(self.size, generator))
        measured = velocity[:, :1].isfinite()
        x0 = torch.where(measured, self.normalizer.normalize(velocity), 0.0)
        observed = self.mask(self.size, self.fields.grid.valid, generator) & measured
        sigma_y = self.sigma_obs * torch.rand(self.size, 1, 1, 1, generator=generator)
        y = x0 + sigma_y * torch.randn(x0.shape, generator=generator)
        # A cell that was not measured has no noisy value either: to the network it lies outside the domain.
        told = self.diffusion.prepare(Observation(y, observed, sigma_y, measured), self.fields.grid)
        silent = torch.rand(self.size, generator=generator) < self.dropout
        t = self.diffusion.sample_times(self.size, generator)
        return Batch(x0, measured, told.forget(silent), t, torch.randn(x0.shape, generator=generator))


def seeded(seed: int, *numbers: int) -> torch.Generator:
    """A generator of its own for a seed and the numbers of what it is for, well mixed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]))

"""Ensembles of fields that agree with an observation.

Every member of every case has a random generator of its own, seeded by `(seed, case, member)`: a field depends neither
on the batch that it was computed in nor on how many others were, up to the rounding of the network's own arithmetic.
The noise of a sequence is that of its frames, one generator for each, seeded by `(seed, frame, member)` with the number
of the frame in its series: it does not depend on where a window or a piece of the series begins.
That rounding differs with the size of the batch: with a network in float32 fields differ by some 2e-5 standard
deviations of the data, in bf16 by up to 1e-2 (1.4e-2 was found between batches of 1 and 64 with churn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import deviations
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.base import NoiseFunction


def member_seed(seed: int, case: int, member: int) -> int:
    """Returns the seed of one field, well mixed so that neighbours have nothing in common."""
    return int(np.random.SeedSequence([seed, case, member]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeds_of(seed: int, number: int | Sequence[int], member: int) -> list[int]:
    """Returns the seed of each frame of a member of a case, one for a snapshot; see `member_seed`.

    Arguments:
        seed: That of the ensemble.
        number: The number of a snapshot, or those of the frames of a sequence, which all differ.
        member: The number of the member.

    Raises:
        ValueError: Negative numbers, or two frames of one number, whose noise would be the same.
    """
    numbers = np.atleast_1d(number).tolist()
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(f"numbers of the frames of a sequence must differ and be >= 0, got {numbers}")
    return [member_seed(seed, frame, member) for frame in numbers]


def member_noise(seeds: Sequence[int] | Sequence[Sequence[int]], shape: tuple[int, ...], like: Tensor) -> NoiseFunction:
    """Returns unit normal noise `(len(seeds), *shape)`, one generator a frame, drawn on the CPU for any device.

    Arguments:
        seeds: Of each snapshot its own, of each sequence those of its frames; see `seeds_of`.
        shape: That of a sample, `(2, H, W)` or `(T, 2, H, W)`.
        like: A tensor of the type and on the device that are asked for.

    Raises:
        ValueError: Seeds for another number of frames.
    """
    frames, own = math.prod(shape[:-3]), np.ravel(seeds).tolist()
    if len(own) != frames * len(seeds):
        raise ValueError(f"numbers must be those of {frames} frames of each case, got {len(own) / len(seeds):g}")
    generators = [torch.Generator().manual_seed(seed) for seed in own]

    def noise() -> Tensor:
        drawn = [torch.randn(shape[-3:], generator=g, dtype=like.dtype) for g in generators]
        return torch.stack(drawn).view(len(seeds), *shape).to(like.device)

    return noise


def report(progress: Callable[[int], None], fields: int, evaluations: int) -> None:
    """Reports to `progress` what `evaluations` of a batch of `fields` come to."""
    progress(fields * evaluations)


@torch.no_grad()
def sample_ensemble(
    denoiser: Denoiser,
    method: Method,
    observation: Observation,
    grid: Grid,
    *,
    members: int,
    seed: int,
    first: int = 0,
    numbers: Sequence[int] | Sequence[Sequence[int]] | None = None,
    batch: int = 64,
    progress: Callable[[int], None] = lambda fields: None,
) -> Tensor:
    """Returns members `(members, N, 2, H, W)` in physical units for N observations; outside the domain they are NaN.

    Of sequences, `(members, N, T, 2, H, W)`.

    Where the observation is exact (`sigma_y = 0`), observed cells keep the observed values.

    Arguments:
        denoiser: The trained denoiser.
        method: How the members are made, nothing left to `auto`.
        observation: N observations, normalised, on the device of the denoiser.
        grid: The grid of the fields.
        members: Fields for each observation.
        seed: One seed gives one ensemble.
        first: The number of the first member, where the members are made one after the other.
        numbers: The number of each case, which its seeds are made of, `(N,)`; of sequences those of the frames in their
            series, `(N, T)`, each its own. 0, 1, ... if None.
        batch: Fields computed at once.
        progress: Called after each evaluation with the number of fields that it worked on.
    """
    observation = denoiser.diffusion.with_background(observation, grid)
    frames = math.prod(observation.y.shape[1:-3])
    numbers = np.arange(len(observation) * frames).reshape(-1, frames) if numbers is None else numbers
    run = _Run(denoiser, method, grid.to(observation.y.device), frames)
    once_below = method.inpainting.once_below(observation)
    pairs = list(product(range(members), range(len(observation))))
    out: dict[tuple[int, int], Tensor] = {}
    for level, chunk in _chunks(pairs, once_below.tolist(), batch):
        cases = torch.tensor([case for _, case in chunk])
        part = observation[cases.to(observation.y.device)]
        noise = member_noise([seeds_of(seed, numbers[case], first + m) for m, case in chunk], part.y.shape[1:], part.y)
        out |= zip(chunk, run(part, cases, noise, level, partial(report, progress, len(chunk))), strict=True)
    return torch.stack([out[pair] for pair in pairs]).unflatten(0, (members, len(observation)))


def _chunks(
    pairs: list[tuple[int, int]], once_below: list[float], batch: int
) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """Yields at most `batch` pairs of member and case at a time whose steps are repeated down to one level."""
    for level in sorted(set(once_below)):
        alike = [pair for pair in pairs if once_below[pair[1]] == level]
        for first in range(0, len(alike), batch):
            yield level, alike[first : first + batch]


class _Run:
    """A method bound to a denoiser and a grid: samples of a batch of observations, in physical units on the CPU."""

    def __init__(self, denoiser: Denoiser, method: Method, grid: Grid, frames: int) -> None:
        sampler, diffusion = method.sampler, denoiser.diffusion
        self.method, self.grid, self.normalizer = method, grid, denoiser.normalizer
        self.levels = diffusion.levels(sampler.steps, sampler.schedule)
        differentiates = method.inpainting.differentiates or sampler.differences
        self.reference = denoiser.reference if sampler.takes_reference else lambda observation: None
        self.denoiser = method.guidance.wrap(denoiser.in_float32() if differentiates else denoiser)
        self.frames = frames
        varies = method.physics.varies
        self.rows = [] if varies else list(method.physics.rows(denoiser.normalizer, grid, frames))

    def __call__(
        self,
        part: Observation,
        cases: Tensor,
        noise: NoiseFunction,
        once_below: float,
        progress: Callable[[int], None],
    ) -> Tensor:
        """Returns one field for each observation, those of `cases`; steps are repeated above the level `once_below`."""
        method, normalizer, grid = self.method, self.normalizer, self.grid
        physics = method.physics
        rows = self.rows
        if physics.varies:
            rows = list(physics.select(cases).rows(normalizer, grid, self.frames))
        if method.sensor is not None:
            rows = [*method.sensor.select(cases).rows(part, normalizer, grid), *rows]
            part = part.nothing()
        inpainting = method.inpainting
        bound = inpainting.bind(self.denoiser, part, rows)
        x = method.sampler.sample(
            method.physics.guide(bound, normalizer, grid),
            self.levels,
            noise,
            inpainting.hook(part, noise, bound, method.sampler.steps),
            progress,
            start=inpainting.start(part),
            repeats=inpainting.repeats,
            repeat_above=once_below,
            valid=part.valid,
            reference=self.reference(part),
        )
        x = torch.where(part.known & (deviations(part.sigma_y) == 0), part.y, x)
        x = method.physics.finish(x, part, normalizer, grid)
        return torch.where(part.valid, normalizer.denormalize(x), torch.nan).cpu()

"""Ensembles of fields that agree with an observation.

Every member of every case has a random generator of its own, seeded by `(seed, case, member)`: a field depends neither
on the batch that it was computed in nor on how many others were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.cfg import Guidance, NoGuidance
from vecfield_diffusion.guidance.inpainting import Conditional, Inpainting
from vecfield_diffusion.guidance.physics import NoPhysics
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.base import NoiseFunction, Sampler


def member_seed(seed: int, case: int, member: int) -> int:
    """The seed of one field, well mixed so that neighbours have nothing in common."""
    return int(np.random.SeedSequence([seed, case, member]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def member_noise(seeds: list[int], shape: tuple[int, ...], like: Tensor) -> NoiseFunction:
    """Unit normal noise `(len(seeds), *shape)`, one generator a sample; drawn on the CPU, so the same on any device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=g, dtype=like.dtype) for g in generators]).to(like.device)

    return noise


def report(progress: Callable[[int], None], fields: int, evaluations: int) -> None:
    """Tells `progress` what `evaluations` of a batch of `fields` come to."""
    progress(fields * evaluations)


@torch.no_grad()
def sample_ensemble(
    denoiser: Denoiser,
    sampler: Sampler,
    inpainting: Inpainting,
    physics: NoPhysics,
    observation: Observation,
    grid: Grid,
    members: int,
    seed: int,
    numbers: Sequence[int] | None = None,
    batch: int = 64,
    progress: Callable[[int], None] = lambda fields: None,
    guidance: Guidance | None = None,
    sensor: Sensor | None = None,
) -> Tensor:
    """Members `(members, N, 2, H, W)` in physical units for N observations; outside the domain they are NaN.

    Where the observation is exact (`sigma_y = 0`), observed cells keep the observed values.

    Arguments:
        observation: N observations, normalised, on the device of the denoiser.
        grid: The grid of the fields.
        members: Fields for each observation.
        seed: One seed gives one ensemble.
        numbers: The number of each case, which its seeds are made of; 0 to N - 1 if None.
        batch: Fields computed at once.
        progress: Told of each evaluation how many fields it worked on.
        guidance: Of the denoiser itself; none if None.
        sensor: What the observed values are to the method, where they are not velocities of single cells.
    """
    diffusion = denoiser.diffusion
    levels, observation = diffusion.levels(sampler.steps, sampler.grid), diffusion.with_background(observation, grid)
    numbers = range(len(observation)) if numbers is None else numbers
    grid = grid.to(observation.y.device)
    source = (guidance or NoGuidance()).wrap(denoiser.in_float32() if inpainting.differentiates else denoiser)
    pairs = list(product(range(members), range(len(observation))))
    out = []
    for first in range(0, len(pairs), batch):
        chunk = pairs[first : first + batch]
        given = observation[torch.tensor([case for _, case in chunk], device=observation.y.device)]
        noise = member_noise([member_seed(seed, numbers[case], m) for m, case in chunk], given.y.shape[1:], given.y)
        rows = list(physics.rows(denoiser.normalizer, grid))
        if sensor is not None:
            here = sensor.select(torch.tensor([case for _, case in chunk]))
            rows, given = [*here.rows(given, denoiser.normalizer, grid), *rows], given.nothing()
        bound = inpainting.bind(source, given, rows)
        hook, told = inpainting.hook(given, noise, bound, sampler.steps), partial(report, progress, len(chunk))
        guided = physics.guide(bound, denoiser.normalizer, grid)
        # Below the error of the observation nothing holds the known cells: repeated steps would forget them.
        repeats = {"repeats": inpainting.repeats, "repeat_above": given.sigma_y.max().item()}
        # The prior is told no observation, nor a background that is made of it.
        start = given.background if isinstance(inpainting, Conditional) else None
        x = sampler.sample(guided, levels, noise, hook, told, start=start, valid=given.valid, **repeats)
        x = torch.where(given.known & (given.sigma_y == 0), given.y, x)
        x = physics.finish(x, given, denoiser.normalizer, grid)
        out.append(torch.where(given.valid, denoiser.normalizer.denormalize(x), torch.nan).cpu())
    return torch.cat(out).unflatten(0, (members, len(observation)))

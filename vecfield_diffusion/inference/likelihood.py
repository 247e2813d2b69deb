"""The likelihood of whole fields under a trained denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.inpainting import Bound
from vecfield_diffusion.inference.ensemble import member_noise, report, seeds_of
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.likelihood import log_likelihood

#: Where a likelihood comes from: the probability-flow equation with a trace of the Jacobian, or one energy.
Mode = Literal["hutchinson", "exact", "energy"]


@torch.no_grad()
def nats_per_value(
    denoiser: Denoiser,
    truth: Tensor,
    observation: Observation,
    grid: Grid,
    *,
    levels: Tensor,
    mode: Mode,
    seed: int,
    numbers: Sequence[int] | Sequence[Sequence[int]],
    batch: int = 64,
    progress: Callable[[int], None] = lambda fields: None,
) -> Tensor:
    """Returns ln p(truth | observation) over the number of values that are known, `(N,)`.

    The density is that of velocities in standard deviations of the data, blurred by the smallest noise level; in
    physical units it is ln(std) less. Cells that are not known are outside the domain, as in training. The network
    computes in float32: the trace of its Jacobian is a small difference of large numbers.

    Arguments:
        denoiser: The trained denoiser.
        truth: Fields `(N, 2, H, W)` in physical units, NaN where unknown.
        observation: What they are conditioned on, normalised, on the device of the denoiser.
        grid: The grid of the fields.
        levels: See `log_likelihood`.
        mode: `exact`, one vector-Jacobian product a value and level, `hutchinson`, one random one a level, or
            `energy`, one evaluation of `Denoiser.energy` at the smallest level and no others.
        seed: Of the probes of `hutchinson`.
        numbers: The number of each case, which its probes are made of; see `sample_ensemble`.
        batch: Fields computed at once.
        progress: Called after each evaluation with the number of fields that it worked on.
    """
    exact = denoiser.in_float32()
    truth = truth.to(observation.y.device)
    known = truth.narrow(-3, 0, 1).isfinite() & observation.valid
    observation = denoiser.diffusion.with_background(
        replace(observation, valid=known, observed=observation.observed & known), grid
    )
    x0 = torch.where(known, denoiser.normalizer.normalize(truth), 0.0)
    out = []
    for first in range(0, len(truth), batch):
        chosen = slice(first, first + batch)
        part, worked = observation[chosen], partial(report, progress, len(x0[chosen]))
        if mode == "energy":
            lowest = torch.full_like(x0[chosen].flatten(1)[:, 0], levels[-2].item())
            nats = -denoiser.energy(x0[chosen], lowest, part)
            worked(1)
        else:
            noise = member_noise([seeds_of(seed, number, 0) for number in numbers[chosen]], part.y.shape[1:], part.y)
            bound = Bound(exact, part)
            nats = log_likelihood(bound, x0[chosen], levels, mode, noise, 1, part.valid, worked, part.background)
        out.append((nats / (2 * part.valid.flatten(1).sum(1))).cpu())
    return torch.cat(out)

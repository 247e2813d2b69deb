"""The likelihood of a field under a denoiser, by the probability-flow ODE (Song et al., ICLR 2021, section 4.3).

Along `dz/ds = (z - D(z, s)) / s` the density changes as the flow spreads. With d values, l = ln s and J = dD/dz,

    ln p(z_0, s_min) = ln N(z_1; start, s_max^2 I) + integral over l of (d - tr J),

from `z_0 = x0` at the smallest positive level to z_1 at the largest. `d` integrates to `d ln(s_max / s_min)` exactly;
the path is by Heun's method in s and tr J by the trapezium rule in l at the states of the path: second order both.

The trace is exact, one vector-Jacobian product for every value, or the estimate of Hutchinson (1989): the mean of
`v^T J v` over random sign vectors v, which stay the same along the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.samplers.base import BoundDenoiser, LevelDenoiser, NoiseFunction, Progress, silent

#: `x_hat, z -> (B,)`, the trace of the Jacobian of x_hat by z.
Trace = Callable[[Tensor, Tensor], Tensor]


def log_likelihood(
    denoiser: BoundDenoiser,
    x0: Tensor,
    levels: Tensor,
    mode: Literal["hutchinson", "exact"],
    noise: NoiseFunction | None = None,
    probes: int = 1,
    valid: Tensor | None = None,
    progress: Progress = silent,
    start: Tensor | None = None,
) -> Tensor:
    """Returns the logarithm of the density `(B,)`, in nats, of the fields at the smallest positive level.

    It is the density of `x0 + s_min eps` at `x0`. A run costs two evaluations a step and one more, for as many steps as
    there are intervals between positive levels.

    Arguments:
        denoiser: E[x0 | z], differentiable in z.
        x0: `(B, 2, H, W)`, normalised.
        levels: `(n + 1,)`, falling to 0, n >= 2.
        mode: `exact`, or `hutchinson`, which is unbiased.
        noise: Where the signs of the probes come from; not needed for `exact`.
        probes: The number of sign vectors.
        valid: Cells that count, `(B, 1, H, W)`; all if None. Whatever `x0` holds elsewhere changes nothing.
        progress: Told of each evaluation of the denoiser.
        start: `(B, 2, H, W)`, the mean of the state at the largest level; 0 if None.

    Raises:
        ValueError: Another mode, no noise or no probes for `hutchinson`, or fewer than two positive levels.
    """
    ladder = levels.tolist()[-2::-1]
    if len(ladder) < 2 or ladder[0] <= 0 or any(s >= r for s, r in pairwise(ladder)):
        raise ValueError(f"levels must fall to 0 over at least two positive ones, got {levels.tolist()}")
    inside = torch.ones_like(x0, dtype=torch.bool) if valid is None else valid.expand_as(x0)
    trace = tracer(mode, inside, noise, probes)
    # Outside, the state is 0 and stays there.
    denoise = LevelDenoiser(lambda z, s: torch.where(inside, denoiser(z, s), 0.0), progress)

    z = torch.where(inside, x0, 0.0)
    x_hat, now = differentiate(denoise, z, ladder[0], trace)
    integral = torch.zeros_like(now)
    for s, r in pairwise(ladder):
        z = climb(denoise, z, x_hat, s, r)
        (x_hat, then), before = differentiate(denoise, z, r, trace), now
        integral, now = integral + math.log(r / s) * (before + then) / 2, then
    dimensions = inside.flatten(1).sum(1).double()
    away = z if start is None else torch.where(inside, z - start, 0.0)
    square = away.flatten(1).double().square().sum(1) / ladder[-1] ** 2
    normal = -(square + dimensions * math.log(2 * math.pi * ladder[-1] ** 2)) / 2
    return normal + dimensions * math.log(ladder[-1] / ladder[0]) - integral


def climb(denoise: LevelDenoiser, z: Tensor, x_hat: Tensor, s: float, r: float) -> Tensor:
    """Takes Heun's step from level `s` up to `r`, the denoiser already called at the first."""
    euler = torch.lerp(x_hat, z, r / s)
    with torch.no_grad():
        again = torch.lerp(euler, denoise(euler, r), (s - r) / r)
    return torch.lerp(again, z, 0.5)


def differentiate(denoise: LevelDenoiser, z: Tensor, s: float, trace: Trace) -> tuple[Tensor, Tensor]:
    """Returns the posterior mean and the trace of its Jacobian, cut off from the graph."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x_hat = denoise(z, s)
        return x_hat.detach(), trace(x_hat, z)


def tracer(mode: str, inside: Tensor, noise: NoiseFunction | None, probes: int) -> Trace:
    """Returns the trace over the values `inside`, in float64. The signs of `hutchinson` are drawn here, once."""
    if mode == "exact":
        return lambda x_hat, z: exact_trace(x_hat, z, inside)
    if mode != "hutchinson":
        raise ValueError(f"mode must be one of hutchinson, exact, got {mode}")
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    if noise is None:
        raise ValueError("noise must be given for mode hutchinson, got None")
    drawn = [noise() for _ in range(probes)]
    signs = [torch.where(inside, torch.where(eps < 0, -1.0, 1.0).to(eps), 0.0) for eps in drawn]
    return lambda x_hat, z: sum(quadratic(x_hat, z, sign) for sign in signs) / probes


def exact_trace(x_hat: Tensor, z: Tensor, inside: Tensor) -> Tensor:
    """Returns the sum `(B,)` of the diagonal of a Jacobian whose rows are 0 but `inside`."""
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    # A value outside the domain of every sample has no row to compute.
    for place in inside.any(0).flatten().nonzero()[:, 0].tolist():
        unit = torch.zeros_like(z)
        unit.flatten(1)[:, place] = 1
        total += quadratic(x_hat, z, unit)
    return total


def quadratic(x_hat: Tensor, z: Tensor, vector: Tensor) -> Tensor:
    """Returns `v^T J v` of every sample `(B,)`, in float64.

    One vector at a time: not every network is ready for vmap.
    """
    (row,) = torch.autograd.grad(x_hat, z, vector, retain_graph=True)
    return (row * vector).flatten(1).double().sum(1)

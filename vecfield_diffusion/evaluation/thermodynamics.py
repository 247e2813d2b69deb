"""Energy, heat and work along the paths of samples, and what they say of differences of free energy.

At the level s of noise the law p of the states has the energy U = -ln p, in units of the temperature: nats. Where a
path goes from level to level and from state to state, its energy changes by the work of the first and the heat of the
second (Sekimoto, Stochastic Energetics, 2010),

    W = sum U_{k+1}(x_k) - U_k(x_k),        Q = sum U_{k+1}(x_{k+1}) - U_{k+1}(x_k),        U_n(x_n) - U_0(x_0) = W + Q.

With F = -ln Z, Z the integral of exp(-U), the entropy is S = <U> - F and what a path makes of it W - (F_n - F_0): at
least 0 in the mean of paths that begin in equilibrium and move by steps in detailed balance. For these

    <exp(-W)> = Z_n / Z_0 (Jarzynski, 1997),        p_forward(W) / p_reverse(-W) = exp(W - F_n + F_0) (Crooks, 1999).

An energy gives U. A denoiser alone gives its differences, with Z = 1 at all levels: between states the integral of the
score along a line, between levels that of

    dU / d ln s = d - tr J - |D - z|^2 / s^2,        J = dD/dz, d values,

which is the diffusion of the density, `dp/d(s^2) = lap p / 2`. Langevin steps of finite size are not in detailed
balance; their share of the work, `ln q(x'|x) - ln q(x|x')` of the proposals beside their heat, makes the relations
exact whatever the step (Nilmeier et al., PNAS 2011; Neal, Statistics and Computing 2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logsumexp
from torch import Tensor

from vecfield_diffusion.axes import total
from vecfield_diffusion.samplers.base import BoundDenoiser, NoiseFunction, line_integral
from vecfield_diffusion.samplers.likelihood import Trace

Floats = NDArray[np.float64]


class Energies(Protocol):
    """Differences of the energy, in nats, of states `(B, 2, H, W)`."""

    def denoise(self, z: Tensor, s: float) -> Tensor:
        """Returns the posterior mean at level s."""

    def between_levels(self, z: Tensor, s: float, r: float) -> Tensor:
        """Returns `U_r(z) - U_s(z)`, `(B,)` in float64."""

    def between_states(self, z: Tensor, z_new: Tensor, s: float) -> Tensor:
        """Returns `U_s(z_new) - U_s(z)`, `(B,)` in float64."""


@dataclass(frozen=True)
class ByEnergy:
    """Differences of an energy.

    Arguments:
        denoiser: D.
        energy: `z (B, 2, H, W), s (B,) -> (B,)` in nats.
    """

    denoiser: BoundDenoiser
    energy: Callable[[Tensor, Tensor], Tensor]

    def denoise(self, z: Tensor, s: float) -> Tensor:
        """See `Energies`."""
        return self.denoiser(z, levels_of(z, s))

    def between_levels(self, z: Tensor, s: float, r: float) -> Tensor:
        """See `Energies`."""
        return self.energy(z, levels_of(z, r)).double() - self.energy(z, levels_of(z, s)).double()

    def between_states(self, z: Tensor, z_new: Tensor, s: float) -> Tensor:
        """See `Energies`."""
        level = levels_of(z, s)
        return self.energy(z_new, level).double() - self.energy(z, level).double()


@dataclass(frozen=True)
class ByScore:
    """Differences of -ln p of a denoiser alone, by Gauss-Legendre quadrature along ln s and the line between states.

    Arguments:
        denoiser: D, differentiable.
        trace: Of its Jacobian, see `samplers/likelihood.py`.
        inside: The values that count, boolean, broadcast to the states.
        nodes: Of the quadrature along ln s.
    """

    denoiser: BoundDenoiser
    trace: Trace
    inside: Tensor
    nodes: int = 2

    def denoise(self, z: Tensor, s: float) -> Tensor:
        """See `Energies`."""
        return self.denoiser(z, levels_of(z, s))

    def between_levels(self, z: Tensor, s: float, r: float) -> Tensor:
        """See `Energies`."""
        change = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for place, weight in quadrature(self.nodes):
            change += weight * self.rate(z, s * (r / s) ** place)
        return change * math.log(r / s)

    def rate(self, z: Tensor, s: float) -> Tensor:
        """Returns dU / d ln s, `(B,)`; see the module."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x_hat = self.denoise(z, s)
            trace = self.trace(x_hat, z)
        inside = self.inside.expand_as(z)
        square = total(torch.where(inside, x_hat - z, 0.0).detach().double().square())
        return total(inside).double() - trace - square / s**2

    def between_states(self, z: Tensor, z_new: Tensor, s: float) -> Tensor:
        """See `Energies`."""
        z, z_new = (torch.where(self.inside, state, 0.0) for state in (z, z_new))
        return -line_integral(self.denoise, z, z_new, s)


def levels_of(z: Tensor, s: float) -> Tensor:
    """Returns one level for the whole batch, `(B,)`."""
    return z.new_full((len(z),), s)


def quadrature(nodes: int) -> list[tuple[float, float]]:
    """Returns places and weights of Gauss-Legendre quadrature on [0, 1]."""
    places, weights = leggauss(nodes)
    return list(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


class Path(NamedTuple):
    """What a path of M samples over levels did, in nats.

    Arguments:
        levels: `(n + 1,)`.
        work: That of the step from each level to the next, `(n, M)`.
        heat: Likewise, `(n, M)`.
        end: The last states.
    """

    levels: Sequence[float]
    work: Tensor
    heat: Tensor
    end: Tensor


def along(energies: Energies, states: Tensor, levels: Sequence[float]) -> Path:
    """Returns work and heat along the states `(n + 1, M, 2, H, W)` of a sampler at levels `(n + 1,)` above 0."""
    steps = list(zip(pairwise(states), pairwise(levels), strict=True))
    work = [energies.between_levels(z, s, r) for (z, _), (s, r) in steps]
    heat = [energies.between_states(z, z_new, r) for (z, z_new), (_, r) in steps]
    return Path(levels, torch.stack(work), torch.stack(heat), states[-1])


def annealed(
    energies: Energies,
    start: Tensor,
    levels: Sequence[float],
    noise: NoiseFunction,
    *,
    corrections: int = 1,
    step_size: float = 0.1,
    reverse: bool = False,
) -> Path:
    """Returns work and heat of annealed Langevin dynamics from states in equilibrium at the first level.

    Forward, a level is left before the steps at the next one; a reverse path of the same levels the other way takes the
    steps at a level before it leaves it, so that it is the forward one backwards.

    Arguments:
        energies: Of the laws.
        start: States of the first level, `(M, 2, H, W)`.
        levels: `(n + 1,)`, all above 0.
        noise: Unit normal noise.
        corrections: Langevin steps at each level.
        step_size: Of a step, over the level squared.
        reverse: Whether the path is a reverse one.
    """
    z, work, heat = start, [], []
    for s, r in pairwise(levels):
        none = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        before = none if reverse else energies.between_levels(z, s, r)
        moved, gained = none, none
        for _ in range(corrections):
            z, beyond, change = langevin_step(energies, z, s if reverse else r, step_size, noise)
            moved, gained = moved + beyond, gained + change
        work.append(moved + (energies.between_levels(z, s, r) if reverse else before))
        heat.append(gained - moved)
    return Path(levels, torch.stack(work), torch.stack(heat), z)


def langevin_step(
    energies: Energies, z: Tensor, s: float, share: float, noise: NoiseFunction
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes a Langevin step of `share s^2`; returns the state, its work by the finite step, and the change of U.

    The work is `U(x') - U(x) + ln q(x'|x) - ln q(x|x')`, 0 for a step in detailed balance.
    """
    eps, drift = noise(), share * (energies.denoise(z, s) - z)
    new = z + drift + s * math.sqrt(2 * share) * eps
    back = z - new - share * (energies.denoise(new, s) - new)
    forth = new - z - drift
    change = energies.between_states(z, new, s)
    ratio = total(back.double().square() - forth.double().square()) / (4 * share * s**2)
    return new, change + ratio, change


class Difference(NamedTuple):
    """A difference of free energies in nats, its standard error, and the effective number of samples behind it."""

    value: float
    error: float
    samples: float


def bar(forward: Floats, reverse: Floats) -> Difference:
    """Returns F_1 - F_0 by the acceptance ratio of Bennett (J. Comput. Phys. 22, 245, 1976).

    With M = ln(n_0 / n_1) it solves `sum 1 / (1 + exp(M + W - dF)) = sum 1 / (1 + exp(-M + W' + dF))`, which has the
    least variance of all estimates from such values. The samples are those that count in the sums, of the smaller side.

    Arguments:
        forward: Work from 0 to 1, such as `U_1(x) - U_0(x)` of samples of 0, `(n_0,)`.
        reverse: Work from 1 to 0, of samples of 1, `(n_1,)`.

    Raises:
        ValueError: No work on one side, or work that is not finite.
    """
    forward, reverse = (np.asarray(work, dtype=np.float64) for work in (forward, reverse))
    if not (len(forward) and len(reverse) and np.isfinite(forward).all() and np.isfinite(reverse).all()):
        raise ValueError("forward and reverse must be finite numbers, at least one of each")
    shift = math.log(len(forward) / len(reverse))

    def sides(delta: float) -> tuple[Floats, Floats]:
        return -np.logaddexp(0, shift + forward - delta), -np.logaddexp(0, -shift + reverse + delta)

    def excess(delta: float) -> float:
        ours, theirs = sides(delta)
        return float(logsumexp(ours) - logsumexp(theirs))

    ends = np.concatenate([forward, -reverse])
    low, high = ends.min() - abs(shift) - 1, ends.max() + abs(shift) + 1
    value = brentq(excess, low, high, xtol=1e-12)
    counts = [math.exp(2 * logsumexp(side) - logsumexp(2 * side)) for side in sides(value)]
    error = sum(max(1 / n - 1 / len(work), 0.0) for n, work in zip(counts, (forward, reverse), strict=True)) ** 0.5
    return Difference(value, error, min(counts))


def effective(log_weights: Floats) -> float:
    """Returns the effective number of samples of weights, `(sum w)^2 / sum w^2`, from their logarithms."""
    return math.exp(2 * logsumexp(log_weights) - logsumexp(2 * np.asarray(log_weights)))


class Interval(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def jarzynski(work: Floats, difference: float, seed: int = 0, draws: int = 1000) -> Interval:
    """Returns `<exp(-W + dF)>`, 1 for a difference that is right, with the 95 % interval of the bootstrap.

    It checks a difference; it is no way to find one: rare paths of little work dominate the mean, and where `effective`
    of `-W` is small, they are not among the samples and the interval is too narrow.

    Arguments:
        work: W, `(n,)`.
        difference: dF.
        seed: Of the bootstrap.
        draws: Of the bootstrap.
    """
    values = np.exp(np.minimum(difference - np.asarray(work, dtype=np.float64), 700.0))  # the largest that is finite
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def crooks(forward: Floats, reverse: Floats) -> Interval:
    """Returns the slope of `ln p_forward(W) / p_reverse(-W)` over W with its 95 % interval; 1 where Crooks holds.

    By logistic regression, which has the largest likelihood of all that see which path a value of work is of (Shirts et
    al., Phys. Rev. Lett. 91, 140601, 2003). NaN, with an interval without ends, where the two do not overlap.

    Arguments:
        forward: Work of forward paths, `(n,)`.
        reverse: Work of reverse paths, `(m,)`.
    """
    values = np.concatenate([forward, -np.asarray(reverse)])
    first = np.arange(len(values)) < len(forward)
    if np.max(-np.asarray(reverse)) < np.min(forward):
        return Interval(math.nan, -math.inf, math.inf)
    design = np.stack([values - values.mean(), np.ones(len(values))], axis=1)
    found = np.zeros(2)
    for _ in range(100):
        share = expit(design @ found)
        fisher = (design * (share * (1 - share))[:, None]).T @ design
        step = np.linalg.solve(fisher + 1e-12 * np.eye(2), design.T @ (first - share))
        found += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    half = 1.96 * math.sqrt(np.linalg.inv(fisher + 1e-12 * np.eye(2))[0, 0])
    return Interval(float(found[0]), float(found[0]) - half, float(found[0]) + half)

"""Optimal interpolation in space and time: the posterior of a series given what was measured of it.

Values y = x + n of any frames, n ~ N(0, R) with R diagonal, give every other value of the trajectory x ~ N(m, S)

    x^ = m + S A^T (A S A^T + R)^-1 (y - A m)            Cov = S - S A^T (A S A^T + R)^-1 A S

where A picks the measured values; frames without any, before, between or after them, are no exception: those after the
last one are the forecast. A member of the posterior is one draw x_s, n_s of everything, corrected by what its own
measurements miss (Matheron's rule; Journel and Huijbregts 1978, Mining Geostatistics),

    x_s + S A^T (A S A^T + R)^-1 (y - A x_s - n_s - A m) + m

so that one factorisation serves the mean and all members, and members are whole trajectories: x_s and n_s are drawn
once for the series, whatever its blocks.

A long series is worked through block by block of frames: each is given the measured frames around it and, of their
values, those that tell most, in order of the distance to a cell that is not measured, and of time, in units of the
lengths over which correlations fall to a half. With all values of all frames in one block this is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.ndimage import distance_transform_edt

from vecfield_diffusion.evaluation.spacetime import Bools, Floats, Integers, SpaceTime, Values

_CHUNK = 4096  # values whose variance is computed at once


class Posterior:
    """The posterior of all frames given measured values.

    Arguments:
        prior: The Gaussian field.
        values: Which values were measured.
        noise: The variance of their errors, `(n,)`.
    """

    def __init__(self, prior: SpaceTime, values: Values, noise: Floats) -> None:
        self.prior, self.values = prior, values
        system = prior.covariance(values, values)
        system[np.diag_indices_from(system)] += noise
        self.factor = cholesky(system, lower=True, overwrite_a=True, check_finite=False)

    def correct(self, frames: range, innovation: Floats) -> Floats:
        """S A^T (A S A^T + R)^-1 d for innovations d `(m, n)`: `(m, len(frames), 2, H, W)`."""
        weights = cho_solve((self.factor, True), innovation.T, check_finite=False)
        return self.prior.apply(frames, self.values, weights)

    def variance(self, values: Values) -> Floats:
        """The posterior variance of single values, `(len(values),)`."""
        before = self.prior.variance()[values.component, values.row, values.column]
        explained = np.zeros(len(values))
        for start in range(0, len(values), _CHUNK):
            part = np.arange(start, min(start + _CHUNK, len(values)))
            cross = self.prior.covariance(self.values, values.at(part))
            half = solve_triangular(self.factor, cross, lower=True, overwrite_b=True, check_finite=False)
            explained[part] = np.einsum("ij,ij->j", half, half)
        return before - explained


@dataclass(frozen=True)
class Filled:
    """A series that was filled.

    Attributes:
        mean: The posterior mean `(T, 2, H, W)`, NaN outside the domain.
        variance: The posterior variance, likewise; None where it was not asked for.
        members: Members `(M, T, 2, H, W)`, likewise.
    """

    mean: Floats
    variance: Floats | None
    members: Floats


@dataclass(frozen=True)
class Interpolation:
    """How a series is worked through.

    Arguments:
        prior: The Gaussian field.
        before: Measured frames before a block that it is given.
        after: Measured frames after it; 0 in real time.
        block: Frames of a block.
        budget: Measured values that a block is given, at most.
    """

    prior: SpaceTime
    before: int = 4
    after: int = 4
    block: int = 1
    budget: int = 2000
    _scales: tuple[float, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("before", 0), ("after", 0), ("block", 1), ("budget", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        space, time = self.prior.correlation()
        object.__setattr__(self, "_scales", (_half(space), _half(time)))

    def fill(
        self,
        series: Floats,
        noise: Floats | float = 0.0,
        *,
        frames: range | None = None,
        members: int = 0,
        seed: int = 0,
        with_variance: bool = False,
    ) -> Filled:
        """Fills the frames of a series.

        Arguments:
            series: What was measured, `(T, 2, H, W)`, NaN elsewhere.
            noise: The variance of the errors, a number or as the series.
            frames: The frames to fill; all if None. What was measured in others counts too.
            members: The number of members.
            seed: One seed gives one trajectory for each number of a member.
            with_variance: Whether the variance is wanted; it takes longer than the mean.

        Raises:
            ValueError: A series of another shape than the prior, or noise that is negative.
        """
        if series.ndim != 4 or series.shape[1:] != self.prior.mean.shape:
            raise ValueError(f"series must be (T, {', '.join(map(str, self.prior.mean.shape))}), got {series.shape}")
        noise = np.broadcast_to(np.asarray(noise, dtype=np.float64), series.shape)
        observed = np.isfinite(series) & self.prior.valid
        if not (noise[observed] >= 0).all():
            raise ValueError("noise must be >= 0 where something was measured")
        frames = range(len(series)) if frames is None else frames
        anomalies = np.where(observed, series - self.prior.mean, 0.0)
        drawn = [self._draw(len(series), noise, observed, seed, number) for number in range(members)]
        shape = (len(frames), *series.shape[1:])
        mean, variance = np.full(shape, np.nan), np.full(shape, np.nan) if with_variance else None
        out = np.full((members, *shape), np.nan)
        inside = np.broadcast_to(self.prior.valid, series.shape[1:])
        for block in self._blocks(frames):
            values = self._select(observed, block)
            here = slice(block.start - frames.start, block.stop - frames.start)
            posterior = Posterior(self.prior, values, values.of(noise))
            y = values.of(anomalies)
            innovations = np.stack([y, *(y - values.of(x + n) for x, n in drawn)])
            steps = posterior.correct(block, innovations)
            chosen = slice(block.start, block.stop)
            left = observed[chosen].copy()
            left[values.frame[_in(values, block)] - block.start, *_places(values.at(_in(values, block)))] = False
            mean[here] = np.where(inside, self._kept(steps[0], anomalies[chosen], left) + self.prior.mean, np.nan)
            for number, (x, n) in enumerate(drawn):
                member = self._kept(x[chosen] + steps[1 + number], anomalies[chosen] - n[chosen], left)
                out[number, here] = np.where(inside, member + self.prior.mean, np.nan)
            if variance is not None:
                targets = Values.where(np.broadcast_to(inside, left.shape) & ~left, block.start)
                part = np.where(inside, np.where(left, noise[chosen], 0.0), np.nan)
                part[targets.frame - block.start, *_places(targets)] = posterior.variance(targets)
                variance[here] = part
        return Filled(mean, variance, out)

    def _draw(self, frames: int, noise: Floats, observed: Bools, seed: int, number: int) -> tuple[Floats, Floats]:
        generator = np.random.default_rng([seed, number])
        x = self.prior.draw(frames, generator)
        errors = generator.standard_normal(noise.shape)
        return x, np.where(observed, np.sqrt(np.where(observed, noise, 0.0)) * errors, 0.0)

    @staticmethod
    def _kept(field: Floats, measured: Floats, left: Bools) -> Floats:
        """`field` with what was measured, but not among the values that count, in its place."""
        return np.where(left, measured, field)

    def _blocks(self, frames: range) -> Iterator[range]:
        for start in range(frames.start, frames.stop, self.block):
            yield range(start, min(start + self.block, frames.stop))

    def _select(self, observed: Bools, block: range) -> Values:
        """The measured values that a block is given."""
        some = np.flatnonzero(observed.any(axis=(1, 2, 3)))
        early, late = some[some < block.start], some[some >= block.stop]
        within = some[(some >= block.start) & (some < block.stop)]
        times = np.concatenate((early[max(0, len(early) - self.before) :], within, late[: self.after]))
        chosen = np.zeros_like(observed)
        chosen[times] = observed[times]
        values = Values.where(chosen)
        if len(values) <= self.budget:
            return values
        hidden = (self.prior.valid & ~observed[block.start : block.stop].all(axis=1)).any(axis=0)
        hidden = hidden if hidden.any() else self.prior.valid
        space, time = self._scales
        # Cells at the same distance are taken in a random order, always the same, not from one side.
        distance = distance_transform_edt(~hidden) + np.random.default_rng(0).random(hidden.shape)
        away = np.maximum(np.maximum(block.start - values.frame, values.frame - block.stop + 1), 0)
        rank = np.hypot(distance[values.row, values.column] / space, away / time)
        return values.at(np.sort(np.argsort(rank, kind="stable")[: self.budget]))


def _in(values: Values, block: range) -> Bools:
    return (values.frame >= block.start) & (values.frame < block.stop)


def _places(values: Values) -> tuple[Integers, Integers, Integers]:
    return values.component, values.row, values.column


def _half(correlation: Floats) -> float:
    """Where a correlation first falls to a half, in steps: at least 1, at most to its end."""
    below = np.flatnonzero(correlation < 0.5)
    return float(max(1, below[0] if len(below) else len(correlation)))

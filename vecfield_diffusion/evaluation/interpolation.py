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

from collections.abc import Iterable, Iterator, Sequence
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
        variance: The posterior variance, likewise, NaN also where it was not asked for; None where none was.
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
        with_variance: bool | Bools = False,
    ) -> Filled:
        """Fills the frames of a series; arguments and errors as for `parts`.

        Arguments:
            series: What was measured.
            noise: The variance of the errors.
            frames: The frames to fill; all if None. What was measured in others counts too.
            members: The number of members.
            seed: Of the members.
            with_variance: Whether the variance is wanted, or of which values.
        """
        frames = range(len(series)) if frames is None else frames
        blocks = [
            range(start, min(start + self.block, frames.stop))
            for start in range(frames.start, frames.stop, self.block)
        ]  # fmt: skip
        found = list(self.parts(series, noise, blocks, members=members, seed=seed, with_variance=with_variance))
        variance = None if with_variance is False else np.concatenate([part.variance for part in found])
        members_of = np.concatenate([part.members for part in found], axis=1)
        return Filled(np.concatenate([part.mean for part in found]), variance, members_of)

    def parts(
        self,
        series: Floats,
        noise: Floats | float,
        blocks: Iterable[range],
        *,
        members: int = 0,
        seed: int = 0,
        with_variance: bool | Bools = False,
    ) -> Iterator[Filled]:
        """Yields the frames of a series, filled a block at a time.

        Arguments:
            series: What was measured, `(T, 2, H, W)`, NaN elsewhere.
            noise: The variance of the errors, a number or as the series.
            blocks: Consecutive frames that are filled at once.
            members: The number of members.
            seed: One seed gives one trajectory for each number of a member.
            with_variance: Whether the variance is wanted, which takes longer than the mean, or of which values, as the
                series; it is NaN elsewhere.

        Raises:
            ValueError: A series of another shape than the prior, or noise that is negative.
        """
        if series.ndim != 4 or series.shape[1:] != self.prior.mean.shape:
            raise ValueError(f"series must be (T, {', '.join(map(str, self.prior.mean.shape))}), got {series.shape}")
        noise = np.broadcast_to(np.asarray(noise, dtype=np.float64), series.shape)
        observed = np.isfinite(series) & self.prior.valid
        if not (noise[observed] >= 0).all():
            raise ValueError("noise must be >= 0 where something was measured")
        wanted = np.broadcast_to(with_variance, series.shape)
        anomalies = np.where(observed, series - self.prior.mean, 0.0)
        drawn = [self._draw(len(series), noise, observed, seed, number) for number in range(members)]
        for block in blocks:
            yield self._part(block, observed, anomalies, noise, drawn, wanted)

    def _part(
        self,
        block: range,
        observed: Bools,
        anomalies: Floats,
        noise: Floats,
        drawn: Sequence[tuple[Floats, Floats]],
        wanted: Bools,
    ) -> Filled:
        """One block; the arrays are those of the whole series."""
        values, inside, prior = self._select(observed, block), self.prior.valid, self.prior
        posterior = Posterior(prior, values, values.of(noise))
        y = values.of(anomalies)
        innovations = np.stack([y, *(y - values.of(x) - values.of(n) for x, n in drawn)])
        steps = posterior.correct(block, innovations)
        chosen = slice(block.start, block.stop)
        left = observed[chosen].copy()  # measured, but not among the values that count: these stay as they are
        left[values.frame[_in(values, block)] - block.start, *_places(values.at(_in(values, block)))] = False
        mean = np.where(left, anomalies[chosen], steps[0])
        shape = (len(drawn), *mean.shape)
        members = [
            np.where(left, anomalies[chosen] - n[chosen], x[chosen] + step)
            for step, (x, n) in zip(steps[1:], drawn, strict=True)
        ]
        mean, members = (
            np.where(inside, part + prior.mean, np.nan) for part in (mean, np.reshape(members, shape))
        )  # fmt: skip
        if not wanted[chosen].any():
            return Filled(mean, np.full_like(mean, np.nan), members)
        variance = np.where(inside & wanted[chosen] & left, noise[chosen], np.nan)
        targets = Values.where(inside & wanted[chosen] & ~left, block.start)
        variance[targets.frame - block.start, *_places(targets)] = posterior.variance(targets)
        return Filled(mean, variance, members)

    def _draw(self, frames: int, noise: Floats, observed: Bools, seed: int, number: int) -> tuple[Floats, Floats]:
        generator = np.random.default_rng([seed, number])
        x = self.prior.draw(frames, generator)
        errors = generator.standard_normal(noise.shape)
        return x, np.where(observed, np.sqrt(np.where(observed, noise, 0.0)) * errors, 0.0)

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

"""Optimal interpolation in space and time: the posterior of a series given what was measured of it.

Values y = x + n of any frames, n ~ N(0, R) with R diagonal but for the 2x2 blocks of cells, give every other value of
the trajectory x ~ N(m, S)

    x^ = m + S A^T (A S A^T + R)^-1 (y - A m)            Cov = S - S A^T (A S A^T + R)^-1 A S

where A picks the measured values; frames without any, before, between or after them, are no exception: those after the
last one are the forecast. A member of the posterior is one draw x_s, n_s of everything, corrected by what its own
measurements miss (Matheron's rule; Journel and Huijbregts 1978, Mining Geostatistics),

    x_s + S A^T (A S A^T + R)^-1 (y - A x_s - n_s - A m) + m

so that one factorisation serves the mean and all members, and members are whole trajectories: x_s and n_s are drawn
once for the series, whatever its blocks.

A long series is worked through block by block of frames: each is given the measured frames around it and, of their
values, those that tell most: of the cells nearest to one that is not measured, in units of the lengths over which
correlations fall to a half (`models/measured.py`). With all values of all frames in one block this is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vecfield_diffusion.ellipses import correlated, root
from vecfield_diffusion.evaluation.spacetime import Bools, Floats, SpaceTime
from vecfield_diffusion.models.measured import System, budget, nearest
from vecfield_diffusion.models.stationary import Values


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
        most: Measured values that a block is given, at most; what `models/measured.py` allows if None.
    """

    prior: SpaceTime
    before: int = 4
    after: int = 4
    block: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("before", 0), ("after", 0), ("block", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")

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
            noise: The variance of the errors, see `parts`.
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
            noise: The variance of the errors, a number or as the series; with a third channel, `(T, 3, H, W)`, that is
                the covariance of those of both components of a cell.
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
        noise = np.asarray(noise, dtype=np.float64)
        noise = noise if noise.ndim == 4 and noise.shape[1] == 3 else np.broadcast_to(noise, series.shape)
        observed = np.isfinite(series) & self.prior.valid
        if not (noise[:, :2][observed] >= 0).all():
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
        inside, prior = self.prior.valid, self.prior
        values = self._select(observed, block)
        y = _of(anomalies, values)
        first, last = (int(end(values.frame.tolist(), default=0)) for end in (min, max))
        level = torch.from_numpy(np.array(noise[first : last + 1]))
        system = System(prior.covariance, values, values.errors(level, first))
        innovations = np.stack([y, *(y - _of(x, values) - _of(n, values) for x, n in drawn)])
        steps = system.correct(torch.from_numpy(innovations), block).numpy()
        chosen = slice(block.start, block.stop)
        left = observed[chosen].copy()  # measured, but not among the values that count: these stay as they are
        here = values.at((values.frame >= block.start) & (values.frame < block.stop))
        left[_places(here, block.start)] = False
        mean = np.where(left, anomalies[chosen], steps[0])
        shape = (len(drawn), *mean.shape)
        members = [
            np.where(left, anomalies[chosen] - n[chosen], x[chosen] + step)
            for step, (x, n) in zip(steps[1:], drawn, strict=True)
        ]
        mean, members = (
            np.where(inside, part + prior.mean, np.nan) for part in (mean, np.reshape(members, shape))
        )  # fmt: skip
        variance = np.where(inside & wanted[chosen] & left, noise[chosen, :2], np.nan)
        targets = Values.where(torch.from_numpy(inside & wanted[chosen] & ~left), block.start)
        variance[_places(targets, block.start)] = system.variance(targets)
        return Filled(mean, variance, members)

    def _draw(self, frames: int, noise: Floats, observed: Bools, seed: int, number: int) -> tuple[Floats, Floats]:
        generator = np.random.default_rng([seed, number])
        x = self.prior.draw(frames, generator)
        errors = generator.standard_normal(x.shape)
        return x, np.where(observed, drawn(noise, observed, errors), 0.0)

    def _select(self, observed: Bools, block: range) -> Values:
        """The measured values that a block is given."""
        some = np.flatnonzero(observed.any(axis=(1, 2, 3)))
        early, late = some[some < block.start], some[some >= block.stop]
        within = some[(some >= block.start) & (some < block.stop)]
        times = np.concatenate((early[max(0, len(early) - self.before) :], within, late[: self.after]))
        first, last = min([block.start, *times]), max([block.stop - 1, *times])
        chosen = np.zeros_like(observed[first : last + 1])
        chosen[times - first] = observed[times]
        count = int(chosen.sum())
        most = budget(count) if self.most is None else self.most
        if count > most:
            hidden = np.zeros(chosen[:, 0].shape, dtype=bool)
            inside = hidden[block.start - first : block.stop - first]
            inside[:] = self.prior.valid & ~observed[block.start : block.stop].all(axis=1)
            if not hidden.any():
                inside[:] = self.prior.valid
            cells, sought = (torch.from_numpy(part) for part in (chosen.any(axis=1), hidden))
            chosen &= nearest(cells, sought, most // 2, self.prior.covariance.lengths()).numpy()[:, None]
        return Values.where(torch.from_numpy(chosen), first)


def drawn(noise: Floats, observed: Bools, white: Floats) -> Floats:
    """Returns errors made of unit normal noise `(T, 2, H, W)`; what they are where not observed does not matter.

    Arguments:
        noise: Their variances, `(T, 2, H, W)`, or `(T, 3, H, W)` with the covariances.
        observed: The values that have errors, `(T, 2, H, W)`.
        white: The noise.
    """
    if noise.shape[1] == 2:
        return np.sqrt(np.where(observed, noise, 0.0)) * white
    var_u, var_v, both = (torch.from_numpy(noise[:, [entry]]) for entry in range(3))
    seen = torch.from_numpy(observed)
    var_u = torch.where(seen[:, :1], var_u, torch.nan)
    return correlated(root(var_u, var_v, both), torch.from_numpy(white)).nan_to_num().numpy()


def _places(values: Values, first: int = 0) -> tuple[np.ndarray, ...]:
    """Where single values are in an array `(T, 2, H, W)` whose first frame has the number `first`."""
    return values.frame.numpy() - first, values.component.numpy(), values.row.numpy(), values.column.numpy()


def _of(series: Floats, values: Values) -> Floats:
    return series[_places(values)]

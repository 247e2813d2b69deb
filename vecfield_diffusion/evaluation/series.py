"""Filling with what was observed before and after: the yardsticks of a series.

`fit` sees training fields as frames at equal steps, `fill` estimates frames of another series from what is observed of
all of them, or with `past` of none that is later.

- interpolation in time: at every cell, linear between the values observed there; the last one where `past`;
- optimal interpolation in space and time: see `interpolation`; the covariance is chosen by `estimation.choose`;
- extended empirical orthogonal functions (Weare & Nasstrom 1982, Mon. Weather Rev. 110, 481): gappy POD of windows of
  frames, each one field;
- DINEOF of the matrix of all frames, gaps and all, beneath the training fields (Beckers & Rixen 2003; see `modes`). It
  fills all frames at once, whatever is later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vecfield_diffusion.data.sequences import LAGS
from vecfield_diffusion.evaluation.baseline import mean_field
from vecfield_diffusion.evaluation.covariance import Floats
from vecfield_diffusion.evaluation.estimation import Estimator, choose
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.modes import GappyPOD, fill_gaps
from vecfield_diffusion.physics.grid import Grid

#: Frames with observations before and after the one that is filled.
REACH = 4
#: Frames that are filled at once where members of them are drawn.
BLOCK = 4
#: Values of all windows of training together, and rows of the matrix of training, at most.
WINDOWS, ROWS = 4e7, 500
#: Training fields below which nothing is learnt of how they change.
ENOUGH = 10


class Law(NamedTuple):
    """What is said of a frame: the mean `(2, H, W)`, where known its standard deviation, and members `(M, 2, H, W)`."""

    mean: Floats
    std: Floats | None = None
    members: Floats | None = None


@dataclass(frozen=True)
class ObservedSeries:
    """What is observed of a series.

    Arguments:
        y: The values of frames at equal steps, `(T, 2, H, W)`, NaN where not observed.
        noise: The variance of their errors, likewise, or with their covariance `(T, 3, H, W)`; read where observed.
        frames: The frames that are wanted.
    """

    y: Floats
    noise: Floats
    frames: Sequence[int]


class SeriesBaseline(ABC):
    """A way to fill the frames of a series without a network; a subclass writes `_learn` and `fill`.

    Arguments:
        past: Whether nothing that was observed after a frame counts.

    Attributes:
        learnt: What was learnt, in words to be printed.
    """

    learnt = ""

    def __init__(self, past: bool = False) -> None:
        self.past = past

    def fit(self, training: Floats, grid: Grid, lags: int = LAGS) -> Self:
        """Learns from training frames `(T, 2, H, W)` at equal steps, NaN where not measured, whole frames too.

        Arguments:
            training: The frames.
            grid: The grid.
            lags: From how many frames on they are not correlated, at most.

        Raises:
            ValueError: Too few of them.
        """
        self.lags = lags
        self.grid, self.valid, self.mean = grid, grid.valid.cpu().numpy(), mean_field(training)
        self._learn(training)
        return self

    def _learn(self, training: Floats) -> None:  # noqa: B027 (some need nothing beyond the mean)
        """Takes from the training frames what the mean does not say."""

    @abstractmethod
    def fill(self, observations: ObservedSeries, members: int = 0, seed: int = 0) -> Iterator[Law]:
        """Yields the law of every frame that is wanted, NaN outside the domain.

        Arguments:
            observations: What is observed.
            members: How many members of a law are drawn; the same number is the same trajectory in all frames.
            seed: Of the members.
        """


class TimeInterpolation(SeriesBaseline):
    """Linear interpolation in time at every cell, the training mean where nothing was observed.

    Beyond the first and the last observation it is the nearest one; with `past` always the last.
    """

    def fill(self, observations: ObservedSeries, members: int = 0, seed: int = 0) -> Iterator[Law]:
        """See `SeriesBaseline.fill`."""
        for frame in observations.frames:
            known = observations.y[: frame + 1] if self.past else observations.y
            found = along_time(known, frame)
            yield Law(np.where(self.valid, np.where(np.isfinite(found), found, self.mean), np.nan))


class SpaceTimeInterpolation(SeriesBaseline):
    """Optimal interpolation in space and time: the posterior of a Gaussian field learnt from the training frames.

    All that is observed of a frame and of `REACH` frames before and after it counts, see `interpolation`.
    """

    def _learn(self, training: Floats) -> None:
        if np.isfinite(training).any(axis=(1, 2, 3)).sum() < ENOUGH:
            raise ValueError(f"fewer than {ENOUGH} training fields")
        choice = choose(training, self.valid, Estimator(self.grid.periodic, self.lags))
        self.field = choice.field
        self.learnt = choice.words

    def fill(self, observations: ObservedSeries, members: int = 0, seed: int = 0) -> Iterator[Law]:
        """See `SeriesBaseline.fill`."""
        way = Interpolation(self.field, before=REACH, after=0 if self.past else REACH)
        given = observations.y, observations.noise
        laws = way.parts(*given, _blocks(observations.frames, 1), with_variance=True)
        # Members change as the field does where their frames are corrected by the same observations.
        blocks = _blocks(observations.frames, 1 if self.past else BLOCK) if members else []
        drawn = chain.from_iterable(
            np.moveaxis(part.members, 0, 1) for part in way.parts(*given, blocks, members=members, seed=seed)
        )
        for law in laws:
            yield Law(law.mean[0], np.sqrt(law.variance[0].clip(min=0.0)), next(drawn, None))


class ExtendedEOF(SeriesBaseline):
    """Gappy POD of windows of `REACH` frames before, the frame, and unless `past` as many after it."""

    def _learn(self, training: Floats) -> None:
        self.frames = 1 + (REACH if self.past else 2 * REACH)
        measured = np.isfinite(training).any(axis=(1, 2, 3))
        starts = [s for s in range(len(training) - self.frames + 1) if measured[s : s + self.frames].all()]
        if len(starts) < ENOUGH:
            raise ValueError(f"fewer than {ENOUGH} windows of {self.frames} training fields without a missing one")
        most = max(ENOUGH, int(WINDOWS / (self.frames * training[0].size)))
        windows = [_tall(training[s : s + self.frames]) for s in starts[:: -(-len(starts) // most)]]
        tall = Grid(*(part.repeat(self.frames, *[1] * (part.ndim - 1)) for part in self._parts()))
        self.modes = GappyPOD().fit(np.stack(windows), tall)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.grid.valid.cpu(), self.grid.dx.cpu(), self.grid.dy.cpu()

    def fill(self, observations: ObservedSeries, members: int = 0, seed: int = 0) -> Iterator[Law]:
        """See `SeriesBaseline.fill`."""
        height = self.valid.shape[0]
        for frame in observations.frames:
            y, noise = (
                _tall(_window(part, frame, self.frames)) for part in (observations.y, observations.noise[:, :2])
            )
            observed = np.isfinite(y).all(axis=0)
            sigma = np.sqrt(np.where(observed, noise.mean(axis=0), 0.0))
            yield Law(self.modes.fill(y, observed, sigma)[:, REACH * height : (REACH + 1) * height])


class SpaceTimeDINEOF(SeriesBaseline):
    """DINEOF of the matrix of training fields and of all frames of the series with their gaps.

    The number of modes is the one that best fills tiles of 4 x 4 cells, of what was observed, that were put aside.
    """

    def _learn(self, training: Floats) -> None:
        rows = training[np.isfinite(training).any(axis=(1, 2, 3))]
        self.rows = self._flat(rows[:: -(-len(rows) // ROWS)])

    def fill(self, observations: ObservedSeries, members: int = 0, seed: int = 0) -> Iterator[Law]:
        """See `SeriesBaseline.fill`."""
        series = self._flat(observations.y)
        generator = np.random.default_rng(0)
        shape = (len(observations.y), *(-(-size // 4) for size in self.valid.shape))
        tiles = np.kron(generator.random(shape) < 0.1, np.ones((1, 4, 4), dtype=bool))
        height, width = self.valid.shape
        aside = np.zeros((len(self.rows) + len(series), series.shape[1]), dtype=bool)
        aside[len(self.rows) :] = np.tile(tiles[:, :height, :width][:, self.valid], 2)
        filled = fill_gaps(np.concatenate((self.rows, series)), aside)[len(self.rows) :]
        for frame in observations.frames:
            field = np.full((2, height, width), np.nan)
            field[:, self.valid] = filled[frame].reshape(2, -1) + self.mean[:, self.valid]
            yield Law(field)

    def _flat(self, series: Floats) -> Floats:
        return (series - self.mean)[:, :, self.valid].reshape(len(series), -1)


def along_time(series: Floats, frame: int) -> Floats:
    """Returns every value of a frame, `(2, H, W)`, interpolated linearly between the frames that have it.

    Beyond the first and the last of them it is the nearest one; NaN where no frame has it.
    """
    known = np.isfinite(series)
    times = np.arange(len(series))[:, None, None, None]
    early = np.where(known & (times <= frame), times, -1).max(axis=0)
    late = np.where(known & (times >= frame), times, len(series)).min(axis=0)
    none, before, after = (early < 0) & (late == len(series)), early >= 0, late < len(series)
    early, late = np.where(before, early, late), np.where(after, late, early)
    first, last = (np.take_along_axis(series, np.where(none, 0, at)[None], axis=0)[0] for at in (early, late))
    weight = np.where(late > early, (frame - early) / np.where(late > early, late - early, 1), 0.0)
    return np.where(none, np.nan, (1 - weight) * first + weight * last)


def _blocks(frames: Sequence[int], most: int) -> list[range]:
    """The frames as ranges of frames that follow one another, at most `most` of them."""
    found: list[range] = []
    for frame in frames:
        if found and frame == found[-1].stop and len(found[-1]) < most:
            found[-1] = range(found[-1].start, frame + 1)
        else:
            found.append(range(frame, frame + 1))
    return found


def _window(series: Floats, frame: int, frames: int) -> Floats:
    """The `frames` frames from `REACH` before `frame` on, NaN beyond the ends of the series."""
    found = np.full((frames, *series.shape[1:]), np.nan)
    wanted = np.arange(frame - REACH, frame - REACH + frames)
    inside = (wanted >= 0) & (wanted < len(series))
    found[inside] = series[wanted[inside]]
    return found


def _tall(window: Floats) -> Floats:
    """A window `(T, 2, H, W)` as one field `(2, T H, W)`."""
    return np.moveaxis(window, 1, 0).reshape(2, -1, window.shape[-1])


@dataclass(frozen=True)
class SeriesKind:
    """A baseline of series by what one must know before it is fitted.

    Arguments:
        label: What tables call it.
        make: Makes one that is not fitted, with `past` or without.
        both: Why it needs what is observed later; empty where it does not.
    """

    label: str
    make: Callable[[bool], SeriesBaseline]
    both: str = ""


#: Every baseline of series by the name that `baselines=` knows it by, in the order of tables.
SERIES_BASELINES: dict[str, SeriesKind] = {
    "last_observed": SeriesKind("last value of the cell", lambda past: TimeInterpolation(past=True)),
    "linear_in_time": SeriesKind("linear in time", TimeInterpolation, "it is last_observed"),
    "oi_spacetime": SeriesKind("OI in space and time", SpaceTimeInterpolation),
    "extended_eof": SeriesKind("extended EOFs", ExtendedEOF),
    "dineof_spacetime": SeriesKind("DINEOF in space and time", SpaceTimeDINEOF, "it fills all frames at once"),
}


def fit_series(
    keys: Sequence[str], training: NDArray[np.floating], grid: Grid, *, lags: int = LAGS, past: bool = False
) -> tuple[Mapping[str, SeriesBaseline], Mapping[str, str]]:
    """Returns the baselines `keys` fitted to training frames, and, by key, why some of them could not be.

    Arguments:
        keys: Names in `SERIES_BASELINES`.
        training: Frames at equal steps `(T, 2, H, W)`, NaN where not measured.
        grid: The grid.
        lags: From how many frames on they are not correlated, at most.
        past: Whether nothing that is observed later counts.
    """
    fitted, reasons = {}, {}
    for key in keys:
        kind = SERIES_BASELINES[key]
        if past and kind.both:
            reasons[key] = f"without later observations {kind.both}"
            continue
        try:
            fitted[key] = kind.make(past).fit(np.asarray(training, dtype=np.float64), grid, lags)
        except ValueError as error:
            reasons[key] = str(error)
    return fitted, reasons

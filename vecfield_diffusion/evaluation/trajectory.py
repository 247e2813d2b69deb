"""Scores in time: how far filled series change as the true one does, and carry drifters where it carries them.

A trajectory is a series of consecutive frames a step apart. Members are compared with the truth, never their mean,
which is smoother than any field; of a method that gives one field, this one. Drifters go with both:

    rotary_error           sqrt(mean over frequencies of (log10 E_members / E_truth)^2), see `temporal.rotary_spectrum`
    increments_L           <|w(t + L) - w(t)|^2> of members over that of the truth
    lag_correlation_L      |correlation of w(t) with w(t + L)| of anomalies about the climatology
    separation_L           how far drifters are after L steps from those in the truth, see `lagrangian.separations`

of the cells that are known in all frames. Drifters start anew every few steps, at the same places for all methods, and
are lost where the truth is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.comparison import Score
from vecfield_diffusion.evaluation.lagrangian import seed_drifters, separations
from vecfield_diffusion.evaluation.temporal import increments, lag_correlation, rotary_spectrum
from vecfield_diffusion.physics.grid import Grid

#: Steps after which increments, correlations and separations are scored; drifters are followed over the last of them.
LAGS = (1, 3, 5)
#: Drifters that start together.
DRIFTERS = 200
#: Frames of a trajectory, at least.
FEWEST = 4


@dataclass(frozen=True)
class TrueSeries:
    """The truth that trajectories are compared with.

    Arguments:
        fields: `(T, 2, H, W)`, NaN where unknown.
        grid: The grid.
        climatology: The mean field of training `(2, H, W)`.
        step: The time between frames in `unit`.
        unit: Of frequencies, in words.
        seconds: The same time in units of length of the grid over those of the velocity; None where it is not known:
            then nothing drifts.
        seed: Of the places where drifters start.

    Raises:
        ValueError: Fewer than four frames, or no cell that is known in all of them.
    """

    fields: Tensor
    grid: Grid
    climatology: Tensor
    step: float = 1.0
    unit: str = "step"
    seconds: float | None = None
    seed: int = 0
    known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if len(self.fields) < FEWEST:
            raise ValueError(f"scores in time need {FEWEST} consecutive frames, got {len(self.fields)}")
        known = self.grid.valid & self.fields.isfinite().all(dim=1).all(dim=0)
        if not known.any():
            raise ValueError("scores in time need cells that are known in all frames, and there are none")
        object.__setattr__(self, "known", known)

    def within(self, series: Tensor) -> Tensor:
        """Returns series `(..., T, 2, H, W)` in double precision, NaN where the truth is not known in all frames."""
        return torch.where(self.known, series.double(), torch.nan)

    @property
    def lags(self) -> list[int]:
        """Those of `LAGS` that the series holds."""
        return [lag for lag in LAGS if lag < len(self.fields)]

    def separation(self, series: Tensor) -> Tensor | None:
        """Returns the mean separation after 1, 2, .. steps in kilometres, `(L,)`, of a series or of all its members."""
        if self.seconds is None:
            return None
        last, grid = max(self.lags), replace(self.grid, valid=self.known)
        starts = seed_drifters(grid, DRIFTERS, self.seed)
        truth, given = self.within(self.fields), self.within(series)
        options = dict(grid=grid, dt=self.seconds, starts=starts, after=range(1, last + 1))
        found = [
            separations(truth[first : first + last + 1], given[..., first : first + last + 1, :, :, :], **options)
            for first in range(0, len(truth) - last, last)
        ]
        return torch.stack(found).flatten(0, -2).nanmean(dim=0) / 1000


@dataclass(frozen=True)
class InTime:
    """What a method makes of a series.

    Attributes:
        method: Its name.
        scores: By `members` and `mean`, scores by name.
        spectrum: Energy over frequency of the members, both senses of rotation together, `(F,)`; None without members.
        separation: By `members` and `mean`, in kilometres after 1, 2, .. steps, `(L,)`.
    """

    method: str
    scores: dict[str, dict[str, Score]]
    spectrum: Tensor | None
    separation: dict[str, Tensor]


@dataclass(frozen=True)
class TimeSection:
    """What was found of a series under one mask.

    Attributes:
        frequency: In cycles per `unit`, from 0, `(F,)`.
        step: The time between frames in `unit`.
        unit: Of time.
        truth: What the truth itself is like.
        found: The methods.
    """

    frequency: Tensor
    step: float
    unit: str
    truth: InTime
    found: Sequence[InTime]

    def find(self, method: str) -> InTime:
        """Returns the method of this name."""
        return next(of for of in self.found if of.method == method)

    def nearest(self, but: Sequence[str]) -> InTime | None:
        """Returns the method, not of the names `but`, in whose mean drifters end nearest; None where none drift."""
        others = [of for of in self.found if of.separation and of.method not in but]
        return min(others, key=lambda of: float(of.separation["mean"][-1]), default=None)


def score_in_time(method: str, truth: TrueSeries, mean: Tensor, members: Tensor | None) -> InTime:
    """Returns the scores of a method that filled a series.

    Arguments:
        method: Its name.
        truth: What it is compared with.
        mean: The mean, `(T, 2, H, W)`.
        members: Trajectories `(M, T, 2, H, W)`; None of a method that draws none. One alone is the mean.
    """
    scores: dict[str, dict[str, Score]] = {}
    separation = {}
    alone = members is not None and len(members) == 1
    for name, series in (("mean", mean), ("members", None if alone else members)):
        away = None if series is None else truth.separation(series)
        if away is not None:
            separation[name] = away
            scores[name] = _by_lag("separation", truth, away[[lag - 1 for lag in truth.lags]])
    if members is None:
        return InTime(method, scores, None, separation)
    kind = "mean" if alone else "members"
    _, energy = _spectrum(truth, members)
    ratio = (energy / _spectrum(truth, truth.fields)[1])[1:].log10()
    change = increments(truth.within(members), truth.lags)
    change = change / increments(truth.within(truth.fields), truth.lags)
    own = {"rotary_error": Score(float(ratio.square().mean().sqrt()), cases=len(truth.fields))}
    own |= _by_lag("increments", truth, change) | _correlations(truth, members)
    scores[kind] = own | scores.get(kind, {})
    return InTime(method, scores, energy, separation)


def time_section(truth: TrueSeries, found: Sequence[InTime]) -> TimeSection:
    """Returns what was found of the methods, beside the truth."""
    frequency, energy = _spectrum(truth, truth.fields)
    own = InTime("truth", {"mean": _correlations(truth, truth.fields)}, energy, {})
    return TimeSection(frequency, truth.step, truth.unit, own, found)


def _spectrum(truth: TrueSeries, series: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies from 0 and the energy at them."""
    return rotary_spectrum(truth.within(series), truth.step).folded()


def _correlations(truth: TrueSeries, series: Tensor) -> dict[str, Score]:
    mean = truth.climatology.double()
    return _by_lag("lag_correlation", truth, lag_correlation(truth.within(series), truth.lags, mean).abs())


def _by_lag(name: str, truth: TrueSeries, values: Tensor) -> dict[str, Score]:
    """Scores by the name and each of the lags."""
    count = len(truth.fields)
    return {
        f"{name}_{lag}": Score(float(value), cases=count)
        for lag, value in zip(truth.lags, values, strict=True)
        if value.isfinite()
    }

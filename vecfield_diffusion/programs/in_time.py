"""Time in an evaluation: what a case's neighbours show of it, and cases that follow one another.

The unseen snapshots around a case are observed through the same mask, drawn anew for each of them by its number, with
the same errors. What is filled from them never sees a snapshot of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Timeline, duration, intervals
from vecfield_diffusion.data.units import factor, says_nothing
from vecfield_diffusion.ellipses import at_least, blocks
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.comparison import Estimate
from vecfield_diffusion.evaluation.series import ObservedSeries, SeriesBaseline
from vecfield_diffusion.evaluation.trajectory import FEWEST
from vecfield_diffusion.inference.cases import Cases

#: Frames around a case that are observed, on either side.
AROUND = 32
#: Values of the training frames, at most, 8 bytes each.
LEARNT = 5e6


def neighbours(
    frames: NDArray[np.int64], offered: range, indices: Sequence[int], reach: int = AROUND
) -> list[int]:  # fmt: skip
    """Returns the snapshots of `offered` that lie within `reach` frames of one of `indices`, these included."""
    wanted = frames[np.asarray(indices)]
    return [number for number in offered if np.abs(wanted - frames[number]).min() <= reach]


def observations(cases: Cases, line: Timeline, indices: Sequence[int], floor: float) -> list[ObservedSeries]:
    """Returns what cases show of the frames of each run that holds a snapshot to be filled.

    Runs that are too far apart to be correlated know nothing of one another.

    Arguments:
        cases: All snapshots that are observed, in their order.
        line: The frames of the data.
        indices: The snapshots that are to be filled, some of them.
        floor: The least error of an observation, in the units of the data.
    """
    at, found = line.frames[cases.numbers], []
    sigma = at_least(cases.sigma_obs.double().nan_to_num(posinf=0.0), floor)
    noise_of = blocks(sigma.expand(*cases.y.shape[:-3], max(2, sigma.shape[-3]), *cases.y.shape[-2:]))
    for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) >= line.lags) + 1):
        first, inside = at[run[0]], {cases.numbers[place] for place in run}
        length = int(at[run[-1]] - first) + 1
        y, noise = (np.full((length, *part.shape[1:]), np.nan) for part in (cases.y, noise_of))
        y[at[run] - first] = cases.y[run].double().numpy()
        noise[at[run] - first] = noise_of[run].numpy()
        wanted = [int(line.frames[number] - first) for number in indices if number in inside]
        found += [ObservedSeries(y, noise, wanted)] if wanted else []
    return found


def training_frames(fields: Fields, frames: NDArray[np.int64], train: range) -> NDArray[np.float64]:
    """Returns the training snapshots as frames at equal steps `(T, 2, H, W)`, NaN where there is none.

    Of more than fit into memory it is the last ones.
    """
    most = max(2, int(LEARNT / (2 * fields.grid.valid.numel())))
    at = frames[train.start : train.stop]
    kept = np.flatnonzero(at > at[-1] - most)
    series = np.full((int(at[-1] - at[kept[0]]) + 1, 2, *fields.shape), np.nan)
    series[at[kept] - at[kept[0]]] = fields.read(np.asarray(train)[kept]).double().numpy()
    return series


def series_fill(
    baseline: SeriesBaseline,
    given: Iterable[ObservedSeries],
    *,
    members: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda fields: None,
) -> Callable[[slice], Estimate]:
    """Returns a function that fills the cases of a slice, which must follow one another, by a baseline of series.

    Arguments:
        baseline: Fitted.
        given: What is observed, run by run.
        members: How many trajectories are drawn of a law, beside it.
        seed: Of them.
        progress: Called with 1 after each field.
    """
    laws = chain.from_iterable(baseline.fill(run, members, seed) for run in given)

    def fields(chosen: slice) -> Estimate:
        found = []
        for law in islice(laws, chosen.stop - chosen.start):
            found.append(law)
            progress(1)
        means, stds, drawn = (
            None if parts[0] is None else torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True)
        )
        return Estimate(means[None], stds, None if drawn is None else drawn.movedim(0, 1))

    return fields


def consecutive(frames: NDArray[np.int64], offered: range, count: int, source: str) -> list[int]:
    """Returns the first snapshots of the longest stretch of `offered` that follow one another, at most `count`.

    Raises:
        UserError: Fewer than scores in time need.
    """
    steps = np.diff(frames[offered.start : offered.stop])
    parts = np.split(np.asarray(offered), np.flatnonzero(steps != 1) + 1)
    longest = max(parts, key=len)[:count]
    if len(longest) < FEWEST:
        raise UserError(
            f"series=true: scores in time need {FEWEST} snapshots that follow one another, and {source} keeps "
            f"{len(longest)} at most (cases={count}). Leave it out, or raise cases or the share of the test split"
        )
    return longest.tolist()


def step_of(fields: Fields) -> tuple[float, str, float | None]:
    """Returns the time between frames, its unit in words, and the same in units of length over those of velocity.

    These are seconds, for velocities in m s-1; without units of either it is the time as it is; None where it is not
    known.
    """
    if fields.time is None:
        return 1.0, "step", None
    steps, unit = intervals(fields)
    step = float(np.median(steps[steps > 0]))
    unit = unit.strip()
    seconds = factor(unit, "s")
    if unit == "h" and step >= 24:
        step, unit, seconds = step / 24, "day", 86400.0
    if seconds is not None:
        return step, unit, step * seconds
    return step, unit or "unit of time", step if says_nothing(fields.units) and says_nothing(unit) else None


def time_before(fields: Fields, indices: Sequence[int]) -> str:
    """Returns how long before some snapshots those before them lie, such as `1 hour to 3 hours`, or `1 snapshot`."""
    later = np.array([index for index in indices if index > 0], dtype=np.int64)
    if fields.time is None or fields.time.dtype.kind != "M" or not len(later):
        return "1 snapshot"
    seconds = (fields.time[later] - fields.time[later - 1]) / np.timedelta64(1, "s")
    return " to ".join(dict.fromkeys(duration(float(value)) for value in (seconds.min(), seconds.max())))

"""The times of a series as frames at equal steps, and the frames after its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.errors import UserError

#: Frames that a correlation is followed over, at most: see `evaluation.estimation.Estimator`.
LAGS = 160
#: How far from a whole number of steps an interval may be, in steps, and still be one.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Timeline:
    """Where the snapshots of a series stand among frames at equal steps.

    A missing snapshot is a frame that measured nothing. Where times jump, by more or by no whole number of steps, a new
    run begins: as far from the last one as correlations are followed, so that they know nothing of one another.

    Arguments:
        frames: The frame of every snapshot, `(N,)`, rising.
        lags: How far correlations can be followed in the longest run.
        words: What was found, to be printed.
    """

    frames: NDArray[np.int64]
    lags: int
    words: str

    @classmethod
    def of(cls, fields: Fields) -> Timeline:
        """Returns the frames of some fields.

        Raises:
            UserError: Times with so many jumps that most frames would lie between runs.
        """
        count = len(fields)
        if fields.time is None or count < 2:
            return cls(np.arange(count), _lags(count), f"{count} times, taken as equally far apart")
        steps, unit = intervals(fields)
        step = np.median(steps[steps > 0]) if (steps > 0).any() else 1.0
        whole = np.rint(steps / step)
        even = (np.abs(steps / step - whole) <= TOLERANCE) & (whole >= 1) & (whole <= LAGS)
        if fields.runs is not None:
            even &= fields.runs[1:] == fields.runs[:-1]
        starts = np.concatenate(([0], np.flatnonzero(~even) + 1, [count]))
        longest = max(1 + int(whole[a : b - 1].sum()) for a, b in zip(starts[:-1], starts[1:], strict=True))
        apart = _lags(longest)
        frames = np.concatenate(([0], np.cumsum(np.where(even, whole, apart)))).astype(np.int64)
        missing = int((whole[even] - 1).sum())
        if frames[-1] > 20 * count + LAGS:
            raise UserError(
                f"{fields.source}: the times jump {len(starts) - 2} times in {count} snapshots, too often for a field "
                "in space and time. Give a part of it with equal steps, or train a network: train.py dataset.path=FILE"
            )
        words = f"{count} times, {step:.6g}{unit} apart"
        words += f", {missing} missing between them" if missing else ""
        words += f"; cut into {len(starts) - 1} runs where they jump" if len(starts) > 2 else ""
        return cls(frames, apart, words)


def intervals(fields: Fields) -> tuple[NDArray[np.float64], str]:
    """Returns the intervals between the times of fields, and their unit with a space before it: hours for dates."""
    steps = np.diff(fields.time)
    if steps.dtype.kind == "m":
        return steps / np.timedelta64(1, "h"), " h"
    unit = str(fields.time_attrs.get("units", "")).partition(" since ")[0]
    return steps.astype(np.float64), f" {unit}".rstrip()


def _lags(frames: int) -> int:
    return max(2, min(LAGS, 2 * frames // 3))


@dataclass(frozen=True)
class Lengthened:
    """A reader of a series with snapshots after its end, which measured nothing."""

    reader: Callable[[NDArray], NDArray]
    length: int

    def __call__(self, indices: NDArray) -> NDArray:
        """Returns the snapshots `indices`, NaN after the end."""
        inside = indices < self.length
        known = self.reader(np.where(inside, indices, self.length - 1))
        known[~inside] = np.nan
        return known


def lengthened(fields: Fields, horizon: int) -> Fields:
    """Returns the same fields with `horizon` unmeasured snapshots after the last, a step apart.

    Raises:
        UserError: They have no times to go on from.
    """
    if horizon == 0:
        return fields
    if fields.time is None or len(fields) < 2:
        raise UserError(f"horizon={horizon}: {fields.source} has no times to go on from")
    step = np.sort(np.diff(fields.time))[(len(fields) - 1) // 2]
    time = np.concatenate((fields.time, fields.time[-1] + step * np.arange(1, horizon + 1)))
    wrapped: Mapping[str, Any] = {name: Lengthened(reader, len(fields)) for name, reader in fields.variables.items()}
    runs = None if fields.runs is None else np.concatenate((fields.runs, np.repeat(fields.runs[-1:], horizon)))
    reader = Lengthened(fields.reader, len(fields))
    return replace(
        fields, reader=reader, length=len(time), time=time, variables=wrapped, groups=None, runs=runs
    )  # fmt: skip

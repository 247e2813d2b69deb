"""The times of a series as frames at equal steps: runs, missing snapshots, sequences, and the frames after its end.

A run is a part of the series whose times lie at equal steps, within `TOLERANCE`. A frame of it that no snapshot stands
for is missing: it is a frame that measured nothing. Where times jump a new run begins. A sequence is T frames of one
run, k steps apart, as the numbers of their snapshots `(T,)`, with -1 where one is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.stored import still
from vecfield_diffusion.errors import UserError

#: Frames that a correlation is followed over, at most: see `evaluation.estimation.Estimator`.
LAGS = 160
#: How far from a whole number of steps an interval may be, in steps, and still be one.
TOLERANCE = 0.1
#: The share of the frames of a sequence that must not be missing.
SHARE = 0.5
#: What stands for the snapshot of a missing frame.
MISSING = -1
#: Frames before the first of a series are counted from here.
BEFORE = 2**32
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """The snapshots of a series as frames at equal steps, in runs.

    Where times jump, by more than `LAGS` steps or by no whole number of steps, where they stand still or turn back, and
    where the runs of a file follow each other, a new run begins.

    Arguments:
        run: The run of every snapshot, `(N,)`, from 0.
        frame: Its frame in that run, `(N,)`, from 0.
        step: The step, 1 where the series has no times.
        unit: Of the step: `h` for dates, empty where it is not known.
        words: What was found, to be printed.
    """

    run: Integers
    frame: Integers
    step: float
    unit: str
    words: str

    @classmethod
    def of(cls, fields: Fields) -> Runs:
        """Returns the runs of some fields."""
        count = len(fields)
        same = np.ones(max(count - 1, 0), dtype=bool) if fields.runs is None else fields.runs[1:] == fields.runs[:-1]
        if fields.time is None or count < 2:
            whole, even, step, unit = np.ones(len(same)), same, 1.0, ""
            words = "one snapshot" if count == 1 else f"{count} times, taken as equally far apart"
        else:
            steps, unit = intervals(fields)
            forward = steps[same & (steps > 0)]
            step = float(np.median(forward)) if forward.size else 1.0
            whole = np.rint(steps / step)
            even = same & (np.abs(steps / step - whole) <= TOLERANCE) & (whole >= 1) & (whole <= LAGS)
            words = f"{count} times, {step:.6g}{unit} apart"
            missing = int((whole[even] - 1).sum())
            words += f", {missing} missing between them" if missing else ""
            words += f" (tolerance {TOLERANCE * step:.3g}{unit})"
        run = np.concatenate(([0], np.cumsum(~even))).astype(np.int64)[:count]
        line = np.concatenate(([0], np.cumsum(np.where(even, whole, 0)))).astype(np.int64)[:count]
        starts = np.flatnonzero(np.diff(run, prepend=-1))
        words += f"; cut into {len(starts)} runs where they jump" if len(starts) > 1 else ""
        return cls(run, line - line[starts][run], step, unit.strip(), words)

    @property
    def lengths(self) -> Integers:
        """The frames of every run, missing ones included, `(R,)`."""
        return self.frame[np.flatnonzero(np.diff(self.run, append=len(self.run)))] + 1

    def snapshots(self, run: int) -> Integers:
        """Returns the snapshots of all frames of a run, `(T,)`, -1 where one is missing."""
        chosen = np.flatnonzero(self.run == run)
        frames = np.full(self.lengths[run], MISSING)
        frames[self.frame[chosen]] = chosen
        return frames

    def line(self, apart: int) -> Integers:
        """Returns the frames of all runs on one line, `(N,)`: `apart` from the last frame of one to the next run."""
        return self.frame + np.concatenate(([0], np.cumsum(self.lengths - 1 + apart)))[self.run]


@dataclass(frozen=True)
class Sequences:
    """All sequences that lie wholly within some snapshots.

    The first frame of a sequence is measured, which names it, and so are at least half of all.

    Arguments:
        indices: The snapshots of each, `(K, T)`, -1 where one is missing; first frames rise.
        words: What there is, to be printed.
    """

    indices: Integers
    words: str

    @classmethod
    def of(
        cls,
        fields: Fields,
        snapshots: Sequence[int] | Integers | None = None,
        *,
        frames: int | None = None,
        stride: int | None = None,
    ) -> Sequences:
        """Returns the sequences of `frames` frames, `stride` steps apart, within `snapshots`.

        Arguments:
            fields: The data.
            snapshots: The snapshots that sequences are made of, such as a split; all if None.
            frames: T; that of the fields if None.
            stride: That of the fields if None.

        Raises:
            UserError: There is none, because runs are too short or too much is missing.
        """
        frames, stride = frames or fields.frames, stride or fields.stride
        runs, reach = Runs.of(fields), (frames - 1) * stride
        chosen = np.unique(np.arange(len(fields)) if snapshots is None else np.asarray(snapshots, dtype=np.int64))
        line = runs.line(reach + 1)[chosen]
        wanted = line[:, None] + stride * np.arange(frames)
        places = np.minimum(np.searchsorted(line, wanted), len(line) - 1)
        indices = np.where(line[places] == wanted, chosen[places], MISSING)
        # A snapshot that is not among those given is no missing one: there the data of another split begin.
        piece = runs.run[chosen] + np.cumsum(np.diff(chosen, prepend=chosen[0]) > 1)
        first = np.flatnonzero(np.diff(piece, prepend=-1))
        last = line[np.append(first[1:], len(line)) - 1][np.searchsorted(first, np.arange(len(line)), side="right") - 1]
        inside = (wanted[:, -1] <= last) & ((indices >= 0).mean(axis=1) >= SHARE)
        apart = f" {stride} steps apart" if stride > 1 else ""
        if not inside.any():
            longest = int((last[first] - line[first]).max(initial=-1)) + 1
            short = f"it takes a run of {reach + 1} times, and the longest has {longest}"
            reason = short if longest <= reach else "more than half of the frames of each are missing"
            raise UserError(
                f"{fields.source}: no sequence of {frames} frames{apart} lies within the {len(chosen)} snapshots "
                f"{chosen[0]} to {chosen[-1]}: {reason}. Give fewer dataset.frames, a smaller dataset.stride, or more "
                "data (splits.train, splits.validation and splits.test are their shares)"
            )
        return cls(indices[inside], f"{inside.sum()} sequences of {frames} frames{apart}")

    def __len__(self) -> int:
        return len(self.indices)


def frame_numbers(fields: Fields, sequences: Integers | Tensor) -> Integers:
    """Returns the number of every frame of sequences `(n, T)`, missing ones included, in the series, `(n, T)`.

    Frames of all runs are counted one after the other; without a missing one they are the snapshots. Those before the
    first of all have numbers from `BEFORE` on, counted backwards.
    """
    chosen = np.asarray(sequences, dtype=np.int64)
    known, columns = chosen >= 0, np.arange(chosen.shape[1])
    first, last = known.argmax(axis=1), chosen.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
    rows, line = np.arange(len(chosen)), Runs.of(fields).line(1)
    begin, end = line[chosen[rows, first]], line[chosen[rows, last]]
    stride = np.where(last > first, (end - begin) // np.maximum(last - first, 1), fields.stride)
    numbers = begin[:, None] + stride[:, None] * (columns - first[:, None])
    return np.where(numbers < 0, BEFORE - numbers, numbers)


# What snapshots hold, as sequences.


def distinct(sequences: Integers | Tensor) -> tuple[Integers, Callable[[Tensor], Tensor]]:
    """Returns the snapshots of sequences `(n, T)`, each once, `(m,)`, and what lays out values of theirs.

    That takes `(m, ...)` to `(n, T, ...)`, NaN where a frame is missing.
    """
    chosen = np.asarray(sequences, dtype=np.int64)
    known = chosen >= 0
    numbers = np.unique(chosen[known]) if known.any() else np.zeros(1, dtype=np.int64)
    places = torch.from_numpy(np.searchsorted(numbers, np.where(known, chosen, numbers[0])))
    lacking = torch.from_numpy(~known)

    def lay_out(values: Tensor) -> Tensor:
        laid = values[places]
        laid[lacking] = torch.nan
        return laid

    return numbers, lay_out


def read_sequences(fields: Fields, sequences: Integers | Tensor, partial: bool = False) -> Tensor:
    """Returns sequences `(n, T)` as float32 `(n, T, 2, H, W)`, NaN where nothing was measured; see `Fields.read`."""
    numbers, lay_out = distinct(sequences)
    return lay_out(fields.read(numbers, partial=partial))


# Series that are filled.


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

    frames: Integers
    lags: int
    words: str

    @classmethod
    def of(cls, fields: Fields) -> Timeline:
        """Returns the frames of some fields.

        Raises:
            UserError: Times with so many jumps that most frames would lie between runs.
        """
        runs, count = Runs.of(fields), len(fields)
        apart = _lags(int(runs.lengths.max(initial=0)))
        frames = runs.line(apart)
        if count and frames[-1] > 20 * count + LAGS:
            raise UserError(
                f"{fields.source}: the times jump {runs.run[-1]} times in {count} snapshots, too often for a field "
                "in space and time. Give a part of it with equal steps, or train a network: train.py dataset.path=FILE"
            )
        return cls(frames, apart, runs.words)


def intervals(fields: Fields) -> tuple[NDArray[np.float64], str]:
    """Returns the intervals between the times of fields, and their unit with a space before it: hours for dates."""
    steps = np.diff(fields.time)
    if steps.dtype.kind == "m":
        return steps / np.timedelta64(1, "h"), " h"
    unit = str(fields.time_attrs.get("units", "")).partition(" since ")[0]
    return steps.astype(np.float64), f" {unit}".rstrip()


def duration(seconds: float) -> str:
    """Returns seconds in the largest unit that they fill, such as `6 hours`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}{'s' * (seconds != length)}"
    return f"{seconds:g} s"


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
    wrapped: Mapping[str, Any] = {
        name: reader if still(reader) else Lengthened(reader, len(fields)) for name, reader in fields.variables.items()
    }
    runs = None if fields.runs is None else np.concatenate((fields.runs, np.repeat(fields.runs[-1:], horizon)))
    reader = Lengthened(fields.reader, len(fields))
    return replace(
        fields, reader=reader, length=len(time), time=time, variables=wrapped, groups=None, runs=runs
    )  # fmt: skip

"""What a set of velocities is like before anything is trained on it: what is measured of it.

`inspect` leaves out what cannot belong to the data (`statistics.believed`), reads every snapshot once for what is
measured and how large it is (`Moments`, `Gaps`), then measures what training would: std and leading eigenvalue
(`statistics.measure`), the autocorrelation and what follows from it (`splits`), and how the kinetic energy splits into
rotational, divergent and harmonic parts (`projection.helmholtz`). What is said of it, and what follows for training, is
in `programs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from vecfield_diffusion.data.augment import Augmentation
from vecfield_diffusion.data.fields import Fields, blocks
from vecfield_diffusion.data.sequences import duration, intervals
from vecfield_diffusion.data.splits import (
    THRESHOLD,
    TimeBlocks,
    autocorrelation,
    compare_blocks,
    guard_after,
    independent,
)
from vecfield_diffusion.data.statistics import away_from_land, believed, homogeneous, measure
from vecfield_diffusion.diffusion.normalizer import Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill
from vecfield_diffusion.physics.operators import divergence, vorticity
from vecfield_diffusion.physics.parts import Part, fullest_part, largest_rectangle, part_of, shifted
from vecfield_diffusion.physics.projection import helmholtz
from vecfield_diffusion.progress import bar

#: Snapshots, evenly picked, that the statistics and the flow are measured on.
SNAPSHOTS, PICKED = 2048, 8
#: The cells along a side of the part of a large domain that the flow is measured in.
SIDE = 128
#: The correlation of a flow that repeats itself.
RETURNS = 0.5
Floats = NDArray[np.float64]


class Moments:
    """What the measured values are like, in the units of the file; filled block by block.

    Attributes:
        counts: How many snapshots measure a cell, `(H, W)`.
        zeros: In how many both components are exactly 0, `(H, W)`.
        speed: The root-mean-square speed of each snapshot, NaN where nothing is measured.
        low: The least value of each component, `(2,)`.
        high: The greatest.
        max_speed: The greatest speed.
        repeated: Snapshots that are copies of the one before.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.counts, self.zeros = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self.total, self.square, self.distance = np.zeros((2, *shape)), np.zeros(shape), 0.0
        self.low, self.high, self.max_speed = np.full(2, np.inf), np.full(2, -np.inf), 0.0
        self.speed: list[float] = []
        self.repeated: list[int] = []
        self._last: Floats | None = None

    def add(self, indices: NDArray[np.int64], velocity: Floats) -> None:
        """Takes in the snapshots `indices` `(n, 2, H, W)`, which follow those before."""
        measured = np.isfinite(velocity[:, 0])
        filled = np.where(measured[:, None], velocity, 0.0)
        squares = (filled**2).sum(axis=1)
        counts = measured.sum(axis=(1, 2))
        self.counts += measured.sum(axis=0)
        self.zeros += (measured & (squares == 0)).sum(axis=0)
        self.total += filled.sum(axis=0)
        self.square += squares.sum(axis=0)
        self.distance += np.sqrt(squares).sum()
        self.max_speed = max(self.max_speed, float(np.sqrt(squares.max())))
        with np.errstate(invalid="ignore"):
            self.speed += np.sqrt(squares.sum(axis=(1, 2)) / counts).tolist()
        everywhere = (0, 2, 3)
        self.low = np.minimum(self.low, np.where(measured[:, None], velocity, np.inf).min(axis=everywhere))
        self.high = np.maximum(self.high, np.where(measured[:, None], velocity, -np.inf).max(axis=everywhere))
        pairs = list(pairwise(velocity if self._last is None else [self._last, *velocity]))
        for index, (one, next_one) in zip(indices[len(indices) - len(pairs) :], pairs, strict=True):
            if np.isfinite(next_one).any() and np.array_equal(one, next_one, equal_nan=True):
                self.repeated.append(int(index))
        self._last = velocity[-1]

    @property
    def mean(self) -> Floats:
        """The mean over time `(2, H, W)`, NaN where nothing is measured."""
        with np.errstate(invalid="ignore"):
            return self.total / self.counts

    @property
    def deviation(self) -> Floats:
        """The root of the summed variances of both components over time, `(H, W)`, NaN likewise."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(np.maximum(self.square / self.counts - (self.mean**2).sum(axis=0), 0.0))

    @property
    def mean_speed(self) -> float:
        """The mean speed of all that is measured."""
        return self.distance / max(self.counts.sum(), 1)


class Gaps:
    """Where valid cells are missing; filled block by block.

    Attributes:
        missing: The share of the valid cells that each snapshot lacks.
        hole: The cells of the largest connected gap.
        hole_at: Its snapshot.
    """

    def __init__(self, valid: NDArray[np.bool_], periodic: tuple[bool, bool]) -> None:
        self.valid, self.periodic = valid, periodic
        self.missing: list[float] = []
        self.hole, self.hole_at = 0, 0
        self._since, self._longest = np.zeros(valid.shape, dtype=np.int64), np.zeros(valid.shape, dtype=np.int64)

    def add(self, indices: NDArray[np.int64], velocity: Floats) -> None:
        """Takes in the snapshots `indices` `(n, 2, H, W)`, which follow those before."""
        for index, gap in zip(indices, self.valid & ~np.isfinite(velocity[:, 0]), strict=True):
            self.missing.append(float(gap.sum() / self.valid.sum()))
            self._since = np.where(gap, self._since + 1, 0)
            self._longest = np.maximum(self._longest, self._since)
            if gap.sum() > self.hole and (size := largest_region(gap, self.periodic)) > self.hole:
                self.hole, self.hole_at = size, int(index)

    @property
    def drought(self) -> int:
        """The most snapshots on end that a cell is not measured in."""
        return int(self._longest.max())


def largest_region(cells: NDArray[np.bool_], periodic: tuple[bool, bool]) -> int:
    """The size of the largest connected region, over edges and the seams of periodic axes; 0 for none."""
    label, count = ndimage.label(cells)
    join = np.arange(count + 1)
    for closed, (near, far) in zip(periodic, ((label[0], label[-1]), (label[:, 0], label[:, -1])), strict=True):
        for i, j in zip(near, far, strict=True) if closed else ():
            if i and j:
                join[join == join[i]] = join[j]
    return int(np.bincount(join[label[cells]], minlength=1).max())


@dataclass(frozen=True)
class Times:
    """How the snapshots follow each other: the median step, the first and the last time in words, and faults.

    Empty where the file has no times. Irregular steps differ from the median by more than 1 %, repeated ones are 0,
    backward ones below it.
    """

    step: str = ""
    first: str = ""
    last: str = ""
    irregular: int = 0
    repeated: int = 0
    backward: int = 0

    @classmethod
    def of(cls, fields: Fields) -> Times:
        """Those of the snapshots of a file."""
        if fields.time is None:
            return cls()
        dates, units = fields.time.dtype.kind == "M", str(fields.time_attrs.get("units", ""))
        first, last = (
            str(t.astype("datetime64[s]")).replace("T", " ") if dates else f"{t:g} {units}".strip()
            for t in fields.time[[0, -1]]
        )
        steps, _ = intervals(fields)
        steps = steps if fields.runs is None else steps[np.diff(fields.runs) == 0]  # a run begins anew
        if not steps.size:
            return cls(first=first, last=last)
        step = float(np.median(steps))
        return cls(
            step=duration(round(3600 * step, 6)) if dates else f"{step:g} {units}".strip(),
            first=first,
            last=last,
            irregular=int((np.abs(steps - step) > 0.01 * abs(step)).sum()),
            repeated=int((steps == 0).sum()),
            backward=int((steps < 0).sum()),
        )


@dataclass(frozen=True)
class FlowShares:
    """How the kinetic energy of a few snapshots splits, by the Helmholtz decomposition.

    Arguments:
        rotational: The share of a stream function.
        divergent: That of a gradient.
        harmonic: That of what has neither divergence nor curl.
        divergence: The RMS divergence per s, in cells that touch no land.
        vorticity: The RMS vorticity per s in these cells.
    """

    rotational: float
    divergent: float
    harmonic: float
    divergence: float
    vorticity: float


@dataclass(frozen=True)
class Inspection:
    """All that is measured of a set.

    Arguments:
        fields: The set, without what cannot belong to it.
        left_out: A sentence on what that was; empty for nothing.
        values: What the values are like.
        gaps: What is missing.
        times: How the snapshots follow each other.
        statistics: What training would measure.
        part: The rows and columns that the flow was measured in: all, but of a large domain.
        flow: That of the part, where nothing passes land.
        rectangle: The largest rectangle without land in the part, in rows and columns of the whole.
        inside: The flow of the rectangle, with open borders. Where invalid cells are no land but the end of the data,
            only this means something.
        autocorrelation: rho at lags 0, 1, ...
        guard: What `TimeBlocks` measures.
        independent: How many independent fields the snapshots are worth.
        split: The snapshots of training, validation and test; empty where they are too few.
        too_few: Why there is no split; empty where there is one.
        tested: How many independent fields those of the test are worth.
        unlike: Sentences on blocks that are unlike those of training.
        augmentation: The transforms that the domain allows.
    """

    fields: Fields
    left_out: str
    values: Moments
    gaps: Gaps
    times: Times
    statistics: Statistics
    part: Part
    flow: FlowShares
    rectangle: Part
    inside: FlowShares
    autocorrelation: Floats
    guard: int
    independent: float
    split: dict[str, range]
    too_few: str
    tested: float
    unlike: list[str]
    augmentation: tuple[str, ...]

    @property
    def gappy(self) -> bool:
        """Whether any valid cell is ever missing."""
        return any(self.gaps.missing)

    @property
    def still(self) -> bool:
        """Whether there is one snapshot only, which has no covariance."""
        return len(self.fields) == 1

    @property
    def at_guard(self) -> float:
        """The correlation where the guard ends."""
        last = max(self.guard, 1)
        return float(self.autocorrelation[last]) if last < len(self.autocorrelation) else 0.0

    @property
    def following(self) -> float:
        """The correlation from one snapshot to the next."""
        return float(self.autocorrelation[1]) if len(self.autocorrelation) > 1 else 0.0

    @property
    def cut_short(self) -> bool:
        """Whether the correlation has not fallen where the guard ends, at a tenth of the snapshots."""
        return self.guard == len(self.fields) // 10 and self.at_guard >= THRESHOLD

    @property
    def returns(self) -> int | None:
        """The first lag beyond the guard at which the correlation is about largest, where it is high again."""
        beyond = self.autocorrelation[self.guard + 1 : len(self.fields) // 2 + 1]
        highest = beyond.max(initial=0.0)
        return self.guard + 1 + int((beyond >= highest - 0.01).argmax()) if highest > RETURNS else None

    @property
    def leading(self) -> float:
        """The share of the variance that the leading mode holds."""
        return self.statistics.lambda_max / (2 * self.fields.grid.valid.sum().item())


def inspect(fields: Fields) -> Inspection:
    """Looks at all that training will meet in a set.

    Raises:
        UserError: The fields do not vary.
    """
    with bar(5, "steps", "inspecting", leave=False) as done:
        fields, left_out = believed(fields)
        done.update()
        n, valid = len(fields), fields.grid.valid.numpy()
        values, gaps = Moments(fields.shape), Gaps(valid, fields.grid.periodic)
        for indices in blocks(n, valid.size):
            velocity = fields.read(indices).double().numpy()
            values.add(indices, velocity)
            gaps.add(indices, velocity)
        done.update()
        part = fullest_part(valid, SIDE)
        grid = part_of(fields.grid, *part)
        velocity, rectangle = complete(fields, gaps.missing, part), largest_rectangle(grid.valid.numpy())
        whole = flow(velocity, grid)
        cut = velocity[..., rectangle[0], rectangle[1]]
        inside = whole if cut.shape == velocity.shape else flow(cut, part_of(grid, *rectangle))
        done.update()
        _, statistics = measure(fields, range(0, n, -(-n // SNAPSHOTS)), mean_field=False if n == 1 else "auto")
        done.update()
        rho = autocorrelation(fields)
        done.update()
    guard, too_few = guard_after(rho, n), ""
    try:
        split = TimeBlocks(guard=guard).split(fields)
    except UserError as error:
        split, too_few = {}, str(error).removeprefix(f"{fields.source}: ")
    return Inspection(
        fields=fields,
        left_out=left_out,
        values=values,
        gaps=gaps,
        times=Times.of(fields),
        statistics=statistics,
        part=part,
        flow=whole,
        rectangle=tuple(shifted(inner, outer) for inner, outer in zip(rectangle, part, strict=True)),
        inside=inside,
        autocorrelation=rho,
        guard=guard,
        independent=independent(fields, rho=rho),
        split=split,
        too_few=too_few,
        tested=independent(fields, split["test"], rho) if split else 0.0,
        unlike=compare_blocks(fields, split) if split else [],
        augmentation=Augmentation().resolve(fields.grid, mean_is_zero=homogeneous(fields)).names,
    )


def complete(fields: Fields, missing: Sequence[float], part: Part) -> Tensor:
    """A part of a few snapshots `(n, 2, h, w)` without gaps, or else of the fullest ones, filled smoothly.

    It is 0 outside the domain.
    """
    share, grid = np.asarray(missing), part_of(fields.grid, *part)
    candidates = np.flatnonzero(share == share.min())
    chosen = candidates[np.linspace(0, len(candidates) - 1, min(PICKED, len(candidates))).round().astype(int)]
    velocity = fields.read(chosen).double()[..., part[0], part[1]]
    if share.min() > 0:
        known, domain = velocity[:, :1].isfinite(), grid.valid.expand(1, 1, *grid.shape)
        velocity = harmonic_fill(velocity.nan_to_num(), known, domain, grid.periodic, grid.dx, grid.dy)
    return velocity.nan_to_num()


def flow(velocity: Tensor, grid: Grid) -> FlowShares:
    """Divergence against rotation of fields `(n, 2, H, W)`."""
    area = (grid.dx * grid.dy).abs()[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a residual of 1e-4 is enough for tenths of a percent
        energies = [float((area * part.square()).sum()) for part in helmholtz(velocity, grid)]
    shares = [energy / max(sum(energies), 1e-300) for energy in energies]
    cells = away_from_land(grid)
    rms = (f(velocity, grid)[..., cells].square().mean().sqrt().item() for f in (divergence, vorticity))
    return FlowShares(*shares, *rms)

"""What a file of velocities is like before anything is trained on it: what was found, what follows, what is doubtful.

`inspect` reads every snapshot once for what is measured and how large it is (`Values`, `Gaps`), then measures what
training would: std and leading eigenvalue (`statistics.measure`), the autocorrelation and its guard (`splits`), and how
the kinetic energy splits into rotational, divergent and harmonic parts (`projection.helmholtz`). `recipe` draws the
consequences as a configuration, once as a file of conf/experiment and once as a command line.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from vecfield_diffusion.data.augment import Augmentation
from vecfield_diffusion.data.fields import Fields, blocks
from vecfield_diffusion.data.splits import THRESHOLD, TimeBlocks, sampled_anomalies
from vecfield_diffusion.data.statistics import homogeneous, measure
from vecfield_diffusion.diffusion.normalizer import Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill
from vecfield_diffusion.physics.operators import divergence, vorticity
from vecfield_diffusion.physics.projection import helmholtz

#: Snapshots, evenly picked, that the statistics and the flow are measured on.
SNAPSHOTS, PICKED = 2048, 8
#: Passes over the data that are suggested; fewer snapshots, and speeds more times the RMS than this, are doubted.
PASSES, FEW, SPIKE = 500, 100, 15
#: Fewer snapshots than this are trained on in windows, where there is room.
LEARNED_BY_HEART = 1000
#: Cells of a patch of zeros that looks like land, and the correlation of a flow that repeats itself.
PATCH, RETURNS = 8, 0.5
#: Speeds in m s-1 that water and air do not reach.
WATER, AIR = 10.0, 150.0
Floats = NDArray[np.float64]
METRES = {"ms-1", "m/s", "ms^-1", "ms**-1", "m.s-1", "meters/second", "metersecond-1", "metrespersecond"}
OF_WATER = re.compile(r"ocean|sea\b|sea_|marine|current|radar|hfr|altim|geostroph|\b(uo|ugos|water_u)\b", re.IGNORECASE)


class Values:
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
    """How the snapshots follow each other.

    Arguments:
        step: The median step in words, such as `1 day`; empty where the file has no times.
        first: The first time in words.
        last: The last one.
        irregular: Steps that differ from the median by more than 1 %.
        repeated: Steps of zero.
        backward: Steps back.
    """

    step: str = ""
    first: str = ""
    last: str = ""
    irregular: int = 0
    repeated: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Flow:
    """Divergence against rotation, on a few snapshots of a domain.

    Arguments:
        rotational: The share of the kinetic energy of a stream function, by the Helmholtz decomposition.
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

    @property
    def ratio(self) -> float:
        """Divergence over vorticity."""
        return self.divergence / max(self.vorticity, 1e-300)

    @property
    def solenoidal(self) -> bool:
        """Whether the flow is nearly without divergence."""
        return self.divergent < 0.02 and self.ratio < 0.2

    def __str__(self) -> str:
        parts = f"{self.rotational:.1%} rotational, {self.divergent:.1%} divergent, {self.harmonic:.1%} harmonic energy"
        rms = f"RMS divergence {self.divergence:.3g}, vorticity {self.vorticity:.3g} per s, ratio {self.ratio:.3g}"
        return f"{parts}; {rms}"


@dataclass(frozen=True)
class Inspection:
    """All that is known of a file.

    `flow` is that of the domain, where nothing passes land, `inside` that of the largest `rectangle` without land, with
    open borders. Where invalid cells are no land but the end of the data, only the second means something.
    `autocorrelation` has rho at lags 0, 1, ...
    """

    fields: Fields
    values: Values
    gaps: Gaps
    times: Times
    statistics: Statistics
    flow: Flow
    inside: Flow
    rectangle: tuple[slice, slice]
    autocorrelation: Floats
    guard: int
    augmentation: tuple[str, ...]

    @property
    def gappy(self) -> bool:
        """Whether any valid cell is ever missing."""
        return any(self.gaps.missing)

    @property
    def cut_short(self) -> bool:
        """Whether the correlation has not fallen where the guard ends, at a tenth of the snapshots."""
        longest, rho = len(self.fields) // 10, self.autocorrelation
        return self.guard == longest and len(rho) > 1 and bool(rho[max(longest, 1)] >= THRESHOLD)

    @property
    def returns(self) -> int | None:
        """The lag beyond the guard at which the correlation is largest, where it is high again."""
        beyond = self.autocorrelation[self.guard + 1 :]
        return self.guard + 1 + int(beyond.argmax()) if beyond.max(initial=0.0) > RETURNS else None

    @property
    def trainable(self) -> bool:
        """Whether the snapshots are enough for the three splits."""
        try:
            return bool(TimeBlocks(guard=self.guard).split(self.fields))
        except UserError:
            return False

    @property
    def still(self) -> bool:
        """Whether there is one snapshot only, which has no covariance."""
        return len(self.fields) == 1

    def text(self) -> str:
        """The report and the doubts."""
        rows = layout(self) | measurements(self) | consequences(self)
        lines = [f"  {label:15}{text}" for label, text in rows.items()]
        listed = [f"  - {doubt}" for doubt in doubts(self)] or ["  none"]
        return "\n".join([self.fields.source, *lines, "", "doubts", *listed])


def inspect(fields: Fields) -> Inspection:
    """Look at all that training will meet in a file.

    Raises:
        UserError: The fields do not vary.
    """
    n = len(fields)
    values, gaps = Values(fields.shape), Gaps(fields.grid.valid.numpy(), fields.grid.periodic)
    for indices in blocks(n, fields.grid.valid.numel()):
        velocity = fields.read(indices).double().numpy()
        values.add(indices, velocity)
        gaps.add(indices, velocity)
    velocity, rectangle = complete(fields, gaps.missing), largest_rectangle(fields.grid.valid.numpy())
    whole = flow(velocity, fields.grid)
    cut = velocity[..., rectangle[0], rectangle[1]]
    _, statistics = measure(fields, range(0, n, -(-n // SNAPSHOTS)), mean_field=False if n == 1 else "auto")
    guard = TimeBlocks().guard_of(fields)
    return Inspection(
        fields=fields,
        values=values,
        gaps=gaps,
        times=times(fields),
        statistics=statistics,
        flow=whole,
        inside=whole if cut.shape == velocity.shape else flow(cut, part_of(fields.grid, *rectangle)),
        rectangle=rectangle,
        autocorrelation=autocorrelation(fields, min(n // 2, max(30, 4 * guard))),
        guard=guard,
        augmentation=Augmentation().resolve(fields.grid, mean_is_zero=homogeneous(fields)),
    )


# What is measured.


def times(fields: Fields) -> Times:
    """How the snapshots of the file follow each other."""
    if fields.time is None:
        return Times()
    units = str(fields.time_attrs.get("units", ""))
    dates = fields.time.dtype.kind == "M"
    first, last = (
        str(t.astype("datetime64[s]")).replace("T", " ") if dates else f"{t:g} {units}".strip()
        for t in fields.time[[0, -1]]
    )
    steps = np.diff(fields.time)
    steps = steps / np.timedelta64(1, "s") if dates else steps.astype(np.float64)
    steps = steps if fields.runs is None else steps[np.diff(fields.runs) == 0]  # a run begins anew
    if not steps.size:
        return Times(first=first, last=last)
    step = float(np.median(steps))
    return Times(
        step=duration(step) if dates else f"{step:g} {units}".strip(),
        first=first,
        last=last,
        irregular=int((np.abs(steps - step) > 0.01 * abs(step)).sum()),
        repeated=int((steps == 0).sum()),
        backward=int((steps < 0).sum()),
    )


def duration(seconds: float) -> str:
    """Seconds in the largest unit that they fill, such as `6 hours`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}{'s' * (seconds != length)}"
    return f"{seconds:g} s"


def complete(fields: Fields, missing: Sequence[float]) -> Tensor:
    """A few snapshots `(n, 2, H, W)` without gaps, or else the fullest ones, filled smoothly; 0 outside the domain."""
    share, grid = np.asarray(missing), fields.grid
    candidates = np.flatnonzero(share == share.min())
    chosen = candidates[np.linspace(0, len(candidates) - 1, min(PICKED, len(candidates))).round().astype(int)]
    velocity = fields.read(chosen).double()
    if share.min() > 0:
        known, domain = velocity[:, :1].isfinite(), grid.valid.expand(1, 1, *grid.shape)
        velocity = harmonic_fill(velocity.nan_to_num(), known, domain, grid.periodic, grid.dx, grid.dy)
    return velocity.nan_to_num()


def flow(velocity: Tensor, grid: Grid) -> Flow:
    """Divergence against rotation of fields `(n, 2, H, W)`."""
    area = (grid.dx * grid.dy).abs()[:, None]
    energies = [float((area * part.square()).sum()) for part in helmholtz(velocity, grid)]
    shares = [energy / max(sum(energies), 1e-300) for energy in energies]
    touching = ndimage.binary_dilation(~grid.valid.numpy(), np.ones((3, 3)))
    cells = torch.from_numpy(~touching) if not touching.all() else grid.valid
    rms = (f(velocity, grid)[..., cells].square().mean().sqrt().item() for f in (divergence, vorticity))
    return Flow(*shares, *rms)


def part_of(grid: Grid, rows: slice, columns: slice) -> Grid:
    """A rectangle of a grid; the borders that cut through it are open."""
    valid = grid.valid[rows, columns]
    whole = [size == full for size, full in zip(valid.shape, grid.shape, strict=True)]
    return Grid(
        valid=valid,
        dx=grid.dx[rows],
        dy=grid.dy[rows],
        boundary_x=grid.boundary_x if whole[1] else "open",
        boundary_y=grid.boundary_y if whole[0] else "open",
    )


def largest_rectangle(cells: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The rows and columns of the largest rectangle of True cells, row by row over the columns that end there."""
    best, size = (slice(0, 0), slice(0, 0)), 0
    heights = np.zeros(cells.shape[1] + 1, dtype=np.int64)
    for row, line in enumerate(cells):
        heights[:-1] = np.where(line, heights[:-1] + 1, 0)
        rising: list[tuple[int, int]] = []  # first column and height of the rectangles that are still open
        for column, height in enumerate(heights.tolist()):
            first = column
            while rising and rising[-1][1] >= height:
                first, tall = rising.pop()
                if tall * (column - first) > size:
                    size, best = tall * (column - first), (slice(row - tall + 1, row + 1), slice(first, column))
            rising.append((first, height))
    return best


def autocorrelation(fields: Fields, longest: int) -> Floats:
    """rho at lags 0 to `longest`, as `splits` defines it for the guard."""
    anomalies, measured = sampled_anomalies(fields)
    rho = []
    for lag in range(longest + 1):
        end = len(anomalies) - lag
        pairs = (measured[lag:] & measured[:end]).sum().clamp(min=1)
        rho.append(((anomalies[lag:] * anomalies[:end]).sum() / pairs).item())
    return np.array(rho) / (rho[0] or 1.0)


# What is said.


def layout(found: Inspection) -> dict[str, str]:
    """What was found and chosen in the file, by label."""
    fields, grid, when = found.fields, found.fields.grid, found.times
    (height, width), (u, v) = fields.shape, fields.names
    rows = {
        "fields": f"{len(fields)} of {height} rows x {width} columns in {fields.units}",
        "components": f"u = {u}, along {fields.x_name} (columns); v = {v}, along {fields.y_name} (rows)",
    }
    for axis, cells, spacing in (("x", width, grid.dx), ("y", height, grid.dy)):
        first, last = getattr(fields, axis)[[0, -1]]
        name, boundary = getattr(fields, f"{axis}_name"), getattr(grid, f"boundary_{axis}")
        rows[axis] = f"{name} {first:g} to {last:g}, {cells} cells of {_range(spacing)} m, {boundary}"
    span = f"{when.first} to {when.last}, every {when.step}" if when.step else when.first
    return rows | {
        "aspect": f"dx / dy = {aspect(fields):.3g}",
        "domain": f"{grid.valid.double().mean():.1%} of the cells are valid (not land, solid or outside)",
        "times": span if when.first else "not in the file; snapshots count as evenly spaced",
    }


def measurements(found: Inspection) -> dict[str, str]:
    """What the numbers are like, by label."""
    fields, values = found.fields, found.values
    ranges = zip(fields.names, values.low, values.high, strict=True)
    spans = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, low, high in ranges)
    about = "zero" if found.still or homogeneous(fields) else "the mean field"
    cells = fields.grid.valid.sum().item()
    return {
        "measured": f"{(values.counts > 0).sum() / cells:.1%} of the valid cells at least once",
        **missing(found),
        "range": f"{spans}; speed {values.mean_speed:.3g} in the mean, at most {values.max_speed:.3g}",
        "exact zeros": f"{values.zeros.sum() / values.counts.sum():.2%} of what is measured, in both components",
        "std": f"{found.statistics.std:.4g}, one for both components, about {about}",
        **flows(found),
    }


def flows(found: Inspection) -> dict[str, str]:
    """Divergence against rotation, by label."""
    filled = " (gaps filled smoothly)" * (min(found.gaps.missing) > 0)
    if found.fields.grid.valid.all():
        return {"flow": f"{found.flow}{filled}"}
    (top, bottom), (left, right) = ((part.start, part.stop - 1) for part in found.rectangle)
    return {
        "flow": f"{found.flow}{filled}, if nothing passes the land",
        "inside": f"{found.inside}{filled}, in rows {top}-{bottom}, columns {left}-{right}, which have no land",
    }


def missing(found: Inspection) -> dict[str, str]:
    """What is missing, and where, by label."""
    if not found.gappy:
        return {"missing": "nothing"}
    gaps, cells = found.gaps, int(found.fields.grid.valid.sum())
    least, median, most = np.quantile(gaps.missing, [0.0, 0.5, 1.0])
    return {
        "missing": f"{least:.1%} / {median:.1%} / {most:.1%} of the valid cells (least / median / most in time)",
        "largest gap": (
            f"{gaps.hole} of {cells} valid cells together, in snapshot {gaps.hole_at}; a cell is missing for up to "
            f"{gaps.drought} snapshots on end"
        ),
    }


def consequences(found: Inspection) -> dict[str, str]:
    """What follows for training, by label."""
    statistics, guard, step = found.statistics, found.guard, found.times.step
    rows = {"augmentation": ", ".join(found.augmentation) or "none that the domain allows", "physics": physics(found)}
    if found.still:
        return rows
    correlation = f"below {THRESHOLD} from one snapshot to the next: no guard between the splits"
    if guard or found.cut_short:
        steps = f"{guard} snapshots{f' (of {step})' * bool(step)}"
        correlation = f"{'not ' * found.cut_short}below {THRESHOLD} after {steps}, the guard of the splits"
        if found.returns is None:
            correlation += f"; about {max(1, len(found.fields) // guard)} independent fields"
    noise = (
        f"diffusion.sigma_max=auto is {statistics.sigma_max:g}, 10 sqrt(leading eigenvalue {statistics.lambda_max:.4g})"
    )
    return {"noise": noise, "correlation": correlation} | rows


def physics(found: Inspection) -> str:
    """The constraint that the data bear: divergence as soft rows within its RMS, where hardly any energy has it."""
    inside, tau = found.inside, found.statistics.divergence_rms
    if inside.solenoidal:
        return f"nearly without divergence: infer.py inpainting=mmps physics=divergence, within {tau:.2g} per s"
    return (
        f"none: {inside.divergent:.1%} of the energy is divergent, divergence is {inside.ratio:.2g} of the vorticity, "
        "and a constraint would take that away"
    )


def doubts(found: Inspection) -> Iterator[str]:
    """What should be looked at before training, a sentence each."""
    yield from _doubts_of_values(found)
    yield from _doubts_of_times(found)
    yield from _doubts_of_grid(found)


def _doubts_of_values(found: Inspection) -> Iterator[str]:
    fields, values, missing = found.fields, found.values, np.asarray(found.gaps.missing)
    metres = re.sub(r"\s|\(|\)", "", fields.units.lower()) in METRES
    if not metres:
        yield (
            f"the velocity is in '{fields.units}', spacings are in metres: divergence, vorticity and the tolerances of "
            "physics= are per s only for m s-1"
        )
    words = " ".join([fields.source, *fields.names, *fields.attrs.values()])
    limit = WATER if OF_WATER.search(words) else AIR
    if values.max_speed > limit and metres:
        yield f"speeds up to {values.max_speed:.3g} m s-1: cm s-1, or fill values that the file does not declare?"
    rms = float(np.sqrt(values.square.sum() / max(values.counts.sum(), 1)))
    if values.max_speed > SPIKE * rms:
        yield f"the largest speed is {values.max_speed / rms:.0f} times the RMS of {rms:.3g}: spikes, or fill values?"
    always = (values.zeros == values.counts) & (values.counts > 0)
    if always.any() and (not found.still or largest_region(always, fields.grid.periodic) > PATCH):
        yield (
            f"{always.sum()} valid cells are 0 in every snapshot: land or solids? Name a mask, dataset.invalid=..., or "
            "give dataset.land=zero"
        )
    if (empty := np.flatnonzero(missing == 1)).size:
        yield f"nothing is measured in {_listed(empty, 'snapshot')} (both components must be)"
    if (odd := outliers(values.speed)).size:
        yield f"the RMS speed of {_listed(odd, 'snapshot')} stands out from both neighbours"
    if values.repeated:
        yield f"{_listed(values.repeated, 'snapshot')}: a copy of the one before, which would leak between the splits"


def _doubts_of_times(found: Inspection) -> Iterator[str]:
    fields, when, rho = found.fields, found.times, found.autocorrelation
    if when.repeated or when.backward:
        yield f"{when.repeated} times stand twice in a row and {when.backward} run backward: blocks of time would mix"
    if when.irregular - when.repeated > 0:
        yield f"{when.irregular} of {len(fields) - 1} steps are not {when.step}: the guard counts snapshots, not time"
    if found.still:
        yield (
            "one snapshot: gaps and the outside cannot be told apart, and nothing can be trained; fill it by a network "
            "that was trained elsewhere, infer.py ckpt=... input=FILE"
        )
        return
    try:
        TimeBlocks(guard=found.guard).split(fields)
    except UserError as error:
        yield str(error).removeprefix(f"{fields.source}: ")
    if found.cut_short:
        yield (
            f"the correlation is still {rho[max(found.guard, 1)]:.2f} after a tenth of the snapshots, {found.guard}, "
            "the longest guard: scores on the test snapshots will flatter"
        )
    elif (lag := found.returns) is not None:
        yield f"the correlation comes back to {rho[lag]:.2f} at lag {lag}: the flow repeats itself, whatever the guard"
    if len(fields) < FEW:
        yield f"{len(fields)} snapshots are few: the network will learn them by heart; watch val/loss"


def _doubts_of_grid(found: Inspection) -> Iterator[str]:
    fields, grid = found.fields, found.fields.grid
    if all(bool((spacing == 1).all()) for spacing in (grid.dx, grid.dy)):
        yield "no spacing was found, dx = dy = 1 m: give dataset.dx= and dataset.dy= in metres"
    closed, inside = found.flow.divergent, found.inside.divergent
    if closed > max(0.1, 3 * inside):
        yield (
            f"the flow crosses the edge of the valid cells ({closed:.0%} of the energy is divergent if it is closed, "
            f"{inside:.1%} in the rectangle): if the data end there, and not the sea, keep physics=none"
        )
    if not 0.5 <= aspect(fields) <= 2.0:
        yield f"cells are {aspect(fields):.2g} times as wide as high: masks and networks count in cells, not in metres"


def outliers(speed: Sequence[float]) -> NDArray[np.int64]:
    """Snapshots whose speed sticks out from both neighbours: by 10 % of the usual speed, and 10 times the usual way."""
    known = np.flatnonzero(np.isfinite(speed))
    series = np.asarray(speed)[known]
    peaks = np.abs(series - ndimage.median_filter(series, 3, mode="nearest"))
    usual = np.median(peaks[peaks > 0]) if peaks.any() else 0.0
    return known[(peaks > 0.1 * np.median(series)) & (peaks > 10 * usual)]


def aspect(fields: Fields) -> float:
    """dx / dy, the median over the rows."""
    return (fields.grid.dx / fields.grid.dy).abs().median().item()


def _range(spacing: Tensor) -> str:
    low, high = (f"{value.item():.5g}" for value in (spacing.min(), spacing.max()))
    return low if low == high else f"{low} to {high}"


def _listed(numbers: Sequence[int] | NDArray[np.int64], noun: str) -> str:
    """`snapshot 3`, or `snapshots 3, 4, 5 and 7 more`."""
    shown = ", ".join(str(number) for number in numbers[:3])
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{noun}{'s' * (len(numbers) > 1)} {shown}{more}"


# What to type.


@dataclass(frozen=True)
class Recipe:
    """A configuration for training on a file.

    Arguments:
        name: Of the run and of the experiment.
        options: The option of each group.
        settings: Keys and values, in groups or alone.
        notes: Comments: on the file under the key ``, on a setting under its dotted key.
    """

    name: str
    options: dict[str, str]
    settings: dict[str, Any]
    notes: dict[str, str]

    def yaml(self) -> str:
        """The text of conf/experiment/<name>.yaml."""
        lines = ["# @package _global_", f"# {self.notes['']}", "defaults:"]
        lines += [f"  - override /{group}: {option}" for group, option in self.options.items()]
        for key, value in self.settings.items():
            if not isinstance(value, Mapping):
                lines.append(f"{key}: {_scalar(value)}")
                continue
            lines.append(f"{key}:")
            for inner, each in value.items():
                line, note = f"  {inner}: {_scalar(each)}", self.notes.get(f"{key}.{inner}")
                lines.append(f"{line:24} # {note}" if note else line)
        return "\n".join([*lines, f"# {self.notes['physics']}", ""])

    def command(self) -> str:
        """The same as one line."""
        words = [f"{group}={option}" for group, option in self.options.items()]
        for key, value in self.settings.items():
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            words += [shlex.quote(override(f"{key}.{name}".rstrip("."), each)) for name, each in inner]
        return " ".join(["python", "train.py", *words])


def run_name(path: str) -> str:
    """What the run and the experiment of a file are called."""
    names = (re.sub(r"[^\w+-]+", "_", name).strip("_") for name in (Path(path).stem, Path(path).parent.name))
    return next(filter(None, names), "data")


def recipe(found: Inspection, name: str, given: Mapping[str, Any]) -> Recipe:
    """What to train on a file.

    Arguments:
        found: What is known of it.
        name: Of the run and of the experiment.
        given: The keys of dataset=file that were given, the path among them.
    """
    fields, n = found.fields, len(found.fields)
    window = window_for(fields)
    cells = fields.grid.valid.numel() if window is None else window[0] * window[1]
    batch = 16 if n < LEARNED_BY_HEART else 32
    steps = min(max(1000 * round(PASSES * n / batch / 1000), 4000), 100_000)
    patch = 1 if cells <= 48**2 else 2 if cells <= 256**2 else 4
    model = "unet_tiny" if n < LEARNED_BY_HEART else "unet_small" if n < 20_000 else "unet_base"
    settings = {
        "name": name,
        "dataset": dict(given),
        "splits": {"guard": found.guard},
        **({} if window is None else {"window": window}),
        "model": {**({"patch": patch} if patch > 1 else {}), **({"dropout": 0.1} if n < LEARNED_BY_HEART else {})},
        "trainer": {"batch_size": batch, "max_steps": steps},
    }
    notes = {
        "": f"{n} fields of {fields.shape[0]}x{fields.shape[1]} cells, {' and '.join(fields.names)}",
        "splits.guard": f"snapshots until the correlation is below {THRESHOLD}",
        "window": f"{n} snapshots are few; add augment.transforms=[flip_x,flip_y] where both sides are alike",
        "model.patch": f"{cells} cells are many",
        "model.dropout": "against learning them by heart",
        "trainer.max_steps": f"{batch * steps / n:.0f} passes; a GPU bears a larger model",
        "physics": f"physics: {physics(found)}",
    }
    settings = {key: value for key, value in settings.items() if value != {}}
    return Recipe(name, {"dataset": "file", "model": model}, settings, notes)


def window_for(fields: Fields) -> list[int] | None:
    """The window to train on, `[h, w]`, where snapshots are few and there is room: four fifths of a side, at most 64.

    On a year of daily currents (260 fields of 41x81) the validation loss of whole fields rose from .46 after 500 steps
    to .55 after 1500, that of windows of 32x56, flipped, fell to .35.
    """
    sides = [min(int(0.8 * side) // 8 * 8, 64) for side in fields.shape]
    roomy = min(sides) >= 16 and not (all(fields.grid.periodic) and fields.grid.valid.all())
    return sides if len(fields) < LEARNED_BY_HEART and roomy else None


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()


def override(key: str, value: Any) -> str:
    """`key=value` as the programs read it, the value quoted where it must be."""
    text = json.dumps(value) if not isinstance(value, str) else value
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]+", value):
        # Within quotes a backslash is one, unless a quote follows.
        escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
        text = f'"{escaped}"'
    return f"{key}={text}"

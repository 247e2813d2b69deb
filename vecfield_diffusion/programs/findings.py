"""What a set of velocities is like, in words: a report by label, and what should be looked at before training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.statistics import homogeneous
from vecfield_diffusion.data.units import SPEED, factor
from vecfield_diffusion.evaluation.baselines import CORRELATED
from vecfield_diffusion.evaluation.inspection import FlowShares, Inspection, largest_region
from vecfield_diffusion.physics.parts import Part

#: Fewer snapshots, fewer independent fields to test on, and speeds more times the RMS than this, are doubted.
FEW, TOO_FEW, SPIKE = 100, 10, 15
#: Divergence over vorticity from which a flow is as much noise as flow; of white noise it is 1.
NOISY = 0.5
#: Cells of a patch of zeros that looks like land.
PATCH = 8
#: Speeds in m s-1 that water and air do not reach.
WATER, AIR = 10.0, 150.0
OF_WATER = re.compile(r"ocean|sea\b|sea_|marine|current|radar|hfr|altim|geostroph|\b(uo|ugos|water_u)\b", re.IGNORECASE)


def report(found: Inspection) -> str:
    """What was found, a line a label, and the doubts."""
    rows = layout(found) | measurements(found) | consequences(found)
    lines = [f"  {label:15}{text}" for label, text in rows.items()]
    listed = [f"  - {doubt}" for doubt in doubts(found)] or ["  none"]
    return "\n".join([found.fields.source, *lines, "", "doubts", *listed])


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
    """How the energy splits, by label."""
    grid, filled = found.fields.grid, " (gaps filled smoothly)" * (min(found.gaps.missing) > 0)
    whole = all(part.stop - part.start == size for part, size in zip(found.part, grid.shape, strict=True))
    where = "" if whole else f", {_place(found.part)}"
    if grid.valid[found.part].all():
        return {"flow": f"{_flow(found.flow)}{filled}{where}"}
    return {
        "flow": f"{_flow(found.flow)}{filled}, if nothing passes the land{where}",
        "inside": f"{_flow(found.inside)}{filled}, {_place(found.rectangle)}, which have no land",
    }


def _flow(flow: FlowShares) -> str:
    parts = f"{flow.rotational:.1%} rotational, {flow.divergent:.1%} divergent, {flow.harmonic:.1%} harmonic energy"
    return f"{parts}; RMS divergence {flow.divergence:.3g}, vorticity {flow.vorticity:.3g} per s"


def _place(part: Part) -> str:
    (top, bottom), (left, right) = ((rows.start, rows.stop - 1) for rows in part)
    return f"in rows {top}-{bottom}, columns {left}-{right}"


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
    statistics, step = found.statistics, found.times.step
    rows = {"augmentation": ", ".join(found.augmentation) or "none that the domain allows", "physics": physics(found)}
    if found.still:
        return rows
    after = f" (of {step})" * bool(step)
    noise = (
        f"diffusion.sigma_max=auto is {statistics.sigma_max:g}, 10 sqrt(leading eigenvalue {statistics.lambda_max:.4g})"
    )
    return rows | {
        "noise": noise,
        "correlation": f"{correlation(found)}{after * bool(found.guard)}",
        "series": series(found),
        "evidence": f"worth about {found.independent:.3g} independent fields: the correlation at all lags counts",
    }


def correlation(found: Inspection) -> str:
    """What the guard of the splits is made of."""
    if found.guard or found.cut_short:
        longest = ", the longest" * found.cut_short
        return f"{found.at_guard:z.2f} after a guard of {found.guard} snapshots{longest}"
    return f"{found.at_guard:z.2f} from one snapshot to the next: no guard between the splits"


def series(found: Inspection) -> str:
    """Whether snapshots say something of those that follow, and what fills them then."""
    if not found.following >= CORRELATED:
        return f"none: {found.following:.2f} from one snapshot to the next, so each is filled by itself"
    return (
        f"{found.following:.2f} from one snapshot to the next: dataset.frames and model=gaussian fill it in space and "
        "time; at once, without training, infer.py ckpt=none"
    )


def physics(found: Inspection) -> str:
    """The constraint that the data bear, by the divergence over vorticity that decides on `oi_solenoidal`, too."""
    statistics = found.statistics
    ratio = f"divergence is {statistics.divergent:.2f} of the vorticity"
    if statistics.solenoidal:
        return f"infer.py inpainting=mmps physics=divergence, within {statistics.divergence_rms:.2g} per s: {ratio}"
    return f"none: {ratio}, and a constraint would take that away"


def doubts(found: Inspection) -> Iterator[str]:
    """What should be looked at before training, a sentence each."""
    yield from _doubts_of_values(found)
    yield from _doubts_of_times(found)
    yield from _doubts_of_grid(found)


def _doubts_of_values(found: Inspection) -> Iterator[str]:
    fields, values, missing = found.fields, found.values, np.asarray(found.gaps.missing)
    if found.left_out:
        yield f"{found.left_out}. Where they are land, a mask says so: dataset.valid= or dataset.invalid="
    metres = factor(fields.units, SPEED) == 1.0
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
        yield "one snapshot: gaps and the outside cannot be told apart, and nothing can be trained on it alone"
        return
    if not found.split:
        yield found.too_few
    if found.cut_short:
        yield (
            f"the correlation is still {found.at_guard:z.2f} after a tenth of the snapshots, {found.guard}, the "
            "longest guard: scores on the test snapshots will flatter"
        )
    elif (lag := found.returns) is not None:
        yield f"the correlation comes back to {rho[lag]:.2f} at lag {lag}: the flow repeats itself, whatever the guard"
    if found.split and round(found.tested) < TOO_FEW:
        yield (
            f"the test snapshots, {len(found.split['test'])}, are worth {found.tested:.2g} independent fields, too few "
            "to tell: give more snapshots, or a larger share, e.g. splits.train=0.6 splits.test=0.3"
        )
    yield from found.unlike
    if len(fields) < FEW:
        yield f"{len(fields)} snapshots are few: the network will learn them by heart; watch val/loss"


def _doubts_of_grid(found: Inspection) -> Iterator[str]:
    fields, grid = found.fields, found.fields.grid
    if all(bool((spacing == 1).all()) for spacing in (grid.dx, grid.dy)):
        yield "no spacing was found, dx = dy = 1 m: give dataset.dx= and dataset.dy= in metres"
    if (ratio := found.statistics.divergent) > NOISY:
        yield (
            f"divergence is {ratio:.2f} of the vorticity, of white noise it is 1: are errors of measurement as large "
            "as the differences from cell to cell? In surface currents and winds it may be what rises and sinks"
        )
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

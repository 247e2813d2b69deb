"""The picture of what a file of velocities is like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cmocean
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.splits import THRESHOLD
from vecfield_diffusion.evaluation.inspection import Inspection
from vecfield_diffusion.evaluation.plots.maps import draw_field, draw_scalar
from vecfield_diffusion.evaluation.plots.style import (
    INK,
    SPREAD,
    Coordinates,
    Floats,
    Look,
    colour_bar,
    label_axes,
    look_of,
    new_figure,
    pretty,
    save,
)


def figure_inspection(path: str | Path, found: Inspection) -> None:
    """Draw what a file of velocities is like into a PNG, with what `evaluation.inspection` found out.

    Above, maps: the fullest snapshot, how often each cell is measured (the mean field where nothing is missing), the
    variability. Below: the autocorrelation with the guard, speed and coverage over time, the distribution of values. Of
    one snapshot alone, the field and the distribution.

    Arguments:
        path: The file to write.
        found: What was found out.
    """
    fields, missing = found.fields, np.asarray(found.gaps.missing)
    fullest = np.flatnonzero(missing == missing.min())
    shown = int(fullest[len(fullest) // 2])
    field = fields.read([shown])[0].numpy()
    (x, x_label), (y, y_label) = (_place(fields, axis) for axis in "xy")
    look = look_of(field, fields.grid, coordinates=Coordinates(x, y, x_label, y_label))
    name = f"snapshot {shown}" if fields.time is None else _when(fields.time[shown], fields.time_attrs)
    height, width = fields.shape
    draw = _draw_still if found.still else _draw_series
    figure = draw(found, lambda figure, axis, bar: _map_field(figure, axis, bar, name, field, look, fields.units), look)
    title = f"{Path(fields.source).name}: {len(fields)} x {height} x {width}, {', '.join(fields.names)}"
    figure.suptitle(title, fontsize=11)
    save(figure, Path(path))


def _draw_still(found: Inspection, field: Callable[[Figure, Axes, Axes], None], look: Look) -> Figure:
    """The picture of one snapshot: the field, and beside it the distribution of its values."""
    panel = 4.2 * min(look.tallness, 1.4)
    figure = new_figure(9.0, panel + 1.5)
    cells = figure.add_gridspec(2, 2, height_ratios=[panel, 0.11])
    axis = figure.add_subplot(cells[0, 0])
    label_axes(axis, look, left=True, bottom=True, width=4.0)
    field(figure, axis, figure.add_subplot(cells[1, 0]))
    _curve_values(figure.add_subplot(cells[:, 1]), found)
    return figure


def _draw_series(found: Inspection, field: Callable[[Figure, Axes, Axes], None], look: Look) -> Figure:
    """The picture of many snapshots: three maps above three curves."""
    fields, values = found.fields, found.values
    panel = 13 / 3 * 0.85 * min(look.tallness, 1.4)
    figure = new_figure(13.0, panel + 4.2)
    cells = figure.add_gridspec(3, 3, height_ratios=[panel, 0.11, 2.4])
    maps, bars, curves = ([figure.add_subplot(cells[row, k]) for k in range(3)] for row in range(3))
    for k, axis in enumerate(maps):
        label_axes(axis, look, left=k == 0, bottom=True, width=13 / 3 * 0.85)
    field(figure, maps[0], bars[0])
    if np.ptp(values.counts[look.valid]) > 0:
        share = np.where(look.valid, values.counts / len(fields), np.nan)
        _map(figure, maps[1], bars[1], "measured", share, look, (1.0, cmocean.cm.dense, ("share of the snapshots", "")))
    else:
        _map_field(figure, maps[1], bars[1], "mean over time", values.mean, look, fields.units)
    top = float(np.nanquantile(values.deviation, 0.995)) or 1.0
    unit = ("standard deviation over time", fields.units)
    _map(figure, maps[2], bars[2], "variability", values.deviation, look, (top, SPREAD, unit))
    _curve_correlation(curves[0], found)
    _curve_series(curves[1], found)
    _curve_values(curves[2], found)
    return figure


def _map_field(figure: Figure, axis: Axes, bar: Axes, name: str, field: Floats, look: Look, units: str) -> None:
    """Speed and arrows of a field `(2, H, W)`, and the colour bar."""
    draw_field(axis, name, field, np.isfinite(field).all(axis=0) & look.valid, look)
    colour_bar(figure, bar, look.norm, look.colours, look.label(units))


def _map(
    figure: Figure,
    axis: Axes,
    bar: Axes,
    name: str,
    values: Floats,
    look: Look,
    scale: tuple[float, Colormap, tuple[str, str]],
) -> None:
    """A scalar `(H, W)` and the colour bar, whose scale is its top, its colours and its label."""
    top, colours, label = scale
    draw_scalar(axis, name, values, look, Normalize(0, top), colours)
    colour_bar(figure, bar, Normalize(0, top), colours, label)


def _curve_correlation(axis: Axes, found: Inspection) -> None:
    """rho over the lag, the threshold, and the guard that follows."""
    rho, step = found.autocorrelation, found.times.step
    axis.plot(np.arange(len(rho)), rho, color="C0", marker="." if len(rho) < 60 else None)
    axis.axhline(THRESHOLD, color=INK, linewidth=0.8, linestyle=":")
    axis.axhline(0.0, color=INK, linewidth=0.8)
    axis.axvline(found.guard, color="C3", linewidth=1.2, label=f"guard: {found.guard} snapshots")
    axis.set(xlabel=f"lag [{f'steps of {step}' if step else 'snapshots'}]", ylim=(min(-0.1, rho.min()), 1.03))
    _finish(axis, "autocorrelation of the anomalies", legend=True)


def _curve_series(axis: Axes, found: Inspection) -> None:
    """RMS speed over time, and the share that is measured where something is missing."""
    fields = found.fields
    time = np.arange(len(fields)) if fields.time is None else fields.time
    axis.plot(time, found.values.speed, color="C0", linewidth=1.0)
    axis.set_ylabel("RMS speed", fontsize=9)
    if fields.time is not None and fields.time.dtype.kind == "M":
        axis.xaxis.set_major_formatter(ConciseDateFormatter(axis.xaxis.get_major_locator()))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlabel("snapshot" if fields.time is None else f"time {fields.time_attrs.get('units', '')}".strip())
    if found.gappy:
        share = axis.twinx()
        share.fill_between(time, 1 - np.asarray(found.gaps.missing), color="C1", alpha=0.25, linewidth=0, step="mid")
        share.set_ylim(0, 1)
        share.set_ylabel("share measured (shaded)", fontsize=9)
        share.tick_params(labelsize=8)
        axis.set_zorder(share.get_zorder() + 1)  # the line in front
        axis.patch.set_visible(False)
    _finish(axis, f"RMS speed over time [{pretty(fields.units)}]")


def _curve_values(axis: Axes, found: Inspection) -> None:
    """The distribution of both components, on a logarithmic axis, where tails and spikes show."""
    fields = found.fields
    picked = np.unique(np.linspace(0, len(fields) - 1, 64).round().astype(int))
    components = fields.read(picked).numpy().swapaxes(0, 1).reshape(2, -1)
    bins = np.linspace(np.nanmin(components), np.nanmax(components), 80)
    for values, name, colour in zip(components, fields.names, ("C0", "C3"), strict=True):
        axis.hist(values[np.isfinite(values)], bins, density=True, histtype="step", color=colour, label=name, log=True)
    axis.set_xlabel(f"velocity [{pretty(fields.units)}]", fontsize=9)
    _finish(axis, "distribution", legend=True)


def _finish(axis: Axes, name: str, legend: bool = False) -> None:
    axis.set_title(name, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_size(9)
    axis.margins(x=0)
    if legend:
        axis.legend(fontsize=8, frameon=False)


def _place(fields: Fields, axis: str) -> tuple[Floats, str]:
    """A coordinate and its label; metres by the ten thousand are kilometres."""
    values, name = np.asarray(getattr(fields, axis), dtype=np.float64), getattr(fields, f"{axis}_name")
    units = str(getattr(fields, f"{axis}_attrs").get("units", ""))
    if name in ("lon", "lat"):
        return values, {"lon": "longitude", "lat": "latitude"}[name]
    if units in ("m", "meter", "metre", "meters", "metres") and np.ptp(values) > 2e4:
        values, units = values / 1000, "km"
    return values, f"{name} [{units}]" if units else name


def _when(time: Any, attrs: Mapping[str, Any]) -> str:
    """A time in words."""
    if np.asarray(time).dtype.kind == "M":
        return str(time.astype("datetime64[m]")).replace("T", " ")
    return f"time {time:g} {attrs.get('units', '')}".strip()

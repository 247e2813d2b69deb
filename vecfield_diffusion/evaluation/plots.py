"""Pictures of filled fields: what was known, what the ensemble says, how sure it is.

Colour is the speed or the vorticity, on one scale for the truth, the mean and the members, which the truth sets (the
mean where it is unknown); arrows, at most one per block of cells, show the direction. The spread, the root of the
summed variances of both components, has a scale of its own. Land is grey, cells that were not observed are blank.
Only matplotlib's object interface is used: no window, no global state.

The figures of a report, which compare methods, are given back as PNG: networks in strong colours, the other methods in
quiet ones, the truth in black.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cmocean
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.inspection import Inspection
from vecfield_diffusion.data.splits import THRESHOLD
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import vorticity

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Colour = Literal["speed", "vorticity"]

_LAND, _BLANK, _INK = "0.70", "0.96", "0.12"
_ARROWS = 20  # along the longer axis of a large panel
_DPI = 100
_SPREAD = cmocean.cm.amp
_COLOURS = {
    "speed": cmocean.tools.crop_by_percent(cmocean.cm.speed, 30, which="max"),  # arrows must show on its dark end
    "vorticity": cmocean.tools.crop_by_percent(cmocean.cm.balance, 15, which="both"),
}


@dataclass(frozen=True)
class Coordinates:
    """Where the cells lie, as the source says: values `(W,)` and `(H,)`, and the labels of the axes."""

    x: Floats
    y: Floats
    x_label: str = "x"
    y_label: str = "y"


@dataclass(frozen=True)
class _Look:
    """What all panels of a figure share: the domain, its place on the axes, the colours, the scale of the arrows."""

    grid: Grid
    coordinates: Coordinates | None
    colour: Colour
    norm: Normalize
    arrow: float
    step: int

    @property
    def valid(self) -> Bools:
        return self.grid.valid.cpu().numpy()

    @property
    def colours(self) -> Colormap:
        return _COLOURS[self.colour]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The outer edges of the first and last column and of the first and last row."""
        if self.coordinates is not None:
            return *_edges(self.coordinates.x), *_edges(self.coordinates.y)
        x, y = (np.arange(size) for size in reversed(self.grid.shape))
        x, y = x[:: int(self.grid.dx[0].sign())], y[:: int(self.grid.dy[0].sign())]  # counted from the south-west
        return *_edges(x), *_edges(y)

    @property
    def tallness(self) -> float:
        """Height over width of the domain on the ground."""
        height, width = self.grid.shape
        return height / width * float(self.grid.dy.abs().mean() / self.grid.dx.abs().mean())

    @property
    def wide(self) -> bool:
        return self.tallness < 0.75

    def label(self, units: str) -> str:
        """The words at the colour bar."""
        return f"speed [{_pretty(units)}]" if self.colour == "speed" else "vorticity [s$^{-1}$]"


def figure_inpainting(
    path: str | Path,
    truth: ArrayLike | None,
    observed: ArrayLike,
    members: ArrayLike,
    grid: Grid,
    units: str = "m s-1",
    title: str = "",
    colour: Colour = "speed",
    coordinates: Coordinates | None = None,
    measured: ArrayLike | None = None,
) -> None:
    """Draw the truth (if known), what was observed, the ensemble mean, one or two members and the spread into a PNG.

    Arguments:
        path: The file to write.
        truth: The field `(2, H, W)`, NaN where unknown.
        observed: The measured cells, `(H, W)` or `(1, H, W)`.
        members: The ensemble, `(M, 2, H, W)`.
        grid: Its land and spacing.
        units: Units of the fields.
        title: A line above the panels.
        colour: `speed`, or `vorticity` in s^-1 (per unit of length of the grid).
        coordinates: Where the cells lie; cell numbers if not given.
        measured: The measured field `(2, H, W)`, read at observed cells; the truth, else the mean, if not given.
    """
    members = np.asarray(members)
    truth = None if truth is None or not np.isfinite(np.asarray(truth)).any() else np.asarray(truth)
    known = members.mean(axis=0) if truth is None else truth
    look = _look(known, grid, colour, coordinates, _ARROWS)
    seen = np.asarray(observed).reshape(grid.shape) & look.valid
    panels = _panels(truth, known if measured is None else np.asarray(measured), seen, members, look)
    figure, axes, bars = _layout(len(panels), len(members) > 1, look)
    for axis, (name, field, shown) in zip(axes, panels, strict=False):
        _draw(axis, field, shown, look)
        axis.set_title(name, fontsize=10)
    _bar(figure, bars[0], look.norm, look.colours, look.label(units))
    if len(members) > 1:
        _draw_spread(figure, axes[-1], bars[1], members, look, units)
    figure.suptitle(title, fontsize=12)
    _save(figure, Path(path))


def figure_inspection(path: str | Path, found: Inspection) -> None:
    """Draw what a file of velocities is like into a PNG, with what `data.inspection` found out.

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
    look = _look(field, fields.grid, "speed", Coordinates(x, y, x_label, y_label), _ARROWS)
    name = f"snapshot {shown}" if fields.time is None else _when(fields.time[shown], fields.time_attrs)
    height, width = fields.shape
    draw = _draw_still if found.still else _draw_series
    figure = draw(found, lambda figure, axis, bar: _map_field(figure, axis, bar, name, field, look, fields.units), look)
    title = f"{Path(fields.source).name}: {len(fields)} x {height} x {width}, {', '.join(fields.names)}"
    figure.suptitle(title, fontsize=11)
    _save(figure, Path(path))


def _draw_still(found: Inspection, field: Callable[[Figure, Axes, Axes], None], look: _Look) -> Figure:
    """The picture of one snapshot: the field, and beside it the distribution of its values."""
    panel = 4.2 * min(look.tallness, 1.4)
    figure = _figure(9.0, panel + 1.5)
    cells = figure.add_gridspec(2, 2, height_ratios=[panel, 0.11])
    axis = figure.add_subplot(cells[0, 0])
    _label(axis, look, left=True, bottom=True)
    field(figure, axis, figure.add_subplot(cells[1, 0]))
    _curve_values(figure.add_subplot(cells[:, 1]), found)
    return figure


def _draw_series(found: Inspection, field: Callable[[Figure, Axes, Axes], None], look: _Look) -> Figure:
    """The picture of many snapshots: three maps above three curves."""
    fields, values = found.fields, found.values
    panel = 13 / 3 * 0.85 * min(look.tallness, 1.4)
    figure = _figure(13.0, panel + 4.2)
    cells = figure.add_gridspec(3, 3, height_ratios=[panel, 0.11, 2.4])
    maps, bars, curves = ([figure.add_subplot(cells[row, k]) for k in range(3)] for row in range(3))
    for k, axis in enumerate(maps):
        _label(axis, look, left=k == 0, bottom=True)
    field(figure, maps[0], bars[0])
    if np.ptp(values.counts[look.valid]) > 0:
        share = np.where(look.valid, values.counts / len(fields), np.nan)
        _map(figure, maps[1], bars[1], "measured", share, look, (1.0, cmocean.cm.dense, "share of the snapshots"))
    else:
        _map_field(figure, maps[1], bars[1], "mean over time", values.mean, look, fields.units)
    top = float(np.nanquantile(values.deviation, 0.995)) or 1.0
    unit = f"standard deviation over time [{_pretty(fields.units)}]"
    _map(figure, maps[2], bars[2], "variability", values.deviation, look, (top, _SPREAD, unit))
    _curve_correlation(curves[0], found)
    _curve_series(curves[1], found)
    _curve_values(curves[2], found)
    return figure


def _map_field(figure: Figure, axis: Axes, bar: Axes, name: str, field: Floats, look: _Look, units: str) -> None:
    """Speed and arrows of a field `(2, H, W)`, and the colour bar."""
    _draw(axis, field, np.isfinite(field).all(axis=0) & look.valid, look)
    axis.set_title(name, fontsize=10)
    _bar(figure, bar, look.norm, look.colours, look.label(units))


def _map(
    figure: Figure, axis: Axes, bar: Axes, name: str, values: Floats, look: _Look, scale: tuple[float, Colormap, str]
) -> None:
    """A scalar `(H, W)` and the colour bar, whose scale is its top, its colours and its label."""
    top, colours, label = scale
    _image(axis, values, look, Normalize(0, top), colours)
    axis.set_title(name, fontsize=10)
    _bar(figure, bar, Normalize(0, top), colours, label)


def _curve_correlation(axis: Axes, found: Inspection) -> None:
    """rho over the lag, the threshold, and the guard that follows."""
    rho, step = found.autocorrelation, found.times.step
    axis.plot(np.arange(len(rho)), rho, color="C0", marker="." if len(rho) < 60 else None)
    axis.axhline(THRESHOLD, color=_INK, linewidth=0.8, linestyle=":")
    axis.axhline(0.0, color=_INK, linewidth=0.8)
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
    _finish(axis, f"RMS speed over time [{_pretty(fields.units)}]")


def _curve_values(axis: Axes, found: Inspection) -> None:
    """The distribution of both components, on a logarithmic axis, where tails and spikes show."""
    fields = found.fields
    picked = np.unique(np.linspace(0, len(fields) - 1, 64).round().astype(int))
    components = fields.read(picked).numpy().swapaxes(0, 1).reshape(2, -1)
    bins = np.linspace(np.nanmin(components), np.nanmax(components), 80)
    for values, name, colour in zip(components, fields.names, ("C0", "C3"), strict=True):
        axis.hist(values[np.isfinite(values)], bins, density=True, histtype="step", color=colour, label=name, log=True)
    axis.set_xlabel(f"velocity [{_pretty(fields.units)}]", fontsize=9)
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


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _panels(
    truth: Floats | None, measured: Floats, seen: Bools, members: Floats, look: _Look
) -> list[tuple[str, Floats, Bools]]:
    """Name, field and shown cells of every panel but the spread; a second member fills the rows of a wide domain."""
    panels = [] if truth is None else [("truth", truth, look.valid)]
    panels.append((f"observed ({seen.sum() / look.valid.sum():.0%})", measured, seen))
    if len(members) == 1:
        return [*panels, ("estimate", members[0], look.valid)]
    panels.append(("ensemble mean", members.mean(axis=0), look.valid))
    shown = 2 if look.wide and truth is not None else 1
    return panels + [(f"member {number + 1}", members[number], look.valid) for number in range(shown)]


def sample_grid(
    path: str | Path,
    truth: ArrayLike,
    observed: ArrayLike,
    members: ArrayLike,
    grid: Grid,
    units: str = "m s-1",
    colour: Colour = "speed",
) -> None:
    """Draw a row per case, truth, observed, ensemble mean and one member, into a PNG: how a training comes along.

    Arguments:
        path: The file to write.
        truth: The fields `(N, 2, H, W)`.
        observed: The measured cells, `(N, H, W)` or `(N, 1, H, W)`.
        members: The ensembles, `(M, N, 2, H, W)`.
        grid: Their land and spacing.
        units: Units of the fields.
        colour: `speed` or `vorticity`.
    """
    truth, members = np.asarray(truth), np.asarray(members)
    look = _look(truth, grid, colour, None, _ARROWS * 2 // 3)
    seen = np.asarray(observed).reshape(len(truth), *grid.shape) & look.valid
    figure = _figure(8.0, 2.0 * look.tallness * len(truth) + 0.9)
    cells = figure.add_gridspec(len(truth) + 1, 4, height_ratios=[*[2.0 * look.tallness] * len(truth), 0.1])
    for row, cases in enumerate(zip(truth, truth, members.mean(axis=0), members[0], strict=True)):
        shown = (look.valid, seen[row], look.valid, look.valid)
        for column, name in enumerate(("truth", "observed", "ensemble mean", "member 1")):
            axis = figure.add_subplot(cells[row, column])
            _draw(axis, cases[column], shown[column], look)
            axis.set(xticks=[], yticks=[])
            axis.set_title(name if row == 0 else "", fontsize=9)
    _bar(figure, figure.add_subplot(cells[-1, 1:3]), look.norm, look.colours, look.label(units))
    _save(figure, Path(path))


def _look(known: Floats, grid: Grid, colour: Colour, coordinates: Coordinates | None, arrows: int) -> _Look:
    """The scales that fields `(..., 2, H, W)` ask for: 99.5 % of their values lie inside the colours."""
    size = np.abs(_scalar(known, grid, colour))
    size = size[np.isfinite(size)]
    top = float(np.quantile(size, 0.995)) if size.size else 0.0
    norm = Normalize(0 if colour == "speed" else -(top or 1.0), top or 1.0)
    speed = _scalar(known, grid, "speed")
    speed = speed[np.isfinite(speed)]
    typical = float(np.sqrt(np.square(speed).mean())) if speed.size else 0.0
    return _Look(grid, coordinates, colour, norm, typical or 1.0, max(1, round(max(grid.shape) / arrows)))


def _scalar(field: Floats, grid: Grid, colour: Colour) -> Floats:
    """What is coloured, `(..., H, W)`; NaN on land and where `field` is."""
    if colour == "speed":
        values = np.hypot(field[..., 0, :, :], field[..., 1, :, :])
    else:
        flat = torch.as_tensor(np.asarray(field, dtype=np.float64)).reshape(-1, 2, *grid.shape)
        values = vorticity(flat, grid.to("cpu")).numpy().reshape(*field.shape[:-3], *grid.shape)
    return np.where(grid.valid.cpu().numpy(), values, np.nan)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.0, hspace=0.0)
    return figure


def _layout(fields: int, spread: bool, look: _Look) -> tuple[Figure, list[Axes], list[Axes]]:
    """The panels in reading order, the spread last, and the colour bars below: one for the fields, one for the spread.

    One row where the panels are about square or few, two for wide ones.
    """
    count = fields + spread
    columns = count // 2 if look.wide and count > 3 else count
    rows = count // columns
    width = 12.0 if columns > 2 else 9.0
    panel = width / columns * 0.9 * look.tallness
    figure = _figure(width, rows * (panel + 0.35) + 1.1)
    cells = figure.add_gridspec(rows + 1, columns, height_ratios=[*[panel] * rows, 0.12])
    axes = [figure.add_subplot(cells[number // columns, number % columns]) for number in range(count)]
    for number, axis in enumerate(axes):
        _label(axis, look, left=number % columns == 0, bottom=number + columns >= count)
    bars = [figure.add_subplot(cells[rows, : columns - spread])]
    return figure, axes, bars + ([figure.add_subplot(cells[rows, -1])] if spread else [])


def _label(axis: Axes, look: _Look, left: bool, bottom: bool) -> None:
    axis.tick_params(labelsize=8, length=2, labelleft=left, labelbottom=bottom)
    if look.coordinates is not None:
        axis.set_ylabel(look.coordinates.y_label if left else "", fontsize=9)
        axis.set_xlabel(look.coordinates.x_label if bottom else "", fontsize=9)


def _bar(figure: Figure, axis: Axes, norm: Normalize, colours: Colormap, label: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=axis, orientation="horizontal", extend="max" if norm.vmin == 0 else "both"
    )
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw(axis: Axes, field: Floats, shown: Bools, look: _Look) -> None:
    """The cells `shown` of a field `(2, H, W)`: colour and arrows, over land."""
    values = np.where(shown, _scalar(field, look.grid, look.colour), np.nan)
    _image(axis, values, look, look.norm, look.colours)
    _arrows(axis, np.where(shown, field, np.nan), look)


def _draw_spread(figure: Figure, axis: Axes, bar: Axes, members: Floats, look: _Look, units: str) -> None:
    spread = np.where(look.valid, np.sqrt(members.var(axis=0, ddof=1).sum(axis=0)), np.nan)
    norm = Normalize(0, float(np.nanquantile(spread, 0.995)) or 1.0)
    _image(axis, spread, look, norm, _SPREAD)
    axis.set_title("ensemble spread", fontsize=10)
    _bar(figure, bar, norm, _SPREAD, f"spread [{_pretty(units)}]")


def _image(axis: Axes, values: Floats, look: _Look, norm: Normalize, colours: Colormap) -> None:
    """Cells as squares, land grey, missing ones blank, north up, lengths true on the ground."""
    left, right, first, last = look.extent
    aspect = look.tallness * abs(right - left) / abs(last - first)
    place = {"extent": look.extent, "origin": "lower", "interpolation": "nearest", "aspect": aspect}
    axis.set_facecolor(_BLANK)
    axis.imshow(np.where(look.valid, np.nan, 0.0), cmap=ListedColormap([_LAND]), **place)
    axis.imshow(values, norm=norm, cmap=colours, **place)
    axis.set_xlim(*sorted((left, right)))
    axis.set_ylim(*sorted((first, last)))


def _arrows(axis: Axes, field: Floats, look: _Look) -> None:
    """An arrow in every block of cells that has a known one, at that nearest to the centre of the block."""
    (height, width), step = look.grid.shape, look.step
    row, column = np.nonzero(np.isfinite(field).all(axis=0))
    off_centre = np.hypot(row % step - (step - 1) / 2, column % step - (step - 1) / 2)
    order = np.argsort(off_centre, kind="stable")
    _, first = np.unique((row // step * width + column // step)[order], return_index=True)
    row, column = row[order[first]], column[order[first]]
    left, right, bottom, top = look.extent
    x = left + (column + 0.5) * (right - left) / width
    y = bottom + (row + 0.5) * (top - bottom) / height
    length = look.arrow * width / (0.9 * step)  # the speed of an arrow as long as the axis
    u, v = field[:, row, column]
    style = {"color": _INK, "pivot": "mid", "width": 0.0045, "headwidth": 3.5, "headlength": 4.5, "minlength": 0.5}
    axis.quiver(x, y, u, v, scale=length, scale_units="width", **style)


def _edges(centres: Floats) -> tuple[float, float]:
    """The outer edges of the first and the last of evenly spaced cells."""
    half = (centres[-1] - centres[0]) / max(len(centres) - 1, 1) / 2 or 0.5
    return float(centres[0] - half), float(centres[-1] + half)


def _pretty(units: str) -> str:
    """`m s-1` with its exponents raised."""
    words = [f"{word[:-2]}$^{{{word[-2:]}}}$" if word[-2:-1] == "-" else word for word in units.split()]
    return " ".join(words)


# The figures of a report.

_STRONG = ("#c0392b", "#2471a3", "#d68910", "#7d3c98", "#117a65", "#a04000")
_QUIET = ("#909497", "#b7950b", "#5dade2", "#58d68d", "#af7ac5", "#1c2833", "#45b39d", "#f0b27a", "#d98880", "#6e2c00")
_LINES = ("-", "--", "-.", ":")

Styles = Mapping[str, Mapping[str, Any]]


def method_styles(networks: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, width and line of each method, the same in all figures: strong for networks, quiet for others."""
    others = [name for name in methods if name not in networks]
    strong = {
        name: {"color": _STRONG[k % len(_STRONG)], "linestyle": _LINES[k // len(_STRONG) % 4], "linewidth": 2.2}
        for k, name in enumerate(networks)
    }
    thin = {"linestyle": "-", "linewidth": 1.2, "zorder": 1.5}
    return strong | {name: {"color": _QUIET[k % len(_QUIET)], **thin} for k, name in enumerate(others)}


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def figure_example(
    truth: ArrayLike,
    observed: ArrayLike,
    members: ArrayLike,
    others: Sequence[tuple[str, ArrayLike]],
    grid: Grid,
    units: str = "m s-1",
    coordinates: Coordinates | None = None,
) -> bytes:
    """One case: truth, what is observed, the mean, other methods; below two members, spread and error on one scale.

    Arguments:
        truth: `(2, H, W)`, NaN where unknown.
        observed: `(H, W)` or `(1, H, W)`.
        members: `(M, 2, H, W)`.
        others: Names and fields `(2, H, W)` of other methods.
        grid: Land and spacing.
        units: Of the fields.
        coordinates: Where the cells lie.
    """
    truth, members = np.asarray(truth), np.asarray(members)
    mean, look = members.mean(axis=0), _look(truth, grid, "speed", coordinates, _ARROWS * 3 // 4)
    seen, everywhere = np.asarray(observed).reshape(grid.shape) & look.valid, look.valid
    panels = [("truth", truth, np.isfinite(truth).all(axis=0) & everywhere)]
    panels += [(f"observed ({seen.sum() / everywhere.sum():.0%})", truth, seen), ("ensemble mean", mean, everywhere)]
    panels += [(name, np.asarray(each), everywhere) for name, each in others]
    panels += [(f"member {k + 1}", each, everywhere) for k, each in enumerate(members[:2]) if len(members) > 1]
    sizes = {"error of the mean": np.sqrt(np.square(mean - truth).sum(axis=0))}
    if len(members) > 1:
        sizes = {"ensemble spread": np.sqrt(members.var(axis=0, ddof=1).sum(axis=0)), **sizes}
    figure, axes, bars = _grid_of_maps(len(panels) + len(sizes), look)
    for axis, (name, field, shown) in zip(axes, panels, strict=False):
        _draw(axis, field, shown, look)
        axis.set_title(name, fontsize=10)
    top = max(float(np.nanquantile(each[everywhere], 0.99)) for each in sizes.values()) or 1.0
    for axis, (name, values) in zip(axes[len(panels) :], sizes.items(), strict=True):
        _image(axis, np.where(everywhere, values, np.nan), look, Normalize(0, top), _SPREAD)
        axis.set_title(name, fontsize=10)
    _bar(figure, bars[0], look.norm, look.colours, look.label(units))
    _bar(figure, bars[1], Normalize(0, top), _SPREAD, f"spread, error [{_pretty(units)}]")
    return _png(figure)


def _grid_of_maps(count: int, look: _Look) -> tuple[Figure, list[Axes], list[Axes]]:
    """Maps in rows of four, two colour bars below."""
    columns = 4 if count > 3 else count
    rows = -(-count // columns)
    panel = 12.0 / columns * 0.9 * min(look.tallness, 1.6)
    figure = _figure(12.0, rows * (panel + 0.35) + 1.0)
    cells = figure.add_gridspec(rows + 1, columns, height_ratios=[*[panel] * rows, 0.11])
    axes = [figure.add_subplot(cells[number // columns, number % columns]) for number in range(count)]
    for number, axis in enumerate(axes):
        _label(axis, look, left=number % columns == 0, bottom=number + columns >= count)
    half = columns // 2
    return figure, axes, [figure.add_subplot(cells[rows, :half]), figure.add_subplot(cells[rows, half:])]


def figure_scores(scores: Mapping[str, tuple[Sequence[float], Sequence[float]]], units: str, styles: Styles) -> bytes:
    """Points with intervals for each method: RMSE and CRPS, each (value, low, high)."""
    figure = _figure(10.0, 0.9 + 0.28 * len(scores))
    axes = figure.subplots(1, 2, sharey=True)
    names = sorted(scores, key=lambda name: -scores[name][0][0])
    for k, (axis, label) in enumerate(zip(axes, ("RMSE of a component", "CRPS"), strict=True)):
        for at, name in enumerate(names):
            value, low, high = scores[name][k]
            axis.plot([low, high], [at, at], color=styles[name]["color"], linewidth=2.5, alpha=0.6)
            axis.plot(value, at, "o", color=styles[name]["color"], markersize=6)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlim(left=0)
        axis.set_xlabel(f"{label} [{_pretty(units)}]")
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    return _png(figure)


def figure_calibration(laws: Mapping[str, tuple[Floats, Floats, Floats]], units: str, styles: Styles) -> bytes:
    """Error over spread, rank histogram and coverage of each method.

    Arguments:
        laws: By method, spread and error of bins `(K,)` each, and the shares of the ranks `(M + 1,)`.
        units: Of the fields.
        styles: See `method_styles`.
    """
    figure = _figure(12.0, 3.9)
    spread, ranks, cover = figure.subplots(1, 3)
    for name, (deviation, error, shares) in laws.items():
        style = styles[name]
        spread.plot(deviation, error, marker="o", markersize=3.5, label=name, **style)
        height = shares * len(shares)
        ranks.stairs(height, np.linspace(0, 1, len(shares) + 1), baseline=None, **style)
        count = len(shares)
        inside = [shares[k : count - k].sum() for k in range((count + 1) // 2)]
        nominal = [1 - 2 * k / count for k in range((count + 1) // 2)]
        cover.plot([*nominal, 0], [*inside, 0], marker="o", markersize=3, **style)
    top = max(max(each[0].max(initial=0), each[1].max(initial=0)) for each in laws.values()) * 1.05 or 1.0
    spread.plot([0, top], [0, top], color=_INK, linestyle=":")
    spread.set(xlim=(0, top), ylim=(0, top))
    spread.set(xlabel=f"spread [{_pretty(units)}]", ylabel=f"RMSE [{_pretty(units)}]")
    spread.legend(fontsize=8, frameon=False)
    ranks.axhline(1, color=_INK, linestyle=":")
    ranks.set(xlabel="rank of the truth / members", ylabel="frequency / that of a calibrated one", xlim=(0, 1))
    ranks.set_ylim(0, 1.1 * max(each[2].max() * len(each[2]) for each in laws.values()))
    cover.plot([0, 1], [0, 1], color=_INK, linestyle=":")
    cover.set(xlabel="probability of the central interval", ylabel="share of the truth inside")
    cover.set(xlim=(0, 1), ylim=(0, 1))
    for axis, title in ((spread, "spread and error"), (ranks, "rank histogram"), (cover, "coverage")):
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    return _png(figure)


def figure_distance(
    labels: Sequence[str],
    errors: Mapping[str, Sequence[Sequence[float]]],
    spreads: Mapping[str, Sequence[float]],
    units: str,
    styles: Styles,
) -> bytes:
    """Error with intervals, and spread, of each method by the distance to the nearest observation.

    Arguments:
        labels: Of the bins of distance.
        errors: By method, (value, low, high) of each bin.
        spreads: By method, that of each bin; NaN where there is none.
        units: Of the fields.
        styles: See `method_styles`.
    """
    figure = _figure(9.0, 4.0)
    axis, x = figure.subplots(), np.arange(len(labels))
    for name, found in errors.items():
        value, low, high = np.asarray(found, dtype=float).T
        axis.plot(x, value, marker="o", markersize=4, label=name, **styles[name])
        axis.fill_between(x, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
        if np.isfinite(spreads[name]).any():
            axis.plot(x, spreads[name], **{**styles[name], "linestyle": (0, (4, 2)), "linewidth": 1.4})
    axis.set_xticks(x, labels)
    axis.set(xlabel="distance to the nearest observation [cells]", ylabel=f"RMSE, spread [{_pretty(units)}]")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.tick_params(labelsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def figure_spectra(
    wavenumber: Floats, truth: Floats, energy: Mapping[str, Floats], noise: Mapping[str, Floats], styles: Styles
) -> bytes:
    """Energy spectra of the truth and of each method, and the spectrum of the error of each over that of the truth.

    Arguments:
        wavenumber: `(K,)`, from 0.
        truth: Energy density `(K,)`.
        energy: Of members, by method.
        noise: Of the error of their mean, by method.
        styles: See `method_styles`.
    """
    figure = _figure(12.0, 4.3)
    left, right = figure.subplots(1, 2)
    k = wavenumber[1:]
    for name in energy:
        left.loglog(k, energy[name][1:], label=name, **styles[name])
        right.loglog(k, noise[name][1:] / truth[1:], **styles[name])
    left.loglog(k, truth[1:], color="black", linewidth=1.8, label="truth", zorder=3)
    left.set_ylim(*_decades(truth))
    right.set_ylim(1e-2, 10)
    right.axhline(0.5, color=_INK, linestyle=":", label="0.5: effective resolution")
    left.set(xlabel="wavenumber [rad m$^{-1}$]", ylabel="energy density [m$^3$ s$^{-2}$]")
    right.set(xlabel="wavenumber [rad m$^{-1}$]", ylabel="error of the estimate / truth")
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def figure_generation(
    wavenumber: Floats,
    energy: Mapping[str, Floats],
    edges: Floats,
    densities: Mapping[str, Floats],
    reference: str,
    styles: Styles,
) -> bytes:
    """Energy spectra and distributions of vorticity of sets of fields.

    Arguments:
        wavenumber: `(K,)`, from 0.
        energy: By set of fields, `(K,)`.
        edges: Of the bins of vorticity, `(B + 1,)`.
        densities: By set of fields, `(B,)`.
        reference: The set in black.
        styles: Of the others, see `method_styles`.
    """
    figure = _figure(12.0, 4.0)
    left, right = figure.subplots(1, 2)
    black = {"color": "black", "linewidth": 1.8}
    for name in energy:
        style = black if name == reference else styles[name]
        left.loglog(wavenumber[1:], energy[name][1:], label=name, **style)
        right.stairs(densities[name], edges, baseline=None, **style)
    left.set(xlabel="wavenumber [rad m$^{-1}$]", ylabel="energy density [m$^3$ s$^{-2}$]")
    right.set(xlabel="vorticity [s$^{-1}$]", ylabel="probability density", yscale="log")
    left.set_ylim(*_decades(energy[reference]))
    left.legend(fontsize=8, frameon=False)
    right.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return _png(figure)


def _decades(energy: Floats) -> tuple[float, float]:
    """What is shown of a spectrum: not what is below a billionth of its top."""
    top = float(energy.max()) or 1.0
    return max(float(energy[1:].min()) / 30, top * 1e-9), top * 5


def figure_cost(seconds: Mapping[str, float], styles: Styles) -> bytes:
    """Time for each field (of an ensemble: each member) of every method, on a logarithmic axis."""
    names = sorted(seconds, key=seconds.__getitem__)
    figure = _figure(8.0, 0.9 + 0.28 * len(names))
    axis = figure.subplots()
    axis.barh(names, [seconds[name] for name in names], color=[styles[name]["color"] for name in names])
    axis.set_xscale("log")
    axis.set_xlabel("seconds for each field; of an ensemble, for each member")
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=9)
    return _png(figure)

"""What all pictures share: colours, scales, coordinates and their labels, dates and units in words, files.

Only matplotlib's object interface is used: no window, no global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import cmocean
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import vorticity

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Colour = Literal["speed", "vorticity"]

LAND, UNKNOWN, BLANK, INK = "0.70", "#c9d6e2", "0.96", "0.12"
ARROWS = 20  # along the longer axis of a large panel
SPREAD = cmocean.cm.amp
COLOURS = {
    "speed": cmocean.tools.crop_by_percent(cmocean.cm.speed, 30, which="max"),  # arrows must show on its dark end
    "vorticity": cmocean.tools.crop_by_percent(cmocean.cm.balance, 15, which="both"),
}
#: Widths of figures in inches: beside text or on a sheet, and on a telephone; letters have the same size in both.
WIDE, NARROW = 12.0, 4.4
_DPI, _SHARP = 100, 150  # of a telephone more dots are seen
_FORMATS = (".png", ".pdf", ".svg")
#: How many times the 95 % quantile the ends of the scales may be: one outlying value does not hide the rest.
_OUTLYING = 3.0


@dataclass(frozen=True)
class Coordinates:
    """Where the cells lie, as the source says: values `(W,)` and `(H,)`, and the labels of the axes."""

    x: Floats
    y: Floats
    x_label: str = "x"
    y_label: str = "y"

    @classmethod
    def of(cls, fields: Fields) -> Coordinates:
        """Returns the axes of data: degrees, or the units of the source, kilometres where metres are long numbers."""
        if fields.x_name == "lon":
            return cls(fields.x, fields.y, "longitude", "latitude")
        units = str(fields.x_attrs.get("units", "m"))
        if units == "m" and np.abs(fields.x).max() >= 1e4:
            return cls(fields.x / 1e3, fields.y / 1e3, "x [km]", "y [km]")
        return cls(fields.x, fields.y, f"x [{units}]", f"y [{units}]")

    @property
    def geographic(self) -> bool:
        """Whether these are degrees of longitude and latitude."""
        return (self.x_label, self.y_label) == ("longitude", "latitude")


def date_of(fields: Fields, index: int) -> str:
    """Returns when a snapshot of data was, in words; its number where the source has no times."""
    return f"snapshot {index}" if fields.time is None else when(fields.time[index], fields.time_attrs)


def when(time: Any, attrs: Mapping[str, Any]) -> str:
    """Returns a time in words: a date to the minute, or a number with its unit."""
    if np.asarray(time).dtype.kind == "M":
        return str(np.datetime64(time, "m")).replace("T", " ").removesuffix(" 00:00")
    return f"time {time:g} {attrs.get('units', '')}".strip()


@dataclass(frozen=True)
class Look:
    """What all panels of a figure share.

    Attributes:
        grid: The domain.
        coordinates: Its place on the axes; cell numbers if None.
        colour: What is coloured.
        norm: The scale of the colours.
        arrow: The speed of an arrow that is as long as the distance of two.
        longest: The speed from which on arrows are no longer.
        step: The cells along a block that holds one arrow.
        land: The cells `(H, W)` outside the domain that are land; None where the data do not say which are.
    """

    grid: Grid
    coordinates: Coordinates | None
    colour: Colour
    norm: Normalize
    arrow: float
    longest: float
    step: int
    land: Bools | None = None

    @property
    def valid(self) -> Bools:
        """The cells of the domain, `(H, W)`."""
        return self.grid.valid.cpu().numpy()

    @property
    def colours(self) -> Colormap:
        """The colours of the fields."""
        return COLOURS[self.colour]

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
        """Whether panels stand in two rows rather than in one."""
        return self.tallness < 0.75

    @property
    def geographic(self) -> bool:
        """Whether the axes are degrees."""
        return self.coordinates is not None and self.coordinates.geographic

    def label(self, units: str) -> tuple[str, str]:
        """The words at the colour bar, and the unit."""
        return ("speed", units) if self.colour == "speed" else ("vorticity", "s-1")


def look_of(
    known: Floats,
    grid: Grid,
    *,
    colour: Colour = "speed",
    coordinates: Coordinates | None = None,
    arrows: int = ARROWS,
    land: Bools | None = None,
) -> Look:
    """Returns the scales that fields `(..., 2, H, W)` ask for: 99.5 % of their values lie inside the colours.

    Values that stand far out do not stretch the scales, which end at three times the 95 % quantile at most.
    """
    top, speed = _top(scalar(known, grid, colour)), scalar(known, grid, "speed")
    longest = _top(speed)
    speed = np.minimum(speed[np.isfinite(speed)], longest)
    typical = float(np.sqrt(np.square(speed).mean())) if speed.size else 0.0
    norm = Normalize(0 if colour == "speed" else -top, top)
    step = max(1, round(max(grid.shape) / arrows))
    return Look(grid, coordinates, colour, norm, typical or 1.0, longest, step, land)


def _top(values: Floats) -> float:
    """The end of the scale of `values`, of either sign; 1 where there is none."""
    size = np.abs(values[np.isfinite(values)])
    if not size.size:
        return 1.0
    end, usual = np.quantile(size, [0.995, 0.95])
    return float(min(end, _OUTLYING * usual) if usual > 0 else end) or 1.0


def scalar(field: Floats, grid: Grid, colour: Colour) -> Floats:
    """Returns what is coloured, `(..., H, W)`; NaN on land and where `field` `(..., 2, H, W)` is."""
    if colour == "speed":
        values = np.hypot(field[..., 0, :, :], field[..., 1, :, :])
    else:
        flat = torch.as_tensor(np.asarray(field, dtype=np.float64)).reshape(-1, 2, *grid.shape)
        values = vorticity(flat, grid.to("cpu")).numpy().reshape(*field.shape[:-3], *grid.shape)
    return np.where(grid.valid.cpu().numpy(), values, np.nan)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=_SHARP if width == NARROW else _DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.07, wspace=0.0, hspace=0.0)
    return figure


def label_axes(axis: Axes, look: Look, *, left: bool, bottom: bool, width: float) -> None:
    """Labels the axes of a map `width` inches wide, with no more numbers than there is room for.

    Arguments:
        axis: The map.
        look: Where the cells lie.
        left: Whether the map stands at the left, and has numbers along y.
        bottom: Whether it stands at the bottom, and has numbers along x.
        width: Its width in inches.
    """
    axis.tick_params(labelsize=8, length=2, labelleft=left, labelbottom=bottom)
    for side, count in ((axis.xaxis, width / 0.75), (axis.yaxis, width * look.tallness / 0.45)):
        side.set_major_locator(MaxNLocator(int(np.clip(count, 2, 6)), steps=[1, 2, 2.5, 5, 10]))
        numbers = ScalarFormatter(useOffset=False)
        numbers.set_scientific(False)  # a power of ten at the end of the axis is easily missed
        side.set_major_formatter(numbers)
    if look.geographic:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _degrees((value + 180) % 360 - 180, "EW")))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _degrees(value, "NS")))
    elif look.coordinates is not None:
        axis.set_ylabel(look.coordinates.y_label if left else "", fontsize=9)
        axis.set_xlabel(look.coordinates.x_label if bottom else "", fontsize=9)


def _degrees(value: float, sides: str) -> str:
    """17.5 as 17.5°E; no letter at 0."""
    value = round(float(value), 6)
    return f"{abs(value):g}°" + ("" if value == 0 else sides[value < 0])


def colour_bar(figure: Figure, axis: Axes, norm: Normalize, colours: Colormap, label: tuple[str, str]) -> None:
    """Draws a colour bar whose label, words and unit, holds the power of ten of its numbers."""
    extend = "max" if norm.vmin == 0 else "both"
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=axis, orientation="horizontal", extend=extend)
    words, units = label
    power = power_of_ten(max(abs(norm.vmin), abs(norm.vmax)))
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10.0**power:g}"))
    bar.set_label(f"{words} [{with_power(power, units)}]" if units or power else words, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def power_of_ten(size: float) -> int:
    """Returns the power of ten that numbers up to `size` are written with; 0 where they are short as they are."""
    power = math.floor(math.log10(size)) if size > 0 else 0
    return 0 if -2 <= power < 4 else power


def with_power(power: int, units: str) -> str:
    """Returns a unit with a power of ten before it."""
    return pretty(units) if power == 0 else f"$10^{{{power}}}$ {pretty(units)}"


def pretty(units: str) -> str:
    """Returns `m s-1` with its exponents raised."""
    words = [f"{word[:-2]}$^{{{word[-2:]}}}$" if word[-2:-1] == "-" else word for word in units.split()]
    return " ".join(words)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as the ending of the file says: png, pdf or svg. Raises UserError for another ending."""
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: pictures are written as {', '.join(_FORMATS)}, not as '{path.suffix}'")
    with replacing(path) as temporary:
        paint(figure, temporary, path.suffix[1:].lower())


def png(figure: Figure) -> bytes:
    """Returns a figure as PNG."""
    stream = io.BytesIO()
    paint(figure, stream, "png")
    return stream.getvalue()


def paint(figure: Figure, to: Path | BinaryIO, kind: str) -> None:
    """Writes a figure as png, pdf or svg."""
    engine = figure.get_layout_engine()
    if engine is not None:  # left to `savefig`, everything would be drawn once more to be placed
        engine.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(to, format=kind)


def _edges(centres: Floats) -> tuple[float, float]:
    """The outer edges of the first and the last of evenly spaced cells."""
    half = (centres[-1] - centres[0]) / max(len(centres) - 1, 1) / 2 or 0.5
    return float(centres[0] - half), float(centres[-1] + half)

"""A filled series as a moving picture: what was observed, the mean, a member and the spread, frame by frame.

Frames are made one at a time, so that memory depends on the size of the pictures and not on that of the data. All have
the same scales, found from frames spread over the series.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.quiver import Quiver
from numpy.typing import ArrayLike
from PIL import Image

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots.maps import (
    arrow_key,
    draw_arrows,
    draw_field,
    draw_scalar,
    explain_blanks,
    lay_out,
)
from vecfield_diffusion.evaluation.plots.style import (
    ARROWS,
    SPREAD,
    WIDE,
    Colour,
    Coordinates,
    Floats,
    Look,
    colour_bar,
    look_of,
    scalar,
)
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.progress import over

#: Endings of files that move.
MOVING = (".gif", ".mp4")
#: Frames that are drawn, at most, and those that the scales are found from.
FRAMES, SCALED = 200, 24
#: How long a frame is shown, in ms.
DURATION = 150


@dataclass(frozen=True)
class Moment:
    """One time of a filled series.

    Arguments:
        date: When it was, in words.
        measured: What was observed `(2, H, W)`, NaN elsewhere.
        members: The ensemble, `(M, 2, H, W)`.
    """

    date: str
    measured: Floats
    members: Floats

    @property
    def mean(self) -> Floats:
        """The mean of the ensemble, `(2, H, W)`."""
        return self.members.mean(axis=0)

    @property
    def spread(self) -> Floats:
        """The root of the summed variances of both components, `(H, W)`."""
        return np.sqrt(self.members.var(axis=0, ddof=1).sum(axis=0))


def check_moving(path: str | Path) -> None:
    """Raises UserError where a file of this ending moves, but cannot be written here."""
    if Path(path).suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise UserError(f"figure={path}: mp4 is written by the program ffmpeg, which is not found here. Give a .gif")


def shown_of(count: int) -> list[int]:
    """Returns the frames of a series of `count` that are drawn: all, or every so many of them."""
    return list(range(0, count, -(-count // FRAMES)))


def figure_animation(
    path: str | Path,
    moment: Callable[[int], Moment],
    count: int,
    grid: Grid,
    units: str = "m s-1",
    *,
    colour: Colour = "speed",
    coordinates: Coordinates | None = None,
    land: ArrayLike | None = None,
) -> list[int]:
    """Draws a filled series into a file that moves, and returns the frames that are shown, 200 at most.

    Arguments:
        path: The file to write; gif, or mp4 where there is ffmpeg.
        moment: Gives a frame of the series by its number.
        count: How many there are.
        grid: Their land and spacing.
        units: Units of the fields.
        colour: `speed`, or `vorticity` in s^-1.
        coordinates: Where the cells lie; cell numbers if not given.
        land: The cells `(H, W)` that are land, where the data tell it from sea that was never measured.

    Raises:
        UserError: Another ending, or mp4 without ffmpeg.
    """
    path, frames = Path(path), shown_of(count)
    if path.suffix.lower() not in MOVING:
        raise UserError(f"{path}: moving pictures are written as {' or '.join(MOVING)}, not as '{path.suffix}'")
    check_moving(path)
    known = frames[:: -(-len(frames) // SCALED)]
    look, top = _scales((moment(frame) for frame in known), grid, colour, coordinates, land)
    picture = Picture(moment(frames[0]), look, top, units)
    pictures = (picture.drawn(moment(frame)) for frame in over(frames, "frames", "drawing"))
    with replacing(path) as temporary:
        (_write_gif if path.suffix.lower() == ".gif" else _write_mp4)(temporary, pictures)
    return frames


def _scales(
    moments: Iterator[Moment],
    grid: Grid,
    colour: Colour,
    coordinates: Coordinates | None,
    land: ArrayLike | None,
) -> tuple[Look, float]:
    """The look of all frames, and the end of the scale of the spread."""
    means, spreads = [], [0.0]
    for moment in moments:
        means.append(moment.mean)
        if len(moment.members) > 1:
            spreads.append(float(np.nanquantile(moment.spread, 0.99)))
    known = None if land is None else np.asarray(land, dtype=bool)
    options = dict(colour=colour, coordinates=coordinates, land=known, arrows=ARROWS * 3 // 4)
    return look_of(np.stack(means), grid, **options), max(spreads) or 1.0


class Picture:
    """The maps of one moment, which become those of another without being laid out anew.

    Arguments:
        first: The moment that is drawn first.
        look: The scales of the fields.
        top: The end of the scale of the spread.
        units: Of the fields.
    """

    def __init__(self, first: Moment, look: Look, top: float, units: str) -> None:
        self.look = look
        several = len(first.members) > 1
        names = ["observed", "ensemble mean", "member 1", "spread"] if several else ["observed", "filled"]
        columns = 2 if look.wide or not several else 4
        shape = {"columns": columns, "width": WIDE if columns == 4 else 0.75 * WIDE, "bars": 2 if several else 1}
        self.figure, axes, bars = lay_out(len(names), look, **shape)
        self.axes = dict(zip(names, axes, strict=True))
        for name, axis in self.axes.items():
            if name == "spread":
                draw_scalar(axis, name, first.spread, look, Normalize(0, top), SPREAD)
                continue
            arrows = draw_field(axis, name, self._fields(first)[name], look.valid, look)
        colour_bar(self.figure, bars[0], look.norm, look.colours, look.label(units))
        if several:
            colour_bar(self.figure, bars[1], Normalize(0, top), SPREAD, ("spread", units))
        arrow_key(self.figure, arrows, look, units)
        self._key = arrows  # the key has its length from these arrows, which are there for it alone
        explain_blanks(self.figure, look, hidden=True)
        self.figure.suptitle(first.date or " ", fontsize=12)
        self.canvas = FigureCanvasAgg(self.figure)
        self.canvas.draw()
        self.figure.set_layout_engine("none")
        self._key.set_visible(False)

    def drawn(self, moment: Moment) -> Image.Image:
        """Returns the picture of a moment."""
        for name, field in self._fields(moment).items():
            axis = self.axes[name]
            axis.images[-1].set_data(np.where(self.look.valid, scalar(field, self.look.grid, self.look.colour), np.nan))
            for arrows in _arrows_of(axis):
                if arrows is not self._key:
                    arrows.remove()
            draw_arrows(axis, np.where(self.look.valid, field, np.nan), self.look)
        if "spread" in self.axes:
            self.axes["spread"].images[-1].set_data(np.where(self.look.valid, moment.spread, np.nan))
        known = np.isfinite(moment.measured).all(axis=0) & self.look.valid
        share = 100 * known.sum() / max(self.look.valid.sum(), 1)
        self.axes["observed"].set_title(f"observed ({share:.3g} %)", fontsize=10)
        self.figure.suptitle(moment.date or " ", fontsize=12)
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())

    def _fields(self, moment: Moment) -> dict[str, Floats]:
        """The fields that are shown, by the titles of their maps."""
        members = {"ensemble mean": moment.mean, "member 1": moment.members[0]}
        members = members if len(moment.members) > 1 else {"filled": moment.members[0]}
        return {"observed": moment.measured, **members}


def _arrows_of(axis: Axes) -> Sequence[Quiver]:
    return [artist for artist in axis.collections if isinstance(artist, Quiver)]


def _write_gif(path: Path, pictures: Iterator[Image.Image]) -> None:
    """Writes pictures as a gif that begins anew; all have the colours of the first, which holds the colour bars."""
    first = next(pictures).quantize(256, dither=Image.Dither.NONE)
    others = (picture.quantize(palette=first, dither=Image.Dither.NONE) for picture in pictures)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=DURATION, loop=0, optimize=False)


def _write_mp4(path: Path, pictures: Iterator[Image.Image]) -> None:
    """Writes pictures through ffmpeg. Raises UserError where it fails."""
    first = next(pictures)
    size = (first.width - first.width % 2, first.height - first.height % 2)  # of even sides, as the format wants it
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{1000 / DURATION:g}", "-i", "-"]
    kept = ["-an", "-pix_fmt", "yuv420p", "-f", "mp4", "-y", str(path)]
    with tempfile.TemporaryFile() as said:
        command = ["ffmpeg", "-loglevel", "error", *raw, *kept]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": said}
        with subprocess.Popen(command, **streams) as ffmpeg, contextlib.suppress(BrokenPipeError):
            for picture in itertools.chain([first], pictures):
                ffmpeg.stdin.write(picture.crop((0, 0, *size)).tobytes())
        if ffmpeg.returncode:
            said.seek(0)
            words = " ".join(said.read().decode(errors="replace").split()) or f"exit code {ffmpeg.returncode}"
            raise UserError(f"ffmpeg could not write the film: {words}. Give figure=NAME.gif")

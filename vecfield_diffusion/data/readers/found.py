"""What is known of a set before its grid is made, and the `Fields` that follow."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from vecfield_diffusion.data.coordinates import Axis, Plane, make_grid
from vecfield_diffusion.data.fields import LAND, Contents, Fields, Land, MemoryReader, blocks, duplicates, valid_cells
from vecfield_diffusion.data.readers.reader import check_size
from vecfield_diffusion.data.stored import Cached, Combined, Reader, room_for
from vecfield_diffusion.data.units import LENGTH, SPEED, factor, has_factor
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.progress import over


@dataclass(frozen=True)
class FoundComponent:
    """One component of the velocity, or both in one array.

    Arguments:
        name: Its name in the file.
        reader: Fetches its snapshots.
        shape: `(H, W)`.
        x: The coordinate of its columns.
        y: The coordinate of its rows.
        plane: The coordinates of every cell, where they give the spacing.
        globe: Longitude and latitude of every cell, where the file has them.
        attrs: Its attributes, without those of its storage.
        eastward: Whether it points east or north, whatever the axes of the grid do.
        angle: From east to the axis x, anticlockwise in radians `(H, W)`, where the grid mapping tells it.
    """

    name: str
    reader: Reader
    shape: tuple[int, int]
    x: Axis
    y: Axis
    plane: Plane | None = None
    globe: Plane | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    eastward: bool = False
    angle: np.ndarray | None = None

    @property
    def units(self) -> str:
        """Its units as the file spells them; m s-1 where it has none."""
        return str(self.attrs.get("units", "")).strip() or SPEED

    def place(self) -> Plane | None:
        """Where its points are; None where the file does not say."""
        if self.plane is not None or self.globe is not None:
            return self.plane if self.plane is not None else self.globe
        if self.x.values is None or self.y.values is None:
            return None
        x, y = (np.asarray(axis.values, dtype=np.float64) for axis in (self.x, self.y))
        scale = [1.0 if axis.degrees else factor(axis.units, LENGTH) or 1.0 for axis in (self.x, self.y)]
        return Plane(*np.meshgrid(x * scale[0], y * scale[1]), self.x.degrees)


@dataclass(eq=False)
class Found(Contents):
    """What is known of a set before its grid is made.

    Arguments:
        components: One for each component, or one for both.
        length: N.
        time: The times.
        mask: The domain `(H, W)`, where the file has one.
        source: The path of the file.
        spacing: What the file itself says of `dx`, `dy`, `boundary_x` and `boundary_y`.
        notes: What there is to say about what was chosen.
        points: The points of a C-grid that each of the other variables lies on: `u`, `v` or `centre`.
        closing: Lets go of each of the files, which open again when they are needed.

    The others are those of `Contents`.
    """

    components: tuple[FoundComponent, ...]
    length: int
    time: Axis = field(default_factory=lambda: Axis("time"))
    mask: np.ndarray | None = None
    source: str = ""
    spacing: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    points: Mapping[str, str] = field(default_factory=dict)
    closing: tuple[Callable[[], None], ...] = ()

    def to_fields(
        self,
        source: str,
        *,
        land: Land = "auto",
        preload_gb: float = 2.0,
        spacing: Mapping[str, Any] = MappingProxyType({}),
        **samples: Any,  # noqa: ANN401
    ) -> Fields:
        """The fields of the file `source`, both components on the same points.

        `spacing` are the last four arguments of `make_grid`, `samples` those of `Fields`.

        Raises:
            UserError: No valid cell, or coordinates that give no grid.
            ValueError: `land`, `preload_gb`, `history`, `frames`, `stride` or a boundary out of range.
        """
        if preload_gb < 0:
            raise ValueError(f"preload_gb must be at least 0, got {preload_gb}")
        if land not in LAND:
            raise ValueError(f"land must be one of {', '.join(LAND)}, got {land!r}")
        for note in (*self.notes, *order_of(self)):
            print(f"note: {source}: {note}")
        spacing = {name: value for name, value in spacing.items() if value is not None}
        if isinstance(spacing.get("dx"), int | float) and spacing["dx"] < 0:
            print(f"note: {source}: dx={spacing['dx']:g} is below 0: the columns run against x")
        first, last = self.components[0], self.components[-1]
        check_size(source, 40.0 * first.shape[0] * first.shape[1], f"a grid of {first.shape[0]}x{first.shape[1]} cells")
        scale, units = _scale(first.units, last.units, source)
        given = self.spacing | spacing
        if first.plane is not None and not {"dx", "dy"} <= given.keys():
            metres = 1.0 if first.plane.degrees else first.x.metres
            given = dict(zip(("dx", "dy"), metres * np.stack(first.plane.spacing()), strict=True)) | given
        turn = self.turn(source)
        readers = [part.reader for part in self.components]
        plain = len(readers) == 1 and scale == (1.0, 1.0) and turn is None
        reader = readers[0] if plain else Combined(readers, scale, turn=turn)
        reader = self.fetching(reader, source, preload_gb)
        (height, width), x, y = first.shape, first.x, first.y
        grid = make_grid(valid_cells(reader, self.length, self.mask, first.shape, source, land), x, y, **given)
        # Land and sea that is never measured look alike, but for a mask of the file, and for cells that have numbers.
        known_land = ~grid.valid if self.mask is not None else None
        if self.mask is None and land == "zero":
            known_land = ~grid.valid & torch.from_numpy(np.isfinite(reader(np.zeros(1, dtype=np.int64)))[0].all(axis=0))
        reader = Combined([reader], gaps=True) if land == "gap" else reader
        return Fields(
            reader=reader,
            length=self.length,
            grid=grid,
            x=np.arange(width) * grid.dx.mean().item() if x.values is None else x.values,
            y=np.arange(height) * grid.dy.mean().item() if y.values is None else y.values,
            source=source,
            names=(f"{first.name}[0]", f"{first.name}[1]") if len(readers) == 1 else (first.name, last.name),
            units=units,
            time=self.time.values,
            time_attrs=self.time.attrs,
            x_name=x.name,
            y_name=y.name,
            x_attrs=x.attrs,
            y_attrs=y.attrs,
            component_attrs=(dict(first.attrs), dict(last.attrs)),
            scale=scale,
            land=known_land,
            turn=turn,
            **samples,
            **{content.name: getattr(self, content.name) for content in dataclasses.fields(Contents)},
        )

    def turn(self, source: str) -> np.ndarray | None:
        """The angle to turn by components that point east and north, on a grid whose axes do not; says so."""
        first = self.components[0]
        if first.angle is not None:
            turn = first.angle
        elif first.globe is None or first.globe.lines() is not None:
            return None
        else:
            turn = first.globe.turn()
            step = first.x.step() if first.plane is None else None
            turn = turn + np.pi if isinstance(step, float) and step < 0 else turn
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        low, high = np.rad2deg(turn.min()), np.rad2deg(turn.max())
        if max(abs(low), abs(high)) < 0.1:
            return None
        names = ", ".join(part.name for part in self.components)
        angles = f"{low:.3g} to {high:.3g} degrees"
        if not first.eastward:
            if max(abs(low), abs(high)) > 1.0:
                print(f"note: {source}: {names} are taken as along the axes of the grid, {angles} from east")
            return None
        print(f"note: {source}: {names} point east and north: turned to the axes of the grid, by {angles}")
        return turn

    def fetching(self, reader: Reader, source: str, preload_gb: float) -> Reader:
        """Memory for what fits below `preload_gb`; else the file, through a cache where it must be decoded."""
        if isinstance(reader, MemoryReader):
            return reader
        height, width = self.components[0].shape
        size = 8.0 * self.length * height * width
        if size <= preload_gb * 1e9:
            velocity = _preloaded(reader, self.length, (height, width), source)
            for close in self.closing:
                close()
            return MemoryReader(velocity)
        if self.groups is None:
            return reader
        if room_for(size):
            return Cached(reader, self.groups)
        warnings.warn(
            f"{source}: its values are packed or lie in large pieces, and are decoded anew for every batch. Raise "
            f"{option('preload_gb', f'{preload_gb:g}')} ({size * 1e-9:.3g} needed), or free {2e-9 * size:.3g} GB in "
            f"{tempfile.gettempdir()} (TMPDIR) for a cache",
            stacklevel=4,
        )
        return reader


def _scale(first: str, last: str, source: str) -> tuple[tuple[float, float], str]:
    """What brings either component to m s-1, and the units that follow: those of the file where they are no speed."""
    if has_factor(first) or has_factor(last):
        raise UserError(
            f"{source}: the units '{first if has_factor(first) else last}' begin with a number and are not understood. "
            "Mend the attribute `units`, e.g. to `cm s-1`."
        )
    scales = factor(first, SPEED), factor(last, SPEED)
    if None not in scales:
        if set(scales) != {1.0}:
            print(f"note: {source}: converted to m s-1 from {' and '.join(dict.fromkeys((first, last)))}")
        return scales, SPEED
    if first != last:
        raise UserError(
            f"{source}: the components have units '{first}' and '{last}', which cannot be converted to one another. "
            f"Name others ({components()}), or mend the attribute `units`."
        )
    return (1.0, 1.0), first


def _preloaded(reader: Reader, length: int, shape: tuple[int, int], source: str) -> np.ndarray:
    velocity = np.empty((length, 2, *shape), dtype=np.float32)
    parts = list(blocks(length, shape[0] * shape[1]))
    for indices in over(parts, "blocks", f"reading {source}"):
        velocity[indices[0] : indices[-1] + 1] = reader(indices)
    if pairs := duplicates(velocity):
        listing = ", ".join(f"{second} = {first}" for first, second in pairs[:8])
        more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
        print(f"note: {source}: {len(pairs)} snapshots are copies of earlier ones to the last bit: {listing}{more}")
    return velocity


def order_of(found: Found) -> tuple[str, ...]:
    """What there is to say of times that stand still or run backward."""
    times = found.time.values
    if times is None or len(times) < 2 or found.runs is not None:
        return ()
    steps = np.diff(times)
    bad = np.flatnonzero(~(steps > np.zeros(1, steps.dtype)))
    if not len(bad):
        return ()
    return (
        f"{len(bad)} times are not after the one before them, such as {times[bad[0] + 1]} at place {bad[0] + 1}: there "
        "a series is cut; in xarray, data.sortby('time').drop_duplicates('time') joins it",
    )

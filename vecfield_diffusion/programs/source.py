"""Where fields come from: a file, a pattern, a Dataset or two DataArrays, and the snapshots that `time=` chooses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import load_mask
from vecfield_diffusion.data.points import open_points
from vecfield_diffusion.data.readers import files_of, open_fields
from vecfield_diffusion.data.sequences import TOLERANCE, Integers, Runs, distinct, lengthened
from vecfield_diffusion.data.units import factor
from vecfield_diffusion.data.words import INPUT, called
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.programs.fitted import check_grid
from vecfield_diffusion.programs.trained import Trained, held_out

#: What `open_source` takes.
Source = str | Path | xr.Dataset | Sequence[xr.DataArray]
TABLES = (".csv", ".tsv", ".txt")
#: What `zeros=` says of cells that are 0 in both components, as `open_fields` takes it.
ZEROS = {"gaps": "gap", "land": "zero"}


def open_source(source: Source, **options: Any) -> Fields:
    """Returns the fields of a source; `options` are those of `open_fields`.

    Raises:
        UserError: A source that cannot be read or understood.
    """
    pair = isinstance(source, Sequence) and len(source) == 2 and all(isinstance(part, xr.DataArray) for part in source)
    if not (pair or isinstance(source, str | Path | xr.Dataset)):
        raise UserError(f"expected a path, a pattern, an xarray.Dataset or two DataArrays, got {type(source).__name__}")
    return open_fields(tuple(source) if pair else source, **options)


def is_table(source: Source | Fields | None) -> bool:
    """Returns whether a source is a table of points."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() in TABLES


def read_variable(fields: Fields, name: str, indices: Sequence[int] | Integers) -> Tensor:
    """Returns a variable of the file by name, `(N, C, H, W)`, at the snapshots `indices`.

    At the frames of sequences `(N, T)` it is `(N, T, C, H, W)`, NaN where one is missing.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    numbers, lay_out = (chosen, lambda values: values) if chosen.ndim == 1 else distinct(chosen)
    return lay_out(torch.from_numpy(fields.variable(name)(numbers)))


def files_behind(fields: Fields) -> list[Path]:
    """Returns the files that fields were read from; none of fields in memory."""
    try:
        return [file for file in files_of(fields.source) if file.exists()]
    except UserError:
        return []


def open_input(
    source: Source,
    trained: Trained,
    names: tuple[str, str] | None = None,
    bin_length: float | None = None,
    zeros: str | None = None,
    quality: str | None = None,
    scales: Sequence[float] | None = None,
) -> Fields:
    """Returns the fields given as `input=`: points by the ending csv, tsv or txt, else whatever the source is.

    What the configuration of the training data says of names and masks holds here, too, where the source has them.

    Arguments:
        source: The source.
        trained: What the network was trained on.
        names: The variables of the two components.
        bin_length: See `open_points`.
        zeros: `gaps` or `land`, which cells that are 0 in both components are.
        quality: Which values count by their quality flags, see `open_fields`.
        scales: See `open_points`.

    Raises:
        UserError: A source that cannot be read or understood.
    """
    if is_table(source):
        with called(INPUT):
            return open_table(str(source), trained, bin_length, scales)
    known = inspect.signature(open_fields).parameters
    options = {key: value for key, value in trained.config["dataset"].items() if key in known and value is not None}
    options.pop("path", None)
    if zeros is not None:
        options["land"] = ZEROS[zeros]
    if quality is not None:
        options["quality"] = quality
    if names is not None:
        options |= {"velocity": None, "u": names[0], "v": names[1]}
    own = [*(() if names is None else ("u", "v")), *(() if quality is None else ("quality",))]
    always = ("context", "history", "frames", "stride", "preload_gb", "land", *own)
    kept = {key: value for key, value in options.items() if key in always}
    try:
        with called(INPUT):
            try:
                return open_source(source, **options)
            except UserError as error:  # of another kind: what is true of the training data is not true of it
                if names is None and options == kept:
                    raise
                fields = open_source(source, **kept)
                left = ", ".join(f"{key}={value}" for key, value in options.items() if key not in kept)
                print(f"note: read without what holds for the training data ({left}): {error}")
                return fields
    except (UserError, ValueError) as error:
        place = f"input={source}: " if isinstance(source, str | Path) else ""
        raise UserError(f"{place}{error}") from error


def open_table(
    path: str, trained: Trained, bin_length: float | None, scales: Sequence[float] | None = None
) -> Fields:  # fmt: skip
    """Returns the points of a table on the grid of the training data. Raises UserError."""
    if trained.coordinates is None:
        raise UserError(f"{trained.path} does not say where its cells are: train anew to give it points")
    try:
        points = open_points(path, empty_fields(trained), bin_length, scales)
    except ValueError as error:
        raise UserError(str(error)) from error
    if np.isfinite(points.variable("error")(np.arange(len(points)))).any():
        print("note: the table gives errors, which sigma_obs=error takes into account")
    return points


def empty_fields(trained: Trained) -> Fields:
    """Returns one snapshot on the grid of training without any value, to draw fields on from nothing."""
    grid = trained.grid.to("cpu")
    known = trained.coordinates or {}
    x, y = (known[name].numpy() if name in known else np.arange(size) * spacing.mean().item() for name, size, spacing in
            (("x", grid.shape[1], grid.dx), ("y", grid.shape[0], grid.dy)))  # fmt: skip
    return Fields(
        reader=MemoryReader(np.full((1, 2, *grid.shape), np.nan, dtype=np.float32)),
        length=1,
        grid=grid,
        x=x,
        y=y,
        source=str(trained.path),
        names=("u", "v"),
        units=trained.units,
        x_name=known.get("x_name", "x"),
        y_name=known.get("y_name", "y"),
        component_attrs=tuple(known.get("component_attrs", ({}, {}))),
        history=trained.context.history if trained.context else (),
    )


def chosen_snapshots(
    config: Mapping[str, Any], trained: Trained, source: Source | Fields | None
) -> tuple[Fields, list[int], range]:
    """Returns the fields of `source`, or of the test split of the training data, and the indices that `time=` chooses.

    With `horizon=`, the times that follow the last one are chosen as well. The snapshots on offer come third.

    Raises:
        UserError: Fields that do not go with the network, or no such time.
    """
    if isinstance(source, Fields):
        fields, offered = source, range(len(source))
    elif source is not None:
        radial = next(iter((config["sensor"] or {}).get("velocity") or ()), None)
        names = config["names"] if radial is None else (radial, radial)
        fields = open_input(
            source, trained, names, config["bin"], config["zeros"], config["quality"], config["error_scales"]
        )
        offered = range(len(fields))
    else:
        fields, offered = held_out(trained, "test", config["trust"], config["data"])
    if config["domain"] is not None:
        fields = fields.within(load_mask(config["domain"], fields.shape))
    fields = as_seen_by(trained, fields.converted(trained.units))
    print(fields.summary())
    check_grid(fields, trained)
    say_step(fields, trained)
    chosen = config["time"]
    if chosen is None:
        chosen = 0 if source is None else "all"
    indices = [offered[place] for place in times(chosen, fields, offered)]
    if config["horizon"]:
        if offered.stop < len(fields):
            raise UserError(f"horizon={config['horizon']}: it goes on from the end of a file: add input=FILE")
        indices += range(len(fields), len(fields) + config["horizon"])
        fields, offered = lengthened(fields, config["horizon"]), range(offered.start, indices[-1] + 1)
    return fields, list(dict.fromkeys(indices)), offered


def as_seen_by(trained: Trained, fields: Fields) -> Fields:
    """Returns fields that a network of sequences sees as such, whatever they were opened as."""
    if trained.frames == 1:
        return fields
    return replace(fields, history=(), frames=trained.frames, stride=trained.stride)


def say_step(fields: Fields, trained: Trained) -> None:
    """Prints a note where the snapshots lie farther or less far apart in time than those that a network was trained on.

    Nothing is said of a network of snapshots, nor where either step is not known.
    """
    if trained.step_of_time is None or fields.time is None or len(fields) < 2:
        return
    runs, (step, unit) = Runs.of(fields), trained.step_of_time
    scale = 1.0 if runs.unit == unit else factor(runs.unit, unit)
    if scale is None or not step > 0 or abs(scale * runs.step / step - 1) <= TOLERANCE:
        return
    now, then = (f"{value:.4g} {name}".strip() for value, name in ((runs.step, runs.unit), (step, unit)))
    print(
        f"note: the times of {fields.source} are {now} apart, those that {trained.path} was trained on {then}: fields "
        "change by another amount from one to the next than it has learned"
    )


def times(chosen: int | list[int] | str, fields: Fields, offered: range) -> list[int]:
    """Returns the positions among the snapshots on offer that `time=` chooses.

    Arguments:
        chosen: Numbers, `all`, a range `a:b:c`, or a date, which stands for all that lies in it: a day for its hours.
        fields: The data.
        offered: The snapshots on offer.

    Raises:
        UserError: None of these, or one that there is not.
    """
    count = len(offered)
    dated = fields.time is not None and fields.time.dtype.kind == "M"
    dates = fields.time[offered.start : offered.stop] if dated else None
    span = "" if dates is None else " to ".join(dict.fromkeys(map(day, (dates.min(), dates.max()))))
    if isinstance(chosen, str):
        ends = [part.strip() for part in chosen.split(":")]
        if chosen == "all":
            return list(range(count))
        if 2 <= len(ends) <= 3 and all(not end or end.lstrip("-").isdigit() for end in ends):
            steps = slice(*(int(end) if end else None for end in ends))
            if steps.step != 0 and (found := list(range(count)[steps])):
                return found
        elif dates is not None:
            try:
                date = np.datetime64(chosen)
            except ValueError:
                date = None
            if date is not None and (found := np.flatnonzero(dates.astype(date.dtype) == date).tolist()):
                return found
            if date is not None:
                raise UserError(f"time={chosen}: no snapshot has this date; there are {count}, from {span}")
        there = "" if dates is None else f"; there are dates from {span}"
        raise UserError(
            f"time={chosen}: expected numbers up to {count - 1}, all, a range such as 0:{count}, or a date{there}"
        )
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    if not wanted or any(not -count <= place < count for place in wanted):
        there = "" if dates is None else f", from {span}"
        known = f"there are {count} snapshots, 0 to {count - 1}" if count > 1 else "there is one snapshot, 0"
        raise UserError(f"time={chosen}: {known}{there}")
    return wanted


def day(date: np.datetime64) -> str:
    """Returns a date without the parts that are zero."""
    text = str(date.astype("datetime64[s]"))
    return text.removesuffix(":00").removesuffix("T00:00")

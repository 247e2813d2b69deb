"""What is written beside filled fields for a person to look at: a picture, one that moves, or a page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.evaluation.plots import (
    MOVING,
    Coordinates,
    Moment,
    date_of,
    figure_animation,
    figure_inpainting,
)
from vecfield_diffusion.evaluation.viewer import MEMBERS, PAGE, Shown, render_page, times_shown
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.files import FieldsWriter
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.gaussian import Series


class Files:
    """What a run writes.

    Arguments:
        fields: The filled fields.
        scores: The scores.
        picture: The picture: png, pdf or svg, one that moves, gif or mp4, or a page, html, as its ending says.
    """

    def __init__(self, fields: Path, scores: Path, picture: Path) -> None:
        self.fields, self.scores, self.picture = fields, scores, picture

    @property
    def moves(self) -> bool:
        """Whether the picture is of all times, one after another."""
        return self.picture.suffix.lower() in MOVING

    @property
    def is_page(self) -> bool:
        """Whether the picture is a page to look around in."""
        return self.picture.suffix.lower() == PAGE

    @property
    def paths(self) -> Path:
        """The picture of the paths of samples, where these are followed."""
        ending = ".png" if self.moves else self.picture.suffix
        return self.picture.with_name(f"{self.picture.stem}_thermodynamics{ending}")

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> Files:
        """Returns the files in the folder of the run, or those called after `output=`."""
        if config["output"] is None:
            return cls(folder / "fields.nc", folder / "metrics.json", folder / config["figure"])
        with contextlib.suppress(OSError):  # nothing goes there
            folder.rmdir()
        fields = Path(config["output"])
        return cls(fields, fields.with_suffix(".json"), fields.with_suffix(Path(config["figure"]).suffix))


def draw_first(filling: Filling | Series, path: Path, cases: Cases, members: Tensor) -> None:
    """Draws the first case and its members `(M, 2, H, W)`."""
    sensor = cases.sensor or filling.sensor
    figure_inpainting(
        path,
        cases.truth[0] if cases.hidden[0].any() else None,
        cases.observed[0],
        members,
        filling.grid,
        filling.fields.units,
        colour=filling.config["colour"],
        coordinates=Coordinates.of(filling.fields),
        measured=cases.y[0],
        date=date_of(filling.fields, cases.numbers[0]),
        land=filling.fields.land,
        readings={} if sensor is None else {name: read[0] for name, read in sensor.readings(cases.y).items()},
    )


def animate(filling: Filling | Series, path: Path, writer: FieldsWriter) -> None:
    """Draws what was filled, time by time, and prints which times are shown where these are not all."""

    def moment(position: int) -> Moment:
        cases, members = filling.cases([position]), writer.at(position).members[:, 0]
        return Moment(date_of(filling.fields, cases.numbers[0]), cases.y[0].numpy(), members)

    fields, count = filling.fields, len(filling.indices)
    options = {"colour": filling.config["colour"], "coordinates": Coordinates.of(fields), "land": fields.land}
    shown = figure_animation(path, moment, count, filling.grid, fields.units, **options)
    if len(shown) < count:
        print(f"{path.name}: {len(shown)} of {count} times, every {shown[1]}th")


def write_page(filling: Filling | Series, path: Path, writer: FieldsWriter) -> None:
    """Writes what was filled as a page, and prints which times and members it holds where these are not all."""
    fields, count = filling.fields, len(filling.indices)
    chosen, shown = times_shown(count, filling.config["members"], filling.grid.valid.numel()), []
    for position in chosen:
        block, valid = writer.at(position), filling.grid.valid.cpu().numpy()
        truth = None if block.truth is None else np.where(valid, block.truth[0], np.nan)
        members = np.where(valid, block.members[:, 0], np.nan)
        measured = block.observed[0].any(axis=0) & valid
        shown.append(Shown(date_of(fields, filling.indices[position]), members, measured, truth))
    parts = [] if len(chosen) == count else [f"{len(chosen)} of {count} times, every {chosen.step}th"]
    if filling.config["members"] > MEMBERS:
        parts.append(f"the first {MEMBERS} of {filling.config['members']} members")
    note = f"Shown are {' and '.join(parts)}; mean and spread are those of all." if parts else ""
    title = f"{Path(fields.source).name}, filled"
    write_text_atomic(path, render_page(title, shown, Coordinates.of(fields), units=fields.units, note=note))
    if parts:
        print(f"{path.name}: {' and '.join(parts)}")

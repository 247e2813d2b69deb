"""What `evaluate.py` leaves: printed tables, `scores.csv`, `report.html`, and masks that are done until all are."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vecfield_diffusion import __version__
from vecfield_diffusion.atomic import replacing, write_text_atomic
from vecfield_diffusion.data.splits import compare_blocks
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baselines import BASELINES
from vecfield_diffusion.evaluation.comparison import Estimate, Score, Scored, Setting
from vecfield_diffusion.evaluation.generation import Generated
from vecfield_diffusion.evaluation.plots import Coordinates
from vecfield_diffusion.evaluation.report import Section, render
from vecfield_diffusion.evaluation.scores import columns
from vecfield_diffusion.evaluation.tables import rounded, table
from vecfield_diffusion.evaluation.trajectory import InTime, TimeSection
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.study import Study

#: The columns of the printed table; `scores.csv` has all.
COLUMNS = ("mask", "method", *columns("table"), "rmse / OI", "s per field")
#: What a kept mask is made of, beside tensors and plain values: nothing else is read.
_CLASSES = [Section, Setting, Scored, Score, Estimate, Generated, Grid, TimeSection, InTime]
_CLASSES += [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]


class Kept:
    """Masks that are done, kept in the run's folder until the report is written.

    Arguments:
        folder: Of the run.
        key: What the scores depend on; what was kept under another key is not found.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder / "masks", key

    def find(self, mask: str) -> Section | None:
        """What was kept of a mask; None where there is nothing, or what is there cannot be read."""
        path = self.folder / f"{mask}.pt"
        if not path.is_file():
            return None
        try:
            with torch.serialization.safe_globals(_CLASSES):
                kept = torch.load(path, map_location="cpu", weights_only=True)
            return kept["section"] if kept["key"] == self.key else None
        except Exception:  # damaged in whatever way: it is done again
            return None

    def all(self, masks: Sequence[str]) -> list[Section]:
        """Those of some masks that are done."""
        return [section for section in map(self.find, masks) if section is not None]

    def add(self, mask: str, section: Section) -> Section:
        """Keeps what was found under a mask, and returns it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{mask}.pt") as temporary:
            torch.save({"key": self.key, "section": section}, temporary)
        return section

    def clear(self) -> None:
        """Removes what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Makes a folder. Raises UserError where it cannot be made, or no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: nothing can be written there ({error.strerror}). Make it writable, or choose another folder "
            "with hydra.run.dir=..."
        ) from error


def write_scores(folder: Path, sections: Sequence[Section], units: str) -> None:
    """Writes `scores.csv`, numbers in full."""
    rows = [row for section in sections for row in section.rows(units)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(folder / "scores.csv", text.getvalue())


def print_scores(folder: Path, sections: Sequence[Section], members: int, units: str) -> None:
    """Prints the tables of scores and of generated fields, and where all scores are."""
    print(table([line for section in sections for line in _lines(section)], COLUMNS))
    if generated := [line for section in sections for line in section.generated_lines()]:
        print(table(generated))
    if in_time := [line for section in sections for line in section.time_lines()]:
        print(table(in_time, ("mask", "method", "of", *columns("series"))))
    print(
        f"{folder / 'scores.csv'}: hidden cells, {len(sections[0].setting.truth)} cases of {members} members, {units}; "
        "crps: of members, of the Gaussian law of optimal interpolation, else the absolute error"
    )


def _lines(section: Section) -> list[dict[str, object]]:
    """The lines of the printed table."""
    reference = section.find(BASELINES["oi"].label)
    lines = []
    for method in section.scored:
        values = method.scores["hidden"]
        line = {"mask": section.setting.mask, "method": method.method}
        line |= {name: values[name].value for name in columns("table")}
        line["crps"] = rounded(*values["crps"][:3], sign="+-")
        if reference is not None:
            line["rmse / OI"] = line["rmse_component"] / reference.scores["hidden"]["rmse_component"].value
        lines.append(line | {"s per field": method.seconds})
    return lines


def write_report(folder: Path, sections: Sequence[Section], study: Study) -> None:
    """Draws and writes `report.html`."""
    fields = study.fields
    text = render(
        study.config["name"],
        sections,
        provenance(study),
        fields.units,
        Coordinates.of(fields),
        data=Path(fields.source).name,
        network=", ".join(dict.fromkeys(model.trained.name for model in study.models)),
        notes=[*compare_blocks(fields, study.reference.split), *study.untrained, *study.helps],
    )
    write_text_atomic(folder / "report.html", text)
    print(f"{folder / 'report.html'}: figures and tables")


def provenance(study: Study) -> dict[str, Any]:
    """What a report was made of, by label."""
    fields, train = study.fields, study.reference.split["train"]
    given = {key: value for key, value in study.config.items() if key != "options"}  # without what was not chosen
    return {
        "data": fields.source,
        **{key: str(value) for key, value in fields.attrs.items() if key in ("source", "licence")},
        "layout": fields.summary(),
        "unseen snapshots": ", ".join(map(str, study.indices)),
        "independent snapshots": f"{study.independent:.2g} of {len(study.indices)}, by the correlation time",
        "training snapshots": f"{train.start} to {train.stop - 1}",
        **{
            f"network {model.name}": f"{model.trained.path}, step {model.trained.step}, "
            f"{type(model.trained.denoiser.diffusion).__name__}"
            for model in study.models
        },
        "seed": study.config["seed"],
        "program": f"vecfield_diffusion {__version__}, torch {torch.__version__}",
        "configuration": yaml.safe_dump(given, sort_keys=False),
    }


def summary(sections: list[Section]) -> dict[str, float]:
    """The CRPS of every mask and network, and as `crps` the mean over the masks of the best network.

    A network of snapshots has no part in forecasts, and none in the mean where there are any.
    """
    found, means = {}, []
    names = list(dict.fromkeys(name for section in sections for name in section.networks))
    for name in names:
        values = {row.setting.mask: row.find(name).scores["hidden"]["crps"].value for row in sections if row.find(name)}
        found |= {f"{mask}/crps" if len(names) == 1 else f"{mask}/{name}/crps": crps for mask, crps in values.items()}
        means += [sum(values.values()) / len(values)] if len(values) == len(sections) else []
    return {"crps": min(means), **found}

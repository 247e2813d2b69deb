"""`inspect_data.py FILE`: what is in a file of velocities, what is doubtful about it, and how to train on it."""

from __future__ import annotations

import base64
import html
import inspect as python
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.evaluation import inspection
from vecfield_diffusion.evaluation.inspection import Inspection
from vecfield_diffusion.evaluation.plots import figure_inspection
from vecfield_diffusion.programs.findings import report
from vecfield_diffusion.programs.recipe import Recipe, experiment_name, one_alone, recipe


@dataclass(frozen=True, repr=False)
class InspectionReport:
    """What a set of velocities is like: printed, it is the report; in a notebook, the report with its picture.

    Arguments:
        found: All that was measured.
        recipe: What to train on it; None where it has too few snapshots.
        alone: What to do with one snapshot alone; empty for others.
    """

    found: Inspection
    recipe: Recipe | None
    alone: str = ""

    def text(self) -> str:
        """The report, the doubts, and the command to train with."""
        steps = f"to train\n\n  {self.recipe.command()}" if self.recipe else self.alone
        return "\n\n".join(filter(None, [report(self.found), steps]))

    __repr__ = text

    def picture(self) -> bytes:
        """Maps, correlation, speed over time and distribution, as PNG."""
        with tempfile.TemporaryDirectory() as folder:
            figure_inspection(Path(folder) / "figure.png", self.found)
            return (Path(folder) / "figure.png").read_bytes()

    def to_html(self) -> str:
        """The report and the picture as one piece of HTML that needs no other file."""
        data = base64.b64encode(self.picture()).decode()
        return (
            f'<div><pre style="white-space:pre-wrap">{html.escape(self.text())}</pre>'
            f'<img style="max-width:100%" alt="maps, correlation, speed and distribution of the data" '
            f'src="data:image/png;base64,{data}"></div>'
        )

    _repr_html_ = to_html


def inspect(source: Any, **options: Any) -> InspectionReport:
    """What a set of velocities is like, what is doubtful about it, and how to train on it.

    Arguments:
        source: Whatever `open_fields` opens.
        options: Its keywords, such as `invalid="obstacle_mask"`.

    Raises:
        UserError: It cannot be read, or its fields do not vary.
    """
    path = str(source) if isinstance(source, str | os.PathLike) else "FILE"
    return described(open_fields(source, **options), {"path": path, **options})


def described(fields: Fields, given: Mapping[str, Any]) -> InspectionReport:
    """The report on fields that were opened with the keys `given` of dataset=file, the path among them."""
    found, name = inspection.inspect(fields), experiment_name(given["path"])
    plan = recipe(found, name, given) if found.split else None
    return InspectionReport(found, plan, one_alone(given["path"], "windows") if found.still else "")


def inspect_file(config: dict[str, Any], folder: Path) -> None:
    """Prints the report on `config["dataset"]`, and writes picture and experiment file into a folder of `folder`.

    Raises:
        UserError: The data cannot be read, or do not vary.
    """
    node = config["dataset"]
    given = {key: value for key, value in node.items() if key != "_target_" and value not in (DEFAULTS.get(key), [])}
    result = described(build(node, "dataset", trusted=True), given)
    print(result)
    name = experiment_name(given["path"])
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if result.recipe:
        file = folder / "experiment" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        write_text_atomic(file, result.recipe.yaml())
        program = "vecfield-train" if Path(sys.argv[0]).name.startswith("vecfield") else "python train.py"
        print(
            f"\nor by the file {file}, which may be edited first\n\n  {program} --config-dir {folder} experiment={name}"
        )
    figure_inspection(folder / "figure.png", result.found)
    print(f"\npicture: {folder / 'figure.png'}")


#: What the keys of dataset=file are where they are not given.
DEFAULTS = {key: parameter.default for key, parameter in python.signature(open_fields).parameters.items()}

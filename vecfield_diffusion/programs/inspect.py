"""What is in a file of velocities, what is doubtful about it, and how to train on it.

    python scripts/inspect_data.py my.nc
    python scripts/inspect_data.py wake.h5 invalid=obstacle_mask

FILE is whatever dataset=file reads; what follows it are keys of conf/dataset/file.yaml. The report is printed;
outputs/inspect/<file>/ holds a picture, figure.png, and an experiment file to be copied to conf/experiment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vecfield_diffusion.commands import train
from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.inspection import inspect, override, recipe, run_name
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots import figure_inspection
from vecfield_diffusion.inference.files import write_text_atomic


def main() -> int:
    """Reads the command line, prints the report and writes the files. Raises UserError."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    path, *keys = arguments
    given = dataset(path, keys)
    found = inspect(build(given, "dataset", trusted=True))
    print(found.text())
    name = run_name(path)
    folder = Path("outputs/inspect") / name
    folder.mkdir(parents=True, exist_ok=True)
    if found.trainable:
        plan = recipe(found, name, {key: value for key, value in given.items() if key != "_target_"})
        write_text_atomic(folder / f"{name}.yaml", plan.yaml())
        print(f"\nto train: conf/experiment/{name}.yaml (a copy is in {folder})\n\n{plan.yaml()}")
        print(f"or as one line\n\n{plan.command()}")
    figure_inspection(folder / "figure.png", found)
    print(f"\npicture: {folder / 'figure.png'}")
    return 0


def dataset(path: str, keys: list[str]) -> dict[str, Any]:
    """The node of dataset=file with the path and the keys that were given. Raises UserError."""
    if "=" in path and not Path(path).exists():
        raise UserError(f"{path}: the file comes first: python scripts/inspect_data.py FILE {path}")
    base = ["dataset=file", override("dataset.path", path)]
    plain = train.config(*base)["dataset"]
    given = train.config(*base, *(f"dataset.{key.removeprefix('dataset.')}" for key in keys))["dataset"]
    return {key: value for key, value in given.items() if key in ("_target_", "path") or value != plain[key]}

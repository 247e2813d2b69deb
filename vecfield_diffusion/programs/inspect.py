"""What is in a file of velocities, what is doubtful about it, and how to train on it.

The report is printed; outputs/inspect/<file>/ holds a picture, figure.png, and an experiment file
to be copied to conf/experiment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.inspection import inspect, recipe, run_name
from vecfield_diffusion.evaluation.plots import figure_inspection
from vecfield_diffusion.inference.files import write_text_atomic


def inspect_file(config: dict[str, Any], folder: Path) -> None:
    """Prints the report and writes the files. Raises UserError."""
    node = config["dataset"]
    defaults = config["options"]["dataset"]["file"]
    given = {key: value for key, value in node.items() if key in ("_target_", "path") or value != defaults.get(key)}
    found = inspect(build(node, "dataset", trusted=True))
    print(found.text())
    name = run_name(node["path"])
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if found.trainable:
        plan = recipe(found, name, {key: value for key, value in given.items() if key != "_target_"})
        write_text_atomic(folder / f"{name}.yaml", plan.yaml())
        print(f"\nto train: conf/experiment/{name}.yaml (a copy is in {folder})\n\n{plan.yaml()}")
        print(f"or as one line\n\n{plan.command()}")
    figure_inspection(folder / "figure.png", found)
    print(f"\npicture: {folder / 'figure.png'}")

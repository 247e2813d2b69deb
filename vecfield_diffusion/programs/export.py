"""A trained model in one file, to be shipped, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.export import PROGRAM_FILE, load_weights, save_program, save_weights
from vecfield_diffusion.programs.trained import load_trained
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

ENDINGS = {"safetensors": ".safetensors", "program": ".pt2"}


def export(config: dict[str, Any], folder: Path) -> None:
    """Writes the file of a run into `folder`, or makes a run folder of a file, and says how to use it.

    Raises:
        UserError: neither or both are given, or they cannot be read or written.
    """
    if (config["ckpt"] is None) == (config["from"] is None):
        raise UserError("give either ckpt=outputs/train/NAME, to export it, or from=FILE.safetensors, to read one back")
    if config["format"] == "program" and config["dtype"] != "float32":
        raise UserError("dtype=float16 is for format=safetensors: a program computes in float32")
    print(ship(config, folder) if config["from"] is None else receive(config))


def ship(options: dict[str, Any], folder: Path) -> str:
    """Writes the file of a checkpoint and says how to use it."""
    trained = load_trained(options["ckpt"], torch.device("cpu"), options["trust"])
    ending = ENDINGS[options["format"]]
    out = Path(options["out"] or folder / f"{trained.name}{ending}")
    if out.suffix != ending:
        raise UserError(f"out={out}: a file that ends in {ending} is expected")
    state = load_checkpoint(trained.path)
    if options["format"] == "program":
        if state.get("context"):
            raise UserError("format=program: it has no place for the context of this network. Use format=safetensors")
        save_program(out, trained.denoiser, trained.grid, trained.units, trained.frames)
        how = f'files = {{"{PROGRAM_FILE}": ""}}; torch.export.load("{out}", extra_files=files)'
    else:
        save_weights(out, located(state, options["data"]), options["dtype"])
        how = f"vecfield-export from={out} out=outputs/train/NAME"
    return f"{out}: {out.stat().st_size / 1e6:.2f} MB, step {trained.step} of {trained.path}\nnext: {how}"


def located(state: dict[str, Any], data: str | None) -> dict[str, Any]:
    """The state with another path of the training data in its configuration."""
    if data is None:
        return state
    config = yaml.safe_load(state["config"])
    config["dataset"]["path"] = data
    return {**state, "config": yaml.safe_dump(config, sort_keys=False)}


def receive(options: dict[str, Any]) -> str:
    """Makes a run folder of a file and says how to use it."""
    source = Path(options["from"])
    folder = Path(options["out"] or f"outputs/train/{source.stem}")
    if (folder / "checkpoints").exists():
        raise UserError(f"out={folder} holds a run already. Choose another folder")
    state = load_weights(source)
    # As the last checkpoint of a run: train.py then says that it cannot go on, instead of beginning anew over it.
    path = folder / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    try:
        save_checkpoint(path, state)
        trained = load_trained(str(path), torch.device("cpu"), options["trust"])
    except UserError:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        raise
    # A file from elsewhere does not choose what is opened here: the user names the data.
    data = trained.config["dataset"].get("path")
    data = "" if data is None else f" data={data}"
    return f"{folder}: step {trained.step} of {source}\nnext: python infer.py ckpt={folder} mask=block{data}"

"""A trained model in one file, to be shipped, and back.

vecfield-export ckpt=outputs/train/run                           weights: outputs/export/run.safetensors
vecfield-export ckpt=outputs/train/run dtype=float16             half the size
vecfield-export ckpt=outputs/train/run format=program            runs by torch alone: outputs/export/run.pt2
vecfield-export from=run.safetensors out=outputs/train/shipped   a run folder that infer.py takes

ckpt      a run folder or a checkpoint file
from      a file that this program wrote with format=safetensors
format    safetensors (default) | program
dtype     float32 (default) | float16, of the weights in a safetensors file
data      the path of the training data that is noted, where the one of this machine means nothing elsewhere
out       the file to write; with from=, the run folder to make
trust     modules of other packages that the configuration may name, e.g. trust=[diffusers]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from vecfield_diffusion.config.overrides import Composer
from vecfield_diffusion.config.program import CONF
from vecfield_diffusion.config.schema import Checker
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.export import PROGRAM_FILE, load_weights, save_program, save_weights
from vecfield_diffusion.programs.trained import Trained, load_trained
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

KEYS = {
    "ckpt": "str | None",
    "from": "str | None",
    "format": "Literal['safetensors', 'program']",
    "dtype": "Literal['float32', 'float16']",
    "data": "str | None",
    "out": "str | None",
    "trust": "list[str]",
}
DEFAULTS = {
    "ckpt": None,
    "from": None,
    "format": "safetensors",
    "dtype": "float32",
    "data": None,
    "out": None,
    "trust": [],
}
ENDINGS = {"safetensors": ".safetensors", "program": ".pt2"}


def main() -> int:
    """Reads the command line and does what it says. Raises UserError."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    options = read_options(sys.argv[1:])
    print((ship if options["from"] is None else receive)(options))
    return 0


def read_options(arguments: list[str]) -> dict[str, Any]:
    """The options of a command line, checked. Raises UserError."""
    composer = Composer(CONF, None)
    options = {override.get_key_element(): override.value() for override in map(composer.parse, arguments)}
    options = Checker(KEYS).root(DEFAULTS | options)
    if (options["ckpt"] is None) == (options["from"] is None):
        raise UserError("give either ckpt=outputs/train/NAME, to export it, or from=FILE.safetensors, to read one back")
    if options["format"] == "program" and options["dtype"] != "float32":
        raise UserError("dtype=float16 is for format=safetensors: a program computes in float32")
    return options


def ship(options: dict[str, Any]) -> str:
    """Writes the file of a checkpoint and says how to use it."""
    trained = load_trained(options["ckpt"], torch.device("cpu"), options["trust"])
    ending = ENDINGS[options["format"]]
    out = Path(options["out"] or f"outputs/export/{run_name(trained)}{ending}")
    if out.suffix != ending:
        raise UserError(f"out={out}: a file that ends in {ending} is expected")
    state = load_checkpoint(trained.path)
    if options["format"] == "program":
        if state.get("context"):
            raise UserError("format=program: it has no place for the context of this network. Use format=safetensors")
        save_program(out, trained.denoiser, trained.grid, trained.units)
        usage = f'files = {{"{PROGRAM_FILE}": ""}}; torch.export.load("{out}", extra_files=files)'
    else:
        save_weights(out, located(state, options["data"]), options["dtype"])
        usage = f"vecfield-export from={out} out=outputs/train/NAME"
    return f"{out}: {out.stat().st_size / 1e6:.2f} MB, step {trained.step} of {trained.path}\nnext: {usage}"


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
    return f"{folder}: step {trained.step} of {source}\nnext: python infer.py ckpt={folder} mask=block"


def run_name(trained: Trained) -> str:
    """What a file is called after: the folder of the run, or the checkpoint that lies by itself."""
    path = trained.path.absolute()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem

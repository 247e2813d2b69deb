"""Files of fields that are made, not measured: each is made once, and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.memory import readable
from vecfield_diffusion.progress import bar
from vecfield_diffusion.signals import stoppable

#: Makes blocks of fields `(n, 2, H, W)`, from a snapshot on that begins one.
Blocks = Callable[[int], Iterator[Tensor]]


def made(folder: Path, name: str, recipe: dict[str, float], blocks: Blocks) -> Path:
    """The file of `recipe`, written from `blocks` of fields, from a snapshot on, if there is none."""
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{name}_{recipe['stored']}_{recipe['snapshots']}_{key}.h5"
    if not path.exists():
        check_room(folder, recipe)
        write_turbulence(path, blocks, recipe)
    return path


def check_room(folder: Path, recipe: dict[str, float]) -> None:
    """Raises UserError where the fields are larger than the disk has room for, before the first of them is made."""
    size = 8 * recipe["snapshots"] * recipe["stored"] ** 2  # two components in float32
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if size > (free := shutil.disk_usage(place).free):
        raise UserError(
            f"{recipe['snapshots']} fields of {recipe['stored']}x{recipe['stored']} cells take {readable(size)}, but "
            f"{place} has room for {readable(free)}: give fewer dataset.snapshots or a smaller dataset.resolution"
        )


def write_turbulence(path: Path, blocks: Blocks, recipe: dict[str, float]) -> None:
    """Writes the fields of `recipe` to `path`.

    Raises:
        UserError: The folder cannot be made, or the disk is full.
        SystemExit: SIGTERM or Ctrl-C, which keep what is made beside the file.
    """
    kept, made, number = path.with_suffix(".part.npy"), [], int(recipe["snapshots"])
    if kept.exists():
        made.append(np.load(kept))
        print(f"going on: {len(made[0])} of {number} fields of {path.name} are made")

    def keep() -> str:
        count = sum(map(len, made))
        if not count:
            return "nothing of it is kept"
        with replacing(kept) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(made))
        return f"{count} of {number} fields are kept in {kept}"

    done = sum(map(len, made))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}. Choose another folder: dataset.folder=...") from error
    with (
        stoppable(keep),
        bar(number, "fields", f"making {path.name}", done=done) as progress,
        closing(blocks(done)) as rest,
    ):
        for block in rest:
            made.append(block.numpy())
            progress.update(len(block))
        write_hdf5(path, made, **described(recipe))
    kept.unlink(missing_ok=True)


def described(recipe: dict[str, float]) -> dict[str, Any]:
    """What the file of `recipe` says of itself: the arguments of `write_hdf5`."""
    kind = "Gaussian twin of decaying" if recipe.get("twin") else "decaying"
    step = recipe["side"] / recipe["stored"]
    centres = ((torch.arange(int(recipe["stored"]), dtype=torch.float64) + 0.5) * step).numpy()
    return {
        "dx": step,
        "dy": step,
        "boundary_x": "periodic",
        "boundary_y": "periodic",
        "units": "m s-1",
        "source": f"{kind} two-dimensional turbulence, " + json.dumps(recipe, sort_keys=True),
        "licence": "CC0-1.0",
        "x": centres,
        "y": centres,
        **(in_time(recipe) if "trajectory" in recipe else {}),
    }


def in_time(recipe: dict[str, float]) -> dict[str, Any]:
    """The hours of the snapshots since the first of their run, and their runs, as arguments of `write_hdf5`."""
    numbers, frames = np.arange(int(recipe["snapshots"])), int(recipe["trajectory"])
    turnover = recipe["side"] / (2 * math.pi) / recipe["speed"] / recipe["k_peak"] / 3600
    hours = numbers % frames * recipe["interval"] * turnover
    return {"time": hours, "time_units": "h", "runs": numbers // frames}

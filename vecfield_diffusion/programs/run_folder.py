"""What a run is known by: its configuration and its data, and whether the same command may go on with it."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.fingerprint import fingerprint
from vecfield_diffusion.data.sequences import Runs
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.training.loggers import records

#: Keys that may change between the command that began a run and the one that goes on with it: where and how long it
#: runs, what is said of it, and what its messages advise to change when memory is short or numbers grow too large.
FREE = (
    "name",
    "device",
    "logger",
    "dataset.preload_gb",
    "trainer.max_steps",
    "trainer.max_minutes",
    "trainer.log_every",
    "trainer.checkpoint_minutes",
    "trainer.accumulate",
    "trainer.precision",
    "trainer.grad_clip",
    "trainer.patience",
    "trainer.devices",
    "trainer.strategy",
)
#: Keys of which `auto` stands for whatever the data ask for.
BY_DATA = ("diffusion.sigma_max", "model.dropout", "trainer.patience", "augment.transforms")


def keep_config(config: Mapping[str, Any], folder: Path) -> None:
    """Writes `config.yaml` when a run begins. Raises what `check_folder` raises."""
    if not check_folder(config, folder):
        write_text_atomic(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def check_folder(config: Mapping[str, Any], folder: Path) -> bool:
    """Returns whether the folder holds a run with a checkpoint; it goes on only as it began.

    `auto` stands for whatever the data asked for: it is compared once it is known.

    Raises:
        UserError: The run was configured otherwise, or one of its files is missing or damaged.
    """
    found = {path.name for path in (folder / "checkpoints").glob("*.pt")}
    if not found:
        return False
    if "last.pt" not in found:
        raise UserError(
            f"{folder}/checkpoints holds {', '.join(sorted(found))}, but no last.pt to go on from. Put it back, or "
            "choose another name=... for a new run"
        )
    before, now = _leaves(kept_config(folder)), _leaves(yaml.safe_load(yaml.safe_dump(dict(config))))
    for key in sorted(before):  # a key that there was not then had the value that is now its default
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        by_data = key in BY_DATA and now.get(key) == "auto"
        if not (free or by_data) and before.get(key) != now.get(key):
            raise UserError(
                f"{folder} holds a run with {key}={before.get(key)}, not {now.get(key)}. Give the same to go on "
                "with it, or another name=... for a new run"
            )
    log = folder / "metrics.jsonl"
    try:
        collections.deque(records(log) if log.exists() else (), maxlen=0)  # read whole, and let go
    except OSError as error:
        raise _damaged(log, str(error)) from error
    return True


def coordinates(fields: Fields) -> dict[str, Any]:
    """Returns the coordinates as a checkpoint stores them, with the standard names of the components along them."""
    axes = {name: torch.tensor(values.astype(float)) for name, values in (("x", fields.x), ("y", fields.y))}
    along = fields.component_attrs if fields.turn is None else ()
    named = [{key: str(attrs[key]) for key in ("standard_name",) if key in attrs} for attrs in along] or [{}, {}]
    return axes | {"x_name": fields.x_name, "y_name": fields.y_name, "component_attrs": named}


def describe(fields: Fields, split: Mapping[str, range]) -> dict[str, Any]:
    """Returns what a checkpoint remembers of the data: a run goes on with the same, and what is unseen stays unseen."""
    blocks = {name: [block.start, block.stop] for name, block in split.items()}
    found = {"length": len(fields), "units": fields.units, "split": blocks, "fingerprint": fingerprint(fields)}
    if fields.frames == 1 or fields.time is None:
        return found
    runs = Runs.of(fields)
    return found | {"step": runs.step, "time_units": runs.unit}


def kept_config(folder: Path) -> Mapping[str, Any]:
    """The configuration that the run of a folder began with; empty where none has begun. Raises UserError."""
    path = folder / "config.yaml"
    if not any((folder / "checkpoints").glob("*.pt")):
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(config, Mapping):
        raise _damaged(path, "expected keys with values")
    return config


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: the run cannot go on, for this file is missing or damaged ({reason}). Put it back, or choose another "
        "name=... for a new run"
    )


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested configuration by dotted path."""
    if not isinstance(node, Mapping):
        return {path: node}
    return {key: value for name in node for key, value in _leaves(node[name], f"{path}.{name}".lstrip(".")).items()}

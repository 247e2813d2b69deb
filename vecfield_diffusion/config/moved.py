"""Names that have moved: configurations and checkpoints that were written before keep working."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

#: The dotted name of a class or function in an older configuration, and its name now.
MOVED = {
    f"vecfield_diffusion.data.{old}": "vecfield_diffusion.data.readers.open_fields"
    for old in ("formats.open_fields", "netcdf.open_netcdf", "hdf5.open_hdf5")
} | {
    "vecfield_diffusion.training.trainer.Trainer": "vecfield_diffusion.training.settings.Trainer",
    "vecfield_diffusion.diffusion.thermodynamic.Thermodynamic": (
        "vecfield_diffusion.diffusion.formulations.Thermodynamic"
    ),
}

#: The key of a group in an older configuration or command, and its key now.
RENAMED = {"sampler.grid": "sampler.schedule", "inpainting.told": "inpainting.conditioned"}


def present_name(target: str) -> str:
    """The name that a target bears now."""
    return MOVED.get(target, target)


def present_keys(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The arguments of a target of this package by their present keys; one under its old key goes before the new."""
    older = {key: RENAMED[f"{path}.{key}"] for key in node if f"{path}.{key}" in RENAMED}
    if not older or not str(node.get("_target_")).startswith("vecfield_diffusion."):
        return dict(node)
    renamed = {new.rpartition(".")[2]: node[old] for old, new in older.items()}
    return {key: entry for key, entry in node.items() if key not in older} | renamed


def present_names(config: Any, path: str = "") -> Any:
    """A configuration with the present name of every target and key, to be compared with another one."""
    if isinstance(config, list | tuple):
        return type(config)(present_names(entry) for entry in config)
    if not isinstance(config, Mapping):
        return config
    return {
        key: present_name(entry) if key == "_target_" and isinstance(entry, str) else present_names(entry, str(key))
        for key, entry in present_keys(config, path).items()
    }


@functools.cache
def say_once(note: str) -> None:
    """Prints a note, the first time that it is given."""
    print(note)

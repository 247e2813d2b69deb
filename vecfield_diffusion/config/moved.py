"""Names that have moved: configurations and checkpoints that were written before keep working."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The dotted name of a class or function in an older configuration, and its name now.
MOVED = {
    f"vecfield_diffusion.data.{old}": "vecfield_diffusion.data.readers.open_fields"
    for old in ("formats.open_fields", "netcdf.open_netcdf", "hdf5.open_hdf5")
}


def present_name(target: str) -> str:
    """The name that a target bears now."""
    return MOVED.get(target, target)


def present_names(config: Any) -> Any:
    """A configuration with the present name of every target, to be compared with another one."""
    if isinstance(config, list | tuple):
        return type(config)(present_names(entry) for entry in config)
    if not isinstance(config, Mapping):
        return config
    return {
        key: present_name(entry) if key == "_target_" and isinstance(entry, str) else present_names(entry)
        for key, entry in config.items()
    }

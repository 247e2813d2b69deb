"""Diffusion models that fill the gaps of two-component vector fields: ocean currents, winds, particle images.

    import vecfield_diffusion as vf

    filled = vf.fill(dataset, "pretrained/turbulence", members=16, seed=0)

Everything public is named here and made in `library`; it is imported when it is first used, and torch with it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

__all__ = ["evaluate", "fill", "inspect", "load", "open", "train"]


def __getattr__(name: str) -> Any:
    """Returns what is public."""
    if name in __all__:
        return getattr(importlib.import_module("vecfield_diffusion.library"), name)
    raise AttributeError(f"module 'vecfield_diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the names of what is public."""
    return [*__all__, "__version__"]

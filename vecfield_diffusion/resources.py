"""Where the files lie that come with the package: configurations and shipped networks."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """A folder that comes with the package, such as `conf`.

    A wheel carries it inside the package; a checkout, installed editable or not, has it beside the package.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name

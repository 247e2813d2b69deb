"""A name for what a command leaves, made of what was typed: different commands leave different folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from vecfield_diffusion.config.overrides import Composer

#: Letters of a name, at most; the end of a longer one is a hash of all.
LONGEST = 100
#: Options that say nothing beside their settings.
_MUTE = ("file", "auto")


def name_of(overrides: Sequence[str], composer: Composer, free: Collection[str]) -> str:
    """Returns a name: `mine-radar-mmps` of `ckpt=outputs/train/mine input=radar.nc inpainting=mmps`.

    Files and options stand by themselves, other values after their keys. Empty where nothing tells commands apart.

    Arguments:
        overrides: What was typed.
        composer: Knows what is a group.
        free: Keys that results do not depend on, with all below them.
    """
    parts = []
    for override in map(composer.parse, overrides):
        key, value = override.key_or_group, (override.input_line or "").partition("=")[2].strip("'\"[]")
        if key.partition("/")[0].partition(".")[0] in (*free, "hydra"):
            continue
        last = key.rpartition(".")[2]
        if last in ("ckpt", "domain", "input", "path"):
            parts.append("_".join(map(_short, value.split(","))))
        elif composer.options(key) or composer.options(key.removesuffix("s")):
            parts += [] if value in _MUTE else [value]
        else:
            parts.append(f"{last}_{value}")
    name = "-".join(filter(None, (re.sub(r"[^\w.+-]+", "_", part).strip("._") for part in parts)))
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short(place: str) -> str:
    """A file, a run or a job of a sweep without the folders that it lies in, and without the ending of its name."""
    path = Path(place.strip(" '\""))
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    if path.name.isdigit() or "*" in path.name:
        return f"{path.parent.name}_{path.name.partition('*')[0]}"
    return path.stem if path.suffix[1:].isalpha() else path.name

"""What to type to train on a set, as an experiment file and as a command, and what to do where that is impossible."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vecfield_diffusion.data.sequences import Sequences
from vecfield_diffusion.data.statistics import homogeneous
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baselines import CORRELATED
from vecfield_diffusion.evaluation.inspection import Inspection
from vecfield_diffusion.programs.findings import physics

#: Passes over the data that are suggested, and the minutes that they may take.
PASSES, MINUTES = 500, 60.0
#: Fewer snapshots than this are learned by heart: they are trained on in windows, where that is no loss.
LEARNED_BY_HEART = 1000
#: A window is four fifths of the fields, at most this many cells a side; fields of fewer cells a side have no room.
WINDOW, ROOM = 48, 40
#: Fields of more cells than this are trained on in windows, whatever their number.
WHOLE = 128**2
#: Frames of a sequence, longer and shorter, and the splits that must hold some.
LONG, SHORT, BLOCKS = 9, 5, ("train", "validation", "test")
#: Share of the variance in one mode from which the structures fill the domain, and windows would cut them.
ONE_PIECE = 0.2


@dataclass(frozen=True)
class Recipe:
    """A configuration for training on a file.

    Arguments:
        name: Of the run and of the experiment.
        options: The option of each group.
        settings: Keys and values, in groups or alone.
        notes: Comments: on the file under the key ``, on a setting under its dotted key.
    """

    name: str
    options: dict[str, str]
    settings: dict[str, Any]
    notes: dict[str, str]

    def yaml(self) -> str:
        """The text of conf/experiment/<name>.yaml."""
        lines = ["# @package _global_", f"# {self.notes['']}", "defaults:"]
        lines += [f"  - override /{group}: {option}" for group, option in self.options.items()]
        for key, value in self.settings.items():
            if not isinstance(value, Mapping):
                line, note = f"{key}: {_scalar(value)}", self.notes.get(key)
                lines.append(f"{line:24} # {note}" if note else line)
                continue
            lines.append(f"{key}:")
            for inner, setting in value.items():
                line, note = f"  {inner}: {_scalar(setting)}", self.notes.get(f"{key}.{inner}")
                lines.append(f"{line:24} # {note}" if note else line)
        return "\n".join([*lines, f"# {self.notes['physics']}", ""])

    def command(self) -> str:
        """The same as one line."""
        words = [f"{group}={option}" for group, option in self.options.items()]
        for key, value in self.settings.items():
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            words += [shlex.quote(override(f"{key}.{name}".rstrip("."), setting)) for name, setting in inner]
        return " ".join(["python", "train.py", *words])


def recipe(found: Inspection, name: str, given: Mapping[str, Any]) -> Recipe:
    """What to train on a set: the network that README says to try first, with what the set asks for.

    Arguments:
        found: What is known of it.
        name: Of the run and of the experiment.
        given: The keys of dataset=file that were given, the path among them.
    """
    fields, n, window = found.fields, len(found.fields), window_for(found)
    height, width = window or fields.shape
    frames = frames_for(found)
    batch = 16 if frames == 1 else 8
    steps = min(max(1000 * round(PASSES * n / batch / 1000), 4000), 100_000)
    settings = {
        "name": name,
        "dataset": dict(given) | ({"frames": frames} if frames > 1 and "frames" not in given else {}),
        "splits": {"guard": found.guard},
        "window": window,
        "model": {
            "channels": [48, 96, 128],
            "blocks": 1,
            "patch": 1 if height * width <= 32**2 else 2,
        },
        "diffusion": {"noise": "log_normal", "P_mean": 0.0, "P_std": 1.8},
        "optimizer": {"lr": 1e-3},
        "trainer": {
            "batch_size": batch,
            "max_steps": steps,
            "max_minutes": MINUTES,
            "warmup": 100 * batch,
            "cooldown": 0.6,
            "ema": 15000,
            "validate_every": 500,
        },
    }
    few_fields = f"{n} fields are few; add augment.transforms=[flip_x,flip_y] where both sides are alike"
    notes = {
        "": f"{n} fields of {fields.shape[0]}x{fields.shape[1]} cells, {' and '.join(fields.names)}",
        "splits.guard": f"snapshots; the correlation is {'still ' * found.cut_short}{found.at_guard:z.2f} there",
        "window": few_fields if fields.grid.valid.numel() <= WHOLE else "whole fields are too large",
        "dataset.frames": f"the correlation from one snapshot to the next is {found.following:.2f}: a series",
        "diffusion.noise": "around the levels that the gaps leave open",
        "trainer.max_steps": f"{batch * steps / n:.0f} passes, or",
        "trainer.max_minutes": "whichever ends first: the learning rate falls with it",
        "physics": f"physics: {physics(found)}",
    }
    settings = {key: value for key, value in settings.items() if value not in ({}, None)}
    return Recipe(name, {"dataset": "file", "model": "gaussian"}, settings, notes)


def frames_for(found: Inspection) -> int:
    """The frames of the sequences to train on; 1, snapshots, where these say nothing of one another.

    Sequences are longer where snapshots four frames apart still do, and every split holds some.
    """
    rho = found.autocorrelation
    for frames, lag in ((LONG, LONG // 2), (SHORT, 1)):
        if lag < len(rho) and rho[lag] >= CORRELATED and all(_holds(found, name, frames) for name in BLOCKS):
            return frames
    return 1


def _holds(found: Inspection, name: str, frames: int) -> bool:
    """Whether a split holds a sequence."""
    try:
        return len(Sequences.of(found.fields, found.split[name], frames=frames, stride=1)) > 0
    except (UserError, KeyError):
        return False


def window_for(found: Inspection) -> list[int] | None:
    """The window to train on, `[h, w]`: where fields are too large, or so few that they are learned by heart.

    On a year of daily currents (260 fields of 41x81) the validation loss of whole fields rose from .46 after 500 steps
    to .55 after 1500, that of windows of 32x56, flipped, fell to .35. Fields of which one mode holds much of the
    variance, as wakes, and periodic ones, whose covariance waves give, are trained on whole.
    """
    fields, cells = found.fields, found.fields.grid.valid.numel()
    few = len(fields) < LEARNED_BY_HEART and min(fields.shape) >= ROOM and found.leading < ONE_PIECE
    if cells <= WHOLE and (homogeneous(fields) or not few):
        return None
    return [min(max(int(0.8 * side) // 8 * 8, min(side, 16)), WINDOW) for side in fields.shape]


def one_alone(path: str, name: str) -> str:
    """What fills a set of one snapshot: a network of windows, which knows no place, of flows that are made."""
    trained = f"outputs/train/{name}"
    pattern = shlex.quote(str(Path(path).parent / f"*{Path(path).suffix}"))
    return (
        "to fill it by a network of windows of generated flows\n\n"
        f"  python train.py model=unet_tiny 'window=[32,32]' name={name} trainer.max_minutes=10\n"
        f"  python infer.py ckpt={trained} {shlex.quote(override('input', path))} hide=0.2\n\n"
        "which hides and scores a fifth; with domain=FILE, 1 = to be filled, in place of hide= it fills the gaps;\n"
        "better, where there are files of more times: inspect them together, and train on them\n\n"
        f"  python scripts/inspect_data.py {pattern}"
    )


def experiment_name(path: str) -> str:
    """What the run and the experiment of a file are called."""
    names = (re.sub(r"[^\w+-]+", "_", name).strip("_") for name in (Path(path).stem, Path(path).parent.name))
    return next(filter(None, names), "data")


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()


def override(key: str, value: Any) -> str:
    """`key=value` as the programs read it, the value quoted where it must be."""
    text = json.dumps(value) if not isinstance(value, str) else value
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]+", value):
        # Within quotes a backslash is one, unless a quote follows.
        escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
        text = f'"{escaped}"'
    return f"{key}={text}"

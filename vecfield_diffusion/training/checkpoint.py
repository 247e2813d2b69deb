"""Checkpoints: one file of tensors and plain values, written whole or not at all, read without unpickling code.

A checkpoint holds the configuration as YAML text, the weights and their average, the normalizer, the statistics and the
grid of the data, the optimizer and the counters: all that inference and resuming need.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError

FORMAT = "vecfield-checkpoint"
VERSION = 1
#: What zipfile and torch raise on reading something else than a whole checkpoint.
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError)


def make_folder(folder: Path) -> None:
    """Makes a folder of a run. Raises UserError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`, whole or not at all.

    Raises:
        UserError: The folder cannot be written or the disk is full; an older checkpoint is left as it was.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError.
        raise UserError(
            f"{path}: the checkpoint could not be written ({error}); an older one is as it was. "
            "Make room or choose another folder with hydra.run.dir=..."
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the state of a checkpoint, on the CPU.

    Raises:
        UserError: No such file, a corrupt one, one that holds code, or one of another program or version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there. Give a run folder or a checkpoint file, ckpt=outputs/train/NAME")
    try:
        state = _read(path)
    except UNREADABLE as error:
        reason = "is damaged or of another kind"
        if "weights_only" in str(error).lower():
            reason = "holds objects that are not plain data, and was not read"
        elif isinstance(error, PermissionError):
            reason = "may not be read by this user"
        raise UserError(
            f"{path}: not a checkpoint that can be read: it {reason}. Train again, or give another file with ckpt="
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program. Give a run folder, ckpt=outputs/train/NAME")
    if state.get("version") != VERSION:
        raise UserError(f"{path}: checkpoint version {state.get('version')}, but this program reads version {VERSION}")
    return state


def last_state(last: Path, best: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the state from which a run goes on; None where it begins.

    Arguments:
        last: The last checkpoint.
        best: The best one.
        identity: What the checkpoints of the run hold of its data, under `data`.

    Raises:
        UserError: It cannot be read, is of other data, or is missing beside the best one.
    """
    if not last.exists():
        if best.exists():
            raise UserError(
                f"{best} is there, but not {last.name}, from which to go on; training anew would overwrite "
                f"it. Copy {best} to {last} to go on from the best step, or choose another name=..."
            )
        return None
    state = load_checkpoint(last)
    refuse_changed(last, state, identity)
    return state


def refuse_changed(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint is of other data than those of `identity`, both under `data`."""
    if found := changes(state.get("data") or {}, identity.get("data") or {}):
        raise UserError(
            f"{path}: the data have changed since this run began: {found}. Restore them, or choose another name=... "
            "for a new run"
        )


def _read(path: Path) -> Any:
    """Returns what the archive holds. Its check sums go first: torch does not look at them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
    return torch.load(path, map_location="cpu", weights_only=True)


def find_checkpoint(place: str | Path) -> Path:
    """Returns the file that `ckpt=` means: a file itself, or `checkpoints/best.pt`, else `last.pt`, of a run folder."""
    place = Path(place)
    if not place.is_dir():
        return place
    best, last = (place / "checkpoints" / name for name in ("best.pt", "last.pt"))
    return best if best.exists() else last


def step_in(data: Mapping[str, Any]) -> tuple[float, str] | None:
    """Returns how far the snapshots of training lay apart, with its unit; None where a checkpoint does not say so."""
    return (float(data["step"]), str(data["time_units"])) if "step" in data else None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns in words how the data of a run differ from those that it began with; empty where they do not.

    Arguments:
        before: What the checkpoint remembers of its data; an older one may know less.
        now: The same of the data as they are: `length`, `units`, `split`, `fingerprint`.
    """
    words = {
        "length": "{1} snapshots, not {0}",
        "units": "units of {1}, not {0}",
        "split": "other blocks of training, validation and test",
        "fingerprint": "other values",
    }
    differing = [key for key, value in before.items() if now.get(key) != value]
    if len(differing) > 1:  # what is shorter or in other units has other values, of course
        differing = [key for key in differing if key != "fingerprint"]
    return "; ".join(words.get(key, f"another {key}").format(before[key], now.get(key)) for key in differing)

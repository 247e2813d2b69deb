"""The data as training sees them: opened, divided, measured, and what of them a network sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import seeded, windows
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Runs, Sequences
from vecfield_diffusion.data.splits import compare_blocks
from vecfield_diffusion.data.statistics import believed, measure, whole
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.physics import NoPhysics
from vecfield_diffusion.physics.grid import Grid


@dataclass(frozen=True)
class TrainingData:
    """The data as training sees them.

    Attributes:
        fields: The fields.
        split: The snapshots of `train`, `validation` and `test`.
        window: The size of the windows that the network sees; None for whole fields.
        normalizer: Physical to normalised units.
        statistics: What the training snapshots say of themselves.
        context: What the network is conditioned on beside the observation.
    """

    fields: Fields
    split: dict[str, range]
    window: tuple[int, int] | None
    normalizer: Normalizer
    statistics: Statistics
    context: Context | None


def open_data(config: Mapping[str, Any], parts: Mapping[str, Any]) -> TrainingData:
    """Returns the data, divided and measured, and prints what they are. Raises UserError."""
    fields, left_out = believed(build(config["dataset"], "dataset", trusted=True))
    if left_out:
        print(f"note: {fields.source}: {left_out}")
    split = parts["splits"].split(fields)
    print(fields.summary())
    if fields.frames > 1:
        print(Runs.of(fields).words)
        print("; ".join(f"{name}: {Sequences.of(fields, split[name]).words}" for name in ("train", "validation")))
    print("snapshots: " + ", ".join(f"{name} {block.start}-{block.stop - 1}" for name, block in split.items()))
    for note in compare_blocks(fields, split):
        print(f"note: {note}")
    window = checked_window(config["window"], fields, parts["physics"])
    cut = cutter(fields.grid, window, config["seed"])
    normalizer, statistics = measure(fields, split["train"], config["mean_field"], cut)
    return TrainingData(fields, split, window, normalizer, statistics, Context.measure(fields, split["train"]))


def checked_window(window: list[int] | None, fields: Fields, physics: NoPhysics) -> tuple[int, int] | None:
    """Returns the window, which must lie within the fields; None for none. Raises UserError."""
    if window is None:
        return None
    height, width = fields.shape
    if not (8 <= window[0] <= height and 8 <= window[1] <= width):
        raise UserError(f"window={list(window)}: expected [height, width] from 8 to the {height}x{width} of the fields")
    if not physics.plain:
        raise UserError("window does not go with physics in training: a window does not know its own spacings")
    return window[0], window[1]


def cutter(grid: Grid, window: tuple[int, int] | None, seed: int) -> Callable[[Tensor], Tensor]:
    """Returns what a network sees of whole fields: a random window of each, or all of it."""
    if window is None:
        return whole
    generator = seeded(seed, 2)
    return lambda fields: windows(grid, window, len(fields), generator)(fields)

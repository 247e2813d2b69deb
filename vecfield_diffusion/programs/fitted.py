"""A network made to fit fields of another size or place than those it was trained on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.windows import Windowed
from vecfield_diffusion.programs.trained import Trained


def fit_size(trained: Trained, fields: Fields, overlap: float = 0.25, batch: int = 64) -> Trained:
    """Returns the same for fields of another size, or larger than the network's: it then works in windows that overlap.

    Raises:
        UserError: A network that knows its own domain alone.
    """
    denoiser, grid = trained.denoiser, trained.grid
    if denoiser.parametrization.fills_domain and not fields.grid.valid.all():
        raise UserError(
            f"{fields.source} has cells outside the domain, but {trained.path} was trained with model=gaussian on "
            "waves that fill all of it. Give a file without land, or train with window=[32,32] or so"
        )
    away = elsewhere(trained, fields)
    if fields.shape != grid.shape or away:
        place = " of another place" if away else ""
        size = f"{fields.shape[0]}x{fields.shape[1]}"
        message = f"{fields.source} has fields{place} of {size}, but {trained.path} was trained"
        if denoiser.normalizer.mean.any():
            raise UserError(
                f"{message} on {grid.shape[0]}x{grid.shape[1]} around the mean field of that domain. Give data of that "
                "size, or train with mean_field=false"
            )
        if trained.config["window"] is None and any(grid.periodic) and fields.shape != grid.shape:
            raise UserError(
                f"{message} on a periodic domain of {grid.shape[0]}x{grid.shape[1]}. Give data of that size, or train "
                "with window=[32,32] or so"
            )
        zero = torch.zeros(2, *fields.shape, device=denoiser.normalizer.mean.device)
        normalizer = Normalizer(zero, trained.statistics.std).to(zero.device)
        denoiser = Denoiser(denoiser.network, denoiser.diffusion, normalizer, denoiser.autocast).eval()
        grid = fields.grid
    height, width = window = window_of(trained, fields)
    batch = max(1, batch * math.prod(trained.window) // math.prod(window))
    if fields.shape != window:
        print(f"in windows of {height}x{width} cells, a share of {overlap:g} of each shared with the next")
    if trained.frames > 1:
        print(f"in windows of {trained.frames} frames, half of each shared with the next")
        overlaps = (trained.frames // 2, int(overlap * height), int(overlap * width))
        denoiser = Windowed(denoiser, (trained.frames, height, width), overlaps, grid.periodic, batch)
    elif fields.shape != window:
        denoiser = Windowed(denoiser, window, overlap, grid.periodic, batch)
    return replace(trained, denoiser=denoiser, grid=grid)


def window_of(trained: Trained, fields: Fields) -> tuple[int, int]:
    """Returns the size of the windows that fields are worked through in: as large as they are and the network takes.

    They then overlap less, or not at all. An axis that closes on itself is never one window: that has two ends.
    """
    largest = trained.denoiser.parametrization.largest or trained.window
    axes = zip(trained.window, fields.shape, largest, fields.grid.periodic, strict=True)
    return tuple(own if closed else max(own, min(full, most)) for own, full, most, closed in axes)


def elsewhere(trained: Trained, fields: Fields) -> bool:
    """Returns whether fields of the size of the training data lie at other coordinates, by a cell or more."""
    known = trained.coordinates
    if known is None or known["x_name"] != "lon" or fields.x_name != "lon" or fields.shape != trained.grid.shape:
        return False
    east = (torch.as_tensor(fields.x.astype(float)) - known["x"] + 180) % 360 - 180
    north = torch.as_tensor(fields.y.astype(float)) - known["y"]
    cells = zip((east, north), (known["x"], known["y"]), strict=True)
    return any(bool((off.abs() > axis.diff().abs().median()).any()) for off, axis in cells)


def check_grid(fields: Fields, trained: Trained) -> None:
    """Raises UserError where the rows of fields are in another order than those of the training data."""
    if fields.grid.dy[0] * trained.grid.dy[0] < 0:
        raise UserError(
            f"the rows of {fields.source} run the other way than those that {trained.path} was trained on. Turn the "
            f"file around along {fields.y_name}"
        )
    here, there = (
        [getattr(grid, name).abs().median().item() for name in ("dx", "dy")] for grid in (fields.grid, trained.grid)
    )
    if not all(0.95 < a / b < 1.05 for a, b in zip(here, there, strict=True)):
        cells, known = (" x ".join(f"{length:.4g}" for length in lengths) for lengths in (here, there))
        print(f"note: cells of {cells} m in {fields.source}, of {known} m in the training data")

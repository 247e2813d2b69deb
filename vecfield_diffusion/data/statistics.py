"""What the training fields say about themselves: scale, mean, leading variance, RMS divergence and vorticity.

The leading eigenvalue of the covariance decides how much noise sampling must start from: an ODE that starts from
N(0, sigma_max^2) keeps of a mode with eigenvalue lambda only a part of its energy unless sigma_max^2 >> lambda, so

    sigma_max = 10 sqrt(lambda_max).

And which values cannot belong to them: fill values that nobody declared (-9999, 1e20), damaged cells. The magnitudes
max(|u|, |v|) of a flow, from eddies to jets, leave no decade empty. Where one is empty, what lies beyond it is left out
if it is the same few numbers again and again, as fill values are, or hardly ever there, or larger than any speed; so is
what is beyond ten times the largest of the rest. Once a network is trained, `limit_of` says what is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.data.fields import Fields, Reader, blocks
from vecfield_diffusion.data.words import components
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, vorticity

#: Snapshots that the eigenvalue is estimated from.
SNAPSHOTS = 1024
BLOCK = 64
#: Cells that are enough for it.
CELLS = 256**2
#: Values beyond this multiple of the largest of all others are not believed.
BEYOND = 10.0
#: Standard deviations of the training data from their mean beyond which a value belongs to no law of the data.
LIMIT = 20.0
#: Magnitudes are counted in bins of an eighth of an octave, the upper 12 bits of a float32 without its sign.
BITS, BINS = 20, 2**11
#: Beyond an empty decade: the share that is hardly ever there, how many numbers are few, and what no speed is.
RARE, REPEATED, NO_SPEED = 1e-4, 4, 1e9


@dataclass(frozen=True)
class Believed:
    """A reader that gives NaN in both components of a cell where one is further than `limit` from `mean (2, H, W)`."""

    reader: Reader
    limit: float
    mean: NDArray[np.float32] | float = 0.0

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The snapshots `indices`, `(n, 2, H, W)`."""
        velocity = self.reader(indices)
        with np.errstate(invalid="ignore"):
            absurd = (np.abs(velocity - self.mean) > self.limit).any(axis=1, keepdims=True)
        return np.where(absurd, np.float32(np.nan), velocity) if absurd.any() else velocity


def believed(fields: Fields) -> tuple[Fields, str]:
    """The fields without values that cannot belong to them, and a sentence that counts and names these, if any.

    Cells where all that is measured is left out are no longer part of the domain.

    Raises:
        UserError: Nothing is left.
    """
    counts = np.zeros(BINS, dtype=np.int64)
    for indices in blocks(len(fields), fields.grid.valid.numel()):
        counts += np.bincount(_bins(fields.read(indices, partial=True)), minlength=BINS)
    first = _first_absurd(fields, counts)
    if first is None:
        highest = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
        return replace(fields, reader=Believed(fields.reader, BEYOND * _edge(highest + 1))), ""
    kept = np.flatnonzero(counts[:first])
    if not kept.size:
        raise UserError(
            f"{fields.source}: no value is below {NO_SPEED:g}: no velocity is so large. If they are fill values that "
            f"the file does not declare, choose other variables: {components()}"
        )
    limit, largest = BEYOND * _edge(int(kept[-1]) + 1), _edge(int(kept[-1]) + 1)
    left_out = replace(fields, reader=Believed(fields.reader, limit))
    cells, times, examples, known = 0, 0, set(), torch.zeros(fields.shape, dtype=torch.bool)
    for indices in blocks(len(fields), fields.grid.valid.numel()):
        velocity = fields.read(indices, partial=True)
        absurd = (velocity.abs() > limit).any(1)
        cells, times = cells + int(absurd.sum()), times + int(absurd.flatten(1).any(1).sum())
        if len(examples) < 3 and absurd.any():
            values = velocity[velocity.abs() > limit].unique()
            examples |= {f"{value:.6g}" for value in values[[0, -1]].tolist()}
        known |= left_out.read(indices).isfinite()[:, 0].any(0)
    outside = int((fields.grid.valid & ~known).sum())
    note = (
        f"{cells} values such as {' and '.join(sorted(examples)[:2])} {fields.units} in {times} of {len(fields)} "
        f"snapshots are left out: all others are below {largest:.3g}. They are fill values that the file does not "
        "declare, or damage"
    )
    note += f"; {outside} cells that have nothing else are taken for land" * bool(outside)
    return replace(left_out, grid=replace(fields.grid, valid=fields.grid.valid & known)), note


def limit_of(statistics: Statistics) -> float:
    """The distance from the mean beyond which no value of a component is believed, by what a network was trained on.

    20 standard deviations; twice the largest value of training where that is further.
    """
    largest = statistics.largest if math.isfinite(statistics.largest) else 0.0
    return max(LIMIT * statistics.std, 2 * largest)


def _bins(velocity: Tensor) -> NDArray[np.int32]:
    """The bins of the magnitudes of the measured cells of `(n, 2, H, W)`; of one component where that is all there is.

    Positive floats are in the order of their bits.
    """
    size = velocity.abs().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max).amax(1)
    return size[size > 0].numpy().view(np.int32) >> BITS


def _edge(number: int) -> float:
    """The lower edge of a bin."""
    return float(np.array(number << BITS, dtype=np.int32).view(np.float32)) if number < 0xFF << 3 else math.inf


def _first_absurd(fields: Fields, counts: NDArray[np.int64]) -> int | None:
    """The lowest bin of what cannot belong to the rest, or None."""
    filled = np.flatnonzero(counts)
    if filled.size and _edge(int(filled[0])) >= NO_SPEED:
        return int(filled[0])
    for below, above in zip(filled, filled[1:], strict=False):
        if _edge(int(above)) < BEYOND * _edge(int(below) + 1):
            continue
        beyond = counts[above:].sum()
        if _edge(int(above)) >= NO_SPEED or beyond <= RARE * counts.sum() or _few(fields, _edge(int(above))):
            return int(above)
    return None


def _few(fields: Fields, least: float) -> bool:
    """Whether the magnitudes from `least` on are the same few numbers."""
    found = torch.zeros(0)
    for indices in blocks(len(fields), fields.grid.valid.numel()):
        size = fields.read(indices, partial=True).abs().nan_to_num(nan=0.0).amax(1)
        found = torch.cat([found, size[size >= least].unique()]).unique()
        if len(found) > REPEATED:
            return False
    return True


def whole(block: Tensor) -> Tensor:
    """All of the fields."""
    return block


def homogeneous(fields: Fields) -> bool:
    """Whether every cell is like every other: doubly periodic and all valid."""
    return all(fields.grid.periodic) and bool(fields.grid.valid.all())


def away_from_land(grid: Grid) -> Tensor:
    """The valid cells that touch no others, boolean `(H, W)`; all valid ones where all touch some."""
    around = torch.nn.functional.max_pool2d((~grid.valid).double()[None], 3, stride=1, padding=1)[0] > 0
    return grid.valid if around.all() else ~around


def measure(
    fields: Fields,
    indices: Sequence[int],
    mean_field: bool | Literal["auto"] = "auto",
    cut: Callable[[Tensor], Tensor] = whole,
) -> tuple[Normalizer, Statistics]:
    """The normalizer and the statistics of the snapshots `indices`.

    Arguments:
        fields: The data.
        indices: The training snapshots.
        mean_field: Whether to subtract the mean over time at each cell; `auto` does unless the domain is homogeneous.
        cut: What a network sees of fields `(n, 2, H, W)`, such as windows: their covariance is the one that counts.

    Raises:
        UserError: The fields do not vary, or no cell is measured.
    """
    subtract = not homogeneous(fields) if mean_field == "auto" else mean_field
    shape = (2, *fields.shape)
    total, square, count = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    div, vort, inner, largest = [], [], [], 0.0
    inside = away_from_land(fields.grid)
    for first in range(0, len(indices), BLOCK):
        velocity = fields.read(indices[first : first + BLOCK]).double()
        measured = velocity.isfinite()
        filled = torch.where(measured, velocity, 0.0)
        total += filled.sum(0)
        square += filled.square().sum(0)
        count += measured.sum(0)
        largest = max(largest, filled.abs().max().item())
        here, there = (f(velocity, fields.grid) for f in (divergence, vorticity))
        div.append(rms_parts(here[..., fields.grid.valid]))
        vort.append(rms_parts(there[..., fields.grid.valid]))
        inner.append(tuple(rms_parts(field[..., inside]) for field in (here, there)))
    mean = total / count.clamp(min=1) if subtract else torch.zeros(shape, dtype=torch.float64)
    variance = (square - 2 * mean * total + count * mean**2).sum() / count.sum().clamp(min=1)
    scale = max(square.sum().item() / max(count.sum().item(), 1), 1e-300)
    if count.sum() == 0 or variance.item() <= 1e-12 * scale:
        raise UserError(
            f"{fields.source}: the {len(indices)} training snapshots do not vary (variance {variance.item():.3g}); "
            "fields that change from snapshot to snapshot are needed"
        )
    normalizer = Normalizer(mean, variance.sqrt().item())
    lambda_max = leading_eigenvalue(fields, indices, normalizer, cut)
    return normalizer, Statistics(
        std=variance.sqrt().item(),
        lambda_max=lambda_max,
        sigma_max=round_up(10 * lambda_max**0.5),
        divergence_rms=rms(div),
        vorticity_rms=rms(vort),
        largest=largest,
        divergent=rms([part for part, _ in inner]) / max(rms([part for _, part in inner]), 1e-300),
    )


def leading_eigenvalue(
    fields: Fields,
    indices: Sequence[int],
    normalizer: Normalizer,
    cut: Callable[[Tensor], Tensor] = whole,
) -> float:
    """The largest eigenvalue of the covariance of the normalised fields.

    It is the largest eigenvalue of the Gram matrix of the snapshots over their number, of at most 1024 of them. Where
    they have gaps, the product of two stands for all their cells by those that both measure. Of fields of more than
    256x256 cells every second row and column, or third and so on, stands for all.
    """
    chosen = torch.as_tensor(list(indices))[:: -(-len(indices) // SNAPSHOTS)]
    rows, known, step, cells = [], [], 1, 1
    for part in chosen.split(BLOCK):
        x = cut(normalizer.normalize(fields.read(part)))
        cells = x.shape[-2] * x.shape[-1]
        step = math.ceil(math.sqrt(cells / CELLS))
        x = x[..., ::step, ::step].flatten(1)
        rows.append(torch.where(x.isfinite(), x, 0.0))
        known.append(x.isfinite().to(x.dtype))
    x, measured = torch.cat(rows), torch.cat(known)
    # Windows lie over land in different places, which is no gap.
    share = (measured @ measured.T).clamp(min=1.0) / measured.any(dim=0).sum() if cut is whole else torch.ones(1)
    scale = 2 * cells / x.shape[1]
    return scale * torch.linalg.eigvalsh((x @ x.T / share / len(x)).double())[-1].item()


def rms_parts(values: Tensor) -> tuple[float, int]:
    """The sum of squares and the number of finite values."""
    finite = values[values.isfinite()]
    return finite.square().sum().item(), finite.numel()


def rms(parts: list[tuple[float, int]]) -> float:
    """The root of the mean square of what `rms_parts` gathered."""
    return (sum(part[0] for part in parts) / max(1, sum(part[1] for part in parts))) ** 0.5


def round_up(value: float) -> float:
    """`value` to two digits, upwards, so that it reads well in a configuration."""
    text = f"{value:.1e}"
    rounded = float(text)
    return rounded if rounded >= value else rounded + 10.0 ** (int(text.split("e")[1]) - 1)

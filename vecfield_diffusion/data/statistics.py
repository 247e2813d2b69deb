"""What the training fields say about themselves: scale, mean, leading variance, RMS divergence and vorticity.

The leading eigenvalue of the covariance decides how much noise sampling must start from: an ODE that starts from
N(0, sigma_max^2) keeps of a mode with eigenvalue lambda only a part of its energy unless sigma_max^2 >> lambda, so

    sigma_max = 10 sqrt(lambda_max).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.operators import divergence, vorticity

#: Snapshots that the eigenvalue is estimated from.
SNAPSHOTS = 1024
BLOCK = 64


def whole(block: Tensor) -> Tensor:
    """All of the fields."""
    return block


def homogeneous(fields: Fields) -> bool:
    """Whether every cell is like every other: doubly periodic and all valid."""
    return all(fields.grid.periodic) and bool(fields.grid.valid.all())


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
    div, vort = [], []
    for first in range(0, len(indices), BLOCK):
        velocity = fields.read(indices[first : first + BLOCK]).double()
        measured = velocity.isfinite()
        filled = torch.where(measured, velocity, 0.0)
        total += filled.sum(0)
        square += filled.square().sum(0)
        count += measured.sum(0)
        div.append(rms_parts(divergence(velocity, fields.grid)[..., fields.grid.valid]))
        vort.append(rms_parts(vorticity(velocity, fields.grid)[..., fields.grid.valid]))
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
    )


def leading_eigenvalue(
    fields: Fields,
    indices: Sequence[int],
    normalizer: Normalizer,
    cut: Callable[[Tensor], Tensor] = whole,
) -> float:
    """The largest eigenvalue of the covariance of the normalised fields.

    It is the largest eigenvalue of the Gram matrix of the snapshots over their number, of at most 1024 of them. Where
    they have gaps, the product of two stands for all their cells by those that both measure.
    """
    chosen = torch.as_tensor(list(indices))[:: -(-len(indices) // SNAPSHOTS)]
    rows, known = [], []
    for part in chosen.split(BLOCK):
        x = cut(normalizer.normalize(fields.read(part)))
        rows.append(torch.where(x.isfinite(), x, 0.0).flatten(1))
        known.append(x.isfinite().to(x.dtype).flatten(1))
    x, seen = torch.cat(rows), torch.cat(known)
    # Windows lie over land in different places, which is no gap.
    share = (seen @ seen.T).clamp(min=1.0) / seen.any(dim=0).sum() if cut is whole else torch.ones(1)
    return torch.linalg.eigvalsh((x @ x.T / share / len(x)).double())[-1].item()


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

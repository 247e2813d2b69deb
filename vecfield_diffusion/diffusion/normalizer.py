"""Physical units to the units of the network and back: `x = (velocity - mean) / std`.

One scalar `std` serves both components; a scale for each would turn a divergence-free field into one that is not. The
mean is a field `(2, H, W)`, or zero where the statistics are the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Divergence over vorticity below which a flow counts as one without divergence.
SOLENOIDAL = 0.2


@dataclass(frozen=True)
class Statistics:
    """What the training fields say about themselves.

    Arguments:
        std: The root of the mean square of the anomalies over valid cells and both components, in the file's units.
        lambda_max: The leading eigenvalue of the covariance of the normalised fields.
        sigma_max: 10 sqrt(lambda_max), the noise level from which samples keep their energy.
        divergence_rms: RMS divergence in s^-1.
        vorticity_rms: RMS vorticity in s^-1.
        largest: The largest component, in the file's units; infinite in checkpoints that do not know it.
        divergent: RMS divergence over RMS vorticity in cells that touch no land, 0 for a flow without divergence, 1 for
            white noise; in checkpoints that do not know it, that of all cells.
    """

    std: float
    lambda_max: float
    sigma_max: float
    divergence_rms: float
    vorticity_rms: float
    largest: float = math.inf
    divergent: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.divergent):
            object.__setattr__(self, "divergent", self.divergence_rms / max(self.vorticity_rms, 1e-300))

    @property
    def solenoidal(self) -> bool:
        """Whether the flow is so nearly without divergence that a constraint to none is no mistake."""
        return self.divergent < SOLENOIDAL

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, as a checkpoint stores them."""
        return asdict(self)


class Normalizer(nn.Module):
    """The map between velocities `(B, 2, H, W)` in physical units and normalised fields.

    Arguments:
        mean: The mean field, `(2, H, W)`; 0 on cells outside the domain.
        std: The scalar standard deviation of the anomalies.

    Raises:
        ValueError: A std that is not positive and finite.
    """

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__()
        if not (std > 0 and torch.isfinite(torch.tensor(std))):
            raise ValueError(f"std must be positive and finite, got {std}: do the fields vary at all?")
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def normalize(self, velocity: Tensor) -> Tensor:
        """Physical to normalised; NaN stays NaN."""
        return (velocity - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        """Normalised to physical."""
        return x * self.std + self.mean

"""Coarse to fine: a network of the averaged field conditions a network of the field.

With P the average over squares of cells and U the copy of an average to the cells that it is of, the raw output is

    F(x; noise) = fine([x, U F_c(P x; noise)]; noise),

x all that a network sees: the scaled noisy field and what is known. Averaging is linear, so that the average of what F
is to predict is what F_c is to predict, whatever the formulation and the prediction: training adds the squared error

    weight mean (U P (D_c - x0))^2,    D_c = skip + out U F_c,

which is least where P D_c = E[P x0 | P z, y], the denoiser of the averaged field, at the level s / n of averages over n
by n cells. Its gradient goes to F_c, that of the denoising loss to both. One training, one checkpoint, and one
evaluation of both networks at each step of a sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vecfield_diffusion.axes import by_frame
from vecfield_diffusion.models.base import Parametrization
from vecfield_diffusion.models.energy import pool
from vecfield_diffusion.models.unet import Time, UNet

FIELD = 2  # channels of the noisy field; what is known follows
#: The most cells along each axis of a square.
MOST = 64


class Cascade(nn.Module, Parametrization):
    """Two UNets, `coarse` of the averaged field and `fine` of the field; see the module.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: 2, and those of a learned variance.
        periodic: Whether y and x close on themselves.
        cells: n, the cells along each axis of a square; those at the end of the field may be smaller.
        coarse: Channels of the coarse network at each resolution, each half the one before.
        channels: Those of the fine one.
        blocks: See `UNet`; each of both networks.
        attention: Which resolutions of the coarse network attend, by their index in `coarse`.
        embedding: See `UNet`.
        dropout: See `UNet`.
        frames: See `UNet`.
        time: See `UNet`.

    Raises:
        ValueError: Sizes that make no network, see `UNet`, or squares of fewer than two cells along an axis.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        cells: int = 4,
        coarse: list[int] = (64, 128),
        channels: list[int] = (32, 64),
        blocks: int = 2,
        attention: list[int] = (-1,),
        embedding: int = 256,
        dropout: float = 0.0,
        frames: int = 1,
        time: Time = "channels",
    ) -> None:
        super().__init__()
        if not 2 <= cells <= MOST:
            raise ValueError(f"cells must be in [2, {MOST}], got {cells}")
        self.coarse = UNet(in_channels, FIELD, periodic, coarse, blocks, attention, embedding, 1, dropout, frames, time)
        beside = in_channels + FIELD
        self.fine = UNet(beside, out_channels, periodic, channels, blocks, (), embedding, 1, dropout, frames, time)
        self.coarse_cells = cells

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns the output of `fine`, and after it U F_c, `(B, 2, H, W)`."""
        cells, (height, width) = self.coarse_cells, x.shape[-2:]
        coarse = self.coarse(pool(x, cells), noise)
        copied = spread(coarse, cells)[..., :height, :width]
        return torch.cat([self.fine(torch.cat([x, copied], dim=-3), noise), copied], dim=-3)


def spread(fields: Tensor, cells: int) -> Tensor:
    """Returns fields `(..., C, H, W)` with every value copied to a square of cells."""
    return by_frame(lambda field: F.interpolate(field, scale_factor=cells, mode="nearest"), fields)


def averaged(fields: Tensor, cells: int) -> Tensor:
    """Returns U P of fields `(..., C, H, W)`: each value the average over its square."""
    height, width = fields.shape[-2:]
    return spread(pool(fields, cells), cells)[..., :height, :width]

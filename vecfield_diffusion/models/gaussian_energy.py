"""The energy of a Gaussian field, in closed form, and of a network for what it misses.

Where x0 is Gaussian with the covariance S of the training fields, z = x0 + s eps has with d values the energy

    U_G(z, s) = |W z|^2 / 2 + ln det(S + s^2) / 2 + d / 2 ln(2 pi),    W = (S + s^2)^(-1/2),

a normalised one at every level: dU_G / ds is right without being learned. A network F adds to it

    U(z, s) = U_G - c phi + d (a(ln s) - a(ln s_max)),      phi = <W z + c z, F(c z, known; noise)>,

with c = (1 + s^2)^(-1/2); its gradient is that of the denoiser D = z - s^2 grad U = z - s^2 W^2 z + s^2 c grad phi, as
in `energy.py`. What F adds to a mode of variance l is s^2 c ((l + s^2)^(-1/2) + c) times its output, at low noise of
the order of s^2: what can be known there of eps is of the order of s. A denoiser D = z - s F has to learn that its F is
next to nothing, from targets that are nearly all noise, and what it takes for more is the error of its energy.

The Gaussian field is that without observations; what these say is left to the network, or to mmps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Unpack

import torch
from torch import Tensor

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.models.base import Conditions, Preconditioned, Scalars
from vecfield_diffusion.models.energy import FIELD, UNetEnergy, channels, inner
from vecfield_diffusion.models.gaussian import AroundField
from vecfield_diffusion.models.twice import twice_differentiable
from vecfield_diffusion.models.unet import Sizes

#: Where the cells of the domain stand among the channels of what is known; see `Observation.channels`.
VALID = 3


class GaussianEnergy(AroundField, UNetEnergy):
    """A Gaussian energy, and that of a UNet beside it; see the module.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: 2, and those of a learned variance.
        periodic: Whether y and x close on themselves.
        dropout: See `UNet`.
        frames: 1; the Gaussian field of a sequence has no energy in closed form here.
        sizes: See `UNet`.

    Raises:
        ValueError: Sizes that make no network, see `UNet`, or frames above 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        dropout: float = 0.0,
        frames: int = 1,
        **sizes: Unpack[Sizes],
    ) -> None:
        if frames != 1:
            raise ValueError(f"frames must be 1, snapshots, for the energy of a Gaussian field, got {frames}")
        super().__init__(in_channels, out_channels, periodic, dropout=dropout, **sizes)
        self.field = None

    def precondition(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars]
    ) -> Preconditioned:
        """See `Parametrization`; of the formulation c_noise alone enters. The network is told of s and of c_noise."""
        square, c = s.square(), (1 + s.square()).rsqrt()
        white = self.field.whiten(self.field.whiten(z, s, known.valid), s, known.valid)
        seen = torch.cat([column(c, z) * z, known.channels], dim=-3)
        levels = torch.stack([scalars(s).c_noise, s], dim=1)
        return Preconditioned(z - column(square, z) * white, square * c.square(), seen, levels)

    def potential(self, field: Tensor, known: Tensor, noise: Tensor, again: bool = True) -> tuple[Tensor, Tensor]:
        """See `Energy`; `field` is c z, and `noise` holds c_noise and s, `(B, 2)`."""
        told, s = noise.unbind(1)
        with twice_differentiable() if again else nullcontext():
            output = self.networks[0](channels(field, known), told)
        valid = known.narrow(-3, VALID, 1) > 0.5
        white = self.field.whiten(column((1 + s.square()).sqrt(), field) * field, s, valid)
        phi = inner(white + field, output.narrow(-3, 0, FIELD).to(field.dtype))
        return phi, output.narrow(-3, FIELD, output.shape[-3] - FIELD)

    def energy(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars], top: Tensor
    ) -> Tensor:
        """See `Parametrization`."""
        c, levels = (1 + s.square()).rsqrt(), torch.stack([scalars(s).c_noise, s], dim=1)
        phi, _ = self.potential(column(c, z) * z, known.channels, levels, torch.is_grad_enabled())
        white = self.field.whiten(z, s, known.valid)
        values = FIELD * total(known.valid.expand(*z.shape[:-3], 1, *z.shape[-2:])).double()
        gaussian = (inner(white, white) + self.field.log_determinant(s, known.valid)) / 2
        return gaussian - c.double() * phi + values * (math.log(2 * math.pi) / 2 + self.normaliser(s, top))

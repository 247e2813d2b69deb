"""A regression for the mean of the field and a network for what it misses (CorrDiff: Mardani et al., 2025).

One network gives mu(y), the mean of the field given what is known of it; it sees no noise. The other denoises the
residual r = x0 - mu, conditioned on mu as well. With w the standard deviation of the residual, r / w is data of unit
variance at the noise level s / w, and the denoiser of the field is

    D(z, s, y) = mu + w D_r((z - mu) / w, s / w, [y, mu])

for any formulation (doi:10.1038/s43247-025-02042-5, whose two networks are trained one after the other). mu is constant
in z, so this is exactly E[x0 | z, y] where D_r is exact, whatever mu is. With the preconditioning of D_r written out,

    D = mu + c_skip alpha (z - mu) + w c_out F,    all of the formulation's scalars at the level s / w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from vecfield_diffusion.models.base import Conditions, Parametrization, Preconditioned, Scalars
from vecfield_diffusion.models.unet import Sizes, Time, UNet

FIELD = 2  # channels of the noisy field; what is known follows
#: The share of the last batch in the running variance: a memory of about 100 batches.
RATE = 0.01
#: The smallest variance, in that of the data: observations may leave nothing to be found.
FLOOR = 1e-4


class AroundMean(Parametrization, ABC):
    """The parametrization around the mean of the field; see the top of this module. `scale` is w."""

    predicts_mean = True
    needs_noise = "model=residual holds a regression already: take another diffusion, or another model"

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """The standard deviation of the residual, w."""

    def precondition(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars]
    ) -> Preconditioned:
        """See `Parametrization`; the mean counts as a constant."""
        mean, scale = known.mean.detach(), self.scale
        beside = known._replace(channels=torch.cat([known.channels, mean], dim=-3))
        residual = torch.where(known.valid, (z - mean) / scale, 0.0)
        skip, out, channels, noise = super().precondition(residual, s / scale, beside, scalars)
        return Preconditioned(mean + scale * skip, scale * out, channels, noise)

    def weight(self, s: Tensor, out: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the formulation's weight at s / w in units of w, the squared error of F: 1 / (w c_out(s / w))^2."""
        scale = self.scale.to(s.dtype)
        return plain(s / scale) / scale.square()


class Residual(nn.Module, AroundMean):
    """Two UNets of one size: `mean`, of what is known alone, and `forward`, of the noisy residual.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: Channels of the output of `forward`.
        periodic: Whether y and x close on themselves.
        dropout: See `UNet`.
        frames: See `UNet`.
        time: See `UNet`.
        sizes: See `UNet`.

    Attributes:
        variance: The mean square of the residual, a running mean over training; it is kept with the weights.

    Raises:
        ValueError: Sizes that make no network; see `UNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        dropout: float = 0.0,
        frames: int = 1,
        time: Time = "channels",
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__()
        sizes |= dict(dropout=dropout, frames=frames, time=time)
        self.regression = UNet(in_channels - FIELD, FIELD, periodic, **sizes)
        self.network = UNet(in_channels + FIELD, out_channels, periodic, **sizes)
        self.register_buffer("variance", torch.ones(()))

    def mean(self, channels: Tensor) -> Tensor:
        """Returns mu, `(B, 2, H, W)`, of what is known, `(B, C - 2, H, W)`."""
        return self.regression(channels, channels.new_zeros(channels.shape[0]))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Maps `(B, C + 2, H, W)`, the noisy residual, what is known and mu, and the level `(B,)` to the raw output."""
        return self.network(x, noise)

    @property
    def scale(self) -> Tensor:
        """The standard deviation of the residual, w."""
        return self.variance.clamp(min=FLOOR).sqrt()

    @property
    def tracked(self) -> Sequence[Tensor]:
        """The running variance."""
        return (self.variance,)

    @torch.no_grad()
    def track(self, square: Tensor) -> None:
        """Takes in the mean square of the residuals of a batch."""
        self.variance.lerp_(square.to(self.variance.dtype), RATE)

"""A network for what a Gaussian field misses.

The mean of x0 given a noisy field z = x0 + s eps and observations y has a closed form where x0 is Gaussian. With the
covariance of the training fields it is optimal interpolation that has z as further data, g(z, s, y): at high noise the
usual one, at low noise a Wiener filter. Let c(s, y) be the standard deviation of its error. The denoiser is

    D(z, s, y) = g + c F((z - g) / s, y, g, (y - g) / c; s)

for any formulation, with F times the factor of `models/gate.py` after training. With F = 0 it samples the Gaussian
posterior; what is learned is what sets the fields apart from Gaussian ones. The scalars c_skip and c_out of Karras et
al. (NeurIPS 2022, table 1) are the case of white fields and no observations; Wang & Vastola (TMLR 2024) measured that
learned denoisers are nearly Gaussian over most noise levels.

A network of few steps (`diffusion/few_steps.py`) gives the end of a path, one field, and not the mean of all. In the
place of g it has the end of the path of the Gaussian field: with F = 0 it draws from the Gaussian posterior in one
evaluation, and what it learns is to make that draw one of the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from vecfield_diffusion.models.base import Conditions, Parametrization, Preconditioned, Scalars, column
from vecfield_diffusion.models.eigenfields import Eigenfields
from vecfield_diffusion.models.gate import Gate
from vecfield_diffusion.models.modes import Kept, MeanVariance, Modes
from vecfield_diffusion.models.product_modes import ProductModes
from vecfield_diffusion.models.reference import GaussianReference
from vecfield_diffusion.models.unet import Sizes, Time, UNet
from vecfield_diffusion.models.waves import Waves

FIELD = 2  # channels of the noisy field; what is known follows
#: The least c, in standard deviations of the data: observations may leave nothing to be found.
FLOOR = 1e-3


class AroundField(Parametrization):
    """What networks around a Gaussian field have in common: the field, which is learned once and kept with the weights.

    Attributes:
        field: The Gaussian field; None until `learn`, or until it is loaded.
    """

    field: Modes | None
    #: The kinds of fields by a name among their weights.
    kinds: Mapping[str, type[Modes]] = {
        "field.power": Waves,
        "field.nugget": Eigenfields,
        "field.lags": ProductModes,
    }

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        found = [kind for name, kind in self.kinds.items() if prefix + name in state]
        if found and not isinstance(self.field, found[0]):
            self.field = found[0]().to(next(self.parameters()).device)
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def fills_domain(self) -> bool:
        """Whether the field is one of waves, which have no gaps."""
        return self.field is not None and self.field.fills_domain

    def learn(self, field: Callable[[], Modes]) -> None:
        """Takes the Gaussian field `field()`, which training leaves as it is."""
        self.field = field().to(next(self.parameters()).device)

    def prepare(self, known: Conditions) -> None:
        """See `Parametrization`."""
        if self.field is not None:
            self.field.prepare(known.y, known.observed, known.error, known.valid)

    def reference(self, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> GaussianReference | None:
        """Returns the Gaussian field given the observation, where it draws; see `Parametrization`."""
        if self.field is None or not self.field.draws:
            return None
        return GaussianReference(self.field, y, observed, error, valid)


class GaussianResidual(AroundField, nn.Module):
    """The posterior of a Gaussian field, and a UNet for what it misses.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: Channels of the output of `forward`.
        periodic: Whether y and x close on themselves.
        dropout: See `UNet`; `auto` is 0 here, and for training what its fields ask for (`programs/small.py`).
        frames: See `UNet`.
        time: See `UNet`.
        sizes: See `UNet`.

    Attributes:
        gating: The factor on the output of the network by noise level, that validation asks for.

    Raises:
        ValueError: Sizes that make no network; see `UNet`.
    """

    traceable = False  # it solves a system of its own for each observation
    needs_noise = "model=gaussian builds on noisy fields, which diffusion=regression has none of"

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        dropout: float | Literal["auto"] = "auto",
        frames: int = 1,
        time: Time = "channels",
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__()
        sizes |= dict(dropout=0.0 if dropout == "auto" else dropout, frames=frames, time=time)
        self.network = UNet(in_channels + 2 * FIELD, out_channels, periodic, **sizes)
        self.field = None
        self.gating = Gate()

    @property
    def gate(self) -> Gate:
        """The factor on the output of the network by noise level; see `models/gate.py`."""
        return self.gating

    @property
    def largest(self) -> tuple[int, int] | None:
        """Those of the Gaussian field: the UNet takes fields of any size."""
        return None if self.field is None else self.field.largest

    @property
    def keeps(self) -> Kept | None:
        """See `Parametrization`."""
        return None if self.field is None else self.field.keeps

    def precondition(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars]
    ) -> Preconditioned:
        """See `Parametrization`; of the formulation c_noise alone enters."""
        given = (known.y, known.observed, known.error, known.valid)
        mean, c = self.posterior(z, s, *given)
        if known.ends:
            mean = self.field.flow(z, s, *given)
        innovation = torch.where(known.observed, (known.y - mean) / column(c, z), 0.0)
        noise = torch.where(known.valid, (z - mean) / column(s, z), 0.0)
        channels = torch.cat([noise, known.channels, mean, innovation], dim=-3)
        return Preconditioned(mean, c, channels, scalars(s).c_noise)

    def weight(self, s: Tensor, out: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns 1 / c^2, the squared error of F."""
        return out**-2

    def posterior(
        self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor
    ) -> MeanVariance:
        """Returns g, `(B, 2, H, W)`, and c, `(B,)`; arguments as for `Modes`.

        Raises:
            ValueError: No field was learnt.
        """
        if self.field is None:
            raise ValueError("field must be learnt first, or loaded")
        mean, variance = self.field(z, s, y, observed, error, valid)
        return mean, variance.clamp(min=FLOOR**2).sqrt()

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Maps (z - g) / s, what is known, g, (y - g) / c, `(B, C + 4, H, W)`, at levels `(B,)` to the raw output."""
        return self.network(x, noise)

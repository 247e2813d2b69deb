"""The denoiser: the posterior mean of the clean field.

`D(z, s, observation) = E[x0 | z, y]` with `z = x0 + s eps`, everything normalised. Samplers and guidance need no more
than a callable of these three arguments; whatever wraps a denoiser is one itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation

#: `(z (B, 2, H, W), s (B,), observation) -> x_hat (B, 2, H, W)`
DenoiserFunction = Callable[[Tensor, Tensor, Observation], Tensor]


class Denoiser(nn.Module):
    """A network with the preconditioning of its formulation.

    Arguments:
        network: `(x (B, 2 + C, H, W), c_noise (B,)) -> (B, 2, H, W)`; C channels of the observation follow the field.
            With a learned variance 2 more channels come out.
        diffusion: The formulation that it was trained with.
        normalizer: The way back to physical units.
        autocast: The type that the network computes in, such as torch.bfloat16; None leaves it alone. All around it
            stays in the type of the field.
    """

    def __init__(
        self, network: nn.Module, diffusion: Diffusion, normalizer: Normalizer, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network, self.diffusion, self.normalizer, self.autocast = network, diffusion, normalizer, autocast

    def in_float32(self) -> Denoiser:
        """The same denoiser without autocast, for derivatives: they are small differences of large numbers."""
        return Denoiser(self.network, self.diffusion, self.normalizer).train(self.training)

    def forward(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """The posterior mean `(B, 2, H, W)` of fields `z` at noise levels `s` `(B,)`, given the observation.

        Cells outside the domain are 0 in what the network sees and in what comes out, whatever `z` holds there.
        """
        return self.moments(z, s, observation)[0]

    def moments(self, z: Tensor, s: Tensor, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """The posterior mean and, where it is learned, where the reverse variance lies between its bounds.

        The second, `(B, 2, H, W)`, is 0 at the small bound and 1 at the large one; see `reverse_variances`.
        """
        z = torch.where(observation.valid, z, 0.0)
        # A few numbers a sample, in float64: near the end of a path alpha is a small difference.
        t = self.diffusion.time(s.double())
        coefficients = (*self.diffusion.preconditioning(t), self.diffusion.alpha(t))
        c_in, c_noise, c_out, c_skip, alpha = (each.to(z.dtype) for each in coefficients)
        # c_in scales the noisy state alone: at high noise it would drown the observations.
        channels = torch.cat([column(c_in * alpha) * z, observation.channels()], dim=1)
        with torch.autocast(z.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.network(channels.contiguous(memory_format=torch.channels_last), c_noise)
        output = output.to(z.dtype)
        x_hat = torch.where(observation.valid, column(c_skip * alpha) * z + column(c_out) * output[:, :2], 0.0)
        return x_hat, torch.sigmoid(output[:, 2:4]) if self.diffusion.learned_variance else None


def column(values: Tensor) -> Tensor:
    """`(B,)` to `(B, 1, 1, 1)`."""
    return values[:, None, None, None]

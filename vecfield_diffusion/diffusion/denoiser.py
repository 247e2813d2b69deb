"""The denoiser: the posterior mean of the clean field.

`D(z, s, observation) = E[x0 | z, y]` with `z = x0 + s eps`, everything normalised. Samplers and guidance need no more
than a callable of these three arguments; whatever wraps a denoiser is one itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.formulations import Regression
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError

#: `(z (B, 2, H, W), s (B,), observation) -> x_hat (B, 2, H, W)`
DenoiserFunction = Callable[[Tensor, Tensor, Observation], Tensor]


class Estimate(NamedTuple):
    """What a denoiser says of the clean field.

    `mean` `(B, 2, H, W)`; `fraction` `(B, 2, H, W)`, where it is learned, tells where the reverse variance lies between
    its bounds: 0 is the small one and 1 the large one, see `reverse_variances`; `scale` `(B,)` is what the output of
    the network was multiplied with, where that is not the c_out of the formulation.
    """

    mean: Tensor
    fraction: Tensor | None = None
    scale: Tensor | None = None


class Denoiser(nn.Module):
    """A network with the preconditioning of its formulation.

    Arguments:
        network: `(x (B, 2 + C, H, W), c_noise (B,)) -> (B, 2, H, W)`; C channels of the observation follow the field.
            With a learned variance 2 more channels come out.
        diffusion: The formulation that it was trained with.
        normalizer: The way back to physical units.
        autocast: The type that the network computes in, such as torch.bfloat16; None leaves it alone. All around it
            stays in the type of the field.

    Raises:
        UserError: A network that predicts the mean beside a formulation that is nothing else, or one that starts from a
            noisy field beside a formulation that has none.
    """

    def __init__(
        self, network: nn.Module, diffusion: Diffusion, normalizer: Normalizer, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if isinstance(diffusion, Regression) and hasattr(network, "posterior"):
            raise UserError("model=gaussian builds on noisy fields, which diffusion=regression has none of")
        if isinstance(diffusion, Regression) and hasattr(network, "mean"):
            raise UserError("model=residual holds a regression already: take another diffusion, or another model")
        self.network, self.diffusion, self.normalizer, self.autocast = network, diffusion, normalizer, autocast
        self._means: tuple[tuple[Observation, Tensor], ...] = ()

    def in_float32(self) -> Denoiser:
        """The same denoiser without autocast, for derivatives: they are small differences of large numbers.

        Raises:
            UserError: A regression, which has no derivatives.
        """
        if isinstance(self.diffusion, Regression):
            raise UserError(
                "diffusion=regression gives the mean alone, which no noisy field can change: mmps, pigdm, dps and "
                "likelihood need a diffusion model. Use inpainting=conditional"
            )
        return Denoiser(self.network, self.diffusion, self.normalizer).train(self.training)

    def forward(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """The posterior mean `(B, 2, H, W)` of fields `z` at noise levels `s` `(B,)`, given the observation.

        Cells outside the domain are 0 in what the network sees and in what comes out, whatever `z` holds there.
        """
        return self.moments(z, s, observation)[0]

    def mean(self, observation: Observation) -> Tensor | None:
        """mu(y), `(B, 2, H, W)`, where the network predicts it (`models/residual.py`), 0 outside; None elsewhere.

        The last two are remembered: a sampler asks for that of one observation, or of one and of nothing, at each step.
        """
        if not hasattr(self.network, "mean"):
            return None
        for known, mean in self._means:
            if known is observation and not self.training:
                return mean
        mean = torch.where(observation.valid, self._run(self.network.mean, observation.channels()), 0.0)
        if not (self.training or mean.requires_grad):
            self._means = ((observation, mean), *self._means[:1])
        return mean

    def moments(self, z: Tensor, s: Tensor, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """The posterior mean and, where it is learned, the fraction of the reverse variance; see `Estimate`."""
        return self.estimate(z, s, observation)[:2]

    def estimate(self, z: Tensor, s: Tensor, observation: Observation, mean: Tensor | None = None) -> Estimate:
        """What the network says of fields `z` at noise levels `s` `(B,)`, given the observation.

        `mean` is what the method `mean` gives, where that is known already; it counts as a constant.
        """
        if hasattr(self.network, "posterior"):
            return self._beyond_gaussian(z, s, observation)
        told, valid = observation.channels(), observation.valid
        mean = self.mean(observation) if mean is None else mean
        if mean is None:
            return self._estimate(z, s, told, valid)
        mean, scale = mean.detach(), self.network.scale
        told = torch.cat([told, mean], dim=1)
        residual, fraction, _ = self._estimate((z - mean) / scale, s / scale, told, valid)
        return Estimate(mean + scale * residual, fraction)

    def _beyond_gaussian(self, z: Tensor, s: Tensor, observation: Observation) -> Estimate:
        """The moments where the network is for what a Gaussian field misses (`models/gaussian.py`)."""
        valid, observed = observation.valid, observation.observed
        z, y = torch.where(valid, z, 0.0), torch.where(observed, observation.y, 0.0)
        given = (y, observed, torch.where(observed, observation.error, 0.0), valid)
        mean, scale = self.network.posterior(z, s, *given)
        innovation = torch.where(observed, (y - mean) / column(scale), 0.0)
        level = self.diffusion.inputs(self.diffusion.time(s.double()))[1].to(z.dtype)
        told = [torch.where(valid, (z - mean) / column(s), 0.0), observation.channels(), mean, innovation]
        output = self._run(self.network, torch.cat(told, dim=1), level)
        x_hat = torch.where(valid, mean + column(scale) * output[:, :2], 0.0)
        return Estimate(x_hat, torch.sigmoid(output[:, 2:4]) if self.diffusion.learned_variance else None, scale)

    def _estimate(self, z: Tensor, s: Tensor, told: Tensor, valid: Tensor) -> Estimate:
        """The moments of data of unit variance, given channels `told`."""
        z = torch.where(valid, z, 0.0)
        # A few numbers a sample, in float64: near the end of a path alpha is a small difference.
        t = self.diffusion.time(s.double())
        coefficients = (*self.diffusion.preconditioning(t), self.diffusion.alpha(t))
        c_in, c_noise, c_out, c_skip, alpha = (each.to(z.dtype) for each in coefficients)
        # c_in scales the noisy state alone: at high noise it would drown the observations.
        output = self._run(self.network, torch.cat([column(c_in * alpha) * z, told], dim=1), c_noise)
        x_hat = torch.where(valid, column(c_skip * alpha) * z + column(c_out) * output[:, :2], 0.0)
        return Estimate(x_hat, torch.sigmoid(output[:, 2:4]) if self.diffusion.learned_variance else None)

    def _run(self, network: Callable[..., Tensor], channels: Tensor, *level: Tensor) -> Tensor:
        """A network in its own precision, its result in that of `channels`."""
        with torch.autocast(channels.device.type, self.autocast, enabled=self.autocast is not None):
            output = network(channels.contiguous(memory_format=torch.channels_last), *level)
        return output.to(channels.dtype)


class Mean(nn.Module):
    """The regression within a network that has one, as a network of `Regression`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.network.mean(x[:, 2:])


def mean_only(denoiser: Denoiser) -> Denoiser:
    """The regression of a denoiser with `model=residual`, by itself: D = mu(y), as a baseline.

    Raises:
        ValueError: A network without one.
    """
    if not hasattr(denoiser.network, "mean"):
        raise ValueError(f"denoiser must have a network that predicts the mean, got {type(denoiser.network).__name__}")
    regression = Regression()
    # The network is told what it was trained with, a first guess among it.
    regression.prepare, regression.coupled = denoiser.diffusion.prepare, denoiser.diffusion.coupled
    return Denoiser(Mean(denoiser.network), regression, denoiser.normalizer, denoiser.autocast).train(denoiser.training)


def column(values: Tensor) -> Tensor:
    """`(B,)` to `(B, 1, 1, 1)`."""
    return values[:, None, None, None]

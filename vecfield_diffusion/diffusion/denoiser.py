"""The denoiser: the posterior mean of the clean field.

`D(z, s, observation) = E[x0 | z, y]` with `z = x0 + s eps`, everything normalised. Samplers and guidance need no more
than a callable of these three arguments; whatever wraps a denoiser is one itself. Fields are snapshots `(B, 2, H, W)`
or sequences `(B, T, 2, H, W)`, with one noise level for all frames of a sample. How the output of the network becomes
D is its parametrization, see `models/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.formulations import Regression
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.base import BY_SCALARS, Conditions, Parametrization, Scalars, column
from vecfield_diffusion.models.reference import GaussianReference

#: `(z (B, 2, H, W), s (B,), observation) -> x_hat (B, 2, H, W)`
DenoiserFunction = Callable[[Tensor, Tensor, Observation], Tensor]


class Moments(NamedTuple):
    """What a denoiser predicts of the clean field, beside its mean.

    `mean` `(B, 2, H, W)`; `fraction` `(B, 2, H, W)`, where it is learned, is where the reverse variance lies between
    its bounds: 0 is the small one and 1 the large one, see `reverse_variances`; `out` `(B,)` is what the output of the
    network was multiplied with, the factor of a gate apart; `skip` `(B, 2, H, W)` is the mean without the network;
    `coarse` `(B, 2, H, W)`, where the network has one, is a field whose averages over squares estimate those of x0.
    """

    mean: Tensor
    fraction: Tensor | None
    out: Tensor
    skip: Tensor
    coarse: Tensor | None = None


class Denoiser(nn.Module):
    """A network with the preconditioning of its formulation.

    Arguments:
        network: `(x (B, 2 + C, H, W), c_noise (B,)) -> (B, 2, H, W)`; C channels of the observation follow the field.
            With a learned variance 2 more channels come out. A network that is a `Parametrization` decides itself what
            it sees and how its output counts.
        diffusion: The formulation that it was trained with.
        normalizer: The way back to physical units.
        autocast: The type that the network computes in, such as torch.bfloat16; None leaves it alone. All around it
            stays in the type of the field.

    Raises:
        UserError: A network that needs noisy fields beside a formulation that has none.
    """

    def __init__(
        self, network: nn.Module, diffusion: Diffusion, normalizer: Normalizer, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network, self.diffusion, self.normalizer, self.autocast = network, diffusion, normalizer, autocast
        if not diffusion.noisy and self.parametrization.needs_noise:
            raise UserError(self.parametrization.needs_noise)
        self._means: tuple[tuple[Observation, Tensor], ...] = ()

    @property
    def parametrization(self) -> Parametrization:
        """How D is made of the output of the network: the network's own way, or by scalars."""
        return self.network if isinstance(self.network, Parametrization) else BY_SCALARS

    def in_float32(self) -> Denoiser:
        """Returns the same denoiser without autocast, for derivatives: they are small differences of large numbers.

        Raises:
            UserError: A regression, which has no derivatives, or a network of few steps, whose output is no mean.
        """
        if not self.diffusion.gives_mean:
            raise UserError(
                "a network of few steps (diffusion=consistency or crps) gives one field and not the mean E[x0 | x_t] "
                "of all, which mmps, pigdm, dps and likelihood build on. Use inpainting=conditional, or another network"
            )
        if not self.diffusion.noisy:
            raise UserError(
                "diffusion=regression gives the mean alone, which no noisy field can change: mmps, pigdm, dps and "
                "likelihood need a diffusion model. Use inpainting=conditional"
            )
        return Denoiser(self.network, self.diffusion, self.normalizer).train(self.training)

    def forward(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """Returns the posterior mean `(B, 2, H, W)` of fields `z` at noise levels `s` `(B,)`, given the observation.

        Cells outside the domain are 0 in what the network sees and in what comes out, whatever `z` holds there.
        """
        return self.estimate(z, s, observation).mean

    def mean(self, observation: Observation) -> Tensor | None:
        """Returns mu(y), `(B, 2, H, W)`, where the network predicts it (`models/residual.py`), 0 outside.

        None elsewhere.

        The last two are remembered: a sampler asks for that of one observation, or of one and of nothing, at each step.
        """
        if not self.parametrization.predicts_mean:
            return None
        for known, mean in self._means:
            if known is observation and not self.training:
                return mean
        mean = torch.where(observation.valid, self._run(self.parametrization.mean, observation.channels()), 0.0)
        if not (self.training or mean.requires_grad):
            self._means = ((observation, mean), *self._means[:1])
        return mean

    def reference(self, observation: Observation) -> GaussianReference | None:
        """Returns a Gaussian law that resembles that of the fields given the observation; None where none is known."""
        observed = observation.observed
        y, error = (torch.where(observed, value, 0.0) for value in (observation.y, observation.sigma_y))
        return self.parametrization.reference(y, observed, error, observation.valid)

    def prepare(self, observation: Observation) -> None:
        """Takes in observations that training will come back to, together: see `training/reuse.py`."""
        self.parametrization.prepare(self._known(observation))

    def moments(self, z: Tensor, s: Tensor, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Returns the posterior mean and, where it is learned, the fraction of the reverse variance; see `Moments`."""
        return self.estimate(z, s, observation)[:2]

    def estimate(self, z: Tensor, s: Tensor, observation: Observation, mean: Tensor | None = None) -> Moments:
        """Returns what the network predicts for fields `z` at noise levels `s` `(B,)`, given the observation.

        `mean` is what the method `mean` returns, where that is known already; it counts as a constant.
        """
        valid, known = observation.valid, self._known(observation, mean)
        z = torch.where(valid, z, 0.0)
        skip, out, channels, noise = self.parametrization.precondition(
            z, s, known, partial(self._scalars, dtype=z.dtype)
        )
        output = self._run(self.network, channels, noise)
        gate = self.parametrization.gate
        scale = out if gate is None else out * gate(s)
        x_hat = torch.where(valid, skip + column(scale, z) * output.narrow(-3, 0, 2), 0.0)
        fraction = torch.sigmoid(output.narrow(-3, 2, 2)) if self.diffusion.learned_variance else None
        coarse = skip + column(out, z) * output[..., -2:, :, :] if self.parametrization.coarse_cells else None
        return Moments(x_hat, fraction, out, skip, coarse)

    @property
    def has_energy(self) -> bool:
        """Whether the score is minus the gradient of an energy, see `energy`."""
        return self.parametrization.has_energy

    def energy(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """Returns U(z, s) in nats, `(B,)` in float64, with -grad U = (D - z) / s^2, the score.

        It is computed without autocast, on the cells of the domain. After training by `loss.dual` it is -ln p of the
        noisy field, see `diffusion/dual.py`; without, it has a free constant for each level and observation.

        Raises:
            UserError: The network is not the gradient of an energy.
        """
        if not self.has_energy:
            raise UserError(
                "this network has no energy: its score is no gradient. Train one with model=energy, "
                "model=energy_multiscale or model=energy_dit"
            )
        known = self._known(observation)
        z = torch.where(observation.valid, z, 0.0)
        top = torch.full_like(s[:1], self.diffusion.sigma_max)
        with torch.autocast(z.device.type, enabled=False):
            return self.parametrization.energy(z, s, known, partial(self._scalars, dtype=z.dtype), top)

    def weight(self, s: Tensor, out: Tensor) -> Tensor:
        """Returns the weight of the squared error of D in the training loss, `(B,)`, at levels `s` in float64."""

        def plain(level: Tensor) -> Tensor:
            return self.diffusion.weight(self.diffusion.time(level))

        return self.parametrization.weight(s, out, plain).to(out.dtype)

    def _known(self, observation: Observation, mean: Tensor | None = None) -> Conditions:
        """Returns what samples are conditioned on; `mean` as in `estimate`."""
        observed = observation.observed
        return Conditions(
            y=torch.where(observed, observation.y, 0.0),
            observed=observed,
            error=torch.where(observed, observation.sigma_y, 0.0),
            valid=observation.valid,
            channels=observation.channels(),
            mean=self.mean(observation) if mean is None else mean,
            ends=not self.diffusion.gives_mean,
        )

    def _scalars(self, s: Tensor, dtype: torch.dtype) -> Scalars:
        """Returns the preconditioning at levels `s`, of z instead of x_t = alpha z, in the type of z."""
        # A few numbers a sample, in float64: near the end of a path alpha is a small difference.
        t = self.diffusion.time(s.double())
        c_in, c_noise, c_out, c_skip = self.diffusion.preconditioning(t)
        alpha = self.diffusion.alpha(t)
        # Products after rounding, as the networks in the world were trained.
        c_in, c_noise, c_out, c_skip, alpha = (c.to(dtype) for c in (c_in, c_noise, c_out, c_skip, alpha))
        return Scalars(c_in * alpha, c_noise, c_out, c_skip * alpha)

    def _run(self, network: Callable[..., Tensor], channels: Tensor, *level: Tensor) -> Tensor:
        """Returns a network in its own precision, its result in that of `channels`."""
        with torch.autocast(channels.device.type, self.autocast, enabled=self.autocast is not None):
            # Frames are folded by the network, which knows best how.
            last = channels.contiguous(memory_format=torch.channels_last) if channels.ndim == 4 else channels
            output = network(last, *level)
        return output.to(channels.dtype)


class MeanNetwork(nn.Module):
    """The regression within a network that predicts the mean, as a network of `Regression`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.network.mean(x[..., 2:, :, :])


def mean_only(denoiser: Denoiser) -> Denoiser:
    """Returns the regression of a denoiser with `model=residual`, by itself: D = mu(y), as a baseline.

    Raises:
        ValueError: A network without one.
    """
    if not denoiser.parametrization.predicts_mean:
        raise ValueError(f"denoiser must have a network that predicts the mean, got {type(denoiser.network).__name__}")
    # The network is conditioned as it was trained, on a background among others.
    regression = Regression(conditioned_as=denoiser.diffusion)
    network = MeanNetwork(denoiser.network)
    return Denoiser(network, regression, denoiser.normalizer, denoiser.autocast).train(denoiser.training)

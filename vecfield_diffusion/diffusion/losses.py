"""The denoising loss of a conditional diffusion model.

For a time t drawn by the formulation, `x_t = alpha x0 + sigma eps`, and

    loss = weight(t) mean_measured (D(x_t / alpha, s, y) - x0)^2,

the mean taken over the cells where the truth is known and both components (Karras et al., NeurIPS 2022, equation 2).
A weight that is not a formulation's own is 1 / out^2 of the parametrization (`models/base.py`): the squared error of
the output of the network, whatever it stands for.
Training adds what a formulation learns beside the mean: the variational bound of a learned reverse variance, the
uncertainty of the levels, and a schedule that is learned. Where the network predicts the mean mu(y) and denoises what
it misses, mu is a constant in all this, and its own mean squared error is added with the weight 1: the two share no
weights, each learns from its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.diffusion.base import reverse_variances
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation

#: `x_hat (B, 2, H, W), s (B,) -> (B,)`, such as the energy of what physics knows.
Penalty = Callable[[Tensor, Tensor], Tensor]


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    measured: Tensor,
    observation: Observation,
    t: Tensor,
    noise: Tensor,
    training: bool = False,
    penalty: Penalty | None = None,
) -> Tensor:
    """Returns the loss of every sample, `(B,)`.

    Arguments:
        x0: Clean normalised fields `(B, 2, H, W)`; anything, NaN included, where not measured.
        measured: The cells where `x0` is known, boolean `(B, 1, H, W)`.
        observation: What the network is conditioned on.
        t: Times of the formulation, `(B,)`.
        noise: Unit normal noise, `(B, 2, H, W)`.
        training: Whether to add what is learned beside the mean.
        penalty: What is added for the estimate of the clean fields.
    """
    diffusion = denoiser.diffusion
    x0 = torch.where(measured, x0, 0.0)
    level = diffusion.level(t)
    s = level.to(x0.dtype)
    z = x0 + column(s, x0) * noise
    mean = denoiser.mean(observation)
    x_hat, fraction, out, _ = denoiser.estimate(z, s, observation, mean)
    error = mean_measured((x_hat - x0).square(), measured)
    loss = denoiser.weight(level, out) * error
    if training and fraction is not None:
        bound = variational_bound(x0, x_hat.detach(), fraction, level, diffusion.below(level))
        # One of the M terms of the chain stands for all.
        loss = loss + diffusion.vlb_weight * diffusion.M * mean_measured(bound, measured)
    if penalty is not None:
        loss = loss + penalty(x_hat, s)
    if training and diffusion.uncertainty is not None:
        u = diffusion.uncertainty(diffusion.inputs(t)[1].to(x0.dtype))
        loss = loss / u.exp() + u
    if training and diffusion.learned_schedule:
        loss = loss + diffusion.schedule_loss(level, error)
    if training and mean is not None:
        square = mean_measured((mean - x0).square(), measured)
        denoiser.parametrization.track(square.detach().mean())
        loss = loss + square
    return loss


def mean_measured(values: Tensor, measured: Tensor) -> Tensor:
    """Returns the mean of `(B, 2, H, W)` over the measured cells `(B, 1, H, W)` and both components, `(B,)`.

    0 without any.
    """
    return total(torch.where(measured, values, 0.0)) / (2 * total(measured).clamp(min=1))


def variational_bound(x0: Tensor, x_hat: Tensor, fraction: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """Returns KL(q(z_r | z_s, x0) || p(z_r | z_s)) of every value in nats, `(B, 2, H, W)`.

    Both are normal, with the means `x + (r / s)^2 (z - x)` of x0 and of x_hat and the variances `small` and
    `large^v small^(1 - v)` (Nichol & Dhariwal, ICML 2021, equations 7 to 15).

    Arguments:
        x0: The clean fields.
        x_hat: The estimate of them.
        fraction: v.
        s: The levels, `(B,)` in float64.
        r: The next lower levels, `(B,)` in float64, above 0.
    """
    small, large = reverse_variances(s, r)
    # Neighbouring levels are nearly the same: their differences are taken before the precision is given up.
    values = (large / small).log(), (1 - (r / s) ** 2) / small.sqrt()
    span, share = (column(value.to(x0.dtype), x0) for value in values)
    log_ratio = fraction * span  # of the variance of p to that of q
    return (log_ratio + (1 + (share * (x0 - x_hat)) ** 2) * torch.exp(-log_ratio) - 1) / 2

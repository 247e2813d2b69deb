"""The denoising loss of a conditional diffusion model.

For a time t drawn by the formulation, `x_t = alpha x0 + sigma eps`, and

    loss = weight(t) mean_measured (D(x_t / alpha, s, y) - x0)^2,

the mean taken over the cells where the truth is known and both components (Karras et al., NeurIPS 2022, equation 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser, column
from vecfield_diffusion.diffusion.observation import Observation


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, measured: Tensor, observation: Observation, t: Tensor, noise: Tensor
) -> Tensor:
    """The loss of every sample, `(B,)`.

    Arguments:
        x0: Clean normalised fields `(B, 2, H, W)`; anything, NaN included, where not measured.
        measured: The cells where `x0` is known, boolean `(B, 1, H, W)`.
        observation: What the network is told.
        t: Times of the formulation, `(B,)`.
        noise: Unit normal noise, `(B, 2, H, W)`.
    """
    x0 = torch.where(measured, x0, 0.0)
    s = denoiser.diffusion.level(t)
    x_hat = denoiser(x0 + column(s) * noise, s, observation)
    error = torch.where(measured, x_hat - x0, 0.0).square().sum(dim=(1, 2, 3))
    count = 2 * measured.sum(dim=(1, 2, 3)).clamp(min=1)
    return denoiser.diffusion.weight(t) * error / count

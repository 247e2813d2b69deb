"""Dual score matching: an energy whose levels are comparable, U(z, s) = -ln p(z, s).

The denoising loss fixes the gradient of an energy by z alone, and leaves a constant free at every level. But the law of
`z = x0 + s eps` with d values knows its derivative by the level at fixed z (Guth et al., 2025, arXiv 2506.05310),

    d ln p / d ln s = E[|eps|^2 - d | z],

so that the squared error

    loss = (dU / d ln s - d + |eps|^2)^2 / d^2

is smallest for U = -ln p up to one constant for all levels. That one is fixed at the highest level, where the field is
lost in the noise and p is N(0, 1 + s^2) to within 1 / s^2: the loss adds (U - U_normal)^2 / d^2 there. Both are errors
of one value, as the denoising loss is; their noise, from |eps|^2, is then no larger than its own. (With 1 / d it drowns
the score, which is not learned at all.) Conditioned on an observation, p is that of z given y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError


def dual_loss(denoiser: Denoiser, x0: Tensor, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
    """Returns the loss of every sample, `(B,)`.

    Arguments:
        denoiser: One with an energy.
        x0: The clean normalised fields `(B, 2, H, W)`, known in the whole domain of the observation.
        z: The noisy ones.
        s: Their levels, `(B,)`.
        observation: What the network is conditioned on.

    Raises:
        UserError: A formulation that tells the network of the level in steps, which have no derivative.
    """
    valid = observation.valid.expand(*x0.shape[:-3], 1, *x0.shape[-2:])
    values = 2 * total(valid).double()
    eps = torch.where(valid, (z - x0) / column(s, z), 0.0)
    square = total(eps.double().square())
    s = s.detach().requires_grad_()
    energy = denoiser.energy(z, s, observation)
    (slope,) = torch.autograd.grad(energy.sum(), s, create_graph=True)
    loss = ((s * slope - values + square) / values).square()
    top = denoiser.diffusion.sigma_max
    highest = torch.full_like(s, top)
    noise = torch.where(valid, x0 + top * eps, 0.0)
    normal = total(noise.double().square()) / (1 + top**2) + values * torch.log(
        2 * torch.pi * (1 + highest**2).double()
    )
    loss = loss + ((denoiser.energy(noise, highest, observation) - normal / 2) / values).square()
    return loss.to(x0.dtype)


def check_dual(denoiser: Denoiser) -> None:
    """Raises UserError for a denoiser without an energy, or one that is told of the noise level in steps."""
    if not denoiser.has_energy:
        raise UserError("loss.dual is of networks with an energy: add model=energy, or leave it out")
    diffusion = denoiser.diffusion
    t = diffusion.time(torch.tensor([(diffusion.sigma_min * diffusion.sigma_max) ** 0.5], dtype=torch.float64))
    noise = diffusion.inputs(t.requires_grad_())[1]
    if not (noise.requires_grad and torch.autograd.grad(noise.sum(), t)[0].abs() > 0):
        raise UserError(
            "loss.dual needs the derivative by the noise level, which this diffusion tells the network in steps: add "
            "diffusion.inputs=unit"
        )

"""Every formulation, and the network that makes each of them exact on a Gaussian prior."""

import math
from functools import partial

import torch
from oracle import GaussianPrior

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, IDDPM, OU, VE, VP, Flow, Interpolant
from vecfield_diffusion.diffusion.formulations.thermodynamic import Thermodynamic
from vecfield_diffusion.diffusion.normalizer import Normalizer

PRIOR = GaussianPrior()


class Trigonometric(Diffusion):
    """A path of a user's: two functions, and nothing else."""

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * t)


#: Formulations with unit inputs: c_noise = ln(s) / 4.
FORMULATIONS = {
    "edm": partial(EDM, sigma_max=200.0),
    "ve": partial(VE, inputs="unit"),
    "vp": partial(VP, inputs="unit"),
    "ou": partial(OU, inputs="unit"),
    "ddpm": partial(DDPM, inputs="unit"),
    "cosine": partial(DDPM, schedule="cosine", inputs="unit"),
    "iddpm": partial(IDDPM, inputs="unit"),
    "flow": partial(Flow, sigma_max=200.0),
    "interpolant": partial(Interpolant, gamma=1.5),
    "thermodynamic": partial(Thermodynamic, schedule="cosine"),
    "user": partial(Trigonometric, t_min=0.01, t_max=0.99),
}


NORMALIZER = Normalizer(torch.zeros(2, 1, 1), 1.0)


class IdealNetwork(torch.nn.Module):
    """The network whose preconditioned output is an exact denoiser, here of the prior, for any formulation.

    It learns the level from c_noise = ln(s) / 4, so formulations are built with `inputs=unit`.
    """

    def __init__(self, diffusion, denoise=PRIOR.denoise):
        super().__init__()
        self.diffusion, self.denoise = diffusion, denoise

    def forward(self, channels, c_noise):
        s = (4 * c_noise).exp()
        t = self.diffusion.time(s)
        c_in, _, c_out, c_skip = (c.view(-1, 1, 1, 1) for c in self.diffusion.preconditioning(t))
        x_t = channels[:, :2] / c_in
        z = x_t / self.diffusion.alpha(t).view(-1, 1, 1, 1)
        return (self.denoise(z, s) - c_skip * x_t) / c_out

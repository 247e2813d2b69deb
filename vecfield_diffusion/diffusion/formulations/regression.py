"""Regression, which stands where a formulation does and is no diffusion."""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.physics.grid import Grid


class Regression(Diffusion):
    """No diffusion, a baseline: the network sees the observation alone and gives the mean of the field, D = F(0, y).

    c_in = c_skip = 0 and c_out = 1 at every level, so that D is that of infinite noise, the loss is the mean squared
    error, and whatever the sampler, every member is the mean: `sampler.steps=1` is enough. There is no spread, and no
    derivative by the state for methods that ask for one.

    Arguments:
        conditioned_as: A formulation whose background the network sees as well; None for none.
    """

    noisy = False

    def __init__(self, conditioned_as: Diffusion | None = None) -> None:
        super().__init__(1.0, 1e3, "sample")
        self.conditioned_as = conditioned_as
        self.coupled = conditioned_as is not None and conditioned_as.coupled

    def with_background(self, observation: Observation, grid: Grid) -> Observation:
        return observation if self.conditioned_as is None else self.conditioned_as.with_background(observation, grid)

    def time(self, s: Tensor) -> Tensor:
        return s

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n,), self.t_max, dtype=torch.float64, device=generator.device)

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nothing = torch.zeros_like(t)
        return nothing, nothing, torch.ones_like(t), nothing

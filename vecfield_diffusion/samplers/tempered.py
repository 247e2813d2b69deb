"""The tempered law p^(1/T) of data that are not Gaussian: weighted particles (Feynman-Kac).

With noise of the variance T the reverse diffusion `dz = -score du + sqrt(T) dW`, `u = s^2` falling, goes from the law
`p_s^(1/T)` to that of the next level but for a factor: with `b = 1 / T` and the heat equation for p_s, the densities

    pi = p_s^b    and    d ln pi / du = b (lap ln p + |grad ln p|^2) / 2

differ from what the diffusion makes of pi by the rate `(1 - b) / 2 lap ln p`, the square of the score having no part.
Since `lap ln p = (tr J - d) / s^2`, J the Jacobian of D, a particle has the weight

    ln w = (1 - b) integral of tr J d ln s

over its path, and weighted particles have the law p^(1/T) (Feynman-Kac; Del Moral, 2004; for diffusion models Skreta et
al., ICML 2025, arXiv 2503.02819, who weight by the square of the score, which varies on Gaussian data, too). For
Gaussian data J is the same everywhere, and all weights are alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.axes import total
from vecfield_diffusion.diffusion.base import ScheduleName
from vecfield_diffusion.samplers.base import LevelDenoiser, NoiseFunction, OwnWalk, first_state
from vecfield_diffusion.samplers.metropolis import uniform

#: The length of the difference that estimates `v^T J v`, over the level.
DIFFERENCE = 0.02


class FeynmanKac(OwnWalk):
    """Particles of the reverse diffusion for each sample, weighted and resampled, of which the sample is one.

    Each sample has particles of its own, so that samples are independent and depend on no batch. The trace is that of
    Hutchinson, with one vector of signs for all particles of a sample at a level: what is common to them cancels. Where
    the effective number `(sum w)^2 / sum w^2` falls below half of them they are resampled; its mean is recorded. The
    law is that of p^(1/T) as steps and particles grow. A run costs 2 n evaluations for each particle.

    Arguments:
        steps: The number of steps n.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        particles: The number of particles of a sample.
        temperature: T.

    Raises:
        ValueError: Fewer than two particles.
    """

    own_walk = "sampler=feynman_kac weights states by their history"
    differences = True

    def __init__(
        self, steps: int = 64, schedule: ScheduleName = "log_snr", particles: int = 16, temperature: float = 0.5
    ) -> None:
        super().__init__(steps, schedule, temperature)
        if particles < 2:
            raise ValueError(f"particles must be >= 2, got {particles}")
        self.particles = particles

    @property
    def evaluations(self) -> int:
        return 2 * self.steps * self.particles

    def walk(
        self, denoise: LevelDenoiser, ladder: list[float], noise: NoiseFunction, start: Tensor | None
    ) -> list[Tensor]:
        """See `OwnWalk`; the states are those of the first particle."""
        heated = self.heated(noise)
        particles = torch.stack([first_state(ladder[0], heated, start) for _ in range(self.particles)])
        logs = torch.zeros(particles.shape[:2], dtype=torch.float64, device=particles.device)
        states = [particles[0]]
        for k, (s, r) in enumerate(zip(ladder, ladder[1:], strict=False)):
            estimates, traces = self.estimate(denoise, particles, s, noise)
            logs = logs + (1 - 1 / self.temperature) * half_way(ladder, k) * traces
            q, fresh = (r / s) ** 2, r * math.sqrt(1 - (r / s) ** 2)
            particles = torch.lerp(estimates, particles, q)
            if r > 0:
                particles, logs = self.resample(particles, logs, noise)
                particles = particles + fresh * torch.stack([heated() for _ in particles])
            states.append(particles[0])
        return [*states[:-1], self.one(particles, logs, noise)]

    def estimate(self, denoise: LevelDenoiser, zs: Tensor, s: float, noise: NoiseFunction) -> tuple[Tensor, Tensor]:
        """Returns D of the particles `(P, B, 2, H, W)` and the traces of its Jacobian, `(P, B)` in float64."""
        signs = torch.where(noise() < 0, -1.0, 1.0).to(zs.dtype)
        if denoise.valid is not None:
            signs = torch.where(denoise.valid, signs, 0.0)
        length = DIFFERENCE * s
        estimates = torch.stack([denoise(z, s) for z in zs])
        moved = torch.stack([denoise(torch.add(z, signs, alpha=length), s) for z in zs])
        traces = [total((change * signs).double()) / length for change in moved - estimates]
        return estimates, torch.stack(traces)

    def resample(self, particles: Tensor, logs: Tensor, noise: NoiseFunction) -> tuple[Tensor, Tensor]:
        """Returns particles and logarithms of their weights, resampled in the samples whose weights are too uneven."""
        weights = torch.softmax(logs, dim=0)
        effective = 1 / weights.square().sum(dim=0)
        self.record.add("effective_particles", effective)
        uneven = effective < self.particles / 2
        # Systematic resampling: one number places P evenly spaced pointers on the cumulated weights.
        pointers = (torch.arange(self.particles, device=logs.device)[:, None] + uniform(noise)) / self.particles
        picked = torch.searchsorted(weights.T.cumsum(1).contiguous(), pointers.T.contiguous())
        own = torch.arange(self.particles, device=logs.device)[:, None]
        index = torch.where(uneven, picked.clamp(max=self.particles - 1).T, own)
        samples = torch.arange(particles.shape[1], device=logs.device)
        return particles[index, samples], torch.where(uneven, 0.0, logs)

    def one(self, particles: Tensor, logs: Tensor, noise: NoiseFunction) -> Tensor:
        """Returns one particle of each sample, drawn by its weight."""
        cumulated = torch.softmax(logs, dim=0).T.cumsum(1).contiguous()
        index = torch.searchsorted(cumulated, uniform(noise)[:, None])[:, 0].clamp(max=self.particles - 1)
        return particles[index, torch.arange(particles.shape[1], device=logs.device)]


def half_way(ladder: list[float], k: int) -> float:
    """Returns the length in ln s that level k stands for by the trapezium rule over the positive levels."""
    above = math.log(ladder[k - 1] / ladder[k]) if k > 0 else 0.0
    below = math.log(ladder[k] / ladder[k + 1]) if ladder[k + 1] > 0 else 0.0
    return (above + below) / 2

"""The probability-flow ODE with steps as long as a tolerance allows.

With `l = ln s` the ODE is `dz/dl = f = z - D(z, s)`. Steps h < 0 by the method of Bogacki & Shampine (Applied
Mathematics Letters, 1989), of third order with an embedded second:

    k1 = f(z, l),    k2 = f(z + h k1 / 2, l + h / 2),    k3 = f(z + 3 h k2 / 4, l + 3 h / 4)
    z' = z + h (2 k1 + 3 k2 + 4 k3) / 9,    k4 = f(z', l + h),    error = h (6 k2 + 8 k3 - 5 k1 - 9 k4) / 72

and k4 is the next step's k1: three evaluations a step. Every sample of a batch has steps and an error of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.axes import column
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.samplers.base import BoundDenoiser, LevelDenoiser, NoiseFunction, OwnWalk, Progress, first_state

#: The length in ln s of the first step that is tried.
FIRST = 0.1


class Slope:
    """`f(z, l) = z - D(z, exp(l))` for levels `(B,)`, each call reported and counted.

    Raises:
        UserError: A call beyond `limit`.
    """

    def __init__(self, denoiser: BoundDenoiser, progress: Progress, limit: int) -> None:
        self.denoiser, self.progress, self.limit, self.calls = denoiser, progress, limit, 0

    def __call__(self, z: Tensor, log_s: Tensor) -> Tensor:
        if self.calls == self.limit:
            raise UserError(
                f"the adaptive sampler has not arrived after {self.limit} evaluations: "
                "loosen sampler.rtol= and sampler.atol=, or raise sampler.max_evaluations="
            )
        self.calls += 1
        x_hat = self.denoiser(z, log_s.exp().to(z.dtype))
        self.progress(1)
        return z - x_hat


class Adaptive(OwnWalk):
    """Bogacki-Shampine 3(2) from the largest level to the smallest positive one, then D.

    A step is kept where the root mean square of `error / (atol + rtol max(|z|, |z'|))` over the valid cells of a sample
    is at most 1: what the state does on land shortens no step and excuses none. The next step is
    `0.9 norm^(-1/3)` times as long, within a fifth and five times. The device is waited for once a step, to see
    whether all samples have arrived; those that have are frozen.

    Arguments:
        rtol: The error of a step relative to the state.
        atol: The error of a step in standard deviations of the data, the unit of normalised fields.
        max_evaluations: The largest number of evaluations of a run, at least 4: of one step.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: Tolerances that are not positive, or too few evaluations.
    """

    own_walk = "sampler=adaptive has no levels that all members share"

    def __init__(
        self, rtol: float = 1e-3, atol: float = 1e-3, max_evaluations: int = 1000, temperature: float = 1.0
    ) -> None:
        # The formulation's own schedule of two steps has the largest level, the smallest and 0.
        super().__init__(steps=2, temperature=temperature)
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if max_evaluations < 4:
            raise ValueError(f"max_evaluations must be >= 4, got {max_evaluations}")
        self.rtol, self.atol, self.max_evaluations = rtol, atol, max_evaluations

    @property
    def evaluations(self) -> None:
        return None

    def walk(
        self, denoise: LevelDenoiser, ladder: list[float], noise: NoiseFunction, start: Tensor | None
    ) -> list[Tensor]:
        """See `OwnWalk`; from levels `(s_max, s_min, 0)`, and the states are those at these levels.

        Raises:
            UserError: More than `max_evaluations`.
        """
        top, bottom, _ = ladder
        first = first_state(top, self.heated(noise), start)
        span = torch.tensor([top, bottom], dtype=torch.float64, device=first.device).log()
        one = first.narrow(-3, 0, 1)
        inside = torch.ones_like(one, dtype=torch.bool) if denoise.valid is None else denoise.valid.expand_as(one)
        slope = Slope(denoise.denoiser, denoise.progress, self.max_evaluations)
        z, last = self.integrate(slope, first, span, inside)
        return [first, z, z - last]

    def integrate(self, slope: Slope, z: Tensor, span: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Returns state and slope at the end of `span`, the logarithms of two levels, from the state at its start."""
        log_s, end = span[0].expand(len(z)), span[1]
        length = torch.full_like(log_s, FIRST)
        k1 = slope(z, log_s)
        while (under_way := log_s > end).any():
            # A step that would pass the end, or leave next to nothing of the way, goes there.
            target = torch.where(log_s - 1.01 * length <= end, end, log_s - length)
            new, k4, error = bogacki_shampine(slope, z, k1, log_s, target)
            norm = self.norm(error, z, new, valid)
            kept = (norm <= 1) & under_way
            # A norm that is not a number is too large an error.
            length = (log_s - target) * (0.9 * norm.nan_to_num(nan=torch.inf) ** (-1 / 3)).clamp(0.2, 5.0)
            log_s = torch.where(kept, target, log_s)
            chosen = column(kept, z)
            z, k1 = torch.where(chosen, new, z), torch.where(chosen, k4, k1)
        return z, k1

    def norm(self, error: Tensor, z: Tensor, new: Tensor, valid: Tensor) -> Tensor:
        """Returns the root mean square `(B,)` of the errors in valid cells over what is tolerated, in float64."""
        scale = torch.maximum(z.abs(), new.abs()).mul_(self.rtol).add_(self.atol)
        size = torch.where(valid, error.div_(scale), 0.0).flatten(1).double().square().sum(1)
        count = error.shape[-3] * valid.flatten(1).sum(1).clamp(min=1)
        return (size / count).sqrt()


def bogacki_shampine(
    slope: Slope, z: Tensor, k1: Tensor, log_s: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the state at `target`, the slope there and the error of the state, from state and slope at `log_s`."""
    h = column(target - log_s, z).to(z.dtype)
    k2 = slope(torch.addcmul(z, h / 2, k1), (log_s + target) / 2)
    k3 = slope(torch.addcmul(z, 3 * h / 4, k2), (log_s + 3 * target) / 4)
    new = torch.addcmul(z, 2 * h / 9, k1).addcmul_(h / 3, k2).addcmul_(4 * h / 9, k3)
    k4 = slope(new, target)
    error = (-5 * h / 72 * k1).addcmul_(h / 12, k2).addcmul_(h / 9, k3).addcmul_(-h / 8, k4)
    return new, k4, error

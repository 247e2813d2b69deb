"""Langevin dynamics that is exact: proposals that are accepted or refused, each sample by itself.

At a level s the states have the density p_s, and its tempered law `p_s^(1/T)` stays as it is under any proposal q that
is accepted with the probability (Metropolis et al., 1953; Hastings, 1970)

    min(1, (p_s(z') / p_s(z))^(1/T) q(z | z') / q(z' | z)),

whatever the size of the step. `ln p_s(z') - ln p_s(z)` is `LevelDenoiser.log_ratio`. Cells outside the domain stay as
they are. What is recorded of a run: the share of the proposals that were accepted, and how long it takes ln p_s of a
chain to forget where it was.

Levels that lie too far apart are not forgotten. Of a disturbance where the data leave the noise alone, an accepted step
keeps a share q of the variance, (1 - b^2) of pcn and (1 - share)^2 of mala, so that beyond the noise r^2 that belongs
to a level a state has

    e <- (e + s^2 - r^2) q^accepted

from the levels above. Where the root of it is not small at the end, the samples are not of the law, however many of the
proposals were accepted; it is recorded as `noise_left`, and a note says what to do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.diffusion.base import ScheduleName
from vecfield_diffusion.samplers.base import NODES, LevelDenoiser, NoiseFunction, Reference, Sampler, line_integral
from vecfield_diffusion.samplers.record import Record

#: Noise of higher levels that samples may keep before it is said, in standard deviations of the data.
MUCH = 0.1


class State(NamedTuple):
    """A state `(B, 2, H, W)` at a level, with D there where the moves ask for it, and ln p_s but for a constant."""

    z: Tensor
    x_hat: Tensor | None
    log_p: Tensor


@dataclass(frozen=True)
class Place:
    """Where a chain is: at the level `s` and the temperature `T`, in the cells `valid`, all if None."""

    denoise: LevelDenoiser
    s: float
    T: float
    valid: Tensor | None

    def inside(self, new: Tensor, z: Tensor) -> Tensor:
        """Returns the new state in the domain and the old one elsewhere."""
        return new if self.valid is None else torch.where(self.valid, new, z)


def uniform(noise: NoiseFunction, temperature: float = 1.0) -> Tensor:
    """Returns a number `(B,)` for each sample, uniform in (0, 1) in float64, of normal noise of the variance T."""
    first = noise().flatten(1)[:, 0].double() / math.sqrt(temperature)
    return torch.special.ndtr(first)


def chosen(accepted: Tensor, new: State, old: State) -> State:
    """Returns the new state of the samples that are accepted, `(B,)`, the old one of the others."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(column(accepted, a), a, b)

    x_hat = None if new.x_hat is None else pick(new.x_hat, old.x_hat)
    return State(pick(new.z, old.z), x_hat, torch.where(accepted, new.log_p, old.log_p))


class Move(ABC):
    """A Metropolis step; a subclass writes the proposal.

    Attributes:
        needs_estimate: Whether a state must hold D.
        evaluations: Evaluations of the denoiser a step.
    """

    needs_estimate: bool = False
    evaluations: int = NODES

    @abstractmethod
    def keeps(self, z: Tensor) -> float:
        """Returns the share of the variance of a disturbance of white noise that an accepted step leaves."""

    @abstractmethod
    def propose(self, place: Place, old: State, noise: NoiseFunction) -> tuple[State, Tensor]:
        """Returns the proposal, and the logarithm of the ratio `(B,)` that it is accepted by, in float64.

        `noise` has the variance T.
        """

    def begin(self, place: Place, z: Tensor, log_p: Tensor | None = None) -> State:
        """Returns the state of a chain that begins at `z`, at `log_p`; one evaluation where it `needs_estimate`."""
        x_hat = place.denoise(z, place.s) if self.needs_estimate else None
        zero = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        return State(z, x_hat, zero if log_p is None else log_p)

    def __call__(self, place: Place, old: State, noise: NoiseFunction, record: Record) -> State:
        """Returns the state after one step."""
        new, log_ratio = self.propose(place, old, noise)
        # A ratio that is not a number is refused.
        accepted = uniform(noise, place.T).log() < log_ratio.nan_to_num(nan=-math.inf, posinf=math.inf)
        record.add("acceptance", accepted.double())
        return chosen(accepted, new, old)


class LangevinMove(Move):
    """`z' = z + share (D - z) + s sqrt(2 share T) eps`, Langevin's step (Roberts & Tweedie, Bernoulli 2, 341, 1996).

    Arguments:
        share: The length of the step over s^2; None takes `1.65^2 / 2 d^(-1/3)` of d values, which for many independent
            values accepts 57 %, the most efficient share (Roberts & Rosenthal, J. R. Stat. Soc. B 60, 255, 1998), and 1
            at most.
    """

    needs_estimate = True
    evaluations = NODES + 1

    def __init__(self, share: float | None) -> None:
        self.share = share

    def length(self, z: Tensor) -> float:
        """Returns the share for states `(B, ...)`."""
        return min(1.0, 1.65**2 / 2 * z[0].numel() ** (-1 / 3)) if self.share is None else self.share

    def keeps(self, z: Tensor) -> float:
        """See `Move`."""
        return (1 - self.length(z)) ** 2

    def propose(self, place: Place, old: State, noise: NoiseFunction) -> tuple[State, Tensor]:
        """See `Move`."""
        share, s = self.length(old.z), place.s
        drifted = torch.lerp(old.z, old.x_hat, share)
        z = place.inside(torch.add(drifted, noise(), alpha=s * math.sqrt(2 * share)), old.z)
        x_hat, gain = place.denoise(z, s), place.denoise.log_ratio(old.z, z, s)
        forth, back = (z - drifted).double(), (old.z - torch.lerp(z, x_hat, share)).double()
        if place.valid is not None:
            forth, back = (torch.where(place.valid, part, 0.0) for part in (forth, back))
        proposals = total(forth.square() - back.square()) / (4 * share * s**2)
        return State(z, x_hat, old.log_p + gain), (gain + proposals) / place.T


class CrankNicolsonMove(Move):
    """`z' = m + sqrt(1 - b^2) (z - m) + b w`, w a draw of a Gaussian law that resembles the data's at the level.

    This leaves N(m, T (C + s^2 I)) as it is (Cotter et al., Statistical Science 28, 424, 2013), and what decides is how
    far the data's law is from it, whatever the number of values. With G the denoiser of the Gaussian law, the
    difference of the logarithms of both densities is the integral of `(D - G) / s^2` along the move.

    Arguments:
        b: The length of the step, in (0, 1]; 1 forgets the state.
        reference: The Gaussian law.
    """

    def __init__(self, b: float, reference: Reference) -> None:
        self.b, self.reference = b, reference

    def keeps(self, z: Tensor) -> float:
        """See `Move`."""
        return 1 - self.b**2

    def propose(self, place: Place, old: State, noise: NoiseFunction) -> tuple[State, Tensor]:
        """See `Move`."""
        s, reference = place.s, self.reference
        drawn = torch.add(reference.draw(noise), noise(), alpha=s)
        centre = reference.centre(old.z)
        z = place.inside(centre + math.sqrt(1 - self.b**2) * (old.z - centre) + self.b * drawn, old.z)
        gain = place.denoise.log_ratio(old.z, z, s)
        own = line_integral(reference.denoise, old.z, z, s, nodes=1)  # its score is linear
        return State(z, None, old.log_p + gain), (gain - own) / place.T


class White:
    """The `Reference` of normalised fields of which nothing is known but their scale: m = 0 and C = I."""

    def centre(self, z: Tensor) -> Tensor:
        """See `Reference`."""
        return torch.zeros_like(z)

    def draw(self, noise: NoiseFunction) -> Tensor:
        """See `Reference`."""
        return noise()

    def denoise(self, z: Tensor, s: float) -> Tensor:
        """See `Reference`."""
        return z / (1 + s**2)


class Metropolis(Sampler):
    """Metropolis steps at each of the n levels above 0, the first included, then D; see `Langevin` and the module.

    A subclass has the move. Hooks would change states that were accepted, so that there may be none.

    Attributes:
        kind: The class of the move.
    """

    kind: type[Move]
    differences = True

    def __init__(self, steps: int, schedule: ScheduleName, corrections: int, temperature: float) -> None:
        super().__init__(steps, schedule, temperature)
        if corrections < 1:
            raise ValueError(f"corrections must be >= 1, got {corrections}")
        self.corrections = corrections

    @abstractmethod
    def move(self, denoise: LevelDenoiser) -> Move:
        """Returns the move of a run."""

    @property
    def evaluations(self) -> int:
        return self.steps * (self.corrections * self.kind.evaluations + self.kind.needs_estimate) + 1

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        if not memory:
            memory["move"] = self.move(denoise)
            z, _ = self.correct(denoise, z, s, noise, memory["move"])
            memory["left"] = z.new_zeros(len(z), dtype=torch.float64)
        if r == 0:
            self.judge(memory["left"])
            return denoise(z, s)
        z, kept = self.correct(denoise, z, r, noise, memory["move"])
        memory["left"] = (memory["left"] + s**2 - r**2) * kept
        return z

    def correct(
        self, denoise: LevelDenoiser, z: Tensor, s: float, noise: NoiseFunction, move: Move
    ) -> tuple[Tensor, Tensor]:
        """Returns the state after the steps at level `s`, and the share of a disturbance that they left, `(B,)`."""
        place = Place(denoise, s, self.temperature, denoise.valid)
        state, kept = move.begin(place, z), z.new_ones(len(z), dtype=torch.float64)
        chain, keeps = [state.log_p], move.keeps(z)
        for _ in range(self.corrections):
            state = move(place, state, noise, self.record)
            kept = torch.where(self.record.last("acceptance") > 0, keeps * kept, kept)
            chain.append(state.log_p)
        self.record.follow(chain)
        return state.z, kept

    def judge(self, left: Tensor) -> None:
        """Records the noise of higher levels that is left, of variance `(B,)`, and says what to do where it is much."""
        root = (self.temperature * left).sqrt()
        self.record.add("noise_left", root)
        if (found := root.mean().item()) > MUCH:
            self.record.note(
                f"the members keep {found:.2g} standard deviations of the noise of higher levels, which the steps did "
                "not forget: they are not to be trusted. Add levels or steps at each (sampler.steps, "
                "sampler.corrections), or shorten the steps where few were accepted (sampler.step_size)"
            )


class MALA(Metropolis):
    """Annealed Langevin dynamics in which each step is accepted or refused: no bias at a level, however long the step.

    What is left is that of a chain of finite length: the law of a level that is not yet forgotten when the next begins.
    A run costs n (3 corrections + 1) + 1 evaluations.

    Arguments:
        steps: The number of levels n.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        corrections: The number of Langevin steps at each level.
        step_size: delta / s^2 of `Langevin`; `auto` takes 1.36 d^(-1/3) for fields of d values, and 1 at most.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: Fewer than one correction, or a step size outside (0, 2).
    """

    kind = LangevinMove
    own_walk = "sampler=mala decides on its steps by the density of the states"

    def __init__(
        self,
        steps: int = 64,
        schedule: ScheduleName = "log_snr",
        corrections: int = 10,
        step_size: float | Literal["auto"] = "auto",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, corrections, temperature)
        if step_size != "auto" and not 0 < step_size < 2:
            raise ValueError(f"step_size must be auto or in (0, 2), got {step_size}")
        self.step_size = step_size

    def move(self, denoise: LevelDenoiser) -> Move:
        return LangevinMove(None if self.step_size == "auto" else self.step_size)


class CrankNicolson(Metropolis):
    """Annealed Metropolis steps by the preconditioned Crank-Nicolson proposal, which do not mind the resolution.

    The proposals are made of a Gaussian law that resembles the data's: of the checkpoint's Gaussian field, given the
    observation, where it has one (model=gaussian); else of white noise, which suits levels above the data's largest
    scales alone. A run costs 2 n corrections + 1 evaluations.

    Arguments:
        steps: The number of levels n.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        corrections: The number of steps at each level.
        step_size: b of `CrankNicolsonMove`, in (0, 1].
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: Fewer than one correction, or a step size outside (0, 1].
    """

    kind, takes_reference = CrankNicolsonMove, True
    own_walk = "sampler=pcn decides on its steps by the density of the states"

    def __init__(
        self,
        steps: int = 64,
        schedule: ScheduleName = "log_snr",
        corrections: int = 10,
        step_size: float = 0.2,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, corrections, temperature)
        self.step_size = unit_length(step_size)

    def move(self, denoise: LevelDenoiser) -> Move:
        return CrankNicolsonMove(self.step_size, known(denoise.reference, self.record))


def known(reference: Reference | None, record: Record) -> Reference:
    """Returns the Gaussian law, or white noise in the place of none, which is noted."""
    if reference is None:
        record.note("proposals are of white noise, for the checkpoint has no Gaussian field: see model=gaussian")
    return reference or White()


def unit_length(step_size: float) -> float:
    """Returns b. Raises ValueError outside (0, 1]."""
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must be in (0, 1], got {step_size}")
    return step_size

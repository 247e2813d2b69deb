"""Replica exchange: several chains for each sample, at different levels or temperatures, which trade their states.

A chain at a high level, or a hot one, goes from one mode of the data to another where a cold one at a low level would
stay for ever. Chains at `(s, T)` and `(s', T')` with the states z and z' exchange them with the probability

    min(1, (p_s(z') / p_s(z))^(1/T) (p_s'(z) / p_s'(z'))^(1/T')),

which leaves the law of both as it is (Swendsen & Wang, Phys. Rev. Lett. 57, 2607, 1986). Constants of the levels, which
a score does not know, have no part in it. In between each chain takes a Metropolis step of its own.

The share of exchanges that are accepted falls with the number of values, unless there are more chains: of levels r < s
of independent values it depends on sqrt(d) ln(s / r).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import ScheduleName
from vecfield_diffusion.samplers.base import LevelDenoiser, NoiseFunction, OwnWalk, Reference, first_state
from vecfield_diffusion.samplers.metropolis import (
    CrankNicolsonMove,
    LangevinMove,
    Move,
    Place,
    State,
    chosen,
    known,
    uniform,
)
from vecfield_diffusion.samplers.stochastic import Ancestral

Over = Literal["levels", "temperatures"]
Moves = Literal["mala", "pcn"]


class ReplicaExchange(OwnWalk):
    """Replica exchange over the noise levels, or over temperatures at each of them; see the module.

    Over levels, the chains are at all n levels above 0, each with the state that an ancestral walk down has there at
    first; after all rounds the sample is D of the lowest. It costs n (rounds + 1) evaluations and more: see
    `evaluations`. Over temperatures, the chains are at T, ..., T `hottest`, a constant factor apart; together they walk
    down the levels as those of `mala` do, with all rounds at each; the sample is that of the coldest.

    Arguments:
        steps: The number of levels n.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        over: What the chains differ in.
        rounds: The number of rounds, each a step of every chain and then an exchange of every other pair of neighbours.
        moves: The step of a chain: that of `mala` or of `pcn`.
        step_size: That of `mala` or of `pcn`; `auto` is theirs.
        chains: The number of temperatures.
        hottest: The highest temperature over T.
        nodes: Evaluations of the score between two states that may be exchanged; they lie far from each other, and few
            of them give modes a wrong proportion. A denoiser with an energy needs none.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: A number out of range.
    """

    own_walk = "sampler=replica_exchange trades states by their density"
    differences = True

    def __init__(
        self,
        steps: int = 24,
        schedule: ScheduleName = "log_snr",
        over: Over = "levels",
        rounds: int = 50,
        moves: Moves = "mala",
        step_size: float | Literal["auto"] = "auto",
        chains: int = 4,
        hottest: float = 8.0,
        nodes: int = 16,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, temperature)
        for name, value, options in (("over", over, get_args(Over)), ("moves", moves, get_args(Moves))):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {value}")
        if rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {rounds}")
        if step_size != "auto" and not 0 < step_size <= 1:
            raise ValueError(f"step_size must be auto or in (0, 1], got {step_size}")
        if chains < 2:
            raise ValueError(f"chains must be >= 2, got {chains}")
        if nodes < 1:
            raise ValueError(f"nodes must be >= 1, got {nodes}")
        if not hottest > 1:
            raise ValueError(f"hottest must be > 1, got {hottest}")
        self.over, self.rounds, self.moves, self.step_size = over, rounds, moves, step_size
        self.chains, self.hottest, self.nodes, self.takes_reference = chains, hottest, nodes, moves == "pcn"

    def move(self, reference: Reference | None) -> Move:
        """Returns the step of a chain."""
        if self.moves == "mala":
            return LangevinMove(None if self.step_size == "auto" else self.step_size)
        return CrankNicolsonMove(0.2 if self.step_size == "auto" else self.step_size, known(reference, self.record))

    @property
    def evaluations(self) -> int:
        move, n, rounds = LangevinMove if self.moves == "mala" else CrankNicolsonMove, self.steps, self.rounds
        own = move.evaluations + move.needs_estimate
        if self.over == "levels":
            pairs = (rounds + 1) // 2 * (n // 2) + rounds // 2 * ((n - 1) // 2)
            return n - 1 + rounds * n * own + 2 * self.nodes * pairs + 1
        pairs = (rounds + 1) // 2 * (self.chains // 2) + rounds // 2 * ((self.chains - 1) // 2)
        return n * (rounds * self.chains * own + self.nodes * pairs) + 1

    def walk(
        self, denoise: LevelDenoiser, ladder: list[float], noise: NoiseFunction, start: Tensor | None
    ) -> list[Tensor]:
        """See `OwnWalk`; the states are those that the chains at the levels end with."""
        over = self._over_levels if self.over == "levels" else self._over_temperatures
        states = over(denoise, ladder[:-1], noise, start)
        return [*states, denoise(states[-1], ladder[-2])]

    def _over_levels(
        self, denoise: LevelDenoiser, ladder: list[float], noise: NoiseFunction, start: Tensor | None
    ) -> list[Tensor]:
        """Returns the states of the chains at the levels after all rounds."""
        heated, first = self.heated(noise), Ancestral(self.steps)
        states = [first_state(ladder[0], heated, start)]
        for s, r in pairwise(ladder):
            states.append(first.step(denoise, states[-1], s, r, heated, {}))
        return self.run(denoise, states, [(s, self.temperature) for s in ladder], noise)

    def _over_temperatures(
        self, denoise: LevelDenoiser, ladder: list[float], noise: NoiseFunction, start: Tensor | None
    ) -> list[Tensor]:
        """Returns the state of the coldest chain at each of the levels."""
        ratio = self.hottest ** (1 / (self.chains - 1))
        temperatures = [self.temperature * ratio**k for k in reversed(range(self.chains))]
        states = [first_state(ladder[0], scaled(noise, T), start) for T in temperatures]
        coldest = []
        for s in ladder:
            states = self.run(denoise, states, [(s, T) for T in temperatures], noise)
            coldest.append(states[-1])
        return coldest

    def run(
        self, denoise: LevelDenoiser, zs: list[Tensor], where: list[tuple[float, float]], noise: NoiseFunction
    ) -> list[Tensor]:
        """Returns the states `(B, 2, H, W)` of chains at levels and temperatures after all rounds."""
        move, places = self.move(denoise.reference), [Place(denoise, s, T, denoise.valid) for s, T in where]
        noises = [scaled(noise, place.T) for place in places]
        logs = [torch.zeros(len(z), dtype=torch.float64, device=z.device) for z in zs]
        history = []
        for k in range(self.rounds):
            begun = [move.begin(*chain) for chain in zip(places, zs, logs, strict=True)]
            states = [move(*chain, self.record) for chain in zip(places, begun, noises, strict=True)]
            for i in range(k % 2, len(states) - 1, 2):
                states[i : i + 2] = self.exchange(places[i], places[i + 1], *states[i : i + 2], noise)
            zs, logs = [state.z for state in states], [state.log_p for state in states]
            history.append(logs[-1])
        self.record.follow(history)
        return zs

    def exchange(
        self, place: Place, other: Place, state: State, neighbour: State, noise: NoiseFunction
    ) -> tuple[State, State]:
        """Returns the states of two chains after they were offered each other's, each sample by itself."""
        there = place.denoise.log_ratio(state.z, neighbour.z, place.s, self.nodes)
        # At one level the way back is the way there.
        back = -there if other.s == place.s else other.denoise.log_ratio(neighbour.z, state.z, other.s, self.nodes)
        log_ratio = (there / place.T + back / other.T).nan_to_num(nan=-math.inf)
        accepted = uniform(noise).log() < log_ratio
        self.record.add("exchanges", accepted.double())
        offered = State(neighbour.z, None, state.log_p + there), State(state.z, None, neighbour.log_p + back)
        return tuple(
            chosen(accepted, new, old._replace(x_hat=None))
            for new, old in zip(offered, (state, neighbour), strict=True)
        )


def scaled(noise: NoiseFunction, temperature: float) -> NoiseFunction:
    """Returns noise of the variance `temperature`."""
    return lambda: math.sqrt(temperature) * noise()

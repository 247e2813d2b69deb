"""`infer.py thermodynamics=true`: energy, heat and work of the paths of samples, and whether the network's laws agree.

The members of the first case are drawn once more, and followed level by level. Then annealed Langevin dynamics goes
from their noise down to the last level, and from where they end back up: the work of both is checked against the
relations of Jarzynski and Crooks, and the difference of free energy that follows by BAR is 0 where the laws of all
levels agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.axes import total
from vecfield_diffusion.evaluation.plots import figure_thermodynamics
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.evaluation.thermodynamics import (
    ByEnergy,
    ByScore,
    Energies,
    along,
    annealed,
    bar,
    crooks,
    effective,
    jarzynski,
)
from vecfield_diffusion.evaluation.thermodynamics import Path as Followed
from vecfield_diffusion.guidance.inpainting import Bound
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.ensemble import member_noise, seeds_of
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.trained import Trained
from vecfield_diffusion.samplers.base import BoundDenoiser, NoiseFunction, first_state
from vecfield_diffusion.samplers.likelihood import tracer

#: Lines of the table that is printed.
LINES = 8
#: The curves in it. The entropy is the energy, and what is produced of it the work: the laws are normalised.
SAID = ("energy", "work", "heat")
#: Effective samples on either side below which work says nothing of a difference of free energy.
ENOUGH = 3.0


@dataclass(frozen=True)
class Thermodynamics:
    """What was found, in nats for each value.

    Attributes:
        levels: Noise levels `(n + 1,)`, in standard deviations of the data.
        curves: By name, what M paths have of it in the mean at each level, `(n + 1,)`.
        forward: Work of annealed paths down, `(M,)`, in nats.
        reverse: Likewise up.
        numbers: What follows from the work.
    """

    levels: list[float]
    curves: dict[str, list[float]]
    forward: np.ndarray
    reverse: np.ndarray
    numbers: dict[str, Any]

    def results(self) -> dict[str, Any]:
        """Returns what is written to metrics.json; a number that is none, or infinite, is null."""
        numbers = {name: value if np.isfinite(value) else None for name, value in self.numbers.items()}
        return {"levels": self.levels, **self.curves, **numbers}


def thermodynamics(filling: Filling, cases: Cases, picture: Path) -> dict[str, Any]:
    """Follows the members of the first case, prints and draws what was found, and returns it for metrics.json.

    Arguments:
        filling: What was filled.
        cases: The cases, of which the first counts.
        picture: Where the figure goes.
    """
    found = follow(filling, cases)
    chosen = np.unique(np.linspace(0, len(found.levels) - 1, LINES).astype(int)).tolist()
    rows = [{"level": found.levels[k]} | {name: found.curves[name][k] for name in SAID} for k in chosen]
    print(table(rows, ["level", *SAID]))
    print(f"in nats for each value of the field, the mean over the members; {sentence(found)}")
    figure_thermodynamics(picture, found.levels, found.curves, found.forward, found.reverse)
    return found.results()


def sentence(found: Thermodynamics) -> str:
    """Returns what the annealed paths say, in words."""
    numbers = found.numbers
    said = f"annealed paths: mean work {found.forward.mean():.3g} nats down, {found.reverse.mean():.3g} up"
    if not numbers["bar_samples"] >= ENOUGH:
        return f"{said}. The two do not overlap: BAR, Jarzynski and Crooks say nothing here. Give more sampler.steps"
    jarzynski, slope = (
        f"{numbers[name]:.3g} ({numbers[f'{name}_low']:.3g} to {numbers[f'{name}_high']:.3g}, 1 expected)"
        for name in ("jarzynski", "crooks")
    )
    return (
        f"{said}, free energy {numbers['bar']:.3g} +- {numbers['bar_error']:.2g} by BAR, 0 expected; Jarzynski "
        f"{jarzynski} of {numbers['effective_samples']:.2g} effective samples, Crooks {slope}"
    )


@torch.no_grad()
def follow(filling: Filling, cases: Cases) -> Thermodynamics:
    """Returns work and heat of the members of the first case, and the work of annealed paths."""
    compared = are_compared(filling.trained)
    config, denoiser, sampler = filling.config, filling.trained.denoiser, filling.method.sampler
    members = config["members"]
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    one = denoiser.diffusion.with_background(observation, filling.grid)[torch.zeros(members, dtype=torch.long)]
    bound = Bound(denoiser.in_float32(), one)
    seeds = [seeds_of(config["seed"], cases.noise_numbers[0], member) for member in range(members)]
    noise = member_noise(seeds, one.y.shape[1:], one.y)
    levels = denoiser.diffusion.levels(sampler.steps, sampler.schedule)
    ladder = levels.tolist()[:-1]
    with progress.bar(None, "evaluations", "thermodynamics") as bar_of_work:

        def watched(z: Tensor, s: Tensor) -> Tensor:
            bar_of_work.update(members)
            return bound(z, s)

        given = {"start": one.background, "return_trajectory": True, "valid": one.valid}
        _, states = sampler.sample(watched, levels, noise, **given)
        energies = energies_of(bound, watched, noise, compared)
        states = torch.where(one.valid, states, 0.0)
        path = along(energies, states[:-1], ladder)
        start = torch.where(one.valid, first_state(ladder[0], noise, one.background), 0.0)
        down = annealed(energies, start, ladder, inside(noise, one.valid)).work.sum(0).cpu().numpy()
        up = annealed(energies, states[-2], ladder[::-1], inside(noise, one.valid), reverse=True).work.sum(0)
    begun = states[0] if one.background is None else states[0] - one.background
    values = float(2 * total(one.valid)[0])
    square = total(torch.where(one.valid, begun, 0.0).double().square())
    first = square / (2 * ladder[0] ** 2) + values * math.log(2 * math.pi * ladder[0] ** 2) / 2
    return Thermodynamics(ladder, curves(path, first, values), down, up.cpu().numpy(), checks(down, up.cpu().numpy()))


def inside(noise: NoiseFunction, valid: Tensor) -> NoiseFunction:
    """Returns noise that is 0 outside the domain."""
    return lambda: torch.where(valid, noise(), 0.0)


def are_compared(trained: Trained) -> bool:
    """Returns whether the levels of a network's energy can be compared; prints a note where it has one without that."""
    learned = trained.config.get("loss", {}).get("dual", 0.0) > 0
    if trained.denoiser.has_energy and not learned:
        print(
            f"note: {trained.path} was trained without loss.dual, so that its energy has a free constant at each "
            "level: work and heat are those of its score"
        )
    return learned


def energies_of(bound: Bound, watched: BoundDenoiser, noise: NoiseFunction, compared: bool) -> Energies:
    """Returns differences of energy that a network knows: by its energy if levels are `compared`, else by score."""
    if bound.has_energy and compared:
        return ByEnergy(watched, bound.energy)
    valid = bound.observation.valid.expand_as(bound.observation.y)
    return ByScore(watched, tracer("hutchinson", valid, noise, 1), valid)


def curves(path: Followed, first: Tensor, values: float) -> dict[str, list[float]]:
    """Returns what paths have at each level, the mean over them, for each value of the field.

    The laws of all levels are normalised, so that F is 0 and the entropy the mean of U = -ln p; what the paths produce
    of it is their work.

    Arguments:
        path: Work and heat.
        first: U of the first states, `(M,)`.
        values: Values of a field.
    """
    none = torch.zeros_like(first)[None]
    work, heat = (torch.cat([none, part.cumsum(0)]).mean(dim=1) / values for part in (path.work, path.heat))
    energy = first.mean() / values + work + heat
    found = {"energy": energy, "entropy": energy, "work": work, "heat": heat, "entropy_production": work}
    listed = {name: [float(value) for value in curve] for name, curve in found.items()}
    return {"temperature": [s**2 for s in path.levels], **listed, "free_energy": [0.0] * len(path.levels)}


def checks(down: np.ndarray, up: np.ndarray) -> dict[str, float]:
    """Returns what follows from the work of annealed paths down `(M,)` and up `(M,)`, in nats."""
    difference, check, slope = bar(down, up), jarzynski(down, 0.0), crooks(down, up)
    return {
        "bar": difference.value,
        "bar_error": difference.error,
        "bar_samples": difference.samples,
        "jarzynski": check.value,
        "jarzynski_low": check.low,
        "jarzynski_high": check.high,
        "effective_samples": effective(-down),
        "crooks": slope.value,
        "crooks_low": slope.low,
        "crooks_high": slope.high,
    }

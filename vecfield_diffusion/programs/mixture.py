"""Several checkpoints as one prior (`infer.py ckpt=[a,b] weights=[.3,.7]`): each member is drawn by one of them.

The law is `sum_k w_k p_k(x | y)`. Without observations that is the mixture of the networks' laws, exactly. With
observations the weights of the mixture given y are `w_k p_k(y) / sum`, and `weights=evidence` finds p_k(y) from what
each network says of one field x that it draws (Chib, J. Amer. Statist. Assoc. 90, 1313, 1995):

    ln p(y) = ln p(x) - ln p(x | y) + ln p(y | x),

which holds for any x where both likelihoods, of the probability-flow ODE, are those of one law. Weights that are given
stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.axes import total
from vecfield_diffusion.ellipses import axes, is_known, turned
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.ensemble import member_seed, sample_ensemble
from vecfield_diffusion.inference.likelihood import nats_per_value
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.programs.trained import Trained
from vecfield_diffusion.samplers.base import Sampler


@dataclass(frozen=True)
class NetworkMixture:
    """Networks and their weights.

    Arguments:
        parts: The networks.
        weights: Before anything is observed; they sum to 1.
        evidence: Whether observations change them.
    """

    parts: Sequence[Trained]
    weights: Sequence[float]
    evidence: bool = False

    @classmethod
    def of(cls, parts: Sequence[Trained], weights: Sequence[float] | str | None) -> NetworkMixture:
        """Returns the mixture that `weights=` says: equal ones if None, or `evidence`.

        Raises:
            UserError: Weights that are none, or networks that cannot stand for one another.
        """
        check_alike(parts)
        given = [1.0] * len(parts) if weights is None or weights == "evidence" else list(weights)
        if len(given) != len(parts) or min(given) < 0 or not 0 < sum(given) < math.inf:
            raise UserError(f"weights={weights}: expected a number >= 0 for each of the {len(parts)} checkpoints")
        return cls(parts, [weight / sum(given) for weight in given], weights == "evidence")

    def shares(self, cases: Cases, sampler: Sampler, config: Mapping[str, Any]) -> Iterator[tuple[slice, list[range]]]:
        """Yields some of the cases, and the numbers of the members that each network draws of them.

        Arguments:
            cases: What is observed.
            sampler: Draws the fields that the evidence is found from.
                config: Says `members`, `seed`, `batch` and `likelihood_steps`.
        """
        if not self.evidence:
            yield slice(0, len(cases.y)), allotted(self.weights, config["members"], chance(config["seed"], 0))
            return
        found = torch.stack([log_evidence(part, cases, sampler, config) for part in self.parts])
        prior = torch.tensor(self.weights, dtype=torch.float64).log()[:, None]
        for place, weights in enumerate((prior + found).softmax(dim=0).T.tolist()):
            number = int(np.atleast_1d(cases.numbers[place])[0])
            print(f"snapshot {number}: weights by evidence " + ", ".join(f"{weight:.3g}" for weight in weights))
            yield slice(place, place + 1), allotted(weights, config["members"], chance(config["seed"], 1 + number))


def chance(seed: int, number: int) -> float:
    """Returns a number uniform in [0, 1) for each seed and number."""
    return np.random.default_rng(member_seed(seed, number, 0)).random()


def allotted(weights: Sequence[float], members: int, u: float) -> list[range]:
    """Returns the members that each weight draws: `members` times it in the mean over uniform u in [0, 1)."""
    ends = [math.floor(end * members + u) for end in np.cumsum(weights)[:-1].tolist()]
    bounds = [0, *ends, members]
    return [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]


def log_evidence(part: Trained, cases: Cases, sampler: Sampler, config: Mapping[str, Any]) -> Tensor:
    """Returns ln p(y) of the observed values of each case in nats, `(N,)` in float64; see the module."""
    denoiser, numbers = part.denoiser, cases.noise_numbers
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    options = dict(seed=config["seed"], numbers=numbers, batch=config["batch"])
    fields = sample_ensemble(denoiser, Method(sampler, Conditional()), observation, part.grid, members=1, **options)[0]
    levels = denoiser.diffusion.levels(config["likelihood_steps"], "log_snr")
    likelihoods = [
        nats_per_value(denoiser, fields, given, part.grid, levels=levels, mode="hutchinson", **options)
        for given in (observation.nothing(), observation)
    ]
    values = 2 * part.grid.valid.sum().cpu()
    angle, sigma = axes(cases.sigma_obs.double())
    # Single components are no condition of a network.
    known = (cases.observed & is_known(cases.sigma_obs).all(dim=-3, keepdim=True)).expand_as(fields)
    misfit = (turned(cases.y - fields, angle) / sigma).square() / 2 + sigma.log() + math.log(2 * math.pi) / 2
    prior, posterior = (values * likelihood.double() for likelihood in likelihoods)
    return prior - posterior - total(torch.where(known, misfit, 0.0))


def check_alike(parts: Sequence[Trained]) -> None:
    """Raises UserError where networks are not of fields of one kind and place."""
    first = parts[0]
    for part in parts:
        here = f"ckpt=[{first.path},{part.path}]"
        if not part.denoiser.diffusion.noisy:
            raise UserError(f"ckpt: {part.path} is a regression, which draws no fields: leave it out")
        if (part.units, part.frames, part.stride) != (first.units, first.frames, first.stride):
            raise UserError(f"{here}: a mixture takes networks of one dataset.frames, dataset.stride and unit")
        if part.context != first.context:
            raise UserError(f"{here}: a mixture takes networks of one dataset.context and dataset.history")
        if part.grid.shape != first.grid.shape or bool((part.grid.valid != first.grid.valid).any()):
            raise UserError(f"{here}: a mixture takes networks of one grid")


def check_options(config: Mapping[str, Any], mixture: NetworkMixture, method: Method) -> None:
    """Raises UserError where something is asked for that one network alone gives, or the evidence has no density."""
    for part in mixture.parts[1:]:
        method.check(part.denoiser.diffusion)
    for key, plain in (("likelihood", "none"), ("thermodynamics", False), ("calibrate", False)):
        if config[key] != plain:
            raise UserError(f"{key}={config[key]} is that of one network: give one ckpt=, or leave it out")
    if mixture.evidence and mixture.parts[0].frames > 1:
        raise UserError("weights=evidence takes networks of snapshots: give numbers, such as weights=[.5,.5]")
    if mixture.evidence and config["sensor"]:
        raise UserError("weights=evidence is that of velocities of single cells: use sensor=none, or give numbers")
    if mixture.evidence and config["sigma_obs"] == 0:
        raise UserError("weights=evidence: values observed without error have no density. Add sigma_obs=...")
    for part in mixture.parts if mixture.evidence else ():
        if part.config["trainer"]["condition_dropout"] == 0:
            raise UserError(
                f"weights=evidence: {part.path} was trained without trainer.condition_dropout and is no prior: give "
                "numbers, such as weights=[.5,.5]"
            )

"""What training minimises: the terms that a configuration gives a weight, with what each needs to know of the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vecfield_diffusion.axes import total
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.dual import check_dual, dual_loss
from vecfield_diffusion.diffusion.losses import Evaluated, Loss, Objective, Term, consistency, exact, sliced
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.waves import Waves
from vecfield_diffusion.physics.energetics import energy_budget, is_torus
from vecfield_diffusion.programs.in_time import step_of
from vecfield_diffusion.programs.training_data import TrainingData

#: Makes a term of the loss.
Maker = Callable[[Loss, TrainingData, Denoiser], Term]


def make_objective(loss: Loss, data: TrainingData, denoiser: Denoiser) -> Objective:
    """Returns what training minimises.

    Raises:
        UserError: A term that the data or the network cannot give.
    """
    weights = {name: weight for name, weight in loss.weights.items() if weight and name != "denoising"}
    if weights and not denoiser.diffusion.noisy:
        raise UserError(
            f"loss.{next(iter(weights))}: diffusion=regression sees no noisy fields and has no score. Take another "
            "diffusion, or loss.denoising alone"
        )
    terms = [(weight, MAKERS[name](loss, data, denoiser)) for name, weight in weights.items()]
    return Objective(loss.denoising, terms, differentiates=bool(weights.keys() & TWICE))


def sliced_term(loss: Loss, data: TrainingData, denoiser: Denoiser) -> Term:
    """Returns sliced score matching. Raises UserError for a network that is a derivative already."""
    if denoiser.has_energy:
        raise UserError(
            "loss.sliced differentiates the denoiser, and that of an energy is a derivative already: training would "
            "take a third one, which is not written (models/twice.py). Leave it out, or take a plain network, such as "
            "model=unet_small"
        )
    return sliced


def exact_term(loss: Loss, data: TrainingData, denoiser: Denoiser) -> Term:
    """Returns the squared error against the posterior mean of a Gaussian field. Raises UserError for other fields."""
    law = data.fields.law
    if law is None or law.spectrum is None or data.window is not None:
        raise UserError(
            "loss.exact takes fields whose score is known, whole Gaussian ones that are made here: add "
            "dataset.twin=true dataset.frames=1 window=null, or leave it out"
        )
    if data.normalizer.mean.any():
        raise UserError("loss.exact: the mean of these fields is known to be 0: add mean_field=false")
    field = Waves(law.spectrum() / data.normalizer.std.double().cpu() ** 2).to(denoiser.normalizer.std.device)

    def posterior(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        y, error = (torch.where(observation.observed, value, 0.0) for value in (observation.y, observation.error))
        return field(z, s, y, observation.observed, error, observation.valid)[0]

    return exact(posterior)


def dual_term(loss: Loss, data: TrainingData, denoiser: Denoiser) -> Term:
    """Returns dual score matching. Raises UserError for a network whose energy has no derivative by the level."""
    check_dual(denoiser)
    return lambda seen: dual_loss(seen.denoiser, seen.x0, seen.z, seen.s, seen.observation)


def consistency_term(loss: Loss, data: TrainingData, denoiser: Denoiser) -> Term:
    """Returns the derivative of the free energy. Raises UserError for a network without an energy."""
    if not denoiser.has_energy:
        raise UserError("loss.consistency is that of an energy, and this network has none: add model=energy")
    return consistency


def budget_term(loss: Loss, data: TrainingData, denoiser: Denoiser) -> Term:
    """Returns the energy budget of the estimate, for each value, over `1 + s^2`; sequences without gaps count.

    It is the square of what E changes by from frame to frame beyond the budget, over the variance of the data.

    Raises:
        UserError: Snapshots, fields that have borders, times without units, or a viscosity that is not known.
    """
    fields = data.fields
    if fields.frames == 1 or data.window is not None or not is_torus(fields.grid):
        raise UserError(
            "loss.budget takes sequences of whole periodic fields (dataset.frames=5 window=null): through borders the "
            "energy of a domain changes, too. Leave it out for others"
        )
    known = known_dynamics(loss, data)
    _, unit, seconds = step_of(fields)
    if seconds is None:
        raise UserError(f"loss.budget: the times of {fields.source} are in '{unit}', which is not known in seconds")
    grid, normalizer = fields.grid.to(denoiser.normalizer.std.device), denoiser.normalizer
    interval = seconds * fields.stride

    def budget(seen: Evaluated) -> Tensor:
        velocity = normalizer.denormalize(seen.x_hat)
        residual = energy_budget(velocity, grid, interval, forcing=loss.forcing, **known) / normalizer.std**2
        whole = total(~seen.measured) == 0
        return torch.where(whole, residual.square().mean(dim=1) / (1 + seen.s.square()), 0.0)

    return budget


def known_dynamics(loss: Loss, data: TrainingData) -> dict[str, float]:
    """Returns `viscosity` and `order`, those of generated flows where they are `auto`. Raises UserError."""
    law = data.fields.law
    given = {"viscosity": loss.viscosity, "order": loss.order}
    if "auto" in given.values() and (law is None or law.viscosity is None):
        raise UserError(
            f"loss.budget: nothing is known of the viscosity of {data.fields.source}: give loss.viscosity= in "
            "m^(2 order) s-1 and loss.order=, such as loss.viscosity=10 loss.order=1"
        )
    return {name: getattr(law, name) if value == "auto" else value for name, value in given.items()}


#: What makes each term; the denoising loss is always there.
MAKERS: dict[str, Maker] = {
    "sliced": sliced_term,
    "exact": exact_term,
    "dual": dual_term,
    "consistency": consistency_term,
    "budget": budget_term,
}
#: The terms that differentiate a denoiser of any network, which training then differentiates once more.
TWICE = {"sliced"}

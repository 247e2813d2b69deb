"""A method: all that decides how an ensemble is made of an observation, as one object.

A sampler walks the noise levels down, a way to condition makes its samples agree with the observation, physics adds
what is known beside, guidance changes the denoiser, and an observation operator says what the observed values are.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.cfg import Guidance, NoGuidance
from vecfield_diffusion.guidance.inpainting import Inpainting
from vecfield_diffusion.guidance.physics import NoPhysics
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.samplers.base import Sampler


@dataclass(frozen=True)
class Method:
    """How an ensemble is made.

    Arguments:
        sampler: Walks the noise levels down.
        inpainting: How samples are made to agree with the observation; None where that is left to `auto`.
        physics: What is known of the flow beside the observation.
        guidance: Of the denoiser itself.
        sensor: The observation operator; None for velocities of single cells.
        weak: What the checkpoint of a second network says, where the guidance has one (`programs/trained.Trained`).
    """

    sampler: Sampler
    inpainting: Inpainting | None
    physics: NoPhysics = NoPhysics()
    guidance: Guidance = NoGuidance()
    sensor: Sensor | None = None
    weak: Any = None

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the denoiser for each field; None where they are decided on the way."""
        sampler, repeats = self.sampler, 1 if self.inpainting is None else self.inpainting.repeats
        if sampler.evaluations is None or repeats == 1:
            return sampler.evaluations
        last = copy.copy(sampler)  # the last step is taken once
        last.steps = 1
        return repeats * (sampler.evaluations - last.evaluations) + last.evaluations

    @property
    def unguided(self) -> bool:
        """Whether nothing but the observed velocities enters: no physics, guidance or observation operator."""
        return self.guidance.plain and self.physics.plain and self.sensor is None

    @property
    def plain(self) -> bool:
        """Whether the network as it was trained makes the ensemble, alone."""
        return self.unguided and (self.inpainting is None or self.inpainting.plain)

    @property
    def _as_trained(self) -> bool:
        """Whether the network makes the ensemble alone, whatever is done to finished fields."""
        conditional = self.inpainting is None or self.inpainting.plain
        return conditional and self.guidance.plain and self.sensor is None and self.physics.mode in ("none", "hard")

    def check(self, diffusion: Diffusion) -> None:
        """Raises UserError where parts do not go with a formulation, or with each other."""
        check_path(diffusion)
        self._check_sampler(diffusion)
        if not diffusion.noisy and not self.plain:
            raise UserError(
                "diffusion=regression gives the mean alone: it goes with inpainting=conditional, physics=none, "
                "guidance=none and sensor=none"
            )
        if not diffusion.gives_mean and not self._as_trained:
            raise UserError(
                "a network of few steps (diffusion=consistency or crps) gives one field and not the mean E[x0 | x_t] "
                "that mmps, pigdm, dps, repaint, physics and guidance change: it goes with inpainting=conditional, "
                "physics=none or physics.mode=hard, guidance=none and sensor=none"
            )
        conditions = self.inpainting is None or self.inpainting.conditions
        if self.guidance.stresses_condition and (self.sensor is not None or not conditions):
            raise UserError(
                "guidance=cfg stresses the cells that the network is conditioned on: use sensor=none and "
                "inpainting=conditional, or inpainting=mmps inpainting.conditioned=true for physics and single "
                "components beside them"
            )
        if self.sensor is not None and self.physics.mode == "hard":
            raise UserError(
                "physics.mode=hard holds observed cells, which a sensor does not give: use physics.mode=rows"
            )
        if self.sensor is not None and not (self.inpainting is None or self.inpainting.takes_rows):
            raise UserError(
                f"sensor={self.sensor.name} needs inpainting=mmps or pigdm: the network was trained on velocities of "
                "single cells"
            )

    def _check_sampler(self, diffusion: Diffusion) -> None:
        """Raises UserError where the sampler does not go with the formulation or the way to condition."""
        sampler, inpainting = self.sampler, self.inpainting
        try:
            diffusion.levels(sampler.steps, sampler.schedule)
        except ValueError as error:
            raise UserError(
                f"sampler.{error}. Give fewer sampler.steps, or sampler.schedule=karras, where any go"
            ) from error
        if diffusion.gives_mean and not sampler.needs_mean:
            raise UserError(
                "sampler=consistency jumps to the end of a path, which a network gives that was tuned with "
                "experiment=consistency or trained with diffusion=crps. Use another sampler"
            )
        one_jump = sampler.evaluations == 1 and sampler.temperature == 1 and not sampler.differences
        if not diffusion.gives_mean and sampler.needs_mean and not one_jump:
            raise UserError(
                "a network of few steps (diffusion=consistency or crps) gives one field and not the mean E[x0 | x_t] "
                f"that this sampler builds on: use sampler=consistency sampler.steps={diffusion.most_steps or 2}"
            )
        if diffusion.most_steps is not None and (sampler.evaluations or math.inf) > diffusion.most_steps:
            raise UserError(
                f"diffusion=crps makes a field in one evaluation: use sampler.steps={diffusion.most_steps}, "
                f"got {sampler.steps}"
            )
        if sampler.needs_variance and not diffusion.learned_variance:
            raise UserError(
                "sampler.variance=learned needs a network that was trained with diffusion=iddpm "
                f"diffusion.learned_variance=true; {type(diffusion).__name__} knows small and large"
            )
        if sampler.needs_variance and not self.plain:
            raise UserError(
                "sampler.variance=learned goes with inpainting=conditional, physics=none and guidance=none alone: the "
                "others change the variance"
            )
        if not diffusion.noisy and (sampler.differences or sampler.temperature != 1):
            raise UserError(
                "diffusion=regression gives the mean alone, which no sampler changes: use sampler=dpmpp_2m and "
                "sampler.temperature=1"
            )
        if inpainting is None or not inpainting.changes_state:
            return
        if sampler.own_walk:
            raise UserError(
                f"{sampler.own_walk}: inpainting={inpainting.name} changes the states between its steps. Use another "
                "sampler, or inpainting=conditional"
            )
        if sampler.temperature != 1:
            raise UserError(
                f"sampler.temperature={sampler.temperature:g} is that of a denoiser, and inpainting={inpainting.name} "
                "changes the state beside it: use inpainting=conditional, mmps or pigdm"
            )


def check_path(diffusion: Diffusion) -> None:
    """Raises UserError where a path has no levels, or none that numbers can hold."""
    try:
        low, high = diffusion.sigma_min, diffusion.sigma_max
        if not 0 < low < high < 1e6:
            raise ValueError(
                f"the levels sigma / alpha must rise from above 0 to below 1e6, got {low:.3g} to {high:.3g}"
            )
        diffusion.time(torch.tensor([low, high], dtype=torch.float64))
    except ValueError as error:
        raise UserError(f"diffusion: {error}. Set diffusion.t_min and diffusion.t_max inside the path") from error

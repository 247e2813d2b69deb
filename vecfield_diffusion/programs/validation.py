"""The ensemble that training looks at now and then: the same validation cases, filled, scored and drawn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import MaskFunction
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Sequences
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.evaluation.plots import sample_grid
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.cases import Cases, make_cases, with_context
from vecfield_diffusion.inference.ensemble import sample_ensemble
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.windows import Windowed
from vecfield_diffusion.samplers.base import Sampler
from vecfield_diffusion.training.settings import Trainer

#: The scores that are kept.
SCORES = ("crps", "rmse_component", "spread_skill")


class Validation:
    """Fills the same validation cases at each call, scores their hidden cells and draws them, the first frames of
    sequences.

    Arguments:
        denoiser: The network as it is at the time of the call.
        fields: The data.
        indices: The validation snapshots, evenly spaced ones of which are filled.
        context: What the network is conditioned on beside the observation.
        trainer: How many cases and members.
        sampler: How they are drawn.
        mask: What is observed.
        config: The keys `seed` and `window` of `train.py`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        fields: Fields,
        indices: range,
        *,
        context: Context | None,
        trainer: Trainer,
        sampler: Sampler,
        mask: MaskFunction,
        config: Mapping[str, Any],
    ) -> None:
        seed, window = config["seed"], config["window"]
        samples = np.asarray(indices) if fields.frames == 1 else Sequences.of(fields, indices).indices
        count = min(trainer.score_cases, len(samples))
        spaced = sorted({i * len(samples) // trainer.score_cases for i in range(count)})
        # A mixture drawn along the whole run would be one of its masks.
        cases = make_cases(fields, samples[spaced], mask, seed=seed, along=False)
        self.cases = with_context(cases, fields, context, denoiser.normalizer, seed=seed, past=mask, twin=True)
        self.denoiser = denoiser if window is None else Windowed(denoiser, tuple(window), 0.25, fields.grid.periodic)
        self.device = next(denoiser.parameters()).device
        self.fields, self.sampler, self.members, self.seed = fields, sampler, trainer.score_members, seed

    def __call__(self, picture: Path | None) -> dict[str, float]:
        """Returns the scores as `val/<name>`; a picture that cannot be written is no reason to end a run.

        None draws none.
        """
        cases, grid = self.cases, self.fields.grid
        observation = cases.observation(self.denoiser.normalizer, self.device)
        fields = self.members * len(cases.truth)
        total = None if self.sampler.evaluations is None else fields * self.sampler.evaluations
        with progress.bar(total, "evaluations", "validation", leave=False) as bar:
            members = sample_ensemble(
                self.denoiser,
                Method(self.sampler, Conditional()),
                observation,
                grid,
                members=self.members,
                seed=self.seed,
                numbers=cases.noise_numbers,
                progress=bar.update,
            )
        everything = torch.ones(cases.observed.shape[:-3], dtype=torch.bool)
        members, cases = members[:, everything], cases.snapshots(everything)
        if picture is not None:
            self.draw(picture, cases, members)
        values = scores(members, cases.truth, cases.hidden)
        return {f"val/{name}": values[name] for name in SCORES}

    def draw(self, picture: Path, cases: Cases, members: Tensor) -> None:
        """Draws the first frames of cases and of their members `(M, N, 2, H, W)`."""
        shown = slice(None, None, self.fields.frames)
        truth, observed = cases.truth[shown], cases.observed[shown]
        try:
            sample_grid(picture, truth, observed, members[:, shown], self.fields.grid, self.fields.units)
        except OSError as error:
            picture.unlink(missing_ok=True)
            print(f"note: {picture} could not be written: {error.strerror}", file=sys.stderr)

"""The training of networks that make a field in few evaluations."""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.few_steps import FewSteps
from vecfield_diffusion.diffusion.losses import Penalty
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.training.batches import Batch
from vecfield_diffusion.training.trainer import TrainingRun


class FewStepRun(TrainingRun):
    """A run whose loss is that of its formulation, and whose validation loss is the fair CRPS of one evaluation.

    That is a proper score of what comes out and the same through a run, while the loss of consistency tuning changes
    with the levels that it compares.

    The members of a sample are made of its own noise and of that of the samples before it in the batch.

    Raises:
        UserError: A batch with fewer samples than members.
    """

    gated = None  # a factor by noise level is one on a mean

    def __post_init__(self) -> None:
        super().__post_init__()
        size, members = self.trainer.batch_size, self.diffusion.members
        if size < members:
            raise UserError(
                f"trainer.batch_size={size}: a batch has at least {members} samples, each lends its noise to the "
                "members of the others"
            )

    @property
    def diffusion(self) -> FewSteps:
        """The formulation."""
        return self.denoiser.diffusion

    def loss(self, batch: Batch, training: bool = False, penalty: Penalty | None = None) -> Tensor:
        """Returns the loss of every sample of a batch, `(B,)`."""
        known = (batch.x0, batch.measured, batch.observation, batch.t, batch.lent(self.diffusion.members))
        loss, field = self.diffusion.loss(self.denoiser, *known, progress=self.trainer.progress(self.counters))
        return loss if penalty is None else loss + penalty(field, torch.zeros_like(loss))

    @torch.no_grad()
    def validation_loss(self) -> dict[str, float]:
        """Returns the fair CRPS of members made in one evaluation, over the validation batches, the same each time."""
        scores = []
        for k in range(self.trainer.validation_batches):
            batch = self.validation(k).to(self.device)
            known = (batch.x0, batch.measured, batch.observation, batch.lent(self.diffusion.members))
            scores.append(self.diffusion.score(self.denoiser, *known)[0])
        return {"val/loss": torch.cat(scores).mean().item()}

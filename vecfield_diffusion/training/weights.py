"""What a step of training changes, as checkpoints hold it: weights, their average, the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.training.distributed import SingleProcess
from vecfield_diffusion.training.ema import EMA


class Weights:
    """The weights of a denoiser, their average, and the optimizer, laid out over the processes of a training.

    Arguments:
        denoiser: What is trained.
        optimizer: Of its parameters.
        half_life: That of the average; see `EMA`.
        processes: Those that train it.
    """

    def __init__(
        self, denoiser: Denoiser, optimizer: torch.optim.Optimizer, half_life: float, processes: SingleProcess
    ) -> None:
        self.denoiser, self.optimizer, self.processes, self.half_life = denoiser, optimizer, processes, half_life
        self.ema = self._average()

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it, weights whole: the processes take part together."""
        state = {
            "network": self.denoiser.network.state_dict(),
            "diffusion": self.denoiser.diffusion.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return self.processes.whole(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes all of it from a checkpoint, of however many processes.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, RuntimeError: A state of another network or optimizer.
        """
        network, diffusion, processes = self.denoiser.network, self.denoiser.diffusion, self.processes
        network.load_state_dict(processes.parts(state["network"], network.state_dict()))
        diffusion.load_state_dict(processes.parts(state.get("diffusion", {}), diffusion.state_dict()))
        # Of what a run of an older version did not average, the average is what its network has.
        self.ema = self._average()
        self.ema.load_state_dict(processes.parts(state["ema"], self.ema.state_dict()))
        self.optimizer.load_state_dict(processes.optimizer_parts(state["optimizer"], self.optimizer))

    def _average(self) -> EMA:
        """Returns an average that begins with the weights as they are."""
        return EMA(self.denoiser.network, self.half_life, local=self.processes.local)

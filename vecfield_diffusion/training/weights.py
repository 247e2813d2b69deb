"""What a step of training changes, as checkpoints hold it: weights, their average, the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


class Means:
    """The running means of a network in one step: the same in whatever parts a batch is worked on.

    Each part begins with the means of before; they become the mean over the parts and the processes, as what a batch
    changes in them is linear in what is averaged (`Parametrization.tracked`).

    Arguments:
        tracked: The means, which the parts change in place.
    """

    def __init__(self, tracked: Sequence[Tensor]) -> None:
        self.tracked = tracked
        self.before = [mean.clone() for mean in tracked]
        self.found: list[list[Tensor]] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Within the block a part of the batch is worked on."""
        for mean, before in zip(self.tracked, self.before, strict=True):
            mean.copy_(before)
        yield
        self.found.append([mean.clone() for mean in self.tracked])

    def take(self, processes: SingleProcess) -> None:
        """Ends the step."""
        for mean, found in zip(self.tracked, zip(*self.found, strict=True), strict=True):
            mean.copy_(processes.mean(torch.stack(found).mean(dim=0)))

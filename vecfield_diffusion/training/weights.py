"""What a step of training changes, as checkpoints hold it: weights, their average, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.training.distributed import SingleProcess
from vecfield_diffusion.training.ema import EMA

#: How the tensors of an optimizer begin in names.
MOMENTS = "moments"


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

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name, each as this process keeps it; those of the optimizer by the weight's number."""
        return self._named(self.optimizer.state_dict()["state"])

    def groups(self) -> list[dict[str, Any]]:
        """Returns what the optimizer keeps beside tensors."""
        return self.optimizer.state_dict()["param_groups"]

    def fill(
        self, kept: Mapping[str, Tensor], groups: list[dict[str, Any]], read: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """Takes all tensors from a checkpoint, each as this process keeps it.

        Arguments:
            kept: Tensors of the shapes and types of those in the checkpoint, by name.
            groups: What the optimizer keeps beside them.
            read: Writes the values of the checkpoint into tensors.

        Raises:
            LookupError, ValueError: They are those of another network or optimizer.
        """
        self.ema = self._average()
        weights = [weight.detach() for group in self.optimizer.param_groups for weight in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in kept.items():
            part, _, rest = name.partition(".")
            if part == MOMENTS:
                number, _, kind = rest.partition(".")
                moments.setdefault(int(number), {})[kind] = _room(value, weights[int(number)])
        tensors = self._named(moments)
        if apart := sorted(kept.keys() ^ tensors.keys()):
            raise ValueError(f"{apart[0]} is in one of the two alone")
        read(tensors)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _named(self, moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the tensors of the network, the formulation and the average, and the given moments, by name."""
        modules = {"network": self.denoiser.network, "diffusion": self.denoiser.diffusion}
        parts = {name: module.state_dict() for name, module in modules.items()} | {"ema": self.ema.state_dict()}
        parts |= {f"{MOMENTS}.{number}": kept for number, kept in moments.items()}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def _average(self) -> EMA:
        """Returns an average that begins with the weights as they are."""
        return EMA(self.denoiser.network, self.half_life, local=self.processes.local)


def _room(value: Tensor, weight: Tensor) -> Tensor:
    """Returns room for a moment of a weight: laid out as the weight is where it has its shape."""
    alike = value.shape == weight.shape
    return torch.zeros_like(weight, dtype=value.dtype) if alike else torch.zeros(value.shape, dtype=value.dtype)


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

"""What one step of training asks of the processes that take it together.

Each of N processes takes its share of every batch: sample k of a batch, its noise and its mask are the same whatever
N is. The gradient is the mean over all shares, so that all processes take the same step of the optimizer, and the loss
is that of one process up to rounding (and to dropout, which differs between samples anyway). The first process decides
what depends on the clock, and writes; all others follow.

`SingleProcess` is a process by itself: every method gives back what it is given, and no result changes by a bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.losses import Penalty
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.ranks import local_rank
from vecfield_diffusion.training.batches import Batch

#: The loss of every sample of a batch, `(batch, training, penalty) -> (B,)`.
Loss = Callable[..., Tensor]


class LossOf(nn.Module):
    """A loss of a denoiser as a module: what is wrapped to be worked on by many.

    Arguments:
        denoiser: The denoiser.
        loss: `(batch, training, penalty) -> (B,)`.
    """

    def __init__(self, denoiser: Denoiser, loss: Loss) -> None:
        super().__init__()
        self.denoiser, self.loss = denoiser, loss

    def forward(self, batch: Batch, training: bool = False, penalty: Penalty | None = None) -> Tensor:
        """Returns the loss of every sample, `(B,)`."""
        return self.loss(batch, training=training, penalty=penalty)


class SingleProcess:
    """A process by itself.

    Attributes:
        rank: Its number.
        count: How many there are.
        sharded: Whether each keeps but a part of the weights.
    """

    rank, count = 0, 1
    sharded = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Returns the device of this process, of the kind of `device`."""
        return device

    def check(self, batch_size: int, accumulate: int) -> None:
        """Raises UserError where the samples of a batch cannot be shared out evenly."""
        if batch_size % (accumulate * self.count):
            parts = f"{self.count} processes" + f" times trainer.accumulate={accumulate}" * (accumulate > 1)
            raise UserError(
                f"trainer.batch_size={batch_size} is no multiple of {parts}. Give one that is, such as "
                f"trainer.batch_size={-(-batch_size // (accumulate * self.count)) * accumulate * self.count}"
            )

    def distribute(self, denoiser: Denoiser) -> None:
        """Lays the weights out over the processes, before an optimizer is made for them."""

    def module(self, denoiser: Denoiser, loss: Loss) -> nn.Module:
        """Returns a loss whose gradient is the mean over all processes; see `LossOf`."""
        return LossOf(denoiser, loss)

    def own(self, samples: int) -> slice:
        """Returns the share of this process in the samples of a batch."""
        return slice(samples)

    def share(self, batches: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """Returns what gives this process its share of batch k."""
        return batches

    def seed(self, step: int) -> int:
        """Returns the seed of the dropout of a step."""
        return step

    def gathering(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Within the block gradients add up; they are averaged over the processes in the `last` part of a step."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of a tensor over the processes."""
        return value

    def agreed(self, minutes: float, due: bool, signal: int | None) -> tuple[float, bool]:
        """Returns the minutes of training and whether a checkpoint is due, as the first process has them.

        `signal` is what this process was sent, for `heard`.
        """
        return minutes, due

    def heard(self, signal: int | None) -> int | None:
        """Returns the signal that any process was sent, the same at all of them; `signal` is that of this one."""
        return signal

    def told(self, value: Any) -> Any:
        """Returns what the first process gives: plain values and tensors."""
        return value

    def local(self, weight: Tensor) -> Tensor:
        """Returns the part of a weight that this process keeps, without a copy."""
        return weight

    def whole(self, state: Any) -> Any:
        """Returns a state, or a tensor, with every weight whole."""
        return state

    def parts(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the weights of a checkpoint laid out as those of the same name in `like`."""
        return state

    def optimizer_parts(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
        """Returns the state of an optimizer from a checkpoint laid out as its weights are."""
        return state


class DataParallel(SingleProcess):
    """One of N processes, each of which has all weights (DistributedDataParallel). The process group is there."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._signal = 0

    def device(self, device: torch.device) -> torch.device:
        """See `SingleProcess`; the GPU with the number of the process on its machine. Raises UserError for no such."""
        if device.type != "cuda":
            return device
        number, there = local_rank(), torch.cuda.device_count()
        if number >= there:
            raise UserError(f"process {number + 1} of this machine has no GPU: there are {there}. Start so many")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    def module(self, denoiser: Denoiser, loss: Loss) -> nn.Module:
        """See `SingleProcess`."""
        with warnings.catch_warnings():
            # What batches change beside the weights is averaged by itself: see `TrainingRun.step`. Newer versions of
            # torch call the option otherwise, older ones know no other name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(LossOf(denoiser, loss), broadcast_buffers=False)

    def own(self, samples: int) -> slice:
        """See `SingleProcess`."""
        size = samples // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def share(self, batches: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """See `SingleProcess`."""

        def share(k: int) -> Batch:
            batch = batches(k)
            return batch[self.own(len(batch.x0))]

        return share

    def seed(self, step: int) -> int:
        """See `SingleProcess`; other samples have another dropout."""
        return step * self.count + self.rank

    def gathering(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See `SingleProcess`."""
        return nullcontext() if last else module.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """See `SingleProcess`."""
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.count

    def agreed(self, minutes: float, due: bool, signal: int | None) -> tuple[float, bool]:
        """See `SingleProcess`. On the CPU: no GPU is waited for."""
        own = [minutes, float(due)] if self.first else [0.0, 0.0]
        numbers = torch.tensor([*own, float(signal or 0)], dtype=torch.float64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        minutes, due, heard = numbers.tolist()
        self._signal = int(heard)
        return minutes, bool(due)

    def heard(self, signal: int | None) -> int | None:
        """See `SingleProcess`; as of the last `agreed`."""
        return self._signal or None

    def told(self, value: Any) -> Any:
        """See `SingleProcess`."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

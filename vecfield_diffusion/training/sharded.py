"""Training with the weights, their gradients, moments and averages shared out over the processes (FSDP2).

A checkpoint holds the whole weights, as that of one process does, and inference reads it; what is saved on the way is
in parts (`run_state.py`). Any number of processes goes on from either. Module by module the weights come together for a
forward or backward pass and are let go again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.training.distributed import DataParallel, Loss, LossOf


class ShardedDataParallel(DataParallel):
    """One of N processes, each of which keeps a part of all weights."""

    sharded = True

    def distribute(self, denoiser: Denoiser) -> None:
        """See `SingleProcess`. All begin with the weights of the first process."""
        for value in (*denoiser.parameters(), *denoiser.buffers()):
            dist.broadcast(value.detach(), src=0)
        for weight in denoiser.parameters():
            weight.data = weight.data.contiguous()  # parts are cut off along the first axis
        # A network may end by cutting off what it padded; nothing here changes that view in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(next(denoiser.parameters()).device.type, (self.count,))
        for module in units(denoiser):
            fully_shard(module, mesh=mesh)
        if denoiser.parametrization.predicts_mean:
            register_fsdp_forward_method(denoiser.network, "mean")

    def module(self, denoiser: Denoiser, loss: Loss) -> nn.Module:
        """See `SingleProcess`."""
        return LossOf(denoiser, loss)

    def gathering(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See `SingleProcess`. Whole gradients would take the memory that is to be saved."""
        return nullcontext()

    def local(self, weight: Tensor) -> Tensor:
        """See `SingleProcess`."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def whole(self, state: Any) -> Any:
        """See `SingleProcess`. All processes take part."""
        if isinstance(state, Mapping):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.whole(value) for value in state)
        return state.full_tensor() if isinstance(state, DTensor) else state

    def parts(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `SingleProcess`."""
        return {name: laid_out(value, like.get(name)) for name, value in state.items()}

    def optimizer_parts(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
        """See `SingleProcess`."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = {
            number: {name: laid_out(value, weights[number]) for name, value in kept.items()}
            for number, kept in state["state"].items()
        }
        return {**state, "state": moments}


def laid_out(value: Any, like: Tensor | None) -> Any:
    """Returns a tensor laid out over the processes as a weight of the same shape is; anything else as it is."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def units(denoiser: Denoiser) -> Iterator[nn.Module]:
    """Yields the modules whose weights come together at once, inner ones first.

    They are the blocks of the network, the rest of it, and what a formulation learns.
    """
    for root in (denoiser.network, *denoiser.diffusion.children()):
        lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
        blocks = [block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList)]
        yield from (module for module in (*reversed(blocks), root) if any(True for _ in module.parameters()))

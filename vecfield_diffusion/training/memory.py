"""Whether a step of training fits into the memory of the machine, and what would."""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.memory import available, readable
from vecfield_diffusion.training.batches import Batch

#: What a step takes beside what is kept for the gradient, as a share of it: gradients on their way back.
BESIDE = 0.3


def check_memory(denoiser: Denoiser, batch: Batch, accumulate: int) -> None:
    """Tries one sample of a batch on a CPU, and refuses a step that needs more memory than is left.

    Raises:
        UserError: The step does not fit; the message says which would.
    """
    left = available()
    if batch.x0.device.type != "cpu" or left is None:
        return
    sample = kept_bytes(denoiser, batch[:1])
    weights = 3 * sum(weight.nbytes for weight in denoiser.parameters())  # their gradient and two moments
    fits = int((left - weights) / ((1 + BESIDE) * max(sample, 1)))
    size = len(batch.x0) // accumulate
    if size > fits:
        need = readable(weights + (1 + BESIDE) * size * sample)
        raise UserError(
            f"a step of {size} samples needs about {need} of memory, {readable(left)} are free. "
            + advice(len(batch.x0), accumulate, fits)
        )


def kept_bytes(denoiser: Denoiser, batch: Batch) -> int:
    """Returns the bytes that the loss of a batch keeps for its gradient, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in denoiser.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = denoising_loss(denoiser, batch.x0, batch.measured, batch.observation, batch.t, batch.noise)
    return sum(kept.values()) if loss.requires_grad else 0


def advice(batch_size: int, accumulate: int, fits: int) -> str:
    """Returns what to set so that at most `fits` samples are worked on at once."""
    parts = [n for n in range(accumulate + 1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= fits]
    if parts:
        return f"Use trainer.accumulate={parts[0]}: {batch_size // parts[0]} at once fit, and the batch stays the same"
    if fits >= 1:
        return f"Use trainer.batch_size={fits}"
    return "Not even one sample fits: use a smaller network, window=[32,32] or so, or a machine with more memory"


def out_of_memory(batch_size: int, accumulate: int, device: torch.device) -> str:
    """Returns what to say where memory was refused in the middle of a step."""
    half = max(1, batch_size // accumulate // 2)
    place = "the GPU's memory" if device.type == "cuda" else "the memory"
    return f"{place} is full. {advice(batch_size, accumulate, half)}"

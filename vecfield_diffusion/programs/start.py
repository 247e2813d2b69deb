"""Where the weights of a new run come from: a network that was trained before, or chance."""

from __future__ import annotations

import torch

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.unet import load_snapshots
from vecfield_diffusion.programs.trained import Trained, load_trained

#: Weights that are not those of the network: what is learnt from the data of each run anew.
LEARNT = ("field.", "gating.")


def begin_from(denoiser: Denoiser, frames: int, start: str, device: torch.device) -> None:
    """Gives a network the averaged weights of another, of as many frames or of snapshots, and prints so.

    Layers along time that one of snapshots lacks stay what they begin as: they change nothing, so that each frame is
    estimated as a snapshot. The Gaussian field of `model=gaussian` and its gate are those of the new run.

    Arguments:
        denoiser: With fresh weights, before it has learnt from its data.
        frames: Those of its sequences; 1 for snapshots.
        start: A run folder, a checkpoint file or a shipped name.
        device: Where the denoiser is.

    Raises:
        UserError: No checkpoint there, or one of another kind or size.
    """
    trained = load_trained(start, device)
    check_alike(denoiser, frames, trained, start)
    network, weights = denoiser.network, trained.denoiser.network.state_dict()
    state = {name: value for name, value in network.state_dict().items() if name.startswith(LEARNT)}
    state |= {name: value for name, value in weights.items() if not name.startswith(LEARNT)}
    alike = trained.frames == frames
    try:
        if alike:
            network.load_state_dict(state)
        else:
            load_snapshots(network, state)
    except ValueError as error:
        raise UserError(f"start={start}: {error}") from error
    except RuntimeError as error:  # of torch, about each weight
        own = " ".join(f"model.{key}={value}" for key, value in trained.config["model"].items() if key != "_target_")
        raise UserError(
            f"start={start}: its network has other sizes, or other channels of input. It was trained with "
            f"{own.replace(', ', ',')}"
        ) from error
    way = "" if alike else ", each frame as a snapshot"
    print(f"begins with the weights of {trained.path} (step {trained.step}){way}")


def check_alike(denoiser: Denoiser, frames: int, trained: Trained, start: str) -> None:
    """Raises UserError where a network has other frames, or is of another kind, than the one that begins with it."""
    if trained.frames not in (1, frames):
        raise UserError(
            f"start={start}: it was trained on sequences of {trained.frames} frames. "
            f"Give dataset.frames={trained.frames}, or a network of snapshots"
        )
    for key, ours, theirs in (
        ("model", denoiser.network, trained.denoiser.network),
        ("diffusion", denoiser.diffusion, trained.denoiser.diffusion),
    ):
        if type(ours) is not type(theirs):
            known = type(theirs).__name__
            raise UserError(
                f"start={start}: it was trained with another {key}=, {known} and not {type(ours).__name__}. Give the "
                "same options as that run"
            )

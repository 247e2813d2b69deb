"""A trained network that another training goes on from: its data, its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vecfield_diffusion.config.build import named_files, resolve
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.gate import Gate
from vecfield_diffusion.programs.trained import Trained, load_trained

#: What is taken from the teacher, beside its weights and its formulation.
TAKEN = ("dataset", "splits", "window", "mean_field", "augment", "mask", "model")


def load_teacher(config: Mapping[str, Any], diffusion: Diffusion, device: torch.device) -> Trained | None:
    """Returns the network that `ckpt=` names; None for a training that begins by chance.

    Raises:
        UserError: No such network, one that cannot be tuned, or a formulation that tunes none or cannot do without.
    """
    ckpt = config["ckpt"]
    if ckpt is None and diffusion.tunes:
        raise UserError("diffusion=consistency tunes a trained network: give ckpt=outputs/train/RUN")
    if ckpt is None:
        return None
    if diffusion.gives_mean:
        raise UserError(
            f"ckpt={ckpt}: a trained network is tuned with experiment=consistency or experiment=crps. To go on with a "
            "run, give its name=; to begin a network of sequences with one of snapshots, start="
        )
    trained = load_trained(ckpt, device)
    if not (trained.denoiser.diffusion.gives_mean and trained.denoiser.diffusion.noisy):
        raise UserError(f"ckpt={ckpt}: expected a diffusion model, got diffusion={trained.config['diffusion']!r:.80}")
    return trained


def of_teacher(config: Mapping[str, Any], diffusion: Diffusion, teacher: Trained) -> dict[str, Any]:
    """Returns the configuration with the data, the masks, the network and the formulation of the teacher.

    Raises:
        UserError: They name what no checkpoint may name.
    """
    taken = {key: teacher.config[key] for key in TAKEN if key in teacher.config}
    if config["dataset"].get("path") is not None:  # where the data lie now
        taken["dataset"] = config["dataset"]
    elif strange := set(named_files(taken)) - {*teacher.files, *named_files(config)}:
        raise UserError(f"ckpt={config['ckpt']} was trained on {min(strange)}: say where it lies, dataset.path=FILE")
    for name in targets({key: node for key, node in taken.items() if node is not config.get(key)}):
        resolve(name, trust=teacher.trust)
    path = {"formulation": teacher.config["diffusion"]} if diffusion.tunes else {}
    return {**config, **taken, "diffusion": {**config["diffusion"], **path}}


def targets(node: Any) -> Iterator[str]:
    """Yields the classes that a configuration names."""
    if isinstance(node, list | tuple):
        yield from (name for entry in node for name in targets(entry))
    if isinstance(node, Mapping):
        yield from ([node["_target_"]] if "_target_" in node else [])
        yield from (name for entry in node.values() for name in targets(entry))


def tune_from(denoiser: Denoiser, teacher: Trained, begins: bool) -> None:
    """Gives a network the averaged weights of its teacher, and says so where a run `begins`.

    Raises:
        UserError: Weights of other sizes: the data have other context.
    """
    state = teacher.denoiser.network.state_dict()
    try:
        denoiser.network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"ckpt={teacher.path} does not fit these data ({' '.join(str(error).split())})") from error
    gate = denoiser.parametrization.gate
    if gate is not None:  # a network must be heard at all levels to make a field at each
        gate.load_state_dict(Gate().state_dict())
    if begins:
        print(f"begins with the weights of {teacher.path} (step {teacher.step})")

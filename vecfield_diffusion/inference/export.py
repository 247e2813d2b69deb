"""A trained network in one file, to be shipped: its weights, or a program that runs without this package.

Weights are a safetensors file. A checkpoint is a tree of tensors and plain values:

    tensors     ema/<weight>, mean, grid/valid, ...     as they are, the averaged weights also in float16
    metadata    config, data, grid, statistics, ...     JSON, where `{"tensor": NAME}` stands for a tensor; beside them
                                                        format, version and a check sum of all

What only resuming needs (optimizer, weights that are not averaged) stays behind. `load_weights` gives back the rest,
tensor for tensor.

A program is the denoiser as torch.export sees it: D(z, s, y, observed, sigma_y, valid) in float32, any batch, one size
of field. What one must know to use it travels inside the file as JSON, `PROGRAM_FILE`.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.axes import column
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid

FORMAT = "vecfield-weights"
VERSION = 1
#: What of a checkpoint is not shipped: marks of the file itself, and what only resuming needs.
LEFT = ("format", "version", "network", "optimizer", "losses")
MARK = "tensor"
#: The ending of files of weights.
SHIPPED = ".safetensors"
PROGRAM_FILE = "vecfield.json"
STEPS = 32
REFUSED = "format=program: this network cannot be exported"

CONVENTIONS = [
    "D(z, s, y, observed, sigma_y, valid) is the mean of the clean field x0, given z = x0 + s * noise and y.",
    "x = (velocity - mean) / std. Channel 0 is u, along x (last axis); channel 1 is v, along y (last but one).",
    "observed and valid are boolean, True = measured and True = inside; y may be anything where not observed.",
    "sigma_y is the standard deviation of the error of y, normalised. No cell observed: samples of the prior.",
    "levels fall from the largest to 0. A sample: z = levels[0] * noise, then for s, r in pairs of levels",
    "    z = d + (r / s) * (z - d),  d = D(z, s, ...)    (Euler; DPM-Solver++(2M) on the same levels is better)",
    "dx and dy are the spacing of each row in metres; dy is negative where rows run southward.",
]
#: With T frames in place of `...` for a network of sequences.
INPUTS = {
    "z": "float32 (B, ...2, H, W)",
    "s": "float32 (B,)",
    "y": "float32 (B, ...2, H, W)",
    "observed": "bool (B, ...1, H, W)",
    "sigma_y": "float32 (B, ...1, H, W)",
    "valid": "bool (B, ...1, H, W)",
}


# Weights.


def save_weights(path: Path, state: Mapping[str, Any], dtype: Literal["float32", "float16"] = "float32") -> None:
    """Writes what inference needs of the state of a checkpoint to a safetensors file, whole or not at all.

    Arguments:
        path: The file to write.
        state: What `load_checkpoint` gives.
        dtype: What the weights of the network are stored in; float16 halves the file.

    Raises:
        UserError: A weight is too large for float16.
    """
    tensors: dict[str, Tensor] = {}
    plain = {key: _parted(value, key, tensors) for key, value in state.items() if key not in LEFT}
    metadata = {key: json.dumps(value) for key, value in plain.items()}
    if dtype == "float16":
        tensors = {name: _halved(name, tensor) for name, tensor in tensors.items()}
    metadata |= {"format": FORMAT, "version": str(VERSION)}
    metadata["sha256"] = _digest(tensors, metadata)
    _write(path, save(tensors, metadata))


def load_weights(path: Path) -> dict[str, Any]:
    """Returns the state of a checkpoint as `save_weights` wrote it, weights in float32.

    Raises:
        UserError: No such file, one that is damaged, or one of another program or version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no file there. Give one that export.py wrote, from=FILE.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Copy it again") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: a safetensors file of another program. Give one that export.py wrote")
    if metadata.get("version") != str(VERSION):
        raise UserError(f"{path}: version {metadata.get('version')}, but this program reads version {VERSION}")
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise UserError(f"{path}: damaged, its contents do not match their check sum. Copy it again")
    tensors = {name: _restored(name, tensor) for name, tensor in tensors.items()}
    try:
        plain = {key: json.loads(text) for key, text in metadata.items() if key not in LEFT}
        return {key: _joined(value, tensors) for key, value in plain.items()}
    except (ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error!r}). Export the run again") from error


def amend_weights(path: Path, key: str, value: Any) -> None:
    """Puts a plain value into a file of weights that `load_weights` can read; the tensors stay bit for bit."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {name: text for name, text in metadata.items() if name != "sha256"} | {key: json.dumps(value)}
    metadata["sha256"] = _digest(tensors, metadata)
    _write(path, save(tensors, metadata))


def _parted(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a tree in which marks stand for tensors, which are gathered in `tensors` under their paths."""
    if isinstance(node, Tensor):
        tensors[path] = node.detach().contiguous()
        return {MARK: path}
    if isinstance(node, Mapping):
        return {key: _parted(value, f"{path}/{key}", tensors) for key, value in node.items()}
    return node


def _joined(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the inverse of `_parted`."""
    if not isinstance(node, dict):
        return node
    if node.keys() == {MARK} and isinstance(node[MARK], str):
        return tensors[node[MARK]]
    return {key: _joined(value, tensors) for key, value in node.items()}


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not (name.startswith("ema/") and tensor.dtype == torch.float32):
        return tensor
    half = tensor.half()
    if not torch.equal(half.isfinite(), tensor.isfinite()):
        raise UserError(f"dtype=float16: the weight {name.removeprefix('ema/')} is too large for it. Use dtype=float32")
    return half


def _restored(name: str, tensor: Tensor) -> Tensor:
    return tensor.float() if name.startswith("ema/") and tensor.dtype == torch.float16 else tensor


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256 of all names and contents; safetensors has no check sum of its own."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(contents)


# Programs.


class _Program(nn.Module):
    """The denoiser with tensors for arguments."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, sigma_y: Tensor, valid: Tensor) -> Tensor:
        return self.denoiser(z, s, Observation(y, observed, sigma_y, valid))


def save_program(path: Path, denoiser: Denoiser, grid: Grid, units: str = "m s-1", frames: int = 1) -> None:
    """Writes the denoiser as a program of torch.export (`.pt2`), whole or not at all.

    It is compared with the denoiser at three noise levels before it is written.

    Arguments:
        path: The file to write.
        denoiser: The denoiser, on the CPU.
        grid: The grid that it was trained on.
        units: The units of the velocity.
        frames: The frames of the sequences that it was trained on.

    Raises:
        UserError: The formulation needs more than the observation, or the denoiser cannot be exported.
    """
    if not denoiser.parametrization.traceable:
        raise UserError(
            "format=program: model=gaussian solves a system of its own for each observation, which no program holds. "
            "Use format=safetensors"
        )
    if denoiser.has_energy:
        raise UserError(
            "format=program: a network with an energy is differentiated at each evaluation, which no program holds. "
            "Use format=safetensors"
        )
    if denoiser.diffusion.coupled:
        raise UserError(
            f"format=program: {type(denoiser.diffusion).__name__} starts from a first guess, which is no part of the "
            "network. Use format=safetensors"
        )
    # A copy in the plain order of memory, which is the only one that the file keeps.
    module = _Program(copy.deepcopy(denoiser.in_float32())).to(memory_format=torch.contiguous_format).eval()
    exported = _export(module, grid, frames)
    for graph in exported.graph_module.modules():
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
    for name, value in exported.constants.items():  # whole tensors, not views of larger ones
        exported.constants[name] = value.clone() if isinstance(value, Tensor) else value
    buffer, about = io.BytesIO(), json.dumps(describe(denoiser, grid, units, frames))
    torch.export.save(exported, buffer, extra_files={PROGRAM_FILE: about})
    _write(path, buffer.getvalue())


def _export(module: _Program, grid: Grid, frames: int) -> torch.export.ExportedProgram:
    """Returns the program, which gives what the module gives. Raises UserError where there is none."""
    diffusion = module.denoiser.diffusion
    levels = torch.tensor(
        [diffusion.sigma_min, (diffusion.sigma_min * diffusion.sigma_max) ** 0.5, diffusion.sigma_max]
    )
    diffusion.time(levels.double())  # what a formulation tabulates once must be there before it is traced
    batch = torch.export.Dim("batch", min=1)
    example, other = _example(levels[:2], grid, frames), _example(levels, grid, frames)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            exported = torch.export.export(module, example, dynamic_shapes=({0: batch},) * len(example))
            ours, theirs = module(*other), exported.module()(*other)
    except Exception as error:  # whatever torch cannot trace, the way out is the same
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{REFUSED}: torch.export says '{reason}'. Use format=safetensors") from error
    if not (theirs - ours).abs().max() <= 1e-5 * ours.abs().max():
        raise UserError(f"{REFUSED}: the program gives other fields. Use format=safetensors")
    return exported


def _example(s: Tensor, grid: Grid, frames: int) -> tuple[Tensor, ...]:
    """Returns arguments of the program, one sample for each level."""
    lead, generator = (len(s),) if frames == 1 else (len(s), frames), torch.Generator().manual_seed(0)
    y, noise = (torch.randn(*lead, 2, *grid.shape, generator=generator) for _ in range(2))
    observed = torch.rand(*lead, 1, *grid.shape, generator=generator) < 0.5
    valid = grid.valid.cpu().expand(observed.shape).clone()
    return y + column(s, y) * noise, s, y, observed & valid, torch.full(observed.shape, 0.01), valid


def describe(denoiser: Denoiser, grid: Grid, units: str, frames: int = 1) -> dict[str, Any]:
    """Returns what one must know to use a program, in plain values: conventions, grid, mean, std, levels."""
    state = grid.state_dict() | {"valid": grid.valid.int()}
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in state.items()}
    time = {"frames": frames} if frames > 1 else {}
    return {
        "format": "vecfield-program",
        "version": VERSION,
        "inputs": {name: text.replace("...", "T, " if time else "") for name, text in INPUTS.items()},
        "conventions": CONVENTIONS,
        "units": units,
        "shape": list(grid.shape),
        **time,
        "grid": plain,
        "std": denoiser.normalizer.std.item(),
        "mean": denoiser.normalizer.mean.tolist(),
        "levels": denoiser.diffusion.levels(STEPS, "log_snr").tolist(),
    }

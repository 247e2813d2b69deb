"""What a checkpoint says: the network, the grid and the data that it was trained on, made to fit other fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.modules.module import register_module_parameter_registration_hook

from vecfield_diffusion import threads
from vecfield_diffusion.config.build import build, named_files
from vecfield_diffusion.config.moved import present_names
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.statistics import Believed, limit_of
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.diffusion.precision import network_precision
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.export import SHIPPED, load_weights
from vecfield_diffusion.models.budget import Budget
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.ranks import local_rank, world_size
from vecfield_diffusion.resources import resource
from vecfield_diffusion.training.checkpoint import find_checkpoint, load_checkpoint, step_in

#: Where shipped networks lie: in a wheel inside the package, in a checkout beside it.
PRETRAINED = [resource("pretrained")]
#: What reading a damaged state raises.
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, yaml.YAMLError)


def choose_device(name: str) -> torch.device:
    """Returns the device; `auto` is the GPU where there is one. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here. Use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and not threads.chosen():
        torch.set_num_threads(threads.free())
    if name == "cuda" and world_size() > 1:  # to each process its own
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device(name)


def make_denoiser(
    config: Mapping[str, Any],
    diffusion: Diffusion,
    normalizer: Normalizer,
    grid: Grid,
    device: torch.device,
    context: Context | None = None,
    trusted: bool = False,
    trust: Sequence[str] = (),
) -> Denoiser:
    """Returns the denoiser of a training configuration, with fresh weights."""
    if config["model"].get("walls") == "mirror" and not any(ends(config, grid, "wall")):
        raise UserError(
            "model.walls=mirror: no axis of what the network sees ends at walls, its boundaries are "
            f"boundary_x={grid.boundary_x}, boundary_y={grid.boundary_y}. Use model.walls=zero"
        )
    network = make_network(config, diffusion, grid, context, trusted, trust)
    dtype = network_precision(config["trainer"]["precision"], device)
    denoiser = Denoiser(network, diffusion, normalizer, autocast=dtype)
    return denoiser.to(device=device, memory_format=torch.channels_last)


def make_network(
    config: Mapping[str, Any],
    diffusion: Diffusion,
    grid: Grid,
    context: Context | None = None,
    trusted: bool = False,
    trust: Sequence[str] = (),
) -> torch.nn.Module:
    """Returns the network of a training configuration, with fresh weights."""
    shape = network_channels(diffusion, context) | {"periodic": ends(config, grid, "periodic")}
    if config["model"].get("walls") == "mirror":
        shape |= {"mirrored": ends(config, grid, "wall")}
    if context is not None and (config["model"].get("equivariant") or "mirrored" in shape):
        raise UserError(
            "model.equivariant and model.walls=mirror know the components of a field and of its observation, not "
            "those of a context: leave out dataset.context, or them"
        )
    shape |= {"frames": frames_of(config)} if frames_of(config) > 1 else {}
    with Budget():
        return build(config["model"], "model", trusted=trusted, trust=trust, **shape)


def ends(config: Mapping[str, Any], grid: Grid, boundary: str) -> tuple[bool, bool]:
    """Returns whether y and x end at such a boundary as the network sees them: windows cut it off."""
    sizes = zip((grid.boundary_y, grid.boundary_x), config["window"] or grid.shape, grid.shape, strict=True)
    return tuple(found == boundary and size == full for found, size, full in sizes)


def frames_of(config: Mapping[str, Any]) -> int:
    """Returns the frames of the sequences that a training configuration asks for; 1 for snapshots."""
    return config["dataset"].get("frames", 1)


def network_channels(diffusion: Diffusion, context: Context | None = None) -> dict[str, int]:
    """Returns the channels of a network: field, observation, background and context in; mean and variance out."""
    conditions = Observation.CHANNELS + (2 if diffusion.coupled else 0) + (0 if context is None else len(context))
    channels = {"in_channels": 2 + conditions}
    return channels | {"out_channels": 4} if diffusion.learned_variance else channels


@dataclass(frozen=True)
class Trained:
    """All that a checkpoint says: the denoiser with averaged weights, the grid, the data that it was trained on.

    `coordinates` are `x` and `y` with their names, as `Fields` has them, where the checkpoint knows them; `context` is
    what the network is conditioned on beside observations; `window` is the size of its fields, where they were windows;
    `calibration` are the factors of its spread, see `inference/calibration.py`; `trust` and `files` are the modules and
    the files that its configuration may name; `step_of_time` is how far its snapshots lay apart, with the unit, where
    it is one of sequences and knows it.
    """

    denoiser: Denoiser
    grid: Grid
    statistics: Statistics
    units: str
    split: dict[str, range]
    config: dict[str, Any]
    path: Path
    step: int
    context: Context | None = None
    coordinates: Mapping[str, Any] | None = None
    calibration: Sequence[Mapping[str, Any]] = ()
    trust: Sequence[str] = ()
    files: Sequence[str] = ()
    step_of_time: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        """What it is called after: the folder of its run, or the file that lies by itself."""
        path = self.path.absolute()
        return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem

    @property
    def helps(self) -> str:
        """In words, at which noise levels the network helps its Gaussian part; empty where nothing is known of it."""
        gate = self.denoiser.parametrization.gate
        return "" if gate is None else gate.sentence()

    @property
    def window(self) -> tuple[int, int]:
        """The size of the fields that the network was trained on."""
        return tuple(self.config["window"] or self.grid.shape)

    @property
    def frames(self) -> int:
        """The frames of the sequences that it was trained on; 1 for snapshots."""
        return frames_of(self.config)

    @property
    def stride(self) -> int:
        """The steps of time between these frames."""
        return self.config["dataset"].get("stride", 1)


def find_trained(ckpt: str) -> Path:
    """Returns the file that `ckpt=` means: see `find_checkpoint`; else a shipped one, `pretrained/turbulence`."""
    here = Path(ckpt)
    for place in (here, *(folder.parent / here for folder in PRETRAINED)):
        shipped = place if place.suffix == SHIPPED else place.with_name(f"{place.name}{SHIPPED}")
        if not here.exists() and shipped.is_file():
            return shipped
    return find_checkpoint(ckpt)


def load_trained(ckpt: str, device: torch.device, trust: Sequence[str] = ()) -> Trained:
    """Returns the network of a run folder or a checkpoint file, ready to sample.

    Raises:
        UserError: No checkpoint there, a damaged or foreign one, or one whose configuration names what is not trusted.
    """
    path = find_trained(ckpt)
    state = load_weights(path) if path.suffix == SHIPPED else load_checkpoint(path)
    try:
        return restored(state, path, device, trust)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path}: the network does not fit into the GPU's memory; use device=cpu") from error
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(
            f"{path}: the checkpoint does not fit this program ({reason}). Give another ckpt=, or train anew"
        ) from error


def allowed_files(path: Path) -> list[str]:
    """The files that a checkpoint may open: those that the configuration of its run folder names, and no others."""
    config = path.parent.parent / "config.yaml"
    if path.parent.name != "checkpoints" or not config.is_file():
        return []
    try:
        return named_files(yaml.safe_load(config.read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return []


def restored(state: Mapping[str, Any], path: Path, device: torch.device, trust: Sequence[str]) -> Trained:
    """Returns what the state of a checkpoint says.

    Raises:
        UserError: A configuration that names what is not trusted, sizes that are not those of the weights, or weights
            that are no numbers.
        ValueError, LookupError, TypeError, ...: Parts that are missing or damaged; see `DAMAGED`.
    """
    config = {"window": None, **yaml.safe_load(state["config"])}
    check_identity(state, config)
    grid, statistics = Grid(**state["grid"]), Statistics(**state["statistics"])
    diffusion = build(config["diffusion"], "diffusion", trust=trust)
    context = Context.from_state(state["context"]) if state.get("context") else None
    check_weights(path, state["ema"], lambda: make_network(config, diffusion, grid, context, trust=trust))
    normalizer = Normalizer(state["mean"], statistics.std)
    denoiser = make_denoiser(config, diffusion, normalizer, grid, device, context, trust=trust)
    denoiser.network.load_state_dict(state["ema"])
    diffusion.load_state_dict(state.get("diffusion", {}))
    return Trained(
        denoiser=denoiser.eval().requires_grad_(False),
        grid=grid,
        statistics=statistics,
        units=str(state["data"]["units"]),
        split={name: range(*block) for name, block in state["data"]["split"].items()},
        config=config,
        path=path,
        step=int(state["counters"]["step"]),
        context=context,
        coordinates=state.get("coordinates"),
        calibration=present_names(state.get("calibration", ())),
        trust=tuple(trust),
        files=allowed_files(path),
        step_of_time=step_in(state["data"]),
    )


def check_identity(state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError, LookupError or TypeError where what a checkpoint says of itself is damaged."""
    for key in ("dataset", "mask", "model", "diffusion", "trainer"):
        if not isinstance(config[key], Mapping):
            raise ValueError(f"config.{key} must be a mapping, got {config[key]!r:.60}")
    for key in ("sigma_obs", "condition_dropout", "max_steps"):
        if not isinstance(config["trainer"][key], int | float):
            raise ValueError(f"config.trainer.{key} must be a number, got {config['trainer'][key]!r:.60}")
    if not {"train", "validation", "test"} <= state["data"]["split"].keys():
        raise ValueError(f"data.split must name train, validation and test, got {list(state['data']['split'])}")
    for factor in state.get("calibration") or ():
        if not (isinstance(factor["process"], Mapping) and isinstance(factor["factor"], int | float)):
            raise ValueError(f"calibration must be of processes and factors, got {factor!r:.60}")
    known = state.get("coordinates")
    if known is not None:
        shape = tuple(len(known[name]) for name in ("y", "x"))
        if shape != tuple(state["grid"]["valid"].shape) or not all(str(known[f"{name}_name"]) for name in "xy"):
            raise ValueError(f"coordinates must be those of the grid, got {shape}")


def check_weights(path: Path, weights: Mapping[str, torch.Tensor], make: Callable[[], torch.nn.Module]) -> None:
    """Raises UserError where a network is declared larger than its weights, or these are not finite.

    The network is made without memory for its parameters, and no further than the weights reach.
    """
    stored = sum(weight.numel() for weight in weights.values())
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of {len(weights)} weights are not finite, such as {broken[0]}: its training went "
            "wrong. Give another ckpt=, or train anew with a lower optimizer.lr"
        )
    declared = 0

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        nonlocal declared
        declared += 0 if parameter is None else parameter.numel()
        if declared > stored:
            raise UserError(
                f"{path}: the checkpoint declares a network of more than its {stored} weights: it is damaged, or was "
                "tampered with. Give another ckpt="
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            make()
    finally:
        handle.remove()


def held_out(trained: Trained, split: str, trust: Sequence[str] = (), data: str | None = None) -> tuple[Fields, range]:
    """Returns the data that a checkpoint was trained on, and the snapshots of a split that it has not seen.

    Raises:
        UserError: They are not where they were, nor at `data`, or have lost snapshots.
    """
    node = trained.config["dataset"]
    if data is not None and "path" not in node:
        raise UserError(f"data={data}: {trained.path} was trained on data that are made, not read")
    paths = [*trained.files, *([] if data is None else [data])]
    try:
        node = node if data is None else {**node, "path": data}
        fields = build(node, "dataset", trust=trust, paths=paths).converted(trained.units)
    except UserError as error:
        raise UserError(
            f"the data that {trained.path} was trained on: {error} (run it from the folder where it was trained, or "
            "say where they are now: data=FILE; infer.py also takes input=FILE)"
        ) from error
    if len(fields) < trained.split[split].stop:
        raise UserError(
            f"{fields.source} has {len(fields)} snapshots now, but {trained.path} keeps {trained.split[split].start} "
            f"to {trained.split[split].stop - 1} for {split}. Restore the file, or train anew"
        )
    mean = trained.denoiser.normalizer.mean.cpu().float().numpy()
    return replace(fields, reader=Believed(fields.reader, limit_of(trained.statistics), mean)), trained.split[split]


def unfinished(trained: Trained) -> str:
    """Returns a sentence on a run that did less than half of its schedule; empty for others and for shipped ones.

    A run that ended because its validation loss fell no further had all the training that it could use.
    """
    if trained.path.suffix == SHIPPED:
        return ""
    last, most = trained.path.with_name("last.pt"), trained.config["trainer"]["max_steps"]
    counters = load_checkpoint(last)["counters"] if last.is_file() else {"step": 0}
    if counters.get("stopped"):
        return ""
    steps = max(trained.step, counters["step"])
    said = f"{trained.path}: its training did {steps} of the {most} steps of its schedule: the network is not trained"
    return said if steps < most / 2 else ""


def check_error(worst: float, trained: Trained) -> None:
    """Prints a note where observations are worse than any that the network was trained with."""
    most = trained.config["trainer"]["sigma_obs"] * trained.statistics.std
    if worst > 1.0001 * most:  # float32
        print(f"note: sigma_obs={worst:g} is more than the {most:.3g} {trained.units} that training reached")

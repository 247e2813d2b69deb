"""The method of a command: built and checked before data are read, fitted to the data, and nothing left to `auto`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.ellipses import deviations
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.inference.calibration import describe_process
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.programs.accuracy import is_constant
from vecfield_diffusion.programs.balances import placed_balances
from vecfield_diffusion.programs.familiar import TrainingMasks
from vecfield_diffusion.programs.fitted import fit_size
from vecfield_diffusion.programs.trained import Trained, load_trained

PARTS = ("sampler", "inpainting", "physics", "guidance", "sensor")


def node_of(config: Mapping[str, Any], group: str, name: str) -> dict[str, Any]:
    """Returns the node of an option of a group, as the configuration has resolved it."""
    return config["options"][group][name]


def build_method(config: Mapping[str, Any], trained: Trained, device: torch.device) -> Method:
    """Returns the method that a configuration names, checked; `inpainting` is None where that is `auto`.

    Raises:
        UserError: Parts that do not go together, or not with the checkpoint.
    """
    method = Method(**{name: build(config.get(name), name, trusted=True) for name in PARTS})
    method.check(trained.denoiser.diffusion)
    check_error_of(method.sensor, config)
    ckpt = method.guidance.ckpt
    if ckpt is None:
        return method
    weak = load_trained(ckpt, device, config["trust"])
    alike = weak.units == trained.units and weak.grid.shape == trained.grid.shape
    if not (alike and bool((weak.grid.valid == trained.grid.valid).all())):
        raise UserError(f"guidance.ckpt={ckpt}: it was trained on another grid or in other units")
    if weak.denoiser.diffusion.coupled != trained.denoiser.diffusion.coupled:
        raise UserError(f"guidance.ckpt={ckpt}: one of both networks is an interpolant, one is not")
    if (weak.frames, weak.stride) != (trained.frames, trained.stride):
        raise UserError(f"guidance.ckpt={ckpt}: both networks must have the same dataset.frames and dataset.stride")
    if weak.context != trained.context:
        raise UserError(f"guidance.ckpt={ckpt}: both networks must have the same dataset.context")
    return replace(method, guidance=method.guidance.loaded(weak.denoiser), weak=weak)


def check_error_of(sensor: Sensor | None, config: Mapping[str, Any]) -> None:
    """Raises UserError where an instrument that reads one number of a cell is given errors of u and v."""
    given, radars = config["sigma_obs"], config.get("radars")
    if sensor is None or not sensor.scalar or not (radars or (isinstance(given, list) and len(given) > 1)):
        return
    raise UserError(
        f"{'radars=' if radars else f'sigma_obs={given}'} gives errors of u and v, and sensor={sensor.name} reads one "
        "number of a cell: give sigma_obs as a number or a variable, or sensor.error for each of sensor.velocity"
    )


def fit_method(
    method: Method, fields: Fields, *, seen: range | None = None, overlap: float = 0.25, batch: int = 64
) -> Method:
    """Returns the method among the cells of the data: operators and balances placed, the second network fitted.

    Arguments:
        method: The method.
        fields: The data.
        seen: Snapshots that tolerances may be found from; all if None.
        overlap: Of windows, see `fit_size`.
        batch: See there.

    Raises:
        UserError: An observation operator, guidance or physics that does not go with the grid.
    """
    guidance = method.guidance
    for part in (guidance, method.physics):
        if reason := part.obstacle(fields.grid):
            raise UserError(reason)
    if method.weak is not None:
        guidance = guidance.loaded(fit_size(method.weak, fields, overlap, batch).denoiser)
    sensor = None if method.sensor is None else placed(method.sensor, fields)
    physics = placed_balances(method.physics, fields, seen)
    return replace(method, guidance=guidance, sensor=sensor, physics=physics)


def placed(sensor: Sensor, fields: Fields) -> Sensor:
    """Returns the observation operator among the cells of the fields. Raises UserError where it does not fit them."""
    x, y = (torch.tensor(axis.astype(float)) for axis in (fields.x, fields.y))
    sensor = sensor.placed(x, y, fields.x_name == "lon")
    try:
        sensor.measure(torch.zeros(1, 2, *fields.shape), fields.grid)
    except ValueError as error:
        raise UserError(f"sensor.{error}") from error
    return sensor


@dataclass(frozen=True)
class Observed:
    """What is observed of one case: the cells `(1, H, W)`, the largest error, whether single components are in it."""

    cells: Tensor
    error: float
    single: bool

    @classmethod
    def of(cls, cases: Cases) -> list[Observed]:
        """Returns what is observed of each case."""
        sigma = deviations(cases.sigma_obs)
        known = (cases.observed | cases.single) & sigma.isfinite()
        errors = torch.where(known, sigma, 0.0).flatten(1).amax(dim=1).tolist()
        singles = cases.single.flatten(1).any(dim=1).tolist()
        return [cls(*values) for values in zip(cases.observed, errors, singles, strict=True)]


class Chooser:
    """Chooses the way to condition where it is `auto`: for each case by itself, whatever its company.

    Arguments:
        method: The method with that choice open.
        trained: The network, fitted to the fields.
        masks: Those that it was trained on.
    """

    def __init__(self, method: Method, trained: Trained, masks: TrainingMasks) -> None:
        self.method, self.trained, self.masks = method, trained, masks

    @cached_property
    def always(self) -> tuple[str, str] | None:
        """The choice and its reason where the method or the network decide it, whatever is observed."""
        method, trained = self.method, self.trained
        if not trained.denoiser.diffusion.noisy:
            return "conditional", "a regression is no prior"
        if not trained.denoiser.diffusion.gives_mean:
            return "conditional", "a network of few steps gives no mean that another way could build on"
        if method.guidance.stresses_condition:
            return "conditional", "guidance=cfg needs it"
        if trained.config["trainer"]["condition_dropout"] == 0 and method.sensor is None:
            return "conditional", "the network was trained without condition dropout and is no prior"
        if method.sensor is not None:
            return "mmps", f"the network was not trained on what sensor={method.sensor.name} measures"
        if method.physics.mode == "rows":
            return "mmps", "physics as observations needs it"
        if method.sampler.needs_variance:
            return "conditional", "sampler.variance=learned needs it"
        return None

    def __call__(self, observed: Observed) -> tuple[str, str]:
        """Returns `conditional` or `mmps`, and the reason."""
        if self.always is not None:
            return self.always
        if observed.single:
            return "mmps", "some cells lack one component, which the network was not trained on"
        if not observed.cells.any():
            return "conditional", "nothing is observed"
        if observed.error > 1.01 * self.trained.config["trainer"]["sigma_obs"] * self.trained.statistics.std:
            return "mmps", f"sigma_obs={observed.error:g} is beyond the errors that the network was trained with"
        if self.masks.unlike(observed.cells):
            return "mmps", "the mask is unlike those that the network was trained on"
        return "conditional", "the mask resembles those that the network was trained on"


def choices(
    config: Mapping[str, Any], method: Method, trained: Trained, *, chosen: Sequence[tuple[str, str]]
) -> tuple[list[str], dict[str, Method]]:
    """Returns the name of the way to condition of each case, and the method of each name with nothing left open.

    What was chosen, how often and why is printed once.

    Arguments:
        config: The configuration of the command.
        method: As `fit_method` returns it.
        trained: The network, fitted to the fields.
        chosen: The choice and its reason for each case, where it is `auto`.

    Raises:
        UserError: A way to condition that cannot take the errors, or physics that it cannot take.
    """
    if method.inpainting is not None:
        return [], {method.inpainting.name: complete(method, trained, is_constant(config))}
    names = [name for name, _ in chosen]
    methods = {}
    for name in dict.fromkeys(names):
        count = names.count(name)
        share = f" for {count} of {len(names)} snapshots" if count < len(names) else ""
        print(f"inpainting={name}{share}: {usual_reason(chosen, name)}")
        methods[name] = complete(conditioned(config, method, name), trained, is_constant(config))
    return names, methods


def agreed(chosen: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the choices of cases that are made alike: `mmps` for all where more than one in ten ask for it."""
    if not chosen:
        return []
    name = "mmps" if sum(name == "mmps" for name, _ in chosen) > 0.1 * len(chosen) else "conditional"
    return [(name, usual_reason(chosen, name))] * len(chosen)


def usual_reason(chosen: Sequence[tuple[str, str]], name: str) -> str:
    """Returns the reason that was given most often for a choice."""
    return Counter(reason for other, reason in chosen if other == name).most_common(1)[0][0]


def conditioned(config: Mapping[str, Any], method: Method, name: str) -> Method:
    """Returns the method with the way to condition of a name."""
    return replace(method, inpainting=build(node_of(config, "inpainting", name), "inpainting", trusted=True))


def resolve_method(
    config: Mapping[str, Any], method: Method, trained: Trained, cases: Cases, *, label: str = ""
) -> Method:
    """Returns one method for all of the cases, with nothing left open: `mmps` where more than one in ten ask for it.

    Arguments:
        config: The configuration of the command.
        method: As `fit_method` returns it.
        trained: The network, fitted to the fields.
        cases: What is observed.
        label: What the choice is printed for, such as the name of a mask.

    Raises:
        UserError: See `choices`.
    """
    if method.inpainting is None:
        chosen = agreed(list(map(Chooser(method, trained, TrainingMasks(trained)), Observed.of(cases))))
        name = chosen[0][0]
        print(f"{label}{': ' if label else ''}inpainting={name}: {usual_reason(chosen, name)}")
        method = conditioned(config, method, name)
    return complete(method, trained, is_constant(config))


def complete(method: Method, trained: Trained, constant: bool = True) -> Method:
    """Returns the method with the tolerances and the mode of its physics; prints them, and what goes badly together.

    `constant` says whether all observations have one error.

    Raises:
        UserError: Physics or errors that the way to condition cannot take.
    """
    inpainting = method.inpainting
    try:
        physics = method.physics.resolve(inpainting.weighs_rows, trained.statistics)
    except ValueError as error:
        raise UserError(f"physics.{error}") from error
    if inpainting.repeats > 1 and not constant:
        raise UserError("inpainting=repaint takes one error for all cells: give sigma_obs as a number, or use mmps")
    advice = inpainting.advice(method.sampler)
    for line in (physics.summary(), advice and f"note: {advice}"):
        if line:
            print(line)
    return replace(method, physics=physics)


def process_of(config: Mapping[str, Any], mask: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Returns what a factor of the spread is fitted on, for a method with nothing left open."""
    node = config["inpainting"] or node_of(config, "inpainting", method.inpainting.name)
    return describe_process(config, mask, node)

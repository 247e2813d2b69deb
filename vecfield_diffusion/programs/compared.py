"""The trained networks that `evaluate.py` compares: which checkpoints are meant, and whether they can be compared.

A regression, be it a checkpoint of `diffusion=regression` or what a network with `model=residual` holds, gives the mean
alone. It is evaluated once, whatever the sampler and the number of members, and stands among the baselines.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vecfield_diffusion.config.build import resolve
from vecfield_diffusion.config.moved import present_names
from vecfield_diffusion.config.sweep import read
from vecfield_diffusion.data.draws import MaskFunction
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.diffusion.denoiser import mean_only
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baselines import BASELINES
from vecfield_diffusion.evaluation.series import SERIES_BASELINES
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.calibration import find_factor
from vecfield_diffusion.inference.cases import Cases, with_context
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.programs.ahead import View
from vecfield_diffusion.programs.balances import with_balances
from vecfield_diffusion.programs.baselines import REGRESSION
from vecfield_diffusion.programs.fitted import check_grid, fit_size
from vecfield_diffusion.programs.method import build_method, fit_method, node_of, process_of, resolve_method
from vecfield_diffusion.programs.trained import Trained, load_trained
from vecfield_diffusion.samplers.deterministic import DPMpp2M
from vecfield_diffusion.training.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Network:
    """A trained network and the method by which its fields are made.

    Attributes:
        name: What tables call it.
        trained: The network, fitted to the size of the data.
        method: How its fields are made.
        factor: That of its spread, where calibrated ensembles are asked for, too.
    """

    name: str
    trained: Trained
    method: Method
    factor: float | None = None

    @property
    def regression(self) -> bool:
        """Whether it gives one field, the mean."""
        return is_regression(self.trained)

    @property
    def rows(self) -> list[str]:
        """What tables call its ensembles: plain and, where there is a factor, calibrated."""
        return [self.name] if self.factor is None else [self.name, f"{self.name} calibrated"]

    def conditioned(self, cases: Cases, fields: Fields, config: Mapping[str, Any], mask: MaskFunction) -> Cases:
        """The cases with what this network is conditioned on beside the observation.

        Arguments:
            cases: The cases.
            fields: The data, earlier snapshots included.
            config: The keys of `evaluate.py`.
            mask: What is observed.
        """
        past = mask if config["history"] == "masked" else None
        normalizer = self.trained.denoiser.normalizer
        options = dict(seed=config["seed"], past=past, twin=True)
        return with_balances(
            with_context(cases, fields, self.trained.context, normalizer, **options), self.method, fields
        )

    def resolved(self, view: View, cases: Cases, config: Mapping[str, Any]) -> Network:
        """The same with nothing left open for the cases of a mask: neither the method nor the factor.

        There is no factor for forecasts, whose spread nothing fits.

        Raises:
            UserError: A method that cannot take the observations, or a spread that was not calibrated for them.
        """
        method = resolve_method(config, self.method, self.trained, cases, label=view.name)
        model = replace(self, method=method)
        plain = not config["calibrate"] or self.regression or view.ahead
        return model if plain else model.calibrated(view.option, config)

    def calibrated(self, name: str, config: Mapping[str, Any]) -> Network:
        """The same with the factor that was fitted under the mask `name`. Raises UserError where there is none."""
        process = process_of(config, node_of(config, "mask", name), self.method)
        try:
            factor = find_factor(self.trained.calibration, process, self.trained.path)
        except UserError as error:
            raise UserError(f"masks=[{name}]: {error}") from error
        print(f"{name}: {self.name} calibrated has its spread times {factor:.3f}, as fitted on validation snapshots")
        return replace(self, factor=factor)

    def placed(self, fields: Fields, config: Mapping[str, Any]) -> Network:
        """The same for the size and the place of the data. Raises UserError where they do not fit."""
        check_grid(fields, self.trained)
        if config["sensor"] and config["sensor"].get("velocity"):
            raise UserError(
                "sensor.velocity: what a radar recorded has no truth to be scored against; it is for infer.py. Give "
                "sensor.sites=[[X,Y]], through which the known fields are seen"
            )
        seen = self.trained.split["train"]
        method = fit_method(self.method, fields, seen=seen, overlap=config["overlap"], batch=config["batch"])
        return replace(self, trained=fit_size(self.trained, fields, config["overlap"], config["batch"]), method=method)


def load_models(config: Mapping[str, Any], wanted: Sequence[str], device: torch.device) -> list[Network]:
    """The networks that `ckpt=` names, then the regressions within them, where these are wanted.

    Raises:
        UserError: Checkpoints that do not fit, or that leave nothing to do what the configuration asks for.
    """
    runs = named_runs(config["ckpt"])
    trained = {name: load_trained(path, device, config["trust"]) for name, path in runs.items()}
    check_alike(trained)
    alone = [name for name, network in trained.items() if is_regression(network)]
    if alone == ["diffusion"]:
        trained = {REGRESSION: trained.pop("diffusion")}
    if alone and config["sensor"]:
        raise UserError(f"ckpt={runs[alone[0]]}: a regression takes velocities of single cells alone: use sensor=none")
    if config["calibrate"] and len(alone) == len(trained):
        raise UserError("calibrate=true: a regression has no spread. Use calibrate=false")
    if REGRESSION in wanted:
        within = regressions(trained)
        if not (within or alone or config["baselines"] == "all"):
            raise UserError(
                f"baselines={REGRESSION}: no checkpoint holds one. Train one by train.py diffusion=regression and add "
                "its run, ckpt=[...,RUN], or train with model=residual"
            )
        trained |= within
    return [Network(name, network, method_of(config, network, device)) for name, network in trained.items()]


def method_of(config: Mapping[str, Any], trained: Trained, device: torch.device) -> Method:
    """How fields are made: as the configuration says; of a regression by one evaluation. Raises UserError."""
    if is_regression(trained):  # the last step of this sampler returns what the denoiser gives
        return Method(DPMpp2M(steps=1), Conditional())
    return build_method(config, trained, device)


def is_regression(trained: Trained) -> bool:
    """Whether a network gives the mean alone."""
    return not trained.denoiser.diffusion.noisy


def regressions(trained: Mapping[str, Trained]) -> dict[str, Trained]:
    """The regressions within networks that have one (`model=residual`), by name."""
    holders = {name: network for name, network in trained.items() if network.denoiser.parametrization.predicts_mean}
    one = len(holders) == 1 and REGRESSION not in trained
    return {
        REGRESSION if one else f"{REGRESSION} of {name}": replace(network, denoiser=mean_only(network.denoiser))
        for name, network in holders.items()
    }


def named_runs(ckpt: str | Sequence[str]) -> dict[str, str]:
    """The checkpoints that `ckpt=` means by the names of their methods; a folder of numbered runs is all of them.

    One alone is `diffusion`; several are called as their folders are, by the whole path where that is not enough.

    Raises:
        UserError: None, or the same twice.
    """
    places = [ckpt] if isinstance(ckpt, str) else list(ckpt)
    runs = [run for place in places for run in numbered(place) or [(Path(place).name, place)]]
    if not runs:
        raise UserError("ckpt=[]: name at least one checkpoint")
    if len(runs) == 1:
        return {"diffusion": runs[0][1]}
    taken = [*(name for name, _ in runs), *(kind.label for kind in [*BASELINES.values(), *SERIES_BASELINES.values()])]
    found = {path if taken.count(name) > 1 else name: path for name, path in runs}
    if len(found) < len(runs):
        raise UserError(f"ckpt={places}: each checkpoint is compared once, but one is named twice")
    return found


def numbered(place: str) -> list[tuple[str, str]]:
    """Name and folder of each run of a sweep that has a checkpoint; the name tells what sets it apart."""
    folder = Path(place)
    if not folder.is_dir() or find_checkpoint(folder).exists():
        return []
    runs = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    chosen = {run: (read(run) or {"overrides": []})["overrides"] for run in runs if find_checkpoint(run).exists()}
    if lacking := len(runs) - len(chosen):
        print(f"note: {lacking} of the {len(runs)} runs in {place} have no checkpoint, and are left out")
    common = set.intersection(*map(set, chosen.values())) if chosen else set()
    return [
        (" ".join([run.name, *(text for text in overrides if text not in common)]), str(run))
        for run, overrides in chosen.items()
    ]


def check_alike(trained: Mapping[str, Trained]) -> None:
    """Raises UserError where networks were not trained on the same snapshots of the same data."""
    (name, first), *others = trained.items()
    for other, network in others:
        for what, ours, theirs in (
            ("data", data_of(first), data_of(network)),
            ("units", first.units, network.units),
            ("grid", first.grid.shape, network.grid.shape),
            ("split", first.split, network.split),
        ):
            if ours != theirs:
                raise UserError(
                    f"ckpt=[{name},{other}]: networks are compared on the same unseen snapshots, but these were "
                    f"trained with another {what}, {difference(ours, theirs)}. Evaluate each by itself"
                )


def data_of(network: Trained) -> dict[str, Any]:
    """What says which snapshots a network was trained on; a key that an older version did not know has its default."""
    node = present_names(network.config["dataset"])
    known = inspect.signature(resolve(node["_target_"], trust=network.trust)).parameters.values()
    node = {key.name: key.default for key in known if key.default is not key.empty} | node
    # What a network is conditioned on, and how many frames it sees at once, may differ; flows that are made go by them.
    free = {"history", "context"} | (set() if node.get("trajectory", 0) is None else {"frames", "stride"})
    return {key: value for key, value in node.items() if key not in free}


def difference(ours: Any, theirs: Any) -> str:
    """What differs of two values."""
    if isinstance(ours, dict):
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        ours, theirs = ({key: values.get(key) for key in keys} for values in (ours, theirs))
    return f"{ours} and {theirs}"

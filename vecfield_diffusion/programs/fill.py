"""Fields in, filled fields out: what the command line and the library share.

`open_filling` makes a `Filling` of a configuration: the network, the data, the mask and the method of every snapshot,
all checked. `run` fills it, a few snapshots at a time, into a file (`inference/files.FieldsWriter`) or into memory
(`inference/template.Buffer`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
import yaml
from torch import Tensor
from tqdm import tqdm

from vecfield_diffusion import __version__
from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import Empty
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.calibration import apply_factor, find_factor
from vecfield_diffusion.inference.cases import Cases, cells_seen, make_cases, with_context
from vecfield_diffusion.inference.ensemble import sample_ensemble
from vecfield_diffusion.inference.files import KEY
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.template import Buffer, Layout, Template
from vecfield_diffusion.programs.method import build_method, choices, fit_method, node_of, process_of
from vecfield_diffusion.programs.plausible import Survey, absurd, check_members
from vecfield_diffusion.programs.source import (
    Source,
    chosen_snapshots,
    files_behind,
    read_variable,
    restored,
)
from vecfield_diffusion.programs.trained import Trained, choose_device, fit_size, load_trained
from vecfield_diffusion.training.batches import MaskFunction

#: Attributes of the native file, which the output is not.
NATIVE = {"format", "version", "dx", "dy", "boundary_x", "boundary_y"}
#: Keys of a configuration that the filled fields do not depend on.
FREE = {"name", "batch", "device", "colour", "overwrite", "output", "options"}
#: Snapshots that are looked at together before the sampling.
LOOKED = 64


@dataclass(frozen=True)
class Filling:
    """What is to be filled, and how.

    Arguments:
        config: The configuration of `infer.py`.
        trained: The network, fitted to the size of the fields.
        fields: The data.
        indices: The snapshots.
        mask: What is observed of what is measured.
        method: How ensembles are made, `inpainting` as the configuration has it.
        twin: Whether known fields are hidden, rather than the gaps of a source filled.
        names: The way to condition of each snapshot.
        methods: The method of each of these names, with nothing left open.
        factors: That of the spread by the same names.
    """

    config: dict[str, Any]
    trained: Trained
    fields: Fields
    indices: list[int]
    mask: MaskFunction
    method: Method
    twin: bool
    names: list[str] = field(default_factory=list)
    methods: Mapping[str, Method] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    def cases(self, positions: Sequence[int]) -> Cases:
        """Returns the cases of some snapshots, always the same, without values that no law of the data allows."""
        cases = self.measured(positions)
        return self.informed(cases.without(absurd(cases, self.trained)))

    def measured(self, positions: Sequence[int]) -> Cases:
        """Returns the cases as the source and the mask have them."""
        config, trained, sensor = self.config, self.trained, self.method.sensor
        indices = [self.indices[position] for position in positions]
        cases = make_cases(
            self.fields,
            indices,
            self.mask,
            config["seed"],
            errors(config["sigma_obs"], self.fields, indices),
            add_error=self.twin,
            grid=trained.grid,
            sensor=sensor,
            hide=config["hide"],
        )
        if sensor is None or not sensor.velocity:
            return cases
        # The fields of the file stand for their coordinates alone.
        sensor = sensor.recorded(lambda name: read_variable(self.fields, name, indices))
        known = sensor.cells & trained.grid.valid & cases.sigma_obs.isfinite().all(dim=1, keepdim=True)
        pairs = zip(known, cases.numbers, strict=True)
        chosen = [cells_seen(cells, self.mask, config["seed"], number, config["hide"]) for cells, number in pairs]
        return cases.seen_through(sensor.within(torch.stack(chosen)))

    def informed(self, cases: Cases) -> Cases:
        """Returns the cases with what the network is conditioned on beside the observation."""
        past = self.mask if self.config["history"] == "masked" else None
        trained, seed = self.trained, self.config["seed"]
        normalizer = trained.denoiser.normalizer
        return with_context(cases, self.fields, trained.context, normalizer, seed, past, self.twin)

    def blocks(self, done: set[int]) -> Iterator[tuple[str, list[int]]]:
        """Yields the positions that are filled at once and the name of their method, but those that are `done`."""
        size = max(1, at_once(self.config, self.trained) // self.config["members"])
        for first in range(0, len(self.indices), size):
            left = [place for place in range(first, min(first + size, len(self.indices))) if place not in done]
            for name in dict.fromkeys(self.names[place] for place in left):
                yield name, [place for place in left if self.names[place] == name]


def open_filling(
    config: dict[str, Any],
    *,
    source: Source | Fields | None = None,
    trained: Trained | None = None,
    mask: MaskFunction | None = None,
) -> Filling:
    """Returns what a configuration of `infer.py` says, with everything checked and nothing left open.

    Arguments:
        config: The configuration.
        source: The data, where `input=` does not name them.
        trained: The network, where `ckpt=` has been loaded already.
        mask: What is observed, where `mask=` does not say it.

    Raises:
        UserError: A checkpoint, source or option that does not fit.
    """
    check_ranges(config)
    device = choose_device(config["device"])
    mask = mask or build(config["mask"], "mask", trusted=True)
    trained = trained or load_trained(config["ckpt"], device, config["trust"])
    method = build_method(config, trained, device)
    check_likelihood(config, method, mask)
    source = config["input"] if source is None else source
    print(f"{trained.path}: step {trained.step}, {type(trained.denoiser.diffusion).__name__}")
    fields, indices = chosen_snapshots(config, trained, source)
    sizes = {"overlap": config["overlap"], "batch": config["batch"]}
    trained, method = fit_size(trained, fields, **sizes), fit_method(method, fields, **sizes)
    if config["likelihood"] != "none":
        method = replace(method, inpainting=Conditional())
    default = "block" if source is None else "gaps"
    node = config["mask"] or node_of(config, "mask", default)
    mask = mask or build(node, "mask", trusted=True)
    filling = Filling(config, trained, fields, indices, mask, method, twin=source is None)
    return resolved(filling, node)


def resolved(filling: Filling, node: Mapping[str, Any]) -> Filling:
    """Returns the same with the method of every snapshot chosen; `node` is that of the mask.

    Raises:
        UserError: There is nothing to fill or nothing to fill it from, a magnitude far from the training data, or no
            factor of the spread where one is asked for.
    """
    config, trained = filling.config, filling.trained
    survey = Survey(trained)
    for first in range(0, len(filling.indices), LOOKED):
        positions = range(first, min(first + LOOKED, len(filling.indices)))
        survey.add(filling.measured(positions))
    survey.say(filling.fields, source=not filling.twin, unlike=config["magnitude"])
    survey.check_work(drawn=isinstance(filling.mask, Empty), sensor=filling.method.sensor is not None)
    if trained.context is not None and (lacking := trained.context.lacking(filling.fields)):
        print(f"note: {filling.fields.source} does not have {', '.join(lacking)}, which the network was trained with")
    names, methods = choices(config, filling.method, trained, survey.observed)
    factors = {}
    for name, method in methods.items() if config["calibrate"] else ():
        factors[name] = find_factor(trained.calibration, process_of(config, node, method), trained.path)
        print(f"spread times {factors[name]:.3f}, as fitted on the validation snapshots")
    return replace(filling, names=names, methods=methods, factors=factors)


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of range."""
    for key, least in (("members", 1), ("batch", 1), ("cases", 1), ("seed", 0), ("sigma_obs", 0.0), ("hide", 0.0)):
        if isinstance(config.get(key), int | float) and config[key] < least:
            raise UserError(f"{key} must be >= {least}, got {config[key]}")
    for key in ("hide", "overlap"):
        if not 0 <= config.get(key, 0.0) < 1:
            raise UserError(f"{key} must be in [0, 1), got {config[key]}")
    if config.get("bin") is not None and config["bin"] <= 0:
        raise UserError(f"bin must be > 0, got {config['bin']}")
    if config.get("output") is not None and not config["output"].endswith(".nc"):
        raise UserError(f"output={config['output']}: a file that ends in .nc is expected")


def check_likelihood(config: Mapping[str, Any], method: Method, mask: MaskFunction | None) -> None:
    """Raises UserError where a density is asked for that there is not."""
    if config["likelihood"] == "none":
        return
    if not method.plain:
        raise UserError(
            "likelihood is that of the network: it goes with inpainting=conditional physics=none guidance=none alone"
        )
    if config["sigma_obs"] == 0 and not isinstance(mask, Empty):
        raise UserError(
            "likelihood: cells observed without error have no density. Add sigma_obs=... (the error of the "
            "observations), or mask=none for the likelihood under the prior"
        )
    if config["likelihood_steps"] < 2:
        raise UserError(f"likelihood_steps must be >= 2, got {config['likelihood_steps']}")


def errors(sigma_obs: float | str | list[str], fields: Fields, indices: Sequence[int]) -> float | Tensor:
    """Returns the errors that `sigma_obs` names: a number, a variable of the source, or one for each component.

    Raises:
        UserError: No such variable, or values that are no errors.
    """
    if isinstance(sigma_obs, int | float):
        return sigma_obs
    names = [sigma_obs] if isinstance(sigma_obs, str) else sigma_obs
    if len(names) not in (1, 2):
        raise UserError(f"sigma_obs={sigma_obs}: expected a number, a variable of the file, or one for u and one for v")
    found = torch.cat([read_variable(fields, name, indices)[:, :1] for name in names], dim=1)
    if (found < 0).any():
        worst = found.nan_to_num().min()
        raise UserError(f"sigma_obs={sigma_obs}: expected errors >= 0 in {fields.source}, found {worst}")
    return found


# The work.


class Sink(Protocol):
    """Takes filled fields."""

    def done(self) -> set[int]:
        """Returns the positions that are there."""

    def write(self, positions: Sequence[int], members: Any, observed: Any, truth: Any = None) -> None:
        """Takes a block; see `inference/template.Block`."""


def run(filling: Filling, sink: Sink) -> None:
    """Fills every snapshot that is not there yet, with one progress bar over all.

    Raises:
        UserError: Fields that are not finite, memory that is full, or a sink that cannot be written.
    """
    config, done = filling.config, sink.done()
    if done:
        print(f"going on: {len(done)} of {len(filling.indices)} snapshots are finished")
    work = list(filling.blocks(done))
    costs = [filling.methods[name].evaluations for name, _ in work]
    total = None
    if None not in costs:
        total = sum(cost * len(block) for cost, (_, block) in zip(costs, work, strict=True)) * config["members"]
    with tqdm(total=total, unit=" evaluations", unit_scale=True, disable=None) as bar:
        for name, block in work:
            bar.set_postfix_str(f"snapshot {block[0] + 1} of {len(filling.indices)}")
            cases = filling.cases(block)
            progress = bar.update
            method, trained = filling.methods[name], filling.trained
            members = fill_cases(config, trained=trained, method=method, cases=cases, progress=progress)
            check_members(members, cases, trained)
            known, factor = cases.observed | cases.single, filling.factors.get(name, 1.0)
            if factor != 1:
                members = apply_factor(members, factor, known, cases.sigma_obs)
            truth = cases.truth.numpy() if cases.hidden.any() else None
            sink.write(block, members.numpy(), known.numpy(), truth)
    for method in filling.methods.values():
        say_summary(method)


def say_summary(method: Method) -> None:
    """Prints what there is to say after the sampling."""
    if line := method.inpainting.summary():
        print(line)


def fill_cases(
    config: Mapping[str, Any],
    *,
    trained: Trained,
    method: Method,
    cases: Cases,
    progress: Callable[[int], None] = lambda fields: None,
) -> Tensor:
    """Returns the ensemble `(M, N, 2, H, W)` of cases in physical units.

    Arguments:
        config: Says `members`, `seed` and `batch`.
        trained: The network.
        method: With nothing left open.
        cases: What is observed.
        progress: See `sample_ensemble`.

    Raises:
        UserError: The memory is full.
    """
    denoiser, batch = trained.denoiser, at_once(config, trained)
    method = method if cases.sensor is None else replace(method, sensor=cases.sensor)
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    sample = partial(
        sample_ensemble,
        denoiser,
        method,
        observation,
        trained.grid,
        members=config["members"],
        seed=config["seed"],
        numbers=cases.numbers,
    )
    try:
        return sample(batch=batch, progress=progress)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)):
            raise
        place = "the GPU's memory" if observation.y.is_cuda else "memory"
        raise UserError(f"{place} is full at batch={config['batch']}: give {smaller(batch)}") from error


def smaller(batch: int) -> str:
    """Returns what to do where `batch` fields at once are too many."""
    if batch > 1:
        return f"a smaller one, such as batch={max(1, batch // 4)}"
    return "smaller fields: train with window=[32,32] or so, and fill in windows"


def at_once(config: Mapping[str, Any], trained: Trained) -> int:
    """Returns the fields computed at once: `batch`, fewer where they are larger than those of the network."""
    larger = trained.grid.valid.numel() / math.prod(trained.window)
    return max(1, int(config["batch"] / max(1.0, larger)))


# What the output takes from the input.


def fill(
    config: dict[str, Any],
    *,
    source: Source | Fields | None = None,
    trained: Trained | None = None,
    mask: MaskFunction | None = None,
) -> xr.Dataset:
    """Returns the filled fields of a configuration of `infer.py` in memory; arguments and errors: `open_filling`."""
    filling = open_filling(config, source=source, trained=trained, mask=mask)
    buffer = Buffer(Layout(template(filling), filling.trained.grid.valid.cpu().numpy(), config["members"]))
    run(filling, buffer)
    return buffer.finish()


def key(filling: Filling) -> str:
    """Returns what the filled fields depend on, in short: an interrupted run goes on only with the same."""
    config = {name: value for name, value in filling.config.items() if name not in FREE}
    files = [filling.trained.path, *files_behind(filling.fields), *filter(None, [getattr(filling.mask, "path", None)])]
    files += [filling.method.weak.path] if filling.method.weak is not None else []
    states = [(str(file), Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    text = json.dumps([config, filling.indices, states], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template(filling: Filling) -> Template:
    """Returns what the output takes from the input, and where it comes from."""
    fields, config = filling.fields, filling.config
    command = " ".join(f"infer.py ckpt={config['ckpt']} input={config['input']}".split())
    done = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} filled by vecfield_diffusion {__version__}: {command}"
    provenance = {
        "source": fields.source,
        **{name: value for name, value in {**fields.global_attrs, **fields.attrs}.items() if name not in NATIVE},
        "history": "\n".join([done, *filter(None, [str(fields.global_attrs.get("history", ""))])]),
        "config": yaml.safe_dump({name: value for name, value in config.items() if name != "options"}, sort_keys=False),
        "ckpt": str(filling.trained.path),
        "seed": config["seed"],
        "vecfield_diffusion_version": __version__,
        KEY: key(filling),
    }
    dims = tuple(map(bare, fields.dims))
    axes = dict(zip(dims, fields.coordinates(filling.indices).values(), strict=True))
    others = {bare(name): (tuple(map(bare, along)), *rest) for name, (along, *rest) in fields.extra_coords.items()}
    return Template(
        names=component_names(fields),
        dims=dims,
        coordinates={name: axis for name, axis in axes.items() if axis[0] is not None},
        units=fields.units,
        component_attrs=fields.component_attrs,
        extra_coords=others,
        attributes={name: stored(value) for name, value in provenance.items()},
        restore=partial(restored, fields),
    )


def stored(value: Any) -> Any:
    """Returns an attribute as netCDF can hold it: text or numbers."""
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return array.astype(np.int8) if array.ndim else int(array)
    return value if array.dtype.kind in "fiuUS" else str(value)


def component_names(fields: Fields) -> tuple[str, str]:
    """Returns the names of the components in the output: as in the source, where it has two variables."""
    own = tuple(map(bare, fields.names))
    return own if all(name.isidentifier() for name in own) and own[0] != own[1] else ("u", "v")


def bare(name: str) -> str:
    """Returns a name without the groups of the file that it lies in."""
    return name.rpartition("/")[2]

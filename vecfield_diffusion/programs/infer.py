"""`python infer.py`: fills gaps with an ensemble, or draws fields from nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.errors import UserError

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from vecfield_diffusion.data.fields import Fields
    from vecfield_diffusion.evaluation.plots import Coordinates
    from vecfield_diffusion.inference.cases import Cases
    from vecfield_diffusion.inference.files import FieldsWriter, Template
    from vecfield_diffusion.physics.grid import Grid
    from vecfield_diffusion.programs.method import Posterior, Seen
    from vecfield_diffusion.programs.trained import Trained


#: The columns of the printed table; `metrics.json` has all.
COLUMNS = ("cells", "rmse_component", "rmse_vector", "correlation", "crps", "spread_skill", "coverage_90")
#: Attributes of the native file, which the output is not.
NATIVE = {"format", "version", "dx", "dy", "boundary_x", "boundary_y"}
#: Snapshots whose masks decide what `inpainting=auto` is.
PROBE = 64


def infer(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Fills the gaps of chosen snapshots, writes `fields.nc`, `metrics.json` and `figure.png`, returns the scores.

    Snapshots are filled a few at a time, and each is kept as soon as it is: the same command goes on where an
    interrupted one stopped.

    Raises:
        UserError: A checkpoint, file or option that does not fit.
    """
    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.guidance.inpainting import Conditional
    from vecfield_diffusion.inference.files import FieldsWriter
    from vecfield_diffusion.programs.method import build_posterior, settle
    from vecfield_diffusion.programs.trained import choose_device, fit_size, load_trained

    check_ranges(config)
    device = choose_device(config["device"])
    mask = build(config["mask"], "mask", trusted=True)
    trained = load_trained(config["ckpt"], device, config["trust"])
    parts = build_posterior(config, trained, device)
    check_likelihood(config, parts, mask)
    print(f"{trained.path}: step {trained.step}, {type(trained.denoiser.diffusion).__name__}")
    fields, indices = chosen_snapshots(config, trained)
    trained = fit_size(trained, fields, config["overlap"], config["batch"])
    if parts.weak is not None:
        parts.guidance.weak = fit_size(parts.weak, fields, config["overlap"], config["batch"]).denoiser
    place(parts.sensor, fields)
    task = Task(config, trained, fields, indices, mask or default_mask(config), parts)
    seen = survey(task)
    if config["likelihood"] != "none":
        parts = replace(parts, inpainting=Conditional())
    task.parts = settle(parts, trained, seen, config["sigma_obs"])
    task.factor = calibration(task) if config["calibrate"] else 1.0
    writer = FieldsWriter(
        folder / "fields.nc", template(task), trained.grid.valid.numpy(), config["members"], key(config, task)
    )
    if trained.context is not None and (lacking := trained.context.lacking(fields)):
        print(f"note: {fields.source} does not have {', '.join(lacking)}, which the network was told in training")
    fill_all(task, writer)
    writer.finish()
    return report(task, folder)


class Task:
    """What is to be filled, and how.

    Arguments:
        config: The configuration.
        trained: The network, fitted to the size of the fields.
        fields: The data.
        indices: The snapshots.
        mask: What is observed of what is measured.
        parts: How the ensemble is made.
    """

    def __init__(
        self, config: dict[str, Any], trained: Trained, fields: Fields, indices: list[int], mask: Any, parts: Posterior
    ) -> None:
        self.config, self.trained, self.fields, self.indices = config, trained, fields, indices
        self.mask, self.parts, self.factor = mask, parts, 1.0

    @property
    def twin(self) -> bool:
        """Whether known fields are hidden, rather than the gaps of a file filled."""
        return self.config["input"] is None

    def cases(self, indices: Sequence[int]) -> Cases:
        """The cases of some snapshots, always the same."""
        import torch

        from vecfield_diffusion.inference.cases import cells_seen, make_cases, with_context

        config, trained, fields = self.config, self.trained, self.fields
        error = errors(config["sigma_obs"], fields, indices)
        how = (self.mask, config["seed"], error, self.twin, trained.grid, self.parts.sensor, config["hide"])
        cases = make_cases(fields, indices, *how)
        recorded = None if self.parts.sensor is None else self.parts.sensor.load(variable(fields, indices))
        if recorded is not None:  # the fields of the file stand for their coordinates alone
            how = (self.mask, config["seed"])
            recorded = recorded & trained.grid.valid & error_known(cases)
            pairs = zip(recorded, cases.numbers, strict=True)
            seen = torch.stack([cells_seen(each, *how, number, config["hide"]) for each, number in pairs])
            self.parts.sensor.keep(seen)
            cases = cases.unknown(seen)
        past = self.mask if config["history"] == "masked" else None
        how = (fields, trained.context, trained.denoiser.normalizer, config["seed"])
        return with_context(cases, *how, past, self.twin)

    def blocks(self) -> Iterator[list[int]]:
        """The positions of the snapshots that are filled at once."""
        size = max(1, at_once(self.config, self.trained) // self.config["members"])
        for first in range(0, len(self.indices), size):
            yield list(range(first, min(first + size, len(self.indices))))


def check_ranges(config: dict[str, Any]) -> None:
    """Raises UserError for a number out of range."""
    for key, least in (("members", 1), ("batch", 1), ("cases", 1), ("seed", 0), ("sigma_obs", 0.0), ("hide", 0.0)):
        if isinstance(config.get(key), int | float) and config[key] < least:
            raise UserError(f"{key} must be >= {least}, got {config[key]}")
    for key in ("hide", "overlap"):
        if not 0 <= config.get(key, 0.0) < 1:
            raise UserError(f"{key} must be in [0, 1), got {config[key]}")
    if config.get("bin") is not None and config["bin"] <= 0:
        raise UserError(f"bin must be > 0, got {config['bin']}")


def check_likelihood(config: dict[str, Any], parts: Posterior, mask: Any) -> None:
    """Raises UserError where a density is asked for that there is not."""
    from vecfield_diffusion.data.masks import Empty
    from vecfield_diffusion.guidance.cfg import NoGuidance
    from vecfield_diffusion.guidance.inpainting import Conditional
    from vecfield_diffusion.guidance.physics import Physics

    if config["likelihood"] == "none":
        return
    plain = isinstance(parts.guidance, NoGuidance) and not isinstance(parts.physics, Physics) and parts.sensor is None
    if not (plain and isinstance(parts.inpainting, Conditional | None)):
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


def chosen_snapshots(config: dict[str, Any], trained: Trained) -> tuple[Fields, list[int]]:
    """The fields of `input=`, or of the test split of the training data, and the indices that `time=` chooses."""
    from vecfield_diffusion.data.masks import load_mask
    from vecfield_diffusion.programs.trained import check_grid, held_out, open_input

    if config["input"] is not None:
        radial = radials(config)
        names = config["names"] if radial is None else (radial, radial)
        fields = open_input(config["input"], trained, names, config["bin"])
        offered = range(len(fields))
    else:
        fields, offered = held_out(trained, "test", config["trust"], config["data"])
    if config["domain"] is not None:
        valid = load_mask(config["domain"], fields.shape)
        fields.grid = replace(fields.grid, valid=valid)
    print(fields.summary())
    check_grid(fields, trained)
    chosen = config["time"]
    if chosen is None:
        chosen = 0 if config["input"] is None else "all"
    return fields, [offered[index] for index in times(chosen, fields, offered)]


def radials(config: dict[str, Any]) -> str | None:
    """A variable that a radar recorded, where a file is to be read through them."""
    return next(iter((config["sensor"] or {}).get("velocity") or ()), None)


def times(chosen: int | list[int] | str, fields: Fields, offered: range) -> list[int]:
    """The positions among the snapshots on offer that `time=` chooses: numbers, `all`, a range `a:b:c`, or a date.

    Raises:
        UserError: None of these, or one that there is not.
    """
    import numpy as np

    count = len(offered)
    if isinstance(chosen, str):
        ends = [part.strip() for part in chosen.split(":")]
        if chosen == "all":
            return list(range(count))
        if 2 <= len(ends) <= 3 and all(not end or end.lstrip("-").isdigit() for end in ends):
            steps = slice(*(int(end) if end else None for end in ends))
            if steps.step != 0 and (found := list(range(count)[steps])):
                return found
        elif fields.time is not None and fields.time.dtype.kind == "M":
            try:
                date = np.datetime64(chosen)
            except ValueError:
                date = None
            dates = fields.time[offered.start : offered.stop]
            # A date stands for all that lies in it: a day for its hours.
            if date is not None and (found := np.flatnonzero(dates.astype(date.dtype) == date).tolist()):
                return found
        raise UserError(f"time={chosen}: expected numbers up to {count - 1}, all, a range such as 0:{count}, or a date")
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    if not wanted or any(not -count <= index < count for index in wanted):
        raise UserError(f"time={chosen}: there are {count} snapshots, 0 to {count - 1}")
    return wanted


def place(sensor: Any, fields: Fields) -> None:
    """Tells an instrument where the cells are."""
    import torch

    if sensor is None:
        return
    x, y = (torch.tensor(each.astype(float)) for each in (fields.x, fields.y))
    sensor.place(x, y, fields.x_name == "lon")
    try:
        sensor.measure(torch.zeros(1, 2, *fields.shape), fields.grid)
    except ValueError as error:
        raise UserError(f"sensor.{error}") from error


def default_mask(config: dict[str, Any]) -> Any:
    """The mask for `mask=auto`: the gaps of `input=` as they are, and a block where there is none."""
    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.config.program import option

    return build(option("mask", "block" if config["input"] is None else "gaps"), "mask", trusted=True)


def variable(fields: Fields, indices: Sequence[int]) -> Any:
    """Reads variables of the file by name, `(N, 1, H, W)`, at the snapshots `indices`."""
    import numpy as np
    import torch

    return lambda name: torch.from_numpy(fields.variable(name)(np.asarray(indices, dtype=np.int64)))


def errors(given: float | str | list[str], fields: Fields, indices: Sequence[int]) -> float | torch.Tensor:
    """The errors that `sigma_obs` names: a number, a variable of the file, or one for each component.

    Raises:
        UserError: No such variable, or values that are no errors.
    """
    import torch

    if isinstance(given, int | float):
        return given
    names = [given] if isinstance(given, str) else given
    if len(names) not in (1, 2):
        raise UserError(f"sigma_obs={given}: expected a number, a variable of the file, or one for u and one for v")
    read = variable(fields, indices)
    found = torch.cat([read(name)[:, :1] for name in names], dim=1)
    if (found < 0).any():
        raise UserError(f"sigma_obs={given}: expected errors >= 0 in {fields.source}, found {found.nan_to_num().min()}")
    return found


def error_known(cases: Cases) -> torch.Tensor:
    """Where the error of a measurement is known, `(N, 1, H, W)` or what broadcasts to it."""
    return cases.sigma_obs.isfinite().all(dim=1, keepdim=True)


def survey(task: Task) -> Seen:
    """What is observed of all snapshots; says what is lacking.

    Raises:
        UserError: There is nothing to fill, or nothing to fill it from.
    """
    from vecfield_diffusion.data.masks import Empty
    from vecfield_diffusion.programs.method import Seen
    from vecfield_diffusion.programs.trained import check_error

    seen, lacking, filled, chosen = Seen(), [], True, set(task.indices[:: -(-len(task.indices) // PROBE)])
    for first in range(0, len(task.indices), PROBE):
        cases = task.cases(task.indices[first : first + PROBE])
        seen.add(cases, [number in chosen for number in cases.numbers])
        known = (cases.observed | cases.single.any(dim=1, keepdim=True)).flatten(1).any(dim=1)
        lacking += [number for number, any_known in zip(cases.numbers, known.tolist(), strict=True) if not any_known]
        filled = filled and bool((cases.observed | ~task.trained.grid.valid).all())
    check_error(seen.worst, task.trained)
    if not isinstance(task.mask, Empty) and lacking:
        if len(lacking) == len(task.indices):
            raise UserError(f"snapshot {lacking[0]} has no observed cell: choose another time=, or draw with mask=none")
        print(f"note: {len(lacking)} snapshots, such as {lacking[0]}, have no observed cell: they are drawn freely")
    if filled and task.parts.sensor is None:
        raise UserError(
            "nothing to fill: every cell is observed (cells that the file never measures are taken for land, unless "
            "domain=FILE marks them). Hide some with mask=block, or hide=0.2"
        )
    return seen


def key(config: dict[str, Any], task: Task) -> str:
    """What the filled fields depend on, in short: an interrupted run goes on only with the same."""
    free = ("name", "batch", "device", "colour")
    told = {name: value for name, value in config.items() if name not in free}
    files = [task.trained.path, *sources(task.fields.source), *filter(None, [getattr(task.mask, "path", None)])]
    files += [task.parts.weak.path] if task.parts.weak is not None else []
    states = [(str(file), Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    text = json.dumps([told, task.indices, states], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources(source: str) -> list[Path]:
    """The files that fields were read from."""
    from vecfield_diffusion.data.readers import files_of

    try:
        return files_of(source)
    except UserError:
        return []


def template(task: Task) -> Template:
    """What the output takes from the input, and where it comes from."""
    import yaml

    from vecfield_diffusion import __version__
    from vecfield_diffusion.inference.files import Template

    fields, config = task.fields, task.config
    said = " ".join(f"infer.py ckpt={config['ckpt']} input={config['input']}".split())
    done = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} filled by vecfield_diffusion {__version__}: {said}"
    provenance = {
        "source": fields.source,
        **{name: value for name, value in {**fields.global_attrs, **fields.attrs}.items() if name not in NATIVE},
        "history": "\n".join([done, *filter(None, [str(fields.global_attrs.get("history", ""))])]),
        "config": yaml.safe_dump(config, sort_keys=False),
        "ckpt": str(task.trained.path),
        "seed": config["seed"],
        "vecfield_diffusion_version": __version__,
    }
    dims = tuple(map(bare, fields.dims))
    named = dict(zip(dims, fields.coordinates(task.indices).values(), strict=True))
    others = {bare(name): (tuple(map(bare, along)), *rest) for name, (along, *rest) in fields.extra_coords.items()}
    return Template(
        names=names(fields),
        dims=dims,
        coordinates={name: values for name, values in named.items() if values[0] is not None},
        units=fields.units,
        component_attrs=fields.component_attrs,
        extra_coords=others,
        attributes={name: stored(value) for name, value in provenance.items()},
    )


def stored(value: Any) -> Any:
    """An attribute as netCDF can hold it: text or numbers."""
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind == "b":
        return array.astype(np.int8) if array.ndim else int(array)
    return value if array.dtype.kind in "fiuUS" else str(value)


def names(fields: Fields) -> tuple[str, str]:
    """The components in the output: as in the source, where it has two variables."""
    own = tuple(map(bare, fields.names))
    return own if all(name.isidentifier() for name in own) and own[0] != own[1] else ("u", "v")


def bare(name: str) -> str:
    """A name without the groups of the file that it lies in."""
    return name.rpartition("/")[2]


def calibration(task: Task) -> float:
    """The factor of the spread that was fitted for what is done here. Raises UserError where there is none."""
    from vecfield_diffusion.config.program import option
    from vecfield_diffusion.inference.calibration import find_factor

    config, trained = task.config, task.trained
    mask = config["mask"] or option("mask", "block" if task.twin else "gaps")
    factor = find_factor(trained.calibration, process_of(config, mask, task.parts), trained.path)
    print(f"spread times {factor:.3f}, as fitted on the validation snapshots")
    return factor


def process_of(config: dict[str, Any], mask: dict[str, Any], parts: Posterior) -> dict[str, Any]:
    """What a factor of the spread is fitted on, `parts` with nothing left open."""
    from vecfield_diffusion.config.program import option
    from vecfield_diffusion.inference.calibration import describe_process

    node = config["inpainting"] or option("inpainting", type(parts.inpainting).__name__.lower())
    return describe_process(config, mask, node)


def fill_all(task: Task, writer: FieldsWriter) -> None:
    """Fills every block of snapshots that is not finished, with one progress bar over all."""
    from tqdm import tqdm

    from vecfield_diffusion.inference.calibration import apply_factor

    done = writer.done()
    left = [[position for position in block if position not in done] for block in task.blocks()]
    if done:
        print(f"going on: {len(done)} of {len(task.indices)} snapshots are finished")
    fields = sum(map(len, left)) * task.config["members"]
    total = None if task.parts.evaluations is None else fields * task.parts.evaluations
    with tqdm(total=total, unit=" evaluations", unit_scale=True, disable=None) as bar:
        for block in filter(None, left):
            bar.set_postfix_str(f"snapshot {block[0] + 1} of {len(task.indices)}")
            cases = task.cases([task.indices[position] for position in block])
            members = fill(task.config, task.trained, task.parts, cases, bar)
            known = cases.observed | cases.single
            members = members if task.factor == 1 else apply_factor(members, task.factor, known, cases.sigma_obs)
            observed = known.numpy()
            truth = cases.truth.numpy() if cases.hidden.any() else None
            writer.write(block, members.numpy(), observed, truth)
    say_guard(task.parts)


def fill(
    config: dict[str, Any], trained: Trained, parts: Posterior, cases: Cases, bar: tqdm | None = None
) -> torch.Tensor:
    """The ensemble `(M, N, 2, H, W)` in physical units, with a progress bar."""
    import torch
    from tqdm import tqdm

    from vecfield_diffusion.inference.ensemble import sample_ensemble

    denoiser = trained.denoiser
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    total = None if parts.evaluations is None else config["members"] * len(observation) * parts.evaluations
    how = (denoiser, parts.sampler, parts.inpainting, parts.physics, observation, trained.grid)
    options = {key: config[key] for key in ("members", "seed")} | {"batch": at_once(config, trained)}
    options |= {"guidance": parts.guidance, "sensor": parts.sensor, "numbers": cases.numbers}
    own = tqdm(total=total, unit=" evaluations", unit_scale=True, disable=None if bar is None else True)
    try:
        with own:
            return sample_ensemble(*how, **options, progress=(own if bar is None else bar).update)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full at batch={config['batch']}: give a smaller one") from error


def at_once(config: dict[str, Any], trained: Trained) -> int:
    """The fields that are computed at once: `batch`, fewer where they are larger than those of the network."""
    larger = trained.grid.valid.numel() / math.prod(trained.window)
    return max(1, int(config["batch"] / max(1.0, larger)))


def say_guard(parts: Posterior) -> None:
    """Prints how often the network's Jacobian was no covariance."""
    solves, guard = (getattr(parts.inpainting, name, 0) for name in ("solves", "guard"))
    if guard:
        print(
            f"mmps: in {guard / solves:.0%} of the systems the network's Jacobian was no covariance (not symmetric, "
            "or not positive); GMRES solved them in place of conjugate gradients"
        )


def likelihood(config: dict[str, Any], trained: Trained, cases: Cases) -> torch.Tensor:
    """The log-likelihood `(N,)` of the true fields in nats per value, with a progress bar."""
    from tqdm import tqdm

    from vecfield_diffusion.inference.likelihood import nats_per_value

    if not cases.hidden.any():
        raise UserError("likelihood is that of values which were not observed, and there are none: add mask=none")
    denoiser, steps = trained.denoiser, config["likelihood_steps"]
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    levels = denoiser.diffusion.levels(steps, "log_snr")
    how = (denoiser, cases.truth, observation, trained.grid, levels, config["likelihood"], config["seed"])
    with tqdm(total=len(observation) * (2 * steps - 1), unit=" evaluations", disable=None) as bar:
        return nats_per_value(*how, cases.numbers, config["batch"], bar.update)


def report(task: Task, folder: Path) -> dict[str, float]:
    """Scores what was written, writes the scores and, last, the picture; prints what they say."""
    import torch

    from vecfield_diffusion.evaluation.metrics import table
    from vecfield_diffusion.evaluation.plots import figure_inpainting
    from vecfield_diffusion.inference.files import read_members, write_text_atomic

    config, trained, fields = task.config, task.trained, task.fields
    judged, nats, drawn = Judged(trained.grid), [], None
    for block in task.blocks():
        cases = task.cases([task.indices[position] for position in block])
        members = torch.from_numpy(read_members(folder / "fields.nc", names(fields), block))
        judged.add(members, cases)
        drawn = (cases, members[:, 0]) if drawn is None else drawn
        if config["likelihood"] != "none":
            nats += likelihood(config, trained, cases).tolist()
    results: dict[str, Any] = judged.results()
    if nats:
        mean = sum(nats) / len(nats)
        results["all"]["log_likelihood"] = mean
        results["log_likelihood"] = {str(index): value for index, value in zip(task.indices, nats, strict=True)}
        print(
            f"log-likelihood: {mean:.4f} nats per value, in standard deviations of the data blurred by "
            f"{trained.denoiser.diffusion.sigma_min:.3g}"
        )
    write_text_atomic(folder / "metrics.json", json.dumps(without_nan(results), indent=2) + "\n")
    regions = [{"cells": name, **results[name]} for name in ("hidden", "observed") if name in results]
    if regions:
        print(table(regions, COLUMNS))
    print(f"divergence of the members: {results['all']['divergence_rms']:.3g} per s (RMS)")
    cases, members = drawn
    figure_inpainting(
        folder / "figure.png",
        cases.truth[0] if cases.hidden[0].any() else None,
        cases.observed[0],
        members,
        trained.grid,
        fields.units,
        colour=config["colour"],
        coordinates=axes(fields),
        measured=cases.y[0],
    )
    print(f"{folder}: fields.nc, metrics.json, figure.png")
    return results.get("hidden", {})


class Judged:
    """Scores gathered over blocks of cases: on hidden and on observed cells, and the divergence everywhere."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.sums: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, members: torch.Tensor, cases: Cases) -> None:
        """Takes in members `(M, N, 2, H, W)`."""
        from vecfield_diffusion.evaluation.metrics import sums
        from vecfield_diffusion.evaluation.physical import divergence_squares

        for name, where in (("hidden", cases.hidden), ("observed", cases.observed)):
            if (where & cases.truth.isfinite()).any():
                self._gather(name, sums(members, cases.truth, where))
        everywhere = self.grid.valid.expand_as(cases.observed)
        squares, cells = divergence_squares(members, self.grid, everywhere)
        self._gather("all", {"divergence": squares, "divergence_cells": cells})

    def _gather(self, region: str, found: dict[str, torch.Tensor]) -> None:
        before = self.sums.get(region, {})
        self.sums[region] = {name: before.get(name, 0.0) + value.sum(dim=0) for name, value in found.items()}

    def results(self) -> dict[str, dict[str, float]]:
        """The scores of all blocks together."""
        from vecfield_diffusion.evaluation.metrics import derive

        total = self.sums.pop("all")
        found = {name: {k: float(v) for k, v in derive(part).items()} for name, part in self.sums.items()}
        return found | {"all": {"divergence_rms": float((total["divergence"] / total["divergence_cells"]).sqrt())}}


def axes(fields: Fields) -> Coordinates:
    """The axes of a picture: degrees, or the units of the source, kilometres where metres would be long numbers."""
    from vecfield_diffusion.evaluation.plots import Coordinates

    if fields.x_name == "lon":
        return Coordinates(fields.x, fields.y, "longitude", "latitude")
    units = fields.x_attrs.get("units", "m")
    if units == "m" and abs(fields.x).max() >= 1e4:
        return Coordinates(fields.x / 1e3, fields.y / 1e3, "x [km]", "y [km]")
    return Coordinates(fields.x, fields.y, f"x [{units}]", f"y [{units}]")


def without_nan(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """The same with None for what has no value, such as the spread of one member: JSON knows no NaN."""
    return {
        region: {name: value if math.isfinite(value) else None for name, value in values.items()}
        for region, values in results.items()
    }

"""`ckpt=none`: a series filled by the Gaussian field in space and time that it is itself drawn from.

Nothing is trained. The mean, the variances and the correlations in space and time are learnt from what the file
measures, gaps and all (`evaluation/estimation.py`); a part of it is hidden first, so that the user knows what the
result is worth, and the spread is corrected by what is found there; then every member is a trajectory of that field
conditioned on what was measured (`evaluation/interpolation.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vecfield_diffusion import progress
from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.draws import MaskFunction, says_so
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import load_mask
from vecfield_diffusion.data.sequences import Timeline, lengthened
from vecfield_diffusion.data.statistics import believed
from vecfield_diffusion.data.words import INPUT, called
from vecfield_diffusion.ellipses import blocks, deviations, root
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.estimation import Choice, Estimator, choose
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.spacetime import Floats, SpaceTime
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.evaluation.trial import judge, pieces
from vecfield_diffusion.inference.cases import Cases, make_cases
from vecfield_diffusion.inference.files import FieldsWriter
from vecfield_diffusion.inference.super_observations import Tally, Thinning
from vecfield_diffusion.inference.template import Buffer
from vecfield_diffusion.inference.work_items import shared_out
from vecfield_diffusion.models.measured import SPARSE
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.accuracy import errors, is_constant, thinning
from vecfield_diffusion.programs.filling import check_ranges
from vecfield_diffusion.programs.method import node_of
from vecfield_diffusion.programs.source import ZEROS, Source, files_behind, is_table, open_source, times

#: Of the printed table.
COLUMNS = ("method", "rmse_component", "crps", "coverage_90", "spread_skill")
#: What a network alone can do, and how that is left out.
PLAIN = {
    "sampler": {
        "_target_": "vecfield_diffusion.samplers.deterministic.DPMpp2M",
        "steps": 32,
        "schedule": "log_snr",
        "temperature": 1.0,
    },
    "inpainting": {},
    "physics": {"_target_": "vecfield_diffusion.guidance.physics.NoPhysics"},
    "guidance": {"_target_": "vecfield_diffusion.guidance.cfg.NoGuidance"},
    "sensor": {},
    "likelihood": "none",
    "thermodynamics": False,
    "weights": None,
    "calibrate": False,
}
#: Frames on either side of a block that are measured and count.
REACH = 4
#: Measured values of a block and the frames around it, at most, where they do not fit into one system.
LARGE = 100_000
#: Frames that are read or written at once.
READ = 64
#: Measured frames below which statistics are not learnt from the past alone.
ENOUGH = 30
#: Values of a series, those of the frames between runs included, that fit into about 3 GB.
VALUES = 2.5e7


class Frames(NamedTuple):
    """Frames that are filled at once, and the positions of those of them that are wanted."""

    block: range
    places: list[int]

    @property
    def name(self) -> str:
        """What they are called as an item of work."""
        return f"{self.block.start:08d}"


@dataclass(frozen=True)
class Series:
    """A series that is filled; it has what `programs/fill.py` and `programs/infer.py` ask of a `Filling`.

    Arguments:
        config: The configuration of `infer.py`.
        fields: The data, with the snapshots of the forecast.
        indices: The snapshots that are filled.
        mask: What is observed of what is measured.
        line: The frames of the snapshots.
        thinning: How what is observed becomes super-observations; None where it does not.
    """

    config: dict[str, Any]
    fields: Fields
    indices: list[int]
    mask: MaskFunction
    line: Timeline
    thinning: Thinning | None = None

    origin = "none"
    sensor = None

    @property
    def grid(self) -> Grid:
        """The grid."""
        return self.fields.grid

    @property
    def files(self) -> list[Path]:
        """The files that the result depends on."""
        return [*files_behind(self.fields), *filter(None, [getattr(self.mask, "path", None)])]

    def cases(self, positions: Sequence[int]) -> Cases:
        """Returns the cases of some of the snapshots that are filled."""
        return self._read([self.indices[position] for position in positions])

    def _read(self, snapshots: list[int]) -> Cases:
        config, through = self.config, says_so(self.mask)
        options = dict(sigma_obs=errors(config, self.fields, snapshots), hide=config["hide"])
        return make_cases(self.fields, snapshots, self.mask, seed=config["seed"], through=through, **options)

    def run(self, sink: FieldsWriter | Buffer) -> dict[str, dict[str, float]]:
        """Fills every snapshot that is not there yet; returns what the trial found.

        Raises:
            UserError: Nothing to learn from, or a sink that cannot be written.
        """
        done = sink.done()
        if done:
            print(f"going on: {len(done)} of {len(self.indices)} snapshots are finished")
        series, noise = self._observed()
        how, factor, found = self._learn(series, noise)
        series, noise = self._thinned(series, noise)
        items = [item for item in self._blocks(how.block) if not done.issuperset(item.places)]
        ours = shared_out(items, lambda item: sink.done().issuperset(item.places), sink.work)
        ours, again = itertools.tee(ours)  # both are asked for an item before any for the next
        config = {"members": self.config["members"], "seed": self.config["seed"]}
        parts = how.parts(series, noise, (block for block, _ in again), **config)
        with progress.bar(sum(len(places) for _, places in items), "snapshots", "filling") as bar:
            for (block, places), part in zip(ours, parts, strict=True):
                at = [self.line.frames[self.indices[place]] - block.start for place in places]
                spread = part.mean + factor * (part.members - part.mean)
                cases = self.cases(places)
                known = (cases.observed | cases.single).numpy()
                members = np.where(known & (deviations(cases.sigma_obs).numpy() == 0), cases.y.numpy(), spread[:, at])
                truth = cases.truth.numpy() if cases.hidden.any() else None
                sink.write(places, members.astype(np.float32), known, truth)
                bar.update(len(places))
        return {f"trial: {name}": dict(scores) for name, scores in found.items()} | {"trial": {"spread_factor": factor}}

    def _observed(self) -> tuple[Floats, Floats | float]:
        """What was observed, `(T, 2, H, W)` with NaN elsewhere, and the variance of its errors."""
        shape = (int(self.line.frames[-1]) + 1, 2, *self.fields.shape)
        series, tally = np.full(shape, np.nan), Tally()
        constant = is_constant(self.config)
        noise = self.config["sigma_obs"] ** 2 if constant else np.full((shape[0], 3, *shape[2:]), np.nan)
        for first in range(0, len(self.fields), READ):
            snapshots = list(range(first, min(first + READ, len(self.fields))))
            cases = self._read(snapshots)
            if self.thinning is not None:
                tally.add(cases, self.thinning(cases))
            series[self.line.frames[snapshots]] = cases.y.double().numpy()
            if not constant:
                variance = blocks(cases.sigma_obs.double())
                noise[self.line.frames[snapshots], : max(2, variance.shape[1])] = variance.numpy()
        if not constant and np.isnan(noise[:, 2]).all():
            noise = noise[:, :2]
        series[:, :, ~self.grid.valid.numpy()] = np.nan
        if self.thinning is not None:
            print(tally.words(self.thinning, self.fields.units))
        return series, noise

    def _thinned(self, series: Floats, noise: Floats | float) -> tuple[Floats, Floats | float]:
        """Super-observations of a series and the variance of their errors; both as they are without `thin=`."""
        if self.thinning is None:
            return series, noise
        variance = torch.from_numpy(noise)
        sigma = root(*variance.split(1, dim=1)) if variance.shape[1] == 3 else variance.sqrt()
        y, sigma = self.thinning.means(torch.from_numpy(series), sigma)
        return y.numpy(), blocks(sigma).numpy()

    def _learn(
        self, series: Floats, noise: Floats | float
    ) -> tuple[Interpolation, float, Mapping[str, Mapping[str, float]]]:
        """The interpolation, the factor of its spread, and what hidden values say of both and of simpler methods."""
        valid, seed = self.grid.valid.numpy(), self.config["seed"]
        past = self.config["time_context"] == "past"
        known = self._known(series) if past else series
        noise = noise[: len(known)] if isinstance(noise, np.ndarray) else noise
        measured = np.isfinite(known).all(axis=1)
        if measured.any(axis=(1, 2)).sum() < 5:
            raise UserError(
                f"{self.fields.source}: ckpt=none learns from the file itself, and only "
                f"{int(measured.any(axis=(1, 2)).sum())} of its times measured anything; give one with more, or a "
                "network: ckpt=RUN"
            )
        hidden, shape = pieces(measured, valid, seed)
        error = float(noise[:, :2][np.isfinite(known)].mean()) if isinstance(noise, np.ndarray) else float(noise)
        estimator = Estimator(self.grid.periodic, self.line.lags, noise=error)
        shown = np.where(hidden[:, None], np.nan, known)
        choice: Choice = choose(shown, valid, estimator, seed=seed)
        print(f"field in space and time: {choice.words}")
        if choice.estimator.white and not error:
            sigma = np.sqrt(choice.estimator.white * np.nanvar(known - choice.field.mean))
            print(
                f"note: what is white looks like errors of {sigma:.2g} {self.fields.units}. It counts as a part of the "
                f"field, which keeps all that was measured; sigma_obs={sigma:.2g} takes it for errors"
            )
        if not hidden.any():
            print("note: the gaps of no time hide anything of another, so what the result is worth is not known")
            return self._way(choice.field, measured), 1.0, {}
        trial = judge(self._way(choice.field, measured), known, noise, hidden, self.grid, thinned=self._thinned)
        print(f"a tenth of what was measured hidden, as {shape}, and filled from the rest ({self.fields.units}):")
        print(table([{"method": name, **row} for name, row in trial.rows.items()], COLUMNS))
        way = self._way(choice.estimator.learn(known, valid, choice.name), measured)
        print(f"spread times {trial.factor:.3f}, as found there")
        return way, trial.factor, trial.rows

    def _known(self, series: Floats) -> Floats:
        """The series before the first frame that is filled, where it is long enough to learn from."""
        first = self.line.frames[min(self.indices)]
        if np.isfinite(series[:first]).any(axis=(1, 2, 3)).sum() >= ENOUGH:
            return series[:first]
        print(
            "note: mean and covariance are learnt from all times, later ones too, for fewer than "
            f"{ENOUGH} lie before the first that is filled: time=50: or so leaves some"
        )
        return series

    def _way(self, field: SpaceTime, measured: np.ndarray) -> Interpolation:
        """The interpolation with blocks whose values fit into one system, or long ones where those of two do not."""
        if self.config["time_context"] == "past":
            return Interpolation(field, before=REACH, after=0, block=1)
        each = max(1.0, 2 * measured.sum() / max(1, measured.any(axis=(1, 2)).sum()))
        fitting, large = (int(most / each) - 2 * REACH for most in (SPARSE, LARGE))
        block = min(fitting, 4) if fitting >= 2 else int(np.clip(large, 2, 16))
        return Interpolation(field, before=REACH, after=REACH, block=block)

    def _blocks(self, size: int) -> Iterator[Frames]:
        """Blocks of frames, the same whatever is filled of them, and the positions that lie in each."""
        frames = self.line.frames[self.indices]
        for number in np.unique(frames // size):
            stop = min((number + 1) * size, int(self.line.frames[-1]) + 1)
            yield Frames(range(int(number * size), int(stop)), np.flatnonzero(frames // size == number).tolist())


def open_series(
    config: dict[str, Any],
    *,
    source: Source | Fields | None = None,
    mask: MaskFunction | None = None,
) -> Series:
    """Returns what a configuration of `infer.py` with `ckpt=none` says, checked.

    Arguments:
        config: The configuration.
        source: The data, where `input=` does not name them.
        mask: What is observed, where `mask=` does not say it.

    Raises:
        UserError: A source or an option that does not fit.
    """
    check_ranges(config)
    refuse(config)
    source = config["input"] if source is None else source
    if source is None:
        raise UserError("ckpt=none learns from the file that it fills: add input=FILE, or give a network: ckpt=RUN")
    if is_table(source):
        raise UserError(f"input={source}: points in a table have no grid without a network: give ckpt=RUN")
    mask = mask or build(config["mask"] or node_of(config, "mask", "gaps"), "mask", trusted=True)
    fields = source if isinstance(source, Fields) else _opened(source, config)
    if config["domain"] is not None:
        fields = fields.within(load_mask(config["domain"], fields.shape))
    line = Timeline.of(lengthened(fields, config["horizon"]))
    check_size(fields, line)  # before all of them are read
    with called(INPUT):
        fields, left_out = believed(fields)
    if left_out:
        print(f"note: {fields.source}: {left_out}")
    print(fields.summary())
    chosen = times("all" if config["time"] is None else config["time"], fields, range(len(fields)))
    after = range(len(fields), len(fields) + config["horizon"])
    fields = lengthened(fields, config["horizon"])
    print(line.words + (f", {len(after)} of them after the last" if after else ""))
    return Series(config, fields, [*chosen, *after], mask, line, thinning(config, source, fields.grid))


def _opened(source: Source, config: Mapping[str, Any]) -> Fields:
    options = {} if config["names"] is None else dict(zip("uv", config["names"], strict=True))
    options |= {} if config["quality"] is None else {"quality": config["quality"]}
    options |= {} if config["zeros"] is None else {"land": ZEROS[config["zeros"]]}
    try:
        with called(INPUT):
            return open_source(source, **options)
    except (UserError, ValueError) as error:
        raise UserError(f"input={source}: {error}" if isinstance(source, str | Path) else str(error)) from error


def check_size(fields: Fields, line: Timeline) -> None:
    """Raises UserError where the frames of a series are more than fit into memory at once."""
    count, (height, width) = int(line.frames[-1]) + 1, fields.shape
    if 2.0 * count * height * width > VALUES:
        raise UserError(
            f"{fields.source}: {count} times of {height}x{width} cells are too many at once. Give a part of the file"
        )


def refuse(config: Mapping[str, Any]) -> None:
    """Raises UserError where something is asked for that takes a network, or a horizon that is none."""
    asked = [key for key, plain in PLAIN.items() if (config[key] or {}) != plain and config[key] != plain]
    if asked:
        raise UserError(f"{', '.join(asked)}: takes a network, and ckpt=none has none. Leave it out, or give ckpt=RUN")
    if config["horizon"] < 0:
        raise UserError(f"horizon must be >= 0, got {config['horizon']}")

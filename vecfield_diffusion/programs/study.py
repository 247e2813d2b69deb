"""What an evaluation is about: the networks, the unseen snapshots, the baselines, and the cases of each mask.

All is opened, checked and resolved here before anything is computed, so that a mistake shows at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion import __version__
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import anew
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.fingerprint import fingerprint
from vecfield_diffusion.data.gaps import OtherTimes
from vecfield_diffusion.data.masks import Full, Mask
from vecfield_diffusion.data.sequences import Timeline
from vecfield_diffusion.data.splits import independent
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baseline import Baseline
from vecfield_diffusion.evaluation.baselines import (
    BASELINES,
    CORRELATED,
    Climatology,
    fit_baselines,
    no_memory,
    unsuited,
)
from vecfield_diffusion.evaluation.comparison import Setting
from vecfield_diffusion.evaluation.plots import date_of
from vecfield_diffusion.evaluation.series import SERIES_BASELINES, ObservedSeries, SeriesBaseline, fit_series
from vecfield_diffusion.evaluation.trajectory import TrueSeries
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.inference.cases import Cases, make_cases
from vecfield_diffusion.programs.accuracy import errors
from vecfield_diffusion.programs.ahead import earlier, foretellable, foretold
from vecfield_diffusion.programs.baselines import NUGGET, REGRESSION, training_fields
from vecfield_diffusion.programs.compared import Network, load_models
from vecfield_diffusion.programs.in_time import (
    AROUND,
    consecutive,
    neighbours,
    observations,
    step_of,
    time_before,
    training_frames,
)
from vecfield_diffusion.programs.trained import Trained, choose_device, held_out, unfinished

#: Keys on which scores do not depend, or that name masks, each of which is kept by itself.
FREE = ("name", "masks", "horizon", "device", "batch", "options")


@dataclass(frozen=True)
class Study:
    """The models, the unseen snapshots of the data that they are compared on, and the baselines that are wanted.

    Attributes:
        config: The keys of `evaluate.py`.
        models: The networks, each with its method.
        fields: The data.
        offered: The snapshots of the split.
        indices: Those of them that are filled.
        wanted: Names of baselines that are fitted here.
    """

    config: dict[str, Any]
    models: list[Network]
    fields: Fields
    offered: range
    indices: list[int]
    wanted: list[str]

    @property
    def reference(self) -> Trained:
        """The network whose data, grid and scale are those of all."""
        return self.models[0].trained

    @cached_property
    def untrained(self) -> list[str]:
        """A sentence on each network whose run did less than half of its schedule."""
        return [said for model in self.models if (said := unfinished(model.trained))]

    @cached_property
    def helps(self) -> list[str]:
        """A sentence on each network with a gate: at which noise levels it helps the estimate that it builds on."""
        return [f"{model.trained.path}: {said}" for model in self.models if (said := model.trained.helps)]

    @property
    def sensor(self) -> Sensor | None:
        """The instrument through which the fields are seen; None for velocities of single cells."""
        return self.models[0].method.sensor

    def mask(self, mask: Mask) -> Mask:
        """The mask for known fields: one that shows all that a file measures stands for the gaps of other times.

        It is drawn anew for each snapshot, unless it says how it goes through time.
        """
        if isinstance(mask, Full):
            mask = OtherTimes.of(self.fields, self.reference.split["train"], time=mask.time)
        return anew(mask)

    def cases(self, mask: Mask, indices: Sequence[int] | None = None, *, plain: bool = False) -> Cases:
        """The snapshots, or others, through a mask, and unless `plain` through the instrument where there is one."""
        indices = self.indices if indices is None else indices
        error = errors(self.config, self.fields, indices)
        options = dict(seed=self.config["seed"], add_error=True, sensor=None if plain else self.sensor)
        return make_cases(self.fields, indices, mask, sigma_obs=error, through=True, **options)

    @cached_property
    def line(self) -> Timeline:
        """The frame of every snapshot of the data, at equal steps. Raises UserError where times jump too often."""
        return Timeline.of(self.fields)

    def observations(self, mask: Mask, ahead: int = 0) -> Iterable[ObservedSeries]:
        """What is observed of the snapshots and of those of the split around them, each through the mask anew.

        Of forecasts it is, for each snapshot by itself, what is observed until `ahead` steps before it.
        """
        around = self.cases(mask, neighbours(self.line.frames, self.offered, self.indices, AROUND + ahead))
        given = observations(around, self.line, self.indices, self.floor)
        return foretold(given, ahead, AROUND) if ahead else given

    def forerunners(self, mask: Mask, ahead: int) -> Tensor:
        """What is observed of the snapshot `ahead` steps before each, `(N, 2, H, W)`, NaN where there is none."""
        numbers = earlier(self.fields, self.indices, ahead)
        known = self.cases(mask, numbers.clip(min=0).tolist(), plain=True).y
        inside = torch.from_numpy((numbers >= self.offered.start) & (numbers < self.offered.stop))
        return torch.where(inside.view(-1, 1, 1, 1), known, torch.nan)

    @property
    def floor(self) -> float:
        """The least error of an observation, for optimal interpolation, in the units of the data."""
        return NUGGET * self.reference.statistics.std

    def true_series(self, setting: Setting) -> TrueSeries:
        """The snapshots, which follow one another, as the truth of trajectories; ValueError where too few is known."""
        step, unit, seconds = step_of(self.fields)
        return TrueSeries(setting.truth, setting.grid, self.climatology, step, unit, seconds, self.config["seed"])

    @cached_property
    def training(self) -> Tensor:
        """Training snapshots `(n, 2, H, W)`."""
        return training_fields(self.reference, self.fields)

    @cached_property
    def climatology(self) -> Tensor:
        """The mean field of training `(2, H, W)`."""
        return torch.from_numpy(Climatology().fit(self.training.numpy(), self.fields.grid).mean)

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """The baselines that are wanted and suited, fitted, by key."""
        wanted, share = [key for key in self.wanted if key in BASELINES], self.reference.statistics.divergent
        correlation = self.persistence if "persistence" in wanted else math.nan
        reasons = unsuited(wanted, divergence_share=share, persistence=correlation)
        left_out(reasons)
        suited = [key for key in wanted if key not in reasons]
        return fit_baselines(suited, self.training.numpy(), self.fields.grid)

    @cached_property
    def series_baselines(self) -> dict[str, SeriesBaseline]:
        """Those of series that are wanted and suited, fitted to training frames, by key."""
        wanted = [key for key in self.wanted if key in SERIES_BASELINES]
        if not wanted:
            return {}
        try:
            series = training_frames(self.fields, self.line.frames, self.reference.split["train"])
            reason = "" if self.persistence >= CORRELATED else no_memory(self.persistence)
        except UserError as error:
            reason = str(error)
        if reason:
            left_out(dict.fromkeys(wanted, reason))
            return {}
        past = self.config["time_context"] == "past"
        fitted, reasons = fit_series(wanted, series, self.fields.grid, lags=self.line.lags, past=past)
        left_out(reasons)
        for key, baseline in fitted.items():
            if baseline.learnt:
                print(f"{key}: {baseline.learnt}")
        return fitted

    def label(self, key: str, ahead: int = 0) -> str:
        """What tables call a baseline; persistence says from when it is."""
        if key in SERIES_BASELINES:
            return SERIES_BASELINES[key].label
        when = "the last observed" if ahead else f"{time_before(self.fields, self.indices)} before"
        return BASELINES[key].named(when if BASELINES[key].needs_previous else "")

    @cached_property
    def before(self) -> Tensor:
        """The snapshot before each of those that are scored, `(N, 2, H, W)`, NaN where there is none."""
        return Context((1,), (), {}, {}).parts(self.fields, self.indices)[0]

    @property
    def dates(self) -> list[str]:
        """When each of the snapshots that are scored was, in words; its number where that is not known."""
        return [date_of(self.fields, index) for index in self.indices]

    @property
    def persistence(self) -> float:
        """The correlation of the anomalies with those of the snapshot before; NaN where there is none."""
        now, before = (fields - self.climatology for fields in (self.fields.read(self.indices), self.before))
        both = now.isfinite() & before.isfinite()
        now, before = now[both], before[both]
        return float((now * before).sum() / (now.square().sum() * before.square().sum()).sqrt())

    @cached_property
    def independent(self) -> float:
        """How many of the cases are independent."""
        return independent(self.fields, self.indices)

    @cached_property
    def key(self) -> str:
        """What the scores of a mask depend on, in short: an interrupted evaluation goes on only with the same."""
        config = {key: value for key, value in self.config.items() if key not in FREE}
        paths = [model.trained.path for model in self.models]
        paths += [model.method.weak.path for model in self.models if model.method.weak is not None]
        states = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        text = json.dumps([__version__, config, self.indices, states, fingerprint(self.fields)], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_study(config: dict[str, Any], wanted: Sequence[str], split: str = "test", *, farthest: int = 0) -> Study:
    """The networks, and the snapshots of a split of the data that they were trained on.

    Arguments:
        config: The keys of `evaluate.py`.
        wanted: The names of baselines.
        split: `train`, `validation` or `test`.
        farthest: The steps of the longest forecast: snapshots have others so long before them in the split.

    Raises:
        UserError: Checkpoints, data or options that do not fit.
    """
    models = load_models(config, wanted, choose_device(config["device"]))
    fields, offered = held_out(models[0].trained, split, config["trust"], config["data"])
    models = [model.placed(fields, config) for model in models]
    count = min(config["cases"], len(offered))
    if config["series"]:
        indices = consecutive(Timeline.of(fields).frames, offered, count, fields.source)
    else:
        foreseen = foretellable(fields, offered, farthest)
        if not foreseen:
            raise UserError(
                f"horizon={config['horizon']}: none of the {len(offered)} snapshots of {fields.source} that training "
                f"kept aside has another one {farthest} steps before it among them. Give a shorter one"
            )
        count = min(count, len(foreseen))
        spaced = [foreseen[i * len(foreseen) // count] for i in range(count)]
        indices = [i for i in spaced if fields.read([i]).isfinite().any()]
    if not indices:
        raise UserError(f"{fields.source}: none of the snapshots that training kept aside measures anything")
    for model in models:
        name = "" if len(models) == 1 else f"{model.name}: "
        print(f"{name}{model.trained.path}: step {model.trained.step}")
    print(f"{len(indices)} unseen snapshots of {fields.source}" + ", one after the other" * config["series"])
    study = Study(config, models, fields, offered, indices, [name for name in wanted if name != REGRESSION])
    if config["series"] and not study.persistence >= CORRELATED:
        reason = no_memory(study.persistence)
        raise UserError(f"series=true: the snapshots of {fields.source} are no series: {reason}. Leave it out")
    return study


def left_out(reasons: Mapping[str, str], of: str = "") -> None:
    """Prints why baselines are left out, where it is so of something alone, of what."""
    for reason in dict.fromkeys(reasons.values()):
        keys = [key for key, why in reasons.items() if why == reason]
        print(f"note: {', '.join(keys)} {'is' if len(keys) == 1 else 'are'} left out{of and f' of {of}'}: {reason}")

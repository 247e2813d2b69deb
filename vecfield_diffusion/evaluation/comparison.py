"""Methods side by side under one mask: each fills the same cases, a few at a time, and all are resampled alike.

What a method gives of a value is an ensemble, a Gaussian law or a point. The CRPS is that of all it gives: the fair one
of the members, the closed form of the law (Gneiting & Raftery 2007, eq. 21), with z = (y - m) / s,

    CRPS = s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)),

the absolute error of the point. `mae` is the absolute error of the mean, of all. The mean of a law is exact: its
spread_skill is spread / rmse_component, and its ranks are Phi(z) in as many bins as those of the ensembles; its energy
score is that of the mean alone.

Two scores compare scales, where the cases have a rectangle for spectra in common: the `spectrum_error` of the members,
in whose place a law has its mean, and the `effective_resolution` of their mean (see `spectra`).

Intervals are those of the moving-block bootstrap over cases (see `bootstrap`), with the same resamples for all methods:
a ratio of two methods is formed within each resample. A distance, such as the `spectrum_error`, is never negative, and
chance adds to it in a resample what it has added already: its interval is that of its resamples, moved so that their
median is its value. It tells how far chance moves the distance, not by how much it has moved it from 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.bootstrap import bootstrap, resamples
from vecfield_diffusion.evaluation.events import event_sums
from vecfield_diffusion.evaluation.metrics import sums
from vecfield_diffusion.evaluation.regions import regions, seam_index
from vecfield_diffusion.evaluation.scores import derive, unit
from vecfield_diffusion.evaluation.spectra import SHARE, cut_off, resolved, spectra, spectrum_error
from vecfield_diffusion.physics.grid import Grid

#: Edges of the bins of the spread, in standard deviations of the data.
SPREAD_EDGES = torch.logspace(-4, 1, 41, dtype=torch.float64)


class Score(NamedTuple):
    """A score, its interval, and what it was taken of."""

    value: float
    low: float = math.nan
    high: float = math.nan
    cases: int = 0
    cells: int = 0


class Estimate(NamedTuple):
    """What a method gives of n fields: members `(M, n, 2, H, W)`; one with a `std` `(n, 2, H, W)` is a Gaussian law.

    Such a law may come with members drawn from it, `draws`, which scores in time take.
    """

    members: Tensor
    std: Tensor | None = None
    draws: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Estimate]) -> Estimate:
        """Returns the estimates of fields one after the other as one."""
        members, std, draws = zip(*parts, strict=True)
        whole = lambda found, dim: None if found[0] is None else torch.cat(found, dim=dim)  # noqa: E731
        return cls(whole(members, 1), whole(std, 0), whole(draws, 1))

    @property
    def realisations(self) -> Tensor | None:
        """Fields that a method says are possible, `(M, n, 2, H, W)`: None of a law that none were drawn of."""
        return self.members if self.std is None else self.draws


@dataclass(frozen=True)
class Setting:
    """The cases of one mask.

    Arguments:
        mask: Its name.
        numbers: The snapshot of each case.
        truth: `(N, 2, H, W)` in physical units, NaN where unknown.
        observed: Boolean `(N, 1, H, W)`.
        grid: The grid.
        climatology: The mean field of training `(2, H, W)`.
        scale: The standard deviation of the data.
        ensemble: The members of the ensembles; the ranks of a law have as many bins as theirs.
        exceed: The speed whose exceedance is scored; None for sqrt(2) standard deviations of the data.
    """

    mask: str
    numbers: Sequence[int]
    truth: Tensor
    observed: Tensor
    grid: Grid
    climatology: Tensor
    scale: float
    ensemble: int
    exceed: float | None = None

    @property
    def threshold(self) -> float:
        """The speed whose exceedance is scored."""
        return math.sqrt(2) * self.scale if self.exceed is None else self.exceed

    @cached_property
    def regions(self) -> dict[str, Tensor]:
        """Where scores are taken: see `regions.regions`."""
        return regions(self.observed, self.grid)

    @cached_property
    def whole(self) -> Tensor:
        """The cells that are known in all cases, `(H, W)`: spectra are taken there."""
        return self.grid.valid & self.truth.isfinite().all(dim=1).all(dim=0)

    @property
    def example(self) -> int:
        """The case that is drawn: the middle one."""
        return len(self.truth) // 2


@dataclass
class Scored:
    """A method under one mask.

    Attributes:
        method: Its name.
        law: `members`, `gaussian` or `point`.
        seconds: Time for each field.
        sums: For every region, what scores are made of, `(N, ...)` by case.
        seam: The seam index of every case, `(N,)`.
        bins: Count, summed variance and summed squared error of hidden values by their spread, `(3, bins)`.
        spectrum: Energy of the members, `(K,)` at the wavenumbers, mean over cases; None where there is no rectangle.
        noise: The same of the error of their mean.
        signal: The same of the truth.
        wavenumber: In radians per unit of length, `(K,)`.
        example: Members and, of a law, the standard deviation `(2, H, W)` of the case that is drawn.
        scores: Scores by region and name; those of the whole field in `field`.
        reliability: Count, summed probability and summed event of hidden cells by the probability that the speed is
            above the threshold, `(3, bins)`; see `events`.
        recorded: What a sampler recorded of its runs, such as the share of its proposals that were accepted, by name.
    """

    method: str
    law: str
    seconds: float
    sums: dict[str, dict[str, Tensor]]
    seam: Tensor
    bins: Tensor
    spectrum: Tensor | None
    noise: Tensor | None
    signal: Tensor | None
    wavenumber: Tensor | None
    example: Estimate
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    reliability: Tensor | None = None
    recorded: dict[str, float] = field(default_factory=dict)

    def rows(self, mask: str, units: str) -> list[dict[str, object]]:
        """One row for each score that has a value."""
        found = [
            row(mask, self.method, metric, region, score, units)
            for region, values in self.scores.items()
            for metric, score in values.items()
            if not math.isnan(score.value)
        ]
        beside = {"seconds_per_field": self.seconds} | {f"sampler_{name}": x for name, x in self.recorded.items()}
        return found + [row(mask, self.method, name, "field", Score(value), units) for name, value in beside.items()]


def row(mask: str, method: str, metric: str, region: str, score: Score, units: str) -> dict[str, object]:
    """A line of `scores.csv`; numbers that there are not are left empty."""
    low, high = ("" if math.isnan(end) else end for end in (score.low, score.high))
    counts = {"cases": score.cases or "", "cells": score.cells or ""}
    value = {"mask": mask, "method": method, "metric": metric, "region": region, "value": score.value}
    return {**value, "low": low, "high": high, **counts, "units": unit(metric, units)}


def score(method: str, fill: Callable[[slice], Estimate], setting: Setting, at_once: int = 8) -> Scored:
    """Returns the scores of a method that fills the cases, of which no more than `at_once` are kept at a time.

    Arguments:
        method: Its name.
        fill: Gives the estimates of the cases of a slice.
        setting: The cases.
        at_once: How many are filled together.
    """
    parts, seconds, example, fields, law = [], 0.0, None, 0, "point"
    for first in range(0, len(setting.truth), at_once):
        chosen = slice(first, min(first + at_once, len(setting.truth)))
        begun = time.perf_counter()
        estimate = fill(chosen)
        seconds += time.perf_counter() - begun
        fields += len(estimate.members) * (chosen.stop - chosen.start)
        law = "gaussian" if estimate.std is not None else "members" if len(estimate.members) > 1 else "point"
        parts.append(_part(estimate, chosen, setting))
        if chosen.start <= setting.example < chosen.stop:
            at = setting.example - first
            std = None if estimate.std is None else estimate.std[at].clone()
            example = Estimate(estimate.members[:, at].clone(), std)
    gathered = {
        name: {key: torch.cat([part["sums"][name][key] for part in parts]) for key in parts[0]["sums"][name]}
        for name in setting.regions
    }
    waves = {key: _cat([part[key] for part in parts]) for key in ("spectrum", "noise", "signal")}
    seam, bins = torch.cat([part["seam"] for part in parts]), torch.stack([part["bins"] for part in parts]).sum(dim=0)
    wavenumber = parts[0]["wavenumber"]
    means = {key: None if energy is None else energy.mean(dim=0) for key, energy in waves.items()}
    found = Scored(method, law, seconds / fields, gathered, seam, bins, **means, wavenumber=wavenumber, example=example)
    found.reliability = torch.stack([part["reliability"] for part in parts]).sum(dim=0)
    found.scores = {region: judged(part, law) for region, part in gathered.items()}
    index = Score(float(seam.nanmean()), *bootstrap(seam), int(seam.isfinite().sum()))
    found.scores["field"] = {"seam_index": index, **scales(wavenumber, **waves)}
    return found


def scales(
    wavenumber: Tensor | None, spectrum: Tensor | None, noise: Tensor | None, signal: Tensor | None
) -> dict[str, Score]:
    """The scores that compare scales; not numbers where there is no spectrum.

    Arguments:
        wavenumber: `(K,)`.
        spectrum: Energy of the members by case, `(N, K)`.
        noise: The same of the error of their mean.
        signal: The same of the truth.
    """
    if wavenumber is None:
        return dict.fromkeys(("spectrum_error", "effective_resolution"), Score(math.nan))
    cases = len(signal)
    drawn = torch.cat((torch.ones(1, cases, dtype=torch.float64), counts(resamples(cases))))  # all, then resamples
    energy, error, truth = drawn @ spectrum, drawn @ noise, drawn @ signal
    deviation = spectrum_error(energy, truth, max(1, int(SHARE * cut_off(truth[0]))))
    k = resolved(wavenumber, error, truth)
    length = [2 * math.pi / wave if wave > 0 else math.inf for wave in (float(k[0]), *reversed(interval(k[1:])))]
    return {"spectrum_error": distance(deviation, cases), "effective_resolution": Score(*length, cases)}


def distance(values: Tensor, cases: int = 0) -> Score:
    """A distance, the first of `values`, with an interval from its resamples, the others: see the module."""
    value, middle = float(values[0]), float(values[1:].nanquantile(0.5))
    low, high = (max(0.0, value + end - middle) for end in interval(values[1:]))
    return Score(value, low, high, cases)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _part(estimate: Estimate, chosen: slice, setting: Setting) -> dict:
    """What the cases of a slice add."""
    truth, members = setting.truth[chosen], estimate.members
    added = {
        name: method_sums(
            estimate,
            truth,
            where[chosen],
            grid=setting.grid,
            climatology=setting.climatology,
            ensemble=setting.ensemble,
        )
        for name, where in setting.regions.items()
    }
    events = {
        name: event_sums(members, estimate.std, truth, where[chosen], setting.threshold)
        for name, where in setting.regions.items()
    }
    for name, (brier, _) in events.items():
        added[name]["brier"] = brier
    waves = dict.fromkeys(("spectrum", "noise", "signal", "wavenumber"))
    with_rectangle = torch.where(setting.whole, truth, math.nan)
    try:
        signal = spectra(with_rectangle, setting.grid)
        waves = {"signal": signal.energy[:, : signal.whole], "wavenumber": signal.wavenumber[: signal.whole]}
        for name, fields in (("spectrum", members), ("noise", (members.mean(dim=0) - truth)[None])):
            inside = torch.where(setting.whole, fields, math.nan)
            waves[name] = spectra(inside, setting.grid).energy.mean(dim=0)[:, : signal.whole]
    except ValueError:  # no rectangle that is known in all cases
        pass
    seam = seam_index(members, setting.observed[chosen], setting.grid)
    bins = spread_bins(estimate, truth, setting.regions["hidden"][chosen], setting.scale)
    return {"sums": added, "seam": seam, "bins": bins, "reliability": events["hidden"][1], **waves}


def method_sums(
    estimate: Estimate, truth: Tensor, where: Tensor, grid: Grid, climatology: Tensor, ensemble: int
) -> dict[str, Tensor]:
    """Returns `metrics.sums` of an estimate, and `absolute`, the error of its mean.

    Arguments:
        estimate: Members or a law.
        truth: `(n, 2, H, W)`.
        where: The region `(n, 1, H, W)`.
        grid: The grid.
        climatology: `(2, H, W)`.
        ensemble: The number of members of the ensembles; the ranks of a law have as many bins as theirs.
    """
    found = sums(estimate.members, truth, where, grid, climatology)
    known = where & truth.isfinite().all(dim=1, keepdim=True)
    case, n = known[:, 0].nonzero()[:, 0], len(truth)
    mean, y = (_select(fields, known) for fields in (estimate.members.mean(dim=0), truth))
    total = lambda values: values.new_zeros(n).index_add_(0, case, values.sum(dim=0))  # noqa: E731
    found["absolute"] = total((mean - y).abs())
    if estimate.std is not None:
        std = _select(estimate.std, known)
        found["crps"], found["variance"] = total(gaussian_crps(mean, std, y)), total(std.square())
        found["ranks"] = _law_ranks(mean, std, y, case, n, ensemble + 1)
    return found


def _select(fields: Tensor, known: Tensor) -> Tensor:
    """The values `(2, K)` of `(n, 2, H, W)` in the cells `known` `(n, 1, H, W)`."""
    return fields.movedim(1, 0)[:, known[:, 0]].double()


def gaussian_crps(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """The CRPS of N(mean, std^2) against y, elementwise; the absolute error where std is 0."""
    z = (y - mean) / std
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    value = std * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return torch.where(std > 0, value, (y - mean).abs())


def _law_ranks(mean: Tensor, std: Tensor, y: Tensor, case: Tensor, n: int, bins: int) -> Tensor:
    """How often Phi(z) falls into each of `bins`, `(n, bins)`; a law without spread is split evenly."""
    below = torch.where(std > 0, torch.special.ndtr((y - mean) / std), 0.5)
    at = (below * bins).long().clamp(max=bins - 1) + case * bins
    return torch.bincount(at.flatten(), minlength=n * bins).double().view(n, bins)


def spread_bins(estimate: Estimate, truth: Tensor, where: Tensor, scale: float) -> Tensor:
    """Count, variance and squared error of the values of a region, summed by their spread over `SPREAD_EDGES` scale.

    The variance of M members counts (M + 1) / M fold: calibrated, it then equals the squared error.
    """
    m = len(estimate.members)
    known = where & truth.isfinite().all(dim=1, keepdim=True)
    error = (_select(estimate.members.mean(dim=0), known) - _select(truth, known)).square()
    found = torch.zeros(3, len(SPREAD_EDGES) + 1, dtype=torch.float64)
    if m == 1 and estimate.std is None:
        return found
    variance = estimate.members.double().var(dim=0) * (m + 1) / m if m > 1 else estimate.std.double().square()
    variance = _select(variance, known)
    bins = torch.bucketize(variance.sqrt().flatten() / scale, SPREAD_EDGES)
    for k, values in enumerate((torch.ones_like(variance), variance, error)):
        found[k].index_add_(0, bins, values.flatten())
    return found


def derived(totals: Mapping[str, Tensor], law: str) -> dict[str, Tensor]:
    """`metrics.derive`, `mae`, and the spread_skill of a law."""
    found = derive(totals)
    found["mae"] = totals["absolute"] / (2 * totals["cells"])
    if law == "gaussian":
        found["spread_skill"] = (found["spread"] / found["rmse_component"]).where(found["spread"] > 0, math.nan)
    return found


def resampled(parts: Mapping[str, Tensor], law: str) -> dict[str, Tensor]:
    """The scores `(repeats,)` of the resamples of the cases."""
    drawn = counts(resamples(len(parts["cells"])))
    return derived({name: drawn @ value for name, value in parts.items()}, law)


def counts(chosen: Tensor) -> Tensor:
    """How often each case is in every resample, `(repeats, cases)`, of the numbers `(repeats, cases)` of its cases."""
    ones = torch.ones(1, 1, dtype=torch.float64).expand_as(chosen)
    return torch.zeros(chosen.shape, dtype=torch.float64).scatter_add_(1, chosen, ones)


def judged(parts: Mapping[str, Tensor], law: str) -> dict[str, Score]:
    """The scores of a region with their intervals."""
    values = derived({name: value.sum(dim=0) for name, value in parts.items()}, law)
    spread = resampled(parts, law)
    counts = int((parts["cells"] > 0).sum()), int(parts["cells"].sum())
    return {name: Score(float(value), *interval(spread[name]), *counts) for name, value in values.items()}


def interval(values: Tensor) -> tuple[float, float]:
    """The central 95 % of resampled values."""
    low, high = torch.nanquantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def ratio(ours: Scored, theirs: Scored, metric: str, region: str = "hidden") -> Score:
    """A score over that of another method on the same cases, with its interval."""
    first, second = (resampled(method.sums[region], method.law)[metric] for method in (ours, theirs))
    value = ours.scores[region][metric].value / theirs.scores[region][metric].value
    return Score(value, *interval(first / second))

"""Figures that compare methods, as PNG: networks in strong colours, the other methods in quiet ones.

Each is drawn in one of two widths, `WIDE` with its panels side by side or `NARROW`, for a telephone, with its panels
one above the other; letters have the same size in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vecfield_diffusion.evaluation.plots.style import INK, WIDE, Floats, new_figure, png, pretty
from vecfield_diffusion.evaluation.scores import SCORES, unit

_STRONG = ("#c0392b", "#2471a3", "#d68910", "#7d3c98", "#117a65", "#a04000")
_QUIET = ("#909497", "#b7950b", "#5dade2", "#58d68d", "#af7ac5", "#6e2c00", "#45b39d", "#f0b27a", "#d98880", "#1c2833")
_LINES = ("-", "--", "-.", ":")

Styles = Mapping[str, Mapping[str, Any]]


def method_styles(networks: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns colour, width and line of each method, the same in all figures: strong for networks, quiet for others."""
    others = [name for name in methods if name not in networks]
    strong = {
        name: {"color": _STRONG[k % len(_STRONG)], "linestyle": _LINES[k // len(_STRONG) % 4], "linewidth": 2.2}
        for k, name in enumerate(networks)
    }
    thin = {"linestyle": "-", "linewidth": 1.2, "zorder": 1.5}
    return strong | {name: {"color": _QUIET[k % len(_QUIET)], **thin} for k, name in enumerate(others)}


def panels(count: int, height: float, width: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with panels `height` inches high: side by side, or one above the other where it is narrow."""
    if width == WIDE:
        figure = new_figure(width, height)
        return figure, list(np.atleast_1d(figure.subplots(1, count)))
    figure = new_figure(width, count * min(height, 3.4))
    return figure, list(np.atleast_1d(figure.subplots(count, 1)))


def legend(figure: Figure, axis: Axes, width: float) -> None:
    """Names the lines of `axis` beside all panels, below them where the figure is narrow."""
    handles, labels = axis.get_legend_handles_labels()
    place = {"loc": "outside right upper"}
    if width != WIDE:
        place = {"loc": "outside lower center", "ncols": 2}
        figure.set_figheight(figure.get_figheight() + 0.17 * (len(labels) + 1) / 2)
    figure.legend(handles, labels, fontsize=8, frameon=False, **place)


def figure_scores(
    scores: Mapping[str, Mapping[str, Sequence[float]]], units: str, styles: Styles, width: float = WIDE
) -> bytes:
    """Returns a PNG of points with intervals, a panel for each score.

    Arguments:
        scores: By score and method, (value, low, high).
        units: Of the fields.
        styles: See `method_styles`.
        width: `WIDE` or `NARROW`.
    """
    first = next(iter(scores.values()))
    names = sorted(first, key=lambda name: -first[name][0])
    figure, axes = panels(len(scores), 0.9 + 0.28 * len(names), width)
    for axis, (score, values) in zip(axes, scores.items(), strict=True):
        for at, name in enumerate(names):
            value, low, high = values[name]
            axis.plot([low, high], [at, at], color=styles[name]["color"], linewidth=2.5, alpha=0.6)
            axis.plot(value, at, "o", color=styles[name]["color"], markersize=6)
        axis.set_yticks(range(len(names)), names if axis is axes[0] or width != WIDE else [])
        axis.set_xlim(left=0)
        axis.set_xlabel(f"{SCORES[score].words} [{pretty(unit(score, units))}]", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    return png(figure)


def figure_calibration(
    laws: Mapping[str, tuple[Floats, Floats, Floats, Floats]], units: str, styles: Styles, width: float = WIDE
) -> bytes:
    """Returns a PNG of error over spread, rank histogram, coverage and reliability of each method.

    Arguments:
        laws: By method, spread and error of bins `(K,)` each, the shares of the ranks `(M + 1,)`, and count, summed
            probability and summed event by bins of the probability `(3, bins)`.
        units: Of the fields.
        styles: See `method_styles`.
        width: `WIDE` or `NARROW`.
    """
    figure, axes = panels(4, 3.5, width)
    spread, ranks, cover, event = axes
    for name, (deviation, error, shares, (cells, chance, happened)) in laws.items():
        style, count = styles[name], len(shares)
        spread.plot(deviation, error, marker="o", markersize=3.5, label=name, **style)
        ranks.stairs(shares * count, np.linspace(0, 1, count + 1), baseline=None, **style)
        inside = [shares[k : count - k].sum() for k in range((count + 1) // 2)]
        nominal = [1 - 2 * k / count for k in range((count + 1) // 2)]
        cover.plot([*nominal, 0], [*inside, 0], marker="o", markersize=3, **style)
        used = cells > 0.002 * cells.sum()
        event.plot(chance[used] / cells[used], happened[used] / cells[used], marker="o", markersize=3, **style)
    top = max(max(bins.max(initial=0) for bins in law[:2]) for law in laws.values()) * 1.05 or 1.0
    spread.plot([0, top], [0, top], color=INK, linestyle=":")
    spread.set(xlim=(0, top), ylim=(0, top))
    spread.set(xlabel=f"spread [{pretty(units)}]", ylabel=f"RMSE [{pretty(units)}]")
    spread.legend(fontsize=8, frameon=False)
    ranks.axhline(1, color=INK, linestyle=":")
    ranks.set(xlabel="rank of the truth / members", ylabel="frequency / that of a calibrated one", xlim=(0, 1))
    ranks.set_ylim(0, 1.1 * max(law[2].max() * len(law[2]) for law in laws.values()))
    cover.plot([0, 1], [0, 1], color=INK, linestyle=":")
    cover.set(xlabel="probability of the central interval", ylabel="share of the truth inside")
    cover.set(xlim=(0, 1), ylim=(0, 1))
    event.plot([0, 1], [0, 1], color=INK, linestyle=":")
    event.set(xlabel="probability of a speed above the threshold", ylabel="share where it is", xlim=(0, 1), ylim=(0, 1))
    titles = ("spread and error", "rank histogram", "coverage", "reliability")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        _small(axis)
    return png(figure)


def figure_distance(
    labels: Sequence[str],
    errors: Mapping[str, Sequence[Sequence[float]]],
    spreads: Mapping[str, Sequence[float]],
    *,
    units: str,
    styles: Styles,
    width: float = WIDE,
) -> bytes:
    """Returns a PNG of the error with intervals, and spread, of each method by the distance to an observation.

    Arguments:
        labels: Of the bins of distance.
        errors: By method, (value, low, high) of each bin.
        spreads: By method, that of each bin; NaN where there is none.
        units: Of the fields.
        styles: See `method_styles`.
        width: `WIDE` or `NARROW`.
    """
    figure, (axis,) = panels(1, 4.0, width)
    x = np.arange(len(labels))
    for name, found in errors.items():
        value, low, high = np.asarray(found, dtype=float).T
        axis.plot(x, value, marker="o", markersize=4, label=name, **styles[name])
        axis.fill_between(x, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
        if np.isfinite(spreads[name]).any():
            axis.plot(x, spreads[name], **{**styles[name], "linestyle": (0, (4, 2)), "linewidth": 1.4})
    axis.set_xticks(x, labels)
    axis.set(xlabel="distance to the nearest observation [cells]", ylabel=f"RMSE, spread [{pretty(units)}]")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    _small(axis)
    legend(figure, axis, width)
    return png(figure)


def figure_cost(seconds: Mapping[str, float], styles: Styles, width: float = WIDE) -> bytes:
    """Returns a PNG of the time for each field (of an ensemble: each member), on a logarithmic axis."""
    names = sorted(seconds, key=seconds.__getitem__)
    figure, (axis,) = panels(1, 0.9 + 0.28 * len(names), width)
    axis.barh(names, [seconds[name] for name in names], color=[styles[name]["color"] for name in names])
    axis.set_xscale("log")
    axis.set_xlabel("seconds for each field; of an ensemble, for each member", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=9)
    return png(figure)


def _small(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_size(9)
    axis.yaxis.label.set_size(9)

"""Figures of spectra and of distributions, as PNG: how much of what the flow does at each scale a method keeps."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vecfield_diffusion.evaluation.plots.methods import Styles, legend, panels
from vecfield_diffusion.evaluation.plots.style import INK, WIDE, Floats, png, power_of_ten, pretty, with_power

_WAVENUMBER = "wavenumber [rad m$^{-1}$]"
_DENSITY = "energy density [m$^3$ s$^{-2}$]"


def figure_spectra(
    wavenumber: Floats,
    truth: Floats,
    energy: Mapping[str, Floats],
    noise: Mapping[str, Floats],
    *,
    styles: Styles,
    width: float = WIDE,
) -> bytes:
    """Returns a PNG of energy spectra of truth and methods, and the spectra of their errors over that of the truth.

    Arguments:
        wavenumber: `(K,)`, from 0.
        truth: Energy density `(K,)`.
        energy: Of members, by method.
        noise: Of the error of their mean, by method.
        styles: See `method_styles`.
        width: `WIDE` or `NARROW`.
    """
    figure, (left, right) = panels(2, 4.3, width)
    k = wavenumber[1:]
    for name in energy:
        left.loglog(k, energy[name][1:], label=name, **styles[name])
        right.loglog(k, noise[name][1:] / truth[1:], **styles[name])
    left.loglog(k, truth[1:], color="black", linewidth=1.8, label="truth", zorder=3)
    left.set_ylim(*_decades(truth))
    right.set_ylim(1e-2, 10)
    right.axhline(0.5, color=INK, linestyle=":", label="0.5: effective resolution")
    left.set(xlabel=_WAVENUMBER, ylabel=_DENSITY)
    right.set(xlabel=_WAVENUMBER, ylabel="error of the estimate / truth")
    right.legend(fontsize=8, frameon=False)
    _finish(left, right)
    legend(figure, left, width)
    return png(figure)


def figure_generation(
    wavenumber: Floats,
    energy: Mapping[str, Floats],
    edges: Floats,
    densities: Mapping[str, Floats],
    *,
    reference: str,
    styles: Styles,
    width: float = WIDE,
) -> bytes:
    """Returns a PNG of energy spectra and distributions of vorticity of sets of fields.

    Arguments:
        wavenumber: `(K,)`, from 0.
        energy: By set of fields, `(K,)`.
        edges: Of the bins of vorticity, `(B + 1,)`.
        densities: By set of fields, `(B,)`.
        reference: The set in black.
        styles: Of the others, see `method_styles`.
        width: `WIDE` or `NARROW`.
    """
    figure, (left, right) = panels(2, 4.0, width)
    black = {"color": "black", "linewidth": 1.8}
    power = power_of_ten(float(edges[-1]))
    for name in energy:
        style = black if name == reference else styles[name]
        left.loglog(wavenumber[1:], energy[name][1:], label=name, **style)
        right.stairs(densities[name], edges / 10.0**power, baseline=None, **style)
    left.set(xlabel=_WAVENUMBER, ylabel=_DENSITY)
    right.set(xlabel=f"vorticity [{with_power(power, 's-1')}]", ylabel="probability density [s]", yscale="log")
    right.xaxis.set_major_locator(MaxNLocator(6))
    left.set_ylim(*_decades(energy[reference]))
    left.legend(fontsize=8, frameon=False)
    _finish(left, right)
    return png(figure)


def figure_series(
    frequency: Floats,
    truth: Floats,
    energy: Mapping[str, Floats],
    separation: Mapping[str, Mapping[str, Floats]],
    *,
    unit: str,
    units: str,
    styles: Styles,
    width: float = WIDE,
) -> bytes:
    """Returns a PNG of energy over frequency, and of the distance of drifters from the true ones where there are any.

    Arguments:
        frequency: In cycles per unit of time, `(F,)`, from 0.
        truth: Energy density `(F,)`.
        energy: Of members, by method.
        separation: By method, of `members` and `mean`, in kilometres after 1, 2, .. steps.
        unit: Of time.
        units: Of the fields.
        styles: See `method_styles`.
        width: `WIDE` or `NARROW`.
    """
    drifting = any(separation.values())
    figure, (left, *right) = panels(1 + drifting, 4.3, width)
    for name, spectrum in energy.items():
        left.loglog(frequency[1:], spectrum[1:], label=name, **styles[name])
    left.loglog(frequency[1:], truth[1:], color="black", linewidth=1.8, label="truth", zorder=3)
    left.set(xlabel=f"frequency [1/{unit}]", ylabel=f"energy density [({pretty(units)})$^2$ {unit}]")
    left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    for name in separation.keys() - energy.keys():
        left.plot([], [], label=name, **styles[name])
    for axis in right:
        for name, curves in separation.items():
            for kind, away in curves.items():
                line = {**styles[name], "linestyle": (0, (4, 2))} if kind == "mean" else styles[name]
                axis.plot(range(1 + len(away)), [0.0, *away], **line)
        axis.set(xlabel="steps", ylabel="distance from the true drifters [km]", xlim=(0, None), ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(left, *right)
    legend(figure, left, width)
    return png(figure)


def _finish(*axes: Axes) -> None:
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)


def _decades(energy: Floats) -> tuple[float, float]:
    """What is shown of a spectrum: not what is below a billionth of its top."""
    top = float(energy.max()) or 1.0
    return max(float(energy[1:].min()) / 30, top * 1e-9), top * 5

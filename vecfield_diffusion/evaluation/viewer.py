"""A filled series as one page to look around in: a map with a slider of time, members, spread, what was measured.

The page holds the script of plotly and all numbers, integers of 16 bits with a scale, and asks nothing of the network.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots import Coordinates

try:
    from plotly.offline import get_plotlyjs
except ImportError:  # the extra `viewer`
    get_plotlyjs = None

TEMPLATE = Path(__file__).with_name("viewer.html.j2")
#: The ending of a picture that is such a page.
PAGE = ".html"
#: Members that are shown, and numbers that a page holds, at most: about 16 MB.
MEMBERS, NUMBERS = 8, 6_000_000
MISSING, LARGEST = -32768, 32000


def check_page(figure: str) -> None:
    """Raises UserError where a picture is a page and plotly is not installed."""
    if figure.endswith(PAGE) and get_plotlyjs is None:
        raise UserError(f"figure={figure} takes plotly: pip install plotly, or give a picture, such as figure=map.png")


def times_shown(count: int, members: int, cells: int) -> range:
    """Returns the positions of the times that a page holds, evenly: all of them where they are few."""
    most = max(1, NUMBERS // (cells * (2 * min(members, MEMBERS) + 5)))
    return range(0, count, -(-count // most))


@dataclass(frozen=True)
class Shown:
    """What a page shows at one time.

    Arguments:
        date: When it was, in words.
        members: `(M, 2, H, W)` along the axes of the map, NaN outside the domain.
        measured: Boolean `(H, W)`.
        truth: `(2, H, W)`; None where it is not known.
    """

    date: str
    members: NDArray
    measured: NDArray
    truth: NDArray | None = None


def render_page(
    title: str,
    shown: Sequence[Shown],
    coordinates: Coordinates,
    *,
    units: str,
    names: Sequence[str] = ("u", "v"),
    note: str = "",
) -> str:
    """Returns the text of the page.

    Arguments:
        title: Its heading.
        shown: The times, with as many members each.
        coordinates: Where the cells lie.
        units: Of the velocities.
        names: Of the components.
        note: A sentence below the map.
    """
    members = np.stack([time.members for time in shown], axis=1)
    fields = {"mean": members.mean(axis=0)}
    if len(members) > 1:
        fields["spread"] = np.sqrt(members.var(axis=0, ddof=1).sum(axis=1, keepdims=True))
    else:
        fields["spread"] = np.full_like(fields["mean"][:, :1], np.nan)
    if all(time.truth is not None for time in shown):
        fields["truth"] = np.stack([time.truth for time in shown])
    fields |= {f"member {k + 1}": member for k, member in enumerate(members[:MEMBERS])}
    measured = np.stack([time.measured for time in shown]).astype(np.uint8)
    data = {
        "fields": {name: packed(values) for name, values in fields.items()},
        "measured": base64.b64encode(measured.tobytes()).decode("ascii"),
        "shape": measured.shape[1:],
        "dates": [time.date for time in shown],
        "units": units,
        "names": list(names),
        "top": _top(np.linalg.norm(fields["mean"], axis=1)),
        "top_spread": _top(fields["spread"]),
        **_places(coordinates),
    }
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        fields=list(fields),
        names=names,
        dates=data["dates"],
        data=data,
        note=note,
        plotly="" if get_plotlyjs is None else get_plotlyjs(),
    )


def packed(values: NDArray) -> dict[str, Any]:
    """Returns fields `(T, parts, H, W)` as text of integers of 16 bits, little-endian, and their scale."""
    known = np.isfinite(values)
    scale = (float(np.abs(values[known]).max()) if known.any() else 0.0) / LARGEST or 1.0
    numbers = np.where(known, np.round(np.nan_to_num(values) / scale), MISSING).astype("<i2")
    return {"values": base64.b64encode(numbers.tobytes()).decode("ascii"), "scale": scale, "parts": values.shape[1]}


def _top(values: NDArray) -> float:
    """The end of a scale of colours: 99.5 % of the values lie below."""
    known = values[np.isfinite(values)]
    return float(np.quantile(known, 0.995)) if known.size and known.max() > 0 else 1.0


def _places(coordinates: Coordinates) -> Mapping[str, Any]:
    """Axes, their labels, and how much longer a step along y is drawn than one along x."""
    x, y = (np.asarray(axis, dtype=float) for axis in (coordinates.x, coordinates.y))
    wide = float(np.cos(np.deg2rad(y.mean()))) if coordinates.geographic else 1.0
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "labels": [coordinates.x_label, coordinates.y_label],
        "ratio": 1 / max(wide, 0.1),
    }

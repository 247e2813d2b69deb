"""What a catalogue asks of a file of filled fields: the global attributes of ACDD 1.3, and axes that say what they are.

Everything follows from the fields, from what the user says (`metadata.creator=` and the others), or from what the
input says of itself, in this order; `UNSTATED` stands where none of them says anything, so that nobody reads a guess.
Attributes that tell where and when a file is are never taken from the input, which may hold more than was filled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNSTATED = "not stated"
#: What the keys of `metadata` are called by ACDD.
KEYS = {
    "creator": ("creator_name", "publisher_name"),
    "email": ("creator_email", "publisher_email"),
    "url": ("creator_url", "publisher_url"),
    "institution": ("institution",),
    "project": ("project",),
    "licence": ("license",),
}
#: What ACDD recommends and no field tells: the user does, or the input.
STATED = ("creator_name", "creator_email", "creator_url", "publisher_name", "publisher_email", "publisher_url")
STATED += ("institution", "project", "license", "acknowledgement", "naming_authority")
#: Attributes of the input that tell where, when and which it is: those of the output are its own.
OWN = ("geospatial_", "time_coverage_", "date_")
OWN_NAMES = {"id", "uuid", "summary", "Metadata_Conventions", "cdm_data_type", "featureType"}
#: Other ways to spell an attribute.
SPELLINGS = {"license": ("licence",), "acknowledgement": ("acknowledgment",)}
AXES = {
    "lon": {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east"},
    "lat": {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north"},
    "x": {"long_name": "position along x"},
    "y": {"long_name": "position along y"},
    "time": {"standard_name": "time", "long_name": "time"},
}
#: Values and attributes of coordinates by name; values are None where there are none.
Axes = Mapping[str, tuple[NDArray | None, Mapping[str, Any]]]
Extras = Mapping[str, tuple[tuple[str, ...], NDArray, Mapping[str, Any]]]


def named_axis(kind: str, values: NDArray | None, attrs: Mapping[str, Any]) -> tuple[NDArray | None, dict[str, Any]]:
    """Returns an axis, with the names of its kind (`lon`, `lat`, `x`, `y` or `time`) where its attributes lack them."""
    is_time = kind != "time" or "since" in str(attrs.get("units", "")) or np.asarray(values).dtype.kind == "M"
    return values, {**(AXES[kind] if is_time else {"long_name": "time"}), **attrs}


def depth_of(metadata: Mapping[str, Any]) -> Extras:
    """Returns the depth that `metadata.depth` gives, in metres, as a coordinate by name; nothing if none."""
    if metadata.get("depth") is None:
        return {}
    attrs = {"standard_name": "depth", "long_name": "depth", "units": "m", "positive": "down", "axis": "Z"}
    return {"depth": ((), np.float64(metadata["depth"]), attrs)}


def inherited(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes of an input that hold for what it is filled to."""
    return {key: value for key, value in attributes.items() if not key.startswith(OWN) and key not in OWN_NAMES}


def discovery(
    attributes: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    axes: Axes,
    extras: Extras,
    components: Sequence[Mapping[str, Any]],
    members: int,
    key: str,
) -> dict[str, str | float]:
    """Returns the global attributes that ACDD 1.3 recommends, for a file of filled fields.

    Arguments:
        attributes: Those of the input.
        metadata: What the user says: the keys of `KEYS`, and `depth`; None for what is left open.
        axes: Time, y and x, for all times that are filled.
        extras: Further coordinates.
        components: The attributes of the two components.
        members: M.
        key: What tells this result from others.
    """
    said = {name: metadata[k] for k, names in KEYS.items() if metadata.get(k) is not None for name in names}
    told = {name: _told(attributes, name) for name in STATED}
    return {
        **_about(attributes, components, members),
        "id": f"vecfield_diffusion-{key}",
        "date_created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        **_where(axes, extras),
        **_when(axes),
        **told,
        **said,
    }


def _told(attributes: Mapping[str, Any], name: str) -> str:
    """What the input says under a name or another spelling of it."""
    found = (str(attributes.get(spelling, "")).strip() for spelling in (name, *SPELLINGS.get(name, ())))
    return next(filter(None, found), UNSTATED)


def _about(attributes: Mapping[str, Any], components: Sequence[Mapping[str, Any]], members: int) -> dict[str, str]:
    """What the file is, in words."""
    what = str(attributes.get("summary") or attributes.get("title") or "").strip().rstrip(".")
    names = [str(attrs.get("standard_name") or attrs.get("long_name") or "velocity") for attrs in components]
    of = f" Filled from: {what}." if what else ""
    return {
        "summary": f"Two-component velocity with its gaps filled by an ensemble of {members} "
        f"field{'s' if members > 1 else ''} conditioned on what was measured: mean, spread and members.{of}",
        "keywords": str(attributes.get("keywords") or ", ".join(dict.fromkeys([*names, "ensemble", "gap filling"]))),
        "comment": str(
            attributes.get("comment") or "observed tells cells that were measured from those that are drawn"
        ),
        "processing_level": "Level 4: gaps filled by an ensemble",
        "standard_name_vocabulary": str(attributes.get("standard_name_vocabulary") or "CF Standard Name Table v93"),
    }


def _where(axes: Axes, extras: Extras) -> dict[str, str | float]:
    """The box in longitude, latitude and depth, as far as coordinates tell them."""
    places = {**{name: (values, attrs) for name, (values, attrs) in axes.items()}}
    places |= {name: (values, attrs) for name, (_, values, attrs) in extras.items()}
    found: dict[str, str | float] = {}
    ends = {name: _range(places, name) for name in ("latitude", "longitude")}
    for name, short in (("latitude", "lat"), ("longitude", "lon")):
        if ends[name] is not None:
            low, high = ends[name]
            found |= {f"geospatial_{short}_min": low, f"geospatial_{short}_max": high}
            found[f"geospatial_{short}_units"] = AXES[short]["units"]
    if None not in ends.values():
        (south, north), (west, east) = ends["latitude"], ends["longitude"]
        corners = ((south, west), (north, west), (north, east), (south, east), (south, west))
        found["geospatial_bounds"] = f"POLYGON (({', '.join(f'{lat:.9g} {lon:.9g}' for lat, lon in corners)}))"
        found["geospatial_bounds_crs"] = "EPSG:4326"
    return found | _how_deep(places)


def _range(places: Axes, standard_name: str) -> tuple[float, float] | None:
    """The least and the largest value of the coordinate of a standard name."""
    for values, attrs in places.values():
        if values is not None and attrs.get("standard_name") == standard_name and np.isfinite(values).any():
            return float(np.nanmin(values)), float(np.nanmax(values))
    return None


def _how_deep(places: Axes) -> dict[str, str | float]:
    """The vertical extent, where a coordinate is a depth or a height."""
    for values, attrs in places.values():
        positive = str(attrs.get("positive", "")).lower()
        vertical = attrs.get("standard_name") in ("depth", "height", "altitude") or positive in ("up", "down")
        if values is not None and vertical and np.isfinite(values).any():
            down = positive == "down" or (not positive and attrs.get("standard_name") == "depth")
            return {
                "geospatial_vertical_min": float(np.nanmin(values)),
                "geospatial_vertical_max": float(np.nanmax(values)),
                "geospatial_vertical_units": str(attrs.get("units", "m")),
                "geospatial_vertical_positive": "down" if down else "up",
                # Depth below, or height above, mean sea level.
                "geospatial_bounds_vertical_crs": "EPSG:5715" if down else "EPSG:5714",
            }
    return {}


def _when(axes: Axes) -> dict[str, str]:
    """The first and the last time, and the steps between, of dates."""
    time, _ = next(iter(axes.values()))
    if time is None or time.dtype.kind != "M" or np.isnat(time).any():
        return {}
    seconds = np.sort(time).astype("datetime64[ns]").astype(np.int64) / 1e9
    start, end = (str(np.datetime64(round(value), "s")) + "Z" for value in (seconds[0], seconds[-1]))
    step = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
    found = {"start": start, "end": end, "duration": iso_duration(seconds[-1] - seconds[0])}
    found["resolution"] = iso_duration(step)
    return {f"time_coverage_{name}": value for name, value in found.items()}


def iso_duration(seconds: float) -> str:
    """Returns a duration as ISO 8601 writes it: `P3DT6H`, `PT20M`, `PT0S`."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    parts = {"H": rest // 3600, "M": rest % 3600 // 60, "S": rest % 60}
    clock = "".join(f"{count}{letter}" for letter, count in parts.items() if count)
    if not days and not clock:
        return "PT0S"
    return "P" + (f"{days}D" if days else "") + (f"T{clock}" if clock else "")

"""Which variables are the velocity, and what the axes mean: CF first, by cf-xarray's criteria; then usual names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import xarray as xr
from cf_xarray.criteria import coordinate_criteria, regex

from vecfield_diffusion.data.fields import find_name
from vecfield_diffusion.data.readers.reader import plain
from vecfield_diffusion.data.units import SPEED, factor, is_degrees, says_nothing
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError, nearest


@dataclass(frozen=True)
class Options:
    """What the user says about a data set, as `open_fields` takes it; None where it is to be found out.

    `only` is the one component to read, of a set whose components lie in files of their own.
    """

    velocity: str | None = None
    u: str | None = None
    v: str | None = None
    valid: str | None = None
    invalid: str | None = None
    x: str | None = None
    y: str | None = None
    time: str | None = None
    level: int | None = None
    member: int | None = None
    only: str | None = None
    quality: str = "all"


# Which variables are the velocity.

WORDS = (("eastward", "northward"), ("zonal", "meridional"), ("east", "north"))
TURNS = (*WORDS[:2], ("x_", "y_"), ("_x", "_y"))
#: What speaks about a velocity and is none: modifiers of CF, and parts of names.
MODIFIERS = ("status_flag", "standard_error", "detection_minimum", "number_of_observations")
NEITHER = re.compile(
    r"err|std|sigma|var(iance)?\b|amp|phase|pha\b|flag|qc|stress|flux|grad|count|num|uncert|quality", re.IGNORECASE
)
OTHERS = re.compile(r"amplitude|phase\b|standard[ _](error|deviation)|variance|uncertainty|stress", re.IGNORECASE)
BOTH = ("velocity", "velocities", "vel", "uv", "flow")
#: What PIV measured before its outliers were taken out, which gives way to any other pair.
RAW = ("u_original", "v_original")
#: Ends of the names of what a filled file holds beside the mean, which goes before it.
BESIDE = ("_members", "_truth", "_quantiles")
USUAL = (
    *(("u", "v"), ("U", "V"), ("uo", "vo"), ("ugos", "vgos"), ("u10", "v10"), ("water_u", "water_v")),
    *(("uwnd", "vwnd"), ("ua", "va"), ("uas", "vas"), ("x_wind_10m", "y_wind_10m"), ("u_velocity", "v_velocity")),
    *(("velocity_x", "velocity_y"), ("vx", "vy"), ("Vx", "Vy"), ("ux", "uy"), ("U10", "V10"), ("UVEL", "VVEL")),
    *(("vozocrtx", "vomecrty"), ("u_eastward", "v_northward"), ("EWCT", "NSCT"), ("ssu", "ssv"), ("U1", "V1")),
    *(("Uwind", "Vwind"), ("u_filtered", "v_filtered"), RAW, ("ucur", "vcur"), ("UGRD", "VGRD")),
)


def choose_pair(
    variables: Mapping[str, xr.Variable], options: Options, source: str
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """The names of the two components, and what there is to say about the choice.

    As named by the user; else by `standard_name`: eastward and northward (or x and y) forms of one name, where a name
    with "assuming", an anomaly in the CF table, gives way to the plain one; else by usual names; else by names that are
    themselves two forms of one. What has units of speed goes first, then what has none; other units are no velocity.

    Raises:
        UserError: There is no pair, or there are several.
    """
    if options.u is not None and options.v is not None:
        return (options.u, options.v), ()
    variables = {str(name): item for name, item in variables.items()}
    fields = {
        name: item
        for name, item in variables.items()
        if item.dtype.kind in "fiu"
        and item.ndim >= 2
        and not _speaks_of_another(item.attrs)
        and not _has_phase(name, variables)
    }
    ranks = {name: _rank(units_of(item)) for name, item in fields.items()}
    for rank in (0, 1):
        candidates = {name: item for name, item in fields.items() if ranks[name] is not None and ranks[name] <= rank}
        titled = _by_standard_name(candidates)
        pairs = _best(titled) or _by_name(candidates, alike=rank == 0)
        if pairs:
            break
    if not pairs:
        raise UserError(
            f"{source}: no pair of velocity components found by standard_name or usual names. Expected two on the same "
            f"points, {components()}, or one array (N, 2, H, W), {option('velocity')}, out of: "
            f"{', '.join(f'{name} {item.shape}' for name, item in fields.items()) or 'no gridded variable at all'}."
        )
    pairs = [pair for pair in pairs if not any(name.endswith((*RAW, *BESIDE)) for name in pair)] or pairs
    if len(pairs) > 1:
        raise UserError(f"{source}: {len(pairs)} pairs could be the velocity. Choose one: {_listing(pairs)}")
    names = {**titled, **dict.fromkeys(_by_name(candidates), "")}
    others = [pair for pair in names if pair != pairs[0] and _alike(*pair) and not pair[0].endswith(BESIDE)]
    title = f" ({titled[pairs[0]]})" if pairs[0] in titled else ""
    chosen = f"chose {pairs[0][0]}, {pairs[0][1]}{title}; others: {_listing(others)}"
    return pairs[0], (chosen,) if others else ()


def _speaks_of_another(attrs: Mapping[str, Any]) -> bool:
    """Whether a title is that of an amplitude, an error or the like."""
    title = f"{plain(attrs.get('standard_name', ''))} {plain(attrs.get('long_name', ''))}"
    return OTHERS.search(title) is not None


def _has_phase(name: str, variables: Mapping[str, xr.Variable]) -> bool:
    """Whether it is the amplitude of a tide, as ua beside up and Ua beside Ug are: its phase is in degrees."""
    phases = [name[:-1] + letter for letter in "gp" if name[-1] in "aA"]
    return any(is_degrees(units_of(variables[phase])) for phase in phases if phase in variables)


def units_of(variable: xr.Variable | xr.DataArray) -> str:
    """The units of a variable as text, empty where it has none."""
    return str(plain(variable.attrs.get("units", ""))).strip()


def _rank(units: str) -> int | None:
    return 0 if factor(units, SPEED) is not None else 1 if says_nothing(units) else None


def _listing(pairs: Sequence[tuple[str, str]]) -> str:
    return " | ".join(components(*pair) for pair in pairs)


def _by_standard_name(fields: Mapping[str, xr.Variable]) -> dict[tuple[str, str], str]:
    """Pairs whose standard names are two forms of one, each with that of its first, on the same points if any are."""
    titles = {name: str(plain(item.attrs.get("standard_name", ""))) for name, item in fields.items()}
    titles = {name: title for name, title in titles.items() if not title.endswith(MODIFIERS)}
    pairs = {pair: titles[pair[0]] for pair in product(titles, titles) if _turned(*(titles[name] for name in pair))}
    together = {
        pair: title
        for pair, title in pairs.items()
        if (fields[pair[0]].dims, fields[pair[0]].shape) == (fields[pair[1]].dims, fields[pair[1]].shape)
    }
    return together or {pair: title for pair, title in pairs.items() if fields[pair[0]].ndim == fields[pair[1]].ndim}


def _best(titled: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    """The pairs of the plainest names, and of those the variables that are called alike."""
    plainest = [pair for pair, title in titled.items() if "assuming" not in title] or list(titled)
    return [pair for pair in plainest if _alike(*pair)] or plainest


def _turned(first: str, second: str) -> bool:
    """Whether `second` is the y form of the x form `first`."""
    forms = [first.replace(x, y) for x, y in TURNS if x in first]
    # The CF table shortens long names to 64 characters, at other letters for either form.
    return any(second and (form.startswith(second) or second.startswith(form)) for form in forms)


def _alike(first: str, second: str) -> bool:
    """Whether the variables are called alike, as ugos and vgos or x_wind_10m and y_wind_10m are."""
    turns = (("u", "v"), ("U", "V"), ("x", "y"), ("X", "Y"), *TURNS)
    return any(first.replace(x, y) == second or first.replace(x, y, 1) == second for x, y in turns if x in first)


def _by_name(fields: Mapping[str, xr.Variable], alike: bool = False) -> list[tuple[str, str]]:
    groups = dict.fromkeys(name[: len(name) - len(name.rpartition("/")[2])] for name in fields)
    groups = [""] if "" in groups and any(u in fields and v in fields for u, v in USUAL) else groups
    usual = [(group + u, group + v) for group in groups for u, v in USUAL if {group + u, group + v} <= fields.keys()]
    words = ((name, name.replace(x, y)) for name in fields for x, y in WORDS if x in name)
    pairs = usual or [pair for pair in dict.fromkeys(words) if pair[1] in fields]
    clean = [name for name in fields if not NEITHER.search(name)]
    return pairs or [pair for pair in product(clean, clean) if alike and pair[0] != pair[1] and _alike(*pair)]


def find(dataset: xr.Dataset, key: str, name: str, source: str) -> str:
    """The full name of the array called `name`, which the option `dataset.<key>` asks for.

    Raises:
        UserError: There is none, or it holds no numbers.
    """
    variables = {str(other): item for other, item in dataset.variables.items()}
    found = find_name(variables, name)
    if found is None:
        hint = f" Or name its components: {components('u', 'v')}" if {"u", "v"} <= set(variables) else ""
        kind = "array" if "turned" in dataset.encoding else "variable"
        listing = ", ".join(f"{other} {item.shape}" for other, item in variables.items()) or "nothing"
        raise UserError(
            f"{source} has no {kind} '{name}' ({option(key, name)}).{nearest(name, variables)} "
            f"It has: {listing}.{hint if key == 'velocity' else ''}"
        )
    kind = variables[found].dtype
    if kind.kind not in "fiub" and key != "time":
        raise UserError(f"{source}: '{name}' holds {kind}, expected numbers. Choose {option(key)}")
    return found


# What an axis means.

MEANINGS = {
    "longitude": "lon",
    "latitude": "lat",
    "T": "time",
    "Z": "level",
    "vertical": "level",
    "X": "x",
    "Y": "y",
}
#: Beside the names of CF: members of an ensemble, runs, and names that models use.
NAMES = {
    "member": r"members?|ens(emble)?(_?members?)?|number|realizations?|nens|perturbations?",
    "run": r"runs?|traj(ectory)?|trajectories|sims?|simulations?|cases?|samples_of_runs",
    "time": r"t|time.*|.*_time|date|datetime|xtime|n?snapshots?|n?frames?|n?samples?|n|nt|record|step|batch",
    "lon": r"xlong.*|lon(gitude)?s?([_ ].*)?|nav_lon.*",
    "lat": r"xlat.*|lat(itude)?s?([_ ].*)?|nav_lat.*",
    "level": r"(z|s|k|lev|nav_lev)_?(rho|w|c|l|t|u)|(depth|pres|plev|isobar|sigma|height).*|layers?|num_.*levels?",
    "x": r"x([_ ].*)?|nx|x[cg]|xi(_.*)?|west_east(_.*)?|easting|columns?|cols?|i[_a-z]{0,4}|.*pixels?|rlon",
    "y": r"y([_ ].*)?|ny|y[cg]|eta(_.*)?|south_north(_.*)?|northing|rows?|j[_a-z]{0,4}|.*lines?|rlat",
    "point": r"(n_?)?(node|face|cell|station|profile|obs|point|drifter|buoy|location)s?|mesh.*|nele",
}


def meaning(name: str, attrs: Mapping[str, Any]) -> str | None:
    """What a coordinate is: lon, lat, x, y, time, level, member, run or point; None where nothing says so."""
    texts = {key: str(plain(value)).strip() for key, value in attrs.items() if key != "_FillValue"}
    if texts.get("standard_name") == "realization":
        return "member"
    units, own = texts.get("units", ""), name.rpartition("/")[2].lower()
    if " since " in units:
        return "time"
    for key, role in MEANINGS.items():
        known = coordinate_criteria[key]
        for attr in ("standard_name", "axis", "units", "positive", "_CoordinateAxisType", "cartesian_axis"):
            if texts.get(attr) and texts[attr].lower() in (str(value).lower() for value in known.get(attr, ())):
                # Both of longitude and x say X; what is told apart by its units is told apart here.
                return role if attr != "axis" or not _degrees_of(texts) else _degrees_of(texts)
    if factor(units, "Pa") is not None:
        return "level"
    for role, pattern in NAMES.items():
        if re.fullmatch(pattern, own):
            return role
    for key in ("latitude", "longitude", "T", "Z", "Y", "X"):
        if own != "k" and regex[key].fullmatch(own):
            return MEANINGS[key]
    return None


def _degrees_of(texts: Mapping[str, str]) -> str | None:
    """lon or lat where the units or the standard name say so."""
    for key in ("longitude", "latitude"):
        known = coordinate_criteria[key]
        if texts.get("standard_name") == key or texts.get("units") in known["units"]:
            return MEANINGS[key]
    return None

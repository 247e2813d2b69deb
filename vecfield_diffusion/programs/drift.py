"""`vecfield-drift`: drifters through every member of a filled series, where they end, and how likely they arrive.

Each member is a series of its own (`infer.py` writes them so), and a drifter follows one member all the way. Where the
file knows the truth, because it was hidden, drifters in it are followed as well, and how often they end inside the
regions says whether these can be believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.dispersal import FEWEST, Dispersal, Goal
from vecfield_diffusion.evaluation.lagrangian import offsets, seed_drifters, trajectories
from vecfield_diffusion.evaluation.plots import Coordinates, date_of, figure_drift
from vecfield_diffusion.inference.locks import owned
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.filled import Filled, cells_of, open_filled
from vecfield_diffusion.programs.tracks import write_tracks

#: Places of which each is told by itself, at most.
TOLD = 20


def drift(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Follows drifters, writes `drift.nc`, `metrics.json` and a picture, prints and returns what was found.

    Raises:
        UserError: A file without members or with other steps, or places and times that it does not have.
    """
    check(config)
    path = folder / "drift.nc"
    if path.exists() and not config["overwrite"]:
        raise UserError(f"{path} is there already. Give another name=... to keep it, or overwrite=true")
    filled = open_filled(config)
    goal = goal_of(config["place"], filled)
    centres = chosen_starts(config, filled)
    starts, place_of = spread_out(centres, config, filled.grid)
    tracks = follow(filled.members, starts, config, filled)
    true = None if filled.truth is None else follow(filled.truth, centres, config | {"diffusivity": 0.0}, filled)
    places = [
        judged(config, filled.grid, tracks[:, :, place_of == number], None if true is None else true[:, number], goal)
        for number in range(len(centres))
    ]
    found = summary(config, places, (tracks.shape[1] - 1) * filled.step / 3600)
    folder.mkdir(parents=True, exist_ok=True)
    with owned(path, folder / "metrics.json"):
        write_tracks(path, filled, tracks, place_of, true, config)
        write_text_atomic(folder / "metrics.json", json.dumps(found, indent=2) + "\n")
        say(found, config, filled, goal)
        picture(folder / config["figure"], filled, tracks[:, :, place_of == 0], true, config, goal)
    print(f"{folder}: drift.nc, metrics.json, {config['figure']}")
    return {key: value for key, value in found.items() if isinstance(value, float)}


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of range."""
    for key, least in (("starts", 1), ("drifters", 1), ("substeps", 1), ("radius", 0), ("diffusivity", 0), ("seed", 0)):
        if config[key] < least:
            raise UserError(f"{key} must be >= {least}, got {config[key]}")
    if not config["levels"] or not all(0 < level < 1 for level in config["levels"]):
        raise UserError(f"levels={config['levels']}: expected probabilities between 0 and 1, such as [0.5,0.9]")
    if config["hours"] is not None and not config["hours"] > 0:
        raise UserError(f"hours must be > 0, got {config['hours']}")
    if not config["figure"].endswith((".png", ".pdf", ".svg")):
        raise UserError(f"figure={config['figure']}: a file that ends in .png, .pdf or .svg is expected")


# Where drifters start, and where they go.


def chosen_starts(config: Mapping[str, Any], filled: Filled) -> Tensor:
    """Returns the places `(n, 2)` where drifters start, in cells. Raises UserError for places outside the domain."""
    given = config["at"]
    if given is None:
        grid = filled.grid
        if filled.truth is not None:  # where it is known, so that drifters in it can be followed
            grid = replace(grid, valid=grid.valid & filled.truth.isfinite().all(dim=1).all(dim=0))
        return seed_drifters(grid, config["starts"], config["seed"])
    places = given if given and isinstance(given[0], list) else [given]
    if not places or any(not isinstance(place, list) or len(place) != 2 for place in places):
        raise UserError(
            f"at={given}: expected [x,y] in the coordinates of the file, such as at=[18.5,-35.2], or several"
        )
    return torch.stack([cells_of(place, filled.fields, "at") for place in places])


def spread_out(centres: Tensor, config: Mapping[str, Any], grid: Grid) -> tuple[Tensor, Tensor]:
    """Returns where the drifters of each member start, `(n, 2)` in cells, and the number of the place of each, `(n,)`.

    They are even over the disc of `radius=`; the first of each place starts in its middle.
    """
    count = config["drifters"]
    places = torch.arange(len(centres)).repeat_interleave(count)
    generator = torch.Generator().manual_seed(config["seed"])
    size, turn = torch.rand(2, len(places), generator=generator, dtype=torch.float64)
    size = 1000 * config["radius"] * size.sqrt() * (torch.arange(len(places)) % count != 0)
    row = centres[places, 1].round().long().clamp(0, grid.shape[0] - 1)
    away = torch.stack((size * (2 * math.pi * turn).cos(), size * (2 * math.pi * turn).sin()), dim=1)
    return centres[places] + away / torch.stack((grid.dx[row], grid.dy[row]), dim=1), places


def follow(series: Tensor, starts: Tensor, config: Mapping[str, Any], filled: Filled) -> Tensor:
    """Returns the ways of drifters in a series `(..., T, 2, H, W)`, `(..., T, n, 2)` in cells."""
    generator = torch.Generator().manual_seed(config["seed"] + 1)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    options = {"substeps": config["substeps"], "diffusivity": config["diffusivity"], "noise": noise}
    return trajectories(series, filled.grid, dt=filled.step, starts=starts, **options)


def goal_of(given: Sequence[float] | None, filled: Filled) -> Goal | None:
    """Returns the place of `place=`, None where none is given. Raises UserError: It is none, or outside the field."""
    if given is None:
        return None
    cells = [cells_of(given[k : k + 2], filled.fields, "place") for k in range(0, len(given) - 1, 2)]
    if len(given) == 4:
        return Goal.box(*cells, filled.grid)
    if len(given) == 3 and given[2] > 0:
        return Goal.disc(*cells, given[2], filled.grid)
    raise UserError(f"place={given}: expected [lon,lat,km], or a box [west,south,east,north], in those of the file")


# What comes of it.


def judged(
    config: Mapping[str, Any], grid: Grid, tracks: Tensor, true: Tensor | None, goal: Goal | None
) -> dict[str, float]:
    """Returns what is known of the drifters from one place: the share that is lost, how far they went, the areas of the
    regions, whether these hold the end in the truth, the share that arrived.

    Arguments:
        config: The configuration.
        grid: The grid.
        tracks: Their ways, `(M, T, n, 2)` in cells; the first one starts in the middle of the place.
        true: The way of a drifter in the truth, `(T, 2)`; None where it is not known.
        goal: The place of `place=`.
    """
    ends, centre = tracks[:, -1], tracks[0, 0, 0]
    found = {"lost": float(ends.isnan().any(dim=-1).double().mean())}
    if (spread := dispersal(ends, centre, grid)) is not None:
        found["distance_km"] = float(spread.ends.norm(dim=-1).mean())
        found |= {f"area_{level:g}_km2": spread.area(level) for level in config["levels"]}
        if true is not None and true[-1].isfinite().all():
            end = offsets(centre, true[-1], grid) / 1000
            found |= {f"held_by_{level:g}": float(spread.holds(end, level)) for level in config["levels"]}
    if goal is not None:
        found["arrival"] = float(goal.arrivals(tracks).mean())
    return found


def summary(config: Mapping[str, Any], places: Sequence[Mapping[str, float]], hours: float) -> dict[str, Any]:
    """Returns the means over all places, and what is known of each where these are few."""
    found: dict[str, Any] = {"starts": len(places), "hours": hours}
    for key in dict.fromkeys(key for place in places for key in place):
        found[key] = float(np.mean([place[key] for place in places if key in place]))
    first = f"held_by_{config['levels'][0]:g}"
    if first in found:
        found["true_drifters"] = sum(first in place for place in places)
    return found | {"places": list(places) if len(places) <= TOLD else []}


def dispersal(ends: Tensor, centre: Tensor, grid: Grid) -> Dispersal | None:
    """Returns the density of ends `(M, n, 2)` in kilometres from where they started.

    None where those of too few members are left, or all are at one place, as where everything was measured.
    """
    group = torch.arange(len(ends))[:, None].expand(ends.shape[:2])
    alive = ends.isfinite().all(dim=-1)
    left = ends[alive]
    if len(group[alive].unique()) < FEWEST or (left == left[0]).all():
        return None
    return Dispersal(offsets(centre, left, grid) / 1000, group[alive])


def say(found: Mapping[str, Any], config: Mapping[str, Any], filled: Filled, goal: Goal | None) -> None:
    """Prints what was found."""
    count = len(filled.members) * config["drifters"]
    print(
        f"{found['starts']} place{'s' * (found['starts'] > 1)}, {count} drifters from each in {len(filled.members)} "
        f"members, {found['hours']:g} hours from {date_of(filled.fields, filled.first)}: "
        f"{100 * found['lost']:.3g} % lost at land or an edge"
        + (f", {found['distance_km']:.3g} km away at the end" if "distance_km" in found else "")
    )
    for number, place in enumerate(found["places"]):
        parts = [f"{level:.0%} within {place[f'area_{level:g}_km2']:.3g} km2" for level in config["levels"]
                 if "distance_km" in place]  # fmt: skip
        if "arrival" in place:
            parts.append(f"{place['arrival']:.1%} {goal.words}")
        if parts:
            print(f"place {number + 1}: {', '.join(parts)}")
    if "distance_km" not in found:
        print(f"note: there are no regions, for fewer than {FEWEST} members have drifters that are not lost and differ")
    if "true_drifters" in found:
        held = ", ".join(f"{level:.0%}: {found[f'held_by_{level:g}']:.1%}" for level in config["levels"])
        count = found["true_drifters"]
        print(f"ends of {count} drifter{'s' * (count != 1)} in the truth that the regions hold: {held}")


def picture(
    path: Path,
    filled: Filled,
    tracks: Tensor,
    true: Tensor | None,
    config: Mapping[str, Any],
    goal: Goal | None,
) -> None:
    """Draws the drifters `(M, T, n, 2)` of the first place."""
    centre = tracks[0, 0, 0]
    figure_drift(
        path,
        filled.members.mean(dim=0).mean(dim=0),
        tracks,
        filled.grid,
        Coordinates.of(filled.fields),
        spread=dispersal(tracks[:, -1], centre, filled.grid),
        levels=config["levels"],
        truth=None if true is None else true[:, 0],
        goal=goal,
        date=date_of(filled.fields, filled.first),
        hours=(tracks.shape[1] - 1) * filled.step / 3600,
        units=filled.fields.units,
    )

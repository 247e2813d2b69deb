"""Coastlines, where the optional library cartopy and its map data are installed; nothing is fetched."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

try:
    import cartopy
    from cartopy.io import shapereader
except ImportError:  # the extra `maps`
    cartopy = None

#: Scales of Natural Earth, the finest first.
_SCALES = ("10m", "50m", "110m")


def coastlines(extent: tuple[float, float, float, float]) -> list[NDArray[np.floating]]:
    """Returns the coastlines that enter a box, each as longitudes and latitudes `(n, 2)`; none without cartopy.

    Arguments:
        extent: West, east, south and north in degrees; longitudes of any turn, such as 350 to 370.
    """
    west, east = sorted(extent[:2])
    south, north = sorted(extent[2:])
    found = []
    for line in _all():
        for turn in (-360.0, 0.0, 360.0):
            x, y = line[:, 0] + turn, line[:, 1]
            if x.max() >= west and x.min() <= east and y.max() >= south and y.min() <= north:
                found.append(np.stack((x, y), axis=1))
    return found


@cache
def _all() -> list[NDArray[np.floating]]:
    """Every coastline of the finest map that is on the disk."""
    file = None if cartopy is None else next(filter(Path.is_file, _files()), None)
    if file is None:
        return []
    parts = [getattr(shape, "geoms", [shape]) for shape in shapereader.Reader(file).geometries()]
    return [np.asarray(line.coords)[:, :2] for lines in parts for line in lines]


def _files() -> list[Path]:
    """Where cartopy keeps its coastlines."""
    folders = (cartopy.config["data_dir"], cartopy.config["pre_existing_data_dir"])
    inside = Path("shapefiles") / "natural_earth" / "physical"
    return [Path(folder) / inside / f"ne_{scale}_coastline.shp" for scale in _SCALES for folder in folders if folder]

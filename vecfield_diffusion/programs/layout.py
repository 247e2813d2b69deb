"""What the file of filled fields is like: what it takes from the input, and what it says of where it comes from."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vecfield_diffusion import __version__
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.inference.files import KEY
from vecfield_diffusion.inference.metadata import depth_of, discovery, inherited, named_axis
from vecfield_diffusion.inference.template import FileLayout, Template
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.gaussian import Series
from vecfield_diffusion.programs.products import chosen_products

#: Attributes of the native file, which the output is not.
NATIVE = {"format", "version", "dx", "dy", "boundary_x", "boundary_y"}

#: Keys of a configuration that the filled fields do not depend on.
FREE = {"name", "batch", "device", "colour", "figure", "overwrite", "output", "options"} | {
    *("metadata", "products", "quantiles", "exceed", "split"),  # they are made of the fields
}


def key(filling: Filling | Series) -> str:
    """Returns what the filled fields depend on, in short: an interrupted run goes on only with the same."""
    config = {name: value for name, value in filling.config.items() if name not in FREE}
    states = [(str(file), Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in filling.files]
    text = json.dumps([config, filling.indices, states], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout(filling: Filling | Series, *, split: bool = False) -> FileLayout:
    """Returns what the output is like; `split` is of members in files of their own.

    Raises:
        UserError: Products that cannot be made.
    """
    config, from_input = filling.config, template(filling)
    products = chosen_products(config, from_input, filling.grid, filling.fields.units)
    return FileLayout(from_input, filling.grid.valid.cpu().numpy(), config["members"], products, split)


def template(filling: Filling | Series) -> Template:
    """Returns what the output takes from the input, and where it comes from."""
    fields, config = filling.fields, filling.config
    command = " ".join(f"infer.py ckpt={config['ckpt']} input={config['input']}".split())
    done = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} filled by vecfield_diffusion {__version__}: {command}"
    given = {name: value for name, value in {**fields.global_attrs, **fields.attrs}.items() if name not in NATIVE}
    dims = tuple(map(bare, fields.dims))
    kinds = ("time", fields.y_name, fields.x_name)
    found = fields.coordinates(filling.indices).values()
    axes = {dim: named_axis(kind, *axis) for dim, kind, axis in zip(dims, kinds, found, strict=True)}
    axes = {name: axis for name, axis in axes.items() if axis[0] is not None}
    others = {bare(name): (tuple(map(bare, along)), *rest) for name, (along, *rest) in fields.extra_coords.items()}
    others |= depth_of(config["metadata"])
    provenance = {
        "source": fields.source,
        **inherited(given),
        **discovery(
            given,
            config["metadata"],
            axes={dim: axes.get(dim, (None, {})) for dim in dims},
            extras=others,
            components=fields.component_attrs,
            members=config["members"],
            key=key(filling),
        ),
        "history": "\n".join([done, *filter(None, [str(fields.global_attrs.get("history", ""))])]),
        "config": yaml.safe_dump({name: value for name, value in config.items() if name != "options"}, sort_keys=False),
        "ckpt": filling.origin,
        "seed": config["seed"],
        "vecfield_diffusion_version": __version__,
        KEY: key(filling),
    }
    return Template(
        names=component_names(fields),
        dims=dims,
        coordinates=axes,
        units=fields.units,
        component_attrs=fields.component_attrs,
        extra_coords=others,
        attributes={name: stored(value) for name, value in provenance.items()},
        restore=fields.restore,
    )


def stored(value: Any) -> Any:
    """Returns an attribute as netCDF can hold it: text or numbers."""
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return array.astype(np.int8) if array.ndim else int(array)
    return value if array.dtype.kind in "fiuUS" else str(value)


def component_names(fields: Fields) -> tuple[str, str]:
    """Returns the names of the components in the output: as in the source, where it has two variables."""
    own = tuple(map(bare, fields.names))
    return own if all(name.isidentifier() for name in own) and own[0] != own[1] else ("u", "v")


def bare(name: str) -> str:
    """Returns a name without the groups of the file that it lies in."""
    return name.rpartition("/")[2]

"""What is public: functions that do what the commands do, with Datasets for files and keywords for options.

Keywords are the keys of the command line. What has a dot there is a keyword by its whole name,
`**{"sampler.steps": 8}`, or a mapping, `trainer=dict(max_minutes=10)`; an option with settings of its own may be a
pair, `sampler=("heun", dict(steps=8))`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
import xarray as xr
from torch import Tensor

from vecfield_diffusion import commands
from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.programs import evaluate as evaluation
from vecfield_diffusion.programs import fill as filling
from vecfield_diffusion.programs import inspect as inspection
from vecfield_diffusion.programs import train as training
from vecfield_diffusion.programs.inspect import InspectionReport
from vecfield_diffusion.programs.source import Source, empty_fields, open_source
from vecfield_diffusion.programs.trained import Trained, choose_device, load_trained

#: What a mask may be: an option of `mask=`, a file, or the observed cells themselves, `(H, W)`, True or 1 = observed.
Mask = str | Path | np.ndarray | xr.DataArray | Tensor | None


@dataclass(frozen=True)
class Model:
    """A trained network, loaded once for many calls; `load` makes it.

    Arguments:
        ckpt: What it was loaded from.
        trained: What the checkpoint says.
        device: `auto`, `cpu` or `cuda`.
        trust: Modules that its configuration may name beside this package and torch.
    """

    ckpt: str
    trained: Trained
    device: str = "auto"
    trust: Sequence[str] = ()

    @property
    def path(self) -> Path:
        """The file of the checkpoint."""
        return self.trained.path

    def fill(self, source: Source | None = None, *, mask: Mask = None, **keywords: Any) -> xr.Dataset:
        """Returns the filled fields of a source, as `infer.py` writes them.

        The Dataset has the names, dimensions, coordinates, units and attributes of the source: the ensemble means under
        the names of its components, and with these names `_std`, `_members` and, where values are known that were
        hidden, `_truth`; and the flags `observed` and `valid`.

        Arguments:
            source: A path, a pattern, a Dataset (a lazy one, too) or the DataArrays of both components; None for the
                snapshots that training kept aside.
            mask: What is observed of what is measured; by default all of it.
            keywords: Those of `infer.py`: members, seed, time, time_context, horizon, hide, sigma_obs, sampler, ...

        Raises:
            UserError: A source or a keyword that does not fit.
        """
        source, known, keywords = sources(source, mask, keywords)
        return filling.fill(self._config(**keywords), source=source, trained=self.trained, mask=known)

    def sample(self, members: int = 16, **keywords: Any) -> xr.Dataset:
        """Returns fields drawn from nothing, on the grid of training: `members` of them, as `fill` does.

        Arguments:
            members: How many.
            keywords: See `fill`.
        """
        config = self._config(mask="none", members=members, **keywords)
        return filling.fill(config, source=empty_fields(self.trained), trained=self.trained)

    def _config(self, **keywords: Any) -> dict[str, Any]:
        """Returns the configuration of `infer.py` for some keywords."""
        same = {"ckpt": self.ckpt, "device": self.device, "trust": list(self.trust)}
        return commands.infer.config(*overrides(same | keywords))


@dataclass(frozen=True)
class Run:
    """What a training left: the run folder and the validation scores."""

    path: Path
    scores: dict[str, float]

    def load(self, **keywords: Any) -> Model:
        """Returns the trained network; keywords are those of `load`."""
        return load(self.path, **keywords)


class GivenMask:
    """The observed cells as a mask, the same for every snapshot.

    Arguments:
        cells: `(H, W)`; what is not 0, and not NaN, is observed.

    Raises:
        UserError: An array that has not two dimensions.
    """

    def __init__(self, cells: np.ndarray | xr.DataArray | Tensor) -> None:
        array = np.squeeze(np.asarray(cells))
        if array.ndim != 2:
            raise UserError(f"mask: expected the observed cells as (H, W), got an array of shape {array.shape}")
        self.cells = torch.from_numpy(np.nan_to_num(array.astype(float)) != 0)

    def __call__(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the mask `(n, 1, H, W)` on the domain `valid`. Raises UserError for one of another size, or empty."""
        if self.cells.shape != valid.shape:
            raise UserError(f"mask: it has shape {tuple(self.cells.shape)}, the field {tuple(valid.shape)}")
        if not (self.cells & valid).any():
            raise UserError("mask: it observes no valid cell. Expected True = observed; mask='none' draws freely")
        return (self.cells & valid).expand(n, 1, -1, -1)


def load(ckpt: str | Path, *, device: str = "auto", trust: Sequence[str] = ()) -> Model:
    """Returns the network of a run folder, a checkpoint file or a shipped name, such as `pretrained/turbulence`.

    Arguments:
        ckpt: Which.
        device: `auto`, `cpu` or `cuda`.
        trust: Modules that its configuration may name beside this package and torch.

    Raises:
        UserError: No checkpoint there, a damaged one, or one that names what is not trusted.
    """
    return Model(str(ckpt), load_trained(str(ckpt), choose_device(device), trust), device, tuple(trust))


def fill(source: Source, ckpt: str | Path | Model = "none", *, mask: Mask = None, **keywords: Any) -> xr.Dataset:
    """Returns the filled fields of a source; arguments and errors: `load` and `Model.fill`.

    Without a network, the series is filled in space and time by the Gaussian field that is learnt from itself.
    """
    if ckpt != "none":
        return model_of(ckpt, keywords).fill(source, mask=mask, **keywords)
    data, known, keywords = sources(source, mask, keywords)
    return filling.fill(commands.infer.config(*overrides({"ckpt": "none"} | keywords)), source=data, mask=known)


def sources(
    source: Source | None, mask: Mask, keywords: Mapping[str, Any]
) -> tuple[Source | None, GivenMask | None, dict[str, Any]]:
    """Returns a source and a mask that are no files, and the keywords with those that are."""
    keywords = dict(keywords)
    if isinstance(source, str | Path):
        keywords["input"], source = str(source), None
    if isinstance(mask, str | Path):
        keywords["mask"], mask = str(mask), None
    return source, None if mask is None else GivenMask(mask), keywords


def model_of(ckpt: str | Path | Model, keywords: dict[str, Any]) -> Model:
    """Returns the network, with what the keywords say of its loading."""
    if isinstance(ckpt, Model):
        return ckpt
    return load(ckpt, **{name: keywords.pop(name) for name in ("device", "trust") if name in keywords})


def train(source: Source | None = None, **keywords: Any) -> Run:
    """Trains a network, or goes on with the run of that name, in `outputs/train/<name>`, as `train.py` does.

    Arguments:
        source: The data; a Dataset is written into the run folder, so that the run can go on. None where `dataset=`
            says what they are: generated turbulence by default.
        keywords: Those of `train.py`: name, diffusion, model, sampler, trainer=dict(max_minutes=10), ...

    Raises:
        UserError: Data or keywords that do not fit.
        SystemExit: A signal stopped the run after its state was saved.
    """
    folder = Path("outputs/train") / commands.train.config(*overrides(keywords))["name"]
    if source is not None and not isinstance(source, str | Path):
        if not isinstance(source, xr.Dataset):
            source = xr.Dataset({part.name or name: part for part, name in zip(source, "uv", strict=True)})
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "data.nc") as temporary:
            source.to_netcdf(temporary, engine="h5netcdf")
        source = folder / "data.nc"
    if source is not None:
        keywords = {"dataset": "file", "dataset.path": str(source)} | keywords
    config = commands.train.config(*overrides(keywords))
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, training.train(config, folder))


def evaluate(model: Model | str | Path | Sequence[str | Path | Model], **keywords: Any) -> pd.DataFrame:
    """Returns the scores of a network beside the baselines on unseen fields, one row for each mask and method.

    Arguments:
        model: A network, or several to be compared.
        keywords: Those of `evaluate.py`: masks, cases, baselines, members, ...; with a `name` the table and the report
            stay in `outputs/evaluate/<name>`.

    Raises:
        UserError: Networks or keywords that do not fit.
    """
    several = [model] if isinstance(model, Model | str | Path) else list(model)
    ckpt = [one.ckpt if isinstance(one, Model) else str(one) for one in several]
    keywords = {"ckpt": ckpt if len(ckpt) > 1 else ckpt[0]} | keywords
    with tempfile.TemporaryDirectory(prefix="vecfield_") as temporary:
        folder = Path("outputs/evaluate") / keywords["name"] if "name" in keywords else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        evaluation.evaluate(commands.evaluate.config(*overrides(keywords)), folder)
        return pd.read_csv(folder / "scores.csv")


def open(source: Source, **options: Any) -> Fields:
    """Returns the snapshots of a source: `len`, `shape`, `x`, `y`, `time`, `units`, `grid.dx`, `read(indices)`.

    Arguments:
        source: A path, a pattern, a Dataset or the DataArrays of both components.
        options: Those of `dataset=file`: u, v, velocity, dx, dy, land, ...

    Raises:
        UserError: A source that cannot be read or understood.
    """
    return open_source(source, **options)


def inspect(source: Source, **options: Any) -> InspectionReport:
    """Returns what `vecfield-inspect` finds in a source; arguments and errors: `open`."""
    return inspection.inspect(source, **options)


# Keywords as a command line.


def overrides(keywords: Mapping[str, Any]) -> list[str]:
    """Returns what one would type for some keywords, options before their settings."""
    pairs = [pair for key, value in keywords.items() for pair in leaves(key, value)]
    return [f"{key}={typed(value)}" for key, value in sorted(pairs, key=lambda pair: "." in pair[0])]


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys of a value and what they are set to."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping):
        yield key, value[0]
        value = value[1]
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, part in value.items():
        yield from leaves(f"{key}.{name}", part)


def typed(value: Any) -> str:
    """Returns a value as the command line reads it, quoted where it must be."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple | range):
        return f"[{','.join(map(typed, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[\w./+-]+", value):
        return value
    # Within quotes a backslash is one, unless a quote follows.
    escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
    return f'"{escaped}"'

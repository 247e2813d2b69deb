"""What conditions a network beside the observation: earlier fields, other variables, place and season.

    history [1, 2]        the field 1 and 2 snapshots before, two channels each, as normalised velocities
    context [depth, ...]  variables of the file, standardised; two channels are a vector and turn with the axes
    latitude, longitude, season       cos and sin of the angle, where the coordinates or the time give it

Each part brings one more channel that says where it is known; elsewhere its channels are 0. A part may be unknown
altogether, as the past of the first snapshot is, and training leaves each out now and then, so that the network serves
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields, Reader, find_name
from vecfield_diffusion.data.sequences import distinct
from vecfield_diffusion.data.stored import still
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.errors import UserError

#: Snapshots that a variable is standardised by.
SNAPSHOTS = 256
ANGLES = ("latitude", "longitude", "season")


@dataclass(frozen=True)
class Context:
    """The parts of a context and the scales of its variables.

    Arguments:
        history: Lags in snapshots.
        names: Variables of the file, and any of `ANGLES`.
        mean: Of the channels of each variable.
        std: Of each variable, one for all its channels.
    """

    history: tuple[int, ...]
    names: tuple[str, ...]
    mean: dict[str, list[float]]
    std: dict[str, float]

    @classmethod
    def measure(cls, fields: Fields, indices: Sequence[int]) -> Context | None:
        """The context that `fields` ask for, its variables measured over the snapshots `indices`; None without any.

        Raises:
            UserError: A variable that is not in the file, that is never known, or an angle that nothing gives.
        """
        if not (fields.history or fields.context):
            return None
        mean, std = {}, {}
        chosen = np.asarray(indices)[:: -(-len(indices) // SNAPSHOTS)]
        for name in fields.context:
            if name in (*fields.names, "velocity"):
                raise UserError(f"dataset.context: '{name}' is what is to be filled. Its past: dataset.history=[1]")
            if name in ANGLES:
                angle(fields, name, chosen[:1])
                continue
            values = torch.from_numpy(fields.variable(name)(chosen))[..., fields.grid.valid].double()
            if not values.isfinite().any():
                raise UserError(f"dataset.context: '{name}' of {fields.source} has no value in the domain")
            centre = values.nanmean(dim=(0, 2))
            spread = (values - centre[:, None]).square().nanmean().sqrt().item()
            mean[name], std[name] = centre.tolist(), spread if spread > 0 else 1.0
        return cls(tuple(fields.history), tuple(fields.context), mean, std)

    @property
    def sizes(self) -> list[int]:
        """The number of channels of each part, the one that says where it is known included."""
        return [3] * len(self.history) + [3 if name in ANGLES else len(self.mean[name]) + 1 for name in self.names]

    def __len__(self) -> int:
        """The number of channels."""
        return sum(self.sizes)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, as a checkpoint stores them; `from_state` reads them back."""
        return asdict(self) | {"history": list(self.history), "names": list(self.names)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Context:
        """The context of `state_dict`."""
        return cls(tuple(state["history"]), tuple(state["names"]), dict(state["mean"]), dict(state["std"]))

    def lacking(self, fields: Fields) -> list[str]:
        """The variables and angles that `fields` cannot give."""
        return [name for name in self.names if part_reader(fields, name) is None]

    def parts(self, fields: Fields, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """The parts as they are, `(n, c, H, W)` each, earlier fields first; NaN where unknown, or lacking.

        Of sequences `(n, T)` they are `(n, T, c, H, W)`; what does not change in time is known of missing frames, too.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.ndim == 2:
            numbers, lay_out = distinct(chosen)
            still = [False] * len(self.history) + [timeless(fields, name) for name in self.names]
            return [
                part[:1, None].expand(*chosen.shape, -1, -1, -1) if alike else lay_out(part)
                for part, alike in zip(self.parts(fields, numbers), still, strict=True)
            ]
        chosen = chosen.reshape(-1)
        parts = []
        for lag in self.history:
            earlier = np.maximum(chosen - lag, 0)
            none = chosen < lag
            if fields.runs is not None:  # what was before the start of a trajectory is another one
                none |= fields.runs[earlier] != fields.runs[chosen]
            parts.append(fields.read(earlier).masked_fill(torch.from_numpy(none)[:, None, None, None], torch.nan))
        for name in self.names:
            read, channels = part_reader(fields, name), 2 if name in ANGLES else len(self.mean[name])
            unknown = torch.full((len(chosen), channels, *fields.shape), torch.nan)
            parts.append(unknown if read is None else torch.from_numpy(read(chosen)))
        return parts

    def moved(self, channels: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """The channels after a symmetry of the plane, which turns two of a part as a vector; an angle is none."""
        angles = [False] * len(self.history) + [name in ANGLES for name in self.names]
        out = []
        for part, is_angle in zip(channels.split(self.sizes, dim=-3), angles, strict=True):
            values, known = part[..., :-1, :, :], part[..., -1:, :, :]
            out += [move(field) for field in (values.split(1, dim=-3) if is_angle else (values,))] + [move(known)]
        return torch.cat(out, dim=-3)

    def channels(self, parts: Sequence[Tensor], normalizer: Normalizer, shown: Sequence[Tensor] = ()) -> Tensor:
        """The conditioning of a network, `(..., C, H, W)`: each part, 0 where unknown, then where it is known.

        Arguments:
            parts: See `parts`.
            normalizer: Of the velocities.
            shown: For each part, where it is not withheld, boolean, broadcasting to `(..., 1, H, W)`.
        """
        channels = []
        for k, values in enumerate(parts):
            known = values.isfinite().all(dim=-3, keepdim=True)
            if shown:
                known = known & shown[k]
            channels += [torch.where(known, self.scaled(k, values, normalizer), 0.0), known.to(values.dtype)]
        return torch.cat(channels, dim=-3)

    def scaled(self, k: int, values: Tensor, normalizer: Normalizer) -> Tensor:
        """Part k in units of the network."""
        if k < len(self.history):
            return normalizer.normalize(values)
        name = self.names[k - len(self.history)]
        if name in ANGLES:
            return values
        return (values - torch.tensor(self.mean[name]).view(-1, 1, 1)) / self.std[name]


def timeless(fields: Fields, name: str) -> bool:
    """Whether a variable or an angle is the same at all times, as depth and latitude are."""
    if name in ANGLES:
        return name != "season"
    found = find_name(fields.variables, name)
    return found is not None and still(fields.variables[found])


def part_reader(fields: Fields, name: str) -> Reader | None:
    """Reads a variable or an angle, `indices (n,) -> (n, C, H, W)`; None where there is none."""
    try:
        if name not in ANGLES:
            return fields.variable(name)
        angle(fields, name, np.zeros(1, dtype=np.int64))
    except UserError:
        return None
    return partial(angle, fields, name)


def angle(fields: Fields, name: str, indices: np.ndarray) -> np.ndarray:
    """Cosine and sine of an angle, `(n, 2, H, W)`.

    Raises:
        UserError: The fields have no such coordinate, or no dates.
    """
    height, width = fields.shape
    if name == "season":
        if fields.time is None or fields.time.dtype.kind != "M":
            raise UserError(f"dataset.context: season needs dates, which {fields.source} does not have")
        dates = fields.time[indices]
        year = dates.astype("datetime64[Y]")
        degrees = ((dates - year) / np.timedelta64(1, "D") * (360.0 / 365.25))[:, None, None]
    else:
        key, coordinate = ("lat", fields.y[:, None]) if name == "latitude" else ("lon", fields.x[None, :])
        planes = [values for other, (_, values, _) in fields.extra_coords.items() if other.lower().startswith(key)]
        planes = [values for values in planes if values.shape == fields.shape]  # of a curvilinear or projected grid
        if (fields.y_name if name == "latitude" else fields.x_name) == key:
            planes = [coordinate]
        if not planes:
            raise UserError(f"dataset.context: {fields.source} has no {name} (a coordinate in degrees)")
        degrees = planes[0][None]
    radians = np.deg2rad(np.broadcast_to(degrees, (len(indices), height, width)))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

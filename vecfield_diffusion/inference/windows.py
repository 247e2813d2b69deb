"""Fields larger than those of the network: overlapping windows, blended at every call of the denoiser.

They overlap in y and x, and those of sequences `(B, T, 2, H, W)` in time, too.

With windows w of the size of the network's fields, R_w the restriction to one of them and `p_w > 0` a weight that falls
towards its border,

    D(z, s) = sum_w R_w^T (q_w D_w(R_w z, s)),      q_w = p_w / sum_v R_w R_v^T p_v,

so that the weights of all windows that hold a cell add up to 1. The sampler walks one state of the whole field, and all
windows have agreed on a step before the next begins (Bar-Tal et al., MultiDiffusion, ICML 2023, arXiv 2302.08113; with
smooth weights Jimenez, Mixture of Diffusers, 2023, arXiv 2302.02412). Finished windows, each made of noise of its own
and blended afterwards, would keep as little as 1 / sqrt(2) of the spread where they overlap. What is left is that a
window sees nothing beyond itself: D is exact as far as a cell depends on data no farther away than the overlap, and
structures larger than a window do not hold together (benchmarks/windows.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import DenoiserFunction
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.models.base import Parametrization


@dataclass(frozen=True)
class Cover:
    """The windows along one axis of N cells: k of n cells each, no cell in more than c of them.

    Arguments:
        cells: The cells of each window, `(k, n)`.
        window: The windows that hold each cell, `(c, N)`; where there are fewer than c, the first of them again.
        place: Where the cell is in each, 0 to n - 1, `(c, N)`.
        weight: The weight of each, float64 `(c, N)`, 0 for one that is named again; every column adds up to 1.
    """

    cells: Tensor
    window: Tensor
    place: Tensor
    weight: Tensor

    @classmethod
    def of(cls, length: int, size: int, overlap: int, periodic: bool, device: torch.device) -> Cover:
        """Returns the fewest windows of `size <= length` cells that overlap by `overlap` or more; see `starts`."""
        first = torch.tensor(starts(length, size, overlap, periodic), device=device)[:, None]
        place = torch.arange(length, device=device) - first
        place = place % length if periodic else place
        holds = (place >= 0) & (place < size)
        stride = int(first.diff(dim=0).min()) if len(first) > 1 else size
        weight = taper(size, size - stride).to(device)[place.clamp(0, size - 1)]
        window = holds.byte().argsort(dim=0, descending=True, stable=True)[: int(holds.sum(0).max())]
        held = holds.gather(0, window)
        window = torch.where(held, window, window[:1])
        weight = torch.where(held, weight.gather(0, window), 0.0)
        cells = (first + torch.arange(size, device=device)) % length
        return cls(cells, window, place.gather(0, window), weight / weight.sum(0))


def starts(length: int, size: int, overlap: int, periodic: bool) -> list[int]:
    """Returns the first cell of each window, evenly spaced to a cell.

    On a periodic axis the windows go round the circle; on any other the outer two end at the borders.
    """
    if length == size:
        return [0]
    stride = size - overlap
    if periodic:
        count = math.ceil(length / stride)
        return [i * length // count for i in range(count)]
    gaps = math.ceil((length - size) / stride)
    return [i * (length - size) // gaps for i in range(gaps + 1)]


def taper(size: int, overlap: int) -> Tensor:
    """Returns the weights `(size,)` of a window: 1 in the middle, falling over `overlap` cells towards both ends.

    At the share t of the way in, `1 / (1 + exp(1 / t - 1 / (1 - t)))`, the Planck taper (McKechan et al., Class.
    Quantum Grav. 27, 084020, 2010): all its derivatives vanish at the ends. What a window makes of the cells at its
    border, of which it knows least, then counts far less than by raised cosines, and the error falls faster with the
    overlap.
    """
    inside = torch.arange(size, dtype=torch.float64) + 0.5
    t = (torch.minimum(inside, size - inside) / max(overlap, 0.5)).clamp(max=1)
    # No weight is 0: with overlaps beyond half a window a cell may lie at the border of all windows that hold it.
    return torch.sigmoid((1 / (1 - t) - 1 / t).clamp(-30, 30))


#: Calls a denoiser so that nothing but its arguments is kept for derivatives, which call it anew.
anew = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Windowed:
    """A denoiser of larger fields made of one of fields of one size, which it stands in for.

    The network computes at most `batch` windows at once, also for derivatives, which compute windows again where there
    are more. Beside these the results of all windows are held, `(size / stride)^2` times the field, and as much of the
    last observation, which is cut once for all steps of a sampler. What comes out
    depends neither on `batch` nor on the samples beside. Windows without a cell of the domain are not computed.

    Arguments:
        denoiser: Of normalised fields of `size`.
        size: The rows and columns of a window, `(h, w)`, or its frames, rows and columns, `(T, h, w)`. A field with
            fewer is filled up by cells and frames outside the domain, and does not close on itself along that axis.
            Without frames, windows of sequences have all of them.
        overlap: By how much neighbours overlap at least: in cells and frames or, as a float, as a share of `size`; one
            for all axes, or one for each.
        periodic: Whether y and x close on themselves: then windows lie across the seam as anywhere.
        batch: Windows computed at once.

    Raises:
        ValueError: A size or a batch below 1, or an overlap that is negative or not less than a window.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        size: tuple[int, ...],
        overlap: float | int | Sequence[float | int] = 0.25,
        periodic: tuple[bool, bool] = (False, False),
        batch: int = 64,
    ) -> None:
        if min(size) < 1 or len(size) not in (2, 3):
            raise ValueError(f"size must be >= 1 along two axes or three, got {tuple(size)}")
        shares = [overlap] * len(size) if isinstance(overlap, float | int) else overlap
        cells = [int(share * n) if isinstance(share, float) else share for share, n in zip(shares, size, strict=True)]
        if any(not 0 <= overlapping < n for overlapping, n in zip(cells, size, strict=True)) or min(shares) < 0:
            raise ValueError(f"overlap must be >= 0 and less than a window of {tuple(size)} cells, got {overlap}")
        if batch < 1:
            raise ValueError(f"batch must be >= 1, got {batch}")
        self.denoiser, self.size, self.overlap = denoiser, tuple(size), tuple(cells)
        self.periodic, self.batch = tuple(periodic), batch
        self._kept: dict[str, tuple[Observation, int, Any]] = {}

    def reference(self, observation: Observation) -> None:
        """Returns None: the laws of windows make none of the whole field."""
        return None

    @property
    def diffusion(self) -> Diffusion:
        """That of the denoiser."""
        return self.denoiser.diffusion

    @property
    def normalizer(self) -> Normalizer:
        """That of the denoiser."""
        return self.denoiser.normalizer

    @property
    def parametrization(self) -> Parametrization:
        """That of the denoiser."""
        return self.denoiser.parametrization

    #: Whether the score is the gradient of an energy: a blend of gradients with weights that vary in space is none.
    has_energy = False

    @property
    def autocast(self) -> torch.dtype | None:
        """That of the denoiser."""
        return self.denoiser.autocast

    def in_float32(self) -> Windowed:
        """Returns the same without autocast; see `Denoiser.in_float32`."""
        same = copy.copy(self)
        same.denoiser = self.denoiser.in_float32()
        return same

    def __call__(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """Returns the posterior mean `(B, 2, H, W)` of fields of any size, 0 outside the domain.

        Of sequences, `(B, T, 2, H, W)`, of any number of frames.

        See `Denoiser.forward`.
        """
        return self._blended(self.denoiser, z, s, observation)

    def moments(self, z: Tensor, s: Tensor, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Returns the posterior mean and the fraction of the variance, blended alike; see `Denoiser.moments`."""

        def joined(*arguments: Tensor | Observation) -> Tensor:
            return torch.cat([part for part in self.denoiser.moments(*arguments) if part is not None], dim=-3)

        both = self._blended(joined, z, s, observation)
        return both[..., :2, :, :], both[..., 2:, :, :] if both.shape[-3] > 2 else None

    def _blended(self, denoiser: DenoiserFunction, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """Returns `sum_w R_w^T (q_w D(R_w z, s))`, `(B, C, H, W)`, C the channels that `denoiser` returns."""
        n, shape = len(z), places(z)
        size, *rest = self._axes(shape)
        more = tuple(max(wanted - length, 0) for wanted, length in zip(size, shape, strict=True))
        if any(more):
            fill = partial(filled, shape=shape, more=more)
            larger = self._once("larger", n, observation, lambda: observation.apply(fill))
            return self._blended(denoiser, fill(z), s, larger)[inside(shape)]
        covers = [Cover.of(*axis, z.device) for axis in zip(shape, size, *rest, strict=True)]
        number, parts = self._once("parts", n, observation, lambda: self._parts(observation, n, shape, covers))
        values = []
        for part, sample, seen in parts:
            arguments = part(z), s[sample], seen
            values.append(denoiser(*arguments) if len(parts) == 1 else anew(denoiser, *arguments))
        return torch.where(observation.valid, blend(torch.cat(values), number, covers), 0.0)

    def _parts(
        self, observation: Observation, n: int, shape: tuple[int, ...], covers: Sequence[Cover]
    ) -> tuple[Tensor, list[tuple[partial, Tensor, Observation]]]:
        """The number of each window, see `blend`; of those computed at once what cuts them, their samples and part.

        The samples of a window follow one another: members of one observation are told the same.
        """
        observation = observation.apply(lambda tensor: tensor.expand(n, *tensor.shape[1:]))
        wet = observation.valid.select(-3, 0)
        for axis, cover in enumerate(covers, 1):
            wet = wet.movedim(axis, -1)[..., cover.cells].any(-1).movedim(-1, axis)
        wet = wet | ~wet.any()  # no domain at all: the shape of what comes out has to come from somewhere
        wet = wet.movedim(0, -1)
        number = (wet.flatten().cumsum(0) - 1).clamp(min=0).view_as(wet).movedim(-1, 0)
        firsts, parts = [cover.cells[:, 0].tolist() for cover in covers], []
        for group in wet.nonzero().split(self.batch):
            windows = [
                ([first[place] for first, place in zip(firsts, places, strict=True)], [sample for *_, sample in same])
                for places, same in groupby(group.tolist(), lambda row: row[:-1])
            ]
            part = partial(cut, shape=shape, size=[cover.cells.shape[1] for cover in covers], windows=windows)
            parts.append((part, group[:, -1], observation.apply(part)))
        return number, parts

    def _once(self, name: str, n: int, observation: Observation, make: Callable[[], Any]) -> Any:
        """What `make` makes of an observation for n samples, kept until another one comes: a sampler has the same."""
        kept = self._kept.get(name)
        if kept is None or kept[0] is not observation or kept[1] != n:
            kept = self._kept[name] = observation, n, make()
        return kept[2]

    def _axes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        """Returns size, overlap and whether it is periodic of the windows along each axis of a field of `shape`.

        Where windows have no length in time, all frames belong to each.
        """
        time = len(shape) - len(self.size)
        if time not in (0, 1):
            raise ValueError(f"windows of {self.size} need fields with {len(self.size)} axes or more, got {shape}")
        return shape[:time] + self.size, (0,) * time + self.overlap, (False,) * (len(shape) - 2) + self.periodic


def places(fields: Tensor) -> tuple[int, ...]:
    """Returns `(H, W)` of fields `(B, C, H, W)`, `(T, H, W)` of `(B, T, C, H, W)`."""
    return (*fields.shape[1:-3], *fields.shape[-2:])


def filled(tensor: Tensor, shape: tuple[int, ...], more: tuple[int, ...]) -> Tensor:
    """Returns a tensor of fields with `more` cells of 0 or False after the end of each axis that is as long as theirs.

    Arguments:
        tensor: `(B, C, H, W)` or `(B, T, C, H, W)`, 1 long along axes that it does not depend on.
        shape: The lengths of the axes of the fields, `(H, W)` or `(T, H, W)`.
        more: The cells to add to each.
    """
    wanted = [add if length == full else 0 for length, full, add in zip(places(tensor), shape, more, strict=True)]
    rows, columns = wanted[-2:]
    return F.pad(tensor, (0, columns, 0, rows, 0, 0, *((0, wanted[0]) if len(shape) > 2 else ())))


def inside(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Returns the index of the first cells of a tensor of fields, as many as `shape` has."""
    *time, rows, columns = (slice(length) for length in shape)
    return (slice(None), *time, slice(None), rows, columns)


def cut(
    tensor: Tensor, shape: tuple[int, ...], size: Sequence[int], windows: Sequence[tuple[list[int], list[int]]]
) -> Tensor:
    """Returns windows of a tensor of fields, `(P, C, h, w)` or `(P, T, C, h, w)`, 1 long where the tensor is.

    Arguments:
        tensor: `(B, C, H, W)` or `(B, T, C, H, W)`, 1 long along axes that it does not depend on.
        shape: The lengths of the axes of the fields, `(H, W)` or `(T, H, W)`.
        size: Those of the windows.
        windows: Of each, its first cells along these axes, and its samples.
    """
    axes = [axis for axis in range(1, tensor.ndim) if axis != tensor.ndim - 3]
    own, out = places(tensor), []
    for firsts, samples in windows:
        part = tensor
        for axis, first, full, length, cells in zip(axes, firsts, shape, own, size, strict=True):
            part = part if length < full else around(part, axis, first, cells)
        out.append(part if len(samples) == len(tensor) else part[samples])
    return torch.cat(out)


def around(tensor: Tensor, axis: int, first: int, cells: int) -> Tensor:
    """Returns so many cells along an axis, which goes on from its beginning where it ends."""
    beyond = first + cells - tensor.shape[axis]
    if beyond <= 0:
        return tensor.narrow(axis, first, cells)
    return torch.cat([tensor.narrow(axis, first, cells - beyond), tensor.narrow(axis, 0, beyond)], dim=axis)


def blend(values: Tensor, number: Tensor, covers: Sequence[Cover]) -> Tensor:
    """Returns the sum of windows by their weights, `(B, C, H, W)` or `(B, T, C, H, W)`.

    The weights are products, and windows are blended along one axis after another. A sum of what is gathered, not
    scattered: its order is that of the windows, on any device.

    Arguments:
        values: The windows, `(P, C, h, w)` or `(P, T, C, h, w)`.
        number: Which of them is the i-th along the first axis, the j-th along the second, ... of each sample,
            `(B, i, j)` or `(B, t, i, j)`.
        covers: The windows along each axis.
    """
    axes = [axis for axis in range(1, values.ndim) if axis != values.ndim - 3]
    for axis, cover in zip(axes, covers, strict=True):
        values = values.movedim(axis, 1)
        rest, size = values.shape[2:], values.shape[1]
        lines, total = values.reshape(-1, math.prod(rest)), values.new_zeros(())
        for window, place, weight in zip(cover.window, cover.place, cover.weight, strict=True):
            line = (number[:, window] * size).movedim(1, -1) + place  # (B, the windows along other axes, N)
            total = torch.addcmul(total, weight[:, None].to(values.dtype), F.embedding(line, lines))
        number = torch.arange(math.prod(line.shape[:-1]), device=line.device).view(line.shape[:-1])
        values = total.view(-1, line.shape[-1], *rest).movedim(1, axis)
    return values.contiguous()

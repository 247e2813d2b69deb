"""Which cells are observed: families of random masks for training and tests, and the mask of a file.

A mask is a callable `mask(n, valid (H, W), generator) -> (n, 1, H, W)`, boolean, True = observed; a function may stand
for one. It observes valid cells only, and at least one unless emptiness was asked for. All randomness comes from the
generator, so that one seed gives one set of masks. A fraction is a share of the valid cells (of all cells for `Block`,
whose rectangle may lie partly on land); where a range `[low, high]` is accepted every sample draws its own value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.data.given_masks import load_mask
from vecfield_diffusion.errors import UserError, nearest


def _interval(
    name: str, value: float | list[float] | tuple[float, ...], low: float, high: float
) -> tuple[float, float]:
    """A number or a range as a pair within `[low, high]`."""
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} must be a number or [low, high] within [{low:g}, {high:g}], got {value}")
    return pair


def _uniform(n: int, interval: tuple[float, float], generator: torch.Generator, log: bool = False) -> Tensor:
    """n numbers of the interval, `(n,)`, evenly spread or (`log`) evenly spread in their logarithms."""
    low, high = interval
    share = torch.rand(n, generator=generator, device=generator.device)
    return low * (high / low) ** share if log and low > 0 else low + (high - low) * share


def _integers(n: int, interval: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = (int(bound) for bound in interval)
    return torch.randint(low, high + 1, (n,), generator=generator, device=generator.device)


def _cells(valid: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Flat indices of valid cells, drawn evenly."""
    choices = valid.flatten().nonzero().squeeze(1)
    return choices[torch.randint(len(choices), shape, generator=generator, device=generator.device)]


class Mask:
    """A random mask; a subclass writes `draw`."""

    may_be_empty = False
    #: How it goes through the frames of a sequence: drawn `anew` in each, `fixed` in place, or `moving`.
    way = "anew"

    def __call__(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Draw n masks.

        Arguments:
            n: The number of masks.
            valid: The domain, boolean `(H, W)`.
            generator: Where all randomness comes from.

        Returns:
            Observed cells, boolean `(n, 1, H, W)`, on the device of the generator.

        Raises:
            UserError: The domain has no valid cell.
        """
        valid = valid.to(generator.device)
        if not valid.any():
            raise UserError("no cell of the field is valid, so there is nothing to observe: dataset.valid=...")
        observed = (self.draw(n, valid, generator) & valid).flatten(1)
        empty = (~observed.any(1)).nonzero().squeeze(1)
        if len(empty) and not self.may_be_empty:
            observed[empty, _cells(valid, (len(empty),), generator)] = True
        return observed.view(n, 1, *valid.shape)

    def sequence(self, n: int, frames: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Draw n sequences of masks, boolean `(n, T, 1, H, W)`, anew for every frame; see `__call__`."""
        return self(n * frames, valid, generator).unflatten(0, (n, frames))

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Observed cells `(n, H, W)`, as yet regardless of `valid` and of emptiness."""
        raise NotImplementedError


class Pixels(Mask):
    """Scattered cells, each observed independently.

    Arguments:
        fraction: The share observed; a range is drawn evenly in its logarithm.

    Raises:
        ValueError: A fraction outside [0, 1].
    """

    def __init__(self, fraction: float | list[float] = 0.1) -> None:
        self.fraction = _interval("fraction", fraction, 0.0, 1.0)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        fraction = _uniform(n, self.fraction, generator, log=True).view(n, 1, 1)
        return torch.rand(n, *valid.shape, generator=generator, device=generator.device) < fraction


class Block(Mask):
    """A rectangle is hidden and all else observed. It holds a random valid cell and lies inside the domain.

    Arguments:
        fraction: The share of all cells that is hidden.
        aspect: The largest ratio of its sides, in cells.

    Raises:
        ValueError: A fraction outside [0, 1], or an aspect below 1.
    """

    def __init__(self, fraction: float | list[float] = 0.25, aspect: float = 2.0) -> None:
        self.fraction = _interval("fraction", fraction, 0.0, 1.0)
        if not aspect >= 1.0:
            raise ValueError(f"aspect must be at least 1, got {aspect}")
        self.aspect = aspect

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        height, width = valid.shape
        area = _uniform(n, self.fraction, generator) * height * width
        aspect = _uniform(n, (1.0 / self.aspect, self.aspect), generator, log=True)
        wide = (area * aspect).sqrt().clamp(max=width)
        high = (area / wide.clamp(min=1.0)).clamp(max=height)
        wide = (area / high.clamp(min=1.0)).clamp(max=width).round()
        high = high.round()
        centre = _cells(valid, (n,), generator)
        inside = torch.ones(n, *valid.shape, dtype=torch.bool, device=valid.device)
        for axis, middle, side in ((1, centre // width, high), (2, centre % width, wide)):
            size = valid.shape[axis - 1]
            first = torch.minimum((middle - side // 2).clamp(min=0), size - side).view(n, 1)
            index = torch.arange(size, device=valid.device)
            along = (index >= first) & (index < first + side.view(n, 1))
            inside &= along.unsqueeze(3 - axis)
        return ~inside


class Track(Mask):
    """The path of a vehicle that measures where it is.

    The heading is a random walk, so the path is smooth over about 2 / turn^2 cells; at the edge of the domain the
    vehicle is reflected. Each leg starts on a valid cell. Cells of land are crossed without being observed, and legs
    are added until the fraction is reached.

    Arguments:
        fraction: The share of the valid cells that is observed.
        legs: The number of legs, or a range of it; more follow where a path crosses itself or land.
        turn: The standard deviation of the change of heading from cell to cell, in radians.

    Raises:
        ValueError: A fraction outside [0, 1], fewer legs than 1, or a negative turn.
    """

    def __init__(self, fraction: float | list[float] = 0.05, legs: int | list[int] = 1, turn: float = 0.15) -> None:
        self.fraction = _interval("fraction", fraction, 0.0, 1.0)
        self.legs = _interval("legs", legs, 1, 1000)
        if not turn >= 0.0:
            raise ValueError(f"turn must be at least 0, got {turn}")
        self.turn = turn

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        cells = valid.sum().item()
        wanted = (_uniform(n, self.fraction, generator) * cells).round().clamp(min=1.0)
        legs = _integers(n, self.legs, generator)
        length = (1.1 * wanted / legs).ceil().clamp(min=2.0)
        # Steps enough for paths that cross themselves, and for the share of the steps that land takes away.
        steps = math.ceil(3.0 * wanted.max().item() * valid.numel() / cells) + 16
        path = self._walk(valid, steps, length.long(), generator)
        return _first_cells(path, valid, wanted)

    def _walk(self, valid: Tensor, steps: int, length: Tensor, generator: torch.Generator) -> Tensor:
        """Flat indices of the cells along the path of every sample, `(n, steps)`; a new leg every `length` steps."""
        n, device = len(length), generator.device
        height, width = valid.shape
        step = torch.arange(steps, device=device).expand(n, -1)
        leg = step // length.view(n, 1)
        first = leg * length.view(n, 1)
        count = math.ceil(steps / length.min().item())
        start = _cells(valid, (n, count), generator).gather(1, leg)
        turns = self.turn * torch.randn(n, steps, generator=generator, device=device)
        heading = 2.0 * math.pi * torch.rand(n, count, generator=generator, device=device).gather(1, leg)
        heading = heading + turns.cumsum(1)
        x = heading.cos().cumsum(1)
        y = heading.sin().cumsum(1)
        x = _reflect(start % width + x - x.gather(1, first), width)
        y = _reflect(start // width + y - y.gather(1, first), height)
        return y * width + x


def _reflect(position: Tensor, size: int) -> Tensor:
    """The cell of a position on a line of `size` cells with mirrors at both ends."""
    period = 2.0 * max(size - 1, 1)
    folded = position % period
    return torch.minimum(folded, period - folded).round().long().clamp(max=size - 1)


def _first_cells(path: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
    """The first `wanted` different valid cells of a path, `(n, H, W)`."""
    n, steps = path.shape
    step = torch.arange(steps, device=path.device).expand(n, -1)
    visited = torch.full((n, valid.numel()), steps, device=path.device).scatter_reduce(1, path, step, "amin")
    new = (visited.gather(1, path) == step) & valid.flatten()[path]
    last = (new.cumsum(1) <= wanted.view(n, 1)).sum(1, keepdim=True)
    return (visited < last).view(n, *valid.shape)


class Swath(Mask):
    """Parallel inclined bands are observed, as a satellite sees them.

    Arguments:
        width: The width of a band in cells, or a range of it.
        count: The number of bands across the domain, or a range of it.
        slope: The inclination against the columns in degrees, or a range of it.

    Raises:
        ValueError: A width or count below 1, or a slope outside [-90, 90].
    """

    def __init__(
        self,
        width: float | list[float] = 8.0,
        count: int | list[int] = 2,
        slope: float | list[float] | tuple[float, float] = (-30.0, 30.0),
    ) -> None:
        self.width = _interval("width", width, 1.0, math.inf)
        self.count = _interval("count", count, 1, 1000)
        self.slope = _interval("slope", slope, -90.0, 90.0)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        height, width = valid.shape
        angle = torch.deg2rad(_uniform(n, self.slope, generator))
        band = _uniform(n, self.width, generator).view(n, 1, 1)
        count = _integers(n, self.count, generator)
        cos, sin = angle.cos().view(n, 1, 1), angle.sin().view(n, 1, 1)
        spacing = (width * cos.abs() + height * sin.abs()) / count.view(n, 1, 1)
        offset = torch.rand(n, 1, 1, generator=generator, device=generator.device) * spacing
        x = torch.arange(width, device=valid.device).view(1, 1, -1)
        y = torch.arange(height, device=valid.device).view(1, -1, 1)
        return (x * cos - y * sin + offset) % spacing < band


class Clouds(Mask):
    """Clouds hide what lies under them: the highest values of a smooth random field with spectrum k^-3.

    Arguments:
        fraction: The share of the valid cells that is hidden.
        size: The size of the largest clouds, as a share of the longer side of the domain.

    Raises:
        ValueError: A fraction outside [0, 1], or a size that is not in (0, 1].
    """

    def __init__(self, fraction: float | list[float] | tuple[float, float] = (0.3, 0.7), size: float = 0.4) -> None:
        self.fraction = _interval("fraction", fraction, 0.0, 1.0)
        if not 0.0 < size <= 1.0:
            raise ValueError(f"size must be in (0, 1], got {size}")
        self.size = size

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        height, width = valid.shape
        kx = torch.fft.rfftfreq(width, device=valid.device)
        ky = torch.fft.fftfreq(height, device=valid.device).unsqueeze(1)
        gentle = 1.0 / (self.size * max(height, width))
        amplitude = (kx.square() + ky.square() + gentle**2) ** -1.5
        noise = torch.randn(n, height, width, generator=generator, device=generator.device)
        smooth = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
        hidden = (_uniform(n, self.fraction, generator) * valid.sum()).round().long()
        ranked = smooth.flatten(1)[:, valid.flatten()].sort(dim=1, descending=True).values
        limit = torch.cat([ranked, ranked.new_full((n, 1), -math.inf)], dim=1).gather(1, hidden.view(n, 1))
        return smooth <= limit.view(n, 1, 1)


class Border(Mask):
    """A frame along the edge of the domain is observed.

    Arguments:
        width: The width of the frame in cells, or a range of it.

    Raises:
        ValueError: A width below 1.
    """

    def __init__(self, width: int | list[int] = 4) -> None:
        self.width = _interval("width", width, 1, math.inf)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`.

        Raises:
            UserError: The frame covers the whole domain.
        """
        height, width = valid.shape
        if 2 * self.width[1] >= min(height, width):
            raise UserError(
                f"a border {self.width[1]:g} cells wide leaves nothing to fill of {height} x {width} cells; expected "
                f"less than {min(height, width) / 2:g}: mask.width=..."
            )
        frame = _integers(n, self.width, generator).view(n, 1, 1)
        y = torch.arange(height, device=valid.device).view(1, -1, 1)
        x = torch.arange(width, device=valid.device).view(1, 1, -1)
        distance = torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x))
        return distance < frame


class Empty(Mask):
    """Nothing is observed: unconditional generation."""

    may_be_empty = True

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        return torch.zeros(n, *valid.shape, dtype=torch.bool, device=generator.device)


class Full(Mask):
    """All valid cells are observed."""

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        return valid.expand(n, -1, -1).clone()


class Mixture(Mask):
    """Each sample draws one of several masks.

    Arguments:
        masks: The masks by name.
        weights: How often each is drawn, by the same names, relative to each other; 0 switches one off.

    Raises:
        ValueError: Names that differ, or weights that are negative or all 0.
    """

    # Emptiness is up to the masks drawn, which have seen to it already.
    may_be_empty = True

    def __init__(self, masks: dict[str, Any], weights: dict[str, float]) -> None:
        for name in set(masks) ^ set(weights):
            group, other = ("weights", masks) if name in weights else ("masks", weights)
            raise ValueError(f"{group}: '{name}' is not among {', '.join(other)}.{nearest(name, other)}")
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"weights must be at least 0, and one of them above 0, got {weights}")
        self.masks = masks
        self.weights = weights

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        weights = torch.tensor([float(self.weights[name]) for name in self.masks], device=generator.device)
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        observed = torch.zeros(n, 1, *valid.shape, dtype=torch.bool, device=generator.device)
        for number, mask in enumerate(self.masks.values()):
            samples = (chosen == number).nonzero().squeeze(1)
            if len(samples):
                observed[samples] = mask(len(samples), valid, generator)
        return observed.squeeze(1)


class MaskFile(Mask):
    """The mask of a file, the same for every sample; see `load_mask`.

    Arguments:
        path: The file.
        variable: The array in it; by default the first of two dimensions.
    """

    may_be_empty = True

    def __init__(self, path: str, variable: str | None = None) -> None:
        self.path = path
        self.variable = variable
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`.

        Raises:
            UserError: What `load_mask` raises, or a mask that observes no valid cell.
        """
        shape = tuple(valid.shape)
        if shape not in self._masks:
            self._masks[shape] = load_mask(self.path, shape, self.variable)
        mask = self._masks[shape].to(generator.device)
        if not (mask & valid).any():
            raise UserError(
                f"the mask '{self.path}' observes no valid cell. Expected 1 = observed; to generate without any "
                "observation use mask=none"
            )
        return mask.expand(n, -1, -1)

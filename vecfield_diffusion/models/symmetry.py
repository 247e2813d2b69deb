"""Symmetries of the square, how they act on fields, and networks that commute with them.

An element g moves the cells, (g x)(r) = x(g^-1 r), and turns the components of vectors with the axes:

    flip_x     (u, v)(x, y) -> (-u,  v)(-x,  y)          transpose  (u, v)(x, y) -> (v, u)(y, x)
    flip_y     (u, v)(x, y) -> ( u, -v)( x, -y)          turn       a quarter turn, flip_x after transpose

A network commutes with a group G (Cohen & Welling, ICML 2016) where each of its linear layers does. Its inner features
are functions on G: of C |G| features, those of one orbit follow one another, and g takes the feature h to g h. What a
weight must be is found by the mean of its images,

    W <- sum_g rho_out(g) W(g^-1 .) rho_in(g)^T / |G|,

which leaves alone what commutes already. So a network is trained as it is, on raw weights of which only that mean
counts, at the cost of an ordinary network of its width and of an average over its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Self

import torch
from torch import Tensor, nn

Generator = Literal["flip_x", "flip_y", "transpose", "turn"]


@dataclass(frozen=True)
class Symmetry:
    """An element of the group of the square: first the transpose, then the flips."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def matrix(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What it does to a vector (u, v), by rows."""
        x, y = -1 if self.flip_x else 1, -1 if self.flip_y else 1
        return ((0, x), (y, 0)) if self.transpose else ((x, 0), (0, y))

    @classmethod
    def of(cls, matrix: Sequence[Sequence[int]]) -> Self:
        """Returns the element of a matrix."""
        return cls(matrix[0][0] == 0, sum(matrix[0]) < 0, sum(matrix[1]) < 0)

    def __matmul__(self, other: Symmetry) -> Symmetry:
        """This element after another."""
        a, b = self.matrix, other.matrix
        return Symmetry.of([[sum(a[i][k] * b[k][j] for k in range(2)) for j in range(2)] for i in range(2)])

    @property
    def inverse(self) -> Symmetry:
        """The element that undoes it."""
        return Symmetry.of(list(zip(*self.matrix, strict=True)))

    def move(self, values: Tensor, axes: tuple[int, int] = (-2, -1)) -> Tensor:
        """Returns the values at their new places, y and x being the given `axes`."""
        values = values.transpose(*axes) if self.transpose else values
        flipped = [axis for axis, flip in zip(axes, (self.flip_y, self.flip_x), strict=True) if flip]
        return values.flip(flipped) if flipped else values

    def act(self, vectors: Tensor) -> Tensor:
        """Returns vector fields `(..., 2, H, W)` with their cells moved and their components turned."""
        moved = self.move(vectors)
        moved = moved.flip(-3) if self.transpose else moved
        signs = torch.tensor([-1.0 if flip else 1.0 for flip in (self.flip_x, self.flip_y)]).to(moved)
        return moved * signs[:, None, None]


GENERATORS = {
    "flip_x": Symmetry(flip_x=True),
    "flip_y": Symmetry(flip_y=True),
    "transpose": Symmetry(transpose=True),
    "turn": Symmetry(transpose=True, flip_x=True),
}


def group(names: Sequence[Generator]) -> tuple[Symmetry, ...]:
    """Returns the group that some elements generate, of order 1, 2, 4 or 8, the identity first.

    Raises:
        ValueError: An element of another name.
    """
    for name in names:
        if name not in GENERATORS:
            raise ValueError(f"symmetries must be of {', '.join(GENERATORS)}, got {name!r}")
    found = [Symmetry()]
    for element in found:  # grows on the way
        found += [new for name in names if (new := GENERATORS[name] @ element) not in found]
    return tuple(found)


@dataclass(frozen=True)
class Action:
    """How a group acts on channels: g takes channel `source[g][c]` to c, times `sign[g][c]`.

    Arguments:
        source: `(|G|, C)`, integers.
        sign: `(|G|, C)`, 1 or -1.
    """

    source: Tensor
    sign: Tensor

    @classmethod
    def of_vectors(cls, elements: Sequence[Symmetry], channels: int, vectors: Sequence[int]) -> Self:
        """Of channels of which those numbered in `vectors`, each with the next, are the components of vectors."""
        source = torch.arange(channels).repeat(len(elements), 1)
        sign = torch.ones(len(elements), channels)
        for n, first in product(range(len(elements)), vectors):
            g = elements[n]
            if g.transpose:
                source[n, [first, first + 1]] = torch.tensor([first + 1, first])
            sign[n, first], sign[n, first + 1] = (-1.0 if flip else 1.0 for flip in (g.flip_x, g.flip_y))
        return cls(source, sign)

    @classmethod
    def regular(cls, elements: Sequence[Symmetry], channels: int) -> Self:
        """Of functions on the group, one orbit after the other."""
        place = {h: k for k, h in enumerate(elements)}
        orbit = torch.tensor([[place[g.inverse @ h] for h in elements] for g in elements])
        first = torch.arange(0, channels, len(elements))
        source = (first[:, None] + orbit[:, None, :]).flatten(1)
        return cls(source, torch.ones(source.shape))

    @classmethod
    def trivial(cls, elements: Sequence[Symmetry], channels: int) -> Self:
        """Of channels that stay what they are."""
        return cls.of_vectors(elements, channels, ())


@dataclass(frozen=True)
class Weight:
    """How a group acts on the weight of a layer, `(O b^2, I a^2, k, k)`, or on one of fewer axes.

    Arguments:
        out: Its action on the O channels that come out.
        into: Its action on the I channels that go in.
        out_block: b: cells along each axis that the layer makes of one, as channels.
        in_block: a: cells along each axis that it takes together, as channels.
    """

    out: Action
    into: Action
    out_block: int = 1
    in_block: int = 1

    def project(self, weight: Tensor, elements: Sequence[Symmetry]) -> Tensor:
        """Returns the mean of the images of a weight, of the same shape."""
        outs, a, b = self.out.source.shape[1], self.in_block, self.out_block
        into = (self.into.source.shape[1], a, a) if weight.ndim > 1 else (1, 1, 1)
        parts = weight.view(outs, b, b, *into, *(weight.shape[2:] if weight.ndim == 4 else (1, 1)))
        total = torch.zeros_like(parts)
        for n, g in enumerate(elements):
            image = parts[self.out.source[n]] * self.out.sign[n].to(weight).view(-1, *(1,) * 7)
            if weight.ndim > 1:
                image = image[:, :, :, self.into.source[n]] * self.into.sign[n].to(weight).view(-1, *(1,) * 4)
            for axes in ((1, 2), (4, 5), (6, 7)):
                image = g.move(image, axes)
            total = total + image
        return (total / len(elements)).reshape(weight.shape)


class Commuting:
    """The weights of a network with which it commutes with a group.

    Arguments:
        elements: The group.
        actions: How it acts on each parameter, by name; others are left alone.
    """

    def __init__(self, elements: Sequence[Symmetry], actions: Mapping[str, Weight]) -> None:
        self.elements, self.actions = elements, actions
        self._kept: tuple[tuple[tuple[int, int], ...], dict[str, Tensor]] | None = None

    @property
    def turns(self) -> bool:
        """Whether an element exchanges the axes."""
        return any(g.transpose for g in self.elements)

    def enlarge(self, network: nn.Module) -> None:
        """Gives weights that were just drawn the size that their mean over the group takes from them."""
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name in self.actions and parameter.ndim > 1:
                    parameter.mul_(len(self.elements) ** 0.5)

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Returns the weights by name; where no gradient is asked for they are kept until the raw ones change."""
        raw = {name: value for name, value in network.named_parameters() if name in self.actions}
        if torch.is_grad_enabled() and any(value.requires_grad for value in raw.values()):
            return {name: self.actions[name].project(value, self.elements) for name, value in raw.items()}
        state = tuple((id(value), value._version) for value in raw.values())
        if self._kept is None or self._kept[0] != state:
            found = {name: self.actions[name].project(value, self.elements) for name, value in raw.items()}
            self._kept = state, found
        return self._kept[1]

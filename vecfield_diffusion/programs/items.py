"""How the filling of snapshots falls into items of work (`inference/work_items.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vecfield_diffusion.programs.filling import Filling, at_once
from vecfield_diffusion.programs.series import Piece


class Item(NamedTuple):
    """Pieces that one process fills, one after another, each by the method of its name, and their positions."""

    pieces: list[tuple[str, Piece]]
    positions: list[int]

    @property
    def name(self) -> str:
        """What it is called: by its end, whatever of its beginning is done."""
        return f"{self.positions[-1]:08d}"


class MemberBlock(NamedTuple):
    """Members of one snapshot, from the number `first` on, made by the method of a name."""

    method: str
    piece: Piece
    position: int
    first: int

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.position:08d}-{self.first:06d}"


def items_of(filling: Filling, work: Sequence[tuple[str, Piece]]) -> list[Item]:
    """Returns pieces as items: one that begins with what the one before has filled belongs to the same."""
    items: list[Item] = []
    for name, piece in work:
        positions = piece.positions(filling.place)
        if piece.known and items:
            items[-1].pieces.append((name, piece))
            items[-1].positions.extend(positions)
        else:
            items.append(Item([(name, piece)], positions))
    return items


def firsts(filling: Filling) -> range:
    """Returns the number of the first member of each block of an ensemble, as large as what is computed at once."""
    return range(0, filling.config["members"], at_once(filling.config, filling.trained))


def blocks_of(filling: Filling, work: Sequence[tuple[str, Piece]]) -> list[MemberBlock]:
    """Returns the blocks of pieces of one snapshot, where its members are more than are computed at once."""
    if len(firsts(filling)) == 1 or filling.trained.frames > 1:
        return []
    found = ((name, piece, piece.positions(filling.place)[0]) for name, piece in work)
    return [MemberBlock(*of, first) for of in found for first in firsts(filling)]

"""A series in pieces: the frames that a network of sequences works on at once, and what of them is kept.

Filled from both sides in time, a series is one trajectory for each member. One that is too long for the memory is
worked through in pieces. The first frames of a piece are the last that were kept of the one before, and count as
observed without error, member by member; its own last frames, which lack what is observed after them, are made anew in
the next. Filled from the past alone, every frame ends a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import MISSING, Integers, Runs

#: Values of all members of a piece, at most: 256 MB in float32, of which a sampler holds a few.
VALUES = 2**26


@dataclass(frozen=True)
class Piece:
    """Snapshots or sequences that are filled at once.

    Arguments:
        snapshots: The snapshots, `(N,)`, or those of the frames of sequences, `(N, P)`, -1 where one is missing.
        kept: Those of them whose fields are kept, boolean of the same shape.
        known: So many frames at the beginning are those that the piece before has filled.
    """

    snapshots: Integers
    kept: NDArray[np.bool_]
    known: int = 0

    @classmethod
    def of(cls, snapshots: Sequence[int]) -> Piece:
        """Returns snapshots that are filled each by itself."""
        chosen = np.asarray(snapshots, dtype=np.int64)
        return cls(chosen, np.ones(len(chosen), dtype=bool))

    def positions(self, place: Mapping[int, int]) -> list[int]:
        """Returns the places of what is kept."""
        return [place[number] for number in self.snapshots[self.kept].tolist()]


@dataclass(frozen=True)
class Plan:
    """How a network of sequences fills the snapshots of a series.

    Arguments:
        fields: The data.
        frames: The frames of the sequences that the network was trained on, T.
        stride: The steps of time between them. The frames in between belong to other sequences.
        past: Whether a snapshot is filled from what was observed until then.
        length: The frames of a piece, at most.
        offered: The snapshots that may be looked at.
        ahead: Of forecasts, how many steps before a snapshot the last observation lies; 0 where it is not foretold.
    """

    fields: Fields
    frames: int
    stride: int
    past: bool
    length: int
    offered: Sequence[int]
    ahead: int = 0

    @property
    def reach(self) -> int:
        """How many frames away the network looks."""
        return self.frames - 1

    @property
    def unseen(self) -> int:
        """The frames at the end of a sequence that are foretold."""
        return -(-self.ahead // self.stride)

    def pieces(self, wanted: Sequence[int]) -> Iterator[Piece]:
        """Yields the pieces that fill the snapshots `wanted`, those of a trajectory in the order of time."""
        runs, offered = Runs.of(self.fields), np.asarray(self.offered, dtype=np.int64)
        # Frames that the stride leaves out belong to trajectories of their own.
        thread, frame = runs.run * self.stride + runs.frame % self.stride, runs.frame // self.stride
        for number in np.unique(thread[np.asarray(wanted, dtype=np.int64)]):
            inside = offered[thread[offered] == number]
            first = frame[inside].min()
            line = np.full(frame[inside].max() - first + 1, MISSING)
            line[frame[inside] - first] = inside
            chosen = np.flatnonzero(np.isin(line, wanted))
            yield from self._ends(line, chosen) if self.past or self.ahead else self._trajectories(line, chosen)

    def _ends(self, line: Integers, chosen: Integers) -> Iterator[Piece]:
        """Sequences that end at the frames `chosen` of a line of frames; before its beginning all is missing."""
        # A forecast knows as many frames before those that are foretold as the network looks back.
        frames = np.arange(self.reach + max(1, self.unseen))
        before, size = np.concatenate((np.full(frames[-1], MISSING), line)), max(1, self.length // len(frames))
        for first in range(0, len(chosen), size):
            snapshots = before[chosen[first : first + size, None] + frames]
            yield Piece(snapshots, np.zeros_like(snapshots, dtype=bool) | (frames == frames[-1]))

    def _trajectories(self, line: Integers, chosen: Integers) -> Iterator[Piece]:
        """Trajectories through the frames `chosen` of a line of frames, and as far around them as the network looks."""
        length, wanted = max(self.length, 3 * self.reach + 1), np.isin(np.arange(len(line)), chosen)
        for group in np.split(chosen, np.flatnonzero(np.diff(chosen) > 2 * self.reach) + 1):
            begin, end, known = max(group[0] - self.reach, 0), min(group[-1] + self.reach + 1, len(line)), 0
            stop = begin
            while stop < end:
                stop = min(begin + length, end)
                # What is observed after the last frames of a piece is seen in the next alone.
                sure = stop if stop == end else stop - self.reach
                kept = np.zeros(stop - begin, dtype=bool)
                kept[known : sure - begin] = wanted[begin + known : sure]
                yield Piece(line[None, begin:stop], kept[None], known)
                begin, known = sure - self.reach, self.reach

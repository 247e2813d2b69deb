"""Observations that are used again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.training.batches import Batch
from vecfield_diffusion.training.reuse import Reused, reused


@dataclass
class Numbered:
    """Batches whose fields are their own number."""

    size: int = 2
    diffusion: EDM = EDM()

    def generator(self, stream: int, k: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * stream + k)

    def __call__(self, k: int, source: int | None = None) -> Batch:
        x0 = torch.full((2, 3, 2, 4, 4), float(k))
        return Batch(x0, x0 > 0, (k, source), torch.zeros(2), torch.zeros_like(x0))


def test_every_observation_is_used_as_often_as_it_says_and_few_are_at_once():
    reused = Reused(Numbered(), pool=3, uses=6)
    sources = [reused.source(k) for k in range(3 * 6 * 5)]
    counts = Counter(sources)
    assert set(list(counts.values())[3:-3]) == {6}
    assert all(len(set(sources[k : k + 3])) == 3 for k in range(0, len(sources), 3))
    first = [k for k, source in enumerate(sources) if source not in sources[:k]]
    assert max(b - a for a, b in zip(first[3:], first[4:], strict=False)) < 3 * 3  # one slot after another
    assert [Reused(Numbered(), pool=1, uses=1).source(k) for k in range(4)] == [0, 1, 2, 3]


def test_levels_and_noise_are_of_the_batch_itself():
    reused = Reused(Numbered(), pool=1, uses=4)
    batches = [reused(k) for k in range(4)]
    assert all(torch.equal(batch.x0, batches[0].x0) for batch in batches)
    assert len({batch.t[0].item() for batch in batches}) == 4
    assert len({batch.noise.sum().item() for batch in batches}) == 4
    assert torch.equal(reused(2).noise, batches[2].noise)


def test_a_source_is_made_once(monkeypatch: pytest.MonkeyPatch):
    made, make = [], Numbered.__call__
    monkeypatch.setattr(Numbered, "__call__", lambda self, *k: made.append(k[0]) or make(self, *k))
    reused = Reused(Numbered(), pool=2, uses=4)
    fields = [reused(k).x0[0, 0, 0, 0, 0].item() for k in range(16)]
    assert fields == [reused.source(k) for k in range(16)] and len(made) == len(set(made)) == len(set(fields))


def test_snapshots_that_are_seen_alike_are_told_together_and_share_the_uses():
    told = []
    reused = Reused(Numbered(), pool=2, uses=2, together=3, prepare=told.append)
    batches = [reused(k).observation for k in range(12)]
    assert batches[:2] == [(0, 0), (3, 3)]  # the number, and that which it is seen as
    assert batches[::2] == 2 * [(0, 0), (1, 0), (2, 0)]
    assert batches[1::2] == [(3, 3), (4, 3), (5, 3), (9, 9), (10, 9), (11, 9)]
    assert told == [[(first + k, first) for k in range(3)] for first in (0, 3, 9)]


def test_of_snapshots_a_source_gives_the_systems_and_what_is_kept_is_as_the_field_says():
    asked = []
    batches = Numbered(size=16)
    monkeyed = lambda k, source=None: asked.append((k, source))  # noqa: E731
    given = Reused(monkeyed, pool=2, uses=2, keep="systems")
    for k in range(6):
        given(k)
    assert asked == [(0, 0), (1, 1), (2, 0), (3, 3), (4, 2), (5, 3)]
    assert reused(batches, None, print) is batches
    assert reused(batches, "observations", print) == Reused(batches, together=4, prepare=print)
    assert [reused(Numbered(size=size), "systems", print).pool for size in (16, 64, 100)] == [4, 1, 1]


@pytest.mark.parametrize("name", ["pool", "uses", "together"])
def test_numbers_out_of_range(name: str):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        Reused(Numbered(), **{name: 0})

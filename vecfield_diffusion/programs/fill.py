"""Fields in, filled fields out: what the command line and the library share.

`run` fills a `Filling` a few snapshots at a time, into a file (`inference/files.FieldsWriter`) or into memory
(`inference/template.Buffer`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.data.draws import MaskFunction
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.sensors import Continued
from vecfield_diffusion.inference.calibration import apply_factor
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.ensemble import sample_ensemble
from vecfield_diffusion.inference.files import FieldsWriter
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.template import Buffer
from vecfield_diffusion.inference.work_items import shared_out
from vecfield_diffusion.memory import FULL, is_full
from vecfield_diffusion.programs.filling import Filling, at_once, open_filling
from vecfield_diffusion.programs.gaussian import Series, open_series
from vecfield_diffusion.programs.items import Item, MemberBlock, blocks_of, firsts, items_of
from vecfield_diffusion.programs.layout import layout
from vecfield_diffusion.programs.mixture import NetworkMixture
from vecfield_diffusion.programs.plausible import check_members
from vecfield_diffusion.programs.series import Piece
from vecfield_diffusion.programs.sinks import Sink
from vecfield_diffusion.programs.source import Source
from vecfield_diffusion.programs.trained import Trained
from vecfield_diffusion.progress import Progress

#: Snapshots that are written at once.
WRITTEN = 64
#: Values of the fields that are computed at once, at most, but for one alone: windows of them hold ten times as many.
VALUES = 2**23


def run(filling: Filling, sink: Sink, label: str = "filling") -> dict[str, dict[str, float]]:
    """Fills every snapshot that is not there yet, with one progress bar over all; returns what its sampler recorded.

    Raises:
        UserError: Fields that are not finite, memory that is full, or a sink that cannot be written.
    """
    config, done = filling.config, sink.done()
    if done:
        print(f"going on: {len(done)} of {len(filling.indices)} snapshots are finished")
    work = list(filling.pieces(done))
    costs = [filling.methods[name].evaluations for name, _ in work]
    total = None
    if None not in costs:
        total = sum(cost * piece.snapshots.size for cost, (_, piece) in zip(costs, work, strict=True))
        total *= config["members"]
    with progress.bar(total, "evaluations", label) as bar:
        fill_blocks(filling, work, sink, bar)
        for item in shared_out(items_of(filling, work), partial(is_done, sink), sink.work):
            for name, piece in item.pieces:
                fill_and_write(filling, name, piece, sink, bar)
    recorded = [say_summary(method) for method in filling.methods.values()]
    # All methods have one sampler, of which the first has said all.
    return {"sampler": recorded[0]} if recorded[0] else {}


def is_done(sink: Sink, item: Item) -> bool:
    """Returns whether all of an item is there."""
    return sink.done().issuperset(item.positions)


def fill_blocks(filling: Filling, work: Sequence[tuple[str, Piece]], sink: Sink, bar: Progress) -> None:
    """Makes ensembles that are larger than what is computed at once, block by block, where a sink keeps blocks."""
    kept = sink.members_of

    def done(block: MemberBlock) -> bool:
        return block.position in sink.done() or kept.find(block.position, block.first) is not None

    for block in [] if kept is None else shared_out(blocks_of(filling, work), done, sink.work):
        method, cases = filling.methods[block.method], filling.thinned(filling.known(block.piece.snapshots))
        count = min(firsts(filling).step, filling.config["members"] - block.first)
        members = sampling(filling, method, bar.update)(cases=cases, members=count, first=block.first)
        kept.add(block.position, block.first, members.numpy())
        if all(map(done, blocks_of(filling, [(block.method, block.piece)]))):
            with sink.work.claim(f"{block.position:08d}") as ours:
                if ours:
                    fill_and_write(filling, block.method, block.piece, sink, bar)


def fill_and_write(filling: Filling, name: str, piece: Piece, sink: Sink, bar: Progress) -> None:
    """Fills a piece by the method `name`, or takes its blocks, and writes it, but for what is there."""
    positions, factor = piece.positions(filling.place), filling.factors.get(name, 1.0)
    if sink.done().issuperset(positions):
        return
    bar.update(0, snapshot=f"{positions[0] + 1} of {len(filling.indices)}")
    own = [] if sink.members_of is None else blocks_of(filling, [(name, piece)])
    blocks = [sink.members_of.find(block.position, block.first) for block in own]
    if blocks and all(block is not None for block in blocks):
        members, cases = torch.from_numpy(np.concatenate(blocks)), filling.known(piece.snapshots)
        check_members(members, cases, filling.trained)
    else:
        members, cases = fill_piece(filling, filling.methods[name], piece, sink, factor=factor, progress=bar.update)
    write_piece(sink, positions, members, cases, factor=factor, done=sink.done())
    for block in own:
        sink.members_of.remove(block.position, block.first)


def fill_piece(
    filling: Filling,
    method: Method,
    piece: Piece,
    sink: Sink,
    *,
    factor: float = 1.0,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Cases]:
    """Returns the members `(M, n, 2, H, W)` of the snapshots that are kept of a piece, and their cases.

    Arguments:
        filling: What is filled.
        method: With nothing left open.
        piece: The snapshots or sequences.
        sink: Has the frames that the piece before has filled.
        factor: That of their spread.
        progress: Called with the number of snapshots or frames that an evaluation worked on.

    Raises:
        UserError: See `run`.
    """
    cases = filling.known(piece.snapshots)
    given = filling.thinned(cases)
    frames = piece.snapshots[0].size  # 1 of a snapshot

    def report(count: int) -> None:
        progress(count * frames)

    fill = sampling(filling, method, report)
    if piece.known:
        before = filled_before(filling, piece, sink)
        if factor != 1:  # what was kept has its spread corrected already
            observed = (cases.observed | cases.single)[:, : piece.known]
            before = apply_factor(before, 1 / factor, observed, cases.sigma_obs[:, : piece.known])
        sensor = cases.sensor or method.sensor
        after = (
            given.given(fields) if sensor is None else replace(cases, sensor=Continued(sensor, fields))
            for fields in before
        )
        members = torch.cat([fill(cases=known, members=1, first=m) for m, known in enumerate(after)])
    else:
        members = fill(cases=given)
    kept = torch.from_numpy(piece.kept)
    members, cases = members[:, kept], cases.snapshots(kept)
    check_members(members, cases, filling.trained)
    return members, cases


def sampling(filling: Filling, method: Method, progress: Callable[[int], None]) -> Callable[..., Tensor]:
    """Returns `(cases, members, first) -> (M, N, 2, H, W)`: `fill_cases` of the network, or `fill_mixed` of several."""
    if filling.mixture is not None:
        return partial(fill_mixed, filling.config, mixture=filling.mixture, method=method, progress=progress)
    return partial(fill_cases, filling.config, trained=filling.trained, method=method, progress=progress)


def filled_before(filling: Filling, piece: Piece, sink: Sink) -> Tensor:
    """Returns the members `(M, 1, known, 2, H, W)` of the first frames of a piece; NaN where there are none."""
    shape = (filling.config["members"], 1, piece.known, 2, *filling.grid.shape)
    before, done = torch.full(shape, torch.nan), sink.done()
    for frame, number in enumerate(piece.snapshots[0, : piece.known].tolist()):
        if filling.place.get(number) in done:
            before[:, 0, frame] = torch.from_numpy(sink.members(filling.place[number]))
    return before


def write_piece(
    sink: Sink, positions: Sequence[int], members: Tensor, cases: Cases, *, factor: float, done: set[int]
) -> None:
    """Gives filled snapshots to a sink, a few at a time, their spread times `factor`; not those that are `done`."""
    known = cases.observed | cases.single
    if factor != 1:
        members = apply_factor(members, factor, known, cases.sigma_obs)
    truth = cases.truth.numpy() if cases.hidden.any() else None
    left = [place for place, position in enumerate(positions) if position not in done]
    for first in range(0, len(left), WRITTEN):
        part = left[first : first + WRITTEN]
        given = members[:, part].numpy(), known[part].numpy(), None if truth is None else truth[part]
        sink.write([positions[place] for place in part], *given)


def say_summary(method: Method) -> dict[str, float]:
    """Prints what there is to say after the sampling, and returns what the sampler recorded, which it then forgets."""
    record = method.sampler.record
    numbers = record.numbers()
    for line in (method.inpainting.summary(), method.guidance.summary(), record.summary()):
        if line:
            print(line)
    record.clear()
    return numbers


def fill_cases(
    config: Mapping[str, Any],
    *,
    trained: Trained,
    method: Method,
    cases: Cases,
    members: int | None = None,
    first: int = 0,
    progress: Callable[[int], None] = lambda fields: None,
) -> Tensor:
    """Returns the ensemble `(M, N, 2, H, W)` of cases in physical units, of sequences `(M, N, T, 2, H, W)`.

    Arguments:
        config: Says `members`, `seed` and `batch`.
        trained: The network.
        method: With nothing left open.
        cases: What is observed.
        members: M; what the configuration says if None.
        first: The number of the first member.
        progress: See `sample_ensemble`.

    Raises:
        UserError: The memory is full.
    """
    denoiser, values = trained.denoiser, cases.y[0].numel()
    batch = max(1, min(at_once(config, trained), VALUES // values))
    method = method if cases.sensor is None else replace(method, sensor=cases.sensor)
    method = method if cases.physics is None else replace(method, physics=cases.physics)
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    known = {"grid": trained.grid, "seed": config["seed"], "first": first, "numbers": cases.noise_numbers}
    sample = partial(sample_ensemble, denoiser, observation=observation, **known)
    try:
        return sample(method, members=members or config["members"], batch=batch, progress=progress)
    except FULL as error:
        if not is_full(error):
            raise
    place = "the GPU's memory" if observation.y.is_cuda else "memory"
    fitting = largest_batch(lambda size: sample(one_step(method), members=size, batch=size), batch)
    way = f"give batch={fitting}, which fits" if fitting else "train with window=[32,32] or so, to fill in windows"
    raise UserError(f"{place} is full at batch={batch}: {way}")


def fill_mixed(
    config: Mapping[str, Any],
    *,
    mixture: NetworkMixture,
    method: Method,
    cases: Cases,
    members: int | None = None,
    first: int = 0,
    progress: Callable[[int], None] = lambda fields: None,
) -> Tensor:
    """Returns the ensemble of cases, each member drawn by one network of a mixture; arguments as of `fill_cases`."""
    wanted, found = range(first, first + (members or config["members"])), []
    for chosen, shares in mixture.shares(cases, method.sampler, config):
        some = []
        for part, share in zip(mixture.parts, shares, strict=True):
            drawn = range(max(share.start, wanted.start), min(share.stop, wanted.stop))
            if drawn:
                given = {"members": len(drawn), "first": drawn.start, "progress": progress}
                some.append(fill_cases(config, trained=part, method=method, cases=cases[chosen], **given))
        found.append(torch.cat(some))
    return torch.cat(found, dim=1)


def largest_batch(trial: Callable[[int], Any], batch: int) -> int:
    """Returns the largest of `batch / 2`, `batch / 4`, ... for which a trial finds memory; 0 for none."""
    while batch > 1:
        batch //= 2
        try:
            trial(batch)
            return batch
        except FULL as error:
            if not is_full(error):
                raise
    return 0


def one_step(method: Method) -> Method:
    """Returns the method with one step of its sampler, which takes the memory of all."""
    sampler = copy.copy(method.sampler)
    sampler.steps = 1
    return replace(method, sampler=sampler)


# In memory.


def fill(
    config: dict[str, Any],
    *,
    source: Source | Fields | None = None,
    trained: Trained | None = None,
    mask: MaskFunction | None = None,
) -> xr.Dataset:
    """Returns the filled fields of a configuration of `infer.py` in memory; arguments and errors: `open_filling`."""
    filling, work = opened(config, source=source, trained=trained, mask=mask)
    buffer = Buffer(layout(filling))
    work(buffer)
    return buffer.finish()


def opened(
    config: dict[str, Any],
    *,
    source: Source | Fields | None = None,
    trained: Trained | None = None,
    mask: MaskFunction | None = None,
) -> tuple[Filling | Series, Callable[[FieldsWriter | Buffer], dict[str, dict[str, float]]]]:
    """Returns what is filled and what fills it into a sink and returns further scores: a network, or without one
    (`ckpt=none`) the Gaussian field of the series; arguments and errors: `open_filling`."""
    if trained is None and config["ckpt"] == "none":
        series = open_series(config, source=source, mask=mask)
        return series, series.run
    filling = open_filling(config, source=source, trained=trained, mask=mask)
    return filling, partial(run, filling)

"""Checkpoints in parts: a run goes on from them bit for bit, and damaged ones are refused in one line, nothing run."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path

import pytest
from test_training import Signalled, lines, make_run, same
from torch import nn

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.signals import Interrupted
from vecfield_diffusion.training.checkpoint import load_checkpoint
from vecfield_diffusion.training.trainer import TrainingRun


def in_parts(folder: Path, steps: int = 3) -> Path:
    """A run of which a signal came after some steps, by a process that keeps its only part; where the parts lie."""
    run = make_run(folder, checkpoint_minutes=1e-9)
    run.processes.sharded = True
    run.batches = Signalled(run.batches, steps - 1, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run.train()
    (place,) = (folder / "checkpoints" / "shards").iterdir()  # after each step, and the last one alone is kept
    return place


def resumed(folder: Path) -> TrainingRun:
    run = make_run(folder)
    nn.init.normal_(run.denoiser.network.stem.weight)  # what it began with does not matter
    assert run.resume()
    return run


def test_a_run_goes_on_from_parts_and_leaves_a_whole_file(tmp_path: Path) -> None:
    make_run(tmp_path / "whole").train()
    place = in_parts(tmp_path / "parts")
    assert place.name == "00000003" and load_checkpoint(tmp_path / "parts/checkpoints/last.pt")["counters"]["step"] == 1
    unfinished = place.with_name(".00000004.tmp")
    unfinished.mkdir()  # of one that was killed
    run = resumed(tmp_path / "parts")
    assert run.counters.step == 3
    run.train()
    assert not place.parent.exists()
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts")]
    assert same(*states) and lines(tmp_path / "whole") == lines(tmp_path / "parts")


class Code:
    """What is run where a pickle is read without care."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return Path.touch, (self.place,)


def test_parts_that_are_damaged_or_of_another_network_are_refused(tmp_path: Path) -> None:
    place = in_parts(tmp_path, steps=2)
    (data,) = place.glob("*.distcp")
    description, whole = place / ".metadata", data.read_bytes()
    with pytest.raises(UserError, match="00000002 does not fit this run"):
        other = make_run(tmp_path)
        other.weights.denoiser.network.more = nn.Linear(2, 2)
        other.resume()
    for damaged in (whole[: len(whole) // 2], b""):
        data.write_bytes(damaged)
        with pytest.raises(UserError, match="00000002 does not fit this run .*Remove it"):
            make_run(tmp_path).resume()
    data.write_bytes(whole)
    described = description.read_bytes()
    for damaged in (described[:100], b"", pickle.dumps(Code(tmp_path / "run")), pickle.dumps({"a": 1})):
        description.write_bytes(damaged)
        with pytest.raises(UserError, match="00000002 does not fit this run .*Remove it"):
            make_run(tmp_path).resume()
    assert not (tmp_path / "run").exists()
    description.write_bytes(described)
    assert resumed(tmp_path).counters.step == 2

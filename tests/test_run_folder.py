"""What a run may go on with: the same configuration, whole files, the same values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from programs import SMALL, TINY, Call, is_message

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.fingerprint import fingerprint
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.locks import owned
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.run_folder import FREE, check_folder
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint


def memory(velocity: np.ndarray) -> Fields:
    height, width = velocity.shape[-2:]
    grid = Grid(torch.ones(height, width, dtype=torch.bool))
    reader = MemoryReader(velocity.astype(np.float32))
    return Fields(reader, len(velocity), grid, np.arange(width), np.arange(height), "memory", ("u", "v"))


def flows(n: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 2, 4, 6))


# What tells one set from another.


def test_the_fingerprint_is_of_values_alone() -> None:
    velocity = flows()
    velocity[3, :, 1, 2] = np.nan
    first = fingerprint(memory(velocity))
    assert first == fingerprint(memory(velocity.copy())) and len(first) == 16
    again = velocity.copy().astype(np.float32)
    again.view(np.uint32)[3, :, 1, 2] = 0x7FC00001  # another NaN
    assert fingerprint(memory(again)) == first
    for change in (lambda v: v[::-1], lambda v: v[:-1], lambda v: v * 1.0001, lambda v: v.reshape(40, 2, 6, 4)):
        assert fingerprint(memory(change(velocity))) != first
    for index in (0, 17, 39):
        other = velocity.copy()
        other[index, 0, 0, 0] += 1e-3
        assert fingerprint(memory(other)) != first


def test_of_a_large_set_evenly_spaced_snapshots_and_the_last_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecfield_diffusion.data.fingerprint.VALUES", 1)
    fields, read = memory(flows(100)), []
    monkeypatch.setattr(
        Fields, "read", lambda self, indices: read.extend(indices) or torch.zeros(len(indices), 2, 4, 6)
    )
    fingerprint(fields)
    assert len(read) <= 16 and read[-1] == 99 and len(set(np.diff(read))) == 1


# The folder.


@pytest.fixture
def begun(place: Path, tmp_path: Path) -> Path:
    """A run of ten steps, to be damaged."""
    return Path(shutil.copytree(place / "outputs/train/run", tmp_path / "run"))


def configuration(folder: Path) -> dict:
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda f: (f / "checkpoints/last.pt").unlink(), ("best.pt, but no last.pt", "another name=")),
        (lambda f: (f / "config.yaml").unlink(), ("config.yaml", "missing or damaged", "another name=")),
        (lambda f: (f / "config.yaml").write_text("a: [1\nb"), ("config.yaml", "missing or damaged")),
        (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe\x00"), ("config.yaml", "missing or damaged")),
        (lambda f: (f / "config.yaml").write_text("text"), ("expected keys with values",)),
        (lambda f: (f / "config.yaml").write_text(""), ("expected keys with values",)),
        (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), ("metrics.jsonl: line 1 is no record",)),
        (lambda f: (f / "metrics.jsonl").write_text('{"loss": 1}\n{"step": 5}\n'), ("line 1 is no record",)),
        (lambda f: (f / "metrics.jsonl").write_text("[1, 2]\n"), ("line 1 is no record",)),
        (lambda f: (f / "metrics.jsonl").write_text('{"st\n{"step": 5}\n'), ("line 1 is no record",)),
    ],
)
def test_a_damaged_run_is_refused_and_left_as_it_is(begun: Path, damage: Damage, parts: tuple[str, ...]) -> None:
    config = configuration(begun)
    damage(begun)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        check_folder(config, begun)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_line_of_the_log_that_was_cut_off_is_no_damage(begun: Path) -> None:
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    assert check_folder(configuration(begun), begun)
    (begun / "metrics.jsonl").unlink()
    assert check_folder(configuration(begun), begun)


@pytest.mark.parametrize("key", ["trainer.accumulate", "trainer.precision", "trainer.grad_clip", "trainer.max_steps"])
def test_what_messages_advise_to_change_may_change(begun: Path, key: str) -> None:
    assert key in FREE
    config = configuration(begun)
    group, name = key.split(".")
    config[group][name] = {"precision": "float32"}.get(name, 2)
    assert check_folder(config, begun)
    with pytest.raises(UserError, match="holds a run with seed=0, not 1"):
        check_folder({**config, "seed": 1}, begun)


def test_best_without_last_is_not_restarted_over(place: Path, run: Call) -> None:
    given = [*TINY, *SMALL, "name=lost", "trainer.max_steps=2"]
    assert run("train", *given)[0] == 0
    folder = place / "outputs/train/lost"
    (folder / "checkpoints/last.pt").unlink()
    best = (folder / "checkpoints/best.pt").read_bytes()
    is_message(run("train", *given), "no last.pt to go on from")
    assert (folder / "checkpoints/best.pt").read_bytes() == best


def test_a_folder_has_one_owner_at_a_time(place: Path, run: Call) -> None:
    """Two runs of one name would overwrite each other's states; what killed ones left, the next one removes."""
    folder = place / "outputs/train/held"
    options = [*TINY, *SMALL, "trainer.max_steps=1", "name=held"]
    with owned(folder / "metrics.jsonl"):
        is_message(run("train", *options), "another process is writing metrics.jsonl in outputs/train/held", "name=")
    assert not any(folder.iterdir())
    left = folder / "checkpoints/.last.pt.123.tmp"
    left.parent.mkdir()
    left.touch()
    assert run("train", *options)[0] == 0
    assert not left.exists() and not list(folder.glob("**/.*"))
    with owned(place / "outputs/evaluate/held/scores.csv"):
        given = ["ckpt=outputs/train/held", "name=held", "masks=[block]", "cases=1", "members=2"]
        is_message(run("evaluate", *given), "another process is writing scores.csv in outputs/evaluate/held")


def test_other_values_of_the_same_length_are_other_data(place: Path, run: Call) -> None:
    spacing = {"dx": 1e3, "dy": 1e3, "source": "made", "units": "m s-1"}
    rng = np.random.default_rng(0)
    velocity = rng.standard_normal((48, 2, 16, 16)).astype(np.float32)
    write_hdf5(place / "mine.h5", velocity, **spacing)
    small = [override for override in TINY if not override.startswith("dataset.")]
    given = ["dataset=hdf5", "dataset.path=mine.h5", *small, *SMALL, "name=mine"]
    assert run("train", *given, "trainer.max_steps=2")[::2] == (0, "")
    last = place / "outputs/train/mine/checkpoints/last.pt"
    with h5py.File(place / "mine.h5", "r+") as file:
        file["velocity"][10, 0, 3, 3] = 0.123
    before = last.read_bytes()
    said = "the data have changed since this run began: other values. Restore them"
    is_message(run("train", *given, "trainer.max_steps=4"), said, "another name=")
    assert last.read_bytes() == before
    with h5py.File(place / "mine.h5", "r+") as file:
        file["velocity"][10, 0, 3, 3] = velocity[10, 0, 3, 3]
    state = load_checkpoint(last)
    del state["data"]["fingerprint"]  # a run of an older version
    save_checkpoint(last, state)
    code, out, _ = run("train", *given, "trainer.max_steps=4")
    assert code == 0 and "going on from step 2" in out
    assert "fingerprint" in load_checkpoint(last)["data"]
    assert [json.loads(line)["step"] for line in (last.parents[1] / "metrics.jsonl").read_text().splitlines()][-1] == 4


def test_training_says_that_a_block_is_unlike_it(place: Path, run: Call) -> None:
    velocity = np.random.default_rng(0).standard_normal((60, 2, 16, 16)).astype(np.float32)
    velocity[54:] *= 5.0
    write_hdf5(place / "storm.h5", velocity, dx=1e3, dy=1e3, source="made")
    small = [override for override in TINY if not override.startswith("dataset.")]
    given = ["dataset=hdf5", "dataset.path=storm.h5", *small, *SMALL, "name=storm", "trainer.max_steps=1"]
    code, out, _ = run("train", *given)
    assert code == 0
    (note,) = [line for line in out.splitlines() if line.startswith("note: ") and "unlike those of training" in line]
    assert "test" in note

"""Work that processes share by a folder: each item is made once, a dead owner's by another, and the result is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from programs import FEW, ROOT, Call

from vecfield_diffusion import commands
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference import locks, work_items
from vecfield_diffusion.inference.locks import owned, shared
from vecfield_diffusion.inference.work_items import Work, shared_out
from vecfield_diffusion.programs import fill as fill_module
from vecfield_diffusion.programs.fill import fill, fill_cases


def numbered(count: int) -> list[Path]:
    """Items of work: anything that has a name."""
    return [Path(str(number)) for number in range(count)]


def test_items_are_claimed_once_and_those_of_others_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "POLL", 0.01)
    done: set[Path] = set()
    items = numbered(4)
    with shared(tmp_path / "f.nc", "key") as here, shared(tmp_path / "f.nc", "key") as there:
        mine = shared_out(items, done.__contains__, here)
        assert next(mine).name == "0"
        yours = shared_out(items, done.__contains__, there)
        assert next(yours).name == "1"  # 0 is taken
        done.add(items[0])
        assert next(mine).name == "2"  # 1 is taken
        done.update(items[1:3])
        assert next(yours).name == "3"
        waiting: list[Path] = []
        waiter = threading.Thread(target=lambda: waiting.extend(mine))  # 3 is taken, and may be given up
        waiter.start()
        time.sleep(0.05)
        assert waiter.is_alive() and not waiting
        yours.close()  # as the death of its process would
        waiter.join(5)
        assert waiting == [items[3]]
        there.finish()
        assert here.finished and list(shared_out(numbered(6), done.__contains__, here)) == []
        with there.claim("result", wait=True) as ours:
            assert not ours
    assert not list(tmp_path.iterdir())
    assert list(shared_out(items[:2], {items[0]}.__contains__, Work())) == [items[1]]


def test_only_processes_of_one_command_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STARTING", 0.1)
    path = tmp_path / "f.nc"
    (tmp_path / ".f.nc.7.tmp").touch()  # a killed process left it
    with shared(path, "key"):
        assert not (tmp_path / ".f.nc.7.tmp").exists()
        (tmp_path / ".f.nc.8.tmp").touch()
        with pytest.raises(UserError, match="another process is writing f.nc"), shared(path, "other"):
            pass
        with pytest.raises(UserError, match="another process is writing f.nc"), owned(path):
            pass
        with shared(path, "key"):
            assert (tmp_path / ".f.nc.8.tmp").exists()  # it may be being written
    with owned(path), pytest.raises(UserError, match="another process"), shared(path, "key"):
        pass
    with shared(path, "another") as work:
        assert not work.finished
    assert not list(tmp_path.iterdir())


def arrays(path: Path) -> dict[str, np.ndarray]:
    with xr.open_dataset(path) as filled:
        return {name: filled[name].values for name in filled.data_vars}


def start(place: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "infer.py"), *overrides]
    given = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=place, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_processes_of_which_one_is_killed_give_the_arrays_of_one(
    place: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, the scores too; whoever comes when all is done finds it so."""
    words = ["ckpt=outputs/train/run", "time=all", "mask=block", "batch=2", *FEW]
    assert run("infer", *words, "name=alone")[0] == 0
    folder = place / "outputs/infer/together"
    victim = start(place, *words, "name=together")
    while victim.poll() is None and not list((folder / ".parts/fields.nc/claims").glob("0*")):
        time.sleep(0.01)
    victim.send_signal(signal.SIGSTOP)  # it holds a claim, unless it has finished all
    other = start(place, *words, "name=together")
    while other.poll() is None and len(list((folder / ".parts/fields.nc").glob("*.npz"))) < 2:
        time.sleep(0.01)
    victim.kill()
    said, _ = other.communicate(timeout=120)
    assert other.returncode == 0, said
    alone, together = arrays(place / "outputs/infer/alone/fields.nc"), arrays(folder / "fields.nc")
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(together[name], value, err_msg=name)
    scores = [(place / f"outputs/infer/{name}/metrics.json").read_text() for name in ("alone", "together")]
    assert scores[0] == scores[1]
    assert {path.name for path in folder.iterdir()} == {"fields.nc", "metrics.json", "figure.png"}
    before = (folder / "fields.nc").stat().st_mtime_ns
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run("infer", *words, "name=together")[0] == 0
    assert (folder / "fields.nc").stat().st_mtime_ns == before


def test_a_large_ensemble_is_made_in_blocks_of_members(place: Path, run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that are there are used, and all together are the ensemble made in one go, to the bit."""
    words = ["ckpt=outputs/train/run", "mask=block", "members=5", "batch=2", "sampler.steps=2"]
    monkeypatch.chdir(place)
    whole = fill(commands.infer.config(*words))
    made: list[int] = []

    def counted(*arguments: object, first: int = 0, **options: object) -> torch.Tensor:
        made.append(first)
        if len(made) == 3:
            raise KeyboardInterrupt
        return fill_cases(*arguments, first=first, **options)

    monkeypatch.setattr(fill_module, "fill_cases", counted)
    assert run("infer", *words, "name=blocks")[0] == 130
    assert run("infer", *words, "name=blocks")[0] == 0
    assert made == [0, 2, 4, 4]
    found = arrays(place / "outputs/infer/blocks/fields.nc")
    for name in ("u_members", "v_members", "u", "v_std"):
        np.testing.assert_array_equal(found[name], whole[name].values, err_msg=name)
    assert not (place / "outputs/infer/blocks/.parts").exists()

"""Saving a checkpoint that is cut short, by the disk or by the user."""

from __future__ import annotations

import gc
import os
import resource
import warnings
from pathlib import Path

import pytest
import torch

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.training.checkpoint import changes, load_checkpoint, save_checkpoint


def test_ctrl_c_while_saving_leaves_the_old_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.ones(3)})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            save_checkpoint(path, {"weights": torch.zeros(3)})
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(3))


def test_a_write_that_is_cut_short_leaves_no_file_and_no_handle_open(tmp_path: Path) -> None:
    """The system really refuses the bytes: files may not grow beyond 10 kB here."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(UserError, match="last.pt: the checkpoint could not be written"):
                save_checkpoint(path, {"weights": torch.zeros(100_000), "more": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        gc.collect()
    folder = Path("/proc/self/fd")
    handles = [os.readlink(link) for link in folder.iterdir() if link.is_symlink()] if folder.is_dir() else []
    assert not [handle for handle in handles if str(tmp_path) in handle]
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(3))


def test_how_data_differ_in_words() -> None:
    known = {"length": 40, "units": "m s-1", "split": {"train": [0, 20]}, "fingerprint": "a"}
    assert changes(known, known | {"more": 1}) == "" == changes({}, known)
    assert changes(known, known | {"fingerprint": "b"}) == "other values"
    assert changes({"length": 40}, known | {"length": 41}) == "41 snapshots, not 40"
    now = {"length": 24, "units": "cm s-1", "split": {"train": [0, 12]}, "fingerprint": "b"}
    said = "24 snapshots, not 40; units of cm s-1, not m s-1; other blocks of training, validation and test"
    assert changes(known, now) == said
    assert changes(known | {"grid": 1}, known) == "another grid"

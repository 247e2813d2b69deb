"""A file is replaced whole or not at all, whatever ends the writing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from vecfield_diffusion.atomic import replacing


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is there already."""
    (tmp_path / "file").write_text("old")
    return tmp_path / "file"


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(path: Path) -> None:
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_file_and_folder_are_on_the_disk_around_the_renaming(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*names: Path) -> None:
        events.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert events == ["file", "rename", "folder"]
    assert before is None or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("bug"), OSError(errno.ENOSPC, "full")]
)
def test_whatever_ends_the_block_leaves_the_old_file_alone(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_at_the_end_leaves_the_old_file_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_folder_that_is_none(path: Path) -> None:
    with pytest.raises(NotADirectoryError), replacing(path / "below") as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"

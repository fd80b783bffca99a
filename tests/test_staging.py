"""Directories that come and go as a whole."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from vmette.staging import SUFFIX, is_place_of, publish, remove, staging, sweep


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_published_is_there_and_what_is_not_is_gone(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with staging(final) as place:
        assert place.parent == tmp_path
        assert place.stat().st_mode & 0o777 == 0o700
        (place / "file").write_text("whole")
        assert not final.exists()
        publish(place, final)
    assert (final / "file").read_text() == "whole"
    with pytest.raises(KeyError), staging(final) as place:
        (place / "file").touch()
        raise KeyError
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize("there", ["directory", "file", "link"])
def test_what_is_there_is_not_replaced(there: str, tmp_path: Path) -> None:
    final = tmp_path / "final"
    with staging(final) as place:
        if there == "directory":
            final.mkdir()
            (final / "file").touch()
        elif there == "file":
            final.touch()
        else:
            final.symlink_to(tmp_path / "nothing")
        with pytest.raises(OSError, match="final"):
            publish(place, final)
    assert names(tmp_path) == ["final"]


def test_the_disk_knows_of_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, bool]] = []
    final = tmp_path / "final"

    def fsync(fd: int) -> None:
        synced.append((os.fstat(fd).st_ino, final.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with staging(final) as place:
        publish(place, final)
    assert synced == [(final.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_nobody_knows_its_name_before(tmp_path: Path) -> None:
    with staging(tmp_path / "a") as one, staging(tmp_path / "a") as two:
        assert one != two


def test_places_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "a.b", ".a", "a.b.c"):
        with staging(tmp_path / name) as place:
            assert [other for other in ("a", "a.b", ".a", "a.b.c", "b") if is_place_of(place, Path(other))] == [name]


def test_what_was_left_is_swept_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    left = tmp_path / f".name.12345678{SUFFIX}"
    left.mkdir()
    (left / "file").touch()
    (tmp_path / ".other.part").mkdir()  # some other program's
    (tmp_path / f".file{SUFFIX}").touch()
    (tmp_path / f".link{SUFFIX}").symlink_to(tmp_path / ".other.part")
    os.mkfifo(tmp_path / f".pipe{SUFFIX}")
    with staging(tmp_path / "name") as place:
        before = names(tmp_path)
        assert sweep(tmp_path) == [place]
        assert names(tmp_path) == [name for name in before if name != left.name]
    assert sweep(tmp_path) == []
    assert sweep(tmp_path / "none") == []


def test_what_others_made_is_neither_swept_nor_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, locked = tmp_path / f".name.free{SUFFIX}", tmp_path / f".name.used{SUFFIX}"
    free.mkdir()
    locked.mkdir()
    fd = os.open(locked, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert sweep(tmp_path) == []
    finally:
        os.close(fd)
    assert names(tmp_path) == sorted([free.name, locked.name])


def test_a_sweep_that_comes_before_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    mkdtemp = tempfile.mkdtemp

    def swept_once(**options: str) -> str:
        made.append(mkdtemp(**options))
        if len(made) == 1:
            sweep(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept_once)
    with staging(tmp_path / "name") as place:
        assert os.fspath(place) == made[1]
        assert place.is_dir()


def test_removal(tmp_path: Path) -> None:
    path, link = tmp_path / "path", tmp_path / "link"
    path.mkdir()
    (path / "file").touch()
    link.symlink_to(path)
    with pytest.raises(OSError, match="link"):
        remove(link)
    remove(path)
    assert names(tmp_path) == ["link"]
    with pytest.raises(FileNotFoundError):
        remove(path)


def test_a_removal_that_does_not_come_to_its_end_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "path"
    path.mkdir()
    (path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda _: None)
        remove(path)
    assert not path.exists()
    assert len(names(tmp_path)) == 1
    sweep(tmp_path)
    assert names(tmp_path) == []

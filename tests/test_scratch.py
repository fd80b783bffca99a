"""Files that hold what a VM writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmette.errors import VmmError
from vmette.vmm.scratch import Named


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path))
    return tmp_path / "scratch"


def test_it_is_a_private_file_system_and_goes(directory: Path) -> None:
    file = Named.scratch(32)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.stat().st_size == 32 << 20
    checked = subprocess.run(["e2fsck", "-fn", file.path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    file.close()
    file.close()
    assert list(directory.iterdir()) == []


def test_a_name_that_is_forgotten_leaves_the_file(directory: Path) -> None:
    file = Named.scratch(32)
    file.forget_name()
    assert list(directory.iterdir()) == []
    assert os.fstat(file.fd).st_size == 32 << 20
    file.close()


def test_an_image_is_padded_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 513)
    file = Named.padded(tmp_path / "image", 512)
    assert file.path.read_bytes() == b"x" * 513 + bytes(511)
    assert (tmp_path / "image").stat().st_size == 513
    file.close()


def test_what_the_dead_leave_goes_and_what_the_living_have_stays(directory: Path) -> None:
    mine = Named.scratch(16)
    script = "from vmette.vmm.scratch import Named; import os, signal; Named.scratch(16); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert len(list(directory.iterdir())) == 2
    another = Named.scratch(16)
    assert set(directory.iterdir()) == {mine.path, another.path}
    mine.close()
    another.close()


def test_a_link_is_not_followed(directory: Path, tmp_path: Path) -> None:
    directory.mkdir()
    (tmp_path / "victim").touch()
    (directory / "disk-link").symlink_to(tmp_path / "victim")
    Named.scratch(16).close()
    assert (tmp_path / "victim").exists()


def test_a_directory_that_cannot_be_written_to(directory: Path) -> None:
    directory.touch()
    with pytest.raises(VmmError, match=r"^cannot make a disk in .*scratch: "):
        Named.scratch(16)


def test_an_image_that_is_gone(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(VmmError, match=r"^cannot copy .*/image to .*scratch: "):
        Named.padded(tmp_path / "image", 512)
    assert list(directory.iterdir()) == []

"""File systems made for scratch disks: what e2fsck, dumpe2fs, debugfs and the kernel find in them."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmette.errors import ConfigError
from vmette.images.ext4 import GROUP, MAX_SIZE, MIN_SIZE, crc16, format_ext4
from vmette.images.layers import BLOCK

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
GROUP_BYTES = GROUP * BLOCK
METADATA = 2 * BLOCK + GROUP // 2 * 256
"""Bytes of a whole group that its bitmaps and inodes take."""


def formatted(path: Path, size: int, label: bytes = b"scratch") -> Path:
    with path.open("wb") as file:
        format_ext4(file.fileno(), size, label=label)
    return path


def tool(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def check(path: Path) -> None:
    done = tool("e2fsck", "-fn", path)
    assert done.returncode == 0, done.stdout + done.stderr


def header(path: Path) -> dict[str, str]:
    done = tool("dumpe2fs", "-h", path)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([^:\n]+):\s+(.*)$", done.stdout, re.MULTILINE))


@settings(deadline=None, max_examples=60)
@given(st.integers(MIN_SIZE, 300 * MIB) | st.integers(MIN_SIZE, 32 * GIB))
@example(MIN_SIZE)
@example(MIN_SIZE + 1)
@example(16 * MIB)
@example(GROUP_BYTES - 1)
@example(GROUP_BYTES)
@example(GROUP_BYTES + BLOCK)
@example(GROUP_BYTES + METADATA)
@example(GROUP_BYTES + METADATA + BLOCK)
@example(2 * GROUP_BYTES)
@example(2 * GROUP_BYTES + METADATA + BLOCK - 1)
@example(128 * GROUP_BYTES)
@example(129 * GROUP_BYTES)
@example(16 * GIB + BLOCK)
def test_e2fsck_has_nothing_to_say(size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = formatted(Path(directory) / "disk", size)
        assert path.stat().st_size == size
        check(path)


def test_terabytes(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk", TIB + 12345)
    check(path)
    assert path.stat().st_blocks * 512 < MIB


def test_the_largest(tmp_path: Path) -> None:
    """That e2fsck finds nothing here either takes it half a minute; so the descriptors are looked at by hand."""
    try:
        path = formatted(tmp_path / "disk", MAX_SIZE - BLOCK)
    except OSError as error:
        pytest.skip(f"no file can be as large here: {error.strerror}")
    found = header(path)
    assert int(found["Block count"]) == MAX_SIZE // BLOCK - 1
    assert path.stat().st_blocks * 512 < 8 * MIB
    groups = MAX_SIZE // GROUP_BYTES
    with path.open("rb") as file:
        file.seek(BLOCK)
        table = file.read(32 * groups)
    uuid = UUID(found["Filesystem UUID"]).bytes
    for group in {0, 1, 2, 3, groups // 2 - 1, groups // 2, groups - 1, *random.Random(0).sample(range(groups), 200)}:
        block_bitmap, inode_bitmap, inode_table, *_, checksum = struct.unpack_from("<3I18xH", table, 32 * group)
        start = group * GROUP if group else 1 + 32 * groups // BLOCK
        assert (block_bitmap, inode_bitmap, inode_table) == (start, start + 1, start + 2)
        assert checksum == crc16(uuid + struct.pack("<I", group) + table[32 * group : 32 * group + 30])


def test_it_takes_little_of_the_host(tmp_path: Path) -> None:
    assert formatted(tmp_path / "disk", 8 * GIB).stat().st_blocks * 512 < 256 * KIB


def test_it_leaves_most_of_the_disk_to_the_guest(tmp_path: Path) -> None:
    found = header(formatted(tmp_path / "disk", 8 * GIB))
    assert int(found["Block count"]) == 8 * GIB // BLOCK
    assert int(found["Free blocks"]) > 0.96 * 8 * GIB / BLOCK
    assert int(found["Inode count"]) == 8 * GIB // (2 * BLOCK)
    assert int(found["Reserved block count"]) == 0


def test_what_dumpe2fs_says(tmp_path: Path) -> None:
    found = header(formatted(tmp_path / "disk", 300 * MIB, b"sixteen bytes ok"))
    assert found["Filesystem volume name"] == "sixteen bytes ok"
    assert found["Filesystem state"] == "clean"
    assert found["Block size"] == "4096"
    assert found["Inode size"] == "256"
    features = set(found["Filesystem features"].split())
    assert {"ext_attr", "dir_index", "filetype", "extent", "large_file", "uninit_bg", "extra_isize"} <= features
    assert not features & {"has_journal", "64bit", "metadata_csum", "resize_inode"}


def test_root_and_lost_found_are_all_there_is(tmp_path: Path) -> None:
    path = formatted(tmp_path / "disk", 64 * MIB)
    names = tool("debugfs", "-R", "ls -p /", path).stdout
    assert re.findall(r"^/(\d+)/(\d+)/(\d+)/(\d+)/([^/]+)/", names, re.MULTILINE) == [
        ("2", "040755", "0", "0", "."),
        ("2", "040755", "0", "0", ".."),
        ("11", "040700", "0", "0", "lost+found"),
    ]


def test_what_the_file_held_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * (20 * MIB))
    with path.open("r+b") as file:
        format_ext4(file.fileno(), 16 * MIB)
    assert path.stat().st_size == 16 * MIB
    check(path)
    assert path.stat().st_blocks * 512 < 256 * KIB


def test_two_disks_have_two_uuids(tmp_path: Path) -> None:
    one, other = (header(formatted(tmp_path / name, 16 * MIB)) for name in "ab")
    assert one["Filesystem UUID"] != other["Filesystem UUID"]
    assert one["Directory Hash Seed"] != other["Directory Hash Seed"]


@pytest.mark.parametrize("size", [-1, 0, MIN_SIZE - 1, MAX_SIZE + 1])
def test_a_size_that_cannot_be(size: int, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"kept")
    with path.open("r+b") as file, pytest.raises(ConfigError, match=f"a file system of {size} bytes"):
        format_ext4(file.fileno(), size)
    assert path.read_bytes() == b"kept"


def test_a_label_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is too long: at most 16 bytes"):
        formatted(tmp_path / "disk", 16 * MIB, b"x" * 17)


def test_crc16() -> None:
    assert crc16(b"123456789") == 0x4B37  # the check value of CRC-16/MODBUS, which it is
    assert crc16(b"6789", crc16(b"12345")) == 0x4B37


@pytest.mark.parametrize("size", [MIN_SIZE, 300 * MIB, 20 * GIB])
def test_the_kernel_takes_it(size: int, tmp_path: Path) -> None:
    """Mounted here, written to in many groups, and clean after that."""
    path, mount = formatted(tmp_path / "disk", size), tmp_path / "mount"
    mount.mkdir()
    done = tool("mount", "-t", "ext4", "-o", "loop", path, mount)
    if done.returncode:
        pytest.skip(f"no loop mounts here: {done.stderr.strip()}")
    try:
        for number in range(40):  # the kernel spreads the directories of the root
            directory = mount / f"directory {number}"
            directory.mkdir()
            (directory / "file").write_bytes(b"x" * 5000)
        os.setxattr(mount / "directory 0", "trusted.overlay.opaque", b"y")
        with (mount / "directory 1" / "file").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size // 4)
    finally:
        assert tool("umount", mount).returncode == 0
    check(path)
    used = header(path)
    assert int(used["Inode count"]) - int(used["Free inodes"]) == 11 + 80

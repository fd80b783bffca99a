"""`vmette.vmm.qemu.command_line`: what QEMU is told of the devices that a machine has."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from vmette.config import Disk, MachineConfig, Share
from vmette.errors import ConfigError, VmmError
from vmette.providers.base import BlockFs, BlockImage
from vmette.vmm import qemu, vhost_vsock
from vmette.vmm.qemu import PASST_DNS, Attached, command_line
from vmette.vmm.scratch import unnamed


@pytest.fixture(autouse=True)
def no_qemu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "binary", lambda arch: Path(f"/qemu-{arch}"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / 'a "disk", so called'
    path.write_bytes(bytes(512))
    return path


def argv_of(attached: Attached | None = None, **fields: Any) -> list[str]:
    config = MachineConfig(**{"root": None, "arch": "x86_64", **fields})
    return command_line(config, "tcg", lambda path, tag, read_only: ("9p", ["-device", f"9p,{tag}"]), attached)


def values(argv: list[str], option: str) -> list[str]:
    return [argv[at + 1] for at, word in enumerate(argv) if word == option]


def nodes(argv: list[str]) -> list[dict[str, Any]]:
    return [json.loads(value) for value in values(argv, "-blockdev")]


def tokens(argv: list[str]) -> list[str]:
    return argv[argv.index("-append") + 1].split(" ")


def test_what_is_not_asked_for_is_not_there() -> None:
    argv = argv_of()
    assert not {"-netdev", "-blockdev", "-add-fd", "-fsdev"} & set(argv)
    assert not [device for device in values(argv, "-device") if "net" in device or "vsock" in device or "blk" in device]
    assert [token for token in tokens(argv) if token.startswith("vmette.")] == []


def test_disks_are_raw_and_in_their_order_after_the_root(disk: Path) -> None:
    disks = (Disk(disk), Disk(disk, read_only=True))
    argv = argv_of(root=BlockImage(disk, BlockFs.EROFS), disks=disks)
    assert [node["node-name"] for node in nodes(argv)] == ["root", "disk0", "disk1"]
    assert [device for device in values(argv, "-device") if "blk" in device] == [
        "virtio-blk-device,drive=root",
        "virtio-blk-device,drive=disk0,werror=report",
        "virtio-blk-device,drive=disk1",
    ]
    for node, read_only in zip(nodes(argv), (True, False, True), strict=True):
        assert node["driver"] == "raw"
        assert node["file"]["driver"] == "file"
        assert node["file"]["filename"] == str(disk)
        assert node["read-only"] is node["file"]["read-only"] is read_only
        assert node.get("discard") == node["file"].get("discard") == (None if read_only else "unmap")


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose payload and QEMU need not be here."""
    image = tmp_path / "Image"
    image.write_bytes(bytes(56) + b"ARM\x64" + bytes(1024))
    monkeypatch.setattr("vmette.vmm.qemu.binary", lambda arch: Path("/qemu"))
    return {"arch": "aarch64", "kernel": image, "initramfs": image}


def test_on_arm_the_disks_come_backwards(disk: Path, arm: dict[str, Any]) -> None:
    argv = argv_of(root=BlockImage(disk, BlockFs.EROFS), disks=(Disk(disk), Disk(disk)), **arm)
    assert [node["node-name"] for node in nodes(argv)] == ["disk1", "disk0", "root"]


@pytest.mark.parametrize(("disks", "letter"), [(0, "b"), (2, "d")])
def test_scratch_is_the_last_disk(disk: Path, disks: int, letter: str) -> None:
    root = BlockImage(disk, BlockFs.EROFS)
    argv = argv_of(Attached(scratch=7), root=root, disks=(Disk(disk),) * disks, scratch_mib=64)
    assert values(argv, "-add-fd") == ["fd=7,set=1"]
    node = nodes(argv)[-1]
    assert node["file"]["filename"] == "/dev/fdset/1"
    assert node["cache"] == node["file"]["cache"] == {"no-flush": True}
    assert f"vmette.scratch=/dev/vd{letter}" in tokens(argv)


def test_a_scratch_disk_has_no_name_and_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    fd = unnamed(4096)
    try:
        status = os.fstat(fd)
        assert (status.st_size, status.st_nlink) == (4 << 30, 0)
        assert status.st_blocks * 512 < 1 << 20
        assert list((tmp_path / "cache/scratch").iterdir()) == []
    finally:
        os.close(fd)


def test_where_there_is_no_room_for_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(VmmError, match=r"^cannot make a scratch disk of 64 MiB in .*file/scratch: Not a directory$"):
        unnamed(64)


@pytest.mark.parametrize(
    ("attached", "backend", "how"),
    [
        (None, "user,ipv6=off,id=net", "dhcp"),
        (Attached(passt=9), "socket,fd=9,id=net", f"dhcp,{PASST_DNS}"),
    ],
)
def test_network(attached: Attached | None, backend: str, how: str) -> None:
    argv = argv_of(attached, network=True)
    assert values(argv, "-netdev") == [backend]
    (card,) = (device for device in values(argv, "-device") if device.startswith("virtio-net-device"))
    assert re.fullmatch("virtio-net-device,netdev=net,mac=52:54:00(:[0-9a-f]{2}){3},guest_announce=off", card)
    assert f"vmette.net={how}" in tokens(argv)


def test_vsock() -> None:
    assert "vhost-vsock-device,guest-cid=42,vhostfd=8" in values(
        argv_of(Attached(vsock=(42, 8)), vsock=True), "-device"
    )


def test_a_host_without_vsock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_vsock, "DEVICE", tmp_path / "vhost-vsock")
    with pytest.raises(VmmError, match="vhost-vsock does not exist; is the kernel module vhost_vsock loaded"):
        vhost_vsock.open_device()
    (tmp_path / "vhost-vsock").mkdir()
    with pytest.raises(VmmError, match="vhost-vsock cannot be opened: Is a directory"):
        vhost_vsock.open_device()
    monkeypatch.setattr(vhost_vsock, "DEVICE", tmp_path / "vhost-vsock" / "device")
    (tmp_path / "vhost-vsock" / "device").touch()
    os.close(vhost_vsock.open_device())


def test_more_devices_than_places(tmp_path: Path, disk: Path, arm: dict[str, Any]) -> None:
    shares = tuple(Share(f"tag{number}", tmp_path) for number in range(16))
    fields: dict[str, Any] = {"root": BlockImage(disk, BlockFs.EROFS), "shares": shares}
    argv_of(**fields, disks=(Disk(disk),) * 5)  # and a root, and virtio-serial
    with pytest.raises(ConfigError, match=r"^24 shares, disks and other devices: there is room for 23$"):
        argv_of(**fields, disks=(Disk(disk),) * 6)
    argv_of(**fields, disks=(Disk(disk),) * 8, **arm)
